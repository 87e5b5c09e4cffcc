"""Environments as an agent meets them: made from what the user gave, bound to the policy, seen through."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorEpisodeStatistics
from stable_baselines3.common.vec_env import VecEnv

from agents.rollouts.observations import add_batch
from agents.rollouts.sb3_envs import VecEnvAsVectorEnv, without_disguise
from reward_models import trust
from textrl_env.acting_policy import VectorActingPolicy
from textrl_env.protocols import BindsPolicy, ChargesKL, MovesReference, TextEnv
from textrl_env.sb3.vec_env import GymVecEnv


def make_envs(env: Any, num_envs: int, env_kwargs: dict[str, Any] | None = None) -> gym.vector.VectorEnv:
    """A Gymnasium vector env from an id, an env or a vector env, stable-baselines3's included.

    Ids of ours have a native vector env; other ids and single envs are stepped one after another under SAME_STEP
    autoreset, so that an id means what ``gym.make`` makes of it and every step counts.
    """
    env = without_disguise(env)
    if isinstance(env, gym.vector.VectorEnv):
        return env
    if isinstance(env, GymVecEnv):
        return env.envs
    if isinstance(env, VecEnv):
        return VecEnvAsVectorEnv(env)
    vector_kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    if isinstance(env, gym.Env):
        single = env if _takes_options(env) else _WithoutOptions(env)
        return gym.vector.SyncVectorEnv([lambda: single], **vector_kwargs)
    if not isinstance(env, str):
        raise TypeError(
            "env must be a Gymnasium id, an env or a vector env (Gymnasium's or stable-baselines3's), got "
            f"{type(env).__name__}"
        )
    spec = _spec(env)
    env = env.rpartition(":")[2]
    kwargs = env_kwargs or {}
    ours = str(spec.entry_point).startswith("textrl_env")
    if spec.vector_entry_point is not None and ours:
        return gym.make_vec(env, num_envs=num_envs, **kwargs)
    # Other packages' native vector envs are other environments than gym.make's (other observations, other episodes),
    # or their steps are not all real ones.
    return gym.make_vec(
        env, num_envs=num_envs, vectorization_mode="sync", vector_kwargs=vector_kwargs, **kwargs
    )


def _takes_options(env: gym.Env) -> bool:
    """Whether ``reset`` takes options, as Gymnasium's API has it since 0.26; older envs take a seed at most."""
    parameters = inspect.signature(env.unwrapped.reset).parameters.values()
    return any(p.name == "options" or p.kind is p.VAR_KEYWORD for p in parameters)


