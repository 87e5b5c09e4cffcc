"""A language model that says, token by token, what a policy should have written."""

from __future__ import annotations

from agents.policies.base import Policy
from textrl_env.errors import ArgumentError
from textrl_env.lm.causal_lm import CausalLM


def load_teacher(teacher: str | CausalLM | None, policy: Policy, owner: str) -> CausalLM:
    """A teacher, frozen, on the policy's device and at its temperature.

    Args:
        teacher: Folder or hub id of a language model with the policy's vocabulary, or one that is loaded.
        policy: The student.
        owner: Name of the method, for errors.

    Raises:
        ValueError: There is no teacher, its vocabulary is another one, or the policy has no language model.
    """
    if not hasattr(policy, "lm"):
        raise ArgumentError(
            f"{owner} distils language models, and {type(policy).__name__} is none; use a text environment"
        )
    if teacher is None:
        raise ArgumentError(
            f"{owner} learns from a teacher: pass teacher=..., a folder or hub id, or a CausalLM"
        )
    own = policy.lm
    try:
        loaded = CausalLM.load(teacher, temperature=own.temperature, device=own.device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{owner} wants a teacher: {error}") from error
    theirs, ours = loaded.tokenizer.get_vocab(), own.tokenizer.get_vocab()
    if theirs != ours or loaded.vocab_size != own.vocab_size:
        raise ArgumentError(
            f"the teacher has {loaded.vocab_size:,} tokens and the student {own.vocab_size:,}, or other ones by the "
            "same ids: distillation compares them id by id, so both need one vocabulary"
        )
    loaded.model.requires_grad_(False)
    return loaded
