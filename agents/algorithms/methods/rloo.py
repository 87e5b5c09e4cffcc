"""RLOO: REINFORCE with the mean of the group's others as the baseline (Ahmadian et al. 2024, arXiv 2402.14740).

    grad J = 1/k sum_i (r_i - 1/(k-1) sum_{j != i} r_j) grad log pi(y_i | x)

The action is the whole response, so the importance ratio is ``pi(y | x) / pi_old(y | x)``. On the first pass the
gradient is the paper's; the clip (after TRL) matters only to further ones. Left out: the paper's comparison with RAFT.
"""

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class RLOO(GRPO):
    """REINFORCE with the mean of the group's others as the baseline; a response is one action (arXiv 2402.14740)."""

    fixed = {"scale": "leave-one-out", "average": "sequence", "kl_in": "reward"}

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        # rho_i = pi(y_i | x) / pi_old(y_i | x), the same at every token of the response.
        log_ratio = (new.log_probs - batch.log_probs) * batch.mask
        return log_ratio.sum(1, keepdim=True).exp().expand_as(log_ratio)
