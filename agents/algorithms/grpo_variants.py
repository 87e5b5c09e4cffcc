"""What has grown out of GRPO and REINFORCE on language models, each as its paper writes it.

Every class changes the two or three pieces its paper changes and inherits the rest from
:class:`~agents.algorithms.grpo.GRPO`. The KL is the environment's (``kl_coef``) and counted once, also for methods
whose papers have none: make the environment with ``kl_coef=0`` to train as published there. Left out: the papers'
schedules, datasets and filters of prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.grpo import GRPO
from agents.algorithms.schedules import Schedule, schedule_value
from agents.base import Agent
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout, concatenate
from agents.rollouts.vector_envs import longest_episode
from reward_models.rules import overlong_penalty


class RLOO(GRPO):
    """REINFORCE with the mean of the group's others as the baseline (Ahmadian et al. 2024, arXiv 2402.14740).

    The action is the whole response, so the importance ratio is ``pi(y|x) / pi_old(y|x)``. On the first pass
    its gradient is the paper's ``(r_i - mean of the others) grad log pi(y_i|x)``; the clip (after TRL) matters
    only to further ones.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``k``, episodes for each start state.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`; the KL is in the reward.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            group_size,
            scale="leave-one-out",
            average="sequence",
            kl_in="reward",
            **kwargs,
        )

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        # rho_i = pi(y_i | x) / pi_old(y_i | x), the same at every token of the response.
        log_ratio = (new.log_probs - batch.log_probs) * batch.mask
        return log_ratio.sum(1, keepdim=True).exp().expand_as(log_ratio)


class REINFORCEPlusPlus(GRPO):
    """Reward-to-go with each token's KL in it, normalised over the whole batch; PPO's clip; no critic.

    Hu 2025, "REINFORCE++" (arXiv 2501.03262): ``A_t = r(x, y) - beta sum_{i >= t} k1_i``, then minus the mean
    and over the standard deviation of all tokens of the batch. One answer for each prompt, no groups.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        clip_range: ``eps``; a number, "linear:0.2", or a function of the remaining progress.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`; groups and a KL in the loss are no part of the method.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        clip_range: Schedule = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            group_size=1,
            clip_range=clip_range,
            scale="none",
            average="token",
            kl_in="reward",
            **kwargs,
        )

    def advantages(self, rollout: Rollout) -> Tensor:
        to_go = Agent.advantages(self, rollout)  # there is no critic, so this is the reward-to-go
        return maths.masked_whiten(to_go, rollout.mask)


