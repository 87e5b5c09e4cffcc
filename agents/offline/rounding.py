"""How much of what was learned is lost where weights are written in half precision.

A weight of 0.02 has neighbours at a distance of 1.2e-4 in bfloat16. A hundred steps of 1e-6, from a weight that came in
bfloat16, end nearer to it than to any other number, and are gone when the model is saved.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Elements of each tensor that are looked at.
_SAMPLED = 256


class RoundingCheck:
    """Some of the weights as they were at the start.

    Args:
        weights: By name.
        dtype: What they will be written in.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._start = {name: _some(weight) for name, weight in weights}

    def lost(self, weights: Iterable[tuple[str, Tensor]]) -> float:
        """The share of the weights that have moved and are written as they were; 0 if none has moved.

        Args:
            weights: By name, as they are now, in their full precision.
        """
        moved = gone = 0
        for name, weight in weights:
            before, now = self._start[name], _some(weight)
            has_moved = now != before
            moved += int(has_moved.sum())
            gone += int((has_moved & (now.to(self.dtype) == before.to(self.dtype))).sum())
        return gone / max(moved, 1)


def _some(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu().clone()
