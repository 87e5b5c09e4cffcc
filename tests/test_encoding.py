"""Claims about starts, ends and borders of sequences."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reward_models.data.encoding import TextEncoder, check_ids
from tests.chat_templates import byte_tokenizer, chat_tokenizer, turns


def words(encoder: TextEncoder, ids: list[int]) -> list[str]:
    return encoder.tokenizer.convert_ids_to_tokens(ids)


def starting(text: str, ends: bool = False) -> TextEncoder:
    """An encoder of a byte tokenizer that puts <s> in front of everything, and </s> behind it if wanted."""
    tokenizer = byte_tokenizer(text, bos="<s>")
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    single = "<s> $A </s>" if ends else "<s> $A"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return TextEncoder(tokenizer)


LLAMA2 = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


def metaspace(scheme: str = "always", template: str | None = None) -> TextEncoder:
    """An encoder of a tokenizer that puts a space in front of what it encodes, as Llama 2's does."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    core.train_from_iterator(["the answer is 4 [INST] [/INST] \n <>/|", "2 + 2 = 4", "yes no"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return TextEncoder(tokenizer)


def test_one_end_token_follows_an_answer_whether_its_text_has_one_or_not():
    encoder = TextEncoder(byte_tokenizer(None))
    plain = encoder.answer("a", "b")
    assert words(encoder, plain.ids) == ["a", "b", "</s>"]
    assert plain.written == [False, True, True]
    for text in ("b</s>", "b</s>\n", "b</s></s>", "b</s> </s>\n"):
        assert encoder.answer("a", text) == plain
    assert encoder.text("b</s>").ids == encoder.text("b").ids == plain.ids[1:]


def test_an_answer_that_was_cut_off_gets_no_end_token_even_if_its_text_has_one():
    encoder = TextEncoder(byte_tokenizer(None))
    for text in ("b", "b</s>"):
        assert words(encoder, encoder.answer("a", text, ended=False).ids) == ["a", "b"]


def test_the_end_token_of_the_template_counts_as_an_end_in_a_text_too():
    tokenizer = chat_tokenizer("phi3")
    encoder = TextEncoder(tokenizer)
    ids = encoder.answer("a", "b<|end|>").ids
    assert words(encoder, ids) == ["a", "b", "<|end|>"]


def test_a_start_token_that_the_text_has_already_is_not_put_in_front_again():
    encoder = starting(LLAMA2)
    assert words(encoder, encoder.prompt("a")) == ["<s>", "a"]
    assert encoder.prompt("<s>a") == encoder.prompt("a") == encoder.prompt(turns("a"))
    assert encoder.answer("<s>a", "b") == encoder.answer("a", "b")
    assert encoder.text("<s>a").ids == encoder.text("a").ids
    assert encoder.whole("<s>a", "b") == encoder.whole("a", "b")


def test_a_tokenizer_without_a_start_token_of_its_own_takes_what_the_text_says():
    encoder = TextEncoder(byte_tokenizer(None, bos="<s>"))
    assert words(encoder, encoder.prompt("<s><s>a")) == ["<s>", "<s>", "a"]


def test_an_end_token_that_the_tokenizer_adds_does_not_end_a_prompt():
    encoder = starting(LLAMA2, ends=True)
    assert words(encoder, encoder.prompt("a")) == ["<s>", "a"]
    assert words(encoder, encoder.answer("a", "b").ids) == ["<s>", "a", "b", "</s>"]
    assert words(encoder, encoder.text("ab").ids) == ["<s>", "a", "b", "</s>"]


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_the_border_between_prompt_and_answer_is_the_text_s_own(scheme):
    encoder = metaspace(scheme)
    joint = encoder.tokenizer("2+2=4")["input_ids"]
    answer = encoder.answer("2+2=", "4")
    assert answer.ids == [*joint, encoder.end_id]
    assert words(encoder, answer.ids)[-2:] == ["4", "</s>"]
    assert encoder.tokenizer.decode(answer.ids, skip_special_tokens=True) == "2+2=4"
    spaced = encoder.answer("2 + 2 =", " 4")
    assert words(encoder, spaced.ids)[-2:] == ["\u25814", "</s>"]
    assert encoder.answer("2+2=", "4", ended=False).ids == joint


