"""ScaleRL: CISPO with a mean over prompts and batch-wide normalisation (Khatri et al. 2025, arXiv 2510.13786).

    maximise  1/P sum_x 1/(sum_g |y_g|) sum_i sum_t sg(min(rho, eps)) A_i / std(A) log pi(y_t | x, y_<t)
    with      A_i = r_i - mean(r), over the P prompts with  0 < mean(r) < 1

"The Art of Scaling Reinforcement Learning Compute for LLMs". ``rho`` is to what wrote the response; ``std`` is over all
answers of those prompts; prompts whose answers are all alike are left out of every mean. Left out: no more answers to
prompts that are passed nine times in ten, interrupting answers that are too long, and generating while training
(``generate_ahead`` does).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from agents.algorithms.methods.cispo import CISPO
from agents.algorithms.schedules import Schedule
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout


class ScaleRL(CISPO):
    """CISPO over the prompts whose answers differ, each counting alike (Khatri et al. 2025, arXiv 2510.13786).

    Where an outside generator wrote the responses, the ratio is to what it reported, and no further weight corrects for
    it.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        **kwargs: See :class:`~agents.algorithms.methods.cispo.CISPO`.
    """

    takes_no: ClassVar[dict[str, str]] = CISPO.takes_no | {
        "entropy_average": "its bonus is averaged over prompts, as the rest is"
    }

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, group_size, scale="batch", **kwargs)
        self.average = "prompt"

    def prepare_rollout(self, rollout: Rollout) -> Rollout:
        differ = ~self.equal_groups(rollout)
        share = float(differ.double().mean())
        if 0 < share < 1:  # where none differs no gradient is left, and nothing has to be taken out
            rollout = rollout[differ.repeat_interleave(self.group_size).nonzero().squeeze(1)]
        rollout = super().prepare_rollout(rollout)
        self.logger.record("group/frac_zero_std", 1 - share)
        return rollout

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        return (new.log_probs - self.behaviour(batch)).exp()

    def step_weights(self, batch: Rollout) -> Tensor:
        return self.loss_weights(batch)  # the ratio is to the generator already
