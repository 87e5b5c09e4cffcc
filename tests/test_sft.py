"""Claims about supervised fine-tuning."""

from __future__ import annotations

import json
import math

import pytest
import torch
from stable_baselines3.common.logger import Logger
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from agents.offline.demonstration_data import load_demonstrations
from agents.offline.sft import (
    accumulate_sft_gradients,
    encode_all,
    encode_demonstration,
    evaluate_sft,
    pad_batch,
    sft,
    sft_loss,
)
from reward_models.data.lengths import DataWarning

WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    "<turn>",
    "<end>",
    ":",
    "user",
    "assistant",
    "hi",
    "you",
    "bye",
    "one",
    "two",
]
CHATML = (
    "{% for m in messages %}<turn> {{ m['role'] }} {{ m['content'] }} <eos> : {% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant {% endif %}"
)


def make_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>", "chat_template": CHATML}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(options | kwargs))


def make_model(seed: int = 0, attention_dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=attention_dropout,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


RECORDS = [
    {"prompt": "hi", "completion": "hi you"},
    {"prompt": "one two one", "completion": "two"},
    {"prompt": "bye", "completion": "bye bye you two"},
    {"prompt": "you hi", "completion": "one"},
    {"prompt": "two", "completion": "you one hi"},
    {"prompt": "one", "completion": "two"},
]


def test_loss_of_known_probabilities_is_the_mean_of_their_negative_logs():
    probabilities = torch.tensor([0.7, 0.6, 0.9, 0.8])
    logits = torch.stack([probabilities.log(), (1 - probabilities).log()], -1)[None]  # [1, 4, 2]
    logits = torch.cat([logits, torch.zeros(1, 1, 2)], 1)  # the last position predicts nothing
    assert sft_loss(logits, torch.zeros(1, 5, dtype=torch.long)).item() == pytest.approx(0.299001, abs=1e-6)


def test_loss_of_a_uniform_model_is_log_of_the_vocabulary():
    assert sft_loss(torch.zeros(2, 5, 7), torch.ones(2, 5, dtype=torch.long)).item() == pytest.approx(
        math.log(7)
    )


def test_logits_at_t_are_held_against_the_token_at_t_plus_one():
    labels = torch.tensor([[0, 1, 2]])
    logits = torch.full((1, 3, 3), -100.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 100.0
    assert sft_loss(logits, labels).item() == 0.0


def test_prompt_positions_carry_no_loss_and_no_gradient():
    logits = torch.randn(1, 6, 9, requires_grad=True)
    labels = torch.tensor([[-100, -100, -100, 4, 5, -100]])
    sft_loss(logits, labels).backward()
    moved = logits.grad.abs().sum(-1)[0] > 0
    assert moved.tolist() == [False, False, True, True, False, False]


def test_a_batch_without_labels_gives_zero_and_not_nan():
    assert sft_loss(torch.randn(2, 3, 4), torch.full((2, 3), -100)).item() == 0.0


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"got \(2, 3, 4\) and \(2, 4\)"):
        sft_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


def test_a_completion_is_labelled_with_its_end_token_and_its_prompt_is_not():
    example = encode_demonstration({"prompt": "hi you", "completion": "one two"}, make_tokenizer())
    assert [WORDS[i] for i in example.input_ids] == ["hi", "you", "one", "two", "<eos>"]
    assert [WORDS[i] for i in example.labels if i != -100] == ["one", "two", "<eos>"]
    assert example.labels[:2] == [-100, -100]


def test_a_text_is_labelled_everywhere():
    example = encode_demonstration({"text": "hi you"}, make_tokenizer())
    assert example.input_ids == example.labels
    assert example.labels[-1] == WORDS.index("<eos>")


def test_in_a_two_turn_chat_only_the_assistants_words_and_end_tokens_are_labelled():
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hi you"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "bye bye"},
    ]
    example = encode_demonstration({"messages": chat}, make_tokenizer())
    shown = [WORDS[i] if i != -100 else "." for i in example.labels]
    laid_out = "<turn> user hi <eos> : <turn> assistant hi you <eos> : <turn> user bye <eos> : <turn> assistant bye bye"
    assert [WORDS[i] for i in example.input_ids] == [*laid_out.split(), "<eos>", ":"]
    assert " ".join(shown) == ". . . . . . . hi you <eos> . . . . . . . . bye bye <eos> ."


def test_a_template_of_plain_text_still_teaches_the_model_to_stop():
    plain = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    generation = "{% if add_generation_prompt %}assistant {% endif %}"
    tokenizer = make_tokenizer(chat_template=plain + generation)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}]
    example = encode_demonstration({"messages": chat}, tokenizer)
    assert [WORDS[i] for i in example.labels if i != -100] == ["bye", "<eos>"]


