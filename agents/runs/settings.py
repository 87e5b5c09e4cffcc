"""What is in force in a run: every setting, where it comes from, and what is trained.

``textrl train`` prints it at the start as one table and writes it into ``config.json``.
"""

from __future__ import annotations

from typing import Any

from agents import presets
from agents.algorithms.schedules import ScheduleFunction
from agents.arguments import argument_names, entries
from agents.base import Agent
from textrl_env.lm import checkpointing

#: Constructor arguments that are no hyper-parameters.
_OTHERS = (
    "policy",
    "env",
    "env_kwargs",
    "policy_kwargs",
    "tensorboard_log",
    "verbose",
    "seed",
    "device",
    "stats_window_size",
)
#: What a text environment was made with, by the names of its arguments and of its counts.
_TEXT_SETTINGS = (
    "kl_coef",
    "kl_estimator",
    "max_new_tokens",
    "max_prompt_length",
    "missing_eos_penalty",
    "prompts_skipped",
    "prompts_cut",
    "max_turns",
    "max_length",
)


def in_force(agent: Agent) -> dict[str, dict[str, Any]]:
    """Every setting that holds for an agent, the defaults too, as JSON.

    Returns:
        "trained": the column of :data:`agents.presets.DEFAULTS` and the numbers of weights; "agent": hyper-parameters;
        "policy": how a language model is loaded and trained, empty for any other policy; "env": what a text environment
        was made with, empty for any other.
    """
    weights = list(agent.policy.parameters())
    trained = {
        "preset": agent.preset,
        "weights": sum(p.numel() for p in weights),
        "trained_weights": sum(p.numel() for p in weights if p.requires_grad),
    }
    means_nothing = _without_meaning(agent)
    names = [name for name in _names(type(agent)) if name not in means_nothing]
    values = {name: _as_given(getattr(agent, name)) for name in names if hasattr(agent, name)}
    return {
        "trained": trained,
        "agent": {name: value for name, value in values.items() if _is_plain(value)},
        "policy": _policy_settings(agent.policy),
        "env": _env_settings(agent),
    }


def _names(cls: type) -> list[str]:
    """The hyper-parameters of a class of agents, its own first, then those of its bases."""
    return [name for name in argument_names(cls) if name not in _OTHERS]


def _without_meaning(agent: Agent) -> set[str]:
    """Arguments that nothing reads in this agent, on this environment."""
    names = set(agent.takes_no) | {"n_steps" if agent.collects_episodes else "n_episodes"}
    if not agent.policy.has_critic:
        names |= {"gae_lambda", "vf_coef", "critic", "critic_learning_rate"}
    if getattr(agent.policy, "engine", None) is None and not getattr(agent.policy, "sampling", None):
        names |= {name for name in _names(type(agent)) if name.startswith("importance_sampling_")} | {
            "generate_ahead"
        }
    if not agent.use_sde:
        names |= {"use_sde", "sde_sample_freq"}
    if agent.text_env is not None:
        names.add("n_envs")
    return names


def _as_given(value: Any) -> Any:
    return value.given if isinstance(value, ScheduleFunction) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _policy_settings(policy: Any) -> dict[str, Any]:
    lm = getattr(policy, "lm", None)
    if lm is None:
        return {}
    lora_rank = getattr(policy, "lora_rank", None)
    found = {"lora_rank": lora_rank} | ({} if lora_rank is None else {"lora_alpha": lm.alpha})
    return found | {
        "save_dtype": str(getattr(policy, "saved_dtype", lm.model.dtype)).removeprefix("torch."),
        "autocast": lm.autocast,
        "gradient_checkpointing": checkpointing.is_on(lm.body),
    }


def _env_settings(agent: Agent) -> dict[str, Any]:
    dynamics = getattr(getattr(agent.envs, "unwrapped", None), "dynamics", None)
    if not hasattr(dynamics, "lm"):
        return {}
    found = {name: getattr(dynamics, name) for name in _TEXT_SETTINGS if hasattr(dynamics, name)}
    found["temperature"] = dynamics.lm.temperature
    return found | ({"prompts": len(dynamics.prompt_tokens)} if hasattr(dynamics, "prompt_tokens") else {})


def origin(agent: Agent, name: str) -> str:
    """Where the value of a hyper-parameter comes from.

    "given", "preset" (by what is trained), "method" (part of it), "default", or "given rate": a learning rate that was
    given is kept constant, where a preset's has a schedule.
    """
    said = entries(type(agent)).get(name)
    if said is not None and said.fixed:
        return "method"
    if name in agent.init_kwargs:
        return "given"
    if name in presets.SCHEDULE and "learning_rate" in agent.init_kwargs:
        return "given rate"
    return "preset" if name in presets.DEFAULTS else "default"
