"""What users of stable-baselines3 expect of an agent: its environment, its logger, predict, save and load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger

from agents.policies.base import Policy
from agents.rollouts.observations import add_batch, copied, is_single
from agents.rollouts.vector_envs import bind_policy
from agents.runs import checkpoint


class StableBaselines3Surface:
    """Methods of stable-baselines3's ``BaseAlgorithm`` that do not learn; :class:`~agents.base.Agent` adds the rest."""

    policy: Policy
    env: gym.vector.VectorEnv | None
    text_env: Any
    last_obs: Any
    verbose: int
    _logger: Logger | None
    _custom_logger: bool

    def set_up_env(self, env: str | gym.Env | gym.vector.VectorEnv) -> None:
        """Make ``env`` the vector env that the agent learns in."""
        raise NotImplementedError

    @property
    def logger(self) -> Logger:
        """stable-baselines3's logger."""
        if self._logger is None:
            self._logger = configure_logger(self.verbose, None, "", True)
        return self._logger

    def set_logger(self, logger: Logger) -> None:
        """Log to this logger instead of one made from ``tensorboard_log``."""
        self._logger = logger
        self._custom_logger = True

    def get_env(self) -> gym.vector.VectorEnv | None:
        """The vector env that the agent learns in."""
        return self.env

    def set_env(self, env: str | gym.Env | gym.vector.VectorEnv) -> None:
        """Learn in another environment with the same spaces."""
        if self.env is None:
            self.set_up_env(env)
            bind_policy(self.env, self.policy.log_prob, self.policy.slot_log_prob)
            return
        old = self.env
        self.set_up_env(env)
        for name in ("single_observation_space", "single_action_space"):
            if getattr(old, name) != getattr(self.env, name):
                raise ValueError(
                    f"the new env's {name} is {getattr(self.env, name)}, expected {getattr(old, name)}"
                )
        self.last_obs = None
        if not self.policy.whole_episodes:
            self.text_env = None
        bind_policy(self.env, self.policy.log_prob, self.policy.slot_log_prob)

    def close(self) -> None:
        """Close the environment."""
        if self.env is not None:
            self.env.close()

    def get_vec_normalize_env(self) -> None:
        """There is none; stable-baselines3's CheckpointCallback asks."""
        return None

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
        single = is_single(self.policy.observation_space, observation)
        # The caller may write into what it has handed over; what a policy remembers must not change with it.
        observation = add_batch(copied(observation)) if single else copied(observation)
        actions = self.policy.to_env(self.policy.act(observation, deterministic)[0])
        return (actions[0] if single else actions), state

    def save(self, path: str | Path) -> None:
        """Write a folder: a Hugging Face folder for a language model, safetensors and JSON for the rest."""
        checkpoint.save(self, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: str | gym.Env | gym.vector.VectorEnv | None = None,
        *,
        trust_modules: Sequence[str] = (),
        **kwargs: Any,
    ) -> Self:
        """Load what :meth:`save` wrote.

        Args:
            path: The folder.
            env: Where to go on learning; None loads for prediction only.
            trust_modules: Modules or ``.py`` files outside this project whose classes and functions the checkpoint
                may name; no others are imported.
            **kwargs: Constructor arguments that replace the saved ones.

        Raises:
            FileNotFoundError: There is no checkpoint.
            UntrustedNameError: It names code outside this project that ``trust_modules`` does not (an ImportError).
        """
        return checkpoint.load(cls, Path(path), env, kwargs, trust_modules)
