"""Infos that are numbers, the same ones in every step, for replay buffers that want a fixed shape.

Our infos follow Gymnasium: texts stand beside numbers, and what is known at the end of an episode comes at its end.
A library that stacks the infos of every step into arrays (Tianshou's buffers, TorchRL's info readers) wants neither::

    env = textrl_env.NumericInfo(gym.make("TextRLHF-v0"))

Wrapped around a vector env it is a :class:`VectorNumericInfo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

#: What environments of texts say in numbers, and of what type: of a step, of an end, and of a start.
NUMBERS: dict[str, type] = {
    "ref_logprob": float,
    "kl": float,
    "score": float,
    "kl_sum": float,
    "response_length": int,
    "prompt_id": int,
}
#: Said at the start of an episode, and true until its end.
_KEPT = "prompt_id"


class NumericInfo(gym.Wrapper):
    """Hands on some numbers of an env's infos, each in every step, 0 where the env does not say it.

    Args:
        env: A single env, or a vector env (which makes it a :class:`VectorNumericInfo`).
        keys: Which; floats where :data:`NUMBERS` does not say otherwise.
    """

    def __new__(cls, env: gym.Env | gym.vector.VectorEnv, keys: Sequence[str] = tuple(NUMBERS)) -> Any:
        if isinstance(env, gym.vector.VectorEnv):
            return VectorNumericInfo(env, keys)
        return super().__new__(cls)

    def __init__(self, env: gym.Env, keys: Sequence[str] = tuple(NUMBERS)) -> None:
        super().__init__(env)
        self._zeros = {key: NUMBERS.get(key, float)() for key in keys}
        self._kept: dict[str, Any] = {}

    def reset(self, **kwargs: Any):
        observation, info = self.env.reset(**kwargs)
        self._kept = {key: info[key] for key in self._zeros if key == _KEPT and key in info}
        return observation, self._numbers(info)

    def step(self, action: Any):
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, self._numbers(info)

    def _numbers(self, info: dict[str, Any]) -> dict[str, Any]:
        said = self._zeros | self._kept | info
        return {key: type(zero)(said[key]) for key, zero in self._zeros.items()}


class VectorNumericInfo(gym.vector.VectorWrapper):
    """The same for a vector env: arrays ``[N]``, ``_key`` masks beside them saying where the env said it.

    Under SAME_STEP autoreset the numbers of an end stand among the others, with the ``prompt_id`` of the episode that
    ended; ``final_obs`` stays as it is and ``final_info`` is left out.
    """

    def __init__(self, env: gym.vector.VectorEnv, keys: Sequence[str] = tuple(NUMBERS)) -> None:
        super().__init__(env)
        self._dtypes = {key: np.dtype(NUMBERS.get(key, float)) for key in keys}
        self._kept = np.zeros(env.num_envs, dtype=np.int64)

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        observations, infos = self.env.reset(seed=seed, options=options)
        self._keep(infos)
        return observations, self._numbers([infos], self._kept)

    def step(self, actions: Any):
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        before = self._kept.copy()
        self._keep(infos)
        # The slots that have an end in ``final_info`` say there what belongs to the step; outside is the new start.
        ended = infos.get("final_info", {})
        numbers = self._numbers([infos, ended], before if ended else self._kept)
        numbers |= {name: infos[name] for name in ("final_obs", "_final_obs") if name in infos}
        return observations, rewards, terminated, truncated, numbers

    def _keep(self, infos: dict[str, Any]) -> None:
        if _KEPT in infos:
            self._kept = np.where(infos[f"_{_KEPT}"], infos[_KEPT], self._kept)

    def _numbers(self, sources: list[dict[str, Any]], kept: np.ndarray) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for key, dtype in self._dtypes.items():
            array, real = np.zeros(self.num_envs, dtype=dtype), np.zeros(self.num_envs, dtype=bool)
            if key == _KEPT:
                array[:], real[:] = kept, True
            else:
                for source in sources:
                    said = np.asarray(source.get(f"_{key}", np.zeros(self.num_envs, dtype=bool)))
                    array[said] = np.asarray(source.get(key, array))[said]
                    real |= said
            numbers[key], numbers[f"_{key}"] = array, real
        return numbers
