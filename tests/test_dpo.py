"""Direct preference optimisation: its losses, its optimum, and its trainer."""

from __future__ import annotations

import copy
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from transformers import AutoModelForCausalLM

import textrl_env  # noqa: F401
from agents.offline.dpo import LOSSES, Objective, cached_log_probs, dpo, sequence_log_probs
from agents.offline.preference_data import encode_completion, load_preferences
from agents.offline.preference_losses import dpo_loss, ipo_loss, kto_kl, kto_loss, simpo_loss
from reward_models.data.lengths import DataWarning, Lengths
from tests.tiny import EOS, WORDS, make_model, make_tokenizer
from textrl_env.exact import solver as exact

PAIRS = [
    {"prompt": "a", "chosen": "b c", "rejected": "d"},
    {"prompt": "b c", "chosen": "e", "rejected": "f g h"},
    {"prompt": "d e f", "chosen": "a a", "rejected": "b"},
    {"prompt": "g", "chosen": "c", "rejected": "i i i i"},
    {"prompt": "h i", "chosen": "d b", "rejected": "e e"},
]
JUDGED = [
    {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
    for p in PAIRS
    for side in ("chosen", "rejected")
]


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def four(requires_grad=False):
    """log pi of chosen and rejected, and of both under the reference."""
    said = [numbers(-3.0, -5.0), numbers(-4.0, -2.0)]
    ref = [numbers(-3.5, -4.0), numbers(-3.0, -2.5)]
    return [x.requires_grad_(requires_grad) for x in said], ref


# -- losses -------------------------------------------------------------------------------------------------


def test_dpo_is_minus_log_sigmoid_of_the_gap_of_log_ratios():
    said, ref = four()
    # Delta_w = 0.5, -1; Delta_l = -1, 0.5.
    expected = [math.log(1 + math.exp(-0.2 * gap)) for gap in (1.5, -1.5)]
    assert dpo_loss(*said, *ref, beta=0.2).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_policy_equal_to_its_reference_has_dpo_loss_log_2():
    said, _ = four()
    assert dpo_loss(*said, *said).tolist() == pytest.approx([math.log(2)] * 2)


def test_the_gradient_of_dpo_by_the_chosen_log_probability_is_beta_times_the_error():
    said, ref = four(requires_grad=True)
    dpo_loss(*said, *ref, beta=0.2).sum().backward()
    error = torch.sigmoid(numbers(-0.3, 0.3))
    torch.testing.assert_close(said[0].grad, -0.2 * error)
    torch.testing.assert_close(said[1].grad, 0.2 * error)


def test_label_smoothing_is_the_expectation_over_flipped_labels():
    (w, v), (ref_w, ref_v) = four()
    smoothed = dpo_loss(w, v, ref_w, ref_v, 0.5, label_smoothing=0.2)
    plain, flipped = dpo_loss(w, v, ref_w, ref_v, 0.5), dpo_loss(v, w, ref_v, ref_w, 0.5)
    torch.testing.assert_close(smoothed, 0.8 * plain + 0.2 * flipped)


def test_smoothed_dpo_is_lowest_where_the_implied_preference_is_the_share_of_right_labels():
    gaps = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    zero = torch.zeros_like(gaps)
    best = gaps[dpo_loss(gaps, zero, zero, zero, 0.5, label_smoothing=0.2).argmin()]
    assert torch.sigmoid(0.5 * best).item() == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_outside_its_range_is_refused(smoothing):
    said, ref = four()
    with pytest.raises(ValueError, match=r"\[0, 0.5\)"):
        dpo_loss(*said, *ref, label_smoothing=smoothing)


def test_length_normalised_dpo_is_dpo_on_means_over_tokens():
    said, ref = four()
    lengths = [numbers(2, 4), numbers(5, 1)]
    means = [x / n for x, n in zip((*said, *ref), lengths * 2, strict=True)]
    normalised = dpo_loss(*said, *ref, 3.0, 0.1, *lengths)
    torch.testing.assert_close(normalised, dpo_loss(*means, 3.0, 0.1))


def test_lengths_of_one_side_only_are_refused():
    said, ref = four()
    with pytest.raises(ValueError, match="both completions, or of neither"):
        ipo_loss(*said, *ref, chosen_lengths=numbers(1, 1))


def test_ipo_is_zero_exactly_where_the_gap_is_half_of_one_over_beta():
    zero = numbers(0.0)
    assert ipo_loss(numbers(2.5), zero, zero, zero, beta=0.2).item() == pytest.approx(0.0)
    assert ipo_loss(numbers(5.0), zero, zero, zero, beta=0.2).item() == pytest.approx(6.25)


def test_ipo_pulls_the_gap_back_once_it_is_too_wide_and_dpo_does_not():
    for loss, sign in ((ipo_loss, 1), (dpo_loss, -1)):
        wide = numbers(9.0).requires_grad_()
        zero = numbers(0.0)
        loss(wide, zero, zero, zero, beta=0.2).sum().backward()
        assert math.copysign(1, wide.grad.item()) == sign


def test_simpo_is_minus_log_sigmoid_of_mean_log_probabilities_less_the_margin():
    loss = simpo_loss(numbers(-4.0), numbers(-9.0), numbers(2), numbers(3), beta=2.0, gamma=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-(2.0 * (-2.0 + 3.0) - 0.5))))


