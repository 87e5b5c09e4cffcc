"""Agents: REINFORCE, PPO, GRPO and the base for your own, with stable-baselines3's signatures.

They know environments only through Gymnasium and one optional fused method::

    from agents import PPO

    PPO("MlpPolicy", "CartPole-v1", seed=0).learn(100_000)
    PPO("auto", "TextRLHF-v0", seed=0).learn(200_000)

Importing the package alone loads no torch, so that ``textrl --help`` answers at once; the first name taken
from it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textrl_env.lazy import lazy_names, moved_modules

if TYPE_CHECKING:
    from agents.algorithms.gigpo import GiGPO
    from agents.algorithms.grpo import GRPO
    from agents.algorithms.grpo_variants import CISPO, DAPO, GSPO, RLOO, DrGRPO, REINFORCEPlusPlus
    from agents.algorithms.ppo import PPO
    from agents.algorithms.ppo_ptx import PPOptx
    from agents.algorithms.reinforce import REINFORCE
    from agents.base import Agent
    from agents.callbacks.evaluation import EvalCallback
    from agents.callbacks.exact_gap import ExactGapCallback
    from agents.callbacks.guards import Guards
    from agents.callbacks.kl_control import AdaptiveKL, AnnealKL, StopAtKL
    from agents.policies.base import Evaluation, Policy
    from agents.policies.causal_lm import CausalLMPolicy
    from agents.policies.mlp import MlpPolicy
    from agents.policies.tabular import TabularPolicy
    from agents.rollouts.rollout import Rollout

#: Public names, and the module each is in.
_LAZY = {
    "CISPO": "agents.algorithms.grpo_variants",
    "DAPO": "agents.algorithms.grpo_variants",
    "GRPO": "agents.algorithms.grpo",
    "GSPO": "agents.algorithms.grpo_variants",
    "GiGPO": "agents.algorithms.gigpo",
    "PPO": "agents.algorithms.ppo",
    "REINFORCE": "agents.algorithms.reinforce",
    "RLOO": "agents.algorithms.grpo_variants",
    "AdaptiveKL": "agents.callbacks.kl_control",
    "Agent": "agents.base",
    "AnnealKL": "agents.callbacks.kl_control",
    "CausalLMPolicy": "agents.policies.causal_lm",
    "DrGRPO": "agents.algorithms.grpo_variants",
    "EvalCallback": "agents.callbacks.evaluation",
    "Evaluation": "agents.policies.base",
    "ExactGapCallback": "agents.callbacks.exact_gap",
    "Guards": "agents.callbacks.guards",
    "MlpPolicy": "agents.policies.mlp",
    "PPOptx": "agents.algorithms.ppo_ptx",
    "Policy": "agents.policies.base",
    "REINFORCEPlusPlus": "agents.algorithms.grpo_variants",
    "Rollout": "agents.rollouts.rollout",
    "StopAtKL": "agents.callbacks.kl_control",
    "TabularPolicy": "agents.policies.tabular",
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
    "EvalCallback",
    "Evaluation",
    "ExactGapCallback",
    "GiGPO",
    "Guards",
    "MlpPolicy",
    "PPOptx",
    "Policy",
    "REINFORCEPlusPlus",
    "Rollout",
    "StopAtKL",
    "TabularPolicy",
]


__getattr__, __dir__ = lazy_names(__name__, _LAZY)

# Where things were in version 0.1.
moved_modules(
    {
        "agents.causal_lm": "agents.policies.causal_lm",
        "agents.checkpoint": "agents.runs.checkpoint",
        "agents.collect": "agents.rollouts.collectors",
        "agents.curves": "agents.evaluation.plots",
        "agents.dpo": "agents.offline.dpo",
        "agents.env_state": "agents.runs.env_state",
        "agents.envs": "agents.rollouts.vector_envs",
        "agents.episodes": "agents.rollouts.episode_log",
        "agents.exact_gap": "agents.callbacks.exact_gap",
        "agents.grpo": "agents.algorithms.grpo",
        "agents.heatmap": "agents.evaluation.token_heatmap",
        "agents.heatmap_image": "agents.evaluation.token_heatmap_image",
        "agents.judges": "agents.preferences.judges",
        "agents.kl_control": "agents.callbacks.kl_control",
        "agents.locate": "agents.runs.registry",
        "agents.lora": "agents.policies.lora",
        "agents.maths": "agents.algorithms.maths",
        "agents.memory": "agents.process",
        "agents.mlp": "agents.policies.mlp",
        "agents.offline_callbacks": "agents.offline.callbacks",
        "agents.policy": "agents.policies.base",
        "agents.ppo": "agents.algorithms.ppo",
        "agents.preference_data": "agents.offline.preference_data",
        "agents.preference_losses": "agents.offline.preference_losses",
        "agents.progress": "agents.callbacks.progress",
        "agents.ptx": "agents.algorithms.ppo_ptx",
        "agents.reinforce": "agents.algorithms.reinforce",
        "agents.rollout": "agents.rollouts.rollout",
        "agents.sft": "agents.offline.sft",
        "agents.tabular": "agents.policies.tabular",
        "agents.threads": "agents.process",
        "agents.variants": "agents.algorithms.grpo_variants",
    }
)
