"""Which ways through a language model give its own numbers, measured once on a few random tokens.

The truth is what the model's own modules say of one sequence at a time: no padding, no mask, no positions, no cache,
in float32. Every faster way is tried against it on sequences of different lengths, with windows narrowed to a few
tokens so that their edges are met; a way is taken only where it agrees. What a model does not support at all (a cache,
a mask, positions given from outside) counts as not working.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from textrl_env.lm.attention_masks import PADDING, AttentionMasks, narrowed_windows
from textrl_env.lm.fused_llama import FusedLlama, check_parts
from textrl_env.lm.next_tokens import gather_log_probs
from textrl_env.lm.out_of_memory import is_out_of_memory
from textrl_env.lm.recording import Recorder
from textrl_env.lm.sequences import Sequences
from textrl_env.lm.slot_decoder import DecodingModel, SlotDecoder
from textrl_env.lm.teacher_forcing import PackedLayout

_log = logging.getLogger(__name__)

#: What a model raises that does not take a cache, a mask or positions as a plain transformer does, and what is raised
#: where another version of transformers keeps its insides elsewhere.
_NOT_SUPPORTED = (
    *(TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, ImportError),
)
#: Tokens that a window is narrowed to.
_WINDOW = 4
#: What two float32 computations of one log-probability may differ in, relative to the largest; and others.
_TOLERANCE, _LOW_TOLERANCE = 1e-4, 5e-2


def _raise_if_out_of_memory(error: Exception) -> None:
    """A lack of memory at the moment says nothing about a model, and a way must not be given up for it."""
    if is_out_of_memory(error):
        raise error


@dataclasses.dataclass(frozen=True)
class Ways:
    """The ways that lead through a model.

    Attributes:
        padding: Sequences of different lengths in one pass, padded on the right.
        packing: Several sequences in a row behind shared prompts; the form of masks that this takes, or None.
        cache: Decoding with a key/value cache for each slot; the form of masks that this takes, or None.
        fused: :class:`~textrl_env.lm.fused_llama.FusedLlama` in place of the model's modules.
        shared_prompts: Decoding after prompts that are held once for several responses.
        packing_windows: Whether packing holds beyond a window of the model's attention.
        cache_windows: Whether the cache does.
    """

    padding: bool = False
    packing: str | None = None
    cache: str | None = None
    fused: bool = False
    shared_prompts: bool = False
    packing_windows: bool = False
    cache_windows: bool = False


class CheckedModel(DecodingModel, Protocol):
    """A language model as it is checked."""

    @property
    def body(self) -> Any:
        """The model without its head."""

    @property
    def max_length(self) -> int | None:
        """The most tokens that it reads; None where it has no limit."""

    @property
    def ways(self) -> Ways:
        """The ways that it goes."""

    def layout(self, sequences: Sequences) -> Any:
        """How it reads finished sequences."""

    def in_float32(self) -> contextlib.AbstractContextManager[CheckedModel]:
        """The same model, computing in float32 for a while, or as it is where it cannot."""

    def with_ways(self, ways: Ways) -> CheckedModel:
        """The same model, going these ways."""

    def evaluate(self, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities and more of the policy's tokens."""


@torch.no_grad()
def find_ways(lm: CheckedModel, allowed: Callable[[str], bool] = lambda name: True) -> Ways:
    """Try every way through a model.

    Args:
        lm: The model.
        allowed: Which fields of :class:`Ways` may be anything but their default.

    Raises:
        ValueError: The model's log-probabilities depend on tokens that come later, or differ from one call to the next,
            so that no way is right.
    """
    with lm.in_float32() as exact:
        return _Search(exact, allowed).run()


@torch.no_grad()
def can_be_recorded(lm: CheckedModel, recorder: Recorder) -> bool:
    """Whether a decoder whose steps are recorded gives the model's own log-probabilities.

    Args:
        lm: The model, its other ways known.
        recorder: Makes the records.
    """
    with lm.in_float32() as plain:
        return _Search(plain, lambda name: True).records(recorder)


