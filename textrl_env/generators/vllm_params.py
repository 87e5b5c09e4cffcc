"""What vLLM is asked for, in process and over HTTP alike, and how weights reach it."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from textrl_env.generators.sampling import Sampling

#: What vLLM has for "never", as a bias of a logit.
_NEVER = -100.0


def request_params(sampling: Sampling, number: int) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams``, which its HTTP API takes by the same names.

    Everything is said, so that no default out of a model's ``generation_config.json`` takes part. Every response has a
    seed of its own: one seed for a whole group would write the same response to a prompt each time.

    Args:
        sampling: How.
        number: Of the response within the batch.
    """
    beyond = range(sampling.vocab_size or 0, sampling.num_logits or 0) if sampling.vocab_size else ()
    return {
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": 0.0 if sampling.deterministic else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": sampling.seeds[number] if sampling.seeds else sampling.seed + number,
        "stop_token_ids": list(sampling.eos_ids),
        "ignore_eos": True,  # the ends are those above, whatever its own configuration says
        "logprobs": 0,  # of the sampled token alone
        "logit_bias": {str(token): _NEVER for token in beyond} or None,
    }


def plain_number(value: Any) -> float:
    """A log-probability; NaN where vLLM has none."""
    return math.nan if value is None else float(value)


class WeightsFolder:
    """Where weights are written for an engine to read, by turns in two places: what was read last is not overwritten.

    Args:
        parent: A folder that the engine sees too; None is a temporary one, deleted at the end.
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        self._temporary = None
        if parent is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="textrl-weights-")
            parent = self._temporary.name
        self.parent = Path(parent).expanduser().resolve()
        self._turn = 0

    def write(self, model: Any) -> Path:
        """Write a transformers model; returns the folder."""
        folder = self.parent / f"weights-{self._turn}"
        model.save_pretrained(str(folder))
        self._turn = 1 - self._turn
        return folder
