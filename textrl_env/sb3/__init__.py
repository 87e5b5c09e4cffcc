"""Policies and a vector env that let stable-baselines3's own agents train on text."""

from textrl_env.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CausalLMActorCriticPolicy": "textrl_env.sb3.policy",
        "GymVecEnv": "textrl_env.sb3.vec_env",
        "SlotRolloutBuffer": "textrl_env.sb3.policy",
        "TextRLHFCallback": "textrl_env.sb3.policy",
        "bind_policy": "textrl_env.sb3.policy",
    },
)
