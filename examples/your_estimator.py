"""An estimator in eight lines, and how biased and noisy it is.

    textrl gradients --agent examples/your_estimator.py:AboveMean

It learns from the answers that are better than their group's mean and forgets the others, as imitating the best does.
``examples/your_estimator.ipynb`` walks through it. Left out: everything else, which ``GRPO`` does.
"""

from __future__ import annotations

from agents import GRPO


class AboveMean(GRPO):
    """Scores less the mean of their group, where that is positive."""

    def advantages(self, rollout):
        groups = self.episode_scores(rollout).view(-1, self.group_size)
        above = (groups - groups.mean(1, keepdim=True)).clamp(min=0)
        return above.view(-1, 1) * rollout.mask

    def loss_weights(self, batch):
        return batch.mask / (len(batch) * batch.mask.shape[1])
