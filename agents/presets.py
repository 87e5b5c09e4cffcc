"""Defaults by what is trained: one table, and the one place where a default that depends on it becomes a number.

A rate that is right for a network from scratch, or for the embedded world's 228,288 weights, wrecks a pre-trained model
in one update. So a hyper-parameter of the table is None in the signatures, and :func:`resolve` takes its value when the
policy is made, from Python and from the command line alike. What was given stays as it was given, 0 and None too.

What may be trained:

- ``network``: an MLP or a table, from scratch;
- ``embedded``: the embedded world's language model and what was made from it, with or without LoRA: the values that the
  figures of the README were measured with;
- ``full``: every weight of any other language model;
- ``lora``: LoRA adapters over any other language model.

Left out: ``max_new_tokens`` and ``max_prompt_length``, which are the environment's (``TextRLHF-v0``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from textrl_env import embedded


class ByModel(NamedTuple):
    """A default for each of the things that may be trained."""

    network: Any
    embedded: Any
    full: Any
    lora: Any


#: Stands for :func:`fitting_rows`.
FITTING = "what fits"
#: Memory that what a gradient step keeps for its backward pass should stay below, in bytes.
ACTIVATIONS = 4 * 2**30

#: Hyper-parameter -> agent -> default; an agent that is not listed has that of its nearest base.
#:
#: Learning rates of language models as in TRL 1.16 (GRPO and RLOO 1e-6; its last PPO 3e-6), ten times more for LoRA
#: ("LoRA Without Regret", Schulman et al. 2025). Warm-up and cosine as in OpenRLHF. Micro-batches are
#: as large as memory bears; no loss depends on them.
DEFAULTS: dict[str, dict[str, ByModel]] = {
    "learning_rate": {
        "Agent": ByModel(network=3e-4, embedded=3e-4, full=1e-6, lora=1e-5),
        "PPO": ByModel(network=3e-4, embedded=3e-4, full=3e-6, lora=3e-5),
        "GRPO": ByModel(network=1e-3, embedded=1e-3, full=1e-6, lora=1e-5),
        "REINFORCE": ByModel(network=1e-3, embedded=1e-3, full=1e-6, lora=1e-5),
    },
    "lr_scheduler_type": {"Agent": ByModel("constant", "constant", "cosine", "cosine")},
    "warmup_ratio": {"Agent": ByModel(0.0, 0.0, 0.03, 0.03)},
    "micro_batch_size": {"Agent": ByModel(None, None, FITTING, FITTING)},
    "n_epochs": {"Agent": ByModel(1, 1, 1, 1), "PPO": ByModel(10, 4, 4, 4)},
    # Of a value head; a critic with a body of its own has SEPARATE_CRITIC_LEARNING_RATE.
    "critic_learning_rate": {"Agent": ByModel(None, 1e-2, 3e-3, 3e-3)},
    "critic_gae_lambda": {"PPO": ByModel(None, 1.0, 1.0, 1.0)},
    "critic_warmup": {"PPO": ByModel(0, 0, 0, 0)},
}
#: What the preset's learning rate goes by, and one that was given does not.
SCHEDULE = ("lr_scheduler_type", "warmup_ratio")
#: Trainer on files -> argument -> default. Rates of supervised fine-tuning and DPO as in TRL 1.16.
ON_FILES: dict[str, dict[str, ByModel]] = {
    "sft": {"learning_rate": ByModel(network=None, embedded=2e-3, full=2e-5, lora=2e-4)},
    "reward": {
        "learning_rate": ByModel(network=None, embedded=1e-3, full=1e-5, lora=1e-4),
        "epochs": ByModel(network=None, embedded=3.0, full=1.0, lora=1.0),
    },
    "dpo": {"learning_rate": ByModel(network=None, embedded=3e-4, full=1e-6, lora=1e-5)},
}
#: Ten times the policy's, as in OpenRLHF; in the embedded world that of the policy.
SEPARATE_CRITIC_LEARNING_RATE = ByModel(network=None, embedded=None, full=1e-5, lora=1e-4)


def what_is_trained(policy: Any) -> str:
    """The column of :data:`DEFAULTS` that a policy belongs to."""
    lm = getattr(policy, "lm", None)
    if lm is None:
        return "network"
    return _column(lm.tokenizer, getattr(policy, "lora_rank", None))


def _column(tokenizer: Any, lora_rank: int | None) -> str:
    if embedded.is_embedded_tokenizer(tokenizer):
        return "embedded"
    return "full" if lora_rank is None else "lora"


def on_files(trainer: str, name: str, tokenizer: Any, lora_rank: int | None) -> Any:
    """The default of an argument of a trainer on files, from Python and from the command line.

    Args:
        trainer: A key of :data:`ON_FILES`.
        name: An argument.
        tokenizer: The model's, which tells whether it is one of the embedded world's.
        lora_rank: None where every weight is trained.
    """
    return getattr(ON_FILES[trainer][name], _column(tokenizer, lora_rank))


def describe_on_files(trainer: str, name: str) -> str:
    """What help says of such a default."""
    row = ON_FILES[trainer][name]
    lora = "" if row.lora == row.full else f", with LoRA {row.lora:g}"
    return f"{row.full:g}{lora}; {row.embedded:g} with the embedded models"


def default(name: str, agent: type, column: str) -> Any:
    """One value of the table.

    Args:
        name: A hyper-parameter in :data:`DEFAULTS`.
        agent: A class of agents; the nearest of its bases that has a row counts.
        column: What is trained, see :func:`what_is_trained`.
    """
    rows = DEFAULTS[name]
    nearest = next((base.__name__ for base in agent.__mro__ if base.__name__ in rows), None)
    return None if nearest is None else getattr(rows[nearest], column)


def fitting_rows(policy: Any) -> int:
    """Rows of a language model's gradient step that keep below :data:`ACTIVATIONS`, at least 1.

    A token keeps about eight vectors of the hidden and four of the inner size in every layer, in float32. Gradient
    checkpointing and autocast keep less; what does not fit after all is done again with half the rows.
    """
    config = policy.lm.model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner
    length = policy.observation_space["input_ids"].shape[0]
    per_row = 4 * config.num_hidden_layers * (8 * hidden + 4 * inner) * length
    return max(int(ACTIVATIONS // per_row), 1)


def resolve(agent: Any) -> str:
    """Give every hyper-parameter of the table that was left out its value; returns what is trained."""
    from agents.algorithms.schedules import schedule_value  # loads torch, and the table is read for --help

    column = what_is_trained(agent.policy)
    if agent.learning_rate is not None and agent.lr_scheduler_type is None:
        # A rate or a schedule that was given is taken as it was given.
        agent.lr_scheduler_type = "constant"
        agent.warmup_ratio = agent.warmup_ratio or 0.0
    for name in DEFAULTS:
        if not hasattr(agent, name):
            continue
        value = default(name, type(agent), column)
        if name == "critic_learning_rate" and getattr(agent.policy, "critic", None) == "separate":
            value = getattr(SEPARATE_CRITIC_LEARNING_RATE, column)
        if name == "critic_learning_rate" and value is not None:
            # A rate that was given, for a small model say, may be above that: the critic would lag behind the policy.
            value = max(value, schedule_value(agent.learning_rate, 1.0))
        if value == FITTING:
            value = fitting_rows(agent.policy)
        # Where None means something (all rows at once), it counts if it was given.
        means_something = any({None, FITTING} & set(row) for row in DEFAULTS[name].values())
        if getattr(agent, name) is None and not (means_something and name in agent.init_kwargs):
            setattr(agent, name, value)
    return column


def before_0_2(agent: Any) -> dict[str, Any]:
    """The table as it was when checkpoints did not hold it (0.1): every language model had the embedded world's."""
    column = "network" if agent.preset == "network" else "embedded"
    critic = {"critic_learning_rate": None, "critic_gae_lambda": None, "critic_warmup": 0}
    return {name: default(name, type(agent), column) for name in DEFAULTS if hasattr(agent, name)} | critic