def test_kto_at_the_baseline_is_half_the_weight_of_its_kind():
    zero, labels = numbers(0.0, 0.0), torch.tensor([True, False])
    losses = kto_loss(zero, zero, labels, 0.0, desirable_weight=2.0, undesirable_weight=3.0)
    assert losses.tolist() == [1.0, 1.5]


def test_kto_raises_what_is_desirable_and_lowers_what_is_not():
    said = numbers(-3.0, -3.0).requires_grad_()
    kto_loss(said, numbers(-3.0, -3.0), torch.tensor([True, False]), 0.0).sum().backward()
    assert said.grad[0] < 0 < said.grad[1]


def test_kto_with_a_higher_baseline_costs_the_desirable_more_and_the_undesirable_less():
    said, labels = numbers(-3.0, -3.0), torch.tensor([True, False])
    low, high = (kto_loss(said, said, labels, kl) for kl in (0.0, 2.0))
    assert high[0] > low[0] and high[1] < low[1]


def test_the_baseline_of_kto_is_never_negative_and_carries_no_gradient():
    ratio = numbers(-1.0, -2.0).requires_grad_()
    assert kto_kl(ratio, numbers(0.0, 0.0)) == 0.0
    positive = kto_kl(ratio, numbers(-2.0, -5.0))
    assert positive == 2.0 and not positive.requires_grad


def test_tensors_that_do_not_pair_up_are_refused_with_their_shapes():
    with pytest.raises(ValueError, match=r"\(2,\), \(3,\)"):
        simpo_loss(torch.zeros(2), torch.zeros(3), torch.ones(2), torch.ones(3))


# -- the optimum --------------------------------------------------------------------------------------------


class Tree:
    """A token tree with a softmax policy of one logit for each prefix and token."""

    def __init__(self) -> None:
        env = gym.make("TokenTree-v0", vocab_size=3, horizon=3, num_prompts=2, kl_coef=0.3)
        self.mdp = exact.from_token_tree(env)
        self.logits = [
            torch.tensor(level, dtype=torch.float64, requires_grad=True) for level in self.mdp.ref_log_probs
        ]
        log_probs, scores = exact.sequence_distribution(self.mdp, self.mdp.ref_log_probs)
        self.ref, self.scores = torch.tensor(log_probs), torch.tensor(scores)

    def levels(self):
        return [level.log_softmax(-1) for level in self.logits]

    def sequences(self) -> torch.Tensor:
        """``log pi`` of all responses, ``[prompts, sequences]``, as exact.sequence_distribution lays them out."""
        found, reached = [], torch.zeros(self.mdp.num_prompts, dtype=torch.float64)
        for t, level in enumerate(self.levels()):
            step, ends = reached[:, None] + level, torch.tensor(self.mdp.ends(t))
            found.append(step[:, ends].reshape(self.mdp.num_prompts, -1))
            reached = step[:, ~ends].ravel()
        return torch.cat(found, 1)

    def minimise(self, loss) -> None:
        optimizer = torch.optim.LBFGS(
            self.logits, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10
        )

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)

    def gap(self) -> float:
        """What is missing to the optimum, as a share of what there is to gain over the reference."""
        policy = [level.detach().numpy() for level in self.levels()]
        best, start = (
            exact.solve(self.mdp).objective,
            exact.evaluate(self.mdp, self.mdp.ref_log_probs).objective,
        )
        return (best - exact.evaluate(self.mdp, policy).objective) / (best - start)


