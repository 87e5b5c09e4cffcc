"""Any Gymnasium vector env as stable-baselines3 takes it; see :mod:`textrl_env.sb3.policy`.

Left out: vector envs with another autoreset mode than SAME_STEP, whose steps are not all real ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv


class GymVecEnv(VecEnv):
    """A Gymnasium vector env as stable-baselines3 takes it; no Monitor is needed.

    Each slot's info is a dict of its own with ``TimeLimit.truncated``; the last one of an episode also has
    ``terminal_observation``, what Gymnasium puts in ``final_info``, and ``episode`` (return ``r``, length
    ``l``, seconds since construction ``t``), from which ``rollout/ep_rew_mean`` is made.

    Args:
        envs: Any Gymnasium vector env (wrapped or not) with SAME_STEP autoreset, the default of the ones here.

    Raises:
        ValueError: Another autoreset mode, in which the step after an episode's end is not a real one.
    """

    def __init__(self, envs: gym.vector.VectorEnv) -> None:
        mode = envs.metadata.get("autoreset_mode")
        if mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"GymVecEnv needs SAME_STEP autoreset, this env has autoreset_mode={mode}; make it with "
                'gym.make_vec(..., vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}), or with '
                'autoreset_mode="SameStep" where the vector env is native'
            )
        self.envs = envs
        self._vector_options: dict[str, Any] | None = None
        self._actions: np.ndarray | None = None
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, dtype=np.int64)
        self._start = time.time()
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

    def reset(self):
        seeds = None if all(seed is None for seed in self._seeds) else self._seeds
        observations, infos = self.envs.reset(seed=seeds, options=self._vector_options)
        self._reset_seeds()
        self.set_options()
        self._returns[:], self._lengths[:] = 0.0, 0
        self.reset_infos = _split_infos(infos, self.num_envs)
        return _copy(observations)

    def set_options(self, options: list[dict] | dict | None = None) -> None:
        """Options of the next reset.

        Args:
            options: A dict, handed to the vector env as it is (so it may hold one start state for each slot),
                or one dict for each slot.

        Raises:
            ValueError: The dicts differ, and the env is not one that takes a start state for each slot.
        """
        super().set_options(options)
        if isinstance(options, list):
            options = self._merge_options(options)
        self._vector_options = options or None

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self):
        observations, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        dones = np.asarray(terminated | truncated)
        self._returns += rewards
        self._lengths += 1
        final_obs = infos.get("final_obs")
        final_infos = _split_infos(infos.get("final_info", {}), self.num_envs)
        ended = ("final_obs", "_final_obs", "final_info", "_final_info")
        infos = {name: value for name, value in infos.items() if name not in ended}
        rows = _split_infos(infos, self.num_envs)
        for slot in np.flatnonzero(dones):
            # Of a slot that has just been reset, the outer info belongs to the next episode.
            self.reset_infos[slot], rows[slot] = rows[slot], final_infos[slot]
            rows[slot]["terminal_observation"] = final_obs[slot]
            rows[slot]["episode"] = self.reset_infos[slot].pop("episode", None) or {
                "r": float(self._returns[slot]),
                "l": int(self._lengths[slot]),
                "t": round(time.time() - self._start, 6),
            }
        for row, cut in zip(rows, (truncated & ~terminated).tolist(), strict=True):
            row["TimeLimit.truncated"] = cut
        self._returns[dones], self._lengths[dones] = 0.0, 0
        # Callers write into what they get: stable-baselines3 bootstraps in place.
        return _copy(observations), np.array(rewards, dtype=np.float32), dones, rows

    def close(self) -> None:
        self.envs.close()

    def render(self, mode: str | None = None):
        if self.render_mode in (None, "human", "rgb_array"):
            return super().render(mode)
        return self.envs.render()

    def get_images(self):
        return list(self.envs.render())

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """One value for each of ``indices``: the vector env's own attribute, or the sub-envs'."""
        slots = list(self._get_indices(indices))
        if (owner := self._owner(attr_name)) is not None:
            return [getattr(owner, attr_name)] * len(slots)
        if hasattr(self.envs.unwrapped, "get_attr"):
            values = self.envs.unwrapped.get_attr(attr_name)
            return [values[slot] for slot in slots]
        raise AttributeError(f"{self.envs} has no attribute {attr_name!r}")

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the vector env, or of all of its sub-envs."""
        self._check_all(attr_name, indices)
        if (owner := self._owner(attr_name)) is None and hasattr(self.envs.unwrapped, "set_attr"):
            self.envs.unwrapped.set_attr(attr_name, value)
        else:
            setattr(owner or self.envs.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *method_args, indices: Any = None, **method_kwargs) -> list[Any]:
        """Call a method of the vector env (once, for all slots) or of its sub-envs; one result for each slot."""
        if (owner := self._owner(method_name)) is not None:
            self._check_all(method_name, indices)
            return [getattr(owner, method_name)(*method_args, **method_kwargs)] * self.num_envs
        if hasattr(self.envs.unwrapped, "call"):
            self._check_all(method_name, indices)
            return list(self.envs.unwrapped.call(method_name, *method_args, **method_kwargs))
        raise AttributeError(f"{self.envs} has no method {method_name!r}")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """Whether a vector wrapper of that class is there; it counts as a Monitor, whose work it does."""
        layer, found = self.envs, issubclass(wrapper_class, Monitor)
        while not found and isinstance(layer, gym.vector.VectorWrapper):
            found, layer = isinstance(layer, wrapper_class), layer.env
        return [found] * len(list(self._get_indices(indices)))

    def _owner(self, name: str) -> Any:
        """The outermost of the wrappers and the vector env that has the attribute ``name``, or None."""
        layer = self.envs
        while isinstance(layer, gym.vector.VectorWrapper):
            if name in vars(layer) or hasattr(type(layer), name):
                break
            layer = layer.env
        return layer if hasattr(layer, name) else None

    def _check_all(self, name: str, indices: Any) -> None:
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(
                f"{name!r} belongs to all {self.num_envs} slots at once, got indices={indices!r}; leave indices out"
            )

    def _merge_options(self, options: list[dict]) -> dict[str, Any]:
        """One dict for each slot -> one dict of one value for each slot."""
        if len(options) != self.num_envs:
            raise ValueError(f"set_options() got {len(options)} dicts for num_envs={self.num_envs}")
        names = {name for each in options for name in each}
        if names and "start_option" not in self.envs.metadata:
            raise ValueError(
                "this vector env takes the same options for all slots: give set_options() a dict, not a list"
            )
        return {name: [each.get(name) for each in options] for name in sorted(names)}


def _copy(observations: Any) -> Any:
    """Observations that the env will not write into again."""
    if isinstance(observations, dict):
        return {name: np.array(value) for name, value in observations.items()}
    return np.array(observations)


def _split_infos(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays with ``_key`` masks -> one dict for each slot."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_") and name[1:] in infos:
            continue
        mask = infos.get(f"_{name}")
        slots: Iterable[int] = range(num_envs) if mask is None else np.flatnonzero(mask).tolist()
        if isinstance(values, dict):
            values = _split_infos(values, num_envs)
        elif isinstance(values, np.ndarray) and values.ndim == 1:
            values = values.tolist()  # Python scalars, all at once
        for slot in slots:
            rows[slot][name] = values[slot]
    return rows
