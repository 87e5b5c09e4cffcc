"""Exact values, optima and gradients of environments small enough to enumerate."""

from textrl_env.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BestOfN": "textrl_env.exact.solver",
        "PolicyValue": "textrl_env.exact.solver",
        "Solution": "textrl_env.exact.solver",
        "TokenMDP": "textrl_env.exact.token_mdp",
        "best_of_n": "textrl_env.exact.solver",
        "evaluate": "textrl_env.exact.solver",
        "expected_kl": "textrl_env.exact.solver",
        "kl_divergence": "textrl_env.exact.solver",
        "log_softmax": "textrl_env.exact.solver",
        "sequence_distribution": "textrl_env.exact.solver",
        "solve": "textrl_env.exact.solver",
        "value_iteration": "textrl_env.exact.solver",
    },
)
