"""GDPO: several rewards, each normalised in its group before they are added (Liu et al. 2026, arXiv 2601.05242).

    A_i = whiten over the batch of sum_k w_k (r_k,i - mean(r_k)) / std(r_k), means and deviations of the group

GRPO adds first and normalises the sum, so that different rewards collapse into the same advantage, and a reward that
varies more counts for more than its weight says. TRL calls this ``multi_objective_aggregation="normalize_then_sum"``.
The rewards and their weights are those of the environment's list, ``reward=[(accuracy, 1.0), (format, 0.5)]``, each as
it scored, before clips and normalisers; with one reward this is GRPO, whitened. Differs from the paper: a KL that is
charged in the reward is relative to the group and not divided.
"""

import torch
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.rollouts.rollout import Rollout
from reward_models.contract import WeightedSum
from textrl_env.errors import ArgumentError


class GDPO(GRPO):
    """Several rewards, each relative to its spread in the group; their sum whitened over the batch (arXiv 2601.05242).

    Raises:
        ArgumentError: The environment has several rewards and no weight for each, or is stepped token by token.
    """

    fixed = {"scale": "std"}

    def advantages(self, rollout: Rollout) -> Tensor:
        self.record_groups(rollout)
        parts, weights = self._parts(rollout)
        total = parts.new_zeros(len(parts))
        for part, weight in zip(parts.unbind(1), weights, strict=True):
            applied = ~part.isnan()
            total += weight * maths.group_advantages(part.nan_to_num(), self.group_size, "std", applied)
        # The second normalisation keeps the advantage at one size however many rewards there are.
        relative = maths.group_advantages(total, len(total), "std", self.scored_episodes(rollout))
        return (relative + self.kl_advantages(rollout))[:, None] * rollout.mask

    def _parts(self, rollout: Rollout) -> tuple[Tensor, list[float]]:
        """What each reward gave to each episode, ``[B, K]``, and its weight."""
        env = self.envs.unwrapped if self.text_env is None else self.text_env
        reward = next(iter(getattr(env, "rewards", ())), None)
        names = () if reward is None else reward.names
        if len(names) < 2:
            return self.raw_scores(rollout)[:, None], [1.0]
        if rollout.parts is None:
            raise ArgumentError(
                f"GDPO wants the rewards {', '.join(names)} one by one, and {self.envs} is stepped token by token: use "
                "the environment without a wrapper"
            )
        if not isinstance(reward, WeightedSum) or len(reward.weights) != len(names):
            raise ArgumentError(
                f"GDPO wants a list of rewards with a weight for each, got {reward.name!r} with the parts "
                f"{', '.join(names)}"
            )
        # A reward's only nonzero entry is in the last step; NaN there stays NaN.
        return torch.where(rollout.done[..., None], rollout.parts, 0.0).sum(1), reward.weights
