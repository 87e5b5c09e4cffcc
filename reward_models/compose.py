"""Rewards made of rewards: normalised, clipped, and ensembles that are careful where they disagree.

    load_reward([(RunningNormalizer("path/to/reward_model"), 1.0), (format_reward(), 0.2)])

Each takes whatever :func:`reward_models.load_reward` takes. In all of them ``RewardResult.parts`` holds the
raw scores of the rewards inside; only ``total`` is changed. A list of rewards is a
:class:`reward_models.WeightedSum`.

Left out on purpose: weights that change during training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reward_models.base import Batch, Reward, RewardResult
from reward_models.contract import load_reward, set_states, states_of
from reward_models.names import unique_names


class _Wrapper(Reward):
    """A reward with something done to its total."""

    def __init__(self, reward: Any) -> None:
        self.reward = load_reward(reward)
        self.name = self.reward.name

    @property
    def names(self) -> tuple[str, ...]:
        return self.reward.names

    def leaves(self) -> list[Reward]:
        return self.reward.leaves()

    def use_ids(self, tokenizer: Any) -> bool:
        return self.reward.use_ids(tokenizer)

    def get_state(self) -> dict[str, Any]:
        return self.reward.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.reward.set_state(state)


class Clip(_Wrapper):
    """A reward whose total is kept within ``[low, high]``; either may be infinite.

    Args:
        reward: What :func:`reward_models.load_reward` takes.
        low: The least it may be.
        high: The most it may be.
    """

    def __init__(self, reward: Any, low: float = -math.inf, high: float = math.inf) -> None:
        super().__init__(reward)
        if not low < high:
            raise ValueError(f"low must be below high, got low={low!r} and high={high!r}")
        self.low, self.high = low, high

    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        result = self.reward.evaluate_own(batch, optional)
        return RewardResult(np.clip(result.total, self.low, self.high), result.parts)


class RunningNormalizer(_Wrapper):
    """A reward brought to mean 0 and standard deviation 1 by what it has scored so far.

    Each call first takes its scores into the running mean and (population) variance, with the update of
    Chan, Golub and LeVeque (1979), then normalises by them; so the statistics do not depend on how the scores
    were split into calls, but a score does depend on what came before it. While the variance is 0 (the
    first score, or a constant reward) the total is 0. For evaluation set ``update = False``.

    Args:
        reward: What :func:`reward_models.load_reward` takes.
        clip: Totals are kept within ``[-clip, clip]``; None for no limit.
        center: Whether the mean is taken off; otherwise only the scale changes.
        update: Whether the statistics follow what is scored.
    """

    def __init__(
        self, reward: Any, clip: float | None = 10.0, center: bool = True, update: bool = True
    ) -> None:
        super().__init__(reward)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive or None, got {clip!r}")
        self.clip, self.center, self.update = clip, center, update
        self.count, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation of the scores so far; 1 before there is any spread."""
        spread = math.sqrt(self._squares / self.count) if self.count else 0.0
        # Scores that are all equal leave rounding errors behind, which must not be blown up to size 1.
        return spread if spread > 1e-12 * max(abs(self.mean), 1e-300) else 1.0

    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        result = self.reward.evaluate_own(batch, optional)
        if self.update:
            self._take_in(result.total[~np.isnan(result.total)])
        total = (result.total - (self.mean if self.center else 0.0)) / self.std
        if self.clip is not None:
            total = np.clip(total, -self.clip, self.clip)
        return RewardResult(total, result.parts)

    def _take_in(self, scores: np.ndarray) -> None:
        if len(scores) == 0:
            return
        count, mean = self.count + len(scores), float(scores.mean())
        delta = mean - self.mean
        self._squares += float(((scores - mean) ** 2).sum()) + delta**2 * self.count * len(scores) / count
        self.mean += delta * len(scores) / count
        self.count = count

    def get_state(self) -> dict[str, Any]:
        own = {"count": self.count, "mean": self.mean, "squares": self._squares}
        return own | {"reward": self.reward.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        expected = {"count", "mean", "squares", "reward"}
        if set(state) != expected:
            raise ValueError(f"the state of a RunningNormalizer has {sorted(expected)}, got {sorted(state)}")
        self.reward.set_state(state["reward"])
        self.count, self.mean = int(state["count"]), float(state["mean"])
        self._squares = float(state["squares"])


class Ensemble(Reward):
    """Several rewards for the same thing: their mean, less where they disagree.

    ``mean - k * std`` over the members for each completion (population standard deviation), the
    uncertainty-weighted objective of Coste et al., "Reward Model Ensembles Help Mitigate Overoptimization"
    (arXiv 2310.02743, which penalises the variance); ``k = 0`` is the plain mean.

    Args:
        rewards: What :func:`reward_models.load_reward` takes, one for each member.
        k: How much disagreement costs, at least 0.
    """

    def __init__(self, rewards: Sequence[Any], k: float = 1.0) -> None:
        self.rewards = [load_reward(reward) for reward in rewards]
        if not self.rewards:
            raise ValueError("an ensemble needs at least one reward")
        if not (math.isfinite(k) and k >= 0):
            raise ValueError(f"k must be a finite number >= 0, got {k!r}")
        self.k = k
        self._names = tuple(unique_names(name for reward in self.rewards for name in reward.names))
        self.name = "ensemble"

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        results = [reward.evaluate_own(batch, optional) for reward in self.rewards]
        totals = np.stack([result.total for result in results])  # [members, N]
        parts = [part for result in results for part in result.parts.values()]
        total = totals.mean(axis=0) - self.k * totals.std(axis=0)
        return RewardResult(total, dict(zip(self.names, parts, strict=True)))

    def leaves(self) -> list[Reward]:
        return [leaf for reward in self.rewards for leaf in reward.leaves()]

    def use_ids(self, tokenizer: Any) -> bool:
        told = [reward.use_ids(tokenizer) for reward in self.rewards]  # every one, so no short cut
        return any(told)

    def get_state(self) -> dict[str, Any]:
        return states_of(self.rewards)

    def set_state(self, state: Mapping[str, Any]) -> None:
        set_states(self.rewards, state)
