"""What writes the responses that a policy learns from: our own decoder, or an engine behind one small protocol."""

from textrl_env.lazy import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Generated": "textrl_env.generators.answers",
        "GeneratorError": "textrl_env.generators.answers",
        "Sampling": "textrl_env.generators.sampling",
        "make_generator": "textrl_env.generators.registry",
    },
)
