"""PKPO: the gradient of pass@k, or of the best of k (Walder and Karkhanis 2025, arXiv 2505.15201).

    s_i = 1/C(G, k) sum over the sets I of k answers with i in I of (max_I r - max_{I without i} r),    A_i = G s_i

the paper's estimator with the ``k - 1`` others as the baseline: an answer is credited with what it adds to the best
of the sets that it is in. Its expectation is the gradient of ``E[max of k scores]``, which is pass@k where scores are 0
and 1, at any ``k <= G``; ``k = 1`` is RLOO. Differs from the paper: a KL that is charged in the reward is each answer's
own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Policy
from agents.rollouts.rollout import Rollout


class PassAtK(GRPO):
    """Credit for what an answer adds to the best of ``k``; wrong answers get none.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        k: Of how many answers the best one counts, at most ``group_size``.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        k: int = 4,
        **kwargs: Any,
    ) -> None:
        if not 1 <= k <= group_size:
            raise ValueError(f"k must be between 1 and group_size={group_size}, got {k}")
        self.k = k
        fixed = {"scale": "leave-one-out", "average": "constant"}
        super().__init__(policy, env, learning_rate, group_size, **fixed, **kwargs)

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
