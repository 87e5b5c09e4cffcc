"""REINFORCE++: reward-to-go normalised over the batch, PPO's clip, no critic (Hu 2025, arXiv 2501.03262).

    A_t = r(x, y) - beta sum_{i >= t} k1_i, then minus the mean and over the standard deviation of the batch's tokens

Left out: the paper's second variant, which takes the mean of a group first.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule
from agents.base import Agent
from agents.policies.base import Policy
from agents.rollouts.rollout import Rollout


class REINFORCEPlusPlus(GRPO):
    """Reward-to-go with each token's KL in it, normalised over the whole batch; PPO's clip; no critic.

    Hu 2025, "REINFORCE++" (arXiv 2501.03262): ``A_t = r(x, y) - beta sum_{i >= t} k1_i``, then minus the mean
    and over the standard deviation of all tokens of the batch. One answer for each prompt, no groups.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        clip_range: ``eps``; a number, "linear:0.2", or a function of the remaining progress.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`; groups and a KL in the loss are no part of the method.
    """

    takes_no: ClassVar[dict[str, str]] = GRPO.takes_no | GRPO.of_divergences(
        "each token is credited with the KL that the environment charges after it"
    )

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        clip_range: Schedule = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            group_size=1,
            clip_range=clip_range,
            scale="none",
            average="token",
            kl_in="reward",
            **kwargs,
        )

    def advantages(self, rollout: Rollout) -> Tensor:
        to_go = Agent.advantages(self, rollout)  # there is no critic, so this is the reward-to-go
        return maths.masked_whiten(to_go, rollout.mask)
