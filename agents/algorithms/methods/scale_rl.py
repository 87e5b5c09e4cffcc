"""ScaleRL: CISPO with a mean over prompts and batch-wide normalisation (Khatri et al. 2025, arXiv 2510.13786).

    maximise  1/P sum_x 1/(sum_g |y_g|) sum_i sum_t sg(min(rho, eps)) A_i / std(A) log pi(y_t | x, y_<t)
    with      A_i = r_i - mean(r), over the P prompts with  0 < mean(r) < 1

"The Art of Scaling Reinforcement Learning Compute for LLMs". ``rho`` is to what wrote the response, a generator too, so
no further weight corrects for it; ``std`` is over all answers of those prompts; prompts whose answers are all alike are
left out of every mean. Left out: no more answers to prompts that are passed nine times in ten, interrupting answers
that are too long, and generating while training (``generate_ahead`` does).
"""

from torch import Tensor

from agents.algorithms.methods.cispo import CISPO
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout


class ScaleRL(CISPO):
    """CISPO over the prompts whose answers differ, each counting alike (arXiv 2510.13786)."""

    fixed = {"scale": "batch", "average": "prompt"}
    takes_no = CISPO.takes_no | {"entropy_average": "its bonus is averaged over prompts, as the rest is"}

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
