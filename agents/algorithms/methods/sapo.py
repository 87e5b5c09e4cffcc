"""SAPO: a soft gate in place of the clip (Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv 2511.20347).

    maximise  1/G sum_i 1/|o_i| sum_t f(rho_t) A_i
    with      f(rho) = 4 / tau * sigmoid(tau (rho - 1)),    tau = tau_pos where A_i > 0, else tau_neg

At ``rho = 1`` the gate's slope is 1, so the first step is GRPO's; away from it the slope falls smoothly, faster for
answers that are to become rarer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule, check_numbers
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout


class SAPO(GRPO):
    """``4 / tau sigmoid(tau (rho - 1)) A`` in place of PPO's clip (Gao et al. 2025, arXiv 2511.20347).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        tau_pos: Temperature of the gate where the advantage is above 0.
        tau_neg: The same where it is not; larger forgets the ratios of bad answers sooner.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    takes_no: ClassVar[dict[str, str]] = GRPO.takes_no | GRPO.of_the_clip("its gate is soft")

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        tau_pos: float = 1.0,
        tau_neg: float = 1.05,
        **kwargs: Any,
    ) -> None:
        check_numbers(positive=True, tau_pos=tau_pos, tau_neg=tau_neg)
        self.tau_pos, self.tau_neg = tau_pos, tau_neg
        super().__init__(policy, env, learning_rate, group_size, average="sequence", **kwargs)

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        tau = torch.where(batch.advantages > 0, self.tau_pos, self.tau_neg)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * batch.advantages