def test_where_a_template_rewrites_earlier_turns_the_last_turn_is_learned_and_that_is_said():
    last_only = (
        "{% for m in messages %}{% if loop.last %}<turn> {% endif %}{{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<turn> {% endif %}"
    )
    said = ("hi", "you", "hi", "bye")
    roles = ("user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": word} for role, word in zip(roles, said, strict=True)]
    with pytest.warns(UserWarning, match="1 turns of the assistant are not learned"):
        (example,) = encode_all([{"messages": chat}], make_tokenizer(chat_template=last_only))
    assert [WORDS[i] for i in example.labels if i != -100] == ["bye", "<eos>"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "hi", "completions": "you"}, "keys \\['completions', 'prompt'\\]"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no chat template"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(record, message):
    with pytest.raises(ValueError, match=message):
        encode_demonstration(record, make_tokenizer(chat_template=None))


def test_the_mask_comes_from_lengths_even_where_pad_is_the_end_token():
    tokenizer = make_tokenizer(pad_token="<eos>")
    examples = [encode_demonstration(r, tokenizer) for r in RECORDS[:2]]
    ids, mask, labels = pad_batch(examples, tokenizer.pad_token_id)
    assert mask.sum(1).tolist() == [len(e.input_ids) for e in examples]
    assert [int((row == 1).sum()) for row in labels] == [1, 1]
    assert ids.shape == mask.shape == labels.shape


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, None])
def test_loss_and_gradient_do_not_depend_on_the_micro_batches(micro_batch_size):
    examples = [encode_demonstration(r, make_tokenizer()) for r in RECORDS]
    whole, parts = make_model(), make_model()
    loss = accumulate_sft_gradients(whole, examples, 0)
    assert accumulate_sft_gradients(parts, examples, 0, micro_batch_size) == pytest.approx(loss, abs=1e-6)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)
    # The mean is over tokens: not the mean of the records' means.
    assert evaluate_sft(whole, examples, 0)["loss"] == pytest.approx(loss, abs=1e-6)


def test_training_learns_the_data_and_saves_an_ordinary_folder(tmp_path):
    found = sft(
        make_model(),
        RECORDS * 8,
        tmp_path,
        tokenizer=make_tokenizer(),
        eval_data=RECORDS,
        epochs=40,
        learning_rate=1e-2,
        batch_size=8,
        device="cpu",
    )
    assert found["eval_loss"] < 0.3 and found["eval_accuracy"] > 0.85
    assert found["steps"] == 240
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    out = model.generate(**tokenizer("two", return_tensors="pt"), max_new_tokens=10, do_sample=False)
    assert tokenizer.decode(out[0]) == "two you one hi <eos>"


def test_records_from_a_file_train_as_the_same_records_in_a_list_do(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in RECORDS), encoding="utf-8")
    results = [sft(make_model(), d, tokenizer=make_tokenizer(), device="cpu") for d in (path, RECORDS)]
    assert results[0] == results[1]


@pytest.mark.parametrize("dropout", [False, True])
def test_one_seed_gives_one_result_and_leaves_the_callers_randomness_alone(dropout):
    trained = [make_model(attention_dropout=0.5) for _ in range(2)]
    state = torch.get_rng_state()
    for model in trained:
        sft(model, RECORDS, tokenizer=make_tokenizer(), dropout=dropout, seed=3, batch_size=2, device="cpu")
    assert torch.equal(state, torch.get_rng_state())
    for a, b in zip(*(m.parameters() for m in trained), strict=True):
        assert torch.equal(a, b)
    assert not trained[0].training


def test_dropout_is_off_unless_asked_for():
    plain, with_layer, dropped = (
        make_model(),
        make_model(attention_dropout=0.5),
        make_model(attention_dropout=0.5),
    )
    for model, dropout in ((plain, False), (with_layer, False), (dropped, True)):
        sft(model, RECORDS, tokenizer=make_tokenizer(), dropout=dropout, batch_size=2, device="cpu")
    weight = [m.lm_head.weight for m in (plain, with_layer, dropped)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])


