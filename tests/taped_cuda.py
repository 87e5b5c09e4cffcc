"""CUDA's streams and graphs on a CPU, as far as decoding uses them: a tape of operations in the place of a graph.

As in a graph, what is recorded are operations on addresses: replaying does them again on the same tensors, and nothing
of Python. What depends on a number that was looked at, or on a Python variable, comes out as it was at recording.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOOKS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _LOOKS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out


class _Graph:
    def __init__(self, log) -> None:
        self.log, self.tape = log, _Tape()

    def replay(self) -> None:
        self.log.append("replay")
        for func, args, kwargs, out in self.tape.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Stream:
    def __init__(self, name, log) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class TapedCuda:
    """Stands for ``torch.cuda``; ``log`` says what happened, in order."""

    def __init__(self) -> None:
        self.log = []
        self._usual = _Stream("usual", self.log)

    def Stream(self, device):
        return _Stream("side", self.log)

    def current_stream(self, device):
        return self._usual

    @contextlib.contextmanager
    def stream(self, stream):
        self.log.append(f"work on {stream.name}")
        yield

    def CUDAGraph(self):
        return _Graph(self.log)

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.log.append(f"record on {stream.name}")
        with graph.tape:
            yield
        # A graph is recorded without being run: what it would have written is not there yet.
        for func, _, _, out in graph.tape.operations:
            if func is torch.ops.aten.copy_.default:
                out.fill_(torch.nan)
