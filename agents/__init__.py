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
    from agents.exact_gap import ExactGapCallback
    from agents.grpo import GRPO
    from agents.kl_control import AdaptiveKL, AnnealKL
    from agents.policies import CausalLMPolicy, Evaluation, MlpPolicy, Policy
    from agents.ppo import PPO
    from agents.ptx import PPOptx
    from agents.reinforce import REINFORCE
    from agents.rollout import Rollout
    from agents.tabular import TabularPolicy
    from agents.variants import CISPO, DAPO, GSPO, RLOO, DrGRPO, REINFORCEPlusPlus

#: Public names, and the module each is in.
_LAZY = {
    "CISPO": "agents.variants",
    "DAPO": "agents.variants",
    "GRPO": "agents.grpo",
    "GSPO": "agents.variants",
    "PPO": "agents.ppo",
    "REINFORCE": "agents.reinforce",
    "RLOO": "agents.variants",
    "AdaptiveKL": "agents.kl_control",
    "Agent": "agents.base",
    "AnnealKL": "agents.kl_control",
    "CausalLMPolicy": "agents.policies",
    "DrGRPO": "agents.variants",
    "Evaluation": "agents.policies",
    "ExactGapCallback": "agents.exact_gap",
    "MlpPolicy": "agents.policies",
    "PPOptx": "agents.ptx",
    "Policy": "agents.policies",
    "REINFORCEPlusPlus": "agents.variants",
    "Rollout": "agents.rollout",
    "TabularPolicy": "agents.tabular",
}

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "PPO",
    "REINFORCE",
    "RLOO",
    "AdaptiveKL",
    "Agent",
    "AnnealKL",
    "CausalLMPolicy",
    "DrGRPO",
    "Evaluation",
    "ExactGapCallback",
    "MlpPolicy",
    "PPOptx",
    "Policy",
    "REINFORCEPlusPlus",
    "Rollout",
    "TabularPolicy",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agents' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
