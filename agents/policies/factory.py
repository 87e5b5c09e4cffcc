"""Policies by name, and how one is made for an environment.

Every policy answers the same four calls, ``act``, ``evaluate``, ``stack`` and ``predict_values``, so an
algorithm never sees which one it trains. Dropout is off everywhere, always.
"""

from __future__ import annotations

import inspect
from typing import Any

import gymnasium as gym
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)

from agents.policies.base import Evaluation, Policy
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.extractor import CnnPolicy, ExtractorPolicy, has_image
from agents.policies.features import feature_size
from agents.policies.mlp import MlpPolicy
from textrl_env.errors import ArgumentError, check_keywords, did_you_mean
from textrl_env.lm.causal_lm import CausalLM

__all__ = [
    "POLICIES",
    "CausalLMPolicy",
    "Evaluation",
    "MlpPolicy",
    "Policy",
    "feature_size",
    "make_policy",
]

POLICIES: dict[str, type[Policy]] = {
    "MlpPolicy": MlpPolicy,
    "CnnPolicy": CnnPolicy,
    "MultiInputPolicy": ExtractorPolicy,
    "CausalLMPolicy": CausalLMPolicy,
}


#: Arguments of stable-baselines3's policies that are left out, with the values that ask for nothing.
_LEFT_OUT = {"squash_output": False, "use_expln": False, "full_std": True}


#: stable-baselines3's own classes by the names of ours that do the same.
_SB3_NAMES: dict[Any, str] = {
    ActorCriticPolicy: "MlpPolicy",
    ActorCriticCnnPolicy: "CnnPolicy",
    MultiInputActorCriticPolicy: "MultiInputPolicy",
}


def make_policy(
    policy: str | type[Policy], env: gym.vector.VectorEnv, critic: str | None, policy_kwargs: dict[str, Any]
) -> Policy:
    """Build a policy for an environment.

    Args:
        policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", "CausalLMPolicy", or "auto" (a language model where the
            env has one, convolutions where it shows images), or a class.
        env: The vector env.
        critic: One of the policy's kinds of critic, None, or "default" for the policy's own default.
        policy_kwargs: Passed on to the policy.
    """
    lm = _env_lm(env)
    policy = _SB3_NAMES.get(policy, policy)
    if isinstance(policy, str):
        policy = _policy_class(policy, env.single_observation_space, lm, policy_kwargs)
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise TypeError(
            f"policy must be one of {[*POLICIES, 'auto']} or a subclass of agents.Policy, got {policy!r}"
        )
    kwargs = dict(policy_kwargs)
    if kwargs.get("net_arch", ()) is None:
        del kwargs["net_arch"]  # stable-baselines3's word for the default
    if critic != "default":
        kwargs.setdefault("critic", critic)
    if issubclass(policy, CausalLMPolicy) and lm is not None:
        kwargs.setdefault("model", lm)
    for name, nothing in _LEFT_OUT.items():
        if kwargs.pop(name, nothing) is not nothing:
            raise ArgumentError(
                f"policy_kwargs: {name} is left out here; of stable-baselines3's state-dependent exploration there is "
                "use_sde=True with a standard deviation of its own for each hidden unit and action"
            )
    if policy in (MlpPolicy, CnnPolicy, ExtractorPolicy):
        own, theirs = (inspect.signature(each.__init__).parameters for each in (policy, CausalLMPolicy))
        of_models = [name for name in kwargs if name in theirs and name not in own]
        if of_models:
            raise TypeError(f"{policy.__name__} takes no {', '.join(of_models)}: that is for language models")
    check_keywords(policy.__name__, policy.__init__, kwargs)
    return policy(env.single_observation_space, env.single_action_space, **kwargs)


def _policy_class(
    name: str, space: gym.Space, lm: CausalLM | None, policy_kwargs: dict[str, Any]
) -> type[Policy]:
    """The class that a name means in an environment with these observations."""
    nested = isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple))
    if name == "auto":
        if lm is not None or "model" in policy_kwargs:
            return CausalLMPolicy
        name = "MlpPolicy" if not has_image(space) else "MultiInputPolicy" if nested else "CnnPolicy"
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is not known. {did_you_mean(name, [*POLICIES, 'auto'])}")
    if name == "MultiInputPolicy" and not nested:
        raise ValueError(
            f'policy="MultiInputPolicy" takes Dict and Tuple observations, got {space}; use "MlpPolicy"'
        )
    if (
        name == "MultiInputPolicy"
        and not has_image(space)
        and "features_extractor_class" not in policy_kwargs
    ):
        return MlpPolicy  # no image: all parts in one vector, which acts faster
    if name == "MlpPolicy" and "features_extractor_class" in policy_kwargs:
        return ExtractorPolicy
    return POLICIES[name]


def _env_lm(env: gym.vector.VectorEnv) -> CausalLM | None:
    """The language model that an environment starts from, if it has one."""
    base = env.unwrapped
    if hasattr(base, "lm"):
        return base.lm
    inner = getattr(base, "envs", None)
    return getattr(inner[0].unwrapped, "lm", None) if inner else None
