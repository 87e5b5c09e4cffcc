"""GRPO: group-relative policy optimisation, PPO without a critic (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300).

    maximise  1/G sum_i 1/|o_i| sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL(pi || pi_ref)
    with      A_i = (r_i - mean(r)) / std(r) over the ``G`` answers to one prompt

Differs from the paper by default: the KL is charged in the reward, as the environment does it (``kl_in="loss"`` is the
paper's). Left out: process rewards, and replacing the reference in the course of a run. The whole method in one file
of plain torch is ``examples/grpo_from_scratch.py``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import logger
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.schedules import Schedule, check_schedule, schedule_value
from agents.base import Agent
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout
from agents.rollouts.vector_envs import longest_episode
from textrl_env.errors import check_choice


class GRPO(Agent):
    """Advantages relative to the other answers of a group, with PPO's clip and a KL to the reference.

    Works on every environment: the episodes of a group share their start (the env's start option, or the
    reset seed).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        n_episodes: Episodes in a rollout, a multiple of ``group_size``; None is 64 on text, else 16.
        batch_size: Episodes of a minibatch; None takes all.
        n_epochs: Passes over a rollout; None is 1.
        clip_range: Lower clip ``eps``; a number, "linear:0.2", or a function of the remaining progress.
        clip_range_high: Upper clip, as in DAPO's clip-higher; None is ``clip_range``.
        scale: "std" divides by the group's standard deviation, "none" does not (Dr. GRPO), "leave-one-out"
            is RLOO's baseline.
        average: "sequence" (GRPO), "token" (DAPO) or "constant" (Dr. GRPO) mean of the loss.
        kl_in: "reward" (each token's KL is charged, as the env does) or "loss". Either way it is counted
            once, with the env's ``kl_coef``; an env without a reference has none.
        kl_loss_estimator: "k3" (as published), "k3-corrected" (k3 times the importance ratio, TRL's default) or "k2";
            for ``kl_in="loss"``. The gradients of the last two are each token's own KL's, k3's is biased.
        gamma: Discount of the rewards in an episode's return; the papers have none, so 1.
        ent_coef: Weight of the entropy bonus.
        entropy_average: "loss" averages the bonus as ``average`` does the rest; "token" over all tokens of the batch,
            as TRL does whatever its loss (Dr. GRPO's then differs).
        max_grad_norm: Gradients are clipped to this norm.
        **kwargs: See :class:`~agents.base.Agent`.
    """

    whole_episodes: ClassVar[bool] = True
    takes_no: ClassVar[dict[str, str]] = {
        "critic": "the other answers of a group are its baseline",
        "gae_lambda": "it has no critic to mix with the return",
        "vf_coef": "it has no critic",
        "n_steps": "it learns from whole episodes: n_episodes says how many",
    }
    #: Groups stay whole; what no reward applied to has an advantage of 0, as in TRL.
    keeps_unscored: ClassVar[bool] = True
    _told = False

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        n_episodes: int | None = None,
        batch_size: int | None = None,
        n_epochs: int | None = None,
        clip_range: Schedule = 0.2,
        clip_range_high: float | None = None,
        scale: str = "std",
        average: str = "sequence",
        kl_in: str = "reward",
        kl_loss_estimator: str = "k3",
        gamma: float = 1.0,
        ent_coef: float = 0.0,
        entropy_average: str = "loss",
        max_grad_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        check_choice("scale", scale, ("std", "none", "leave-one-out"))
        check_choice("average", average, ("token", "sequence", "constant"))
        check_choice("kl_in", kl_in, ("reward", "loss"))
        check_choice("kl_loss_estimator", kl_loss_estimator, ("k2", "k3", "k3-corrected"))
        check_choice("entropy_average", entropy_average, ("loss", "token"))
        check_schedule("clip_range", clip_range, positive=True)
        check_schedule("clip_range_high", clip_range_high, positive=True)
        self.clip_range, self.clip_range_high = clip_range, clip_range_high
        self.scale, self.average = scale, average
        self.kl_in, self.kl_loss_estimator = kl_in, kl_loss_estimator
        self.entropy_average = entropy_average
        self._batch_size = 1, torch.ones(())  # episodes and steps of the whole minibatch
        super().__init__(
            policy,
            env,
            learning_rate,
            n_episodes=n_episodes,
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            ent_coef=ent_coef,
            max_grad_norm=max_grad_norm,
            group_size=group_size,
            **kwargs,
        )

    def episode_scores(self, rollout: Rollout) -> Tensor:
        """What an episode is worth, ``[B]``: its return, the KL taken out if the loss has it."""
        # The env has charged the KL; counted in the loss it must not be in the reward too.
        if self.kl_in == "loss":
            return self.scores_before_kl(rollout)
        return self._sum(rollout.rewards, rollout)

    def scores_before_kl(self, rollout: Rollout) -> Tensor:
        """What the reward alone gave to each episode, ``[B]``."""
        penalties = 0.0 if rollout.penalties is None else rollout.penalties
        return self._sum(rollout.rewards + penalties, rollout)

    def _sum(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Discounted sums ``[B]`` of what the steps ``[B, T]`` gave."""
        discounts = self.discounts(rollout)
        if isinstance(discounts, np.ndarray):
            before = np.concatenate([np.ones_like(discounts[:, :1]), discounts[:, :-1]], axis=1)
            rewards = rewards * torch.from_numpy(before.cumprod(1)).to(rewards.dtype)
        elif self.gamma != 1.0:
            step = rollout.mask.cumsum(1) - 1  # steps outside the mask do not discount
            rewards = rewards * self.gamma ** step.clamp(min=0)
        return (rewards * rollout.mask).sum(1)

    def equal_groups(self, rollout: Rollout) -> Tensor:
        """Groups in which the reward tells no answer from another, bool ``[B / group_size]``."""
        penalties = 0.0 if rollout.penalties is None else rollout.penalties.abs()
        magnitude = self._sum(rollout.rewards.abs() + penalties, rollout).view(-1, self.group_size)
        groups = self._fill_unscored(self.scores_before_kl(rollout), rollout).view(-1, self.group_size)
        return maths.all_equal(groups, magnitude=magnitude)

    def _fill_unscored(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Scores ``[B]`` with the mean of their group for episodes to which no reward applied."""
        if rollout.scored is None:
            return scores
        counted = rollout.scored.any(1).view(-1, self.group_size)
        return maths.fill_with_group_mean(scores.view(-1, self.group_size), counted).view(-1)

    def advantages(self, rollout: Rollout) -> Tensor:
        raw = self._fill_unscored(self.scores_before_kl(rollout), rollout)
        equal = self.equal_groups(rollout)  # [B / G]
        std = raw.view(-1, self.group_size).std(1) if self.group_size > 1 else torch.zeros(len(raw))
        self.logger.record("group/reward_std", float(std.mean()))
        self.logger.record("group/frac_zero_std", float(equal.float().mean()))
        scores = self.episode_scores(rollout)
        counted = None if rollout.scored is None else rollout.scored.any(1)
        relative = maths.group_advantages(scores, self.group_size, self.scale, counted)
        if self.scale == "std" and equal.any():
            # Such a group differs by its KL alone. Divided by the deviation of that, the KL would weigh as much as
            # right and wrong do in other groups, whatever its coefficient; so there it keeps its own size.
            undivided = maths.group_advantages(scores, self.group_size, "none", counted)
            relative = torch.where(equal.repeat_interleave(self.group_size), undivided, relative)
        return relative[:, None] * rollout.mask

    def loss_weights(self, batch: Rollout) -> Tensor:
        self._batch_size = len(batch), batch.mask.sum()  # not read here, or a GPU would be waited for
        return maths.loss_weights(batch.mask, self.average, self._constant_length(batch))

    def _constant_length(self, batch: Rollout) -> int | None:
        """What Dr. GRPO divides by, the most steps that an episode can have; None where it is not asked for."""
        if self.average != "constant":
            return None
        budget = longest_episode(self.envs)
        if budget is None and not self._told:
            self._told = True
            logger.warn(
                f'{type(self).__name__} averages over a constant length (average="constant"), but {self.envs} has no '
                "limit on the length of an episode: each minibatch is divided by its own longest episode. Wrap the "
                "env in gymnasium.wrappers.TimeLimit, or make it with max_episode_steps"
            )
        return budget

    def _entropy_bonus(self, batch: Rollout, entropy: Tensor) -> Tensor:
        """The bonus of each step, ``[b, T]``, scaled so that :meth:`loss_weights` average it as was asked."""
        if self.entropy_average == "loss" or self.average == "token":
            return self.ent_coef * entropy
        episodes, steps = self._batch_size
        if self.average == "sequence":
            length = batch.lengths[:, None]
        else:
            length = self._constant_length(batch) or batch.mask.shape[1]
        return self.ent_coef * entropy * (episodes * length / steps.clamp(min=1))

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        """``pi / pi_old`` of each step, ``[b, T]``; override for one of whole sequences."""
        return (new.log_probs - batch.log_probs).exp()

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        """The surrogate of each step, ``[b, T]``; override for another than PPO's clip."""
        low = schedule_value(self.clip_range, self._progress_remaining)
        return maths.ppo_clip_loss(ratio, batch.advantages, low, self.clip_range_high)

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        # Shao et al. 2024, equation 3; its two means are in loss_weights.
        #   L_t = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A) + beta k3(pi || pi_ref)_t - c H_t
        low = schedule_value(self.clip_range, self._progress_remaining)
        ratio = self.importance_ratio(batch, new)
        policy_loss = self.policy_loss(batch, new, ratio)
        losses = policy_loss
        if self.ent_coef:
            losses = losses - self._entropy_bonus(batch, new.entropy)
        metrics = {
            "policy_gradient_loss": policy_loss,
            "approx_kl": maths.approx_kl(ratio),
            "clip_fraction": maths.clip_fraction(ratio, low, self.clip_range_high),
            "ratio": ratio,
        }
        if self.kl_in == "loss" and batch.ref_log_probs is not None and self.kl_coef:
            estimator, _, corrected = self.kl_loss_estimator.partition("-")
            token_ratio = (new.log_probs - batch.log_probs).exp() if corrected else None
            kl = maths.kl_loss(new.log_probs, batch.ref_log_probs, estimator, token_ratio)
            losses = losses + self.kl_coef * kl
            metrics["kl_loss"] = kl
        return losses, metrics

    def _log_training(self, rollout: Rollout, records: list[dict[str, float]], learning_rate: float) -> None:
        super()._log_training(rollout, records, learning_rate)
        self.logger.record("train/clip_range", schedule_value(self.clip_range, self._progress_remaining))
