"""OTB: the baseline of every token that leaves the least variance (arXiv 2602.07078).

    A_t = G_t - b_t,    b_t = sum_i W_t^i G_t^i / sum_i W_t^i over the answers of the group that reach token ``t``
    W_t = sum_{j <= t} |e_{a_j} - pi_j|^2 = sum_{j <= t} (1 - 2 pi(a_j) + sum_a pi(a)^2)

``W_t`` stands for the squared norm of the gradient up to ``t``: that by the logits, which follows from probabilities.
The policy is asked for them once more for each rollout. ``G_t`` is the reward-to-go. A token that only one answer of
its group reaches has itself as its baseline and learns nothing. Left out: weights for what another policy has written.
"""

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.base import Agent
from agents.rollouts.rollout import Rollout


class OTB(GRPO):
    """Reward-to-go less, for each token, the group's mean weighted by the gradient before it (arXiv 2602.07078)."""

    fixed = {"scale": "none", "average": "constant", "kl_in": "reward"}
    takes_no = GRPO.takes_no | GRPO.of_divergences(
        "each token is credited with the KL that the environment charges after it"
    )

    def advantages(self, rollout: Rollout) -> Tensor:
        self.record_groups(rollout)
        mask = rollout.mask if rollout.scored is None else rollout.scored & rollout.mask
        to_go = Agent.advantages(self, rollout)  # without a critic the reward-to-go, float64 [B, T]
        squares = self.policy.squared_probabilities(rollout).to(mask.device)
        energy = ((1 - 2 * rollout.log_probs.exp() + squares) * mask).double().cumsum(1) * mask
        shape = -1, self.group_size, mask.shape[1]
        weights, returns = energy.view(shape), to_go.view(shape)
        baseline = (weights * returns).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-8)
        return (returns - baseline).view_as(to_go) * mask
