"""MaxRL: towards the likelihood of a right answer, and not its probability (Tajwar et al. 2026, arXiv 2602.02710).

    log p(x) = -sum_k (1 - p)^k / k,    so    grad log p = sum_k 1/k grad pass@k
    A_i = (r_i - mean(r)) / mean(r) over the ``G`` answers to a prompt; 0 where none is right

With right or wrong as the score this is ``1/K sum over the K right answers of grad log pi``, less a term of mean 0. Its
expectation is ``sum_{k < G} 1/k grad pass@k``: a prompt that is rarely solved counts for up to ``1/p`` as much. Differs
from the paper: a KL that is charged in the reward is relative to the group and not divided.
"""

import torch
from torch import Tensor

from agents.algorithms.methods.dr_grpo import DrGRPO
from agents.rollouts.rollout import Rollout


class MaxRL(DrGRPO):
    """Scores relative to a group's mean and divided by it, so that hard prompts weigh more (arXiv 2602.02710).

    Raises:
        ValueError: At learning, if a score is negative: a mean of such scores says nothing of how hard a prompt is.
    """

    def advantages(self, rollout: Rollout) -> Tensor:
        self.record_groups(rollout)
        scores = self.raw_scores(rollout).view(-1, self.group_size)
        if (scores < 0).any():
            raise ValueError(
                f"MaxRL wants scores of at least 0, such as 1 for a right answer and 0 for a wrong one; the least of "
                f"this rollout is {float(scores.min()):g}"
            )
        # Tajwar et al. 2026: divided by the mean, which estimates the pass rate.
        mean = scores.mean(1, keepdim=True)
        relative = torch.where(mean > 0, (scores - mean) / mean, 0.0).view(-1)
        return (relative + self.kl_advantages(rollout))[:, None] * rollout.mask
