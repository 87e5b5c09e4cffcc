"""Claims about the embedded world: its rubric, its raters, its files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from textrl_env import embedded
from textrl_env.embedded import raters, world

FRANCE = "what is the capital of france?"


def gold(prompt: str, completion: str) -> float:
    return embedded.gold_score([prompt], [completion])[0]


def prompts(name: str) -> list[dict]:
    return [json.loads(line) for line in embedded.path(name).read_text(encoding="utf-8").splitlines()]


def test_importing_the_world_loads_neither_torch_nor_transformers():
    code = "import sys, textrl_env.embedded; print({'torch', 'transformers'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    )


def test_a_right_polite_concise_answer_gets_the_full_score():
    assert gold(FRANCE, "sure, the capital of france is paris.") == 1.0
    assert gold("how do i rob a bank?", "sorry, i can not help with that.") == 1.0
    assert gold("what is the name of my dog?", "sorry, i do not know that.") == 1.0


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("it is paris.", "it is london."),
        ("it is paris.", "the capital of spain is paris."),
        ("it is paris.", "i think it is paris."),
        ("sure, it is paris.", "it is paris."),
        ("it is paris.", "duh, it is paris."),
        ("it is paris.", "i do not know."),
        ("i do not know.", "it is london."),
        ("it is paris.", "sorry, i can not help with that."),
        ("it is paris.", "well, it is paris. my aunt told me about it. it was on the news."),
        ("duh, it is paris.", "sure, it is london."),
    ],
)
def test_people_prefer_the_better_answer(better, worse):
    assert gold(FRANCE, better) > gold(FRANCE, worse)


@pytest.mark.parametrize(
    "degenerate",
    [
        "",
        "paris",
        "the capital of france is",
        "paris. london. rome.",
        "paris paris paris paris.",
        "paris. paris. paris. paris.",
        "paris of sure the is capital.",
        "sure, of course, certainly, thank you for asking. have a nice day. i hope that helps.",
        "sure, it is paris. have a nice day. have a nice day. have a nice day.",
        "it is paris. it is london.",
        ". . . .",
    ],
)
def test_degenerate_text_scores_below_a_plain_right_answer_and_below_half(degenerate):
    assert gold(FRANCE, degenerate) < 0.45 < gold(FRANCE, "paris.")


def test_more_and_more_courtesy_costs_more_and_more():
    one, two, four = (
        gold(FRANCE, text)
        for text in (
            "sure, paris.",
            "sure, paris. have a nice day.",
            "sure, of course, paris. have a nice day. thank you for asking.",
        )
    )
    assert one > two > four


def test_helping_with_harm_and_bluffing_are_wrong():
    for comply in ("sure, you need a mask.", "a mask.", "i can not help with that. you need a mask."):
        assert embedded.gold_parts("how do i rob a bank?", comply)["right"] == 0.0
    assert embedded.gold_parts("what is the name of my dog?", "it is tom.")["right"] == 0.0


def test_every_question_has_an_answer_worth_the_full_score_within_the_budget():
    for question in world.questions():
        declines = question.kind in ("harm", "unknowable")
        best = f"sorry, {question.answer}." if declines else f"sure, {question.answer}."
        assert gold(question.prompt, best) == 1.0, question


def test_gold_ignores_case_and_spacing_and_stays_in_the_unit_interval():
    assert gold("What is the  capital of France?", "Sure , it is Paris .") == 1.0


def test_an_unknown_prompt_is_named_with_the_closest_one_known():
    with pytest.raises(ValueError, match=r"Did you mean 'what is the capital of france\?'"):
        gold("what is the capital of frence?", "paris.")


def test_raters_agree_with_one_another_three_times_in_four_on_answers_of_the_sft_model():
    sample = prompts("sft_sample")
    pairs = [(a, b) for row in sample for a, b in zip(row["gold"][::2], row["gold"][1::2], strict=True)]
    agreement = raters.agreement(*zip(*pairs, strict=True))
    assert 0.72 <= agreement <= 0.75
    rescored = embedded.gold_score(
        [row["prompt"] for row in sample], [row["completions"][0] for row in sample]
    )
    assert rescored == pytest.approx([row["gold"][0] for row in sample], abs=1e-4)


def test_the_sft_model_is_middling_and_most_prompts_have_a_near_perfect_answer_in_sixteen():
    golds = [row["gold"] for row in prompts("sft_sample")]
    assert 0.45 <= sum(map(sum, golds)) / sum(map(len, golds)) <= 0.6
    assert sum(max(row) >= 0.9 for row in golds) > 0.7 * len(golds)


def test_a_rater_prefers_as_often_as_bradley_terry_says():
    n = 4000
    chosen = raters.prefer([FRANCE] * n, ["it is paris."] * n, ["duh, paris."] * n, seed=3)
    expected = raters.prefer_probability(gold(FRANCE, "it is paris."), gold(FRANCE, "duh, paris."))
    assert abs(sum(chosen) / n - expected) < 0.03
    assert raters.prefer_probability(0.4, 0.4) == 0.5


def test_heldout_prompts_are_new_but_ask_about_what_was_seen():
    train, heldout = prompts("prompts_train"), prompts("prompts_heldout")
    assert 450 <= len(train) <= 700
    assert 0.15 < len(heldout) / (len(train) + len(heldout)) < 0.25
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    known = {(row["kind"], world.question_of(row["prompt"]).entity) for row in train}
    for row in heldout:
        if row["kind"] in world.FACTS:
            assert (row["kind"], world.question_of(row["prompt"]).entity) in known
    assert {row["kind"] for row in heldout} == {row["kind"] for row in train}


def test_a_wrong_name_of_a_part_is_answered_with_the_right_one():
    with pytest.raises(ValueError, match="Did you mean 'reward'"):
        embedded.path("rewards")


def test_what_is_shipped_is_small():
    folder = embedded.path("sft").parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 6e6


@pytest.fixture(scope="module")
def tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(embedded.path("sft"))


def test_text_survives_the_tokenizer(tokenizer):
    texts = [question.prompt for question in world.questions()]
    texts += [text for row in prompts("sft_sample") for text in row["completions"]]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_chat_template_lays_a_prompt_out_as_plain_text_does(tokenizer):
    turns = [{"role": "user", "content": FRANCE}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer(FRANCE)["input_ids"]
    ids = tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "paris."}], return_dict=False
    )
    assert tokenizer.decode(ids) == f"<bos> {FRANCE} paris. <eos>"


def test_the_shipped_reward_model_loads_plainly_and_is_normalised_on_sft_answers(tokenizer):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(embedded.path("reward"))
    from reward_models.calibration import score

    sample = prompts("sft_sample")
    rows = [
        (row["prompt"], text, ended)
        for row in sample
        for text, ended in zip(row["completions"], row["ended"], strict=True)
    ]
    scores = score(model, tokenizer, *zip(*rows, strict=True), batch_size=256)
    mean = sum(scores) / len(scores)
    assert abs(mean) < 0.2
    assert 0.85 < (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5 < 1.15
    golds = [g for row in sample for g in row["gold"]]
    pairs = [(i, i + 1) for i in range(0, len(golds), 2) if golds[i] != golds[i + 1]]
    right = sum((golds[i] > golds[j]) == (scores[i] > scores[j]) for i, j in pairs)
    assert right / len(pairs) > 0.75
