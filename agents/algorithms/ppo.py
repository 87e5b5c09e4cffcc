"""PPO: proximal policy optimisation with a clipped surrogate and a critic (Schulman et al. 2017, arXiv 1707.06347).

    minimise  E_t[ -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) + c1 (V(s_t) - R_t)^2 - c2 H(pi(. | s_t)) ]
    with      rho_t = pi(a_t | s_t) / pi_old(a_t | s_t), A_t the generalised advantage estimate, R_t = A_t + V_old(s_t)

On text the KL to the reference is in the reward (Ziegler et al. 2019), which the environment charges. Left out: the
paper's variant with a KL penalty in place of the clip.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.schedules import Schedule, ScheduleFunction, check_schedule, schedule_value
from agents.base import Agent
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout
from reward_models.warning import warn
from textrl_env.errors import ArgumentError, check_range


class PPO(Agent):
    """Clipped surrogate ``min(rho A, clip(rho, 1 - eps, 1 + eps) A)``, value loss and entropy bonus.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        n_steps: Steps of each slot in a rollout.
        batch_size: Rows of a minibatch: steps, on text episodes.
        n_epochs: Passes over a rollout; None is 4 on text, where rollouts are small, and 10 elsewhere.
        gamma: Discount; None is 1 on text, 0.99 elsewhere.
        gae_lambda: Of the generalised advantage estimate.
        clip_range: ``eps``; a number, "linear:0.2", or a function of the remaining progress.
        clip_range_high: Upper clip, as in DAPO's clip-higher; None is ``clip_range``.
        clip_range_vf: Clips the change of the values too; None does not.
        normalize_advantage: Whiten advantages in each minibatch.
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss.
        max_grad_norm: Gradients are clipped to this norm.
        target_kl: Stop a rollout's passes when the approximate KL of the update exceeds 1.5 times this.
        n_episodes: Episodes in a rollout, on text (64) or to learn from whole episodes elsewhere.
        critic: "separate" (the default of MLPs), "shared", or "head" (the default of language models: reads the
            policy's hidden states without shaping them), or None (advantages are then the rewards to go).
        critic_gae_lambda: Lambda of what the critic learns, apart from that of the advantages: with 1 it learns from
            whole returns and not from its own guesses (VAPO, arXiv 2504.05118); None is ``gae_lambda``.
        critic_warmup: First rollouts that only the critic learns from.
        **kwargs: See :class:`~agents.base.Agent`.
    """

    flatten: ClassVar[bool] = True
    uses_critic: ClassVar[bool] = True

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        n_steps: int = 2048,
        batch_size: int | None = 64,
        n_epochs: int | None = None,
        gamma: float | None = None,
        gae_lambda: float = 0.95,
        clip_range: Schedule = 0.2,
        clip_range_vf: Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        n_episodes: int | None = None,
        critic: str | None = "default",
        critic_gae_lambda: float | None = None,
        critic_warmup: int | None = None,
        clip_range_high: float | None = None,
        **kwargs: Any,
    ) -> None:
        check_schedule("clip_range", clip_range, positive=True)
        check_schedule("clip_range_high", clip_range_high, positive=True)
        check_schedule("clip_range_vf", clip_range_vf, positive=True)
        check_schedule("target_kl", target_kl, positive=True)
        check_range(0, 1, critic_gae_lambda=critic_gae_lambda)
        check_range(0, critic_warmup=critic_warmup)
        self.critic_gae_lambda, self.critic_warmup = critic_gae_lambda, critic_warmup
        self.clip_range_high = clip_range_high
        # Functions, as stable-baselines3 keeps them; a number that is set later is one too.
        self.clip_range = ScheduleFunction(clip_range)
        self.clip_range_vf = None if clip_range_vf is None else ScheduleFunction(clip_range_vf)
        self.normalize_advantage = normalize_advantage
        self.target_kl = target_kl
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps=n_steps,
            n_episodes=n_episodes,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            critic=critic,
            **kwargs,
        )

    def set_up_policy(self, spaces: Any = None) -> None:
        super().set_up_policy(spaces)
        self._check_rows()

    def _check_rows(self) -> None:
        """Raise an ArgumentError for minibatches of a single step, whose advantage cannot be normalised."""
        if not self.normalize_advantage or self.collects_episodes or self.envs is None:
            return
        rows = self.n_steps * self.num_envs
        for name, count in (("n_steps * n_envs", rows), ("batch_size", self.batch_size)):
            if count == 1:
                raise ArgumentError(
                    f"{name} = 1 leaves a single step to normalise advantages over; take more, or "
                    "normalize_advantage=False"
                )
        if self.batch_size is not None and rows % self.batch_size == 1 and rows > 1:
            warn(
                f"n_steps * n_envs = {rows} in minibatches of batch_size={self.batch_size}: there will be a truncated "
                "mini-batch of size 1, whose advantage cannot be normalised and counts as 0; take another batch_size"
            )

    @property
    def warming_up(self) -> bool:
        """Whether the policy still waits for its critic."""
        return self.policy.has_critic and self.n_updates < self.critic_warmup * self.n_epochs

    def value_targets(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        if self.critic_gae_lambda in (None, self.gae_lambda) or not self.policy.has_critic:
            return super().value_targets(rollout, advantages)
        return self.estimate_advantages(rollout, self.critic_gae_lambda) + rollout.values

    def prepare_batch(self, batch: Rollout) -> Rollout:
        # In each minibatch, as stable-baselines3 does; the paper does not normalise.
        if self.normalize_advantage:
            batch.advantages = maths.masked_whiten(batch.advantages, batch.mask)
        return batch

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        # Schulman et al. 2017, equation 9 with its sign turned.
        #   L_t = -min(rho A, clip(rho, 1 - eps, 1 + eps) A) + c1 (V - R)^2 - c2 H
        clip = schedule_value(self.clip_range, self._progress_remaining)
        ratio = (new.log_probs - batch.log_probs).exp()
        now = ratio.detach()
        policy_loss = maths.ppo_clip_loss(ratio, batch.advantages, clip, self.clip_range_high)
        clip_vf = self.clip_range_vf
        clip_vf = None if clip_vf is None else schedule_value(clip_vf, self._progress_remaining)
        losses = policy_loss
        metrics = {
            "policy_gradient_loss": policy_loss,
            "approx_kl": maths.approx_kl(now),
            "clip_fraction": maths.clip_fraction(now, clip, self.clip_range_high),
            "ratio": now,
        }
        if new.values is not None:
            value_loss = maths.value_loss(new.values, batch.returns, batch.values, clip_vf)
            losses = losses + self.vf_coef * value_loss
            metrics["value_loss"] = value_loss
            metrics["value_clip_fraction"] = maths.value_clip_fraction(new.values, batch.values, clip_vf)
        if self.ent_coef:
            losses = losses - self.ent_coef * new.entropy
        return losses, metrics

    def before_step(self) -> None:
        if self.warming_up:  # also where the values shape the body that they share
            critic = {id(parameter) for parameter in self.policy.critic_parameters()}
            for parameter in self.policy.parameters():
                if id(parameter) not in critic:
                    parameter.grad = None

    def should_stop(self, record: dict[str, float]) -> bool:
        # 1.5 as in OpenAI's Spinning Up and stable-baselines3: the estimate is noisy.
        return self.target_kl is not None and record["approx_kl"] > 1.5 * self.target_kl

    def _log_training(self, rollout: Rollout, records: list[dict[str, float]], learning_rate: float) -> None:
        super()._log_training(rollout, records, learning_rate)
        self.logger.record("train/clip_range", schedule_value(self.clip_range, self._progress_remaining))
