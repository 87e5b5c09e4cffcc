"""CISPO: the importance weight is clipped, not the gradient (MiniMax-M1 2025, arXiv 2506.13585).

    maximise  1/(sum_i |o_i|) sum_i sum_t sg(clip(rho, 1 - eps_low, 1 + eps_high)) A_i log pi(o_t | x, o_<t)

where ``sg`` stops the gradient.
"""

from torch import Tensor

from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import schedule_value
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class CISPO(GRPO):
    """``sg(clip(rho)) A log pi``, so that every token keeps its gradient, also beyond it (arXiv 2506.13585).

    There is no lower bound unless ``clip_range`` is below 1.
    """

    fixed = {"average": "token"}
    defaults = {"clip_range": 1.0, "clip_range_high": 4.0}
    takes_no = GRPO.takes_no | {"delta": "clip_range_high bounds its weights"}

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        # MiniMax 2025, equation 4: L_t = -sg(clip(rho_t, 1 - eps_low, 1 + eps_high)) A log pi(a_t | s_t).
        low = schedule_value(self.clip_range, self._progress_remaining)
        weight = ratio.detach().clamp(1 - low, 1 + self.clip_range_high)
        return -weight * batch.advantages * new.log_probs
