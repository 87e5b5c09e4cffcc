"""A checker for native vector environments, which Gymnasium does not have.

The yardstick is Gymnasium's own ``SyncVectorEnv`` over single environments: same seeds, same actions, then
everything that ``reset`` and ``step`` return must be equal, infos and their masks included.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

NUM_ENVS = 5


def make_native(
    env_id: str, mode: AutoresetMode = AutoresetMode.SAME_STEP, num_envs: int = NUM_ENVS, **kwargs
):
    """The vector env of the registry's ``vector_entry_point``."""
    envs = gym.make_vec(
        env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", autoreset_mode=mode, **kwargs
    )
    return bind_uniform(envs)


def make_sync(env_id: str, mode: AutoresetMode = AutoresetMode.SAME_STEP, **kwargs) -> SyncVectorEnv:
    """As many single envs behind Gymnasium's own vector env."""
    return SyncVectorEnv(
        [lambda: bind_uniform(gym.make(env_id, **kwargs)) for _ in range(NUM_ENVS)], autoreset_mode=mode
    )


def bind_uniform(env):
    """Tell an env that charges a KL who acts here: a uniformly random policy."""
    inner = env.unwrapped
    if not hasattr(inner, "bind_policy"):
        return env
    if isinstance(inner, gym.vector.VectorEnv):
        uniform = -np.log(inner.single_action_space.n)
        inner.bind_policy(lambda observations, actions: np.full(len(actions), uniform))
    else:
        inner.bind_policy(lambda observation, action: -np.log(inner.action_space.n))
    return env


def assert_same(given: Any, expected: Any, where: str, tolerance: float = 0.0) -> None:
    """Equality of nested dicts, sequences, arrays and scalars, dtypes and info masks included.

    Exact, unless ``tolerance`` allows floats to differ: a language model's last digits change with the batch.
    """
    if isinstance(expected, dict):
        assert isinstance(given, dict), f"{where}: {type(given).__name__} instead of a dict"
        assert set(given) == set(expected), f"{where}: keys {sorted(given)} instead of {sorted(expected)}"
        for name in expected:
            assert_same(given[name], expected[name], f"{where}[{name!r}]", tolerance)
    elif isinstance(expected, (tuple, list)) or (
        isinstance(expected, np.ndarray) and expected.dtype == object
    ):
        assert len(given) == len(expected), where
        for i, (a, b) in enumerate(zip(given, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]", tolerance)
    else:
        a, b = np.asarray(given), np.asarray(expected)
        assert a.dtype.kind == b.dtype.kind and a.shape == b.shape, f"{where}: {a!r} instead of {b!r}"
        close = tolerance > 0 and a.dtype.kind == "f"
        same = (
            np.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
            if close
            else np.array_equal(a, b)
        )
        assert same, f"{where}: {given!r} instead of {expected!r}"


def check_against_sync(
    env_id: str, mode: AutoresetMode, steps: int = 300, tolerance: float = 0.0, **kwargs
) -> int:
    """Step both for ``steps`` with random actions and compare everything; returns the episodes that ended."""
    native, sync = make_native(env_id, mode, **kwargs), make_sync(env_id, mode, **kwargs)
    rng = np.random.default_rng(0)
    assert_same(native.reset(seed=7), sync.reset(seed=7), "reset")
    episodes = 0
    for step in range(steps):
        actions = rng.integers(native.single_action_space.n, size=NUM_ENVS)
        given, expected = native.step(actions), sync.step(actions)
        assert_same(given, expected, f"step {step}", tolerance)
        done = given[2] | given[3]
        episodes += int(done.sum())
        if mode is AutoresetMode.DISABLED and done.any():
            # Each its own options: SyncVectorEnv takes the mask out of the dict it is given.
            given, expected = (envs.reset(options={"reset_mask": done.copy()}) for envs in (native, sync))
            assert_same(given, expected, f"reset after step {step}", tolerance)
    return episodes


def play(envs, actions: np.ndarray) -> list[tuple]:
    """What each step returned."""
    return [envs.step(row) for row in actions]
