"""RAFT: supervised learning from the best of n answers of one's own (Dong et al. 2023, arXiv 2304.06767).

    minimise  -1/N sum_t log pi(y_t | x, y_<t)    over the answers  y = argmax_i r(x, y_i),  i = 1 ... n

"Reward rAnked FineTuning": sample, rank, imitate the best, again. Where answers are right or wrong, ``min_score``
leaves out the best of those that are all wrong.
"""

from typing import Any

import torch
from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_finite


class RAFT(GRPO):
    """``-log pi`` of the best answer of each group, and of no other (arXiv 2304.06767).

    Answers of the same score count in the order that they were written. The KL of the environment is part of a score:
    make it with ``kl_coef=0`` to rank by the reward alone.

    Args:
        min_score: The least reward of an answer that is imitated, before any KL; None has no bound.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    fixed = {"scale": "none", "average": "token"}
    takes_no = (
        GRPO.takes_no
        | GRPO.of_the_clip("it has no ratio to clip")
        | {"off_policy_mask_threshold": "it learns from no bad answers"}
    )

    def __init__(self, *args: Any, min_score: float | None = None, **kwargs: Any) -> None:
        check_finite(min_score=min_score)
        self.min_score = min_score
        super().__init__(*args, **kwargs)

    def advantages(self, rollout: Rollout) -> Tensor:
        self.record_groups(rollout)
        scores, raw = self.episode_scores(rollout), self.scores_before_kl(rollout)
        if rollout.scored is not None:
            scores = scores.masked_fill(~rollout.scored.any(1), -torch.inf)
        best = scores.view(-1, self.group_size).argmax(1, keepdim=True)
        chosen = torch.zeros(len(scores) // self.group_size, self.group_size, dtype=torch.bool)
        chosen = chosen.scatter(1, best, True).view(-1) & scores.isfinite()
        if self.min_score is not None:
            chosen &= raw >= self.min_score
        self.logger.record("group/best_score", float(raw[chosen].mean()) if chosen.any() else float("nan"))
        self.logger.record("group/imitated", float(chosen.float().mean()) * self.group_size)
        return chosen[:, None] * rollout.mask.double()

    def leave_out(self, rollout: Rollout) -> Rollout:
        rollout = super().leave_out(rollout)
        rows = rollout.advantages.any(1).nonzero().squeeze(1)
        # Without any, all of them stay: their losses are 0.
        return rollout[rows] if 0 < len(rows) < len(rollout) else rollout

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        return -batch.advantages * new.log_probs
