"""Dr. GRPO: GRPO done right, without its two biases (Liu et al. 2025, arXiv 2503.20783).

    maximise  1/(G L) sum_i sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i),   A_i = r_i - mean(r)

with ``L`` the budget of a response, the same for all.
"""

from agents.algorithms.grpo import GRPO


class DrGRPO(GRPO):
    """GRPO that divides neither by the group's standard deviation nor by a response's length (arXiv 2503.20783)."""

    fixed = {"scale": "none", "average": "constant"}
