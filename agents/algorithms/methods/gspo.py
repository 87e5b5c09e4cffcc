"""GSPO: one length-normalised ratio for a whole response (Zheng et al. 2025, arXiv 2507.18071).

    maximise  1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
    with      s_i = (pi(y_i | x) / pi_old(y_i | x))^(1 / |y_i|)

Left out: GSPO-token, which is the same where all tokens of a response have one advantage.
"""

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class GSPO(GRPO):
    """One ratio for a response, length-normalised; so its clip range is far narrower than PPO's (arXiv 2507.18071)."""

    fixed = {"average": "sequence"}
    defaults = {"clip_range": 3e-4, "clip_range_high": 4e-4}

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        # Zheng et al. 2025, equation 7: s_i = exp(1/|y_i| sum_t log(pi(y_t) / pi_old(y_t))).
        log_ratio = (new.log_probs - batch.log_probs) * batch.mask
        mean = log_ratio.sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]
        return mean.exp().expand_as(log_ratio)
