"""GRPO: group-relative policy optimisation, PPO without a critic (Shao et al. 2024, DeepSeekMath, arXiv 2402.03300).

    maximise  1/G sum_i 1/|o_i| sum_t min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL(pi || pi_ref)
    with      A_i = (r_i - mean(r)) / std(r) over the ``G`` answers to one prompt

Differs from the paper by default: the KL is charged in the reward, as the environment does it (``kl_in="loss"`` is the
paper's). Rewards of single steps of an answer are ``ProcessGRPO``'s. The whole method in one file of plain torch is
``examples/grpo_from_scratch.py``.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo_options import (
    EntropyTarget,
    check_delta,
    check_options,
    check_reference,
    move_reference,
    warn_of_idle,
)
from agents.algorithms.schedules import Schedule, check_schedule, schedule_value
from agents.base import Agent
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout
from agents.rollouts.vector_envs import longest_episode
from reward_models.warning import warn
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
        scale: "std" divides by the group's standard deviation, "batch" by that of all scores of the rollout, "none"
            does not divide (Dr. GRPO), "leave-one-out" is RLOO's baseline.
        average: "sequence" (GRPO), "token" (DAPO) or "constant" (Dr. GRPO) mean of the loss; "sum" adds up a
            response's tokens (LUSPO), "prompt" averages over the tokens of a group, then over groups (ScaleRL).
        kl_in: "reward" (each token's KL is charged, as the env does) or "loss". Either way it is counted
            once, with the env's ``kl_coef``; an env without a reference has none.
        kl_loss_estimator: "k3" (as published), "k3-corrected" (k3 times the importance ratio, TRL's default) or "k2";
            for ``kl_in="loss"``. The gradients of the last two are each token's own KL's, k3's is biased.
        gamma: Discount of the rewards in an episode's return; the papers have none, so 1.
        ent_coef: Weight of the entropy bonus.
        entropy_average: "loss" averages the bonus as ``average`` does the rest; "token" over all tokens of the batch,
            as TRL does whatever its loss (Dr. GRPO's then differs).
        max_grad_norm: Gradients are clipped to this norm.
        delta: No ratio counts for more, also where the advantage is below 0 and PPO's clip has no bound (two-sided
            clipping, INTELLECT-2, arXiv 2505.07291); above ``1 + clip_range_high``. None has no such bound.
        off_policy_mask_threshold: Responses with an advantage below 0 that have become less likely than this, in
            nats a token since they were written, teach nothing (DeepSeek-V3.2, arXiv 2512.02556). None keeps all.
        mask_truncated_completions: Answers that were cut off teach nothing, though they belong to their group's mean
            (DAPO, arXiv 2503.14476): on text by the budget or the context, elsewhere by a time limit.
        top_entropy_quantile: Only this share of a minibatch's tokens, those of the highest entropy, has a surrogate and
            an entropy bonus (arXiv 2506.01939 takes 0.2); 1 is all. Costs one more pass without gradient, but not on
            the first step of a rollout that is evaluated at once.
        entropy_target: Steers the entropy of a token: with each gradient step ``ent_coef`` rises by ``ent_coef_delta``
            where the entropy is at or below this, else it falls; where it is above, there is no bonus. None leaves
            ``ent_coef`` alone (Skywork-OR1, arXiv 2505.22312).
        ent_coef_delta: See ``entropy_target``.
        ent_coef_min: The least that ``ent_coef`` falls to.
        ent_coef_max: The most that it rises to.
        sync_ref_model: Whether the reference follows the policy (TR-DPO, arXiv 2404.09656; the names are TRL's): what
            is charged from then on, stepping or fused, is the KL to where it is. A moved reference is part of
            checkpoints. Not with LoRA, whose reference is the model under the adapters.
        ref_model_sync_steps: Gradient steps from one move to the next.
        ref_model_mixup_alpha: Share of the policy's weights in the moved reference, the rest are its own.
        f_divergence_type: What keeps a response near the reference, times ``kl_coef``, by TRL's names: "reverse_kl" (as
            the environment charges it), "js_divergence" or "alpha_divergence". The last two are of whole responses,
            ``E_ref[f(pi(y) / pi_ref(y))]``, and in an episode's score (Go et al. 2023, arXiv 2302.08215).
        f_alpha_divergence_coef: ``alpha``: near 1 the reverse KL, 0 the forward KL, 2 half the chi-squared divergence.
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

    @staticmethod
    def of_divergences(why: str) -> dict[str, str]:
        """Entries of :attr:`takes_no` for a method that credits tokens or turns by what the environment charges."""
        return dict.fromkeys(("f_divergence_type", "f_alpha_divergence_coef"), why)

    @staticmethod
    def of_the_clip(why: str) -> dict[str, str]:
        """Entries of :attr:`takes_no` for a method that does not clip."""
        return dict.fromkeys(("clip_range", "clip_range_high", "delta"), why)

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
        delta: float | None = None,
        off_policy_mask_threshold: float | None = None,
        mask_truncated_completions: bool = False,
        top_entropy_quantile: float = 1.0,
        entropy_target: float | None = None,
        ent_coef_delta: float = 0.005,
        ent_coef_min: float = 0.0,
        ent_coef_max: float = 1.0,
        sync_ref_model: bool = False,
        ref_model_sync_steps: int = 512,
        ref_model_mixup_alpha: float = 0.6,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_choice("scale", scale, ("std", "batch", "none", "leave-one-out"))
        check_choice("average", average, maths.AVERAGES)
        check_choice("kl_in", kl_in, ("reward", "loss"))
        check_choice("kl_loss_estimator", kl_loss_estimator, ("k2", "k3", "k3-corrected"))
        check_choice("entropy_average", entropy_average, ("loss", "token"))
        check_schedule("clip_range", clip_range, positive=True)
        check_schedule("clip_range_high", clip_range_high, positive=True)
        check_delta(delta, clip_range if clip_range_high is None else clip_range_high)
        check_options(
            average,
            entropy_average,
            kl_in,
            off_policy_mask_threshold,
            top_entropy_quantile,
            entropy_target,
            ent_coef_delta,
            ent_coef_min,
            ent_coef_max,
            ref_model_sync_steps,
            ref_model_mixup_alpha,
            f_divergence_type,
            f_alpha_divergence_coef,
        )
        self.sync_ref_model, self.ref_model_sync_steps = sync_ref_model, ref_model_sync_steps
        self.ref_model_mixup_alpha = ref_model_mixup_alpha
        self.f_divergence_type, self.f_alpha_divergence_coef = f_divergence_type, f_alpha_divergence_coef
        self.delta, self.off_policy_mask_threshold = delta, off_policy_mask_threshold
        self.mask_truncated_completions = mask_truncated_completions
        self.top_entropy_quantile = top_entropy_quantile
        self.entropy_target, self.ent_coef_delta = entropy_target, ent_coef_delta
        self.ent_coef_min, self.ent_coef_max = ent_coef_min, ent_coef_max
        bounds = ent_coef_delta, ent_coef_min, ent_coef_max
        self._steered = None if entropy_target is None else EntropyTarget(entropy_target, *bounds)
        self.clip_range, self.clip_range_high = clip_range, clip_range_high
        self.scale, self.average = scale, average
        self.kl_in, self.kl_loss_estimator = kl_in, kl_loss_estimator
        self.entropy_average = entropy_average
        #: Episodes of the whole minibatch, its steps, and those of them that are counted.
        self._batch_size = 1, torch.ones(()), torch.ones(())
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
        warn_of_idle(self.init_kwargs, self)

    def episode_scores(self, rollout: Rollout) -> Tensor:
        """What an episode is worth, ``[B]``: its return, the KL taken out if the loss has it."""
        # The env has charged the KL; counted in the loss it must not be in the reward too.
        if self.kl_in == "loss":
            return self.scores_before_kl(rollout)
        if self.f_divergence_type == "reverse_kl" or rollout.ref_log_probs is None:
            return self._sum(rollout.rewards, rollout)
        return self.scores_before_kl(rollout) - self._charged(rollout)

    def _charged(self, rollout: Rollout) -> Tensor:
        """What its distance from the reference takes off each episode's score, ``[B]``."""
        if self.f_divergence_type == "reverse_kl":
            return self._sum(rollout.penalties, rollout)
        log_ratio = ((rollout.log_probs - rollout.ref_log_probs).double() * rollout.mask).sum(1)
        slope = maths.f_divergence_slope(log_ratio, self.f_divergence_type, self.f_alpha_divergence_coef)
        return self.kl_coef * slope

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

    def equal_groups(self, rollout: Rollout, group_size: int | None = None) -> Tensor:
        """Groups in which the reward tells no answer from another, bool ``[B / group_size]``; None is the agent's."""
        size = group_size or self.group_size
        penalties = 0.0 if rollout.penalties is None else rollout.penalties.abs()
        magnitude = self._sum(rollout.rewards.abs() + penalties, rollout).view(-1, size)
        return maths.all_equal(self.raw_scores(rollout).view(-1, size), magnitude=magnitude)

    def _fill_unscored(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """Scores ``[B]`` with the mean of their group for episodes to which no reward applied."""
        if rollout.scored is None:
            return scores
        counted = rollout.scored.any(1).view(-1, self.group_size)
        return maths.fill_with_group_mean(scores.view(-1, self.group_size), counted).view(-1)

    def advantages(self, rollout: Rollout) -> Tensor:
        equal = self.record_groups(rollout)  # [B / G]
        scores, counted = self.episode_scores(rollout), self.scored_episodes(rollout)
        relative = maths.group_advantages(scores, self.group_size, self.scale, counted)
        # Groups that differ by their KL alone. Divided by the deviation of that, the KL would weigh as much as right
        # and wrong do elsewhere, whatever its coefficient; so there it keeps its own size.
        if self.scale == "batch":
            equal = equal & self.equal_groups(rollout, len(rollout))
        if self.scale in ("std", "batch") and equal.any():
            undivided = maths.group_advantages(scores, self.group_size, "none", counted)
            relative = torch.where(equal.repeat_interleave(self.group_size), undivided, relative)
        return relative[:, None] * rollout.mask

    def scored_episodes(self, rollout: Rollout) -> Tensor | None:
        """Episodes to which a reward applied, bool ``[B]``; None is all."""
        return None if rollout.scored is None else rollout.scored.any(1)

    def raw_scores(self, rollout: Rollout) -> Tensor:
        """:meth:`scores_before_kl`, with the mean of their group for episodes to which no reward applied."""
        return self._fill_unscored(self.scores_before_kl(rollout), rollout)

    def record_groups(self, rollout: Rollout) -> Tensor:
        """Log how far the scores of groups differ; returns :meth:`equal_groups`."""
        raw, equal = self.raw_scores(rollout), self.equal_groups(rollout)
        std = raw.view(-1, self.group_size).std(1) if self.group_size > 1 else torch.zeros(len(raw))
        self.logger.record("group/reward_std", float(std.mean()))
        self.logger.record("group/frac_zero_std", float(equal.float().mean()))
        return equal

    def kl_advantages(self, rollout: Rollout) -> Tensor:
        """What the charged KL adds to the advantage of each episode, ``[B]``, for methods that divide scores.

        Minus how much more it is than in the group, at its own size, so that ``kl_coef`` means what it says; 0 where
        the loss has the KL.
        """
        if self.kl_in == "loss" or rollout.penalties is None:
            return rollout.rewards.new_zeros(len(rollout))
        charged = -self._charged(rollout)
        scale = "leave-one-out" if self.scale == "leave-one-out" else "none"
        return maths.group_advantages(charged, self.group_size, scale, self.scored_episodes(rollout))

    def loss_weights(self, batch: Rollout) -> Tensor:
        # Not read here, or a GPU would be waited for.
        self._batch_size = len(batch), batch.mask.sum(), self.counted(batch).sum()
        return maths.loss_weights(batch.mask, self.average, self._constant_length(batch), batch.group)

    def counted(self, batch: Rollout) -> Tensor:
        """Steps that have a surrogate and an entropy bonus, bool ``[b, T]``."""
        return batch.mask if batch.kept is None else batch.mask & batch.kept

    def behaviour(self, batch: Rollout) -> Tensor:
        """Log-probabilities of the steps for what wrote them, ``[b, T]``: a generator's own, else the old policy's."""
        return batch.log_probs if batch.sampling_log_probs is None else batch.sampling_log_probs

    def leave_out(self, rollout: Rollout) -> Rollout:
        if self.mask_truncated_completions and rollout.cut is not None:
            whole = ~rollout.cut.any(1)
            self.logger.record("rollout/masked_truncated", float((~whole).float().mean()))
            rollout.mask = rollout.mask & whole[:, None]
        return rollout

    def before_update(self, batch: Rollout, fresh: bool) -> None:
        if self.top_entropy_quantile < 1.0:
            entropies = self.entropies(batch, fresh)
            batch.keep(
                maths.top_share(
                    entropies, batch.mask, self.top_entropy_quantile, int(batch.host_lengths().sum())
                )
            )

    def set_up_policy(self, spaces: Any = None) -> None:
        super().set_up_policy(spaces)
        if self.sync_ref_model and self.envs is not None:
            check_reference(self.envs, self.text_env, self.policy, self.kl_coef)

    def after_update(self, record: dict[str, float]) -> None:
        if self.sync_ref_model and self.n_gradient_steps % self.ref_model_sync_steps == 0:
            move_reference(self.envs, self.text_env, self.policy, self.ref_model_mixup_alpha)
        if self._steered is not None:
            self.ent_coef = self._steered.updated(self.ent_coef, record)

    def get_method_state(self) -> dict[str, Any]:
        if self._steered is None:
            return super().get_method_state()
        entropy = (
            self._steered.entropy if math.isfinite(self._steered.entropy) else None
        )  # JSON has no infinity
        return super().get_method_state() | {"ent_coef": self.ent_coef, "entropy": entropy}

    def set_method_state(self, state: dict[str, Any]) -> None:
        super().set_method_state(state)
        if self._steered is not None and "ent_coef" in state:
            self.ent_coef = state["ent_coef"]
            self._steered.entropy = math.inf if state["entropy"] is None else state["entropy"]

    def _constant_length(self, batch: Rollout) -> int | None:
        """What Dr. GRPO divides by, the most steps that an episode can have; None where it is not asked for."""
        if self.average != "constant":
            return None
        budget = longest_episode(self.envs)
        if budget is None and not self._told:
            self._told = True
            warn(
                f'{type(self).__name__} averages over a constant length (average="constant"), but {self.envs} has no '
                "limit on the length of an episode: each minibatch is divided by its own longest episode. Wrap the "
                "env in gymnasium.wrappers.TimeLimit, or make it with max_episode_steps"
            )
        return budget

    @property
    def _bonus(self) -> float:
        """The weight of the entropy bonus in this step."""
        return self.ent_coef if self._steered is None else self._steered.bonus(self.ent_coef)

    def _entropy_bonus(self, batch: Rollout, entropy: Tensor) -> Tensor:
        """The bonus of each step, ``[b, T]``, scaled so that :meth:`loss_weights` average it as was asked."""
        bonus = self._bonus * entropy * self.counted(batch)
        if self.entropy_average == "loss":
            return bonus
        episodes, steps, counted = self._batch_size
        if self.average == "token":
            scale: Tensor | float = steps
        elif self.average == "sequence":
            scale = episodes * batch.lengths[:, None]
        elif self.average == "sum":
            scale = episodes
        else:
            scale = episodes * (self._constant_length(batch) or batch.mask.shape[1])
        return bonus * (scale / counted.clamp(min=1))

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        """``pi / pi_old`` of each step, ``[b, T]``; override for one of whole sequences."""
        return (new.log_probs - batch.log_probs).exp()

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        """The surrogate of each step, ``[b, T]``; override for another than PPO's clip."""
        low = schedule_value(self.clip_range, self._progress_remaining)
        return maths.ppo_clip_loss(ratio, batch.advantages, low, self.clip_range_high, self.delta)

    def clipped(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        """True where the ratio has left the clip range, ``[b, T]``, for the log; override with another clip."""
        low = schedule_value(self.clip_range, self._progress_remaining)
        return maths.clip_fraction(ratio, low, self.clip_range_high)

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        # Shao et al. 2024, equation 3; its two means are in loss_weights.
        #   L_t = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A) + beta k3(pi || pi_ref)_t - c H_t
        ratio = self.importance_ratio(batch, new)
        policy_loss = self.policy_loss(batch, new, ratio)
        metrics = {
            "policy_gradient_loss": policy_loss,
            "approx_kl": maths.approx_kl(ratio),
            "ratio": ratio,
        }
        if "clip_range" not in self.takes_no:
            metrics["clip_fraction"] = self.clipped(batch, new, ratio).float()
        if self.off_policy_mask_threshold is not None:
            fits = maths.fitting_responses(
                batch.advantages,
                self.behaviour(batch) - new.log_probs.detach(),
                batch.mask,
                self.off_policy_mask_threshold,
            )
            policy_loss = policy_loss * fits
            metrics["off_policy_masked"] = (~fits).float()
        if batch.kept is not None:
            policy_loss = policy_loss * batch.kept
            metrics |= {"kept": batch.kept.float(), "kept_entropy": new.entropy * batch.kept}
        losses = policy_loss
        if self._bonus:
            losses = losses - self._entropy_bonus(batch, new.entropy)
        if self.kl_in == "loss" and batch.ref_log_probs is not None and self.kl_coef:
            estimator, _, corrected = self.kl_loss_estimator.partition("-")
            token_ratio = (new.log_probs - batch.log_probs).exp() if corrected else None
            kl = maths.kl_loss(new.log_probs, batch.ref_log_probs, estimator, token_ratio)
            losses = losses + self.kl_coef * kl
            metrics["kl_loss"] = kl
        return losses, metrics

    def _log_training(self, rollout: Rollout, records: list[dict[str, float]], learning_rate: float) -> None:
        super()._log_training(rollout, records, learning_rate)
        if "clip_range" not in self.takes_no:
            low = schedule_value(self.clip_range, self._progress_remaining)
            self.logger.record("train/clip_range", low)
        if self._steered is not None:
            self.logger.record("train/ent_coef", self.ent_coef)
