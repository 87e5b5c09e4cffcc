"""REINFORCE: the policy gradient with reward-to-go and a baseline (Williams 1992, Machine Learning 8, 229-256).

    grad E[R] = E[ sum_t grad log pi(a_t | s_t) (G_t - b(s_t)) ],  G_t = sum_k gamma^k r_{t+k}

Left out: importance ratios; every rollout is used for one step and thrown away.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.schedules import Schedule
from agents.base import Agent
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice


class REINFORCE(Agent):
    """``grad E[R] = E[sum_t grad log pi(a_t|s_t) (G_t - b(s_t))]``, one step for each batch of episodes.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        n_episodes: Episodes in each update; None is 64 on text and 16 elsewhere.
        baseline: "mean" (the mean return of the batch at that step), "learned" (a critic), or "none".
        normalize_advantage: Divide by the batch's standard deviation.
        gamma: Discount; None is 1 on text, 0.99 elsewhere.
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss of a learned baseline.
        max_grad_norm: Gradients are clipped to this norm.
        **kwargs: See :class:`~agents.base.Agent`.
    """

    whole_episodes: ClassVar[bool] = True
    takes_no: ClassVar[dict[str, str]] = {
        "n_steps": "it learns from whole episodes: n_episodes says how many",
    }

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        n_episodes: int | None = None,
        baseline: str = "mean",
        normalize_advantage: bool = False,
        gamma: float | None = None,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_choice("baseline", baseline, ("none", "mean", "learned"))
        self.baseline = baseline
        self.normalize_advantage = normalize_advantage
        self.uses_critic = baseline == "learned"
        super().__init__(
            policy,
            env,
            learning_rate,
            n_episodes=n_episodes,
            gamma=gamma,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            **kwargs,
        )

    def advantages(self, rollout: Rollout) -> Tensor:
        advantages = super().advantages(rollout)  # G_t, or G_t - V(s_t) with a learned baseline
        if self.baseline == "mean":
            advantages = (advantages - self._mean_of_others(advantages, rollout.mask)) * rollout.mask
        if self.normalize_advantage:
            advantages = maths.masked_whiten(advantages, rollout.mask)
        return advantages

    @staticmethod
    def _mean_of_others(returns: Tensor, mask: Tensor) -> Tensor:
        """The other episodes' mean return-to-go at the same step, ``[B, T]``: a baseline must not know its own.

        Where no other episode got that far, their mean over all steps.
        """
        mask = mask.to(returns.dtype)
        returns = returns * mask
        everywhere = (returns.sum() - returns.sum(1)) / (mask.sum() - mask.sum(1)).clamp(min=1)  # [B]
        others = mask.sum(0) - mask
        here = (returns.sum(0) - returns) / others.clamp(min=1)
        return torch.where(others > 0, here, everywhere[:, None])

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        # Williams 1992, as a loss whose gradient is minus the estimate: L_t = -log pi(a_t | s_t) (G_t - b(s_t)).
        policy_loss = -new.log_probs * batch.advantages
        losses = policy_loss - self.ent_coef * new.entropy
        metrics = {"policy_gradient_loss": policy_loss}
        if self.baseline == "learned":
            value_loss = maths.value_loss(new.values, batch.returns)
            losses = losses + self.vf_coef * value_loss
            metrics["value_loss"] = value_loss
        return losses, metrics
