"""DAPO: clip-higher, token-level mean, overlong shaping and dynamic sampling (Yu et al. 2025, arXiv 2503.14476).

    maximise  1/(sum_i |o_i|) sum_i sum_t min(rho A_i, clip(rho, 1 - eps_low, 1 + eps_high) A_i)
    over groups with 0 < |{correct answers}| < G,   A_i = (r_i - mean(r)) / std(r)

Left out: the paper's data set.
"""

from typing import Any

import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.rollouts.rollout import Rollout, concatenate
from agents.rollouts.vector_envs import longest_episode
from reward_models.rules import overlong_penalty
from textrl_env.errors import check_range


class DAPO(GRPO):
    """Clip-higher, token-level mean, overlong shaping and dynamic sampling (Yu et al. 2025, arXiv 2503.14476).

    Groups whose answers all score the same teach nothing and are replaced by fresh ones until the batch is
    full; after ``max_resamples`` more rollouts the batch stays smaller (and as it came if no group differs).

    Args:
        max_resamples: The most rollouts to sample in place of uninformative groups; 0 turns it off.
        overlong_cache: Length of the slope, in steps, that ends at the budget with a penalty of 1; 0 has none.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    fixed = {"average": "token"}
    defaults = {"clip_range_high": 0.28}

    def __init__(self, *args: Any, max_resamples: int = 4, overlong_cache: int = 0, **kwargs: Any) -> None:
        check_range(0, max_resamples=max_resamples, overlong_cache=overlong_cache)
        self.max_resamples, self.overlong_cache = max_resamples, overlong_cache
        super().__init__(*args, **kwargs)

    def collect(self) -> Rollout:
        # Yu et al. 2025, equation 11: a batch holds only groups with 0 < |{correct answers}| < G.
        kept, found, seen = [], 0, 0
        for _ in range(1 + self.max_resamples):
            rollout = super().collect()
            kept.append(rollout[self.informative(rollout)])
            found, seen = found + len(kept[-1]), seen + len(rollout)
            if self.stopped or found >= self.n_episodes:
                break
        self.logger.record("group/frac_informative", found / seen)
        if not found or self.max_resamples == 0:
            return rollout
        full = concatenate([part for part in kept if len(part)])
        full.group = torch.arange(len(full)) // self.group_size
        return full[torch.arange(min(len(full), self.n_episodes))]

    def informative(self, rollout: Rollout) -> Tensor:
        """Rows of the groups whose scores, before the KL and the length, are not all equal."""
        differs = ~self.equal_groups(rollout)
        return differs.repeat_interleave(self.group_size).nonzero().squeeze(1)

    def episode_scores(self, rollout: Rollout) -> Tensor:
        # Yu et al. 2025, equation 13: 0 up to L_max - L_cache, then falling to -1 at L_max.
        scores = super().episode_scores(rollout)
        if self.overlong_cache == 0:
            return scores
        # The longest seen where the environment does not tell how long an episode can be.
        penalty = overlong_penalty(longest_episode(self.envs) or rollout.mask.shape[1], self.overlong_cache)
        lengths = [range(n) for n in rollout.lengths.tolist()]
        return scores + scores.new_tensor(penalty(lengths, lengths))