class _WithoutOptions(gym.Wrapper):
    """An env whose ``reset`` takes no options."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        if options:
            raise ValueError(f"{self.env} takes no options in reset(), got {options}")
        return self.env.reset(seed=seed)


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

    layer = env
    while isinstance(layer, gym.vector.VectorWrapper):
        if isinstance(layer, VectorActingPolicy):
            layer.bind_policy(log_prob)
            return
        layer = layer.env
    base = env.unwrapped
    if isinstance(base, gym.vector.AsyncVectorEnv) and base.metadata.get("charges_kl"):
        raise ValueError(
            f"{env} runs in worker processes, where an agent cannot tell it who acts, so its KL would be wrong; make "
            'it without vectorization_mode="async" (the native vector env steps all slots in one batch), or wrap it: '
            "textrl_env.ActingPolicy(envs)"
        )
    if isinstance(base, BindsPolicy):
        base.bind_policy(partial(single, 0) if isinstance(base, gym.Env) else log_prob)
    for slot, inner in enumerate(getattr(base, "envs", [])):
        if isinstance(inner.unwrapped, BindsPolicy):
            inner.unwrapped.bind_policy(partial(single, slot))


def seed_action_spaces(env: gym.vector.VectorEnv, seed: int) -> None:
    """Seed the action spaces too: there are environments that draw from ``action_space.sample()`` themselves."""
    found = [env.single_action_space, *(inner.action_space for inner in getattr(env.unwrapped, "envs", []))]
    for slot, space in enumerate({id(space): space for space in found}.values()):
        space.seed(seed + slot)


def start_option(env: gym.vector.VectorEnv) -> str | None:
    """The key of ``reset(options=...)`` that takes one start for each slot, or None.

    A vector env made of single envs hands the same options to each of them, so it has none.
    """
    return None if hasattr(env.unwrapped, "envs") else env.metadata.get("start_option")


def kl_envs(env: gym.vector.VectorEnv | None) -> list[Any]:
    """The environments of ours, the vector env itself or those inside it, that charge a KL."""
    layer = env
    while isinstance(layer, gym.vector.VectorWrapper):
        if isinstance(layer, VectorActingPolicy) and layer.corrects:
            return [layer]
        layer = layer.env
    base = None if env is None else env.unwrapped
    inside = [base, *(inner.unwrapped for inner in getattr(base, "envs", []))]
    return [each for each in inside if isinstance(each, ChargesKL)]


def movable_references(*envs: Any) -> list[MovesReference]:
    """What charges a KL against a language model in these environments, each once."""
    found = [getattr(each, "dynamics", None) for env in envs for each in kl_envs(env)]
    found += [getattr(getattr(env, "unwrapped", None), "dynamics", None) for env in envs]
    return list({id(each): each for each in found if isinstance(each, MovesReference)}.values())


def frozen_models(*envs: Any) -> list[torch.nn.Module]:
    """The models in these environments that nobody trains, each once: references and reward models."""
    charging = [each for env in envs for each in kl_envs(env)]
    charging += [getattr(env, "unwrapped", None) for env in envs]
    found = []
    for dynamics in (getattr(each, "dynamics", each) for each in charging):
        found += [getattr(getattr(dynamics, name, None), "model", None) for name in ("lm", "moved")]
        for reward in (getattr(dynamics, name, None) for name in ("reward", "gold")):
            found += (
                [getattr(leaf, "model", None) for leaf in reward.leaves()]
                if hasattr(reward, "leaves")
                else []
            )
    models = [model for model in found if isinstance(model, torch.nn.Module)]
    return list({id(model): model for model in models}.values())


def longest_episode(env: gym.vector.VectorEnv | None) -> int | None:
    """The most steps that an episode can have, by the task or by a time limit; None where nothing says."""
    if env is None:
        return None
    base = env.unwrapped
    for each in (base, *(inner.unwrapped for inner in getattr(base, "envs", []))):
        budget = getattr(getattr(each, "dynamics", None), "budget", None)
        if budget is not None:
            return budget
    limits = [getattr(base, "max_episode_steps", None), *(limit for limit, _ in _time_limits(env))]
    limits += [getattr(getattr(each, "spec", None), "max_episode_steps", None) for each in (env, base)]
    limits = [limit for limit in limits if limit is not None]
    return min(limits) if limits else None


def _time_limits(env: gym.vector.VectorEnv) -> list[tuple[int, gym.Env]]:
    """The limits of Gymnasium's TimeLimit around the single envs, each with its env."""
    found = []
    for inner in getattr(env.unwrapped, "envs", []):
        layer = inner
        while isinstance(layer, gym.Wrapper):
            if isinstance(layer, gym.wrappers.TimeLimit):
                found.append((layer._max_episode_steps, inner))
            layer = layer.env
    return found


def check_time_limits(env: gym.vector.VectorEnv) -> None:
    """Raise a ValueError for a TimeLimit that would cut responses off before they are scored."""
    for limit, inner in _time_limits(env):
        dynamics = getattr(inner.unwrapped, "dynamics", None)
        budget = getattr(dynamics, "budget", None)
        if budget is not None and limit < budget:
            raise ValueError(
                f"a TimeLimit of {limit} steps would cut responses off before they are scored; the budget of this "
                f"environment is {dynamics.budget_argument}={budget}: set {dynamics.budget_argument}={limit} instead"
            )


def tell_trainer_state(envs: Iterable[Any], state: Any) -> None:
    """Tell environments of texts, and those inside them, how far training is: their rewards may ask for it."""
    for env in envs:
        base = None if env is None else env.unwrapped
        for each in (base, *(inner.unwrapped for inner in getattr(base, "envs", []))):
            if hasattr(each, "trainer_state"):
                each.trainer_state = state


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
