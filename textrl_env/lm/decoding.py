"""Whole responses, sampled token by token with one key/value cache per slot.

:func:`generate` writes them with a :class:`~textrl_env.lm.slot_decoder.SlotDecoder`. Log-probabilities here are those
of what was sampled: where the distribution is cut to the likeliest tokens, of what is left. Beam search is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from textrl_env.lm.next_tokens import NextTokens
from textrl_env.lm.sequences import POLICY, Sequences, common_length, distinct
from textrl_env.lm.slot_decoder import DecodingModel, SlotDecoder
from textrl_env.lm.stop_strings import StopStrings
from textrl_env.lm.streams import Streams

#: Prompts of at least so many tokens are held once for all their responses.
SHARED_TOKENS = 64


class DecodedSequences:
    """What :func:`generate` has read and written, so that sequences which go on from it are not read again.

    Whoever plays several turns with the same weights keeps one for as long as they last.

    Args:
        max_length: Tokens that the longest sequence can have in the end.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._parts: list[SlotDecoder] = []

    def keep(self, decoder: SlotDecoder, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Keep some slots of a decoder, of each its first ``lengths`` tokens."""
        if len(rows) and decoder.takes_many:
            part = decoder if len(rows) == decoder.num_slots else decoder.fork(rows)
            part.rewind(np.arange(len(rows)), lengths)
            self._parts.append(part)

    def take(self, sequences: Sequence[np.ndarray]) -> SlotDecoder | None:
        """A decoder whose slots hold the beginnings of these sequences; None where one of them is not known."""
        if not self._parts:
            return None
        held = SlotDecoder.joined(self._parts)
        self._parts = [held]
        places: dict[bytes, list[int]] = {}
        for slot, length in enumerate(held.lengths):
            places.setdefault(held.tokens[slot, :length].tobytes(), []).append(slot)
        lengths = np.unique(held.lengths)[::-1]
        found = [self._place(places, sequence, lengths[lengths < len(sequence)]) for sequence in sequences]
        if None in found:
            self._parts = []
            return None
        rest = np.setdiff1d(np.arange(held.num_slots), found)
        self._parts = [held.fork(rest)] if len(rest) else []
        return held if found == list(range(held.num_slots)) else held.fork(np.array(found))

    @staticmethod
    def _place(places: dict[bytes, list[int]], sequence: np.ndarray, lengths: np.ndarray) -> int | None:
        """The slot that holds most of a sequence's beginning; it is taken."""
        for length in lengths:
            slots = places.get(sequence[:length].tobytes())
            if slots:
                return slots.pop(0)
        return None


@torch.no_grad()
def generate(
    lm: DecodingModel,
    prompts: Sequence[np.ndarray] | Sequences,
    max_new_tokens: int,
    generator: torch.Generator | Streams | None = None,
    deterministic: bool = False,
    limit: Callable[[Tensor, int], Tensor] | None = None,
    stop: StopStrings | None = None,
    memory: DecodedSequences | None = None,
) -> Sequences:
    """Sample one response to each prompt, or one more turn in each sequence, with a key/value cache.

    Equal prompts are prefilled once, and what ``memory`` holds is not read again; finished rows leave the batch. Every
    sequence has random numbers of its own, so what is written does not depend on what is written beside it.

    Args:
        lm: The model.
        prompts: ``B`` int64 arrays of token ids, or sequences to go on from, in which others have written too.
        max_new_tokens: The response budget ``T``.
        generator: Source of randomness; one number is drawn from it. Or the sequences' own streams.
        deterministic: Take the most likely token instead of sampling.
        limit: Changes the acting logits ``[N, V]`` before a token is drawn, given how many have been written (a cut to
            the likeliest tokens, for example).
        stop: Texts that end a response, beside end tokens.
        memory: Of earlier turns with the same weights; this one is added.

    Returns:
        The prompts with their responses (the end token included) and the log-probability of each of the policy's
        tokens under the acting distribution, as limited; ``native`` where nothing limits it.
        ``responses, log_probs = generate(...)`` gives both as lists of arrays.
    """
    lm = lm.for_decoding()
    given = prompts if isinstance(prompts, Sequences) else Sequences.from_prompts(prompts)
    prompts = given.split(given.tokens)
    decoder, logits = _read(lm, prompts, max_new_tokens, memory)
    streams = generator if isinstance(generator, Streams) else Streams.draw(generator, len(prompts))
    draw = NextTokens(lm.eos_ids, deterministic, limit, decoder.recorder)
    episodes = np.arange(len(prompts))  # row of the batch -> episode
    tokens = np.zeros((len(prompts), max_new_tokens), dtype=np.int64)
    log_probs = np.zeros((len(prompts), max_new_tokens))
    lengths = np.full(len(prompts), max_new_tokens)
    alive = np.ones(len(prompts), dtype=bool)
    for t in range(max_new_tokens):
        tokens[episodes, t], log_probs[episodes, t], is_end = draw(logits, streams[episodes].uniform(t), t)
        if stop is not None:
            is_end += [stop.end(tokens[episode, : t + 1]) for episode in episodes]
        ended = alive & (is_end > 0)
        lengths[episodes[ended]] = t + 1
        alive &= ~ended
        if not alive.any() or t + 1 == max_new_tokens:
            break
        # Dropping finished rows moves the cache, so it waits until a fifth of the batch can go; half of it where every
        # number of rows wants a record of its own.
        if alive.sum() <= (0.8 if decoder.recorder is None else 0.5) * len(alive):
            rows = np.flatnonzero(alive)
            if memory is not None:
                over = np.flatnonzero(~alive)
                memory.keep(decoder, over, given.lengths[episodes[over]] + lengths[episodes[over]] - 1)
            decoder, episodes, alive = decoder.fork(rows), episodes[rows], alive[rows]
        logits = decoder.step(np.arange(len(episodes)), tokens[episodes, t])
    if memory is not None:  # the last token of each has not been read yet
        memory.keep(decoder, np.arange(len(episodes)), given.lengths[episodes] + lengths[episodes] - 1)
    responses, known = (
        [row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (tokens, log_probs)
    )
    return given.extended(responses, POLICY, known, native=limit is None)


def _read(
    lm: DecodingModel, prompts: list[np.ndarray], max_new_tokens: int, memory: DecodedSequences | None
) -> tuple[SlotDecoder, Tensor]:
    """A decoder that has read the prompts, and the logits after each, ``[B, V]``."""
    decoder = None if memory is None else memory.take(prompts)
    if decoder is not None:
        more = [prompt[n:] for prompt, n in zip(prompts, decoder.lengths, strict=True)]
        return decoder, decoder.extend(np.arange(len(prompts)), more)
    first, inverse = distinct(prompts)
    unique = [prompts[i] for i in first]
    longest = max(len(p) for p in unique)
    max_length = longest + max_new_tokens if memory is None else memory.max_length
    decoder, logits = _prefilled(lm, unique, max_length, alone=len(unique) == len(prompts))
    if len(unique) < len(prompts):
        # Short prompts are copied: two products in place of one cost more than reading them again.
        shared = longest >= SHARED_TOKENS and decoder.use_cache and lm.shared_prompts_work(decoder.max_length)
        decoder = decoder.continue_each(inverse) if shared else decoder.fork(inverse)
        logits = logits[torch.from_numpy(inverse).to(logits.device)]
    return decoder, logits


def _prefilled(
    lm: DecodingModel, prompts: list[np.ndarray], max_length: int, alone: bool
) -> tuple[SlotDecoder, Tensor]:
    """A decoder that has read different prompts, what all of them begin with (a system message, examples) only once.

    Args:
        lm: The model.
        prompts: ``U`` that differ.
        max_length: Of a slot.
        alone: Each has one response only, so that the beginning can be held once, too.
    """
    recorder = lm.recorder()
    common = min(common_length(prompts), min(map(len, prompts)) - 1)  # each has at least one token of its own
    if len(prompts) > 1 and common >= SHARED_TOKENS:
        beginning = SlotDecoder(lm, 1, max_length, recorder=recorder)
        if beginning.takes_many and lm.shared_prompts_work(max_length):
            beginning.prefill(np.zeros(1, dtype=np.int64), [prompts[0][:common]])
            owners = np.zeros(len(prompts), dtype=np.int64)
            decoder = beginning.continue_each(owners) if alone else beginning.fork(owners)
            return decoder, decoder.extend(np.arange(len(prompts)), [prompt[common:] for prompt in prompts])
    decoder = SlotDecoder(lm, len(prompts), max_length, recorder=recorder)
    return decoder, decoder.prefill(np.arange(len(prompts)), prompts)
