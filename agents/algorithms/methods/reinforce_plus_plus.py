"""REINFORCE++: reward-to-go normalised over the batch, PPO's clip, no critic (Hu 2025, arXiv 2501.03262).

    A_t = r(x, y) - beta sum_{i >= t} k1_i, then minus the mean and over the standard deviation of the batch's tokens

One answer for each prompt, no groups. Left out: the paper's second variant, which takes the mean of a group first.
"""

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.base import Agent
from agents.rollouts.rollout import Rollout


class REINFORCEPlusPlus(GRPO):
    """Reward-to-go with each token's KL in it, normalised over the batch; PPO's clip; no critic (arXiv 2501.03262)."""

    fixed = {"group_size": 1, "scale": "none", "average": "token", "kl_in": "reward"}
    takes_no = GRPO.takes_no | GRPO.of_divergences(
        "each token is credited with the KL that the environment charges after it"
    )

    def advantages(self, rollout: Rollout) -> Tensor:
        to_go = Agent.advantages(self, rollout)  # there is no critic, so this is the reward-to-go
        return maths.masked_whiten(to_go, rollout.mask)
