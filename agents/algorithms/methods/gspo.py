"""GSPO: one length-normalised ratio for a whole response (Zheng et al. 2025, arXiv 2507.18071).

    maximise  1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
    with      s_i = (pi(y_i | x) / pi_old(y_i | x))^(1 / |y_i|)

Left out: GSPO-token, which is the same where all tokens of a response have one advantage.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout


class GSPO(GRPO):
    """One ratio for a response: ``(pi(y|x) / pi_old(y|x)) ** (1 / |y|)`` (Zheng et al. 2025, arXiv 2507.18071).

    The clip range is of that length-normalised ratio, hence far narrower than PPO's.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        clip_range: Lower clip; a number, "linear:3e-4", or a function of the remaining progress.
        clip_range_high: Upper clip.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        clip_range: Schedule = 3e-4,
        clip_range_high: float = 4e-4,
        **kwargs: Any,
    ) -> None:
        clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
        super().__init__(policy, env, learning_rate, group_size, average="sequence", **clip, **kwargs)

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        # Zheng et al. 2025, equation 7: s_i = exp(1/|y_i| sum_t log(pi(y_t) / pi_old(y_t))).
        log_ratio = (new.log_probs - batch.log_probs) * batch.mask
        mean = log_ratio.sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]
        return mean.exp().expand_as(log_ratio)
