"""What acts: networks, language models, adapters and tables, all one :class:`~agents.policies.base.Policy`."""

from textrl_env.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CausalLMPolicy": "agents.policies.causal_lm",
        "Evaluation": "agents.policies.base",
        "MlpPolicy": "agents.policies.mlp",
        "POLICIES": "agents.policies.factory",
        "Policy": "agents.policies.base",
        "TabularPolicy": "agents.policies.tabular",
        "make_policy": "agents.policies.factory",
    },
)
