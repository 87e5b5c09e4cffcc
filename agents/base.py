"""The base of every agent: collect, learn, log, save; with the signatures of stable-baselines3.

A new method subclasses :class:`Agent` and overrides the piece that is new: :meth:`Agent.loss`,
:meth:`Agent.advantages`, or all of :meth:`Agent.train`. stable-baselines3's logger and callbacks are used as
they are. Left out: replay buffers (every agent here is on-policy).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents import presets
from agents.algorithms import maths
from agents.algorithms.gradient_step import check_steps, clip_gradients, evaluate_entropies, read_scalars
from agents.algorithms.importance import MODES, describe_sampling, implausible, importance_weights
from agents.algorithms.optimizers import make_optimizer
from agents.algorithms.safeguards import (
    SkippedUpdates,
    accumulate_within_memory,
    check_weights,
    find_non_finite,
)
from agents.algorithms.schedules import Schedule, check_numbers, check_schedule, lr_multiplier, schedule_value
from agents.arguments import ClassTables
from agents.loop import LearningLoop
from agents.parallel import processes
from agents.policies.base import Evaluation, Policy
from agents.policies.factory import make_policy
from agents.rollouts.ahead import Ahead
from agents.rollouts.collectors import collect_episodes, collect_fused, collect_steps
from agents.rollouts.episode_log import EpisodeLog
from agents.rollouts.rollout import Rollout
from agents.rollouts.vector_envs import (
    bind_policy,
    check_time_limits,
    frozen_models,
    fused_env,
    has_fused_way,
    kl_envs,
    make_envs,
    seed_action_spaces,
)
from reward_models.warning import warn
from textrl_env.errors import check_choice, check_range
from textrl_env.lm.causal_lm import choose_device
from textrl_env.lm.offloading import Offloading

#: Quantities of a loss that are charted under a name of their own, not as ``train/<name>``.
_LOG_NAMES = {"ratio": "val/ratio", "value_clip_fraction": "val/clipfrac"}


class Agent(LearningLoop, ClassTables):
    """Collects rollouts and learns from them; a subclass says how.

    Args:
        policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", "CausalLMPolicy", "auto" (chosen from the env), or a
            :class:`Policy` class.
        env: A Gymnasium id, an env or a vector env (Gymnasium's or stable-baselines3's); None only when loading for
            prediction.
        learning_rate: Of Adam; a number, "linear:3e-4", or a function of the remaining progress. None goes by what is
            trained, as do all that are None here and in the table of :mod:`agents.presets`.
        n_steps: Steps of each slot in a rollout, for agents that learn from segments.
        n_episodes: Episodes in a rollout, for agents that learn from whole episodes (on text, all).
        batch_size: Rows in a gradient step: env steps, or episodes where whole episodes are needed. None
            takes the whole rollout.
        n_epochs: Passes over a rollout.
        gamma: Discount; None is 1 on text (the episode is short and its end is part of the task), 0.99
            elsewhere.
        gae_lambda: Of the generalised advantage estimate, where there is a critic.
        ent_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss, where there is a critic.
        max_grad_norm: Gradients are clipped to this norm.
        critic: "separate", "shared", "head" (language models), None, or "default" for the policy's own default.
        group_size: Episodes that share a start state, neighbours in the rollout.
        micro_batch_size: Rows evaluated at once; losses do not depend on it, memory does. None, where it was given,
            takes all.
        gradient_accumulation_steps: Passes of ``batch_size`` rows that make one gradient step, as in transformers;
            where ``batch_size`` is None, parts that the one step of a rollout is evaluated in.
        lr_scheduler_type: What the learning rate does on the way, by transformers' name: "constant", "linear",
            "cosine", ...
        lr_scheduler_kwargs: More arguments of that scheduler.
        warmup_ratio: Share of the run in which the learning rate rises from 0.
        warmup_steps: The same in gradient steps, in place of ``warmup_ratio``.
        weight_decay: As in AdamW; biases and norms do not decay.
        critic_learning_rate: Of the weights that only the critic has; None, if given, is ``learning_rate``, below which
            no default is. On text the gradient of these weights is clipped apart.
        n_envs: Slots to make when ``env`` is an id; None is 1 for segments, all episodes for whole episodes.
        env_kwargs: Passed to ``gym.make_vec`` when ``env`` is an id.
        policy_kwargs: Passed to the policy (``optimizer_class`` and ``optimizer_kwargs`` excepted, which replace Adam:
            a class, or "adamw_8bit" or "paged_adamw_8bit" for moments in eight bits, with bitsandbytes).
        stats_window_size: Episodes that ``rollout/ep_rew_mean`` averages over.
        tensorboard_log: Folder of TensorBoard events.
        verbose: 1 prints the log.
        seed: One seed for the environment, the sampling, the weights and the data order.
        device: "auto", or any torch device.
        use_sde: Noise of continuous actions that is a function of the state (gSDE), for policies that are networks.
        sde_sample_freq: Steps after which that noise is drawn anew; -1 is once in a rollout.
        max_skipped_updates: A gradient step whose gradient is not finite is skipped and counted; so many in a row stop
            learning.
        generate_ahead: An outside generator writes the next responses while the policy learns from the last ones, so by
            the weights of one update before.
        importance_sampling_mode: How the distance between an outside generator and the policy is corrected, by TRL's
            names: "token_truncate", "token_mask", "sequence_truncate" or "sequence_mask"; None does not. Our own
            decoder needs none, unless its sampling is cut to the likeliest tokens.
        importance_sampling_clip_max: No ratio counts for more; None is no bound.
        importance_sampling_clip_min: No ratio counts for less; None is no bound, where it is masked one over the upper.
        gamma_turn: Discount from turn to turn, beside that from step to step, in ``TextGame-v0``.
        offload: While the policy learns, frozen models (a reference with weights of its own, reward models) lie in the
            host's memory, and the copy that responses are decoded with is given up: memory for time.
    """

    #: Whether the method needs whole episodes on every environment.
    whole_episodes: ClassVar[bool] = False
    #: Whether a rollout is cut into single steps before minibatches are drawn (where the policy allows it).
    flatten: ClassVar[bool] = False
    #: Whether the loss reads values.
    uses_critic: ClassVar[bool] = False
    #: Whether episodes to which no reward applied reach :meth:`train`; they are left out before it otherwise.
    keeps_unscored: ClassVar[bool] = False

    def __init__(
        self,
        policy: str | type[Policy],
        env: str | gym.Env | gym.vector.VectorEnv | None,
        learning_rate: Schedule | None = None,
        n_steps: int = 128,
        n_episodes: int | None = None,
        batch_size: int | None = None,
        n_epochs: int | None = None,
        gamma: float | None = None,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 1.0,
        critic: str | None = "default",
        group_size: int = 1,
        micro_batch_size: int | None = None,
        n_envs: int | None = None,
        env_kwargs: dict[str, Any] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | Path | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: str | torch.device = "auto",
        gradient_accumulation_steps: int = 1,
        lr_scheduler_type: str | None = None,
        lr_scheduler_kwargs: dict[str, Any] | None = None,
        warmup_ratio: float | None = None,
        warmup_steps: int | None = None,
        weight_decay: float = 0.0,
        max_skipped_updates: int = 3,
        critic_learning_rate: Schedule | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        generate_ahead: bool = False,
        importance_sampling_mode: str | None = "sequence_truncate",
        importance_sampling_clip_max: float | None = 3.0,
        importance_sampling_clip_min: float | None = None,
        gamma_turn: float = 1.0,
        offload: bool = False,
    ) -> None:
        check_range(1, max_skipped_updates=max_skipped_updates)
        check_range(1, n_steps=n_steps, n_episodes=n_episodes, batch_size=batch_size, n_epochs=n_epochs)
        check_range(1, group_size=group_size, micro_batch_size=micro_batch_size, n_envs=n_envs)
        check_range(1, stats_window_size=stats_window_size)
        check_schedule("learning_rate", learning_rate)
        check_schedule("critic_learning_rate", critic_learning_rate)
        check_numbers(ent_coef=ent_coef, vf_coef=vf_coef, max_grad_norm=max_grad_norm)
        check_range(0, 1, gamma=gamma, gae_lambda=gae_lambda, gamma_turn=gamma_turn)
        check_range(1, gradient_accumulation_steps=gradient_accumulation_steps, warmup_steps=warmup_steps)
        check_numbers(weight_decay=weight_decay)
        if warmup_ratio and warmup_steps:
            raise ValueError(
                f"warmup_ratio={warmup_ratio} and warmup_steps={warmup_steps} both say how long the learning rate "
                "rises; give one"
            )
        if lr_scheduler_type not in (None, "constant") and not isinstance(
            learning_rate, (int, float, type(None))
        ):
            raise ValueError(
                f"learning_rate={learning_rate!r} and lr_scheduler_type={lr_scheduler_type!r} both change the learning "
                "rate; give a number and a scheduler, or a schedule alone"
            )
        check_choice("importance_sampling_mode", importance_sampling_mode, (*MODES, None))
        low, high = importance_sampling_clip_min, importance_sampling_clip_max
        if (high is not None and not high >= 1) or (low is not None and not 0 <= low <= 1):
            raise ValueError(
                "importance_sampling_clip_max must be at least 1 and importance_sampling_clip_min between 0 and 1, the "
                f"ratio of what is sampled from the policy itself, got {high} and {low}"
            )
        self.gamma_turn = gamma_turn
        self.offload, self._offloading = offload, Offloading()
        self.generate_ahead = generate_ahead
        self.importance_sampling_mode = importance_sampling_mode
        self.importance_sampling_clip_max = importance_sampling_clip_max
        self.importance_sampling_clip_min = importance_sampling_clip_min
        #: Who shares the work, see :mod:`agents.parallel.processes`.
        self.processes = processes.current()
        self.skipped_updates = SkippedUpdates(max_skipped_updates)
        self.policy_name = policy
        self.learning_rate = learning_rate
        self.lr_scheduler_type, self.lr_scheduler_kwargs = lr_scheduler_type, lr_scheduler_kwargs
        self.warmup_ratio, self.warmup_steps = warmup_ratio, warmup_steps
        self.weight_decay = weight_decay
        self.critic_learning_rate = critic_learning_rate
        self.gradient_accumulation_steps = gradient_accumulation_steps
        #: What is trained, a column of :data:`agents.presets.DEFAULTS`; "" before there is a policy.
        self.preset = ""
        self.n_steps, self.n_episodes = n_steps, n_episodes
        self.batch_size, self.n_epochs = batch_size, n_epochs
        self.gae_lambda, self.ent_coef, self.vf_coef = gae_lambda, ent_coef, vf_coef
        self.max_grad_norm = max_grad_norm
        self.group_size = group_size
        self.micro_batch_size = micro_batch_size
        self.policy_kwargs = dict(policy_kwargs or {})
        self.use_sde, self.sde_sample_freq = use_sde, sde_sample_freq
        self.env_kwargs = dict(env_kwargs or {})
        self.tensorboard_log = None if tensorboard_log is None else str(tensorboard_log)
        self.verbose = verbose
        self.num_timesteps = 0
        self.n_updates = 0
        self.n_gradient_steps = 0
        self.stopped = False
        self.callback: BaseCallback | None = None
        self.callback_states: list[Any] = []  # of a checkpoint, for the callbacks of the next learn()
        self._logger: Logger | None = None
        self._custom_logger = False
        self._callback_locals: dict[str, Any] = {}
        self._progress_remaining = 1.0
        self.episodes = EpisodeLog(stats_window_size)
        self.envs: gym.vector.VectorEnv | None = None
        self.text_env: Any = None
        self.latest: dict[str, Any] = {}
        self.env_id = env if isinstance(env, str) else None
        self.n_envs = n_envs  # how many there are, once there are any
        self._asked_envs = n_envs

        self.seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        env_seed, weight_seed, action_seed, order_seed = np.random.SeedSequence(self.seed).generate_state(4)
        self._seed_of_env = int(env_seed) % 2**31
        self._env_seed: int | None = self._seed_of_env  # None once the environment has been seeded
        self._seeds_spaces = seed is not None
        self._vec_env: VecEnv | None = None
        self.rng = np.random.default_rng(order_seed)
        torch.manual_seed(int(weight_seed))
        self._critic = critic if self.uses_critic else None
        self._device_choice = device
        self._action_seed = int(action_seed)
        self._gamma = gamma
        self.last_obs: Any = None
        self.made_with_kl_coef: float | None = None
        if env is not None:
            self._check_id_arguments(env)
            self.set_up_env(env)
            self.set_up_policy()

    # -- set-up -------------------------------------------------------------------------------------------

    def set_up_env(self, env: str | gym.Env | gym.vector.VectorEnv) -> None:
        """Make the vector env that the agent learns in, and find the env's fused way if it has one."""
        slots = self._asked_envs or (self.n_episodes or 16 if self.whole_episodes else 1)
        if isinstance(env, str) and has_fused_way(env):
            slots = self._asked_envs or 1  # the fused way needs no slots
        self.text_env = fused_env(env)
        self.envs = make_envs(env, slots, self.env_kwargs)
        self.text_env = self.text_env or fused_env(self.envs)
        self.made_with_kl_coef = self.kl_coef
        self._vec_env = None
        self.n_envs = self.num_envs = self.envs.num_envs
        mode = self.envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.autoreset_mode = mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)
        self.waiting = np.zeros(self.num_envs, dtype=bool)
        check_time_limits(self.envs)
        if self._seeds_spaces:
            seed_action_spaces(self.envs, self._seed_of_env)

    def _check_id_arguments(self, env: Any) -> None:
        """Warn of arguments that say how to make an env from its id, beside an env that is made already."""
        if isinstance(env, str):
            return
        made = env.num_envs if isinstance(env, (gym.vector.VectorEnv, VecEnv)) else 1
        if self._asked_envs not in (None, made):
            warn(
                f"n_envs={self._asked_envs} is for an env that is made from its id; {env} is there already, with "
                f"{made} slot{'s' if made > 1 else ''}, and is taken as it is. Pass the id, or "
                f"gym.make_vec(id, num_envs={self._asked_envs})"
            )
        if self.env_kwargs:
            warn(
                f"env_kwargs={self.env_kwargs} is for an env that is made from its id; {env} is there already and is "
                "taken as it is. Pass the id, or give the arguments to gym.make"
            )

    def set_up_policy(self, spaces: Any = None) -> None:
        """Make the policy and its optimiser from the env, or from spaces alone to predict only."""
        policy_kwargs = ({"use_sde": True} if self.use_sde else {}) | self.policy_kwargs
        self._optimizer = [policy_kwargs.pop(name, None) for name in ("optimizer_class", "optimizer_kwargs")]
        self.policy = make_policy(self.policy_name, spaces or self.envs, self._critic, policy_kwargs)
        self.policy.to(self._policy_device())
        if self.processes.are_several and getattr(self.policy, "shard", False):
            self.policy.split(self.processes.count)
        self.device = self.policy.device
        self._maybe_recommend_cpu()
        self.policy.generator = torch.Generator(self.device).manual_seed(self._action_seed)
        self.collects_episodes = (
            self.whole_episodes or self.policy.whole_episodes or self.n_episodes is not None
        )
        if self.n_episodes is None:
            self.n_episodes = 64 if self.policy.whole_episodes else 16
        if self.collects_episodes and self.n_episodes % self.group_size:
            raise ValueError(
                f"n_episodes={self.n_episodes} must be a multiple of group_size={self.group_size}"
            )
        self.gamma = (1.0 if self.policy.whole_episodes else 0.99) if self._gamma is None else self._gamma
        if not self.policy.whole_episodes:
            self.text_env = None
        self._check_generator()
        if self.offload and not Offloading.may_leave(self.device):
            warn("offload=True spares nothing here: the models are in the host's memory anyway")
        self.ahead = None
        if self.generate_ahead and self.envs is not None:
            if self.processes.are_several:
                raise ValueError(
                    "generate_ahead=True is for one process; leave it out where several share a run"
                )
            self.ahead = Ahead(self.text_env, self.policy)
        self.preset = presets.resolve(self)
        self.set_up_optimizer()
        if self.envs is not None:
            bind_policy(self.envs, self.policy.log_prob, self.policy.slot_log_prob)

    def _check_generator(self) -> None:
        """Raise a ValueError where a generator or its sampling is asked for and nothing is ever generated at once."""
        asked = [
            name
            for name in ("generator", "sampling")
            if self.policy_kwargs.get(name) not in (None, {}, "native")
        ]
        if asked and self.envs is not None and self.text_env is None:
            raise ValueError(
                f"{' and '.join(asked)} in policy_kwargs wants an environment that runs whole episodes at once, such "
                f"as TextRLHF-v0 without a wrapper; {self.envs} is stepped token by token, by the policy itself"
            )
        least = (self.policy_kwargs.get("sampling") or {}).get("min_new_tokens", 0)
        if self.text_env is not None and least >= self.text_env.max_new_tokens:
            raise ValueError(
                f"sampling: min_new_tokens={least} leaves no room for an end below the environment's max_new_tokens="
                f"{self.text_env.max_new_tokens}"
            )

    def set_up_optimizer(self) -> None:
        """Make the optimiser and its schedule from the hyper-parameters in force."""
        ratio = 0.0 if self.warmup_steps else self.warmup_ratio
        self._lr_multiplier = lr_multiplier(self.lr_scheduler_type, ratio, self.lr_scheduler_kwargs)
        self.optimizer = make_optimizer(
            self.policy, self.weight_decay, self.critic_learning_rate is not None, *self._optimizer
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rates(1.0)[group["critic"]]

    def _policy_device(self) -> torch.device:
        """Small networks are fastest on the CPU; a language model goes where the env's is, or to what there is."""
        if self._device_choice != "auto":
            device = choose_device(self._device_choice)
            if device.type == "cuda" and not torch.cuda.is_available() and not self.policy.whole_episodes:
                warn(f"device={str(device)!r}, but there is no GPU here: the CPU is used")
                return torch.device("cpu")
            return device
        if not self.policy.whole_episodes:
            return torch.device("cpu")
        return self.text_env.lm.device if self.text_env is not None else choose_device()

    def _maybe_recommend_cpu(self) -> None:
        """Warn of a GPU under a network that is too small for one; by the name that it has in stable-baselines3."""
        if self.device.type != "cpu" and self.policy.flat:
            name = type(self).__name__
            warn(
                f"You are trying to run {name} on the GPU with a network so small that its steps are faster on the "
                'CPU: leave device="auto"'
            )

    @property
    def kl_coef(self) -> float | None:
        """The environment's KL coefficient; None where there is no reference."""
        return next((env.kl_coef for env in kl_envs(self.envs)), None)

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        for env in kl_envs(self.envs):
            env.kl_coef = value

    # -- collecting ------------------------------------------------------------------------------------------

    def collect(self) -> Rollout:
        """One rollout, by whichever way the environment and the method allow."""
        if self.text_env is not None:
            return self.look_at_sampling(collect_fused(self, self.n_episodes, self.group_size))
        if self.collects_episodes:
            return self._with_values(collect_episodes(self, self.n_episodes, self.group_size))
        return collect_steps(self, self.n_steps)

    @torch.no_grad()
    def _with_values(self, rollout: Rollout) -> Rollout:
        """A sequence model's values, from one pass over the finished episodes."""
        if not (self.policy.whole_episodes and self.policy.has_critic):
            return rollout
        values = torch.zeros(rollout.mask.shape, device=self.device)
        for micro, rows in rollout.to(self.device).micro_batches(self.micro_batch_size):
            values[rows] = self.policy.evaluate(micro).values.float()
        rollout.values = values.cpu() * rollout.mask
        array, mask, done = (x.numpy() for x in (rollout.values, rollout.mask, rollout.done))
        shifted = maths.shift_values(array, np.zeros(len(array), array.dtype), mask, done)
        rollout.next_values = rollout.next_values + torch.from_numpy(shifted) * rollout.mask
        return rollout

    def look_at_sampling(self, rollout: Rollout) -> Rollout:
        """Measure how far what an outside generator reported is from the policy's log-probabilities.

        Reported log-probabilities that are not those of what was sampled are taken out of the rollout: nothing can be
        corrected by them.
        """
        if rollout.sampling_log_probs is None:
            return rollout
        log_ratio = rollout.log_probs - rollout.sampling_log_probs
        mode = self.importance_sampling_mode
        remedy = f"and the difference is corrected by importance_sampling_mode={mode!r}"
        if mode is None:
            remedy = "and nothing is corrected, as importance_sampling_mode=None wants it"
        elif implausible(log_ratio, rollout.mask):
            mode = None
            remedy = (
                "and nothing is corrected: too many tokens are far likelier than it reports for these to be the "
                "log-probabilities that it drew them with"
            )
        if mode is None:
            rollout.sampling_log_probs, weights = None, log_ratio.exp()
        else:
            weights = self._importance_weights(log_ratio, rollout.mask, mode)
        found = describe_sampling(log_ratio, rollout.mask, mode, weights)
        self.episodes.note_generator(found, remedy, getattr(self.policy, "sampling", {}))
        return rollout

    def _importance_weights(self, log_ratio: Tensor, mask: Tensor, mode: str) -> Tensor:
        low = self.importance_sampling_clip_min
        if low is None and mode.endswith("mask") and self.importance_sampling_clip_max is not None:
            low = 1 / self.importance_sampling_clip_max
        return importance_weights(log_ratio, mask, mode, self.importance_sampling_clip_max, low)

    def step_weights(self, batch: Rollout) -> Tensor:
        """What the losses of the steps are multiplied by before they are added up, ``[b, T]``.

        :meth:`loss_weights`, and where an outside generator wrote the responses how much likelier each is under the
        policy: every term of a loss is then an expectation under the policy.
        """
        weights = self.loss_weights(batch)
        if batch.sampling_log_probs is None or self.importance_sampling_mode is None:
            return weights
        log_ratio = batch.log_probs - batch.sampling_log_probs
        ratio = self._importance_weights(log_ratio, batch.mask, self.importance_sampling_mode)
        return weights * ratio.to(weights.dtype)

    def record_text_episodes(self, episodes: Any) -> None:
        """Note what an environment's fused way has produced, for the log."""
        self.episodes.add_text(episodes)

    # -- learning --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def others_away(self) -> Iterator[None]:
        """Within it, what only scores and what only writes is out of the device's memory, with ``offload``."""
        if not self.offload:
            yield
            return
        language_model = getattr(self.policy, "lm", None)
        if language_model is not None:
            language_model.give_up_copies()
        with self._offloading.away(frozen_models(self.envs, self.text_env), [self.policy]) as moved:
            self.logger.record("memory/offloaded_gb", moved / 1e9)
            yield

    def advantages(self, rollout: Rollout) -> Tensor:
        """Advantages ``[B, T]``; override for another estimator.

        The default is the generalised advantage estimate where there is a critic, and the reward-to-go
        where there is none.
        """
        if self.policy.has_critic:
            return self.estimate_advantages(rollout, self.gae_lambda)
        rewards, mask, done = (x.numpy() for x in (rollout.rewards.double(), rollout.mask, rollout.done))
        return torch.from_numpy(maths.reward_to_go(rewards, mask, done, self.discounts(rollout)))

    def discounts(self, rollout: Rollout) -> float | np.ndarray:
        """The discount, or one from each step to the next, ``[B, T]``, where turns are discounted too."""
        if rollout.turn is None or self.gamma_turn == 1.0:
            return self.gamma
        return maths.turn_discounts(rollout.turn.numpy(), self.gamma, self.gamma_turn)

    def estimate_advantages(self, rollout: Rollout, gae_lambda: float | np.ndarray) -> Tensor:
        """The generalised advantage estimate ``[B, T]`` from the rollout's values; ``gae_lambda`` may be ``[B, 1]``."""
        arrays = (x.double().numpy() for x in (rollout.rewards, rollout.values, rollout.next_values))
        rewards, values, next_values = arrays
        mask, done = rollout.mask.numpy(), rollout.done.numpy()
        estimate = maths.gae(rewards, values, next_values, mask, done, self.discounts(rollout), gae_lambda)
        return torch.from_numpy(estimate)

    def value_targets(self, rollout: Rollout, advantages: Tensor) -> Tensor:
        """What the critic learns to predict, ``[B, T]``; the default is advantages plus values."""
        return advantages + rollout.values

    def loss(self, batch: Rollout, new: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of every step; override with the method's own.

        Args:
            batch: Rows of a rollout, ``advantages`` and ``returns`` set.
            new: What the policy says of them now, with gradient.

        Returns:
            ``[b, T]`` losses, averaged by :meth:`loss_weights`; and ``[b, T]`` quantities to log under
            ``train/``, averaged over real steps.
        """
        raise NotImplementedError(f"{type(self).__name__} must override loss() or train()")

    def loss_weights(self, batch: Rollout) -> Tensor:
        """How the losses of the steps are averaged, ``[b, T]``; every real step counts alike."""
        return maths.loss_weights(batch.mask, "token")

    def extra_loss(self) -> Tensor | None:
        """A scalar that joins every gradient step beside the rollout's loss; None for nothing."""
        return None

    def leave_out(self, rollout: Rollout) -> Rollout:
        """Take out of a rollout what teaches nothing, once its advantages are known; it is in the host's memory."""
        return rollout

    def before_update(self, batch: Rollout, fresh: bool) -> None:
        """Called with a minibatch before its gradient is computed, for what a loss needs to know of all its rows.

        Args:
            batch: Rows of a rollout.
            fresh: No step has been taken since the rollout.
        """

    def after_update(self, record: dict[str, float]) -> None:
        """Called after a gradient step that was taken, with what it logs."""

    def get_method_state(self) -> dict[str, Any]:
        """What a method changes on its way besides weights, as JSON; checkpoints hold it."""
        return {}

    def set_method_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_method_state` returned."""

    def before_step(self) -> None:
        """Called with the gradients of a minibatch, before they are clipped."""

    def prepare_batch(self, batch: Rollout) -> Rollout:
        """Last change to a minibatch before it is evaluated, for example normalising advantages."""
        return batch

    def prepare_rollout(self, rollout: Rollout) -> Rollout:
        """Set advantages and returns, and cut the rollout into steps where the method wants that."""
        advantages = self.advantages(rollout)
        check_steps(f"advantages() of {type(self).__name__}", advantages, rollout.mask)
        # In float64 up to here: differences between large returns would be lost in float32.
        rollout.returns = self.value_targets(rollout, advantages).float()
        rollout.advantages = advantages.float()
        rollout.rewards = rollout.rewards.float()
        rollout.penalties = None if rollout.penalties is None else rollout.penalties.float()
        rollout = self.leave_out(rollout)
        if self.flatten and not self.policy.whole_episodes:
            rollout = rollout.flatten_steps()
        return rollout.to(self.device)

    def train(self, rollout: Rollout) -> None:
        """Learn from one rollout: ``n_epochs`` passes in minibatches, one gradient step for each."""
        self._plan_learning_rates(rollout)
        rollout = self.prepare_rollout(rollout)
        size = None if self.batch_size is None else self.batch_size * self.gradient_accumulation_steps
        whole = size is None or size >= len(rollout)
        if whole:  # one minibatch, the same in every pass
            rollout = self.prepare_batch(rollout)
        records: list[dict[str, float]] = []
        fresh = True
        for _ in range(self.n_epochs):
            for batch in rollout.minibatches(size, self.rng):
                batch = batch if whole else self.prepare_batch(batch)
                share = self._share(batch)
                part = batch if share is None else batch.part(share)
                for micro, _ in part.micro_batches(self._micro_batch_size(len(batch))):
                    self.policy.prepare(micro)
                record = self.update(batch, fresh)
                fresh = False
                if not math.isfinite(record["grad_norm"]):
                    continue  # a step that was not taken
                records.append(record)
                if self.should_stop(record):
                    break
            else:
                self.n_updates += 1
                continue
            break
        self.policy.weights_changed()
        before = self.weight_norm
        self.weight_norm = check_weights(self.policy, f"after the update at {self.num_timesteps:,} timesteps")
        self.weight_growth = self.weight_norm / before if before else 1.0
        self.logger.record("train/weight_growth", self.weight_growth)
        self._log_training(rollout, records, self.optimizer.param_groups[0]["lr"])

    def _learning_rates(self, progress_remaining: float) -> tuple[float, float]:
        """The learning rates of the policy and of the critic's own weights, before scheduler and warm-up."""
        rate = schedule_value(self.learning_rate, progress_remaining)
        own = self.critic_learning_rate
        if own is None:
            return rate, rate
        critic_rate = schedule_value(own, progress_remaining)
        if "critic_learning_rate" not in self.init_kwargs:
            # A default goes along with the schedule of the policy's rate, and a rate of 0 means that nothing learns.
            first = schedule_value(self.learning_rate, 1.0)
            critic_rate *= rate / first if first else 0.0
        return rate, critic_rate

    def _plan_learning_rates(self, rollout: Rollout) -> None:
        """Set the learning rates for the gradient steps on one rollout."""
        multiplier = 1.0
        if self.total_timesteps:  # train() may be called by hand, and then there is no run to be in
            # The middle of the rollout, so that neither the first nor the last update of a short run has a rate of 0.
            middle = self.num_timesteps - int(rollout.mask.sum()) / 2
            multiplier = self._lr_multiplier(max(middle / max(self.total_timesteps, self.num_timesteps), 0.0))
        rates = self._learning_rates(self._progress_remaining)
        for group in self.optimizer.param_groups:
            group["lr"] = group["planned_lr"] = rates[group["critic"]] * multiplier

    def _micro_batch_size(self, rows: int) -> int | None:
        """Rows of a gradient step of ``rows`` that are evaluated at once; None for all."""
        if self.gradient_accumulation_steps == 1:
            return self.micro_batch_size
        size = -(-rows // self.gradient_accumulation_steps) if self.batch_size is None else self.batch_size
        return min(size, self.micro_batch_size or size)

    def _share(self, batch: Rollout) -> np.ndarray | None:
        """Rows of a minibatch that this process evaluates; None for all."""
        return None if not self.processes.are_several else self._shares(batch)[self.processes.rank]

    def _shares(self, batch: Rollout) -> list[np.ndarray]:
        group = None if batch.group is None else batch.group.numpy()
        return processes.deal(batch.host_lengths(), group, self.processes.count)

    def _passes(self, batch: Rollout, rows: int | None) -> int:
        """How often split weights are gathered for a gradient step: as often as the process with most rows needs."""
        if not self.policy.is_split:
            return 0
        most = max(1, *map(len, self._shares(batch)))
        return 1 if rows is None else -(-most // rows)

    def entropies(self, batch: Rollout, fresh: bool = False) -> Tensor:
        """The policy's entropy at each step of a minibatch, ``[b, T]`` without gradient: one more pass.

        Where the whole minibatch is evaluated at once on the policy that wrote it, that evaluation is kept for the
        gradient step.
        """
        rows, share = self._micro_batch_size(len(batch)), self._share(batch)
        if fresh and share is None and (rows is None or rows >= len(batch)):
            if batch.evaluation is None:
                batch.evaluation = self.policy.evaluate(batch)
            return batch.evaluation.entropy.detach()
        found = evaluate_entropies(self.policy, batch, rows, share, self._passes(batch, rows))
        return self.processes.sum(found)

    def update(self, batch: Rollout, fresh: bool = False) -> dict[str, float]:
        """One gradient step on one minibatch, in micro-batches; returns what to log.

        On a GPU it waits for one transfer, that of the numbers which it returns. Of several processes each evaluates a
        share of the rows, and all take the same step.

        Args:
            batch: Rows of a rollout.
            fresh: No step has been taken since the rollout, so the old log-probabilities are the new ones.

        A step whose gradient is not finite is skipped and counted; its "grad_norm" shows it. An update that does not
        fit into memory is done again with fewer rows at once.

        Raises:
            FloatingPointError: The gradient was not finite ``max_skipped_updates`` times in a row.
            torch.OutOfMemoryError: A single row does not fit into memory.
        """
        self.optimizer.zero_grad()
        self.before_update(batch, fresh)
        weights = self.step_weights(batch)
        check_steps(f"loss_weights() of {type(self).__name__}", weights, batch.mask)
        rows = self._micro_batch_size(len(batch))
        names, totals, used = accumulate_within_memory(
            self.policy,
            self.optimizer,
            batch,
            self.loss,
            weights,
            rows,
            fresh,
            self._share(batch),
            self._passes(batch, rows),
        )
        if used != rows:
            self.micro_batch_size = self.init_kwargs["micro_batch_size"] = used
        extra = self.extra_loss()
        if extra is not None:
            (extra / self.processes.count).backward()
        if not self.policy.is_split:  # split gradients have been summed on the way
            self.processes.sum_gradients(self.policy.parameters())
        totals = self.processes.sum(totals)
        self.before_step()
        norm = clip_gradients(self.optimizer, self.policy, self.max_grad_norm)
        logged = dict(zip([*names, "grad_norm"], read_scalars(totals, norm), strict=True))
        if not math.isfinite(logged["grad_norm"]):
            what = find_non_finite(self.policy, batch, self.loss, weights, used)
            self.optimizer.zero_grad()
            when = f"at {self.num_timesteps:,} timesteps in gradient step {self.n_gradient_steps + 1:,}"
            self.skipped_updates.skip(what, when)
            return logged
        self.skipped_updates.taken()
        self.n_gradient_steps += 1
        if self.warmup_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = group["planned_lr"] * min(self.n_gradient_steps / self.warmup_steps, 1.0)
        self.optimizer.step()
        self.after_update(logged)
        return logged

    def should_stop(self, record: dict[str, float]) -> bool:
        """Whether to stop learning from this rollout, from what :meth:`update` has just returned."""
        return False

    # -- logging ---------------------------------------------------------------------------------------------

    def _log_training(self, rollout: Rollout, records: list[dict[str, float]], learning_rate: float) -> None:
        record = self.logger.record
        for name in records[0] if records else ():
            if name != "entropy":
                record(_LOG_NAMES.get(name, f"train/{name}"), float(np.mean([r[name] for r in records])))
        if records and "ratio" in records[0]:
            record("val/ratio_var", float(np.var([r["ratio"] for r in records])))
        if records:
            record("train/entropy_loss", -float(np.mean([r["entropy"] for r in records])))
        record("guard/skipped_updates", self.skipped_updates.total)
        record("train/learning_rate", learning_rate)
        record("train/n_updates", self.n_updates, exclude="tensorboard")
        if self.policy.has_critic:
            variance = maths.explained_variance(rollout.values, rollout.returns, rollout.mask)
            record("train/explained_variance", variance)