def all_pairs(tree: Tree):
    """Every ordered pair of responses to each prompt: indices, and how often raters choose that order."""
    count = tree.ref.shape[1]
    first, second = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    first, second = first[first != second], second[first != second]
    chance = torch.sigmoid(tree.scores[:, first] - tree.scores[:, second])  # Bradley-Terry, [prompts, pairs]
    return first, second, chance


@pytest.mark.parametrize("uniform", [True, False])
def test_dpo_on_bradley_terry_preferences_converges_to_the_optimal_policy(uniform):
    tree = Tree()
    first, second, chance = all_pairs(tree)
    shown = torch.ones_like(chance) if uniform else (tree.ref[:, first] + tree.ref[:, second]).exp()
    weights = (shown * chance / shown.sum()).ravel()

    def loss():
        said = tree.sequences()
        sides = (said[:, first], said[:, second], tree.ref[:, first], tree.ref[:, second])
        return (weights * dpo_loss(*(x.ravel() for x in sides), beta=tree.mdp.kl_coef)).sum()

    assert tree.gap() == pytest.approx(1.0)
    tree.minimise(loss)
    assert abs(tree.gap()) < 0.02
    best, _ = exact.sequence_distribution(tree.mdp, exact.solve(tree.mdp).policy)
    np.testing.assert_allclose(tree.sequences().detach().exp().numpy(), np.exp(best), atol=5e-3)


# -- log-probabilities --------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def fresh(kind="llama", **kwargs):
    return copy.deepcopy(make_model(kind, **kwargs))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_completion_s_log_probability_is_the_sum_over_its_tokens_and_its_end_token(kind, tokenizer):
    model = fresh(kind)
    examples = [
        encode_completion("a b", "c d", True, tokenizer),
        encode_completion("e", "f", True, tokenizer),
    ]
    said = sequence_log_probs(model, examples, pad_id=EOS)
    ids = [WORDS.index(word) for word in ["a", "b", "c", "d"]] + [EOS]
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(log_probs[t - 1, ids[t]] for t in (2, 3, 4))
    torch.testing.assert_close(said[0], expected)


def test_a_completion_cut_off_at_its_budget_gets_no_end_token(tokenizer):
    ended, cut = (encode_completion("a", "b c", flag, tokenizer) for flag in (True, False))
    assert ended.input_ids == [*cut.input_ids, EOS]
    items, _ = load_preferences([PAIRS[0] | {"chosen_ended": False}], tokenizer)
    assert items[0].first.input_ids[-1] != EOS and items[0].second.input_ids[-1] == EOS


def test_prompt_and_completion_are_tokenized_apart(tokenizer):
    example = encode_completion("a", "b", True, tokenizer)
    assert example.labels[0] == -100 and example.labels[1:] == [WORDS.index("b"), EOS]


