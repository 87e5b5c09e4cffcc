"""VESPO: responses weighed by a smooth function of their whole ratio (Shen et al. 2026, arXiv 2602.10693).

    gradient  phi(w_i) A_i grad log pi(y_i | x),    w_i = pi(y_i | x) / pi_old(y_i | x)
    with      phi(w) = w^k exp(lambda (1 - w)),     k and lambda by the sign of A_i

"VESPO: Variational Sequence-Level Soft Policy Optimization". ``phi`` is 1 at ``w = 1`` and falls to 0 on both sides,
with no division by the length. It is a weight: no gradient goes through it.
"""

import math
from typing import Any

import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import check_numbers
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout

#: Bounds of the logarithm of a response's ratio; what lies beyond weighs nothing.
_LOG_RATIOS = math.log(1e-8), 20.0


class VESPO(GRPO):
    """``w^k exp(lambda (1 - w)) A log pi``, ``w`` the ratio of the whole response (arXiv 2602.10693).

    Where an outside generator wrote the responses, ``w`` is the ratio to what it reported, and no further weight
    corrects for it.

    Args:
        k_pos: ``k`` where the advantage is 0 or more: how fast the weight falls below ``w = 1``.
        lambda_pos: ``lambda`` there: how fast it falls above.
        k_neg: ``k`` where the advantage is below 0.
        lambda_neg: ``lambda`` there.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    fixed = {"average": "token"}
    takes_no = GRPO.takes_no | GRPO.of_the_clip("its weights are smooth")

    def __init__(
        self,
        *args: Any,
        k_pos: float = 2.0,
        lambda_pos: float = 3.0,
        k_neg: float = 3.0,
        lambda_neg: float = 2.0,
        **kwargs: Any,
    ) -> None:
        check_numbers(positive=True, k_pos=k_pos, lambda_pos=lambda_pos, k_neg=k_neg, lambda_neg=lambda_neg)
        self.k_pos, self.lambda_pos, self.k_neg, self.lambda_neg = k_pos, lambda_pos, k_neg, lambda_neg
        super().__init__(*args, **kwargs)

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        log_ratio = (new.log_probs - self.behaviour(batch)) * batch.mask
        return log_ratio.sum(1, keepdim=True).clamp(*_LOG_RATIOS).exp().expand_as(log_ratio)

    def step_weights(self, batch: Rollout) -> Tensor:
        return self.loss_weights(batch)  # the ratio is to the generator already

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        good, w = batch.advantages >= 0, ratio.detach()
        k = torch.where(good, self.k_pos, self.k_neg)
        rate = torch.where(good, self.lambda_pos, self.lambda_neg)
        phi = (k * w.log() + rate * (1 - w)).exp()
        return -phi * batch.advantages * new.log_probs
