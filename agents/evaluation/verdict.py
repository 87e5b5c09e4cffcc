"""Did the run improve the model, or fool the reward? Decided by paired comparisons on held-out prompts.

The first, the best and the last policy have answered the same prompts with fresh samples
(:class:`agents.callbacks.evaluation.EvalCallback`). Each pair is compared prompt by prompt; intervals are 95 %
percentile bootstraps over prompts, so what several answers to one prompt have in common does not count twice::

    better          the last policy's gold is above the first one's
    fallen          the last policy's gold is below the best one's, and it wins fewer than half of the comparisons
    in doubt        only one of these two
    over-optimised  fallen, while the proxy is above the best policy's
    fooled          the proxy is above the first policy's, gold is not

A fall has to show in both, the mean of gold and the win rate: a few answers that became much worse move the one, many
that became a little worse the other, and where the two disagree the evidence is thin. Where the proxy has not risen
since the best policy, a fall of gold is a fall, and not the price of more reward. Without a gold judge nothing of this
can be decided, whatever the proxy says. How often this is wrong is measured by ``benchmarks/studies verdict``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from agents.evaluation.evaluation import EvaluationResult, mean_interval, means_of_known, win_rate
from agents.evaluation.records import BEST, FINAL, START, EvaluationRecord


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_above(self) -> bool:
        """Whether all of it is above 0."""
        return self.low > 0

    @property
    def is_below(self) -> bool:
        """Whether all of it is below 0."""
        return self.high < 0


def interval_of(values: np.ndarray) -> Interval:
    """The mean of one value for each prompt, with its 95 % interval over prompts."""
    return Interval(*mean_interval(values))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One policy against another on the same prompts.

    Attributes:
        score: Difference of the proxy.
        gold: Difference of the gold score; None without a judge.
        win_rate: How often it is preferred, ties counting half, by gold where there is a judge.
    """

    score: Interval
    gold: Interval | None
    win_rate: Interval

    @property
    def signs_of_loss(self) -> int:
        """In how many of two ways the gold judge likes it less, the mean of its scores and the win rate: 0, 1 or 2."""
        return 0 if self.gold is None else int(self.gold.is_below) + int(self.win_rate.high < 0.5)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the held-out comparisons of a run say.

    Attributes:
        gain: The last policy against the first.
        since_best: The last policy against the best; None where the last is the best, or no best was kept.
        best_gain: The best policy against the first; None likewise.
        prompts: How many prompts were compared.
        held_out: Whether they are none of those that were trained on.
        best_timesteps: When the best policy was; None likewise.
    """

    gain: Comparison
    since_best: Comparison | None
    best_gain: Comparison | None
    prompts: int
    held_out: bool
    best_timesteps: int | None

    @property
    def can_tell(self) -> bool:
        """Whether there is a gold judge."""
        return self.gain.gold is not None

    @property
    def is_better(self) -> bool:
        """Gold is above that of the first policy."""
        return self.gain.gold is not None and self.gain.gold.is_above

    @property
    def has_fallen(self) -> bool:
        """Gold is below that of the best policy, in its mean and in comparisons."""
        return self.since_best is not None and self.since_best.signs_of_loss == 2

    @property
    def may_have_fallen(self) -> bool:
        """Gold is below that of the best policy by one of the two only."""
        return self.since_best is not None and self.since_best.signs_of_loss == 1

    @property
    def is_over_optimised(self) -> bool:
        """Gold has fallen from its best while the proxy has risen."""
        return self.has_fallen and self.since_best.score.is_above

    @property
    def lost(self) -> float | None:
        """The share of the best policy's gain in gold that the last one has lost; None where the best gained none."""
        if self.best_gain is None or self.best_gain.gold is None or not self.best_gain.gold.is_above:
            return None
        return -self.since_best.gold.mean / self.best_gain.gold.mean

    @property
    def is_fooled(self) -> bool:
        """The proxy has risen since the start, and gold has not."""
        return self.can_tell and self.gain.score.is_above and not self.gain.gold.is_above


def judge(ends: Mapping[str, EvaluationRecord]) -> Verdict | None:
    """The verdict on a run.

    Args:
        ends: What :func:`agents.evaluation.records.read_ends` returns.

    Returns:
        None for a run that has not ended, or was not evaluated.
    """
    if START not in ends or FINAL not in ends:
        return None
    first, last, best = ends[START], ends[FINAL], ends.get(BEST)
    return Verdict(
        gain=compare(last.sampled, first.sampled),
        since_best=None if best is None else compare(last.sampled, best.sampled),
        best_gain=None if best is None else compare(best.sampled, first.sampled),
        prompts=len(last.sampled.prompts),
        held_out=last.held_out,
        best_timesteps=None if best is None else best.timesteps,
    )


def compare(a: EvaluationResult, b: EvaluationResult) -> Comparison:
    """Compare answers of ``a`` with answers of ``b`` to the same prompts.

    Answers without a score, and prompts for which a side has none, are left out.

    Raises:
        ValueError: The prompts differ.
    """
    if a.prompts != b.prompts:
        raise ValueError(
            f"a comparison wants the same prompts, got {len(a.prompts)} and {len(b.prompts)} that differ"
        )
    score = _difference(a.score, b.score)
    if a.gold is None or b.gold is None or not _both_known(a.gold, b.gold).any():
        return Comparison(score, None, _wins(a.score, b.score))
    return Comparison(score, _difference(a.gold, b.gold), _wins(a.gold, b.gold))


def _both_known(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Prompts of which an answer of each side has a score, bool ``[P]``."""
    return ~(np.isnan(a).all(1) | np.isnan(b).all(1))


def _difference(a: np.ndarray, b: np.ndarray) -> Interval:
    """Of the means by prompt, over the prompts that both sides have scores for; NaN where there are none."""
    known = _both_known(a, b)
    if not known.any():
        return Interval(math.nan, math.nan, math.nan)
    return interval_of(means_of_known(a[known]) - means_of_known(b[known]))


def _wins(a: np.ndarray, b: np.ndarray) -> Interval:
    if not _both_known(a, b).any():
        return Interval(math.nan, math.nan, math.nan)
    return Interval(*win_rate(a, b, leave_out_missing=True))
