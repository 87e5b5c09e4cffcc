"""Agents: REINFORCE, PPO, GRPO and the base for your own, with stable-baselines3's signatures.

They know environments only through Gymnasium and one optional fused method::

    from agents import PPO

    PPO("MlpPolicy", "CartPole-v1", seed=0).learn(100_000)
    PPO("auto", "TextRLHF-v0", seed=0).learn(200_000)
"""

from __future__ import annotations

from agents.base import Agent
from agents.grpo import GRPO
from agents.policies import CausalLMPolicy, Evaluation, MlpPolicy, Policy
from agents.ppo import PPO
from agents.reinforce import REINFORCE
from agents.rollout import Rollout

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
