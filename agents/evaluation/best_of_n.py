"""What choosing among several answers buys: best-of-n by the reward, pass@k, and the KL that it costs.

Each prompt has N answers. All estimates are over every subset of n of them at once, not over some that were drawn, so
they have no noise of their own (as pass@k of Chen et al. 2021, "Evaluating Large Language Models Trained on Code").

The KL of best-of-n from its model is ``log n - (n - 1) / n`` where no two answers have the same score, and less where
they do (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy"); the bound is exact, the
estimate takes ties into account. Left out: other ways to choose than by the highest score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

#: Nats beyond which ``exp`` of them overflows.
_OVERFLOW = 700.0


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """The answer with the highest score among ``n``, means over prompts.

    Attributes:
        n: Answers to choose from.
        score: Of the chosen one.
        gold: Of the chosen one; NaN without a judge.
        kl_bound: ``log n - (n - 1) / n``, nats.
        kl: The estimate with ties, nats.
    """

    n: int
    score: float
    gold: float
    kl_bound: float
    kl: float


def best_of_n(score: np.ndarray, gold: np.ndarray | None, n: int) -> BestOfN:
    """Best-of-n by ``score`` from ``N >= n`` answers to each of ``P`` prompts.

    Args:
        score: float ``[P, N]``.
        gold: float ``[P, N]``, or None.
        n: Answers to choose from.

    Raises:
        ValueError: There are fewer than ``n`` answers.
    """
    prompts, answers = score.shape
    if not 1 <= n <= answers:
        raise ValueError(f"best of {n} wants at least {n} answers to each prompt, and there are {answers}")
    scores, golds, kls = np.empty(prompts), np.full(prompts, np.nan), np.empty(prompts)
    for p in range(prompts):
        weights = chosen(score[p], n)
        scores[p] = weights @ score[p]
        golds[p] = np.nan if gold is None else weights @ gold[p]
        kls[p] = selection_kl(score[p], n)
    known = golds[~np.isnan(golds)]
    return BestOfN(
        n,
        float(scores.mean()),
        float(known.mean()) if known.size else math.nan,
        kl_bound(n),
        float(kls.mean()),
    )


def chosen(score: np.ndarray, n: int) -> np.ndarray:
    """The probability of each of N answers to be the best of ``n`` drawn without replacement, ties shared, ``[N]``."""
    count = len(score)
    levels, level, sizes = np.unique(score, return_inverse=True, return_counts=True)
    up_to = np.cumsum(sizes)
    # The best of n is at or below a level if all n are: hypergeometric, in logarithms for large N.
    at_most = np.array(
        [math.exp(_log_choose(int(m), n) - _log_choose(count, n)) if m >= n else 0.0 for m in up_to]
    )
    return (np.diff(at_most, prepend=0.0) / sizes)[level] if len(levels) > 1 else np.full(count, 1 / count)


def _log_choose(m: int, n: int) -> float:
    return math.lgamma(m + 1) - math.lgamma(n + 1) - math.lgamma(m - n + 1)


def kl_bound(n: int) -> float:
    """``log n - (n - 1) / n``: no best-of-n is further from its model, in nats."""
    return math.log(n) - (n - 1) / n


def n_at(kl: float) -> float:
    """The ``n``, not always whole, whose best-of-n may be ``kl`` nats from its model: :func:`kl_bound` turned round.

    Args:
        kl: Nats, at least 0.

    Returns:
        At least 1; infinite from 700 nats on, where it would overflow.
    """
    if kl < 0:
        raise ValueError(f"a KL is at least 0, got {kl}")
    if kl >= _OVERFLOW:
        return math.inf
    # log n lies between the KL and the KL + 1; bisection, since the bound is flat at n = 1.
    low, high = kl, kl + 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle - 1 + math.exp(-middle) < kl else (low, middle)
    return math.exp(high)


def selection_kl(score: np.ndarray, n: int) -> float:
    """The KL of best-of-n from the model as far as these N answers show it, ties shared, in nats.

    Within a level of the score both distribute alike, so the KL is that between levels: ``F^n`` against ``F``.
    """
    sizes = np.unique(score, return_counts=True)[1]
    share = sizes / sizes.sum()
    upper = np.cumsum(share)
    lower = upper - share
    best = np.clip(upper, 0, 1) ** n - np.clip(lower, 0, 1) ** n
    there = best > 0
    return float((best[there] * np.log(best[there] / share[there])).sum())


def pass_at_k(passed: np.ndarray, k: int) -> float:
    """The share of prompts of which at least one of ``k`` answers passes, mean over prompts and subsets.

    Args:
        passed: bool ``[P, N]``.
        k: Answers that count.

    Raises:
        ValueError: There are fewer than ``k`` answers.
    """
    count = passed.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"pass@{k} wants at least {k} answers to each prompt, and there are {count}")
    failing = count - passed.sum(1)
    none = [math.exp(_log_choose(int(f), k) - _log_choose(count, k)) if f >= k else 0.0 for f in failing]
    return float(1 - np.mean(none))


def length_controlled_win_rate(
    judged_a: np.ndarray, judged_b: np.ndarray, length_a: np.ndarray, length_b: np.ndarray
) -> float:
    """How often ``a`` would beat ``b`` if its answers were as long: a judge that likes length is no better model.

    A logistic regression of every comparison on ``tanh`` of the difference of lengths in standard deviations, read off
    where the difference is 0 (after Dubois et al. 2024, "Length-Controlled AlpacaEval", without its terms for prompts).

    Args:
        judged_a: What the judge gave, float ``[P, n]``; what is NaN is left out.
        judged_b: float ``[P, m]``.
        length_a: Tokens, ``[P, n]``.
        length_b: Tokens, ``[P, m]``.
    """
    difference = judged_a[:, :, None] - judged_b[:, None, :]
    known = ~np.isnan(difference).ravel()
    wins = ((difference > 0) + 0.5 * (difference == 0)).ravel()[known]
    longer = (np.asarray(length_a, float)[:, :, None] - np.asarray(length_b, float)[:, None, :]).ravel()[
        known
    ]
    spread = longer.std()
    if spread == 0:
        return float(wins.mean())
    return _logistic_at_zero(np.tanh(longer / spread), wins)


def _logistic_at_zero(x: np.ndarray, wins: np.ndarray) -> float:
    """The fitted probability at ``x = 0`` of a logistic regression, by Newton's method with a small ridge."""
    features = np.stack([np.ones_like(x), x], 1)
    weights = np.zeros(2)
    ridge = 1e-3 * np.eye(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (wins - p) - ridge @ weights
        curvature = (features * (p * (1 - p))[:, None]).T @ features + ridge
        step = np.linalg.solve(curvature, gradient)
        weights += np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def frontier(score: np.ndarray, gold: np.ndarray | None, sizes: Sequence[int]) -> list[BestOfN]:
    """:func:`best_of_n` at several sizes."""
    return [best_of_n(score, gold, n) for n in sizes]
