"""GRPO with process supervision: each step of an answer is scored (Shao et al. 2024, section 4.1.3, arXiv 2402.03300).

    A_i,t = sum of (r_i^j - mean(R)) / std(R) over the steps j of the answer that end at or after token t

``R`` holds the rewards of all steps of the ``G`` answers to a prompt. A step is a turn of the policy, such as a line
that ``textrl_env.games.steps`` scores; elsewhere any token that was given a reward, and the last one. Differs from the
paper: a KL that is charged in the reward is relative to the group and not divided.
"""

import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.rollouts.rollout import Rollout


class ProcessGRPO(GRPO):
    """Rewards of steps relative to all of the group's, added up over what follows (arXiv 2402.03300, section 4.1.3)."""

    fixed = {"scale": "std"}

    def advantages(self, rollout: Rollout) -> Tensor:
        self.record_groups(rollout)
        penalties = 0.0 if rollout.penalties is None else rollout.penalties
        shape = -1, self.group_size * rollout.mask.shape[1]
        ends = self.step_ends(rollout)
        rewards, given = ((rollout.rewards + penalties) * ends).view(shape), ends.view(shape)
        count = given.sum(1, keepdim=True)
        centred = (rewards - rewards.sum(1, keepdim=True) / count.clamp(min=1)) * given
        deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        relative = (centred / (deviation + 1e-4)).view_as(ends)
        to_go = relative.flip(1).cumsum(1).flip(1)
        return (to_go + self.kl_advantages(rollout)[:, None]) * rollout.mask

    def step_ends(self, rollout: Rollout) -> Tensor:
        """Where steps end, bool ``[B, T]``; not in episodes to which no reward applied."""
        if rollout.turn is None:
            penalties = 0.0 if rollout.penalties is None else rollout.penalties
            ends = rollout.done | ((rollout.rewards + penalties).abs() > 1e-9)
        else:
            later = torch.zeros_like(rollout.mask)
            later[:, :-1] = rollout.mask[:, 1:] & (rollout.turn[:, 1:] == rollout.turn[:, :-1])
            ends = ~later
        return ends & rollout.mask & (rollout.mask if rollout.scored is None else rollout.scored)
