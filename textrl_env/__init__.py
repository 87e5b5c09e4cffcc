"""Reinforcement learning on language models, through Gymnasium.

Importing this package registers every environment id and loads neither torch nor transformers::

    import gymnasium as gym
    import textrl_env

    env = gym.make("TextRLHF-v0")
"""

from __future__ import annotations

from gymnasium.envs.registration import register

__version__ = "0.1.0"

#: Every id this package registers, in the order of ``textrl envs``.
ENV_IDS = ("TextRLHF-v0", "ToyBandit-v0", "LineWorld-v0", "GridWorld-v0", "TokenTree-v0")

register(
    id="TextRLHF-v0",
    entry_point="textrl_env.text_rlhf:TextRLHFEnv",
    vector_entry_point="textrl_env.text_rlhf:TextRLHFVectorEnv",
)
register(
    id="ToyBandit-v0",
    entry_point="textrl_env.bandit:ToyBanditEnv",
    vector_entry_point="textrl_env.bandit:ToyBanditVectorEnv",
)
register(
    id="LineWorld-v0",
    entry_point="textrl_env.line_world:LineWorldEnv",
    vector_entry_point="textrl_env.line_world:LineWorldVectorEnv",
    max_episode_steps=50,
)
register(
    id="GridWorld-v0",
    entry_point="textrl_env.grid_world:GridWorldEnv",
    vector_entry_point="textrl_env.grid_world:GridWorldVectorEnv",
    max_episode_steps=100,
)
register(
    id="TokenTree-v0",
    entry_point="textrl_env.token_tree:TokenTreeEnv",
    vector_entry_point="textrl_env.token_tree:TokenTreeVectorEnv",
)
