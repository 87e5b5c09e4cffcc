"""A setting of the whole process that makes training faster on a busy machine: one thread for small networks.

It is up to the owner of the process. The command line makes it; a program that calls ``learn()`` is left as it is
unless it asks::

    from agents.process import tune_process

    tune_process()

``TEXTRL_TUNE_PROCESS=1`` in the environment asks for it too, and ``TEXTRL_TUNE_PROCESS=0`` forbids it everywhere.
What it brings is measured in docs/speed.md. Left out: telling the C library to keep freed memory, which brought nothing
that could be measured and cost a tenth more memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

#: Below this many parameters the work of one operation is less than what it takes to share it out.
SMALL = 1_000_000
_asked = False


def tune_process(enabled: bool = True) -> None:
    """Let training change this process from now on: :func:`fitting_threads`.

    Args:
        enabled: False leaves the process alone again.
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
def tuned_for(module: nn.Module) -> Iterator[None]:
    """What training a network runs in: the setting of this module where it was asked for, else nothing.

    Args:
        module: The network, its parameters on the device where it works.
    """
    if not is_tuned():
        yield
        return
    with fitting_threads(module):
        yield


@contextmanager
def fitting_threads(module: nn.Module) -> Iterator[None]:
    """One torch thread while a small network works on the CPU; what it was before, afterwards.

    Two threads wait for each other at every small operation. On an idle machine that costs nothing that can be
    measured; where other processes want the cores too, a step takes a fifth to a third longer.

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
