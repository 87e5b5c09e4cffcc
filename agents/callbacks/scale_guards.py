"""Guards of any agent in any world: steps that are far too large, and rewards that are.

    PPO("MlpPolicy", env, learning_rate=10).learn(100_000, ScaleGuards())

``textrl train`` has them on (``--no-guards`` turns them off), and ``textrl report`` finds the same in the log. Both are
settings that no algorithm can learn with and that end without an error: the log is full of finite numbers. They stop
nothing. Language models have :class:`~agents.callbacks.guards.Guards` besides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from agents.callbacks.guards import GuardCallback


class ScaleGuards(GuardCallback):
    """Prints a line when the weights of a policy or its rewards are out of any usual scale.

    Args:
        max_growth: The norm of all weights may become so many times what it was in one rollout's updates. Adam moves
            every weight by about the learning rate, and weights begin at about a tenth: a rate of 10 makes the norm a
            hundred times as large, a rate of 0.01 with forty steps a few times. Weights of 0 are not judged.
        max_reward: Size of a reward in one step from which float32 no longer tells apart what is a hundredth of a nat
            away: numbers near 1e5 are 0.008 apart.
        emit: What is called with each line; None prints it to standard error.
        verbose: As in stable-baselines3.

    Attributes:
        messages: Every line so far, with its timestep.
    """

    def __init__(
        self,
        max_growth: float = 10.0,
        max_reward: float = 1e5,
        emit: Callable[[str], None] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(emit, verbose)
        self.max_growth, self.max_reward = max_growth, max_reward
        self._reported: set[str] = set()

    def _on_training_start(self) -> None:
        self.model.weight_growth = 1.0

    def get_state(self) -> dict[str, Any]:
        """What has been announced, and what the latest updates did to the weights."""
        return {"announced": sorted(self._reported), "weight_growth": self.model.weight_growth}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self._reported = set(state["announced"])
        self.model.weight_growth = float(state["weight_growth"])

    def _on_rollout_start(self) -> None:
        self._report("step_size", self._steps(self.model.weight_growth))

    def _on_rollout_end(self) -> None:
        rollout = self.locals["rollout"]
        sizes = torch.where(rollout.mask, rollout.rewards.abs(), 0.0)
        self._report("reward_scale", self._rewards(float(sizes.max())))

    def _on_training_end(self) -> None:
        self._report("step_size", self._steps(self.model.weight_growth))

    def _steps(self, growth: float) -> str | None:
        if not growth >= self.max_growth:
            return None
        return (
            f"the weights became {growth:,.0f} times as large in the updates of one rollout: the steps are too large, "
            f"and what the policy knew is gone. Lower --learning-rate (now {self.model.learning_rate})"
        )

    def _rewards(self, largest: float) -> str | None:
        if not largest >= self.max_reward:
            return None
        apart = float(np.spacing(np.float32(largest)))
        return (
            f"rewards of up to {largest:.3g} in one step: numbers of that size are {apart:.3g} apart in float32, so "
            "smaller differences and the KL penalty are lost, and a critic's loss is their square. Divide the rewards, "
            "or use reward_models.RunningNormalizer (for an environment of your own gymnasium.wrappers.NormalizeReward)"
        )

    def _report(self, name: str, message: str | None) -> None:
        self.logger.record(f"guard/{name}", float(message is not None))
        if message is None or name in self._reported:
            return
        self._reported.add(name)
        self._announce(name, message)
