"""stable-baselines3's vector envs as Gymnasium's, so that an agent learns in ``VecNormalize(make_vec_env(...))``.

The other direction, a Gymnasium vector env as stable-baselines3 takes it, is
:class:`textrl_env.sb3.vec_env.GymVecEnv`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecTransposeImage

from textrl_env.sb3.vec_env import GymVecEnv


class VecEnvAsVectorEnv(gym.vector.VectorEnv):
    """A ``VecEnv`` of stable-baselines3 as a Gymnasium vector env with SAME_STEP autoreset.

    Args:
        vec_env: Any, wrapped or not (``VecNormalize``, ``VecMonitor``, ``VecFrameStack``, ...).

    Attributes:
        vec_env: What was given.
        envs: The single envs inside, where they live in this process.

    Raises:
        ValueError: Its environments charge a KL and run in worker processes, where no policy can be bound to them.
    """

    def __init__(self, vec_env: VecEnv) -> None:
        self.vec_env = vec_env
        self.num_envs = vec_env.num_envs
        base = vec_env.unwrapped
        if isinstance(base, DummyVecEnv):
            self.envs = base.envs
        elif any((getattr(m, "get", lambda _: None)("charges_kl")) for m in _metadata_of(base)):
            raise ValueError(
                f"{vec_env} runs in worker processes, where an agent cannot tell the environment who acts, so its KL "
                "would be wrong; use DummyVecEnv, or gym.make_vec, which steps all slots in one batch"
            )
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = vec_env.observation_space
        self.single_action_space = vec_env.action_space
        self.observation_space = batch_space(vec_env.observation_space, self.num_envs)
        self.action_space = batch_space(vec_env.action_space, self.num_envs)
        self.render_mode = vec_env.render_mode

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        if isinstance(seed, (int, np.integer)):
            self.vec_env.seed(int(seed))
        elif seed is not None:
            self.vec_env.unwrapped._seeds = list(seed)  # one for each slot, which VecEnv.seed does not take
        if options is not None:
            self.vec_env.set_options(options)
        observations = self.vec_env.reset()
        infos: dict[str, Any] = {}
        for slot, info in enumerate(self.vec_env.reset_infos):
            infos = self._add_info(infos, info, slot)
        return observations, infos

    def step(self, actions: np.ndarray):
        observations, rewards, dones, rows = self.vec_env.step(actions)
        dones = np.array(dones, dtype=bool)
        cut = np.zeros(self.num_envs, dtype=bool)
        infos: dict[str, Any] = {}
        ends: dict[str, Any] = {}
        final_obs = np.full(self.num_envs, None, dtype=object)
        for slot, row in enumerate(rows):
            own = {name: value for name, value in row.items() if name not in _OF_SB3}
            if dones[slot]:
                cut[slot] = bool(row.get("TimeLimit.truncated", False))
                final_obs[slot] = row.get("terminal_observation")
                ends = self._add_info(ends, own, slot)
            else:
                infos = self._add_info(infos, own, slot)
        if dones.any():
            infos |= {"final_obs": final_obs, "_final_obs": dones.copy()}
            infos |= {"final_info": ends, "_final_info": dones.copy()}
        return observations, np.array(rewards, dtype=np.float64), dones & ~cut, cut, infos

    def render(self):
        return tuple(self.vec_env.get_images())

    def close(self, **kwargs: Any) -> None:
        self.vec_env.close()

    def get_state(self) -> dict[str, np.ndarray]:
        """Nothing: what a ``VecEnv`` and its wrappers hold is not ours to read."""
        return {}

    def set_state(self, state: dict[str, np.ndarray]) -> None:
        """Refuse, so that a resumed run starts new episodes and says so."""
        raise ValueError(
            "a VecEnv of stable-baselines3 does not give its state away (save VecNormalize yourself)"
        )


class TrainingVecEnv(GymVecEnv):
    """The env that an agent learns in, as stable-baselines3 hands it out.

    Whoever resets or steps it ends the episode that the agent was in, so the agent starts a new one.

    Args:
        envs: The agent's vector env.
        forget: Called when it is reset or stepped.
    """

    def __init__(self, envs: gym.vector.VectorEnv, forget: Callable[[], None]) -> None:
        super().__init__(envs, real_steps_only=False)
        self._forget = forget
        self.single_observation_space, self.single_action_space = self.observation_space, self.action_space

    @property
    def unwrapped(self) -> Any:
        """The Gymnasium vector env within all wrappers, whose attributes are there too."""
        return self.envs.unwrapped

    def __getattr__(self, name: str) -> Any:
        if name == "envs" or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        owner = self.envs if hasattr(self.envs, name) else self.envs.unwrapped
        return getattr(owner, name)

    def reset(self):
        self._forget()
        return super().reset()

    def step_wait(self):
        self._forget()
        return super().step_wait()


class ChannelsFirstVecEnv(VecTransposeImage):
    """The env that an agent learns in with its images as the policy reads them, channels first."""


def without_disguise(env: Any) -> Any:
    """What :class:`ChannelsFirstVecEnv` was put around, which is what the agent learns in; anything else as it is."""
    return env.venv if isinstance(env, ChannelsFirstVecEnv) else env


_OF_SB3 = ("terminal_observation", "TimeLimit.truncated")


def _metadata_of(base: VecEnv) -> list[Any]:
    try:
        return base.get_attr("metadata")
    except Exception:  # a VecEnv of one's own need not have any
        return []


def layers_of(vec_env: VecEnv) -> list[VecEnv]:
    """A ``VecEnv`` and all that it wraps, from the outside in."""
    layers = [vec_env]
    while isinstance(layers[-1], VecEnvWrapper):
        layers.append(layers[-1].venv)
    return layers
