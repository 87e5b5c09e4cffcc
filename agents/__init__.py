"""Agents: REINFORCE, PPO, GRPO and the base for your own, with stable-baselines3's signatures.

They know environments only through Gymnasium and one optional fused method::

    from agents import PPO

    PPO("MlpPolicy", "CartPole-v1", seed=0).learn(100_000)
    PPO("auto", "TextRLHF-v0", seed=0).learn(200_000)

Importing the package alone loads no torch, so that ``textrl --help`` answers at once; the first name taken
from it does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.grpo import GRPO
    from agents.policies import CausalLMPolicy, Evaluation, MlpPolicy, Policy
    from agents.ppo import PPO
    from agents.reinforce import REINFORCE
    from agents.rollout import Rollout

#: Public names, and the module each is in.
_LAZY = {
    "GRPO": "agents.grpo",
    "PPO": "agents.ppo",
    "REINFORCE": "agents.reinforce",
    "Agent": "agents.base",
    "CausalLMPolicy": "agents.policies",
    "Evaluation": "agents.policies",
    "MlpPolicy": "agents.policies",
    "Policy": "agents.policies",
    "Rollout": "agents.rollout",
}

__all__ = [
    "GRPO",
    "PPO",
    "REINFORCE",
    "Agent",
    "CausalLMPolicy",
    "Evaluation",
    "MlpPolicy",
    "Policy",
    "Rollout",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
