"""Frozen models that lie in the host's memory while nobody asks them.

A reference and a reward model are asked during a rollout and wait through the update, whose activations want the memory
of the device. What it costs is the way of their weights to the host and back, once a rollout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class Offloading:
    """Takes weights to the host's memory and brings them back to where they were.

    The host keeps its place for them from one time to the next. Left out: quantised weights, which hold more than a
    tensor, and anything that is not on an accelerator.
    """

    def __init__(self) -> None:
        self._places: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # by id, which the tensor itself keeps from being reused

    @contextlib.contextmanager
    def away(self, models: Iterable[nn.Module], needed: Iterable[nn.Module] = ()) -> Iterator[int]:
        """Within it, the weights of ``models`` are in the host's memory.

        Args:
            models: May share weights; each goes once.
            needed: Models whose weights stay, also where one of ``models`` shares them.

        Yields:
            How many bytes have left their device.
        """
        stay = {_place(tensor) for model in needed for tensor in _tensors(model)}
        leaving = {
            id(x): x for model in models if not getattr(model, "is_quantized", False) for x in _tensors(model)
        }
        gone: list[tuple[Tensor, torch.device]] = []
        try:
            for tensor in leaving.values():
                if self.may_leave(tensor.device) and _place(tensor) not in stay:
                    gone.append((tensor, tensor.device))
                    tensor.data = self._host_copy(tensor)
            yield sum(tensor.nbytes for tensor, _ in gone)
        finally:
            for tensor, device in gone:
                tensor.data = tensor.data.to(device, non_blocking=True, copy=True)

    @staticmethod
    def may_leave(device: torch.device) -> bool:
        """Whether leaving a device frees memory there."""
        return device.type not in ("cpu", "meta")

    def _host_copy(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._places:
            pinned = tensor.device.type == "cuda"
            self._places[id(tensor)] = tensor, torch.empty_like(tensor.data, device="cpu", pin_memory=pinned)
        # Copied anew every time: a reference may have been moved, in ways that leave no trace.
        return self._places[id(tensor)][1].copy_(tensor.data)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