def test_a_learning_rate_of_zero_changes_nothing():
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    sft(model, RECORDS, tokenizer=make_tokenizer(), learning_rate=0.0, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_every_row_of_the_log_has_loss_learning_rate_and_gradient_norm():
    rows = []

    class Kept(Logger):
        def dump(self, step=0):
            rows.append((step, dict(self.name_to_value)))
            self.name_to_value.clear()

    logger = Kept(None, [])
    sft(
        make_model(),
        RECORDS,
        tokenizer=make_tokenizer(),
        batch_size=1,
        log_interval=3,
        logger=logger,
        device="cpu",
    )
    assert [step for step, _ in rows] == [1, 3, 6]
    assert all({"train/loss", "train/learning_rate", "train/grad_norm"} <= set(row) for _, row in rows)


def test_data_with_nothing_to_learn_from_is_refused():
    options = {"tokenizer": make_tokenizer(), "device": "cpu"}
    with pytest.raises(ValueError, match="there is nothing in it"):
        sft(make_model(), [], **options)
    with pytest.raises(ValueError, match="1 are longer than max_length=2"):
        sft(make_model(), RECORDS[1:2], max_length=2, too_long="skip", **options)
    with pytest.raises(ValueError, match="1 have no token to learn from"):
        sft(make_model(), [{"messages": [{"role": "user", "content": "hi"}]}], **options)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        sft(make_model(), RECORDS, device="cpu")


def test_records_beyond_the_context_are_cut_or_left_out_and_counted():
    long = {"prompt": "one " * 40, "completion": "two"}
    options = {"tokenizer": make_tokenizer(), "device": "cpu"}
    with pytest.warns(DataWarning, match="3 of 9 records are longer than 32 tokens and were cut"):
        cut = sft(make_model(), [*RECORDS, *[long] * 3], **options)
    with pytest.warns(DataWarning, match="3 of 9 records are longer than 32 tokens and were left out"):
        skipped = sft(make_model(), [*RECORDS, *[long] * 3], too_long="skip", **options)
    assert (cut["records"], cut["cut"], cut["skipped"]) == (9, 3, 0)
    assert (skipped["records"], skipped["cut"], skipped["skipped"]) == (6, 0, 3)
    with pytest.raises(ValueError, match="a record of 42 tokens is longer than 32"):
        sft(make_model(), [*RECORDS, long], too_long="error", **options)


def test_a_cut_takes_from_the_prompt_first_and_teaches_no_end_that_is_cut_off():
    tokenizer = make_tokenizer()
    record = {"prompt": "hi you bye", "completion": "one two"}
    shown = []
    for limit in (5, 3):
        with pytest.warns(DataWarning):
            (example,) = encode_all([record], tokenizer, limit)
        shown.append([WORDS[i] for i in example.input_ids])
        assert (
            example.labels
            == [-100] * (len(example.labels) - 3 + (limit == 3))
            + example.input_ids[limit - 3 + (limit == 3) :]
        )
    assert shown == [["you", "bye", "one", "two", "<eos>"], ["bye", "one", "two"]]


def test_more_length_than_the_model_holds_is_refused():
    with pytest.raises(ValueError, match="max_length=64 is more than the 32 tokens"):
        sft(make_model(), RECORDS, tokenizer=make_tokenizer(), max_length=64, device="cpu")


def test_every_source_of_rows_trains_alike(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.to_csv(tmp_path / "data.csv")
    dataset.to_parquet(tmp_path / "data.parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    sources = [RECORDS, dataset, dataset.to_iterable_dataset(), (record for record in RECORDS)]
    sources += [tmp_path / name for name in ("data.csv", "data.parquet", "saved")]
    losses = [
        sft(make_model(), source, tokenizer=make_tokenizer(), device="cpu")["loss"] for source in sources
    ]
    assert losses == losses[:1] * len(sources)


def test_a_file_may_mix_texts_and_conversations_and_a_bad_row_is_named(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "bye"}]
    rows = [{"messages": chat}, {"text": "one two"}, {"prompt": chat[:1], "completion": "bye"}]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"promt": "hi", "completion": "you"}]))
    with pytest.raises(
        ValueError,
        match=r"mixed\.jsonl, line 4: .*'prompt' and 'completion', or .*'promt'.*Did you mean 'prompt'",
    ):
        sft(make_model(), path, tokenizer=make_tokenizer(), device="cpu")
    with pytest.warns(DataWarning, match="1 bad rows were left out"):
        found = sft(make_model(), path, tokenizer=make_tokenizer(), skip_bad_rows=True, device="cpu")
    assert (found["records"], found["skipped"]) == (3, 1)
    records, _ = load_demonstrations(path, skip_bad_rows=True)
    assert records[2] == {"prompt": chat[:1], "completion": "bye"}
    assert encode_demonstration(records[2], make_tokenizer()) == encode_demonstration(
        {"messages": chat}, make_tokenizer()
    )
