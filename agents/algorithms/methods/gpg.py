"""GPG: the plain policy gradient of groups (Chu et al. 2025, "Group Policy Gradient", arXiv 2504.02546).

    minimise  alpha / sum_i |o_i| sum_i sum_t -A_i log pi(o_t),    A_i = (r_i - mean(r)) / F,    alpha = B / (B - M)

with ``B`` groups in a batch, of which ``M`` are all right or all wrong and so add nothing to the sum but to what it is
divided by; ``alpha`` takes that out. No ratio, no clip, no critic. ``F`` is 1, or with ``scale="std"`` the group's
standard deviation. Left out: waiting for a batch in which enough groups differ.
"""

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout

#: The least share of groups that differ which a batch is scaled up by, after the authors' code.
_LEAST = 0.05


class GPG(GRPO):
    """``-A log pi`` with group-relative ``A``, scaled up for groups that tell nothing (arXiv 2504.02546)."""

    fixed = {"average": "token"}
    defaults = {"scale": "none"}
    takes_no = GRPO.takes_no | GRPO.of_the_clip("it has no ratio to clip")

    def advantages(self, rollout: Rollout) -> Tensor:
        share = 1 - float(self.equal_groups(rollout).double().mean())
        return super().advantages(rollout) / max(share, _LEAST)

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        return -batch.advantages * new.log_probs
