"""Environments as an agent meets them: made from what the user gave, bound to the policy, seen through."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorEpisodeStatistics

from agents.rollouts.observations import add_batch
from reward_models import trust
from textrl_env.protocols import BindsPolicy, ChargesKL, TextEnv


def make_envs(
    env: Any, num_envs: int, env_kwargs: dict[str, Any] | None = None, seeded_slots: bool = False
) -> gym.vector.VectorEnv:
    """A Gymnasium vector env from an id, an env or a vector env.

    Ids with a native vector env use it; other ids and single envs are stepped one after another under
    SAME_STEP autoreset. ``seeded_slots`` asks for one that can start several slots alike.
    """
    if isinstance(env, gym.vector.VectorEnv):
        return env
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    if isinstance(env, gym.Env):
        return gym.vector.SyncVectorEnv([lambda: env], **vector_kwargs)
    if not isinstance(env, str):
        raise TypeError(f"env must be a Gymnasium id, an env or a vector env, got {type(env).__name__}")
    spec = _spec(env)
    env = env.rpartition(":")[2]
    ours = str(spec.entry_point).startswith("textrl_env")
    if spec.vector_entry_point is not None and (ours or not seeded_slots):
        return gym.make_vec(env, num_envs=num_envs, **(env_kwargs or {}))
    return gym.make_vec(
        env,
        num_envs=num_envs,
        vectorization_mode="sync",
        vector_kwargs=vector_kwargs,
        **(env_kwargs or {}),
    )


def has_fused_way(env_id: str) -> bool:
    """Whether the native vector env of an id can run whole episodes at once."""
    entry_point = _spec(env_id).vector_entry_point
    factory = (
        gym.envs.registration.load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    )
    return hasattr(factory, "run_episodes")


def _spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The spec of an id; of Gymnasium's form "module:id" the module is imported first."""
    module, _, name = env_id.rpartition(":")
    trust.check_module(module or "textrl_env", f" (for the environment {env_id!r})")
    importlib.import_module(module or "textrl_env")
    spec = gym.spec(name)
    for entry in (spec.entry_point, spec.vector_entry_point):
        _check_entry_point(env_id, entry)
    return spec


def _check_entry_point(env_id: str, entry: Any) -> None:
    """Where an id comes from a file, its class must be trusted too; Gymnasium's own always is."""
    owner = entry.partition(":")[0] if isinstance(entry, str) else getattr(entry, "__module__", None)
    if owner is not None and owner.partition(".")[0] != "gymnasium":
        trust.check_module(owner, f" (for the environment {env_id!r})")


def bind_policy(
    env: gym.Env | gym.vector.VectorEnv,
    log_prob: Callable[[Any, np.ndarray], np.ndarray],
    slot_log_prob: Callable[[int, Any, Any], float] | None = None,
) -> None:
    """Tell environments that charge a KL who acts: this one, or the single envs inside it.

    Args:
        env: An env or a vector env.
        log_prob: ``log_prob(observations, actions) -> [N]``, of batches.
        slot_log_prob: ``slot_log_prob(slot, observation, action)``, of one observation out of the last batch; None
            asks ``log_prob`` for a batch of one.
    """

    def single(slot: int, observation: Any, action: Any) -> float:
        if slot_log_prob is not None:
            return slot_log_prob(slot, observation, action)
        return log_prob(add_batch(observation), np.asarray(action)[None])[0]

    base = env.unwrapped
    if isinstance(base, BindsPolicy):
        base.bind_policy(partial(single, 0) if isinstance(base, gym.Env) else log_prob)
    for slot, inner in enumerate(getattr(base, "envs", [])):
        if isinstance(inner.unwrapped, BindsPolicy):
            inner.unwrapped.bind_policy(partial(single, slot))


def start_option(env: gym.vector.VectorEnv) -> str | None:
    """The key of ``reset(options=...)`` that takes one start for each slot, or None.

    A vector env made of single envs hands the same options to each of them, so it has none.
    """
    return None if hasattr(env.unwrapped, "envs") else env.metadata.get("start_option")


def kl_envs(env: gym.vector.VectorEnv | None) -> list[Any]:
    """The environments of ours, the vector env itself or those inside it, that charge a KL."""
    base = None if env is None else env.unwrapped
    inside = [base, *(inner.unwrapped for inner in getattr(base, "envs", []))]
    return [each for each in inside if isinstance(each, ChargesKL)]


#: Wrappers that change neither tokens nor rewards, so that the fused way may go past them.
_TRANSPARENT = (
    gym.wrappers.OrderEnforcing,
    gym.wrappers.PassiveEnvChecker,
    gym.wrappers.RecordEpisodeStatistics,
    VectorEpisodeStatistics,
)


def fused_env(env: Any) -> TextEnv | None:
    """The environment with ``run_episodes`` inside ``env``, unless a wrapper in between changes something."""
    while not isinstance(env, str) and hasattr(env, "env") and isinstance(env, _TRANSPARENT):
        env = env.env
    return env if isinstance(env, TextEnv) else None
