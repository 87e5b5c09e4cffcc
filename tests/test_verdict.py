"""Claims about the verdict: it rests on paired held-out answers, finds what is there, and says when it cannot tell."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from agents.evaluation.verdict import compare, judge
from tests.recorded import evaluation, recorded_ends, result


def ends(first, best, last):
    """Evaluations at the ends of a run, each given as ``(score, gold)``."""
    found = {"start": evaluation(0, *first, seed=11), "final": evaluation(900, *last, seed=13)}
    return found if best is None else found | {"best": evaluation(500, *best, seed=12)}


@pytest.mark.parametrize(
    ("first", "best", "last", "better", "over_optimised", "fallen", "fooled"),
    [
        ((0.0, 0.5), None, (1.0, 0.8), True, False, False, False),
        ((0.0, 0.5), (1.0, 0.8), (1.4, 0.67), True, True, True, False),
        ((0.0, 0.5), (1.0, 0.8), (1.0, 0.8), True, False, False, False),
        ((0.0, 0.5), (1.0, 0.8), (0.4, 0.67), True, False, True, False),
        ((0.0, 0.5), (0.4, 0.6), (1.4, 0.3), False, True, True, True),
        ((0.0, 0.5), None, (1.4, 0.3), False, False, False, True),
        ((0.0, 0.5), None, (0.0, 0.5), False, False, False, False),
    ],
)
def test_a_verdict_is_what_the_answers_show(first, best, last, better, over_optimised, fallen, fooled):
    found = judge(ends(first, best, last))
    assert found.is_better == better and found.is_over_optimised == over_optimised
    assert found.has_fallen == fallen and found.is_fooled == fooled


def test_a_fall_that_the_score_does_not_show_is_a_fall_and_not_the_price_of_more_reward():
    found = judge(ends((0.0, 0.5), (1.0, 0.8), (1.0, 0.67)))
    assert not found.since_best.score.is_above and not found.since_best.score.is_below
    assert found.has_fallen and not found.is_over_optimised
    assert found.lost == pytest.approx(0.13 / 0.3, abs=0.1)


def with_gold(record, gold):
    return dataclasses.replace(record, sampled=dataclasses.replace(record.sampled, gold=gold))


def test_a_fall_that_shows_in_one_way_of_counting_only_is_left_in_doubt():
    there = ends((0.0, 0.2), (1.0, 0.8), (1.4, 0.8))
    level = np.full((64, 4), 0.8)
    # Of 64 prompts, 8 lose everything and 10 gain a little: a lower mean, and as many comparisons won as lost.
    fewer, more = level.copy(), level.copy()
    fewer[:8] = 0.1
    fewer[8:18] = 0.82
    more[:20] = 0.78  # many answers a little worse, some much better
    more[20:24] = 1.0
    doubts = {
        "mean": judge(
            there | {"best": with_gold(there["best"], level), "final": with_gold(there["final"], fewer)}
        ),
        "wins": judge(
            there | {"best": with_gold(there["best"], level), "final": with_gold(there["final"], more)}
        ),
    }
    assert doubts["mean"].since_best.gold.is_below and doubts["mean"].since_best.win_rate.high > 0.5
    assert not doubts["wins"].since_best.gold.is_below and doubts["wins"].since_best.win_rate.high < 0.5
    for found in doubts.values():
        assert found.may_have_fallen and not found.has_fallen and not found.is_over_optimised


def test_without_a_gold_judge_nothing_is_decided_whatever_the_score_says():
    found = judge(ends((0.0, None), None, (9.0, None)))
    assert not found.can_tell and not found.is_better and not found.is_fooled and not found.is_over_optimised
    assert found.gain.score.is_above and found.gain.win_rate.mean > 0.9


def test_a_run_that_was_not_evaluated_or_has_not_ended_has_no_verdict():
    assert judge({}) is None
    assert judge({"start": evaluation(0, 0.0, 0.5)}) is None


def test_what_is_equal_is_rarely_called_over_optimised():
    alarms = sum(
        judge(
            {
                "start": evaluation(0, 0.0, 0.5, seed=3 * i),
                "best": evaluation(500, 1.0, 0.8, seed=3 * i + 1),
                "final": evaluation(900, 1.0, 0.8, seed=3 * i + 2),
            }
        ).has_fallen
        for i in range(100, 180)
    )
    assert alarms <= 5, "one side of a 95 % interval at most: two are expected among 80"


def test_prompts_are_paired_so_that_hard_ones_do_not_hide_a_difference():
    a, b = result(0.0, 0.55, seed=1, noise=0.1), result(0.0, 0.5, seed=2, noise=0.1)
    paired = compare(a, b).gold
    assert paired.is_above
    shuffled = np.random.default_rng(0).permutation(len(a.gold))
    unpaired = np.std(a.gold.mean(1) - b.gold.mean(1)[shuffled]) / np.sqrt(len(a.gold))
    assert paired.high - paired.low < 2 * unpaired, "the same gap would not show between unpaired prompts"


def test_a_prompt_without_a_gold_score_is_left_out_and_other_prompts_are_refused():
    a, b = result(0.0, 0.9, seed=1), result(0.0, 0.5, seed=2)
    a.gold[3] = np.nan
    known = np.arange(len(a.gold)) != 3
    assert compare(a, b).gold.mean == pytest.approx((a.gold[known].mean(1) - b.gold[known].mean(1)).mean())
    a.gold[4, 0] = np.nan  # one answer only: the prompt counts by the others
    others = a.gold[4, 1:].mean() - b.gold[4].mean()
    rest = (a.gold[known].mean(1) - b.gold[known].mean(1))[np.arange(len(a.gold) - 1) != 3]
    assert compare(a, b).gold.mean == pytest.approx((rest.sum() + others) / (len(rest) + 1))
    a.gold[:] = np.nan
    assert compare(a, b).gold is None, "a judge that knows nothing is none"
    b.prompts = b.prompts[::-1]
    with pytest.raises(ValueError, match="same prompts"):
        compare(a, b)


# -- runs that were once given an all-clear -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "fall"),
    [
        ("grpo, seed 0, 60,000 tokens", 0.408, -0.10),
        ("grpo as the demo suggests it, 100,000 tokens", 0.342, -0.19),
    ],
)
def test_runs_that_were_once_given_an_all_clear_are_caught(name, rate, fall):
    found = judge(recorded_ends(name))
    assert found.is_over_optimised and found.is_better
    assert (
        found.since_best.win_rate.mean == pytest.approx(rate, abs=0.001)
        and found.since_best.win_rate.high < 0.45
    )
    assert found.since_best.gold.mean == pytest.approx(fall, abs=0.006) and found.since_best.score.is_above
    assert found.best_timesteps == 20_464


def test_a_run_whose_loss_may_be_chance_is_neither_cleared_nor_accused():
    found = judge(recorded_ends("ppo as the demo has it, 120,000 tokens"))
    since = found.since_best
    assert (
        since.gold.mean == pytest.approx(-0.037, abs=0.001) and since.gold.is_below and since.score.is_above
    )
    assert since.win_rate.mean == pytest.approx(0.474, abs=0.001) and since.win_rate.high > 0.5
    assert found.is_better and found.may_have_fallen and not found.has_fallen and not found.is_over_optimised
    assert found.lost == pytest.approx(0.13, abs=0.005)
