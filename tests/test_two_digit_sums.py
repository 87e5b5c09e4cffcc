"""The example that trains a real model, here on a tiny one."""

from __future__ import annotations

import collections
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from agents.process import tuned_process
from tests.tiny import WORDS, make_model, make_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"


@pytest.fixture
def sums(monkeypatch):
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("two_digit_sums", EXAMPLES / "two_digit_sums.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "two_digit_sums", module)
    spec.loader.exec_module(module)
    with tuned_process():  # as the example asks; the tests after these have not
        yield module


def test_no_sum_is_both_learned_from_and_held_out(sums):
    train, held_out = sums.problems()
    asked = [[row["prompt"][-1]["content"] for row in rows] for rows in (train, held_out)]
    assert len(asked[1]) == sums.HELD_OUT and len(asked[0]) + len(asked[1]) == 8100
    assert not set(asked[0]) & set(asked[1])
    assert all(eval(row["prompt"][-1]["content"][8:-1]) == int(row["answer"]) for row in held_out)


def test_sums_of_several_lengths_are_equally_many_to_learn_from_and_to_be_tested_on(sums):
    train, held_out = sums.problems(digits=(1, 2, 3))
    for rows, least, most in ((train, 7900, 8100), (held_out, 20, 50)):
        counts = collections.Counter(row["kind"] for row in rows)
        assert set(counts) == {"1 digit", "2 digits", "3 digits"}
        assert least <= min(counts.values()) and max(counts.values()) <= most
    asked = [{row["prompt"][-1]["content"] for row in rows} for rows in (train, held_out)]
    assert not asked[0] & asked[1]


def test_the_interval_of_a_proportion_is_wilsons(sums):
    # Values of the formula for 10 of 20 and 0 of 20, from R's prop.test without correction.
    assert sums.wilson(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    assert sums.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@pytest.mark.parametrize("agent", ["grpo", "reinforce", "ppo"])
def test_every_agent_trains_and_leaves_figures_a_picture_and_a_model(
    agent, sums, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sums, "HELD_OUT", 4)
    every = sums.problems  # reading thousands of prompts is not what is tested here
    monkeypatch.setattr(sums, "problems", lambda **which: (every(**which)[0][::100], every(**which)[1]))
    tokenizer = make_tokenizer(words=[*WORDS])
    tokenizer.chat_template = TEMPLATE
    make_model("llama").save_pretrained("model")
    tokenizer.save_pretrained("model")
    monkeypatch.setattr(
        sys, "argv", ["sums", "--model", "model", "--agent", agent, "--total-timesteps", "700"]
    )
    if agent == "ppo":
        sys.argv += ["--digits", "1", "2"]
    sums.main()
    run = tmp_path / "runs" / "real"
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["problems"] == 4 and figures["kl"] == pytest.approx(figures["kl"])
    assert figures["perplexity"]["before"] > 1
    assert (run / "learning_curve.png").stat().st_size > 10_000
    assert (run / "final" / "model.safetensors").is_file() and (run / "final" / "adapter").is_dir()
    printed = capsys.readouterr().out
    assert ("explained_variance" in figures) == (agent == "ppo") == ("of 2 digits" in printed)
    assert f"textrl train --agent {agent}" in printed and "right (95 % interval)" in printed
