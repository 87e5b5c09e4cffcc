"""Sequences of tokens: sampled, and decoded with one key/value cache per slot.

:class:`SlotDecoder` keeps a cache for each slot, so slots of different lengths advance together and restart on
their own; :func:`generate` writes whole responses with it. Log-probabilities here are those of what was sampled: where
the distribution is cut to the likeliest tokens, of what is left. Beam search is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from textrl_env.lm.attention_masks import PADDING, AttentionMasks
from textrl_env.lm.fused_llama import FusedLlama
from textrl_env.lm.sequences import POLICY, Sequences, distinct, right_padded
from textrl_env.lm.shared_prompts import SharedPrompts, attending
from textrl_env.lm.stop_strings import StopStrings
from textrl_env.lm.streams import Streams


class DecodingModel(Protocol):
    """A language model as :class:`SlotDecoder` and :func:`generate` use it.

    Attributes:
        model: What is called with token ids, a mask, positions and a cache; has ``config`` and gives ``logits``.
        head: From the last hidden states to logits.
        device: Where the weights are.
        vocab_size: Number of actions ``V``.
        eos_ids: Token ids that end a response, int64 array.
        masks: Who may look at whom, in the form that the model takes.
        padding_works: Whether padding on the right leaves the logits of the tokens before it as they are.
    """

    model: Any
    head: Any
    masks: AttentionMasks
    padding_works: bool
    device: torch.device
    vocab_size: int
    eos_ids: np.ndarray

    def precision(self) -> AbstractContextManager[None]:
        """The context in which the model computes."""

    def action_logits(self, logits: Tensor) -> Tensor:
        """Logits of the acting distribution, ``[..., V]``."""

    def for_decoding(self) -> DecodingModel:
        """The model to decode whole responses with, at its present weights."""

    def slot_cache_works(self, max_length: int) -> bool:
        """Whether sequences of up to ``max_length`` tokens can be decoded with a cache."""

    def shared_prompts_work(self, max_length: int) -> bool:
        """Whether a prompt can be held once for several responses, in sequences of up to ``max_length`` tokens."""

    def fused_body(self, body: Any = None, max_length: int = 0) -> FusedLlama | None:
        """A faster stand-in for the modules below the head on sequences of up to ``max_length`` tokens, or None."""


def gather_log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    """``log softmax(logits)[actions]``: logits ``[..., V]``, actions ``[...]`` -> ``[...]``."""
    chosen = logits.gather(-1, actions.unsqueeze(-1).clamp(max=logits.shape[-1] - 1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def sample_actions(
    logits: Tensor,
    generator: torch.Generator | None,
    deterministic: bool = False,
    uniform: np.ndarray | None = None,
) -> Tensor:
    """Sample from ``softmax(logits)``, or take the argmax. ``[..., V] -> [...]``.

    Args:
        logits: ``[..., V]``.
        generator: Source of randomness; None is torch's own.
        deterministic: Take the most likely action.
        uniform: The random numbers themselves, ``[...]`` in [0, 1), in place of a generator's.

    Raises:
        FloatingPointError: The logits are not finite (on a CPU, where looking costs nothing).
    """
    if deterministic:
        return logits.argmax(-1)
    if logits.device.type != "cpu":
        if uniform is not None:
            return _sample_in_blocks(logits, torch.from_numpy(uniform).to(logits.device, _fine(logits)))
        # Gumbel's trick: noise is cheap where there are thousands of threads.
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits - noise.log()).argmax(-1)
    # One random number for each row, looked up in the cumulated probabilities.
    mass = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=torch.float64)
    total = mass[..., -1:]
    if not bool(total.isfinite().all()):
        raise FloatingPointError(
            "the model's logits are NaN or infinite, so no token can be drawn; a lower learning_rate, or weights that "
            "are whole, usually help"
        )
    if uniform is None:
        drawn = torch.rand(total.shape, generator=generator, dtype=torch.float64)
    else:
        drawn = torch.from_numpy(uniform).unsqueeze(-1)
    return _look_up(mass, drawn * total)


def _look_up(mass: Tensor, at: Tensor) -> Tensor:
    """The entry in whose share of the cumulated ``mass [..., V]`` the number ``at [..., 1]`` lies, ``[...]``."""
    total = mass[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # never past the last entry that has mass
    return torch.searchsorted(mass, torch.minimum(at, below), right=True).squeeze(-1)


def _sample_in_blocks(logits: Tensor, uniform: Tensor, block: int = 256) -> Tensor:
    """What a CPU does in one sum over the vocabulary, in two short ones: a GPU adds up long rows slowly.

    Args:
        logits: ``[..., V]``.
        uniform: ``[...]`` in [0, 1).
        block: Actions in the sums of the second step.
    """
    mass = (logits - logits.amax(-1, keepdim=True)).exp_()
    mass = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block))
    blocks = mass.sum(-1, dtype=uniform.dtype).cumsum(-1)
    at = uniform.unsqueeze(-1) * blocks[..., -1:]
    chosen = _look_up(blocks, at).unsqueeze(-1)
    before = torch.where(chosen > 0, blocks.gather(-1, (chosen - 1).clamp(min=0)), 0.0)
    inside = mass.take_along_dim(chosen.unsqueeze(-1), -2).squeeze(-2).cumsum(-1, dtype=uniform.dtype)
    return chosen.squeeze(-1) * block + _look_up(inside, at - before)


def _fine(tensor: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


#: Prompts of at least so many tokens are held once for all their responses.
SHARED_TOKENS = 64


class SlotDecoder:
    """Next-token logits for ``N`` sequences that grow, end and restart independently.

    Args:
        lm: The model.
        num_slots: ``N``.
        max_length: Longest sequence (prompt and response) that a slot can hold.
        use_cache: False recomputes whole sequences; None decides by ``lm.slot_cache_works``.
    """

    def __init__(
        self, lm: DecodingModel, num_slots: int, max_length: int, use_cache: bool | None = None
    ) -> None:
        self.lm = lm
        self.max_length = max_length
        self.use_cache = lm.slot_cache_works(max_length) if use_cache is None else use_cache
        self.tokens = np.zeros((num_slots, max_length), dtype=np.int64)
        self.lengths = np.zeros(num_slots, dtype=np.int64)
        self._logits: Tensor | None = None
        self._has_logits = np.zeros(num_slots, dtype=bool)  # whose ``_logits`` belong to its sequence
        self._prompts: SharedPrompts | None = None
        self._fused = lm.fused_body(max_length=max_length) if self.use_cache else None
        if self.use_cache:
            from textrl_env.lm.caches import CachePositions, slot_cache

            self._positions = CachePositions(num_slots, max_length)
            layers = lm.model.config.get_text_config().num_hidden_layers
            self._cache = slot_cache(self._positions, layers)

    @property
    def num_slots(self) -> int:
        """``N``."""
        return len(self.lengths)

    def clear(self) -> None:
        """Forget every sequence; needed whenever the weights have changed."""
        self.lengths[:] = 0

    @torch.no_grad()
    def prefill(self, slots: np.ndarray, sequences: Sequence[np.ndarray]) -> Tensor:
        """Start ``slots`` anew with whole sequences.

        Args:
            slots: int ``[k]``.
            sequences: ``k`` int64 arrays, each of at least one token.

        Returns:
            Acting logits ``[k, vocab_size]`` of the token after each sequence.
        """
        lengths = np.array([len(s) for s in sequences])
        rows = right_padded(sequences)
        width = rows.shape[1]
        self.tokens[slots, :width] = rows
        self.lengths[slots] = lengths
        self._has_logits[slots] = False
        if not self.use_cache:
            return self._plain(slots)
        positions = np.broadcast_to(np.arange(width), rows.shape)
        return self._forward(slots, rows, positions, lengths - 1)

    @torch.no_grad()
    def step(self, slots: np.ndarray, tokens: np.ndarray) -> Tensor:
        """Append one token to each of ``slots``; acting logits ``[k, vocab_size]`` of the next."""
        positions = self.lengths[slots]
        self.tokens[slots, positions] = tokens
        self.lengths[slots] += 1
        self._has_logits[slots] = False
        if not self.use_cache:
            return self._plain(slots)
        return self._forward(slots, tokens[:, None], positions[:, None], None)

    @property
    def takes_many(self) -> bool:
        """Whether :meth:`extend` reads many tokens in one pass.

        Modules that make their own masks from the padding take those of a pass to stand in the last columns of the
        cache, which they do not where slots are of different lengths.
        """
        return self.use_cache and (self._fused is not None or self.lm.masks.form != PADDING)

    @torch.no_grad()
    def extend(self, slots: np.ndarray, more: Sequence[np.ndarray]) -> Tensor:
        """Append tokens to each of ``slots``, as many as there are.

        Args:
            slots: int ``[k]``.
            more: ``k`` int64 arrays, each of at least one token.

        Returns:
            Acting logits ``[k, vocab_size]`` of the token after each sequence.
        """
        counts, known = np.array([len(row) for row in more]), self.lengths[slots]
        width = int(counts.max())
        if width == 1:
            return self.step(slots, np.array([row[0] for row in more]))
        fits = known.max() + width <= self.max_length  # the padding of shorter rows too
        if self.use_cache and not (self.takes_many and fits):
            return self._extend_in_turn(slots, more, counts)
        for slot, start, row in zip(slots, known, more, strict=True):
            self.tokens[slot, start : start + len(row)] = row
        self.lengths[slots] = known + counts
        self._has_logits[slots] = False
        if not self.use_cache:
            return self._plain(slots)
        positions = known[:, None] + np.arange(width)
        return self._forward(slots, right_padded(more), positions, counts - 1)

    def _extend_in_turn(self, slots: np.ndarray, more: Sequence[np.ndarray], counts: np.ndarray) -> Tensor:
        """The same where rows cannot be padded: a token of each at a time."""
        logits = torch.empty(len(slots), self.lm.vocab_size, device=self.lm.device)
        for j in range(int(counts.max())):
            rows = np.flatnonzero(counts > j)
            step = self.step(slots[rows], np.array([more[i][j] for i in rows]))
            last = counts[rows] == j + 1
            logits[torch.from_numpy(rows[last])] = step[torch.from_numpy(last)]
        return logits

    def rewind(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Forget what stands behind the first ``lengths`` tokens of each of ``slots``."""
        self.lengths[slots] = np.minimum(self.lengths[slots], lengths)
        self._has_logits[slots] = False

    @torch.no_grad()
    def next_logits(self, tokens: np.ndarray, lengths: np.ndarray, slots: np.ndarray) -> Tensor:
        """Acting logits after given sequences, at the cost of what is new in them.

        A slot whose sequence goes on from the cached one is read from there; an unchanged one costs nothing; any
        other is prefilled.

        Args:
            tokens: int64 ``[N, L]``, left-aligned sequences.
            lengths: int ``[N]``.
            slots: Which slots are wanted, int ``[k]``.

        Returns:
            ``[k, vocab_size]``.
        """
        if self._logits is None or self._logits.shape[0] != self.num_slots:
            self._logits = torch.zeros(self.num_slots, self.lm.vocab_size, device=self.lm.device)
        width = min(tokens.shape[1], self.max_length)
        known = self.lengths[slots]
        same = (self.tokens[slots, :width] == tokens[slots, :width]) | (np.arange(width) >= known[:, None])
        same = same.all(1) & (known > 0)
        grown = same & (lengths[slots] == known + 1)
        longer = same & (lengths[slots] > known + 1) & self.takes_many
        fresh = ~(grown | longer | (same & (lengths[slots] == known) & self._has_logits[slots]))
        if fresh.any():
            rows = slots[fresh]
            self._logits[rows] = self.prefill(rows, [tokens[r, : lengths[r]] for r in rows])
        if grown.any():
            rows = slots[grown]
            self._logits[rows] = self.step(rows, tokens[rows, lengths[rows] - 1])
        if longer.any():
            rows = slots[longer]
            self._logits[rows] = self.extend(rows, [tokens[r, self.lengths[r] : lengths[r]] for r in rows])
        self._has_logits[slots] = True
        return self._logits[slots]

    @staticmethod
    def joined(parts: Sequence[SlotDecoder]) -> SlotDecoder:
        """One decoder with the slots of several, one after another; they are of one model and length."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        twin = SlotDecoder(first.lm, sum(part.num_slots for part in parts), first.max_length, first.use_cache)
        twin.tokens = np.concatenate([part.tokens for part in parts])
        twin.lengths = np.concatenate([part.lengths for part in parts])
        if first._prompts is not None:
            twin._prompts = SharedPrompts.joined([part._prompts for part in parts])
        if first.use_cache:
            own = twin.lengths - twin._before(np.arange(twin.num_slots))
            for i, mine in enumerate(twin._cache.layers):
                mine.gather([part._cache.layers[i] for part in parts], int(own.max()))
        return twin

    def fork(self, sources: np.ndarray) -> SlotDecoder:
        """A new decoder whose slot i holds what slot ``sources[i]`` holds here (drop, reorder or repeat)."""
        twin = SlotDecoder(self.lm, len(sources), self.max_length, self.use_cache)
        twin.tokens, twin.lengths = self.tokens[sources], self.lengths[sources]
        twin._prompts = None if self._prompts is None else self._prompts.select(sources)
        index = torch.from_numpy(np.asarray(sources)).to(self.lm.device)
        width = int((twin.lengths - twin._before(np.arange(len(sources)))).max())
        if self.use_cache:
            for mine, theirs in zip(twin._cache.layers, self._cache.layers, strict=True):
                if theirs.is_initialized:
                    mine.take(theirs, index, width)
        return twin

    def continue_each(self, owners: np.ndarray) -> SlotDecoder:
        """A new decoder whose slot i continues slot ``owners[i]``, many slots one sequence that is held once."""
        twin = SlotDecoder(self.lm, len(owners), self.max_length, self.use_cache)
        twin.tokens, twin.lengths = self.tokens[owners], self.lengths[owners]
        width = int(self.lengths.max())
        keys, values = (
            [getattr(layer, name)[:, :, :width].contiguous() for layer in self._cache.layers]
            for name in ("keys", "values")
        )
        twin._prompts = SharedPrompts(keys, values, self.lengths.copy(), owners)
        return twin

    def _before(self, slots: np.ndarray) -> np.ndarray:
        """How many tokens of each slot are held elsewhere, int64 ``[k]``."""
        if self._prompts is None:
            return np.zeros(len(slots), dtype=np.int64)
        return self._prompts.lengths[self._prompts.owners[slots]]

    def _forward(
        self,
        slots: np.ndarray,
        tokens: np.ndarray,
        positions: np.ndarray,
        last: np.ndarray | None,
    ) -> Tensor:
        """Acting logits ``[k, V]`` after the token in column ``last`` (None: the only one) of each row."""
        device, at = self.lm.device, self._positions
        at.slots = torch.from_numpy(np.ascontiguousarray(slots)).to(device)
        columns = positions - self._before(slots)[:, None]
        at.columns = torch.from_numpy(columns).to(device)
        at.width = int(columns.max()) + 1
        at.all_slots = len(slots) == self.num_slots and bool((slots == np.arange(self.num_slots)).all())
        alike = at.all_slots and columns.shape[1] == 1 and bool((columns == columns[0]).all())
        at.column = int(columns[0, 0]) if alike else None
        last = np.zeros(len(slots), dtype=np.int64) if last is None else last
        inputs = {
            "input_ids": torch.from_numpy(np.ascontiguousarray(tokens)).to(device),
            "attention_mask": self._mask(last),
            "position_ids": torch.from_numpy(np.array(positions)).to(device),
            "past_key_values": self._cache,
            "use_cache": True,
        }
        # Only one position of each sequence is worth a row of logits.
        with self.lm.precision():
            if self._fused is not None:
                states = self._fused(**inputs, prompts=self._prompts).last_hidden_state
                logits = self.lm.head(states[self._at(last)])
            else:
                keep, column = np.unique(last, return_inverse=True)
                with attending(self._prompts, self.lm.model.config.get_text_config()):
                    out = self.lm.model(**inputs, logits_to_keep=torch.from_numpy(keep).to(device))
                logits = out.logits[self._at(column)]
        return self.lm.action_logits(logits)

    def _mask(self, last: np.ndarray) -> Any:
        """What the tokens of this pass may look at in the cache, ``last`` being the last real one of each row."""
        at, masks = self._positions, self.lm.masks
        keys = torch.arange(at.width, device=self.lm.device)[None]
        if self._fused is None and masks.form == PADDING:
            ends = at.columns.gather(1, torch.from_numpy(last).to(self.lm.device)[:, None])
            return (keys <= ends).long()
        # Causal within each slot; stale entries of earlier episodes lie beyond a slot's own positions.
        visible = keys[:, None] <= at.columns[:, :, None]
        if self._fused is not None:
            return masks.one(visible, at.columns, keys)
        return masks.make(visible, at.columns, keys, self.lm.model.dtype)

    def _at(self, columns: np.ndarray) -> tuple[Tensor, Tensor]:
        """Index of one column in each row."""
        device = self.lm.device
        return torch.arange(len(columns), device=device), torch.from_numpy(columns).to(device)

    def _plain(self, slots: np.ndarray) -> Tensor:
        """Logits by whole forward passes without a cache: one, right-padded, or one for each length."""
        lengths = self.lengths[slots]
        logits = torch.empty(len(slots), self.lm.vocab_size, device=self.lm.device)
        for length in [None] if self.lm.padding_works else np.unique(lengths):
            rows = np.arange(len(slots)) if length is None else np.flatnonzero(lengths == length)
            width = int(lengths[rows].max())
            ids = torch.from_numpy(self.tokens[slots[rows], :width]).to(self.lm.device)
            last = torch.from_numpy(lengths[rows] - 1).to(self.lm.device)
            mask = torch.arange(width, device=self.lm.device) <= last[:, None]
            inputs = {"attention_mask": mask.long()} if length is None else {}
            with self.lm.precision():
                out = self.lm.model(input_ids=ids, **inputs, use_cache=False).logits
            at = torch.arange(len(rows), device=self.lm.device)
            logits[torch.from_numpy(rows)] = self.lm.action_logits(out[at, last])
        return logits


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
    eos = torch.from_numpy(lm.eos_ids).to(lm.device)
    episodes = np.arange(len(prompts))  # row of the batch -> episode
    tokens = np.zeros((len(prompts), max_new_tokens), dtype=np.int64)
    log_probs = np.zeros((len(prompts), max_new_tokens))
    lengths = np.full(len(prompts), max_new_tokens)
    alive = np.ones(len(prompts), dtype=bool)
    for t in range(max_new_tokens):
        logits = logits if limit is None else limit(logits, t)
        actions = sample_actions(logits, None, deterministic, streams[episodes].uniform(t))
        # All of it in one transfer, or a GPU is waited for three times a token; float32 holds ids below 2^24.
        step = torch.stack([actions, gather_log_probs(logits, actions), torch.isin(actions, eos)])
        tokens[episodes, t], log_probs[episodes, t], is_end = step.cpu().numpy()
        if stop is not None:
            is_end += [stop.end(tokens[episode, : t + 1]) for episode in episodes]
        ended = alive & (is_end > 0)
        lengths[episodes[ended]] = t + 1
        alive &= ~ended
        if not alive.any() or t + 1 == max_new_tokens:
            break
        # Dropping finished rows moves the cache, so it waits until a fifth of the batch can go.
        if alive.sum() <= 0.8 * len(alive):
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
    decoder = SlotDecoder(lm, len(unique), max_length)
    logits = decoder.prefill(np.arange(len(unique)), unique)
    if len(unique) < len(prompts):
        # Short prompts are copied: two products in place of one cost more than reading them again.
        shared = longest >= SHARED_TOKENS and decoder.use_cache and lm.shared_prompts_work(decoder.max_length)
        decoder = decoder.continue_each(inverse) if shared else decoder.fork(inverse)
        logits = logits[torch.from_numpy(inverse).to(logits.device)]
    return decoder, logits
