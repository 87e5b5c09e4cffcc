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

from agents.algorithms import methods
from textrl_env.lazy import lazy_names, moved_modules

if TYPE_CHECKING:
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

#: Public names, and the module each is in; the methods are those of the table in :mod:`agents.algorithms.methods`.
_LAZY = methods.exports() | {
    "AdaptiveKL": "agents.callbacks.kl_control",
    "Agent": "agents.base",
    "AnnealKL": "agents.callbacks.kl_control",
    "CausalLMPolicy": "agents.policies.causal_lm",
    "EvalCallback": "agents.callbacks.evaluation",
    "Evaluation": "agents.policies.base",
    "ExactGapCallback": "agents.callbacks.exact_gap",
    "Guards": "agents.callbacks.guards",
    "MlpPolicy": "agents.policies.mlp",
    "Policy": "agents.policies.base",
    "Rollout": "agents.rollouts.rollout",
    "StopAtKL": "agents.callbacks.kl_control",
    "TabularPolicy": "agents.policies.tabular",
}

__all__ = [
    "AdaptiveKL",
    "Agent",
    "AnnealKL",
    "CausalLMPolicy",
    "EvalCallback",
    "Evaluation",
    "ExactGapCallback",
    "Guards",
    "MlpPolicy",
    "Policy",
    "Rollout",
    "StopAtKL",
    "TabularPolicy",
]
__all__ += methods.exports()


__getattr__, __dir__ = lazy_names(__name__, _LAZY)

# Where things were in version 0.1, and before methods had a file each.
moved_modules(
    {
        "agents.algorithms.gigpo": "agents.algorithms.methods.gigpo",
        "agents.algorithms.grpo_variants": "agents",
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
        "agents.variants": "agents",
    }
)
