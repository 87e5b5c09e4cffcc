"""Decoding after shared prompts: a prompt's keys and values are held once, and read once a token for all its responses.

Attention over a prompt and over what each response has added are computed apart and put together by their
normalisers, which is exact; transformers' attention interface lets a model use it without knowing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import AttentionInterface

_NAME = "textrl_shared_prompts"


class SharedPrompts:
    """The prompts of a batch of responses.

    Args:
        keys: Of each layer, ``[U, heads, P, head_dim]``, prompts right-padded to ``P``.
        values: Of each layer, likewise.
        lengths: Of the prompts, int64 ``[U]``.
        owners: Which prompt each row continues, int64 ``[N]``.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], lengths: np.ndarray, owners: np.ndarray
    ) -> None:
        self.keys, self.values = keys, values
        self.lengths, self.owners = lengths, owners
        device = keys[0].device
        # Rows of one prompt stand side by side: row n is number rank[n] of prompt owners[n].
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=len(lengths))
        rank = np.empty_like(owners)
        rank[order] = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.zeros((len(lengths), counts.max()), dtype=np.int64)  # [U, G]; unused places repeat row 0
        rows[owners, rank] = np.arange(len(owners))
        self._owner, self._rank, self._rows = (torch.from_numpy(x).to(device) for x in (owners, rank, rows))
        known = torch.from_numpy(lengths).to(device)[:, None, None, None]
        self._seen = torch.arange(keys[0].shape[2], device=device) < known  # [U, 1, 1, P]

    def select(self, rows: np.ndarray) -> SharedPrompts:
        """The same prompts for some of the rows."""
        return SharedPrompts(self.keys, self.values, self.lengths, self.owners[rows])

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
    ) -> Tensor:
        """Attention of one query in each row over its prompt and its own tokens.

        Args:
            layer: Which layer's prompts.
            query: ``[N, heads, 1, d]``.
            key: Own keys, ``[N, kv_heads, T, d]``.
            value: Own values, likewise.
            mask: bool ``[N, 1, 1, T]``, true on own tokens.
            scaling: Of the scores.

        Returns:
            ``[N, 1, heads, d]``.
        """
        count, heads, _, size = query.shape
        shared = key.shape[1]  # heads of keys and values, each for several heads of the query
        query = query.reshape(count, shared, heads // shared, size)  # [N, k, g, d]
        own, own_mass = _attend_with_mass(query, key, value, mask, scaling)
        read, mass = _attend_with_mass(
            self._gather(query), self.keys[layer], self.values[layer], self._seen, scaling
        )
        read, mass = self._scatter(read, heads // shared), self._scatter(mass[..., None], heads // shared)
        # Two softmaxes become one: each part weighs what it had of the common normaliser.
        share = torch.sigmoid(mass - own_mass[..., None]).to(own.dtype)
        return torch.lerp(own, read, share).reshape(count, 1, heads, size)

    def _gather(self, x: Tensor) -> Tensor:
        """``[N, k, g, ...]`` of rows to ``[U, k, G g, ...]`` of prompts."""
        grouped = x[self._rows].transpose(1, 2)  # [U, k, G, g, ...]
        return grouped.reshape(*grouped.shape[:2], -1, grouped.shape[-1])

    def _scatter(self, x: Tensor, group: int) -> Tensor:
        """Back again."""
        apart = x.unflatten(2, (-1, group)).transpose(1, 2)  # [U, G, k, g, ...]
        return apart[self._owner, self._rank]


def _attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention ``[..., Q, d]`` and the logarithm of its normaliser, float32 ``[..., Q]``."""
    scores = (query @ key.transpose(2, 3) * scaling).float()
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def _attend_with_mass(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The same; on a CPU by torch's kernel, which reads keys of any layout without a copy."""
    if query.device.type != "cpu":
        return _attend_plainly(query, key, value, mask, scaling)
    bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, attn_mask=bias, scale=scaling)


_active: SharedPrompts | None = None


@contextlib.contextmanager
def attending(prompts: SharedPrompts | None, config: PreTrainedConfig) -> Iterator[None]:
    """Let the model of ``config`` attend to these prompts before its own cache; None changes nothing."""
    global _active
    if prompts is None:
        yield
        return
    usual, _active = config._attn_implementation_internal, prompts
    config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        config._attn_implementation_internal, _active = usual, None


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _active.attend(module.layer_idx, query, key, value, attention_mask, scaling), None


AttentionInterface.register(_NAME, _attention)
