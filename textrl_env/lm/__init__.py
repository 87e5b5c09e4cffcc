"""What runs a language model: loading, decoding with a cache, and reading finished sequences in one pass."""

from textrl_env.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CausalLM": "textrl_env.lm.causal_lm",
        "ENVIRONMENT": "textrl_env.lm.sequences",
        "POLICY": "textrl_env.lm.sequences",
        "PROMPT": "textrl_env.lm.sequences",
        "Sequences": "textrl_env.lm.sequences",
        "SlotDecoder": "textrl_env.lm.slot_decoder",
        "generate": "textrl_env.lm.decoding",
    },
)
