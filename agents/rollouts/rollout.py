"""What an agent learns from: ``[B, T]`` tensors with a mask, however they were collected."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass
class Rollout:
    """``B`` segments or episodes of ``T`` steps.

    Attributes:
        inputs: What the policy needs to say log-probabilities again; each tensor leads with ``B``.
        actions: ``[B, T]``, or ``[B, T, A]`` for continuous actions.
        rewards: ``[B, T]``.
        log_probs: ``[B, T]``, of the policy that acted.
        values: ``[B, T]``, the critic's; 0 without one.
        next_values: ``[B, T]``, the critic's of the next state; 0 after a termination.
        mask: bool ``[B, T]``, the steps that the policy wrote.
        done: bool ``[B, T]``, last steps of episodes.
        ref_log_probs: ``[B, T]`` of the reference, where the environment has one.
        penalties: ``[B, T]``, what the KL has taken off the rewards (>= 0 in expectation), where it has.
        advantages: ``[B, T]``, set by the agent.
        returns: ``[B, T]``, the critic's targets, set by the agent.
        group: int ``[B]``, the start state that each episode shares with its group, for logs and tests.
        evaluation: What the policy has already said of all rows, with gradient, for the first update of the whole
            rollout; parts of a rollout have none.
    """

    inputs: dict[str, Tensor]
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
    group: Tensor | None = None

    #: Not a field, so that no part, copy or change of a rollout has it.
    evaluation = None

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def lengths(self) -> Tensor:
        """Number of real steps of each row, int64 ``[B]``."""
        return self.mask.sum(1)

    def _map(self, function: Any) -> Rollout:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inputs = {name: function(tensor) for name, tensor in fields.pop("inputs").items()}
        return Rollout(inputs, **{n: None if t is None else function(t) for n, t in fields.items()})

    def __getitem__(self, rows: Tensor) -> Rollout:
        """The rows at the given indices."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Rollout:
        """On another device."""
        if self.mask.device == device:
            return self
        moved = self._map(lambda tensor: tensor.to(device))
        moved.evaluation = self.evaluation
        return moved

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
        order = torch.from_numpy(generator.permutation(len(self))).to(self.mask.device)
        for start in range(0, len(self), batch_size):
            yield self[order[start : start + batch_size]]

    def micro_batches(self, size: int | None) -> Iterator[tuple[Rollout, Tensor]]:
        """Pieces of at most ``size`` rows, each with its row indices: groups together, else of like length."""
        if size is None or size >= len(self):
            yield self, torch.arange(len(self), device=self.mask.device)
            return
        grouped = self.group is not None and len(self.group.unique()) < len(self)
        order = (self.group if grouped else self.lengths).argsort(stable=True)
        for start in range(0, len(self), size):
            rows = order[start : start + size]
            yield self[rows], rows


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
        fields[field.name] = None if values[0] is None else join(values)
    return Rollout(inputs=_join_inputs(waves, width, join), **fields)


def _join_inputs(waves: list[Rollout], width: int, join: Any) -> dict[str, Tensor]:
    inputs = [wave.inputs for wave in waves]
    if "input_ids" not in inputs[0]:
        return {name: join([each[name] for each in inputs]) for name in inputs[0]}
    # Token sequences: prompts are padded on the left, responses on the right.
    after = [wave.mask.shape[1] for wave in waves]
    before = [each["input_ids"].shape[1] - steps for each, steps in zip(inputs, after, strict=True)]
    padding = [(max(before) - b, width - a) for b, a in zip(before, after, strict=True)]
    return {
        name: torch.cat(
            [torch.nn.functional.pad(each[name], pad) for each, pad in zip(inputs, padding, strict=True)]
        )
        for name in inputs[0]
    }
