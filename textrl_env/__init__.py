"""Reinforcement learning on language models, through Gymnasium.

Importing this package registers every environment id and loads neither torch nor transformers::

    import gymnasium as gym
    import textrl_env

    env = gym.make("TextRLHF-v0")
"""

from __future__ import annotations

from gymnasium.envs.registration import register

from textrl_env.lazy import lazy_names, moved_modules

__version__ = "0.1.0"

#: Every id this package registers, in the order of ``textrl envs``.
ENV_IDS = ("TextRLHF-v0", "ToyBandit-v0", "LineWorld-v0", "GridWorld-v0", "TokenTree-v0", "TextGame-v0")

register(
    id="TextRLHF-v0",
    entry_point="textrl_env.envs.text_rlhf:TextRLHFEnv",
    vector_entry_point="textrl_env.envs.text_rlhf:TextRLHFVectorEnv",
)
register(
    id="ToyBandit-v0",
    entry_point="textrl_env.envs.bandit:ToyBanditEnv",
    vector_entry_point="textrl_env.envs.bandit:ToyBanditVectorEnv",
)
register(
    id="LineWorld-v0",
    entry_point="textrl_env.envs.line_world:LineWorldEnv",
    vector_entry_point="textrl_env.envs.line_world:LineWorldVectorEnv",
    max_episode_steps=50,
)
register(
    id="GridWorld-v0",
    entry_point="textrl_env.envs.grid_world:GridWorldEnv",
    vector_entry_point="textrl_env.envs.grid_world:GridWorldVectorEnv",
    max_episode_steps=100,
)
register(
    id="TokenTree-v0",
    entry_point="textrl_env.envs.token_tree:TokenTreeEnv",
    vector_entry_point="textrl_env.envs.token_tree:TokenTreeVectorEnv",
)

register(
    id="TextGame-v0",
    entry_point="textrl_env.envs.text_game:TextGameEnv",
    vector_entry_point="textrl_env.envs.text_game:TextGameVectorEnv",
)

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ActingPolicy": "textrl_env.acting_policy",
        "VectorActingPolicy": "textrl_env.acting_policy",
        "NumericInfo": "textrl_env.numeric_info",
        "VectorNumericInfo": "textrl_env.numeric_info",
    },
)

# Where things were in version 0.1.
moved_modules(
    {
        "textrl_env.bandit": "textrl_env.envs.bandit",
        "textrl_env.decoding": "textrl_env.lm.decoding",
        "textrl_env.grid_world": "textrl_env.envs.grid_world",
        "textrl_env.language_model": "textrl_env.lm.causal_lm",
        "textrl_env.line_world": "textrl_env.envs.line_world",
        "textrl_env.llama": "textrl_env.lm.fused_llama",
        "textrl_env.precision": "textrl_env.lm.precision",
        "textrl_env.prompts": "textrl_env.data.prompts",
        "textrl_env.records": "reward_models.data.rows",
        "textrl_env.sb3_vec_env": "textrl_env.sb3.vec_env",
        "textrl_env.shared_prompts": "textrl_env.lm.shared_prompts",
        "textrl_env.teacher_forcing": "textrl_env.lm.teacher_forcing",
        "textrl_env.text_rlhf": "textrl_env.envs.text_rlhf",
        "textrl_env.token_mdp": "textrl_env.exact.token_mdp",
        "textrl_env.token_tree": "textrl_env.envs.token_tree",
    }
)
