"""Policies by name, and how one is made for an environment.

Both policies answer the same four calls, ``act``, ``evaluate``, ``stack`` and ``predict_values``, so an
algorithm never sees which one it trains. Dropout is off everywhere, always.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from agents.policies.base import Evaluation, Policy
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.mlp import MlpPolicy, encode, feature_size
from textrl_env.errors import check_keywords, did_you_mean
from textrl_env.lm.causal_lm import CausalLM

__all__ = [
    "POLICIES",
    "CausalLMPolicy",
    "Evaluation",
    "MlpPolicy",
    "Policy",
    "encode",
    "feature_size",
    "make_policy",
]

POLICIES: dict[str, type[Policy]] = {"MlpPolicy": MlpPolicy, "CausalLMPolicy": CausalLMPolicy}


def make_policy(
    policy: str | type[Policy], env: gym.vector.VectorEnv, critic: str | None, policy_kwargs: dict[str, Any]
) -> Policy:
    """Build a policy for an environment.

    Args:
        policy: "MlpPolicy", "CausalLMPolicy", "auto" (a language model where the env has one), or a class.
        env: The vector env.
        critic: One of the policy's kinds of critic, None, or "default" for the policy's own default.
        policy_kwargs: Passed on to the policy.
    """
    lm = _env_lm(env)
    if policy == "auto":
        policy = "MlpPolicy" if lm is None and "model" not in policy_kwargs else "CausalLMPolicy"
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} is not known. {did_you_mean(policy, [*POLICIES, 'auto'])}")
        policy = POLICIES[policy]
    kwargs = dict(policy_kwargs)
    if critic != "default":
        kwargs.setdefault("critic", critic)
    if issubclass(policy, CausalLMPolicy) and lm is not None:
        kwargs.setdefault("model", lm)
    check_keywords(policy.__name__, policy.__init__, kwargs)
    return policy(env.single_observation_space, env.single_action_space, **kwargs)


def _env_lm(env: gym.vector.VectorEnv) -> CausalLM | None:
    """The language model that an environment starts from, if it has one."""
    base = env.unwrapped
    if hasattr(base, "lm"):
        return base.lm
    inner = getattr(base, "envs", None)
    return getattr(inner[0].unwrapped, "lm", None) if inner else None
