"""Did the run improve the model, or fool the reward? Decided by paired comparisons on held-out prompts.

The first, the best and the last policy have answered the same prompts with fresh samples
(:class:`agents.callbacks.evaluation.EvalCallback`). Each pair is compared prompt by prompt; intervals are 95 %
percentile bootstraps over prompts, so what several answers to one prompt have in common does not count twice::

    better          the last policy's gold is above the first one's
    over-optimised  the last policy's gold is below the best one's while the proxy has not fallen
    falling         the same, and the proxy has fallen too: learning has become unsteady
    fooled          the proxy is above the first policy's, gold is not

Without a gold judge nothing of this can be decided, whatever the proxy says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from agents.evaluation.evaluation import EvaluationResult, mean_interval, win_rate
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
        """Gold is below that of the best policy."""
        since = self.since_best
        return since is not None and since.gold is not None and since.gold.is_below

    @property
    def is_over_optimised(self) -> bool:
        """Gold has fallen from its best while the proxy has not."""
        return self.has_fallen and not self.since_best.score.is_below

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

    Prompts for which the gold judge has no score are left out.

    Raises:
        ValueError: The prompts differ.
    """
    if a.prompts != b.prompts:
        raise ValueError(
            f"a comparison wants the same prompts, got {len(a.prompts)} and {len(b.prompts)} that differ"
        )
    score = interval_of(a.score.mean(1) - b.score.mean(1))
    if a.gold is None or b.gold is None:
        return Comparison(score, None, Interval(*win_rate(a.score, b.score)))
    known = ~(np.isnan(a.gold).any(1) | np.isnan(b.gold).any(1))
    if not known.any():
        return Comparison(score, None, Interval(*win_rate(a.score, b.score)))
    gold_a, gold_b = a.gold[known], b.gold[known]
    gold = interval_of(gold_a.mean(1) - gold_b.mean(1))
    return Comparison(score, gold, Interval(*win_rate(gold_a, gold_b)))
