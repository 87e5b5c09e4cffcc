"""What users of stable-baselines3 expect of an agent: its environment, its logger, predict, save and load."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Self

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger, get_system_info
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, VecTransposeImage, is_vecenv_wrapped

from agents.algorithms.schedules import Schedule, schedule_value
from agents.arguments import argument_names
from agents.parallel.processes import Processes
from agents.policies.base import Policy
from agents.rollouts.episode_log import EpisodeLog
from agents.rollouts.sb3_envs import (
    ChannelsFirstVecEnv,
    TrainingVecEnv,
    VecEnvAsVectorEnv,
    layers_of,
    without_disguise,
)
from agents.rollouts.vector_envs import bind_policy, seed_action_spaces
from agents.runs import checkpoint
from agents.runs.archive import unpacked, write_archive
from textrl_env.errors import ArgumentError


class StableBaselines3Surface:
    """Methods of stable-baselines3's ``BaseAlgorithm`` that do not learn; :class:`~agents.base.Agent` adds the rest."""

    policy: Policy
    envs: gym.vector.VectorEnv | None
    text_env: Any
    last_obs: Any
    waiting: np.ndarray
    optimizer: torch.optim.Optimizer
    episodes: EpisodeLog
    learning_rate: Schedule
    total_timesteps: int | None
    _lr_multiplier: Callable[[float], float]
    rng: np.random.Generator
    seed: int
    verbose: int
    _vec_env: VecEnv | None
    _env_seed: int | None
    _seed_of_env: int
    _seeds_spaces: bool
    n_envs: int
    collects_episodes: bool
    _progress_remaining: float
    _logger: Logger | None
    _custom_logger: bool
    processes: Processes

    def set_up_env(self, env: str | gym.Env | gym.vector.VectorEnv) -> None:
        """Make ``env`` the vector env that the agent learns in."""
        raise NotImplementedError

    @property
    def logger(self) -> Logger:
        """stable-baselines3's logger."""
        if self._logger is None:
            main = self.processes.is_main
            self._logger = configure_logger(self.verbose, None, "", True) if main else Logger(None, [])
        return self._logger

    def set_logger(self, logger: Logger) -> None:
        """Log to this logger instead of one made from ``tensorboard_log``; of several processes the main one does."""
        self._logger = logger if self.processes.is_main else Logger(None, [])
        self._custom_logger = True

    @property
    def observation_space(self) -> gym.Space:
        """Of one environment."""
        return self.policy.observation_space

    @property
    def action_space(self) -> gym.Space:
        """Of one environment."""
        return self.policy.action_space

    @property
    def ep_info_buffer(self) -> deque[dict[str, float]]:
        """Return ``r``, length ``l`` and time ``t`` of the latest episodes, at most ``stats_window_size`` of them."""
        return self.episodes.infos

    @property
    def lr_schedule(self) -> Callable[[float], float]:
        """The learning rate as a function of the remaining progress, 1 at the start and 0 at the end."""
        return lambda progress: (
            schedule_value(self.learning_rate, progress) * self._lr_multiplier(1 - progress)
        )

    @property
    def _last_obs(self) -> Any:
        return self.last_obs

    @property
    def _total_timesteps(self) -> int | None:
        return self.total_timesteps

    @property
    def _current_progress_remaining(self) -> float:
        return self._progress_remaining

    def get_env(self) -> VecEnv | None:
        """The vector env that the agent learns in, as stable-baselines3 has it: ``reset()`` returns observations alone.

        A ``VecEnv`` that was given comes back as it is; Gymnasium's own vector env is ``agent.envs``. Where the policy
        reads images channels first, that is how this one shows them, as stable-baselines3's does.
        """
        if self.envs is None:
            return None
        if self._vec_env is None:
            given = isinstance(self.envs, VecEnvAsVectorEnv)
            vec_env = self.envs.vec_env if given else TrainingVecEnv(self.envs, self._forget_observation)
            turned = self.policy.turns_images and not is_vecenv_wrapped(vec_env, VecTransposeImage)
            self._vec_env = ChannelsFirstVecEnv(vec_env) if turned else vec_env
        return self._vec_env

    @property
    def env(self) -> VecEnv | None:
        """What :meth:`get_env` returns; Gymnasium's own vector env is ``agent.envs``."""
        return self.get_env()

    def _forget_observation(self) -> None:
        self.last_obs = None
        self.waiting[:] = False

    def set_env(self, env: str | gym.Env | gym.vector.VectorEnv | VecEnv, force_reset: bool = True) -> None:
        """Learn in another environment with the same spaces.

        Args:
            env: An id, an env or a vector env, stable-baselines3's included.
            force_reset: False goes on from the last observation, where ``env`` is the one that gave it.

        Raises:
            ValueError: Other spaces, or where a rollout is ``n_steps`` of each slot another number of slots (an
                AssertionError too, as in stable-baselines3).
        """
        old, last = self.envs, self.last_obs
        env = without_disguise(env)
        slots = env.num_envs if isinstance(env, (gym.vector.VectorEnv, VecEnv)) else self.n_envs
        if old is not None and not self.collects_episodes and slots != self.n_envs:
            raise ArgumentError(
                f"the new env has num_envs={slots}, expected {self.n_envs}, since a rollout is n_steps of each slot; "
                f"{type(self).__name__}.load(path, env=...) takes any number"
            )
        if isinstance(env, TrainingVecEnv):
            env = env.envs
        elif old is not None and isinstance(old, VecEnvAsVectorEnv) and old.vec_env is env:
            env = old
        self.set_up_env(env)
        if old is not None:
            for name in ("single_observation_space", "single_action_space"):
                if getattr(old, name) != getattr(self.envs, name):
                    raise ValueError(
                        f"the new env's {name} is {getattr(self.envs, name)}, expected {getattr(old, name)}"
                    )
        same = old is self.envs
        self.last_obs = last if same and not force_reset else None
        if not same:
            self._env_seed = self._seed_of_env
        if not self.policy.whole_episodes:
            self.text_env = None
        bind_policy(self.envs, self.policy.log_prob, self.policy.slot_log_prob)

    def close(self) -> None:
        """Close the environment."""
        if self.envs is not None:
            self.envs.close()

    def get_vec_normalize_env(self) -> VecNormalize | None:
        """The ``VecNormalize`` around the environment, if there is one."""
        if not isinstance(self.envs, VecEnvAsVectorEnv):
            return None
        return next(
            (layer for layer in layers_of(self.envs.vec_env) if isinstance(layer, VecNormalize)), None
        )

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything anew: the sampling, the data order, and the environment at its next reset."""
        if seed is None:
            return
        self.seed = int(seed)
        env_seed, weight_seed, action_seed, order_seed = np.random.SeedSequence(self.seed).generate_state(4)
        self._seed_of_env = self._env_seed = int(env_seed) % 2**31
        self.rng = np.random.default_rng(order_seed)
        self._seeds_spaces = True
        if self.envs is not None:
            seed_action_spaces(self.envs, self._seed_of_env)
        torch.manual_seed(int(weight_seed))
        self.policy.generator.manual_seed(int(action_seed))
        self.last_obs = None

    def get_parameters(self) -> dict[str, dict]:
        """State dicts of the policy and of its optimiser, under stable-baselines3's names."""
        return {"policy": self.policy.state_dict(), "policy.optimizer": self.optimizer.state_dict()}

    def set_parameters(
        self, load_path_or_dict: str | Path | dict[str, dict], exact_match: bool = True
    ) -> None:
        """Put back what :meth:`get_parameters` returned, or the weights of a checkpoint.

        Args:
            load_path_or_dict: State dicts by name, or a path that :meth:`save` wrote.
            exact_match: Whether everything has to be there; False changes what is given and leaves the rest.

        Raises:
            ValueError: A name that is unknown, or (with ``exact_match``) missing.
            RuntimeError: A state dict does not fit.
        """
        given = load_path_or_dict
        if not isinstance(given, dict):
            given = type(self).load(given).get_parameters()
        own = self.get_parameters()
        unknown, missing = sorted(set(given) - set(own)), sorted(set(own) - set(given))
        if unknown or (exact_match and missing):
            raise ValueError(
                f"parameters go by the names {sorted(own)}; unknown: {unknown or 'none'}, missing: {missing or 'none'}"
            )
        if "policy" in given:
            self.policy.load_state_dict(given["policy"], strict=exact_match)
            self.policy.weights_changed()
        if "policy.optimizer" in given:
            self.optimizer.load_state_dict(given["policy.optimizer"])

    def predict(
        self,
        observation: Any,
        state: tuple | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple | None]:
        """Actions for one observation or a batch of them.

        Args:
            observation: As the environment gives it, batched or not.
            state: Passed through; these policies keep none.
            episode_start: Ignored, for the same reason.
            deterministic: The most likely action instead of a sample.

        Returns:
            The action or actions, and ``state``.
        """
        return self.policy.predict(observation, state, episode_start, deterministic)

    def save(
        self,
        path: str | Path | IO[bytes],
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """Write a folder: a Hugging Face folder for a language model, safetensors and JSON for the rest.

        A small network under a name that ends in ".zip", or into an open file, is written as one file instead, the
        same folder in an archive.

        Args:
            path: Where.
            exclude: Constructor arguments to leave out; a name that is none is left out anyway.
            include: Constructor arguments to write all the same, also those that say what to log ("verbose").
        """
        chosen = {"exclude": tuple(exclude or ()), "include": tuple(include or ())}
        # Of several processes all call it, and the main one writes.
        self.processes.duties["state"] = lambda: checkpoint.learned_by_all(self)
        self.processes.on_main(lambda: self._save(path, **chosen))

    def _save(self, path: str | Path | IO[bytes], **chosen: tuple[str, ...]) -> None:
        stream = hasattr(path, "write")
        if not stream and (Path(path).suffix != ".zip" or hasattr(self.policy, "save_pretrained")):
            checkpoint.save(self, Path(path), **chosen)
            return
        if stream and hasattr(self.policy, "save_pretrained"):
            raise TypeError("a language model is saved as a folder: give save() a path, not an open file")
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(self, Path(folder), **chosen)
            write_archive(Path(folder), path if stream else Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: str | gym.Env | gym.vector.VectorEnv | None = None,
        *,
        trust_modules: Sequence[str] = (),
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load what :meth:`save` wrote.

        Args:
            path: The folder, or the archive of one; "m" and "m.zip" stand for each other.
            env: Where to go on learning; None loads for prediction only.
            trust_modules: Modules or ``.py`` files outside this project whose classes and functions the checkpoint
                may name; no others are imported.
            custom_objects: Constructor arguments that replace the saved ones, by name; names that are none are left
                out, as stable-baselines3 does.
            print_system_info: Print the versions of what is installed.
            force_reset: Start new episodes, also where the environment could go on in the saved ones.
            **kwargs: Constructor arguments that replace the saved ones.

        Raises:
            FileNotFoundError: There is no checkpoint.
            UntrustedNameError: It names code outside this project that ``trust_modules`` does not (an ImportError).
        """
        known = argument_names(cls)
        kwargs = {n: v for n, v in (custom_objects or {}).items() if n in known} | kwargs
        if print_system_info:
            get_system_info()
        env = without_disguise(env)
        if isinstance(env, TrainingVecEnv):
            env = env.envs
        with unpacked(path) as folder:
            agent = checkpoint.load(cls, folder, env, kwargs, trust_modules)
        if force_reset:
            agent._forget_observation()
        if agent.last_obs is not None:
            agent._env_seed = None  # it goes on in an episode that has been seeded
        return agent
