"""CISPO: the importance weight is clipped, not the gradient (MiniMax-M1 2025, arXiv 2506.13585).

    maximise  1/(sum_i |o_i|) sum_i sum_t sg(clip(rho, 1 - eps_low, 1 + eps_high)) A_i log pi(o_t | x, o_<t)

where ``sg`` stops the gradient.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule, schedule_value
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout


class CISPO(GRPO):
    """``sg(clip(rho)) A log pi``: the weight is clipped, not the gradient (MiniMax-M1 2025, arXiv 2506.13585).

    So every token keeps its gradient, also beyond the clip. There is no lower bound unless ``clip_range`` is
    below 1.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        clip_range: Weights are at least ``1 - clip_range``.
        clip_range_high: Weights are at most ``1 + clip_range_high``.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    takes_no: ClassVar[dict[str, str]] = GRPO.takes_no | {"delta": "clip_range_high bounds its weights"}

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        clip_range: Schedule = 1.0,
        clip_range_high: float = 4.0,
        **kwargs: Any,
    ) -> None:
        clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
        super().__init__(policy, env, learning_rate, group_size, average="token", **clip, **kwargs)

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        # MiniMax 2025, equation 4: L_t = -sg(clip(rho_t, 1 - eps_low, 1 + eps_high)) A log pi(a_t | s_t).
        low = schedule_value(self.clip_range, self._progress_remaining)
        weight = ratio.detach().clamp(1 - low, 1 + self.clip_range_high)
        return -weight * batch.advantages * new.log_probs
