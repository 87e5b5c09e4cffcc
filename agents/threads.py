"""How many threads a small network is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

#: Below this many parameters the work of one operation is less than what it takes to share it out.
SMALL = 1_000_000


@contextmanager
def fitting_threads(module: nn.Module) -> Iterator[None]:
    """One torch thread while a small network works on the CPU; what it was before, afterwards.

    On two busy cores the embedded world's model trains several times faster with one thread than with two.

    Args:
        module: The network, its parameters on the device where it works.
    """
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