class DrGRPO(GRPO):
    """GRPO without its two biases: no division by the group's std nor by a response's own length.

    Liu et al. 2025, "Understanding R1-Zero-Like Training" (arXiv 2503.20783).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, env, learning_rate, group_size, scale="none", average="constant", **kwargs)


class DAPO(GRPO):
    """Clip-higher, token-level mean, overlong shaping and dynamic sampling (Yu et al. 2025, arXiv 2503.14476).

    Groups whose answers all score the same teach nothing and are replaced by fresh ones until the batch is
    full; after ``max_resamples`` more rollouts the batch stays smaller (and as it came if no group differs).

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        clip_range: Lower clip; a number, "linear:0.2", or a function of the remaining progress.
        clip_range_high: Upper clip.
        max_resamples: The most rollouts to sample in place of uninformative groups; 0 turns it off.
        overlong_cache: Length of the slope, in steps, that ends at the budget with a penalty of 1; 0 has none.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        clip_range: Schedule = 0.2,
        clip_range_high: float = 0.28,
        max_resamples: int = 4,
        overlong_cache: int = 0,
        **kwargs: Any,
    ) -> None:
        for name, value in (("max_resamples", max_resamples), ("overlong_cache", overlong_cache)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.max_resamples, self.overlong_cache = max_resamples, overlong_cache
        clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
        super().__init__(policy, env, learning_rate, group_size, average="token", **clip, **kwargs)

    def collect(self) -> Rollout:
        # Yu et al. 2025, equation 11: a batch holds only groups with 0 < |{correct answers}| < G.
        kept: list[Rollout] = []
        seen = 0
        for _ in range(1 + self.max_resamples):
            rollout = super().collect()
            seen += len(rollout)
            kept.append(rollout[self.informative(rollout)])
            if self.stopped or sum(map(len, kept)) >= self.n_episodes:
                break
        self.logger.record("group/frac_informative", sum(map(len, kept)) / seen)
        kept = [part for part in kept if len(part)]
        if not kept or self.max_resamples == 0:
            return rollout
        full = concatenate(kept)
        full.group = torch.arange(len(full)) // self.group_size
        return full[torch.arange(min(len(full), self.n_episodes))]

    def informative(self, rollout: Rollout) -> Tensor:
        """Rows of the groups whose scores, before the KL and the length, are not all equal."""
        differs = ~self.equal_groups(rollout)
        return differs.repeat_interleave(self.group_size).nonzero().squeeze(1)

    def episode_scores(self, rollout: Rollout) -> Tensor:
        # Yu et al. 2025, equation 13: 0 up to L_max - L_cache, then falling to -1 at L_max.
        scores = super().episode_scores(rollout)
        if self.overlong_cache == 0:
            return scores
        penalty = overlong_penalty(self._budget(rollout), self.overlong_cache)
        lengths = [range(n) for n in rollout.lengths.tolist()]
        return scores + scores.new_tensor(penalty(lengths, lengths))

    def _budget(self, rollout: Rollout) -> int:
        """The most steps that an episode can have; the longest seen where the environment does not tell."""
        return longest_episode(self.envs) or rollout.mask.shape[1]


class GSPO(GRPO):
    """One ratio for a response: ``(pi(y|x) / pi_old(y|x)) ** (1 / |y|)`` (Zheng et al. 2025, arXiv 2507.18071).

    The clip range is of that length-normalised ratio, hence far narrower than PPO's.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        clip_range: Lower clip; a number, "linear:3e-4", or a function of the remaining progress.
        clip_range_high: Upper clip.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        clip_range: Schedule = 3e-4,
        clip_range_high: float = 4e-4,
        **kwargs: Any,
    ) -> None:
        clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
        super().__init__(policy, env, learning_rate, group_size, average="sequence", **clip, **kwargs)

    def importance_ratio(self, batch: Rollout, new: Evaluation) -> Tensor:
        # Zheng et al. 2025, equation 7: s_i = exp(1/|y_i| sum_t log(pi(y_t) / pi_old(y_t))).
        log_ratio = (new.log_probs - batch.log_probs) * batch.mask
        mean = log_ratio.sum(1, keepdim=True) / batch.lengths.clamp(min=1)[:, None]
        return mean.exp().expand_as(log_ratio)


class CISPO(GRPO):
    """``sg(clip(rho)) A log pi``: the weight is clipped, not the gradient (MiniMax-M1 2025, arXiv 2506.13585).

    So every token keeps its gradient, also beyond the clip. There is no lower bound unless ``clip_range`` is
    below 1.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" or a policy class.
        env: A Gymnasium id, an env or a vector env.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress; None goes by what is
            trained (:mod:`agents.presets`).
        group_size: ``G``, episodes for each start state.
        clip_range: Weights are at least ``1 - clip_range``.
        clip_range_high: Weights are at most ``1 + clip_range_high``.
        **kwargs: See :class:`~agents.algorithms.grpo.GRPO`.
    """

    def __init__(
        self,
        policy: str | type[Policy],
        env: Any,
        learning_rate: Schedule | None = None,
        group_size: int = 8,
        clip_range: Schedule = 1.0,
        clip_range_high: float = 4.0,
        **kwargs: Any,
    ) -> None:
        clip = {"clip_range": clip_range, "clip_range_high": clip_range_high}
        super().__init__(policy, env, learning_rate, group_size, average="token", **clip, **kwargs)

    def policy_loss(self, batch: Rollout, new: Evaluation, ratio: Tensor) -> Tensor:
        # MiniMax 2025, equation 4: L_t = -sg(clip(rho_t, 1 - eps_low, 1 + eps_high)) A log pi(a_t | s_t).
        low = schedule_value(self.clip_range, self._progress_remaining)
        weight = ratio.detach().clamp(1 - low, 1 + self.clip_range_high)
        return -weight * batch.advantages * new.log_probs
