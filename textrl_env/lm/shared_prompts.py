"""Responses after shared prompts: a prompt's keys and values are held once, and read once for all its responses.

Attention over a prompt and over what each response has added are computed apart and put together by their
normalisers, which is exact, and so is the gradient; transformers' attention interface lets a model decode with it
without knowing. Gradients are left out where torch's CPU kernel is not at hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NAME = "textrl_shared_prompts"


def added_to_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask, true where a token may look, as what is added to the scores: nothing or minus infinity."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


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
        used = np.arange(counts.max()) < counts[:, None]  # [U, G]
        self._used = None if used.all() else torch.from_numpy(used).to(device)
        known = torch.from_numpy(lengths).to(device)[:, None, None, None]
        seen = torch.arange(keys[0].shape[2], device=device) < known  # [U, 1, 1, P]
        self._bias = added_to_scores(seen, keys[0].dtype)

    def select(self, rows: np.ndarray) -> SharedPrompts:
        """The same prompts for some of the rows."""
        return SharedPrompts(self.keys, self.values, self.lengths, self.owners[rows])

    @staticmethod
    def joined(parts: list[SharedPrompts]) -> SharedPrompts:
        """The same prompts for the rows of several, which all continue these prompts, one after another."""
        first = parts[0]
        return SharedPrompts(
            first.keys, first.values, first.lengths, np.concatenate([x.owners for x in parts])
        )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention of the tokens of each row over its prompt and the row's own tokens.

        Args:
            layer: Which layer's prompts.
            query: ``[N, heads, W, d]``.
            key: Own keys, ``[N, kv_heads, T, d]``.
            value: Own values, likewise.
            bias: Added to the scores of own tokens, ``[N or 1, 1, W, T]``; None is causal, ``W = T``.
            scaling: Of the scores.

        Returns:
            ``[N, W, heads, d]``.
        """
        count, heads, width, size = query.shape
        shared = key.shape[1]  # heads of keys and values, each for several heads of the query
        groups = heads // shared
        if bias is None and groups > 1:
            causal = torch.ones(1, 1, width, width, dtype=torch.bool, device=query.device).tril()
            bias = added_to_scores(causal, query.dtype)
        if groups > 1:
            bias = bias.repeat(1, 1, groups, 1)  # heads of one key stand where further queries would
        query = query.reshape(count, shared, groups * width, size)
        dtype = query.dtype
        of_prompts = self.keys[layer].to(dtype), self.values[layer].to(dtype)
        read = _Attention.apply(query, key.to(dtype), value.to(dtype), *of_prompts, bias, self, scaling)
        return read.reshape(count, heads, width, size).transpose(1, 2)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of the prompts' tokens: nothing, or minus infinity on padding."""
        if self._bias.dtype != dtype:
            self._bias = self._bias.to(dtype)
        return self._bias

    def gather(self, x: Tensor, blank: bool = False) -> Tensor:
        """``[N, k, q, ...]`` of rows to ``[U, k, G q, ...]`` of prompts, zeros in unused places if ``blank``."""
        grouped = x[self._rows]  # [U, G, k, q, ...]
        if blank and self._used is not None:
            grouped = grouped * self._used.view(*self._used.shape, *[1] * (grouped.dim() - 2))
        return grouped.transpose(1, 2).flatten(2, 3)

    def scatter(self, x: Tensor, queries: int) -> Tensor:
        """Back again; ``queries`` is ``q``."""
        apart = x.unflatten(2, (-1, queries)).transpose(1, 2)  # [U, G, k, q, ...]
        return apart[self._owner, self._rank]


class _Attention(torch.autograd.Function):
    """Two attentions as one: queries ``[N, k, q, d]`` over their row's own keys and over those of its prompt."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        bias: Tensor | None,
        prompts: SharedPrompts,
        scaling: float,
    ) -> Tensor:
        own, own_mass = _attend(query, key, value, bias, scaling)
        read, mass = _attend(
            prompts.gather(query), prompt_key, prompt_value, prompts.bias(query.dtype), scaling
        )
        read, mass = (prompts.scatter(x, query.shape[2]) for x in (read, mass))
        # Two softmaxes become one: each part weighs what it had of the common normaliser.
        out = torch.lerp(own, read, torch.sigmoid(mass - own_mass).unsqueeze(-1).to(own.dtype))
        if any(ctx.needs_input_grad):
            ctx.prompts, ctx.scaling = prompts, scaling
            common = torch.logaddexp(mass, own_mass)
            ctx.save_for_backward(query, key, value, prompt_key, prompt_value, bias, out, common)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        query, key, value, prompt_key, prompt_value, bias, out, mass = ctx.saved_tensors
        prompts, scaling = ctx.prompts, ctx.scaling
        # Given the common result and normaliser, each part's own formula is its share of the gradient.
        of_query, of_key, of_value = _gradient(grad, query, key, value, out, mass, bias, scaling)
        grad = prompts.gather(grad, blank=True)
        asked, out, mass = (prompts.gather(x) for x in (query, out, mass))
        prompt_bias = prompts.bias(query.dtype)
        more, *of_prompt = _gradient(grad, asked, prompt_key, prompt_value, out, mass, prompt_bias, scaling)
        return (
            of_query + prompts.scatter(more, query.shape[2]),
            of_key,
            of_value,
            *of_prompt,
            None,
            None,
            None,
        )


def _gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    mass: Tensor,
    bias: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, query, key, value, out, mass, 0.0, bias is None, attn_mask=bias, scale=scaling)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention ``[..., Q, d]`` and the logarithm of its normaliser, float32 ``[..., Q]``; no bias is causal.

    On a CPU by torch's kernel, which reads keys of any layout without a copy.
    """
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, 0.0, bias is None, attn_mask=bias, scale=scaling)
    scores = (query @ key.transpose(2, 3) * scaling).float()
    if bias is None:
        bias = torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu(1)
    scores = scores + bias
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


_active: SharedPrompts | None = None


@contextlib.contextmanager
def attending(prompts: SharedPrompts | None, config: Any) -> Iterator[None]:
    """Let the model of ``config`` attend to these prompts before its own cache; None changes nothing."""
    global _active
    if prompts is None:
        yield
        return
    # Here and not at the top: should another version of transformers keep it elsewhere, only this is slower.
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(_NAME, _attention)
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
    if attention_mask.dtype == torch.bool:
        attention_mask = added_to_scores(attention_mask, query.dtype)
    return _active.attend(module.layer_idx, query, key, value, attention_mask, scaling), None
