"""DPPO: a trust region by how far a token's probability has moved, not by its ratio (Qi et al. 2026, arXiv 2602.04879).

    maximise  sum_t M_t rho_t A_t,    M_t = 0 where the step leads away from mu and D_t > delta, else 1
    with      D_t = |pi(a_t) - mu(a_t)|                              ("tv", equation 13)
              D_t = KL(Bernoulli(mu(a_t)) || Bernoulli(pi(a_t)))     ("kl", equation 14)

"Rethinking the Trust Region in LLM Reinforcement Learning", equations 11 and 12; ``mu`` is what wrote the response. A
step leads away where ``A > 0`` and ``rho > 1``, or ``A < 0`` and ``rho < 1``. A clip of ratios stops rare tokens that
have hardly moved and lets likely ones go far. Left out: the divergence over the likeliest tokens (their top-k form).
"""

from typing import Any

import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import check_numbers, schedule_value
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice


class DPPO(GRPO):
    """GRPO that stops a token where its probability has moved by ``delta`` (arXiv 2602.04879).

    Where an outside generator wrote the responses, its log-probabilities are ``mu``, and no further weight corrects for
    it.

    Args:
        clip_range: ``delta`` for what becomes rarer; a number, "linear:0.2", or a function of the remaining progress.
            The authors take 0.15 for "tv" and 0.05 for "kl".
        clip_range_high: ``delta`` for what becomes likelier; None is ``clip_range``.
        divergence: "tv" or "kl", between the token and all others.
        max_ratio: No ratio weighs more.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    defaults = {"average": "token", "clip_range": 0.15}
    takes_no = GRPO.takes_no | {"delta": "max_ratio bounds its ratios"}

    def __init__(self, *args: Any, divergence: str = "tv", max_ratio: float = 20.0, **kwargs: Any) -> None:
        check_choice("divergence", divergence, ("tv", "kl"))
        check_numbers(positive=True, max_ratio=max_ratio)
        self.divergence, self.max_ratio = divergence, max_ratio
        super().__init__(*args, **kwargs)

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        return (new.log_probs - self.behaviour(batch)).exp()

    def step_weights(self, batch: Rollout) -> Tensor:
        return self.loss_weights(batch)  # the ratio is to the generator already

    def clipped(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        now, before = new.log_probs.detach(), self.behaviour(batch)
        p, q = now.exp(), before.exp()
        if self.divergence == "tv":
            moved = (p - q).abs()
        else:
            others = torch.log1p(-q.clamp(max=1 - 1e-7)) - torch.log1p(-p.clamp(max=1 - 1e-7))
            moved = q * (before - now) + (1 - q) * others
        low = schedule_value(self.clip_range, self._progress_remaining)
        high = low if self.clip_range_high is None else self.clip_range_high
        up = (batch.advantages > 0) & (p > q) & (moved > high)
        return up | ((batch.advantages < 0) & (p < q) & (moved > low))

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        inside = ~self.clipped(batch, new, ratio)
        weight = inside * ratio.detach().clamp(max=self.max_ratio)
        return -weight * batch.advantages * new.log_probs
