"""Clip-Cov: a few of the tokens that cost most entropy are left out (Cui et al. 2025, arXiv 2505.22617).

    Cov(y_t) = (log pi(y_t) - mean log pi) (A_t - mean A),    over the N tokens of a batch
    I ~ Uniform of r N tokens among those with  low < Cov < high;    no gradient goes through them

"The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models": entropy falls by
likely tokens with a large advantage. ``log pi`` is that of the rollout, as on the first pass, so that what is chosen
does not depend on how a minibatch is cut.
"""

from typing import Any

import torch
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import check_numbers
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class ClipCov(GRPO):
    """GRPO without a few tokens of high covariance, drawn at random (arXiv 2505.22617).

    Args:
        cov_share: ``r``, the share of a minibatch's tokens that are left out, at least one.
        cov_low: Only tokens with a covariance above it may be.
        cov_high: And below this.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    fixed = {"average": "token"}

    def __init__(
        self, *args: Any, cov_share: float = 2e-4, cov_low: float = 1.0, cov_high: float = 5.0, **kwargs: Any
    ) -> None:
        maths.check_share("cov_share", cov_share)
        check_numbers(cov_low=cov_low, cov_high=cov_high)
        if not cov_low < cov_high:
            raise ValueError(f"cov_low must be below cov_high, got {cov_low} and {cov_high}")
        self.cov_share, self.cov_low, self.cov_high = cov_share, cov_low, cov_high
        super().__init__(*args, **kwargs)

    def prepare_batch(self, batch: Rollout) -> Rollout:
        batch = super().prepare_batch(batch)
        covariance = maths.token_covariances(batch.log_probs, batch.advantages, batch.mask)
        may = (covariance > self.cov_low) & (covariance < self.cov_high) & batch.mask
        order = torch.from_numpy(self.rng.random(tuple(batch.mask.shape), dtype="float32"))
        order = order.to(may.device).masked_fill(~may, -1.0)
        count = max(int(self.cov_share * int(batch.host_lengths().sum())), 1)
        batch.chosen = maths.largest(order, count) & may
        return batch

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        return super().policy_loss(batch, new, ratio) * ~batch.chosen
