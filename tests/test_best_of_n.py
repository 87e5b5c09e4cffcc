"""Claims about choosing among answers, pass@k, lengths and diversity, against values worked out otherwise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from agents.evaluation.best_of_n import (
    best_of_n,
    chosen,
    kl_bound,
    length_controlled_win_rate,
    n_at,
    pass_at_k,
    selection_kl,
)
from agents.evaluation.diversity import distinct_n, distinct_of, self_similarity

SCORES = np.array([0.3, 1.0, 1.0, -2.0, 0.5])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_best_of_n_is_the_mean_over_every_subset(n):
    expected = np.zeros(5)
    for subset in itertools.combinations(range(5), n):
        top = max(SCORES[i] for i in subset)
        winners = [i for i in range(5) if SCORES[i] == top]
        expected[winners] += 1 / len(
            winners
        )  # answers with one score are equally likely to be the first of them
    expected /= math.comb(5, n)
    assert chosen(SCORES, n) == pytest.approx(expected)
    found = best_of_n(SCORES[None], 2 * SCORES[None], n)
    assert found.score == pytest.approx(expected @ SCORES) and found.gold == pytest.approx(2 * found.score)


def test_equal_scores_choose_nothing():
    assert chosen(np.ones(4), 3) == pytest.approx(np.full(4, 0.25))
    assert selection_kl(np.ones(4), 3) == 0.0


def test_the_bound_is_exact_without_ties_and_the_estimate_lies_below_it():
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(0.6363, abs=1e-4)
    fine = np.arange(20_000.0)
    assert selection_kl(fine, 4) == pytest.approx(kl_bound(4), abs=1e-3)
    coarse = np.repeat(np.arange(3.0), 200)
    assert selection_kl(coarse, 4) < kl_bound(4) - 0.05


@pytest.mark.parametrize("n", [1, 1.5, 4, 1000, 1e12])
def test_the_n_of_a_kl_is_the_one_whose_bound_it_is(n):
    assert n_at(kl_bound(n)) == pytest.approx(n, rel=1e-6)
    assert n_at(0.0) == pytest.approx(1.0) and n_at(5000.0) == math.inf
    with pytest.raises(ValueError, match="at least 0"):
        n_at(-0.1)


def test_the_estimate_is_the_kl_of_the_distribution_that_choosing_makes():
    levels = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 2.0])
    base = np.array([3, 2, 1]) / 6
    rng = np.random.default_rng(0)
    best = rng.choice(3, size=(200_000, 4), p=base).max(1)
    share = np.bincount(best) / len(best)
    assert selection_kl(levels, 4) == pytest.approx(float((share * np.log(share / base)).sum()), abs=5e-3)


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    passed = np.array([[True, False, False, False], [False] * 4, [True, True, True, False]])
    for k in (1, 2, 3, 4):
        shares = [
            np.mean([any(row[i] for i in subset) for subset in itertools.combinations(range(4), k)])
            for row in passed
        ]
        assert pass_at_k(passed, k) == pytest.approx(np.mean(shares))


def test_more_answers_are_asked_for_than_there_are():
    with pytest.raises(ValueError, match="best of 6 wants at least 6 answers"):
        best_of_n(SCORES[None], None, 6)
    with pytest.raises(ValueError, match="pass@3 wants at least 3"):
        pass_at_k(np.ones((2, 2), dtype=bool), 3)


def test_a_win_that_length_alone_has_bought_is_none_at_equal_lengths():
    rng = np.random.default_rng(0)
    length_a, length_b = rng.integers(20, 60, (200, 4)), rng.integers(5, 45, (200, 4))
    judged = [0.05 * length + rng.standard_normal(length.shape) for length in (length_a, length_b)]
    raw = np.mean(judged[0][:, :, None] > judged[1][:, None, :])
    assert raw > 0.65
    assert length_controlled_win_rate(*judged, length_a, length_b) == pytest.approx(0.5, abs=0.05)


def test_a_better_model_stays_better_at_equal_lengths_and_equal_lengths_change_nothing():
    rng = np.random.default_rng(1)
    lengths = rng.integers(5, 60, (200, 4)), rng.integers(5, 60, (200, 4))
    better, worse = 1.0 + rng.standard_normal((200, 4)), rng.standard_normal((200, 4))
    raw = np.mean(better[:, :, None] > worse[:, None, :])
    assert length_controlled_win_rate(better, worse, *lengths) == pytest.approx(raw, abs=0.02)
    same = np.full((200, 4), 8)
    assert length_controlled_win_rate(better, worse, same, same) == pytest.approx(raw)


def test_distinct_2_does_not_depend_on_how_many_answers_were_drawn():
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(40)])
    share = 1 / np.arange(1, 41)
    texts = [" ".join(rng.choice(words, 9, p=share / share.sum())) for _ in range(1024)]
    found = [distinct_n(texts[:count], 2) for count in (64, 256, 1024)]
    assert max(found) - min(found) < 0.05, found
    naive = [len({*pairs}) / len(pairs) for pairs in map(_pairs, (texts[:64], texts))]
    assert naive[0] > 1.5 * naive[1], "the share of all pairs falls with their number"


def _pairs(texts):
    return [pair for text in texts for pair in itertools.pairwise(text.split())]


def test_the_expected_share_is_that_of_random_samples():
    rng = np.random.default_rng(1)
    pool = rng.integers(0, 150, 600)
    texts = [f"a{gram} b{gram}" for gram in pool]  # one pair each
    drawn = [len(set(rng.choice(pool, 256, replace=False))) / 256 for _ in range(300)]
    assert distinct_n(texts, 2) == pytest.approx(np.mean(drawn), abs=0.01)


def test_different_answers_in_ten_are_counted_or_expected():
    assert distinct_of([list("aaaaaaaaab"), list("abcdefghij")], 10) == (2 + 10) / 2
    assert math.isnan(distinct_of([["a", "b"]], 10))
    every = [len(set(subset)) for subset in itertools.combinations("aabc", 2)]
    assert distinct_of([list("aabc")], 2) == pytest.approx(np.mean(every))


def test_self_similarity_is_one_for_copies_and_zero_for_strangers():
    assert self_similarity([["a b", "a b"], ["c", "c"]]) == 1.0
    assert self_similarity([["a b", "c d"]]) == 0.0
    assert self_similarity([["a b", "b c"]]) == pytest.approx(1 / 3)
    assert math.isnan(self_similarity([["a"]]))
