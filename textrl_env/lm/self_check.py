"""Whether the fast ways through a language model give its own numbers, measured on random tokens.

Each check takes a model and compares one fast way with a slower one that is known to be right. What a model does not
support at all (a cache, a mask, positions given from outside) counts as not working.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from textrl_env.lm.decoding import DecodingModel, SlotDecoder
from textrl_env.lm.fused_llama import FusedLlama
from textrl_env.lm.sequences import Sequences

_log = logging.getLogger(__name__)

#: What a model raises that does not take a cache, a mask or positions as a plain transformer does.
_NOT_SUPPORTED = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError)


class CheckedModel(DecodingModel, Protocol):
    """A language model with the ways that are compared here."""

    autocast: bool

    def evaluate_packed(self, sequences: Sequences) -> tuple:
        """Log-probabilities by teacher forcing over packed rows."""

    def evaluate_padded(self, sequences: Sequences) -> tuple:
        """Log-probabilities by plain padded passes."""


@torch.no_grad()
def slot_cache_works(lm: CheckedModel) -> bool:
    """Whether :class:`~textrl_env.lm.decoding.SlotDecoder` with a cache says what it says without."""
    rows = _random_sequences(lm, (7, 4))
    slots = np.arange(2)
    try:
        decoder = SlotDecoder(lm, 2, 8, use_cache=True)
        decoder.prefill(slots, [row[:-1] for row in rows])
        cached = decoder.step(slots, np.array([row[-1] for row in rows]))
    except _NOT_SUPPORTED as error:
        _log.debug("cached decoding failed: %r", error)
        return False
    return _close(lm, cached, SlotDecoder(lm, 2, 8, use_cache=False).prefill(slots, rows))


@torch.no_grad()
def teacher_forcing_works(lm: CheckedModel) -> bool:
    """Whether packed rows after shared prompts give the log-probabilities of padded passes."""
    if not isinstance(lm.head, torch.nn.Linear):
        return False
    first, second, *responses = _random_sequences(lm, (3, 2, 3, 1, 2, 2))
    shared = Sequences.from_responses([first, first, second, second], responses)
    batches = shared, shared[[0, 2]]
    try:
        packed = [lm.evaluate_packed(batch)[0] for batch in batches]
    except _NOT_SUPPORTED as error:
        _log.debug("teacher forcing with shared prompts failed: %r", error)
        return False
    padded = [lm.evaluate_padded(batch)[0] for batch in batches]
    return _close(lm, torch.cat(packed), torch.cat(padded))


@torch.no_grad()
def fused_body_works(lm: CheckedModel) -> bool:
    """Whether :class:`~textrl_env.lm.fused_llama.FusedLlama` gives the logits of the model's modules."""
    ids = torch.randint(lm.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0)).to(lm.device)
    try:
        with lm.precision():
            fused = lm.head(FusedLlama(lm.body)(ids).last_hidden_state)
    except _NOT_SUPPORTED as error:
        _log.debug("the fused body failed: %r", error)
        return False
    with lm.precision():
        own = lm.model(input_ids=ids, use_cache=False).logits
    return _close(lm, lm.action_logits(fused), lm.action_logits(own))


@torch.no_grad()
def shared_prompts_work(lm: CheckedModel) -> bool:
    """Whether decoding after prompts that are held once gives the logits of decoding after copies."""
    rows = _random_sequences(lm, (5, 3))
    owners, tokens = np.array([1, 0, 1]), np.stack(_random_sequences(lm, (3, 3)))
    decoder = SlotDecoder(lm, 2, 8, use_cache=True)
    decoder.prefill(np.arange(2), rows)
    try:
        shared = decoder.continue_each(owners)
        got = torch.cat([shared.step(np.arange(3), t) for t in tokens])
    except _NOT_SUPPORTED as error:
        _log.debug("decoding after shared prompts failed: %r", error)
        return False
    copied = decoder.fork(owners)
    return _close(lm, got, torch.cat([copied.step(np.arange(3), t) for t in tokens]))


def _random_sequences(lm: CheckedModel, lengths: Sequence[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, lm.vocab_size, size=n) for n in lengths]


def _close(lm: CheckedModel, one: Tensor, other: Tensor) -> bool:
    exact = lm.model.dtype == torch.float32 and not lm.autocast
    tolerance = 1e-4 if exact else 5e-2
    return bool((one - other).abs().max() <= tolerance * (1 + other.abs().max()))
