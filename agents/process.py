"""Settings of the whole process that make training faster: kept memory, and one thread for small networks.

They are up to the owner of the process. The command line does, and makes them; a program that calls ``learn()`` is left
as it is unless it asks::

    from agents.process import tune_process

    tune_process()

``TEXTRL_TUNE_PROCESS=1`` in the environment asks for it too, and ``TEXTRL_TUNE_PROCESS=0`` forbids it everywhere.
What each brings is measured in docs/speed.md.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

#: Below this many parameters the work of one operation is less than what it takes to share it out.
SMALL = 1_000_000
#: Names of settings in glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: The largest block that glibc agrees to keep.
_LARGEST = 32 * 2**20

_asked = False


def tune_process(enabled: bool = True) -> None:
    """Let training change this process from now on: :func:`keep_freed_memory` and :func:`fitting_threads`.

    Args:
        enabled: False leaves the process alone again; memory that is kept already stays.
    """
    global _asked
    _asked = enabled


@contextmanager
def tuned_process() -> Iterator[None]:
    """:func:`tune_process` for a while."""
    before = _asked
    tune_process()
    try:
        yield
    finally:
        tune_process(before)


def is_tuned() -> bool:
    """Whether training may change this process."""
    wish = os.environ.get("TEXTRL_TUNE_PROCESS", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"TEXTRL_TUNE_PROCESS={wish!r}: expected 0 or 1")
    return _asked if wish == "" else wish == "1"


@contextmanager
def tuned_for(module: nn.Module, large_tensors: bool) -> Iterator[None]:
    """What training a network runs in: the settings of this module where they were asked for, else nothing.

    Args:
        module: The network, its parameters on the device where it works.
        large_tensors: Whether its tensors are so large that keeping their memory pays; a language model's are.
    """
    if not is_tuned():
        yield
        return
    if large_tensors and all(p.device.type == "cpu" for p in module.parameters()):
        keep_freed_memory()
    with fitting_threads(module):
        yield


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones, as torch does on a GPU.

    Otherwise it gives every large block back to the kernel, and the next pass through the model faults all of its
    pages in again: a tenth of a training step. In return the process needs a tenth more memory, a small model's a
    quarter, and stays as large as it once was until it ends.

    Returns:
        Whether that was possible; it is with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    taken = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return all(taken)


@contextmanager
def fitting_threads(module: nn.Module) -> Iterator[None]:
    """One torch thread while a small network works on the CPU; what it was before, afterwards.

    On two busy cores the embedded world's model trains several times faster with one thread than with two.

    Args:
        module: The network, its parameters on the device where it works.
    """
    import torch

    parameters = list(module.parameters())
    before = torch.get_num_threads()
    on_cpu = all(p.device.type == "cpu" for p in parameters)
    if before == 1 or not on_cpu or sum(p.numel() for p in parameters) >= SMALL:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
