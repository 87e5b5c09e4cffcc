"""Comparisons of two responses: how they are collected, and who judges."""

from textrl_env.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "OpenAIJudge": "agents.preferences.judges",
        "collect_preferences": "agents.preferences.collection",
    },
)