def test_messages_go_by_the_chat_template_and_only_the_last_turn_carries_loss(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'a ' if m['role'] == 'user' else 'b ' }}{{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}{% if add_generation_prompt %}b {% endif %}"
    )
    prompt = [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    example = encode_completion(prompt, "f", True, tokenizer)
    assert [WORDS[i] for i in example.input_ids] == ["a", "c", "b", "d", "<eos>", "a", "e", "b", "f", "<eos>"]
    assert [label for label in example.labels if label != -100] == [WORDS.index("f"), EOS]
    whole = encode_completion("ignored", [*prompt, {"role": "assistant", "content": "f"}], True, tokenizer)
    assert whole == example


def test_log_probabilities_do_not_depend_on_the_batch(tokenizer):
    model = fresh()
    examples = [encode_completion(p["prompt"], p["rejected"], True, tokenizer) for p in PAIRS]
    together = cached_log_probs(model, examples, EOS)
    alone = torch.cat([cached_log_probs(model, [example], EOS) for example in examples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


# -- the trainer --------------------------------------------------------------------------------------------


def records_for(loss):
    return JUDGED if loss == "kto" else PAIRS


def objective(loss, beta=0.5):
    return Objective(loss, beta, 0.0, 0.5, 1.0, 1.0, EOS)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_do_not_depend_on_the_micro_batch_size(loss, tokenizer):
    items, _ = load_preferences(records_for(loss), tokenizer, paired=loss != "kto")
    gradients, values = [], []
    for size in (None, 2, 1):
        model = fresh(seed=1)
        known = objective(loss).reference(make_model("llama"), items)
        values.append(objective(loss).backward(model, items, known, size))
        gradients.append(torch.cat([p.grad.ravel() for p in model.parameters()]))
    for gradient, value in zip(gradients[1:], values[1:], strict=True):
        torch.testing.assert_close(gradient, gradients[0], atol=1e-5, rtol=1e-4)
        assert value == pytest.approx(values[0], abs=1e-5)


# The loss that search found rises with the gap just beside 0, so a few steps from there may narrow it.
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "discopop"])
def test_a_few_steps_widen_the_margin_between_chosen_and_rejected(loss, tokenizer):
    items, _ = load_preferences(records_for(loss), tokenizer, paired=loss != "kto")
    goal = objective(loss)
    known = goal.reference(make_model("llama"), items)
    before = goal.evaluate(make_model("llama"), items, known, 8)["rewards/margins"]
    model = fresh()
    dpo(
        model,
        records_for(loss),
        loss=loss,
        beta=0.5,
        tokenizer=tokenizer,
        epochs=4,
        batch_size=4,
        learning_rate=1e-3,
        device="cpu",
    )
    assert goal.evaluate(model, items, known, 8)["rewards/margins"] > before + 0.05


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "ipo", "kto"])
def test_the_reference_computed_once_is_the_reference_computed_again(loss, tokenizer):
    """Training against the cached initial model equals training against a second copy of it."""
    weights = []
    for reference in (None, fresh()):
        model = fresh()
        options = {"loss": loss, "epochs": 2, "batch_size": 2, "learning_rate": 1e-2, "device": "cpu"}
        dpo(model, records_for(loss), tokenizer=tokenizer, reference=reference, **options)
        weights.append(torch.cat([p.detach().ravel() for p in model.parameters()]))
    # The two references read the records in batches of different shapes, which may round differently.
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_rewards_are_zero_and_the_loss_log_2_before_the_first_step(tokenizer):
    seen = []
    dpo(
        fresh(dropout=0.5),
        PAIRS,
        tokenizer=tokenizer,
        batch_size=8,
        device="cpu",
        callback=lambda step, metrics: seen.append(metrics),
    )
    assert seen[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(seen[0]["rewards/chosen"]) < 1e-6 and abs(seen[0]["rewards/rejected"]) < 1e-6


def test_two_runs_with_one_seed_are_equal_bit_by_bit(tokenizer):
    weights = []
    for _ in range(2):
        model = fresh()
        dpo(model, PAIRS, tokenizer=tokenizer, epochs=2, batch_size=2, seed=3, device="cpu")
        weights.append(torch.cat([p.detach().ravel() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_the_output_is_an_ordinary_folder_and_the_log_has_the_usual_names(tmp_path, model_folder):
    from stable_baselines3.common.logger import configure
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    logger = configure(str(tmp_path / "log"), ["csv"])
    result = dpo(
        model_folder, data, tmp_path / "out", eval_data=PAIRS[:2], device="cpu", logger=logger, log_interval=1
    )
    logger.close()
    assert {"loss", "margin", "accuracy", "eval_loss", "eval_accuracy"} <= result.keys()
    assert result["records"] == 5 and result["skipped"] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == EOS
    header = (tmp_path / "log" / "progress.csv").read_text().splitlines()[0].split(",")
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert name in header
    assert {"logps/chosen", "logps/rejected", "train/loss", "train/grad_norm"} <= set(header)


def test_kto_takes_pairs_as_desirable_and_undesirable_completions(tokenizer):
    from_pairs, _ = load_preferences(PAIRS, tokenizer, paired=False)
    from_judged, _ = load_preferences(JUDGED, tokenizer, paired=False)
    assert from_pairs == from_judged
    assert [item.label for item in from_pairs] == [True, False] * 5


def test_kto_puts_each_completion_once_to_a_prompt_that_is_not_its_own(tokenizer):
    rows = [
        {"prompt": prompt, "completion": f"{prompt} {word}", "label": True}
        for prompt, count in (("a", 4), ("b", 2), ("c", 3))
        for word in "defg"[:count]
    ]
    items, _ = load_preferences(rows, tokenizer, paired=False)
    met = []
    for item in items:
        prompt, completion = item.second.input_ids[0], item.second.input_ids[1:]
        assert item.first.input_ids[0] == prompt and completion[0] != prompt
        met.append(tuple(completion))
    assert sorted(met) == sorted(tuple(item.first.input_ids[1:]) for item in items)


def test_a_bad_row_is_named_or_left_out_and_counted(tokenizer):
    rows = [*PAIRS, {"prompt": "a", "chosen": "b"}]
    with pytest.raises(ValueError, match=r"data\[5\].*'rejected'"):
        dpo(fresh(), rows, tokenizer=tokenizer, device="cpu")
    result = dpo(fresh(), rows, tokenizer=tokenizer, device="cpu", skip_bad_rows=True)
    assert result["records"] == 5 and result["skipped"] == 1


def test_of_a_pair_that_is_too_long_both_sides_lose_the_same_beginning_of_their_prompt(tokenizer):
    rows = [PAIRS[0], {"prompt": "a b c d e f", "chosen": "g h i", "rejected": "i"}]
    lengths = Lengths(6)
    with pytest.warns(DataWarning, match="1 of 2 records are longer than 6 tokens and were cut"):
        items, skipped = load_preferences(rows, tokenizer, lengths=lengths)
    assert (skipped, lengths.cut, lengths.skipped) == (0, 1, 0)
    shown = [[WORDS[i] for i in example.input_ids] for example in items[1][:2]]
    assert shown == [["e", "f", "g", "h", "i", "<eos>"], ["e", "f", "i", "<eos>"]]


def test_too_long_pairs_are_left_out_if_so_wished_and_all_of_them_is_an_error(tokenizer):
    lengths = Lengths(4, "skip")
    with pytest.warns(DataWarning, match="4 of 5 records are longer than 4 tokens and were left out"):
        items, skipped = load_preferences(PAIRS[1:] + PAIRS[:1], tokenizer, lengths=Lengths(4, "skip"))
    assert len(items) == 1 and skipped == 4
    with pytest.raises(ValueError, match=r"none of the 1 records .*longer than max_length=4"):
        load_preferences(PAIRS[1:2], tokenizer, lengths=lengths)


def test_an_unknown_loss_names_the_nearest(tokenizer):
    with pytest.raises(ValueError, match="'sigmoid'"):
        dpo(fresh(), PAIRS, tokenizer=tokenizer, loss="sigmoi")


def test_cross_entropy_of_the_whole_completion_is_what_sft_minimises(tokenizer):
    """The same tokens count in SFT and in DPO."""
    from agents.offline.sft import sft_loss

    model = fresh()
    example = encode_completion("a b", "c", True, tokenizer)
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    mean = sft_loss(model(ids).logits, labels)
    torch.testing.assert_close(-sequence_log_probs(model, [example], EOS)[0] / 2, mean)


class StopAfter(BaseCallback):
    """A callback of stable-baselines3's kind."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.ended = steps, False

    def _on_step(self):
        self.logger.record("mine/step", self.num_timesteps)
        return self.num_timesteps < self.steps

    def _on_training_end(self):
        self.ended = True


def test_stable_baselines3s_callbacks_work(tmp_path, tokenizer):
    stop = StopAfter(3)
    checkpoints = CheckpointCallback(save_freq=2, save_path=str(tmp_path))
    options = {"tokenizer": tokenizer, "epochs": 4, "batch_size": 2, "device": "cpu"}
    result = dpo(fresh(), PAIRS, callback=[checkpoints, stop], **options)
    assert result["steps"] == 3 and stop.ended
    (saved,) = tmp_path.glob("rl_model_2_steps*")
    assert AutoModelForCausalLM.from_pretrained(saved).config.vocab_size == fresh().config.vocab_size
    assert dpo(fresh(), PAIRS, callback=lambda step, metrics: step < 2, **options)["steps"] == 2
