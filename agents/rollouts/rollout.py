"""What an agent learns from: ``[B, T]`` tensors with a mask, however they were collected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from textrl_env.lm.sequences import Sequences


@dataclasses.dataclass
class Rollout:
    """``B`` segments or episodes of ``T`` steps.

    Attributes:
        inputs: What the policy evaluates: tensors that lead with ``B``, or ``{"sequences": Sequences}`` of ``B``.
        actions: ``[B, T]``, or ``[B, T, A]`` for continuous actions.
        rewards: float64 ``[B, T]``; float32 once the advantages are set.
        log_probs: ``[B, T]``, of the policy that acted.
        values: ``[B, T]``, the critic's; 0 without one.
        next_values: ``[B, T]``, the critic's of the next state; 0 after a termination.
        mask: bool ``[B, T]``, the steps that the policy wrote.
        done: bool ``[B, T]``, last steps of episodes.
        ref_log_probs: ``[B, T]`` of the reference, where the environment has one.
        penalties: ``[B, T]``, what the KL has taken off the rewards (>= 0 in expectation), where it has.
        advantages: ``[B, T]``, set by the agent.
        returns: ``[B, T]``, the critic's targets, set by the agent.
        sampling_log_probs: ``[B, T]`` as an outside generator reported them, where it is to be corrected for.
        scored: bool ``[B, T]``, false in the steps of episodes to which no reward applied; None where there are none.
        turn: int64 ``[B, T]``, which turn of its episode a step belongs to, from 0; None where there are no turns.
        state: int64 ``[B, T]``, a number for what the turn answers, where there are turns.
        cut: bool ``[B, T]``, last steps of episodes that were cut off: by the budget of tokens or the context, or by a
            time limit.
        kept: bool ``[B, T]``, the steps that have a surrogate, where a method leaves some out of a minibatch.
        chosen: bool ``[B, T]``, steps of a minibatch that a method treats apart.
        parts: float64 ``[B, T, K]``, what each of ``K`` rewards gave by itself, in the last step of an episode; NaN
            where it did not apply. None where there is one reward, or where the environment is stepped.
        group: int ``[B]`` in the host's memory, the start state that each episode shares with its group.
        evaluation: The policy's evaluation of all rows, with gradient, for the first update of the whole
            rollout; parts of a rollout have none.
    """

    inputs: dict[str, Any]
    actions: Tensor
    rewards: Tensor
    log_probs: Tensor
    values: Tensor
    next_values: Tensor
    mask: Tensor
    done: Tensor
    ref_log_probs: Tensor | None = None
    penalties: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    sampling_log_probs: Tensor | None = None
    group: Tensor | None = None
    scored: Tensor | None = None
    turn: Tensor | None = None
    state: Tensor | None = None
    cut: Tensor | None = None
    kept: Tensor | None = None
    chosen: Tensor | None = None
    parts: Tensor | None = None

    #: Not a field, so that no part, copy or change of a rollout has it.
    evaluation = None
    _lengths: ClassVar[np.ndarray | None] = None
    _part: ClassVar[tuple[np.ndarray, Rollout] | None] = None
    _pieces: ClassVar[tuple[int, list[tuple[Tensor, Tensor, dict[str, Any]]]] | None] = None

    def __len__(self) -> int:
        return len(self.mask)

    def without_unscored(self) -> Rollout:
        """The rows of episodes that a reward applied to; itself where that is all of them."""
        if self.scored is None or bool(self.scored.any(1).all()):
            return self
        return self[self.scored.any(1).nonzero().squeeze(1)]

    @property
    def lengths(self) -> Tensor:
        """Number of real steps of each row, int64 ``[B]``."""
        return self.mask.sum(1)

    def _map(self, function: Callable[[Any], Any]) -> Rollout:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inputs = {name: function(value) for name, value in fields.pop("inputs").items()}
        return Rollout(inputs, **{n: None if t is None else function(t) for n, t in fields.items()})

    def __getitem__(self, rows: Any) -> Rollout:
        """The rows at the given indices, or where a bool ``[B]`` is true."""
        rows = torch.as_tensor(rows)
        return self._take(rows.cpu(), rows.to(self.mask.device))

    def _take(self, rows: Tensor, here: Tensor) -> Rollout:
        """Rows by their indices in the host's memory and, the same, ``here`` where the tensors are."""

        def pick(value: Any) -> Any:
            on_device = isinstance(value, Tensor) and value.device == here.device
            return value[here if on_device else rows]

        part = self._map(pick)
        if self._lengths is not None:
            part._lengths = self._lengths[rows.numpy()]
        return part

    def part(self, rows: np.ndarray) -> Rollout:
        """Some rows, cut out at the first call and kept as long as the same are asked for."""
        if self._part is None or not np.array_equal(self._part[0], rows):
            self._part = rows, self[torch.from_numpy(rows)]
        return self._part[1]

    def keep(self, kept: Tensor) -> None:
        """Set :attr:`kept`, also on the part that has been cut out already."""
        self.kept = kept
        if self._part is not None:
            rows, part = self._part
            part.kept = kept[torch.from_numpy(rows).to(kept.device)]

    def to(self, device: torch.device) -> Rollout:
        """On another device; ``group`` stays in the host's memory, and so does what micro-batches are cut by."""
        if self.mask.device == device:
            return self
        moved = dataclasses.replace(self, group=None)._map(lambda value: _moved(value, device))
        moved.group, moved.evaluation = self.group, self.evaluation
        moved._lengths = self.host_lengths()
        return moved

    def host_lengths(self) -> np.ndarray:
        """:attr:`lengths`, in the host's memory."""
        return self.lengths.cpu().numpy() if self._lengths is None else self._lengths

    def flatten_steps(self) -> Rollout:
        """Every real step a row of its own, ``[sum(mask), 1]``; only for inputs that lead with ``[B, T]``."""
        group = self.group
        flat = dataclasses.replace(self, group=None)._map(lambda tensor: tensor[self.mask].unsqueeze(1))
        if group is not None:
            flat.group = group.repeat_interleave(self.lengths)
        return flat

    def minibatches(self, batch_size: int | None, generator: np.random.Generator) -> Iterator[Rollout]:
        """All rows once, in shuffled minibatches; None is one batch in the order it was collected."""
        if batch_size is None or batch_size >= len(self):
            yield self
            return
        order = torch.from_numpy(generator.permutation(len(self)))
        for start in range(0, len(self), batch_size):
            yield self[order[start : start + batch_size]]

    def micro_batches(self, size: int | None) -> Iterator[tuple[Rollout, Any]]:
        """Pieces of at most ``size`` rows, each with an index of its rows: groups together, else of like length.

        What policies read is cut at the first call and kept, so that it is moved to a device once.
        """
        if size is None or size >= len(self):
            yield self, slice(None)
            return
        if self._pieces is None or self._pieces[0] != size:
            self._pieces = (
                size,
                [(rows, here, self._take(rows, here).inputs) for rows, here in self._cuts(size)],
            )
        for rows, here, inputs in self._pieces[1]:
            piece = dataclasses.replace(self, inputs={})._take(rows, here)
            piece.inputs = inputs
            yield piece, here

    def _cuts(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Rows of each piece, in the host's memory and where the tensors are."""
        grouped = self.group is not None and len(self.group.unique()) < len(self)
        keys = self.group.numpy() if grouped else self.host_lengths()
        order = torch.from_numpy(keys.argsort(kind="stable"))
        here = order.to(self.mask.device)
        return list(zip(order.split(size), here.split(size), strict=True))


def _moved(value: Any, device: torch.device) -> Any:
    if device.type == "mps" and getattr(value, "dtype", None) == torch.float64:
        value = value.float()  # which Apple's GPUs do not have in double precision
    return value.to(device)


def concatenate(waves: list[Rollout]) -> Rollout:
    """Stack rollouts of different lengths, padded at the end of time; ``group`` is the caller's to number."""
    if len(waves) == 1:
        return waves[0]
    width = max(wave.mask.shape[1] for wave in waves)

    def join(tensors: list[Tensor]) -> Tensor:
        padded = []
        for tensor in tensors:
            missing = width - tensor.shape[1]
            pad = tensor.new_zeros((len(tensor), missing, *tensor.shape[2:]))
            padded.append(torch.cat([tensor, pad], dim=1))
        return torch.cat(padded)

    fields = {}
    for field in dataclasses.fields(Rollout):
        values = [getattr(wave, field.name) for wave in waves]
        if field.name in ("inputs", "group"):
            continue
        if field.name == "scored" and any(value is not None for value in values):
            values = [w.mask if w.scored is None else w.scored for w in waves]
        fields[field.name] = None if values[0] is None else join(values)
    return Rollout(inputs=_join_inputs(waves, join), **fields)


def _join_inputs(waves: list[Rollout], join: Callable[[list[Tensor]], Tensor]) -> dict[str, Any]:
    joined = {}
    for name, first in waves[0].inputs.items():
        parts = [wave.inputs[name] for wave in waves]
        joined[name] = Sequences.concatenate(parts) if isinstance(first, Sequences) else join(parts)
    return joined
