"""GiGPO: GRPO with credit for single turns, from groups of turns that answer the same state.

    A(a) = A_E + w A_S,    A_E = (R - mean R) / F over the G episodes of a start,
                           A_S = (R_k - mean R_k) / F over all turns of the group that answer the state s_k

with ``R = sum_k r_k`` and ``R_k = sum_{j >= k} gamma^(j - k) r_j`` over turns, ``F`` the standard deviation or 1 (Feng
et al. 2025, arXiv 2505.10978, section 4 and equation 8). Every token of a turn gets the turn's advantage. A state that
was answered once teaches nothing of its turn. Left out: states that are merely alike.
"""

from typing import Any

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_range


class GiGPO(GRPO):
    """GRPO's advantage of the episode plus that of the turn among turns that answer the same state.

    A state is what the game showed before the turn (``TextGame-v0``); where an environment has no turns, or none of its
    states comes twice, this is GRPO.

    Args:
        turn_weight: ``w`` of the turn's advantage.
        gamma_turn: Discount of a turn's return, from turn to turn.
        *args, **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    defaults = {"gamma_turn": 0.95}
    takes_no = GRPO.takes_no | GRPO.of_divergences(
        "each turn is credited with the KL that the environment charges after it"
    )

    def __init__(self, *args: Any, turn_weight: float = 1.0, **kwargs: Any) -> None:
        check_range(0, turn_weight=turn_weight)
        self.turn_weight = turn_weight
        super().__init__(*args, **kwargs)

    def discounts(self, rollout: Rollout) -> float:
        # The episode's return is a plain sum; gamma_turn is of the turns' own.
        return self.gamma

    def advantages(self, rollout: Rollout) -> Tensor:
        advantages = super().advantages(rollout)
        if rollout.turn is None or self.turn_weight == 0.0:
            return advantages
        rewards = rollout.rewards
        if self.kl_in == "loss" and rollout.penalties is not None:
            rewards = rewards + rollout.penalties
        relative, shared = maths.turn_advantages(
            rewards, rollout.mask, rollout.turn, rollout.state, rollout.group, self.gamma_turn, self.scale
        )
        self.logger.record("group/shared_turns", shared)
        return advantages + self.turn_weight * relative.to(advantages.dtype)
