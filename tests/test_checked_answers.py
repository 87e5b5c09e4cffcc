"""examples/checked_answers.py without any training: what is demonstrated, what is asked, what the games give."""

import importlib.util
import random
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def stories():
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("checked_answers", EXAMPLES / "checked_answers.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["checked_answers"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop("checked_answers", None)


def said(talk):
    return [message["content"] for message in talk if message["role"] == "assistant"]


def test_about_half_of_what_is_demonstrated_with_a_calculator_is_right(stories):
    game = stories.calculator(tool=True)["game"]()
    scores = []
    for i in range(400):
        talk = stories.tool_demonstration(random.Random(i))
        game.reset(question=talk[0]["content"].removeprefix("What is ").partition("?")[0])
        answers = []
        for text in said(talk):
            observation, *_ = game.step(text)
            answers += [message["content"] for message in observation]
        assert answers == [m["content"] for m in talk if m["role"] == "tool"]
        scores.append(game.worth)
    assert 0.4 < np.mean(scores) < 0.55


def test_products_that_are_asked_at_the_end_are_neither_trained_on_nor_demonstrated(stories):
    asked = {f"What is {a} * {b}? Say the number." for a, b in stories.products()[-stories.QUESTIONS :]}
    assert len(asked) == stories.QUESTIONS
    assert not any(stories.tool_demonstration(random.Random(i))[0]["content"] in asked for i in range(4000))


def test_half_of_the_demonstrated_sums_are_right(stories):
    from reasoning_gym import create_dataset

    data = create_dataset("chain_sum", **stories.CHAIN_SUM, seed=0, size=1)
    right = {data[i]["question"]: data[i]["answer"] for i in range(stories.SUMS)}
    shown = [stories.sum_demonstration(random.Random(i)) for i in range(600)]
    assert 0.4 < np.mean([answer["content"] == right[asked["content"]] for asked, answer in shown]) < 0.6


def test_the_service_tells_its_notation_after_a_wrong_call_only_where_it_explains(stories):
    told = set()
    for seed in range(30):
        game = stories.Service(2)
        assert game.reset(seed) == (f"Multiply {game.numbers[0]} and {game.numbers[1]}.", {})
        message, reward, over, *_ = game.step("nonsense")
        assert (reward, over) == (0.0, False)
        told.add(message)
        assert game.step(game.notation.format(*game.numbers))[1:3] == (1.0, True)
    assert told == {f"Error: expected {way}." for way in ("x * y", "mul x y", "x y mul")}
    silent = stories.Service(1, explains=False)
    silent.reset(0)
    assert silent.step("nonsense")[:3] == ("Error.", 0.0, True)


def test_two_attempts_and_one_have_the_same_tokens(stories):
    budgets = {
        learner.game["max_turns"] * learner.game["max_new_tokens"]
        for learner in stories.STORIES["retry"].learners.values()
    }
    assert len(budgets) == 1


def test_a_demonstrated_second_attempt_stands_behind_the_error_message_of_the_first(stories):
    for i in range(200):
        question, first, *rest = stories.retry_demonstration(random.Random(i))
        assert question["content"].startswith("Multiply ") and first["role"] == "assistant"
        if rest:
            assert rest[0]["content"].startswith("Error") and rest[1]["role"] == "assistant"
