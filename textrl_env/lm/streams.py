"""Random numbers of sequences: one stream for each, whoever writes it and beside whom."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from textrl_env.core import mixed_bits


class Streams:
    """One stream of random numbers for each of ``B`` sequences.

    A number depends on its sequence's key and on the place of the token, and on nothing else: not on how many sequences
    are written at once, which of them have ended, or in which process. So a batch may be cut up in any way.

    Args:
        keys: uint64 ``[B]``.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = np.asarray(keys, dtype=np.uint64)

    @classmethod
    def draw(cls, generator: torch.Generator | None, count: int) -> Streams:
        """Streams for ``count`` sequences, from one number of ``generator`` (None is torch's own)."""
        device = "cpu" if generator is None else generator.device
        base = torch.randint(2**63 - 1, (1,), generator=generator, device=device).cpu().numpy()
        # Mixed twice: with keys that lie evenly spaced, two streams would be one stream a few tokens apart.
        return cls(mixed_bits(mixed_bits(base.astype(np.uint64), np.uint64(1)), np.arange(1, count + 1)))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Any) -> Streams:
        """The streams of some of the sequences."""
        return Streams(self.keys[rows])

    def uniform(self, place: int) -> np.ndarray:
        """The numbers for the token at ``place`` of each sequence, float64 ``[B]`` in [0, 1)."""
        return (mixed_bits(self.keys, np.uint64(place + 1)) >> np.uint64(11)) * (1.0 / (1 << 53))
