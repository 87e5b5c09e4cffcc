"""VAPO: PPO for long answers that are right or wrong (Yue et al. 2025, arXiv 2504.05118).

    minimise  L_PPO with clip-higher, a mean over tokens and A_t at lambda_i = 1 - 1/(alpha l_i)
              + mu * mean over the tokens of right answers of -log pi(a_t | s_t)

``l_i`` is the length of the answer: ``1/(1 - lambda)`` is how many of the following errors of the critic an advantage
adds up, a share ``alpha`` of the answer at any length (0 where that is less than one token). The critic learns the
return, lambda 1, and alone at first. The second term imitates answers whose score is above ``right_above``. Left out:
the paper's batches of 512 prompts. The defaults, 50 rollouts for the critic and ``mu = 0.1`` among them, are those that
two accounts of the paper's experiments give.
"""

from typing import Any

from torch import Tensor

from agents.algorithms.methods.vc_ppo import VCPPO
from agents.algorithms.schedules import check_numbers
from agents.policies.base import Evaluation
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_finite


class VAPO(VCPPO):
    """PPO with a lambda for each length, clip-higher, and the likelihood of right answers (arXiv 2504.05118).

    Args:
        alpha: Of the length-adaptive lambda.
        lm_coef: ``mu``, weight of the likelihood of right answers; 0 is none.
        right_above: An answer is right if its score, before the KL, is above this.
        *args, **kwargs: See :class:`~agents.algorithms.methods.vc_ppo.VCPPO`.
    """

    whole_episodes = True
    #: Which answer a step belongs to says whether it is imitated.
    flatten = False
    defaults = {"group_size": 16, "clip_range_high": 0.28}
    takes_no = {
        "gae_lambda": "it follows from alpha and the length of an episode",
        "n_steps": "it learns from whole episodes: n_episodes says how many",
    }

    def __init__(
        self, *args: Any, alpha: float = 0.05, lm_coef: float = 0.1, right_above: float = 0.0, **kwargs: Any
    ) -> None:
        check_numbers(positive=True, alpha=alpha)
        check_numbers(lm_coef=lm_coef)
        check_finite(right_above=right_above)
        self.alpha, self.lm_coef, self.right_above = alpha, lm_coef, right_above
        self._steps_to_right = 1.0
        super().__init__(*args, **kwargs)

    def advantages(self, rollout: Rollout) -> Tensor:
        # Yue et al. 2025: sum_t lambda^t = 1 / (1 - lambda) = alpha l.
        lambdas = (1 - 1 / (self.alpha * rollout.lengths.double().clamp(min=1))).clamp(min=0.0)
        return self.estimate_advantages(rollout, lambdas[:, None].numpy())

    def value_targets(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        return self.estimate_advantages(rollout, self.critic_gae_lambda) + rollout.values

    def right_steps(self, batch: Rollout) -> Tensor:
        """Steps of answers that were right, bool ``[b, T]``."""
        penalties = 0.0 if batch.penalties is None else batch.penalties
        scores = ((batch.rewards + penalties) * batch.mask).sum(1, keepdim=True)
        return (scores > self.right_above) & batch.mask

    def loss_weights(self, batch: Rollout) -> Tensor:
        # A mean over the tokens of right answers, as a mean over all of them; known of the whole minibatch only.
        self._steps_to_right = batch.mask.sum() / self.right_steps(batch).sum().clamp(min=1)
        return super().loss_weights(batch)

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        losses, metrics = super().loss(batch, new)
        imitation = -new.log_probs * self.right_steps(batch) * self._steps_to_right
        return losses + self.lm_coef * imitation, metrics | {"lm_loss": imitation}
