"""RLOO: REINFORCE with the mean of the group's others as the baseline (Ahmadian et al. 2024, arXiv 2402.14740).

    grad J = 1/k sum_i (r_i - 1/(k-1) sum_{j != i} r_j) grad log pi(y_i | x)

Left out: the paper's comparison with RAFT.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout


class RLOO(GRPO):
    """REINFORCE with the mean of the group's others as the baseline (Ahmadian et al. 2024, arXiv 2402.14740).

    The action is the whole response, so the importance ratio is ``pi(y|x) / pi_old(y|x)``. On the first pass
    its gradient is the paper's ``(r_i - mean of the others) grad log pi(y_i|x)``; the clip (after TRL) matters
    only to further ones.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``k``, episodes for each start state.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`; the KL is in the reward.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            group_size,
            scale="leave-one-out",
            average="sequence",
            kl_in="reward",
            **kwargs,
        )

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        # rho_i = pi(y_i | x) / pi_old(y_i | x), the same at every token of the response.
        log_ratio = (new.log_probs - batch.log_probs) * batch.mask
        return log_ratio.sum(1, keepdim=True).exp().expand_as(log_ratio)
