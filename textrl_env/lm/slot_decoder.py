"""Next-token logits of sequences that grow, end and restart independently, with one key/value cache per slot.

Slots of different lengths advance together; a slot may be copied, dropped, or continue a prompt that is held once for
several. Where a :class:`~textrl_env.lm.recording.Recorder` is given, a step of all slots has fixed shapes and is
recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from textrl_env.lm.attention_masks import PADDING, AttentionMasks
from textrl_env.lm.fused_llama import FusedLlama
from textrl_env.lm.recording import Recorder, Recording
from textrl_env.lm.sequences import right_padded
from textrl_env.lm.shared_prompts import SharedPrompts, attending


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

    def recorder(self) -> Recorder | None:
        """What records the steps of whole responses, or None where they are launched one by one."""


#: Columns that a recorded step looks at to begin with; then twice as many, and so on.
FIRST_WIDTH = 64


class SlotDecoder:
    """Next-token logits for ``N`` sequences that grow, end and restart independently.

    Args:
        lm: The model.
        num_slots: ``N``.
        max_length: Longest sequence (prompt and response) that a slot can hold.
        use_cache: False recomputes whole sequences; None decides by ``lm.slot_cache_works``.
        recorder: Records the steps in which all slots advance; worth it where nothing comes between them. The logits of
            such a step are written over by the next one.
    """

    def __init__(
        self,
        lm: DecodingModel,
        num_slots: int,
        max_length: int,
        use_cache: bool | None = None,
        recorder: Recorder | None = None,
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
        self.recorder = (
            recorder if self.takes_many else None
        )  # modules that make their own masks look at numbers
        self._recording: Recording | None = None
        self._recorded_width = 0

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
        if self.recorder is not None and np.array_equal(slots, np.arange(self.num_slots)):
            return self._recorded_step(tokens, positions)
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
        twin = first._like(sum(part.num_slots for part in parts))
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
        twin = self._like(len(sources))
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
        twin = self._like(len(owners))
        twin.tokens, twin.lengths = self.tokens[owners], self.lengths[owners]
        width = int(self.lengths.max())
        keys, values = (
            [getattr(layer, name)[:, :, :width].contiguous() for layer in self._cache.layers]
            for name in ("keys", "values")
        )
        twin._prompts = SharedPrompts(keys, values, self.lengths.copy(), owners)
        return twin

    def _like(self, num_slots: int) -> SlotDecoder:
        """An empty decoder of the same model and settings."""
        return SlotDecoder(self.lm, num_slots, self.max_length, self.use_cache, self.recorder)

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
        self._recording = None  # it knows the cache as it was
        at.slots = torch.from_numpy(np.ascontiguousarray(slots)).to(device)
        columns = positions - self._before(slots)[:, None]
        at.columns = torch.from_numpy(columns).to(device)
        at.width = int(columns.max()) + 1
        at.all_slots = len(slots) == self.num_slots and bool((slots == np.arange(self.num_slots)).all())
        alike = at.all_slots and columns.shape[1] == 1 and bool((columns == columns[0]).all())
        at.column = int(columns[0, 0]) if alike else None
        ids, places = (torch.from_numpy(np.array(x)).to(device) for x in (tokens, positions))
        return self._read(ids, places, None if columns.shape[1] == 1 else last)

    def _recorded_step(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """:meth:`_forward` of one token in every slot, by fixed shapes: the cache is looked at in a few widths only."""
        columns = positions - self._before(np.arange(self.num_slots))
        needed = int(columns.max()) + 1
        if self._recording is None or needed > self._recorded_width:
            width = max(FIRST_WIDTH, 1 << (needed - 1).bit_length())
            self._recorded_width = min(width, self.max_length)
            self._recording = self._new_recording(self._recorded_width)
        return self._recording(np.stack([tokens, columns, positions]))

    def _new_recording(self, width: int) -> Recording:
        at, slots = self._positions, torch.arange(self.num_slots, device=self.lm.device)

        def step(numbers: Tensor) -> Tensor:
            tokens, columns, positions = numbers[:, :, None]
            at.slots, at.columns, at.width = slots, columns, width
            at.all_slots, at.column = True, None
            return self._read(tokens, positions, None)

        return Recording(self.recorder, step, self.lm.device)

    def _read(self, tokens: Tensor, positions: Tensor, last: np.ndarray | None) -> Tensor:
        """The pass itself, tokens ``[k, q]`` at the places that ``_positions`` says; see :meth:`_forward`."""
        inputs = {
            "input_ids": tokens,
            "attention_mask": self._mask(last),
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        # Only one position of each sequence is worth a row of logits.
        with self.lm.precision():
            if self._fused is not None:
                states = self._fused(**inputs, prompts=self._prompts).last_hidden_state
                logits = self.lm.head(states[:, 0] if last is None else states[self._at(last)])
            else:
                keep, column = (1, None) if last is None else np.unique(last, return_inverse=True)
                keep = keep if last is None else torch.from_numpy(keep).to(self.lm.device)
                with attending(self._prompts, self.lm.model.config.get_text_config()):
                    logits = self.lm.model(**inputs, logits_to_keep=keep).logits
                logits = logits[:, -1] if last is None else logits[self._at(column)]
        return self.lm.action_logits(logits)

    def _mask(self, last: np.ndarray | None) -> Any:
        """What the tokens of this pass may look at in the cache, ``last`` being the last real one of each row."""
        at, masks = self._positions, self.lm.masks
        keys = torch.arange(at.width, device=self.lm.device)[None]
        if self._fused is None and masks.form == PADDING:
            ends = at.columns if last is None else at.columns[self._at(last)][:, None]
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
