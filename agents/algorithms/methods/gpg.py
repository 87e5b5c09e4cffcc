"""GPG: the plain policy gradient of groups (Chu et al. 2025, "Group Policy Gradient", arXiv 2504.02546).

    minimise  alpha / sum_i |o_i| sum_i sum_t -A_i log pi(o_t),    A_i = (r_i - mean(r)) / F,    alpha = B / (B - M)

with ``B`` groups in a batch, of which ``M`` are all right or all wrong and so add nothing to the sum but to what it is
divided by; ``alpha`` takes that out. No ratio, no clip, no critic. Left out: waiting for a batch in which enough groups
differ.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout

#: The least share of groups that differ which a batch is scaled up by, after the authors' code.
_LEAST = 0.05


class GPG(GRPO):
    """``-A log pi`` with group-relative ``A``, scaled up for groups that tell nothing (Chu et al. 2025, 2504.02546).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        scale: ``F``: "none" is 1, "std" the group's standard deviation.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    takes_no: ClassVar[dict[str, str]] = GRPO.takes_no | GRPO.of_the_clip("it has no ratio to clip")

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        scale: str = "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, group_size, scale=scale, average="token", **kwargs)

    def advantages(self, rollout: Rollout) -> Tensor:
        share = 1 - float(self.equal_groups(rollout).double().mean())
        return super().advantages(rollout) / max(share, _LEAST)

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        return -batch.advantages * new.log_probs
