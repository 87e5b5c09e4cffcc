"""Any Gymnasium vector env as stable-baselines3 takes it; see :mod:`textrl_env.sb3.policy`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

#: Methods of a vector env that return one row for each slot; sb3-contrib's MaskablePPO asks for this one.
_ROW_METHODS = ("action_masks",)


class GymVecEnv(VecEnv):
    """A Gymnasium vector env as stable-baselines3 takes it; no Monitor is needed.

    Each slot's info is a dict of its own with ``TimeLimit.truncated``; the last one of an episode also has
    ``terminal_observation``, what Gymnasium puts in ``final_info``, and ``episode`` (return ``r``, length
    ``l``, seconds since construction ``t``), from which ``rollout/ep_rew_mean`` is made.

    Under NEXT_STEP autoreset the step after the end of an episode is its reset: its action is ignored, its reward 0,
    and it counts in no episode. To train with stable-baselines3's own agents, which would learn from that step, take
    SAME_STEP (or ``real_steps_only``, which refuses anything else).

    Args:
        envs: Any Gymnasium vector env, wrapped or not.
        real_steps_only: Refuse a vector env whose steps are not all real ones.

    Raises:
        ValueError: ``real_steps_only``, and NEXT_STEP or DISABLED autoreset.
    """

    def __init__(self, envs: gym.vector.VectorEnv, real_steps_only: bool = True) -> None:
        mode = envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        self.mode = AutoresetMode(mode)
        if real_steps_only and self.mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"GymVecEnv needs SAME_STEP autoreset, this env has autoreset_mode={mode}; make it with "
                'gym.make_vec(..., vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}), or with '
                'autoreset_mode="SameStep" where the vector env is native'
            )
        self._waiting = np.zeros(envs.num_envs, dtype=bool)
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
        self._returns[:], self._lengths[:], self._waiting[:] = 0.0, 0, False
        self.reset_infos = split_infos(infos, self.num_envs)
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
        dones = np.array(terminated | truncated, dtype=bool)
        real = ~self._waiting
        self._returns += np.where(real, rewards, 0.0)
        self._lengths += real
        final_obs, rows = self._split(observations, dones, infos)
        resets = {}
        if self.mode is AutoresetMode.DISABLED and dones.any():
            observations, reset_infos = self.envs.reset(options={"reset_mask": dones})
            resets = dict(enumerate(split_infos(reset_infos, self.num_envs)))
        self._waiting = dones if self.mode is AutoresetMode.NEXT_STEP else np.zeros_like(dones)
        for slot in np.flatnonzero(dones):
            row, following = rows[slot]
            self.reset_infos[slot] = resets.get(slot, following)
            row["terminal_observation"] = final_obs[slot]
            row["episode"] = self.reset_infos[slot].pop("episode", None) or {
                "r": float(self._returns[slot]),
                "l": int(self._lengths[slot]),
                "t": round(time.time() - self._start, 6),
            }
        infos = [row for row, _ in rows]
        for row, cut in zip(infos, (truncated & ~terminated).tolist(), strict=True):
            row["TimeLimit.truncated"] = cut
        self._returns[dones], self._lengths[dones] = 0.0, 0
        # Callers write into what they get: stable-baselines3 bootstraps in place.
        return _copy(observations), np.array(rewards, dtype=np.float32), dones, infos

    def _split(self, observations: Any, dones: np.ndarray, infos: dict[str, Any]) -> tuple[Any, list]:
        """The last observations of ended episodes by slot; and of each slot its info and that of its reset."""
        if self.mode is not AutoresetMode.SAME_STEP:
            final = {int(slot): _row(observations, slot) for slot in np.flatnonzero(dones)}
            return final, [(row, {}) for row in split_infos(infos, self.num_envs)]
        final_infos = split_infos(infos.get("final_info", {}), self.num_envs)
        ended = ("final_obs", "_final_obs", "final_info", "_final_info")
        rows = split_infos({name: v for name, v in infos.items() if name not in ended}, self.num_envs)
        # Of a slot that has just been reset, the outer info belongs to the next episode.
        pairs = zip(rows, final_infos, dones, strict=True)
        return infos.get("final_obs"), [(last, row) if done else (row, {}) for row, last, done in pairs]

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
        if method_name in _ROW_METHODS and self._owner(method_name) is not None:
            rows = getattr(self._owner(method_name), method_name)(*method_args, **method_kwargs)
            return [rows[slot] for slot in self._get_indices(indices)]
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
        return {name: _copy(value) for name, value in observations.items()}
    if isinstance(observations, tuple):
        return tuple(map(_copy, observations))
    return np.array(observations)


def _row(observations: Any, slot: int) -> Any:
    """A copy of one observation out of a batch."""
    if isinstance(observations, dict):
        return {name: _row(value, slot) for name, value in observations.items()}
    if isinstance(observations, tuple):
        return tuple(_row(value, slot) for value in observations)
    return np.array(observations[slot])


def split_infos(infos: dict[str, Any], num_envs: int) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays with ``_key`` masks -> one dict for each slot."""
    rows: list[dict[str, Any]] = [{} for _ in range(num_envs)]
    for name, values in infos.items():
        if name.startswith("_") and name[1:] in infos:
            continue
        mask = infos.get(f"_{name}")
        slots: Iterable[int] = range(num_envs) if mask is None else np.flatnonzero(mask).tolist()
        if isinstance(values, dict):
            values = split_infos(values, num_envs)
        elif isinstance(values, np.ndarray) and values.ndim == 1:
            values = values.tolist()  # Python scalars, all at once
        for slot in slots:
            rows[slot][name] = values[slot]
    return rows
