"""What a policy is worth on held-out prompts, and pictures of it."""

from textrl_env.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "EvaluationResult": "agents.evaluation.evaluation",
        "evaluate_policy": "agents.evaluation.evaluation",
        "heldout_env": "agents.evaluation.evaluation",
        "win_rate": "agents.evaluation.evaluation",
    },
)
