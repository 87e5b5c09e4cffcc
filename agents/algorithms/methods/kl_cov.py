"""KL-Cov: the tokens that cost most entropy are held to the old policy (Cui et al. 2025, arXiv 2505.22617).

    Cov(y_t) = (log pi(y_t) - mean log pi) (A_t - mean A),    over the N tokens of a batch
    loss_t = -rho_t A_t + beta |log pi_old - log pi|    for the k N tokens of the largest Cov
    loss_t = -rho_t A_t                                 for the others

"The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", with the distance
as in the authors' code. ``log pi`` in the covariance is that of the rollout, as on the first pass, so that what is
chosen does not depend on how a minibatch is cut.
"""

from typing import Any

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import check_numbers
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class KLCov(GRPO):
    """No clip, and a KL to the old policy on the tokens of highest covariance (arXiv 2505.22617).

    On the first pass over a rollout that KL is 0 and has no gradient: it acts from the second gradient step on.

    Args:
        cov_share: ``k``, the share of a minibatch's tokens that are held, at least one.
        cov_kl_coef: ``beta`` of their KL.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    fixed = {"average": "token"}
    takes_no = GRPO.takes_no | GRPO.of_the_clip("a KL is in its place")

    def __init__(self, *args: Any, cov_share: float = 2e-4, cov_kl_coef: float = 1.0, **kwargs: Any) -> None:
        maths.check_share("cov_share", cov_share)
        check_numbers(cov_kl_coef=cov_kl_coef)
        self.cov_share, self.cov_kl_coef = cov_share, cov_kl_coef
        super().__init__(*args, **kwargs)

    def prepare_batch(self, batch: Rollout) -> Rollout:
        batch = super().prepare_batch(batch)
        covariance = maths.token_covariances(batch.log_probs, batch.advantages, batch.mask)
        count = max(int(self.cov_share * int(batch.host_lengths().sum())), 1)
        batch.chosen = maths.largest(covariance.masked_fill(~batch.mask, -float("inf")), count) & batch.mask
        return batch

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        held = self.cov_kl_coef * (new.log_probs - batch.log_probs).abs() * batch.chosen
        return held - ratio * batch.advantages
