"""PKPO: the gradient of pass@k, or of the best of k (Walder and Karkhanis 2025, arXiv 2505.15201).

    s_i = 1/C(G, k) sum over the sets I of k answers with i in I of (max_I r - max_{I without i} r),    A_i = G s_i

the paper's estimator with the ``k - 1`` others as the baseline: an answer is credited with what it adds to the best
of the sets that it is in. Its expectation is the gradient of ``E[max of k scores]``, which is pass@k where scores are 0
and 1, at any ``k <= G``; ``k = 1`` is RLOO. Differs from the paper: a KL that is charged in the reward is each answer's
own.
"""

from typing import Any

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_range


class PassAtK(GRPO):
    """Credit for what an answer adds to the best of ``k``; wrong answers get none (arXiv 2505.15201).

    Args:
        k: Of how many answers the best one counts, at most ``group_size``.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    fixed = {"scale": "leave-one-out", "average": "constant"}

    def __init__(self, *args: Any, k: int = 4, **kwargs: Any) -> None:
        check_range(1, k=k)
        self.k = k
        super().__init__(*args, **kwargs)
        if k > self.group_size:
            raise ValueError(f"k must be between 1 and group_size={self.group_size}, got {k}")

    def advantages(self, rollout: Rollout) -> Tensor:
        self.record_groups(rollout)
        scores, counted = self.raw_scores(rollout), self.scored_episodes(rollout)
        if self.k == 1:
            relative = maths.group_advantages(scores, self.group_size, "leave-one-out", counted)
        else:
            groups = scores.view(-1, self.group_size)
            relative = self.group_size * maths.best_of_k_gains(groups, self.k).view(-1)
            relative = relative if counted is None else relative * counted
        return (relative + self.kl_advantages(rollout))[:, None] * rollout.mask
