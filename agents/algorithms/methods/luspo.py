"""LUSPO: GSPO with the loss of a response times its length (Liu et al. 2026, arXiv 2602.05261).

    maximise  1/G sum_i |y_i| min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i)
    with      s_i = (pi(y_i | x) / pi_old(y_i | x))^(1 / |y_i|)

"Length-Unbiased Sequence Policy Optimization". GSPO's ``1 / |y|`` in the exponent makes a token of a long response
count for less, which teaches to be brief; the length takes it out again.
"""

from __future__ import annotations

from typing import Any

from agents.algorithms.methods.gspo import GSPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Policy


class LUSPO(GSPO):
    """GSPO without its bias to short responses (Liu et al. 2026, arXiv 2602.05261).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        **kwargs: See :class:`~agents.algorithms.methods.gspo.GSPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, group_size, **kwargs)
        self.average = "sum"
