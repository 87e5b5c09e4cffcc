"""Computations of fixed shape that are recorded once and made again without Python.

Decoding launches every operation of every layer for every token. On a GPU the launches take longer than the
operations unless there is much to do in each, so a token's step is recorded as a CUDA graph and replayed: one launch.
A record knows addresses and nothing of Python: what changes from call to call has to be in tensors that stay where they
are. :class:`Recording` keeps to that; where recording itself happens is behind :class:`Recorder`, so that the same code
runs on a CPU with plain calls in the place of graphs, and is tested there.

Records live as long as one call of :func:`~textrl_env.lm.decoding.generate`. To keep them longer would spare little (a
record costs about two steps) and would replay old weights wherever somebody puts a new tensor in a parameter's place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: How a token's step is made: what the device is best at, launched by Python, fixed shapes with plain calls, recorded
#: as a CUDA graph, or compiled by torch and then recorded where CUDA is.
DECODE_STEPS = ("auto", "eager", "static", "cuda_graph", "compile")


class Recorder(ABC):
    """Makes records of computations."""

    @abstractmethod
    def rehearse(self, work: Callable[[], None]) -> None:
        """Do the work once before it is recorded, so that what happens at a first call is not in the record."""

    @abstractmethod
    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does the work again when it is called; the work itself may not have been done yet."""


class PlainCalls(Recorder):
    """No records: the work is called again, on tensors of fixed shape and place all the same."""

    def rehearse(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


class CudaGraphs(Recorder):
    """Records as CUDA graphs.

    Args:
        device: Which GPU.
        cuda: torch's interface to CUDA; tests put one of their own here that records on a CPU.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda, self._device = cuda, device
        self._stream = cuda.Stream(device)  # graphs cannot be recorded on the default stream

    def rehearse(self, work: Callable[[], None]) -> None:
        # On the stream of the recording: libraries keep workspaces for each stream, made at the first call.
        usual = self._cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        with self._cuda.stream(self._stream):
            work()
        usual.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = self._cuda.CUDAGraph()
        # Other threads may go on using the GPU while this one records.
        with self._cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Compiled(Recorder):
    """Work that torch compiles at the rehearsal, recorded by another recorder.

    torch's ``mode="reduce-overhead"`` is the same two things; here the graph is made by :class:`CudaGraphs`, which may
    write to caches in place.

    Args:
        recorder: Records what has been compiled.
        backend: Of ``torch.compile``.
    """

    def __init__(self, recorder: Recorder, backend: str = "inductor") -> None:
        self._recorder, self._backend = recorder, backend
        self._compiled: dict[Callable[[], None], Callable[[], None]] = {}

    def rehearse(self, work: Callable[[], None]) -> None:
        work()  # what is different at a first call is not compiled
        self._compiled[work] = torch.compile(work, backend=self._backend, dynamic=False)
        self._recorder.rehearse(self._compiled[work])

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return self._recorder.record(self._compiled.pop(work))


def make_recorder(decode_step: str, device: torch.device) -> Recorder | None:
    """The recorder for a device, None where steps are made by plain launches.

    Args:
        decode_step: One of :data:`DECODE_STEPS`.
        device: Of the model.

    Raises:
        ValueError: CUDA graphs are asked for on another device.
    """
    if decode_step == "auto":
        decode_step = "cuda_graph" if device.type == "cuda" else "eager"
    if decode_step == "eager":
        return None
    if decode_step == "static":
        return PlainCalls()
    if decode_step == "cuda_graph" and device.type != "cuda":
        raise ValueError(
            f"decode_step='cuda_graph' needs a CUDA device, and the model is on {str(device)!r}; 'static' has the same "
            "shapes on any device"
        )
    graphs: Recorder = CudaGraphs(device) if device.type == "cuda" else PlainCalls()
    return graphs if decode_step == "cuda_graph" else Compiled(graphs)


class Recording:
    """A function of one tensor of numbers: called plainly once, recorded at the second call, replayed from then on.

    Whoever needs it a single time pays for no record.

    Args:
        recorder: Makes the record.
        compute: From the numbers to the result, both of the same shape at every call. Whatever else it reads or writes
            must stay where it is as long as this is used.
        device: Where the numbers are needed.
    """

    def __init__(self, recorder: Recorder, compute: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._recorder, self._compute, self._device = recorder, compute, device
        self._numbers: Tensor | None = None
        self._result: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, numbers: np.ndarray) -> Tensor:
        """The result for these numbers, in a tensor that the next call writes over."""
        given = torch.from_numpy(np.ascontiguousarray(numbers))
        if self._device.type == "cuda":
            given = given.pin_memory()
        if self._numbers is None:
            self._numbers = given.to(self._device, copy=True)
            self._recorder.rehearse(self._work)
        else:
            self._numbers.copy_(given, non_blocking=True)
            if self._replay is None:
                self._replay = self._recorder.record(self._work)
            self._replay()
        return self._result

    def _work(self) -> None:
        result = self._compute(self._numbers)
        if self._result is None:  # at the rehearsal, so that it lies outside of what a graph manages
            self._result = result.clone()
        else:
            self._result.copy_(result)
