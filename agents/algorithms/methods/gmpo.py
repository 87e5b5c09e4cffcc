"""GMPO: the geometric mean of a response's clipped ratios (Zhao et al. 2025, arXiv 2507.20673).

    maximise  1/G sum_i s_i A_i
    with      s_i = exp( 1/|o_i| sum_t sign(A_i) min(sign(A_i) log rho_t, sign(A_i) clip(log rho_t, -eps, eps)) )

"Geometric-Mean Policy Optimization". A mean of logarithms is moved less by one outlier than a mean of ratios, so the
clip, of each token and in the logarithm, may be wider.
"""

import torch
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import schedule_value
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class GMPO(GRPO):
    """One ratio for a response, the geometric mean of its clipped ones (arXiv 2507.20673).

    Args:
        clip_range: Lower clip of a log-ratio; a number, "linear:0.4", or a function of the remaining progress.
        clip_range_high: Upper clip of a log-ratio; None is ``clip_range``.
    """

    fixed = {"average": "sequence"}
    defaults = {"clip_range": 0.4}
    takes_no = GRPO.takes_no | {"delta": "its clip is of logarithms"}

    def _bounds(self) -> tuple[float, float]:
        low = schedule_value(self.clip_range, self._progress_remaining)
        return low, low if self.clip_range_high is None else self.clip_range_high

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        low, high = self._bounds()
        log_ratio = new.log_probs - batch.log_probs
        # Only what would lead further away is clipped: up where A > 0, down where A < 0.
        kept = torch.where(batch.advantages > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
        return maths.mean_over_steps(kept, self.counted(batch)).exp()

    def clipped(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        low, high = self._bounds()
        log_ratio = new.log_probs - batch.log_probs
        return torch.where(batch.advantages > 0, log_ratio > high, log_ratio < -low)

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        if batch.kept is None:
            return -ratio * batch.advantages
        # One term for a response, shared by the steps that count.
        counted = self.counted(batch).sum(1, keepdim=True).clamp(min=1)
        return -ratio * batch.advantages * (batch.lengths[:, None] / counted)
