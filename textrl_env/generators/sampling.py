"""How a generator is to sample, and what that does to the distribution that a token is drawn from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from textrl_env.errors import check_range, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

#: What a user may set; the rest belongs to the model, the environment and the run.
KNOBS = ("temperature", "top_p", "top_k", "min_p", "min_new_tokens")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What a generator is asked for, beside the prompts.

    Attributes:
        max_new_tokens: The response budget.
        eos_ids: Token ids that end a response; the end token belongs to it.
        vocab_size: Ids from here on are never sampled (embeddings are often padded past the vocabulary).
        num_logits: Outputs of the model's head, where they are more than ``vocab_size``; None if that is not known.
        temperature: Divides the logits.
        top_p: Only the likeliest tokens that together have this probability; 1 for all.
        top_k: Only so many of the likeliest; 0 for all.
        min_p: Only tokens at least so likely as a share of the likeliest one's probability; 0 for all.
        min_new_tokens: No end token before so many others have been written.
        seed: Of this call; the same seed need not give the same tokens in another engine.
        seeds: One for each response, for engines that take one with each: what is written then depends neither on what
            else is written nor on how many processes share the work. Empty for none.
        deterministic: Take the likeliest token instead of sampling.

    Raises:
        ValueError: A number that is none of the above.
    """

    max_new_tokens: int
    eos_ids: tuple[int, ...] = ()
    vocab_size: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_new_tokens: int = 0
    seed: int = 0
    seeds: tuple[int, ...] = ()
    num_logits: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (math.isfinite(self.temperature) and self.temperature > 0, "above 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (1: every token)"),
            "top_k": (self.top_k >= 0, "at least 0 (0: every token)"),
            "min_p": (0 <= self.min_p < 1, "at least 0 (every token) and below 1"),
            "min_new_tokens": (
                0 <= self.min_new_tokens < self.max_new_tokens,
                f"at least 0 and below max_new_tokens={self.max_new_tokens}",
            ),
        }
        for name, (holds, expected) in bounds.items():
            if not holds:
                raise ValueError(f"sampling: {name} must be {expected}, got {getattr(self, name)}")

    @property
    def truncated(self) -> bool:
        """Whether some tokens that the model could say are never drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.min_new_tokens > 0


def check_knobs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a user, by name.

    Raises:
        ValueError: One that does not exist or that no generator may have, with the reason.
    """
    knobs = dict(given or {})
    for name in ("stop", "stop_strings"):
        if name in knobs:
            raise ValueError(
                f"sampling: {name}={knobs[name]!r} is not the generator's to say: the environment ends episodes, so "
                "that a step and a whole response mean the same. End tokens are those of the model; give more of them "
                "with model.generation_config.eos_token_id"
            )
    if "max_new_tokens" in knobs:
        raise ValueError(
            "sampling: the response budget is the environment's; make it with max_new_tokens=..."
        )
    for name in knobs:
        if name not in KNOBS:
            raise ValueError(f"sampling: there is no setting {name!r}. {did_you_mean(name, KNOBS)}")
    check_range(0, min_new_tokens=knobs.get("min_new_tokens"))
    Sampling(2**31, **knobs)
    return knobs


def limit_logits(
    sampling: Sampling, model_temperature: float = 1.0
) -> Callable[[Tensor, int], Tensor] | None:
    """What sampling changes about a policy's own logits, or None where that is nothing.

    transformers' own logits processors do the cutting, in the order in which ``generate`` applies them.

    Args:
        sampling: The settings.
        model_temperature: What the policy's logits have been divided by already.

    Returns:
        A function of logits ``[N, V]`` and the number of tokens written so far; tokens that are cut get ``-inf``.
    """
    from transformers.generation import logits_process as processors

    steps: list[Callable[[Any, Tensor], Tensor]] = []
    if sampling.temperature != model_temperature:
        steps.append(processors.TemperatureLogitsWarper(sampling.temperature / model_temperature))
    if sampling.top_k:
        steps.append(processors.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(processors.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        steps.append(processors.MinPLogitsWarper(sampling.min_p))
    if not steps and not sampling.min_new_tokens:
        return None
    ends = list(sampling.eos_ids)

    def limited(logits: Tensor, written: int) -> Tensor:
        if written < sampling.min_new_tokens:
            logits = logits.clone()
            logits[..., ends] = -math.inf
        for step in steps:
            logits = step(None, logits)
        return logits

    return limited
