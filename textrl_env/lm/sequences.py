"""One ragged batch of token sequences, from the generator to the gradient.

:class:`Sequences` holds tokens one after another, where each sequence begins, and who wrote each token: the prompt,
the policy, or an environment that answers back. Log-probabilities, KL and rewards stand beside the tokens. All of it
lies in the host's memory, where rows are chosen; what a model needs of it is laid out once and moved once
(:meth:`Sequences.derived`). ``[B, T]`` with a mask is made here and nowhere else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

#: Who wrote a token; values of :attr:`Sequences.written_by`.
PROMPT, POLICY, ENVIRONMENT = 0, 1, 2

#: What may stand beside the tokens.
_PER_TOKEN = ("log_probs", "sampling_log_probs", "ref_log_probs", "kl", "rewards")

_Derived = TypeVar("_Derived")


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """``B`` sequences of ``n`` tokens together, ``m`` of them written by the policy.

    Policy and environment may take turns within a sequence. An array beside the tokens is 0 where the policy did not
    write. Nothing is changed in place.

    Attributes:
        tokens: int64 ``[n]``.
        starts: Where each sequence begins, int64 ``[B]``.
        written_by: int8 ``[n]``: ``PROMPT``, ``POLICY`` or ``ENVIRONMENT``.
        log_probs: float64 ``[n]``, of the policy that acted, where known.
        sampling_log_probs: float64 ``[n]``, as a generator reported them, where they are not the policy's own.
        ref_log_probs: float64 ``[n]``, of the reference, where known.
        kl: float64 ``[n]``, the estimate that is charged, where known.
        rewards: float64 ``[n]``, where known.
        device: Where models read it.
        native: Whether our own decoder wrote it, so that ``log_probs`` are those of the model that it was given.

    Raises:
        ValueError: Arrays that do not fit together, an empty sequence, or one that begins with a token of the policy,
            which nothing predicts.
    """

    tokens: np.ndarray
    starts: np.ndarray
    written_by: np.ndarray
    log_probs: np.ndarray | None = None
    sampling_log_probs: np.ndarray | None = None
    ref_log_probs: np.ndarray | None = None
    kl: np.ndarray | None = None
    rewards: np.ndarray | None = None
    device: torch.device | str = "cpu"
    native: bool = False
    _derived: dict[Callable, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        dtypes = {"tokens": np.int64, "starts": np.int64, "written_by": np.int8}
        for name, dtype in (dtypes | dict.fromkeys(_PER_TOKEN, np.float64)).items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=dtype))
        object.__setattr__(self, "device", torch.device(self.device))
        self._check()

    def _check(self) -> None:
        count = len(self.tokens)
        for name in ("written_by", *_PER_TOKEN):
            value = getattr(self, name)
            if value is not None and value.shape != (count,):
                raise ValueError(
                    f"{name} has the shape {value.shape}, expected ({count},): one for each token"
                )
        if len(self.starts) and (self.starts[0] != 0 or (self.lengths < 1).any()):
            raise ValueError(
                f"starts must begin with 0 and give every sequence at least one of the {count} tokens, got "
                f"{self.starts.tolist()}"
            )
        if count and (
            not len(self.starts) or self.written_by.min() < PROMPT or self.written_by.max() > ENVIRONMENT
        ):
            raise ValueError(
                f"written_by must be {PROMPT} (prompt), {POLICY} (policy) or {ENVIRONMENT} (environment), got "
                f"{np.unique(self.written_by).tolist()} in {len(self.starts)} sequences"
            )
        first = np.flatnonzero(self.written_by[self.starts] == POLICY)
        if len(first):
            raise ValueError(
                f"sequence {first[0]} begins with a token of the policy; nothing comes before it that could predict it"
            )

    # -- made from other shapes -----------------------------------------------------------------------------

    @classmethod
    def from_spans(cls, rows: Sequence[Sequence[tuple[int, Sequence[int] | np.ndarray]]]) -> Sequences:
        """From spans ``(who wrote it, token ids)``, a list of them for each sequence."""
        spans = [(author, np.asarray(tokens, dtype=np.int64)) for row in rows for author, tokens in row]
        lengths = np.array([sum(len(tokens) for _, tokens in row) for row in rows], dtype=np.int64)
        return cls(
            np.concatenate([tokens for _, tokens in spans]) if spans else np.zeros(0),
            _starts(lengths),
            np.repeat([author for author, _ in spans], [len(tokens) for _, tokens in spans]),
        )

    @classmethod
    def from_prompts(cls, prompts: Sequence[Sequence[int] | np.ndarray]) -> Sequences:
        """Prompts alone, ``B`` integer arrays of token ids."""
        return cls.from_spans([[(PROMPT, prompt)] for prompt in prompts])

    @classmethod
    def from_responses(
        cls,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        log_probs: Sequence[np.ndarray] | None = None,
    ) -> Sequences:
        """From prompts and one response to each.

        Args:
            prompts: ``B`` integer arrays of token ids.
            responses: ``B`` integer arrays of token ids, written by the policy.
            log_probs: ``B`` arrays, one number for each token of the responses.
        """
        return cls.from_prompts(prompts).extended(responses, POLICY, log_probs)

    @classmethod
    def from_generated(cls, generated: Any, prompts: Sequence[np.ndarray] | Sequences) -> Sequences:
        """What a ``generate(prompts)`` returned: :class:`Sequences`, or a pair (responses, log-probabilities).

        Args:
            generated: What came back. Sequences must go on from the prompts.
            prompts: What was to be continued, ``B`` prompts or sequences.

        Raises:
            TypeError: It is neither.
            ValueError: The numbers or the prompts do not fit what was asked for.
        """
        given = prompts if isinstance(prompts, Sequences) else cls.from_prompts(prompts)
        if isinstance(generated, Sequences):
            generated._check_continues(given)
            return generated
        if not isinstance(generated, (tuple, list)) or len(generated) != 2:
            raise TypeError(
                "generate() must return Sequences or a pair (responses, log-probabilities), got "
                f"{type(generated).__name__}"
            )
        responses, log_probs = generated
        if not len(given) == len(responses) == len(log_probs):
            raise ValueError(
                f"generate() got {len(given)} prompts and returned {len(responses)} responses "
                f"and {len(log_probs)} log-probability arrays"
            )
        for i, (response, log_prob) in enumerate(zip(responses, log_probs, strict=True)):
            if len(response) < 1 or len(log_prob) != len(response):
                raise ValueError(
                    f"generate() returned {len(response)} tokens and {len(log_prob)} log-probabilities for "
                    f"episode {i}; expected equally many, at least one"
                )
        return given.extended(responses, POLICY, log_probs)

    def _check_continues(self, given: Sequences) -> None:
        if len(self) != len(given):
            raise ValueError(f"generate() got {len(given)} prompts and returned {len(self)} sequences")
        for i, (before, whole) in enumerate(
            zip(given.split(given.tokens), self.split(self.tokens), strict=True)
        ):
            if not np.array_equal(before, whole[: len(before)]):
                raise ValueError(
                    f"generate() returned a sequence that does not go on from prompt {i}: given {before.tolist()}, "
                    f"returned {whole.tolist()}"
                )
        silent = np.flatnonzero(self.num_actions <= given.num_actions)
        if len(silent):
            raise ValueError(
                f"generate() returned no token of the policy for episode {silent[0]}; expected at least one"
            )

    @classmethod
    def from_padded(cls, input_ids: np.ndarray, mask: np.ndarray, written_by: np.ndarray) -> Sequences:
        """From ``[B, L]`` arrays, padded anywhere: token ids, the mask of real ones, and who wrote each."""
        real = np.asarray(mask).astype(bool)
        return cls(np.asarray(input_ids)[real], _starts(real.sum(1)), np.asarray(written_by)[real])

    @staticmethod
    def concatenate(parts: Sequence[Sequences]) -> Sequences:
        """All sequences of several batches; what not every part has is dropped."""
        values: dict[str, np.ndarray | None] = {}
        for name in _PER_TOKEN:
            known = [getattr(part, name) for part in parts]
            values[name] = None if any(value is None for value in known) else np.concatenate(known)
        return Sequences(
            np.concatenate([part.tokens for part in parts]),
            _starts(np.concatenate([part.lengths for part in parts])),
            np.concatenate([part.written_by for part in parts]),
            **values,
            device=parts[0].device,
            native=all(part.native for part in parts),
        )

    # -- parts ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Any) -> Sequences:
        """Some of the sequences: a slice, a mask ``[B]``, or indices (arrays or tensors in the host's memory)."""
        chosen = np.atleast_1d(np.arange(len(self))[np.asarray(rows) if isinstance(rows, Tensor) else rows])
        lengths = self.lengths[chosen]
        index = ranges(self.starts[chosen], lengths)
        values = {name: getattr(self, name) for name in ("tokens", "written_by", *_PER_TOKEN)}
        taken = {name: None if value is None else value[index] for name, value in values.items()}
        return dataclasses.replace(self, starts=_starts(lengths), **taken)

    def __iter__(self) -> Iterator[Any]:
        """``responses, log_probs = generate(...)``: lists of ``B`` arrays, the second None where not known."""
        yield self.responses
        yield None if self.log_probs is None else self._after(self.log_probs)

    def with_values(self, **values: Any) -> Sequences:
        """The same tokens with other values beside them; what has been laid out is kept.

        With other ``log_probs`` they are no longer ``native``, unless that is given too.
        """
        values = {"native": self.native and "log_probs" not in values} | values
        made = dataclasses.replace(self, **values)
        fields = {field.name for field in dataclasses.fields(self)}
        vars(made).update({n: v for n, v in vars(self).items() if n not in fields}, _derived=self._derived)
        return made

    def extended(
        self,
        spans: Sequence[Sequence[int] | np.ndarray],
        written_by: int,
        log_probs: Sequence[np.ndarray] | None = None,
        native: bool = False,
    ) -> Sequences:
        """Every sequence with a span after it.

        Of what stands beside the tokens only log-probabilities stay, and they only where they are known of every token
        of the policy.

        Args:
            spans: ``B`` arrays of token ids; an empty one leaves its sequence as it is.
            written_by: Who wrote them.
            log_probs: ``B`` arrays, one number for each token of the spans.
            native: Whether our own decoder wrote them.
        """
        lengths = np.array([len(span) for span in spans], dtype=np.int64)
        numbers = np.tile(np.arange(len(self)), 2)
        order = np.argsort(np.repeat(numbers, np.append(self.lengths, lengths)), kind="stable")
        before, now = self.log_probs, np.zeros(lengths.sum())
        if written_by == POLICY:
            begins = not len(self.policy)
            native = native and (begins or self.native)
            before = np.zeros(len(self.tokens)) if begins else before
            now = None if log_probs is None else np.concatenate(log_probs)
        else:
            native = self.native
        return Sequences(
            np.concatenate([self.tokens, *(np.asarray(span, dtype=np.int64) for span in spans)])[order],
            _starts(self.lengths + lengths),
            np.append(self.written_by, np.full(lengths.sum(), written_by))[order],
            log_probs=None if before is None or now is None else np.append(before, now)[order],
            device=self.device,
            native=native,
        )

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences, for models on another device."""
        device = torch.device(device)
        return self if device == self.device else dataclasses.replace(self, device=device)

    def derived(self, make: Callable[[Sequences], _Derived]) -> _Derived:
        """``make(self)``, made at the first call and kept: a layout is computed and moved once.

        Args:
            make: Reads tokens, who wrote them and the device, and nothing that stands beside them.
        """
        if make not in self._derived:
            self._derived[make] = make(self)
        return self._derived[make]

    # -- lengths and places -----------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int64 ``[B]``."""
        return np.diff(np.append(self.starts, len(self.tokens)))

    @cached_property
    def policy(self) -> np.ndarray:
        """Where the policy's tokens stand in :attr:`tokens`, int64 ``[m]``."""
        return np.flatnonzero(self.written_by == POLICY)

    @cached_property
    def actions(self) -> np.ndarray:
        """The policy's tokens, sequence after sequence, int64 ``[m]``."""
        return self.tokens[self.policy]

    @cached_property
    def rows(self) -> np.ndarray:
        """Which sequence each of the policy's tokens belongs to, int64 ``[m]``."""
        return np.searchsorted(self.starts, self.policy, side="right") - 1

    @cached_property
    def num_actions(self) -> np.ndarray:
        """How many tokens of each sequence the policy wrote, int64 ``[B]``."""
        return np.bincount(self.rows, minlength=len(self))

    @cached_property
    def first(self) -> np.ndarray:
        """Tokens before the first one of the policy, int64 ``[B]``; all of them where it wrote none."""
        first = self.lengths.copy()
        some = self.num_actions > 0
        at = (np.cumsum(self.num_actions) - self.num_actions)[some]
        first[some] = self.policy[at] - self.starts[some]
        return first

    @cached_property
    def last(self) -> np.ndarray:
        """Tokens before the last one of the policy, int64 ``[B]``; all of them where it wrote none."""
        last = self.lengths.copy()
        some = self.num_actions > 0
        last[some] = self.policy[np.cumsum(self.num_actions)[some] - 1] - self.starts[some]
        return last

    @cached_property
    def prompts(self) -> list[np.ndarray]:
        """What stands before the first token of the policy, ``B`` arrays."""
        return [self.tokens[s : s + k] for s, k in zip(self.starts, self.first, strict=True)]

    @cached_property
    def responses(self) -> list[np.ndarray]:
        """What comes from the first token of the policy on, ``B`` arrays."""
        return self._after(self.tokens)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """What stands beside the tokens ``[n]``, or the tokens, apart for each sequence: ``B`` arrays."""
        return np.split(values, self.starts[1:])

    def _after(self, values: np.ndarray) -> list[np.ndarray]:
        ends = self.starts + self.lengths
        return [values[s + k : e] for s, k, e in zip(self.starts, self.first, ends, strict=True)]

    # -- [B, T] and a mask ------------------------------------------------------------------------------------

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values of the policy's tokens ``[m]`` beside all tokens, float64 ``[n]``, 0 elsewhere."""
        whole = np.zeros(len(self.tokens))
        whole[self.policy] = values
        return whole

    def mask(self, width: int | None = None) -> np.ndarray:
        """bool ``[B, T]``: the policy's tokens as steps, from the left; ``T`` is the most of them, or ``width``."""
        return np.arange(self.num_actions.max() if width is None else width) < self.num_actions[:, None]

    def padded(self, values: Any, width: int | None = None) -> Any:
        """Values of the policy's tokens as steps, 0 after the last.

        Args:
            values: ``[m]``, an array or a tensor on :attr:`device`, whose gradient is kept.
            width: ``T``; None is the most tokens that the policy wrote in a sequence.

        Returns:
            ``[B, T]``.
        """
        width = int(self.num_actions.max()) if width is None else width
        if isinstance(values, Tensor):
            row, step = self.derived(step_places)
            blank = values.new_zeros(len(self) * width)
            return blank.index_copy(0, row * width + step, values).view(len(self), width)
        steps = np.zeros((len(self), width), dtype=np.asarray(values).dtype)
        steps[self.mask(width)] = values
        return steps

    def right_padded(self) -> np.ndarray:
        """Token ids under each other, int64 ``[B, L]``, 0 after the end."""
        return right_padded(self.split(self.tokens))


def step_places(sequences: Sequences) -> list[Tensor]:
    """Row and step of each of the policy's tokens, int64 ``[m]`` each, on the device."""
    counts = sequences.num_actions
    return move([sequences.rows, ranges(np.zeros_like(counts), counts)], sequences.device)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def ranges(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, ...``, ``lengths[i]`` of them, one after another."""
    return np.arange(lengths.sum()) + np.repeat(start - _starts(lengths), lengths)


def right_padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays of token ids under each other, int64 ``[B, L]``, zeros after the end of the shorter ones."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    ids[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(rows)
    return ids


def distinct(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which rows differ.

    Returns:
        Index of the first of each kind, in order of appearance, int64 ``[U]``; and for each row the number of its
        kind, int64 ``[B]``.
    """
    seen: dict[bytes, int] = {}
    first: list[int] = []
    owner = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        key = np.ascontiguousarray(row, dtype=np.int64).tobytes()
        if key not in seen:
            seen[key] = len(first)
            first.append(i)
        owner[i] = seen[key]
    return np.array(first, dtype=np.int64), owner


def common_length(rows: Sequence[np.ndarray]) -> int:
    """With how many tokens all rows begin alike."""
    shortest = min(map(len, rows))
    alike = (np.stack([row[:shortest] for row in rows]) == rows[0][:shortest]).all(0)
    return shortest if alike.all() else int(alike.argmin())


def move(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Integer arrays as int64 tensors on a device, in one transfer that nothing waits for."""
    flat = torch.from_numpy(np.concatenate([np.asarray(a, dtype=np.int64).ravel() for a in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    flat = flat.to(device, non_blocking=True)
    return [part.view(a.shape) for part, a in zip(flat.split([a.size for a in arrays]), arrays, strict=True)]
