"""Claims about learning rewards from comparisons."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from agents.offline.reward_model import train_reward_model
from reward_models.bradley_terry import bradley_terry_loss, load_reward_model
from reward_models.calibration import constant_direction, evaluate, find_head, normalise, reliability, score
from reward_models.comparisons import (
    Comparison,
    encode_answer,
    encode_sides,
    load_comparisons,
    prompt_batches,
)
from reward_models.data.lengths import DataWarning, Lengths
from textrl_env import embedded

SFT = embedded.path("sft")
PROMPT = "what is the capital of france?"


@pytest.mark.parametrize(
    ("chosen", "rejected", "probability", "loss"),
    [(2.5, -1.2, 0.975873, 0.0244228), (0.1, 0.5, 0.401312, 0.913015), (2.1, 0.4, 0.845535, 0.167786)],
)
def test_loss_is_the_negative_log_of_the_bradley_terry_probability(chosen, rejected, probability, loss):
    found = bradley_terry_loss(torch.tensor([chosen]), torch.tensor([rejected])).item()
    assert found == pytest.approx(loss, rel=1e-4)
    assert math.exp(-found) == pytest.approx(probability, rel=1e-5)


def test_loss_of_a_hopeless_comparison_is_finite_and_has_a_gradient():
    chosen = torch.tensor([-500.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([500.0]))
    loss.backward()
    assert loss.item() == 1000.0
    assert chosen.grad.item() == -1.0


def test_a_margin_moves_the_gap_and_centering_pulls_the_sum_to_zero():
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.5])
    assert bradley_terry_loss(chosen, rejected, margin=1.0).item() == pytest.approx(math.log(2))
    plain = bradley_terry_loss(chosen, rejected)
    assert (bradley_terry_loss(chosen, rejected, centering=0.1) - plain).item() == pytest.approx(0.4)


def test_scores_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="pair up"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(2))


def test_all_comparisons_of_a_prompt_share_a_batch():
    comparisons = [Comparison(f"p{i % 7}", "a", "b") for i in range(50)]
    batches = list(prompt_batches(comparisons, 10, random.Random(0)))
    prompts = [{c.prompt for c in batch} for batch in batches]
    assert sum(map(len, batches)) == 50
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 7
    assert all(len(batch) >= 10 for batch in batches[:-1])


def test_many_comparisons_of_one_prompt_are_spread_over_batches_of_the_size_asked_for():
    comparisons = [Comparison("p", f"a{i}", "b") for i in range(43)] + [Comparison("q", "a", "b")] * 3
    batches = list(prompt_batches(comparisons, 10, random.Random(0)))
    assert sorted(c.chosen for batch in batches for c in batch) == sorted(c.chosen for c in comparisons)
    assert len(batches) >= 4 and all(len(batch) < 20 for batch in batches)
    assert sum({c.prompt for c in batch} >= {"q"} for batch in batches) == 1
    epochs = [list(prompt_batches(comparisons, 10, random.Random(seed))) for seed in (0, 1)]
    assert {c.chosen for c in epochs[0][0]} != {c.chosen for c in epochs[1][0]}


def test_a_record_without_its_texts_is_named():
    with pytest.raises(ValueError, match=r"pairs\[1\]: there is no column 'rejected'"):
        load_comparisons([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a"}])
    with pytest.raises(ValueError, match="nothing in it"):
        load_comparisons([])
    bad = {"prompt": "p", "chosen": "a", "rejected": "b", "margin": "wide"}
    with pytest.raises(ValueError, match=r"column 'margin': expected a number, got str 'wide'"):
        load_comparisons([bad])


def test_separators_of_unicode_inside_a_string_are_no_line_ends(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "p", "chosen": f"a{mark}b", "rejected": "c"} for mark in "\u2028\u2029\x85\x0b\x0c\x1c"
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [c.chosen for c in load_comparisons(path)] == [row["chosen"] for row in rows]


def test_flags_and_margins_of_a_table_are_what_they_read_as(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(
        "prompt,chosen,rejected,margin,chosen_ended,rejected_ended\np,a,b,0.5,False,1\np,a,b,,,\n"
    )
    first, second = load_comparisons(path)
    assert first[3:] == (0.5, False, True)
    assert second[3:] == (0.0, True, True)


def test_what_a_model_cannot_hold_loses_its_beginning_in_training_and_in_use_alike():
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    pairs = [
        Comparison("what is 1 plus 1? " * 4, "it is 2.", "it is 3."),
        Comparison(PROMPT, "paris.", "rome."),
    ]
    lengths = Lengths(12)
    kept, encoded = encode_sides(pairs, tokenizer, lengths)
    assert (len(kept), lengths.cut) == (2, 1)
    for side, ids in encoded.items():
        assert ids == encode_answer(tokenizer, *side)[-12:]
    kept, encoded = encode_sides(pairs, tokenizer, Lengths(12, "skip"))
    assert kept == pairs[1:] and len(encoded) == 2


def test_a_model_is_trained_on_no_more_tokens_than_it_holds_and_told_so(tmp_path):
    from tests.tiny import CONTEXT, make_model, make_tokenizer

    make_model("gpt2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    pairs = [{"prompt": "a b " * CONTEXT, "chosen": f"c {word}", "rejected": "d"} for word in "abcd"]
    with pytest.warns(DataWarning, match=f"4 of 4 records are longer than {CONTEXT} tokens and were cut"):
        result = train_reward_model(tmp_path, pairs, device="cpu")
    assert (result["records"], result["cut"], result["skipped"]) == (4, 4, 0)


def test_a_new_head_has_the_standard_deviation_of_the_formula_and_a_trained_head_is_kept():
    model, _ = load_reward_model(SFT, seed=1, device="cpu")
    weight = find_head(model).weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(weight.shape[1] + 1), rel=0.3)
    trained, _ = load_reward_model(embedded.path("reward"), device="cpu")
    kept = AutoModelForSequenceClassification.from_pretrained(embedded.path("reward"))
    assert torch.equal(find_head(trained).weight, find_head(kept).weight)


def test_the_score_of_a_completion_does_not_depend_on_its_batch():
    model, tokenizer = load_reward_model(SFT, device="cpu")
    texts = ["paris.", "sure, the capital of france is paris. have a nice day.", "it is rome."]
    together = score(model, tokenizer, [PROMPT] * 3, texts, batch_size=3)
    alone = [score(model, tokenizer, [PROMPT], [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)


def test_an_end_token_follows_what_ended_and_nothing_that_was_cut_off():
    tokenizer = AutoTokenizer.from_pretrained(SFT)
    ended, cut = (
        encode_answer(tokenizer, PROMPT, "paris."),
        encode_answer(tokenizer, PROMPT, "paris.", ended=False),
    )
    assert ended == [*cut, tokenizer.eos_token_id]
    assert tokenizer.decode(ended) == f"<bos> {PROMPT} paris. <eos>"


WORDS = {"red": 2.0, "blue": 1.0, "green": 0.0, "white": -1.0, "black": -2.0}


def planted(prompt: str, text: str) -> float:
    return sum(WORDS.get(word.strip("."), 0.0) for word in text.split())


def comparisons_of_planted_reward(n: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    records = []
    for _ in range(n):
        prompt = f"what is {rng.randint(0, 9)} plus {rng.randint(0, 9)}?"
        a, b = (" ".join(rng.choices(list(WORDS), k=2)) + "." for _ in range(2))
        chosen, rejected = (
            (a, b) if rng.random() < 1 / (1 + math.exp(planted(prompt, b) - planted(prompt, a))) else (b, a)
        )
        records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return records


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("reward")
    result = train_reward_model(
        SFT,
        comparisons_of_planted_reward(2500, 0),
        output,
        eval_pairs=comparisons_of_planted_reward(300, 1),
        learning_rate=2e-3,
        epochs=1,
        batch_size=50,
        device="cpu",
    )
    return output, result


def test_training_recovers_a_planted_linear_reward_up_to_a_constant(trained):
    output, result = trained
    model = AutoModelForSequenceClassification.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    texts = [f"{a} {b}." for a in WORDS for b in WORDS]
    prompts = ["what is 3 plus 4?"] * len(texts)
    scores = torch.tensor(score(model, tokenizer, prompts, texts), dtype=torch.float64)
    truth = torch.tensor([planted(p, t) for p, t in zip(prompts, texts, strict=True)], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([scores, truth]))[0, 1] > 0.97
    # In log-odds the recovered reward has the planted scale too; only a constant is free.
    slope = (scores * (truth - truth.mean())).sum() / (truth - truth.mean()).square().sum()
    assert 0.7 < slope * result["normalisation"]["std"] < 1.3


def test_the_saved_model_scores_its_reference_samples_with_mean_zero_and_deviation_one(trained):
    output, result = trained
    model = AutoModelForSequenceClassification.from_pretrained(output)
    records = comparisons_of_planted_reward(2500, 0)
    rows = list(dict.fromkeys((r["prompt"], r[side]) for r in records for side in ("chosen", "rejected")))
    scores = torch.tensor(score(model, AutoTokenizer.from_pretrained(output), *zip(*rows, strict=True)))
    assert scores.mean().abs() < 1e-3
    assert scores.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    assert result["normalisation"]["correlation"] > 0.999


def test_evaluation_on_unseen_comparisons_is_accurate_and_calibrated(trained):
    _, result = trained
    assert result["eval"]["accuracy"] > 0.75
    assert result["eval"]["ece"] < 0.12
    assert result["eval"]["loss"] < math.log(2)
    assert sum(b["count"] for b in result["eval"]["bins"]) == 300


def test_normalising_keeps_the_log_odds_when_the_scale_is_given_back(trained):
    output, result = trained
    model = AutoModelForSequenceClassification.from_pretrained(output)
    found = evaluate(
        model,
        AutoTokenizer.from_pretrained(output),
        comparisons_of_planted_reward(300, 1),
        scale=result["normalisation"]["std"],
    )
    assert found["accuracy"] == pytest.approx(result["eval"]["accuracy"], abs=0.01)
    assert found["loss"] == pytest.approx(result["eval"]["loss"], abs=0.01)


def test_normalising_a_constant_score_is_refused():
    model, tokenizer = load_reward_model(SFT, device="cpu")
    with pytest.raises(ValueError, match="no spread"):
        normalise(model, tokenizer, [(PROMPT, "paris.")] * 3)


def test_reliability_of_perfectly_calibrated_gaps_is_near_zero():
    gaps = torch.linspace(-4, 4, 20001, dtype=torch.float64)
    chance = torch.rand(len(gaps), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaps = torch.where(chance < torch.sigmoid(gaps), gaps, -gaps)
    assert reliability(gaps)["ece"] < 0.01
    assert reliability(torch.zeros(4, dtype=torch.float64))["accuracy"] == 0.5
    assert reliability(torch.full((10,), -9.0, dtype=torch.float64))["ece"] > 0.99


def test_the_constant_direction_is_exact_where_features_hold_a_constant():
    features = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 2.0
    u = constant_direction(features)
    assert torch.allclose(features @ u, torch.ones(200, dtype=torch.float64), atol=1e-2)
    assert (features @ u).mean().item() == pytest.approx(1.0)


def test_two_trainings_with_one_seed_are_equal_and_the_caller_s_random_state_is_untouched(tmp_path):
    records = comparisons_of_planted_reward(40, 2)
    state = torch.get_rng_state()
    results = [
        train_reward_model(SFT, records, tmp_path / str(i), dropout=True, seed=5, device="cpu")
        for i in range(2)
    ]
    assert json.dumps(results[0]) == json.dumps(results[1])
    assert torch.equal(state, torch.get_rng_state())


def test_training_is_found_where_it_was_in_version_0_1_and_that_is_said():
    from reward_models import bradley_terry

    with pytest.warns(DeprecationWarning, match=r"has moved to agents\.offline\.reward_model"):
        assert bradley_terry.train_reward_model is train_reward_model
    with pytest.raises(AttributeError, match="no attribute 'train_reward_modle'"):
        _ = bradley_terry.train_reward_modle
