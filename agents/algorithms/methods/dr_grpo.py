"""Dr. GRPO: GRPO done right, without its two biases (Liu et al. 2025, arXiv 2503.20783).

    maximise  1/(G L) sum_i sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i),   A_i = r_i - mean(r)

with ``L`` the budget of a response, the same for all.
"""

from __future__ import annotations

from typing import Any

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Policy


class DrGRPO(GRPO):
    """GRPO without its two biases: no division by the group's std nor by a response's own length.

    Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv 2503.20783).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, group_size, scale="none", average="constant", **kwargs)
