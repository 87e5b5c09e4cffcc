"""OPO: the baseline that leaves the least variance, if gradients grow with length (Hao et al. 2025, arXiv 2505.23585).

    A_i = r_i - b,    b = sum_j l_j r_j / sum_j l_j over the ``G`` answers to a prompt, ``l_j`` their lengths

The optimal baseline weighs scores by the squared norm of ``grad log pi(y)``; the paper takes that to be proportional to
the length. Answers count by the sum over their tokens. Left out: the paper's rule of one gradient step for each rollout
is the default here (``n_epochs=1``, ``batch_size=None``) and not enforced.
"""

from torch import Tensor

from agents.algorithms.methods.dr_grpo import DrGRPO
from agents.rollouts.rollout import Rollout


class OPO(DrGRPO):
    """Scores less the group's mean weighted by length; no division by a standard deviation (arXiv 2505.23585)."""

    def advantages(self, rollout: Rollout) -> Tensor:
        self.record_groups(rollout)
        scores, counted = self.episode_scores(rollout), self.scored_episodes(rollout)
        lengths = rollout.lengths if counted is None else rollout.lengths * counted
        lengths, groups = (x.double().view(-1, self.group_size) for x in (lengths, scores))
        # Hao et al. 2025: b = E[l r] / E[l].
        baseline = (lengths * groups).sum(1, keepdim=True) / lengths.sum(1, keepdim=True).clamp(min=1)
        relative = (groups - baseline).view(-1).to(scores.dtype)
        relative = relative if counted is None else relative * counted
        return relative[:, None] * rollout.mask