def test_an_answer_never_merges_with_the_end_of_its_prompt():
    encoder = metaspace()
    # "ye" and "s" would be one token together, but the prompt has been read already when the answer is written.
    prompt = encoder.prompt("ye")
    answer = encoder.answer("ye", "s")
    assert answer.ids[: len(prompt)] == prompt
    assert encoder.tokenizer.decode(answer.ids, skip_special_tokens=True) == "yes"


def test_what_was_sampled_is_learned_again_as_the_same_tokens():
    encoder = metaspace()
    prompt = encoder.prompt("2+2=")
    for tokens in (["\u25814"], ["4"], ["\u2581", "4"]):
        ids = encoder.tokenizer.convert_tokens_to_ids(tokens)
        text = encoder.decode(ids)
        assert text == "".join(tokens).replace("\u2581", " ")
        again = encoder.answer("2+2=", text, ended=False).ids
        assert encoder.tokenizer.decode(again) == encoder.tokenizer.decode([*prompt, *ids])


def test_what_a_template_puts_in_front_of_an_answer_is_not_part_of_it():
    encoder = metaspace()
    ids = encoder.tokenizer.convert_tokens_to_ids(["\u25814"])
    assert encoder.decode(ids, after_text=False) == "4"


def test_a_conversation_is_laid_out_with_the_same_borders():
    template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    encoder = metaspace(template=template)
    encoded = encoder.conversation(turns("2+2=", "4"))
    assert encoded.ids == encoder.answer("2+2=", "4").ids
    assert encoded.written == encoder.answer("2+2=", "4").written


def test_a_text_and_the_messages_it_was_made_from_are_the_same_tokens():
    for name in ("llama3", "gemma", "inst", "qwen2_5"):
        encoder = TextEncoder(chat_tokenizer(name))
        chat = turns("hi", "yo", "bye")
        text = encoder.prompt_text(chat)
        assert encoder.prompt(text) == encoder.prompt(chat)


def test_a_short_chat_without_an_end_in_its_template_gets_one_as_a_long_one_does():
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    encoder = TextEncoder(byte_tokenizer(template, bos="<s>"))
    for answer in ("y", "y" * 50):
        encoded = encoder.conversation(turns("a", answer))
        assert encoded.ids[-1] == encoder.end_id and encoded.written[-1]
        assert encoder.tokenizer.decode(encoded.ids).endswith(f"{answer}</s>")
        assert encoded.ids.count(encoder.end_id) == 1


@pytest.mark.parametrize(
    ("name", "end"),
    [("phi3", "<|end|>"), ("gemma", "<end_of_turn>"), ("gptoss", "<|return|>"), ("llama3", "<|eot_id|>"),
     ("smolvlm", "<end_of_utterance>"), ("glm4moe", None), ("inst", "</s>")],
)  # fmt: skip
def test_the_end_of_a_turn_is_the_template_s_own(name, end):
    encoder = TextEncoder(chat_tokenizer(name))
    assert encoder.template.turn_end == end
    assert encoder.turn_end_id == (None if end is None else encoder.tokenizer.convert_tokens_to_ids(end))


def test_a_tokenizer_without_an_end_token_says_so():
    tokenizer = byte_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        TextEncoder(tokenizer).answer("a", "b")


def test_an_id_beyond_the_model_is_named_with_its_place():
    check_ids([0, 5, 9], 10, "record 3")
    with pytest.raises(ValueError, match=r"record 3 has the token id 10, but the model has 10 tokens"):
        check_ids([0, 10], 10, "record 3")
