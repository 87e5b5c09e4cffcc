"""SAPO: a soft gate in place of the clip (Gao et al. 2025, "Soft Adaptive Policy Optimization", arXiv 2511.20347).

    maximise  1/G sum_i 1/|o_i| sum_t f(rho_t) A_i
    with      f(rho) = 4 / tau * sigmoid(tau (rho - 1)),    tau = tau_pos where A_i > 0, else tau_neg

At ``rho = 1`` the gate's slope is 1, so the first step is GRPO's; away from it the slope falls smoothly, faster for
answers that are to become rarer.
"""

from typing import Any

import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import check_numbers
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class SAPO(GRPO):
    """``4 / tau sigmoid(tau (rho - 1)) A`` in place of PPO's clip (arXiv 2511.20347).

    Args:
        tau_pos: Temperature of the gate where the advantage is above 0.
        tau_neg: The same where it is not; larger forgets the ratios of bad answers sooner.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    fixed = {"average": "sequence"}
    takes_no = GRPO.takes_no | GRPO.of_the_clip("its gate is soft")

    def __init__(self, *args: Any, tau_pos: float = 1.0, tau_neg: float = 1.05, **kwargs: Any) -> None:
        check_numbers(positive=True, tau_pos=tau_pos, tau_neg=tau_neg)
        self.tau_pos, self.tau_neg = tau_pos, tau_neg
        super().__init__(*args, **kwargs)

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        tau = torch.where(batch.advantages > 0, self.tau_pos, self.tau_neg)
        return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * batch.advantages