class _Search:
    def __init__(self, lm: CheckedModel, allowed: Callable[[str], bool]) -> None:
        self.lm, self.allowed = lm, allowed
        exact = all(p.dtype in (torch.float32, torch.float64) for p in lm.model.parameters())
        self.tolerance = _TOLERANCE if exact else _LOW_TOLERANCE
        # transformers takes a padding token for a mistake where there is no mask.
        tokens = np.setdiff1d(np.arange(lm.vocab_size), [lm.model.config.get_text_config().pad_token_id])
        draw = np.random.default_rng(0)
        # The longest sequence has 9 tokens; a model with a shorter context is checked with shorter ones. Some are so
        # short that they share rows with and without a prompt in common.
        longest = min(lm.max_length or 9, 9)
        lengths = [max(n * longest // 9, 1) for n in (5, 2, 1, 4, 3, 2, 3, 3)]
        first, second, third, *responses = (draw.choice(tokens, n) for n in lengths)
        self.sequences = Sequences.from_responses([first, first, first, second, third], responses)
        self.config = lm.model.config
        self.narrow = True

    def run(self) -> Ways:
        with narrowed_windows(self.config, _WINDOW):
            try:
                self.truth = self._truth(self.sequences)
            except _NOT_SUPPORTED as error:
                _raise_if_out_of_memory(error)
                name = type(self.lm.model).__name__
                raise ValueError(f"{name} gives no logits for token ids alone: {error}") from error
            self._check_causal()
            ways = self._improved(Ways(), self._evaluates, padding=True)
            splits = self._splits()
            ways = self._fast_ways(ways, splits, windows=True)
            if splits and self.allowed("fused") and self._is_llama():
                # In a fresh model attention is so even that positions hardly matter.
                with self._sharper_attention():
                    ways = self._improved(ways, self._packs_and_decodes, fused=True)
        if AttentionMasks(self.config).limited(2**31):
            self.narrow = False
            self.truth = self._truth(self.sequences)  # with windows as wide as they are
            ways = self._fast_ways(ways, splits, windows=False)
            if ways.fused:
                ways = self._improved(
                    dataclasses.replace(ways, fused=False), self._packs_and_decodes, fused=True
                )
        if ways.cache:
            ways = self._improved(ways, self._continues, shared_prompts=True)
        return ways

    def records(self, recorder: Recorder) -> bool:
        """Whether steps give the truth when they are rehearsed, recorded and replayed."""
        ways = self.lm.ways
        try:
            with contextlib.ExitStack() as changed:
                if ways.cache_windows:
                    changed.enter_context(narrowed_windows(self.config, _WINDOW))
                self.truth = self._truth(self.sequences)
                if ways.fused:
                    changed.enter_context(self._sharper_attention())
                shares = ways.shared_prompts
                return self._decodes_together(recorder) and (not shares or self._continues(self.lm, recorder))
        except _NOT_SUPPORTED as error:
            _raise_if_out_of_memory(error)
            _log.debug("recorded steps failed: %r", error)
            return False

    def _decodes_together(self, recorder: Recorder) -> bool:
        decoder = SlotDecoder(self.lm, len(self.sequences), self._room(), use_cache=True, recorder=recorder)
        logits = decoder.prefill(np.arange(len(self.sequences)), self.sequences.prompts)
        return self._goes_on(decoder, logits, together=True)

    def _room(self) -> int:
        """Tokens of the longest sequence if all went on for as long as the longest response."""
        lengths, counts = self.sequences.lengths, self.sequences.num_actions
        return int((lengths - counts).max() + counts.max()) + 1

    def _fast_ways(self, ways: Ways, splits: bool, windows: bool) -> Ways:
        """``ways`` with packing and a cache where these are right and not there yet."""
        for form in AttentionMasks(self.config).forms():
            if ways.packing is None and form != PADDING and splits:
                ways = self._improved(ways, self._packs, packing=form, packing_windows=windows)
            if ways.cache is None:
                ways = self._improved(ways, self._decodes, cache=form, cache_windows=windows)
        return ways

    def _improved(self, ways: Ways, works: Callable[[CheckedModel], bool], **more: Any) -> Ways:
        """``ways`` with ``more``, if they are allowed and right."""
        if not all(self.allowed(name.removesuffix("_windows")) for name in more):
            return ways
        better = dataclasses.replace(ways, **more)
        try:
            return better if works(self.lm.with_ways(better)) else ways
        except _NOT_SUPPORTED as error:
            _raise_if_out_of_memory(error)
            _log.debug("%s failed: %r", more, error)
            return ways

    # -- the truth ------------------------------------------------------------------------------------------

    def _truth(self, sequences: Sequences) -> Tensor:
        """Log-probabilities of the policy's tokens, one sequence after another through the model's own modules."""
        parts = []
        for row in range(len(sequences)):
            alone = sequences[[row]]
            ids = torch.from_numpy(alone.tokens)[None].to(self.lm.device)
            with self.lm.precision():
                logits = self.lm.model(input_ids=ids, use_cache=False).logits
            logits = self.lm.action_logits(logits)[0, torch.from_numpy(alone.policy) - 1]
            parts.append(gather_log_probs(logits, torch.from_numpy(alone.actions).to(self.lm.device)))
        return torch.cat(parts)

    def _check_causal(self) -> None:
        name = type(self.lm.model).__name__
        if not torch.isfinite(self.truth).all():
            raise ValueError(f"{name} gives log-probabilities that are not finite for random tokens")
        first = self.sequences[[0]]
        count = int(first.num_actions[0])
        if not self._close(self._truth(first), self.truth[:count]):
            raise ValueError(
                f"{name} gives other log-probabilities at every call, so there is no KL to speak of; is something "
                "random left in it (dropout, noisy routing) that eval() does not turn off?"
            )
        cut = Sequences.from_responses(first.prompts, [first.responses[0][: max(count - 1, 1)]])
        if not self._close(self._truth(cut), self.truth[: max(count - 1, 1)]):
            raise ValueError(
                f"{name} lets tokens depend on later ones, so it is no causal language model and its "
                "log-probabilities are not those of sampling token by token; take a decoder-only model, or set "
                "is_decoder=True in its configuration"
            )

    # -- what is tried --------------------------------------------------------------------------------------

    def _evaluates(self, lm: CheckedModel) -> bool:
        return self._close(lm.evaluate(self.sequences)[0], self.truth)

    def _splits(self) -> bool:
        """Whether the model is its body and, after it, a matrix: no scale and no cap on the logits."""
        head = self.lm.head
        if not isinstance(head, torch.nn.Linear):
            return False
        ids = torch.from_numpy(self.sequences.prompts[0])[None].to(self.lm.device)
        before = head.weight.data
        try:
            # A cap shows where logits are large.
            head.weight.data = before * (
                50 / self.lm.model(input_ids=ids, use_cache=False).logits.abs().max()
            )
            own = self.lm.model(input_ids=ids, use_cache=False).logits
            split = head(self.lm.body(input_ids=ids, use_cache=False).last_hidden_state)
        except _NOT_SUPPORTED as error:
            _raise_if_out_of_memory(error)
            _log.debug("the model does not come apart into a body and a head: %r", error)
            return False
        finally:
            head.weight.data = before
        return self._close(split, own)

    def _packs(self, lm: CheckedModel) -> bool:
        # Without a prompt in common rows are laid out in another way.
        for rows in ([0, 3, 4], [0, 1, 2, 3, 4]):
            some = self.sequences[rows]
            if not isinstance(lm.layout(some), PackedLayout):
                return False  # it would be read in another way
            chosen = torch.from_numpy(np.isin(self.sequences.rows, rows)).to(self.truth.device)
            if not self._close(lm.evaluate(some)[0], self.truth[chosen]):
                return False
        return True

    def _packs_and_decodes(self, lm: CheckedModel) -> bool:
        if not AttentionMasks(self.config).uniform(int(self.sequences.lengths.max())):
            return self.narrow  # nothing is fused here; it is decided where windows are as wide as they are
        packs = lm.ways.packing is None or self._packs(lm)
        return packs and (lm.ways.cache is None or self._decodes(lm))

    def _is_llama(self) -> bool:
        if getattr(self.lm.model, "is_quantized", False):
            return False  # its weights are no plain numbers
        try:
            check_parts(self.lm.body)
            FusedLlama(self.lm.body)
        except _NOT_SUPPORTED as error:
            _raise_if_out_of_memory(error)
            _log.debug("the fused body failed: %r", error)
            return False
        return True

    @contextlib.contextmanager
    def _sharper_attention(self) -> Iterator[None]:
        """Queries so large that scores differ by several nats, and the truth of that."""
        truth, before = self.truth, []
        try:
            for layer in self.lm.body.layers:
                attention = layer.self_attn
                query, key = attention.q_proj.weight, attention.k_proj.weight
                # Of inputs of unit size, as they come out of a norm.
                spread = query.norm() * key.norm() / (len(query) * len(key)) ** 0.5
                gain = 3 / (float(spread) * attention.head_dim**0.5 * attention.scaling)
                before.append((query, query.data))
                query.data = query.data * max(gain, 1.0)
            self.truth = self._truth(self.sequences)
            yield
        finally:
            self.truth = truth
            for weight, data in before:
                weight.data = data

    def _decodes(self, lm: CheckedModel) -> bool:
        decoder = SlotDecoder(lm, len(self.sequences), int(self.sequences.lengths.max()) + 1, use_cache=True)
        logits = decoder.prefill(np.arange(len(self.sequences)), self.sequences.prompts)
        if not self._goes_on(decoder, logits):
            return False
        # A slot that starts anew while others stand.
        again = decoder.prefill(np.array([1]), self.sequences.prompts[3:4])
        first = int(self.sequences.num_actions[:3].sum())
        action = torch.from_numpy(self.sequences.actions[first : first + 1]).to(again.device)
        return self._close(gather_log_probs(again, action), self.truth[first : first + 1])

    def _continues(self, lm: CheckedModel, recorder: Recorder | None = None) -> bool:
        prompts = [self.sequences.prompts[i] for i in (0, 3, 4)]
        decoder = SlotDecoder(lm, 3, self._room(), use_cache=True, recorder=recorder)
        logits = decoder.prefill(np.arange(3), prompts)
        owners = np.array([0, 0, 0, 1, 2])
        shared = decoder.continue_each(owners)
        return self._goes_on(shared, logits[torch.from_numpy(owners).to(logits.device)], together=True)

    def _goes_on(self, decoder: SlotDecoder, logits: Tensor, together: bool = False) -> bool:
        """Whether a decoder that holds the prompts gives each response its log-probabilities, token by token.

        ``together`` lets slots go on whose response has ended.
        """
        counts = self.sequences.num_actions
        ends = np.cumsum(counts)
        slots = np.arange(len(counts))
        for t in range(int(counts.max())):
            alive = counts[slots] > t
            if t > 0:
                slots = slots if together else slots[alive]
                before = np.minimum((ends - counts)[slots] + t, ends[slots]) - 1
                logits = decoder.step(slots, self.sequences.actions[before])
                alive = counts[slots] > t
            index = (ends - counts)[slots[alive]] + t
            actions = torch.from_numpy(self.sequences.actions[index]).to(logits.device)
            got = gather_log_probs(logits[torch.from_numpy(alive).to(logits.device)], actions)
            if not self._close(got, self.truth[torch.from_numpy(index).to(self.truth.device)]):
                return False
        return True

    def _close(self, one: Tensor, other: Tensor) -> bool:
        return bool((one - other).abs().max() <= self.tolerance * (1 + other.abs().max()))
