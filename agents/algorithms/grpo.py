"""GRPO: group-relative policy optimisation, a critic-free PPO (Shao et al. 2024, DeepSeekMath)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.schedules import Schedule, schedule_value
from agents.base import Agent
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice


class GRPO(Agent):
    """Advantages relative to the other answers of a group, with PPO's clip and a KL to the reference.

    Works on every environment: the episodes of a group share their start (the env's start option, or the
    reset seed).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress.
        group_size: ``G``, episodes for each start state.
        n_episodes: Episodes in a rollout, a multiple of ``group_size``; None is 64 on text, else 16.
        batch_size: Episodes of a minibatch; None takes all.
        n_epochs: Passes over a rollout.
        clip_range: Lower clip ``eps``; a number, "linear:0.2", or a function of the remaining progress.
        clip_range_high: Upper clip, as in DAPO's clip-higher; None is ``clip_range``.
        scale: "std" divides by the group's standard deviation, "none" does not (Dr. GRPO), "leave-one-out"
            is RLOO's baseline.
        average: "sequence" (GRPO), "token" (DAPO) or "constant" (Dr. GRPO) mean of the loss.
        kl_in: "reward" (each token's KL is charged, as the env does) or "loss". Either way it is counted
            once, with the env's ``kl_coef``; an env without a reference has none.
        kl_loss_estimator: "k3" (as published) or "k2" (each token's own KL, unbiased), for ``kl_in="loss"``.
        ent_coef: Weight of the entropy bonus.
        max_grad_norm: Gradients are clipped to this norm.
        **kwargs: See :class:`~agents.base.Agent`.
    """

    whole_episodes: ClassVar[bool] = True

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule = 1e-3,
        group_size: int = 8,
        n_episodes: int | None = None,
        batch_size: int | None = None,
        n_epochs: int = 1,
        clip_range: Schedule = 0.2,
        clip_range_high: float | None = None,
        scale: str = "std",
        average: str = "sequence",
        kl_in: str = "reward",
        kl_loss_estimator: str = "k3",
        ent_coef: float = 0.0,
        max_grad_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_choice("scale", scale, ("std", "none", "leave-one-out"))
        check_choice("average", average, ("token", "sequence", "constant"))
        check_choice("kl_in", kl_in, ("reward", "loss"))
        check_choice("kl_loss_estimator", kl_loss_estimator, ("k2", "k3"))
        self.clip_range, self.clip_range_high = clip_range, clip_range_high
        self.scale, self.average = scale, average
        self.kl_in, self.kl_loss_estimator = kl_in, kl_loss_estimator
        super().__init__(
            policy,
            env,
            learning_rate,
            n_episodes=n_episodes,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=1.0,
            ent_coef=ent_coef,
            max_grad_norm=max_grad_norm,
            group_size=group_size,
            **kwargs,
        )

    def episode_scores(self, rollout: Rollout) -> Tensor:
        """What an episode is worth, ``[B]``: its undiscounted return, the KL taken out if the loss has it."""
        rewards = rollout.rewards
        if self.kl_in == "loss" and rollout.penalties is not None:
            rewards = rewards + rollout.penalties
        return (rewards * rollout.mask).sum(1)

    def advantages(self, rollout: Rollout) -> Tensor:
        scores = self.episode_scores(rollout)
        groups = scores.view(-1, self.group_size)
        std = groups.std(1) if self.group_size > 1 else groups.new_zeros(len(groups))
        self.logger.record("group/reward_std", float(std.mean()))
        self.logger.record("group/frac_zero_std", float((std < 1e-6).float().mean()))
        relative = maths.group_advantages(scores, self.group_size, self.scale)
        return relative[:, None] * rollout.mask

    def loss_weights(self, batch: Rollout) -> Tensor:
        return maths.loss_weights(batch.mask, self.average, getattr(self.text_env, "max_new_tokens", None))

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        """``pi / pi_old`` of each step, ``[b, T]``; override for one of whole sequences."""
        return (new.log_probs - batch.log_probs).exp()

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        """The surrogate of each step, ``[b, T]``; override for another than PPO's clip."""
        low = schedule_value(self.clip_range, self._progress_remaining)
        return maths.ppo_clip_loss(ratio, batch.advantages, low, self.clip_range_high)

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        low = schedule_value(self.clip_range, self._progress_remaining)
        ratio = self.importance_ratio(batch, new)
        policy_loss = self.policy_loss(batch, new, ratio)
        losses = policy_loss - self.ent_coef * new.entropy
        metrics = {
            "policy_gradient_loss": policy_loss,
            "approx_kl": maths.approx_kl(ratio),
            "clip_fraction": maths.clip_fraction(ratio, low, self.clip_range_high),
            "ratio": ratio,
        }
        if self.kl_in == "loss" and batch.ref_log_probs is not None and self.kl_coef:
            kl = maths.kl_loss(new.log_probs, batch.ref_log_probs, self.kl_loss_estimator)
            losses = losses + self.kl_coef * kl
            metrics["kl_loss"] = kl
        return losses, metrics

    def _log_training(self, rollout: Rollout, records: list[dict[str, float]], learning_rate: float) -> None:
        super()._log_training(rollout, records, learning_rate)
        self.logger.record("train/clip_range", schedule_value(self.clip_range, self._progress_remaining))
