"""The body of a Llama-like model in fewer and larger operations than its modules take.

Llama, Mistral, Qwen2, Qwen3 and whatever else is put together from the same parts: pre-normalisation by the root
mean square, rotary positions, grouped heads, a gated MLP. :class:`FusedLlama` reads the weights of a transformers
model and takes the place of its ``forward``, with gradients, caches and masks; its logits are compared with
the model's own before it is used (:func:`~textrl_env.lm.self_check.fused_body_works`).
Left out: dropout, attention windows (the callers keep within them), mixtures of experts, quantised weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from textrl_env.lm.shared_prompts import SharedPrompts, added_to_scores


class FusedLlama:
    """A transformers body and its weights, computed without calling its larger modules.

    Args:
        body: The body. Its linear layers may be anything callable, adapters for example.

    Raises:
        AttributeError: It has not the parts of a Llama.
    """

    def __init__(self, body: PreTrainedModel) -> None:
        self.layers = [_Layer(layer) for layer in body.layers]
        self.norm, self.rotary, self.embedding = body.norm, body.rotary_emb, body.embed_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        prompts: SharedPrompts | None = None,
    ) -> BaseModelOutputWithPast:
        """The last hidden states.

        Args:
            input_ids: int64 ``[R, W]``.
            attention_mask: bool ``[R or 1, 1, W, T]``, true where a token may look; None is causal among the ``W``,
                nothing cached before them.
            position_ids: int64 ``[R or 1, W]``; None counts from 0.
            past_key_values: Takes the keys and values of these tokens and gives those to look at.
            use_cache: As transformers has it; a given cache is always used.
            prompts: What every token may look at besides, at positions before those given.

        Returns:
            ``last_hidden_state [R, W, hidden]``.
        """
        hidden = self.embedding(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=hidden.device)[None]
        low = _product_dtype(hidden)
        rotation = _Rotation(*self.rotary(hidden, position_ids))
        attention = _Attention(attention_mask, past_key_values, prompts)
        for index, layer in enumerate(self.layers):
            hidden = hidden + layer.attend(_normalised(hidden, layer.before, low), rotation, attention, index)
            hidden = hidden + layer.feed(_normalised(hidden, layer.between, low))
        return BaseModelOutputWithPast(_normalised(hidden, self.norm, hidden.dtype), past_key_values)


class _Layer:
    """The parts of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        attention, mlp = layer.self_attn, layer.mlp
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
        self.out, self.head_dim, self.scaling = attention.o_proj, attention.head_dim, attention.scaling
        self.query_norm, self.key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.gate, self.up, self.down, self.activation = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def attend(self, x: Tensor, rotation: _Rotation, attention: _Attention, index: int) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        query, key, value = self.query(x).view(shape), self.key(x).view(shape), self.value(x).view(shape)
        if self.query_norm is not None:
            query = _normalised(query, self.query_norm, x.dtype)
            key = _normalised(key, self.key_norm, x.dtype)
        query, key = rotation(query), rotation(key)  # [R, W, heads, d]
        read = attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), self.scaling, index
        )
        return self.out(read.reshape(*x.shape[:2], -1).to(x.dtype))

    def feed(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class _Attention:
    """Attention of one pass: who may look where, the same in every layer.

    Args:
        mask: bool, or None for causal.
        cache: Takes and gives keys and values, or None.
        prompts: See :class:`FusedLlama`.
    """

    def __init__(self, mask: Tensor | None, cache: Cache | None, prompts: SharedPrompts | None) -> None:
        self.mask, self.cache, self.prompts = mask, cache, prompts
        self.bias: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, index: int) -> Tensor:
        """``[R, heads, W, d]`` three times; returns ``[R, W, heads, d]``."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, index)
        if self.prompts is not None:
            return self.prompts.attend(index, query, key, value, self._added(query), scaling)
        rows, heads, width, size = query.shape
        groups = heads // key.shape[1]
        if width == 1:
            # The heads that share a key stand where further queries would: nothing is repeated.
            query = query.reshape(rows, -1, groups, size)
            read = F.scaled_dot_product_attention(query, key, value, self._added(query), scale=scaling)
            return read.reshape(rows, 1, heads, size)
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        causal = self.mask is None
        mask = None if causal else self._added(query)
        read = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling)
        return read.transpose(1, 2)

    def _added(self, query: Tensor) -> Tensor | None:
        """The mask as what is added to the scores, made once for all layers."""
        if self.mask is None:
            return None
        if self.bias is None:
            self.bias = added_to_scores(self.mask, query.dtype)
        return self.bias


class _Rotation:
    """Rotary positions of one pass (Su et al. 2021), for queries and keys alike.

    Args:
        cos: ``[R or 1, W, d]``, both halves alike.
        sin: Likewise.
    """

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        half = sin.shape[-1] // 2
        signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        self.cos, self.sin = cos.unsqueeze(2), signed.unsqueeze(2)  # [R, W, 1, d]

    def __call__(self, x: Tensor) -> Tensor:
        return (_Rotate.apply if torch.is_grad_enabled() else _rotated)(x, self.cos, self.sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin).to(ctx.dtype), None, None  # back by the same angle


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of ``x`` turned against each other, in the precision of ``cos``."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1).to(cos.dtype), sin)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products are done in."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def _normalised(x: Tensor, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    """``x / rms(x) * weight`` (Zhang and Sennrich 2019) along the last dimension, as ``dtype``."""
    weight, epsilon = norm.weight, norm.variance_epsilon
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, epsilon, dtype)
    return _unit(x, epsilon)[0].mul_(weight).to(dtype)


def _unit(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``x / rms(x)``, and ``1 / rms(x)`` in float32 ``[..., 1]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return x * inverse, inverse


class _RMSNorm(torch.autograd.Function):
    """With its gradient by hand: a third of the passes over memory that one for every operation takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        unit, inverse = _unit(x, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return unit.mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        unit = (x * inverse).flatten(0, -2)  # [n, D]
        grad = grad.reshape(unit.shape)
        product = unit * grad
        along = (product @ weight.to(unit.dtype)).div_(-unit.shape[1]).unsqueeze(1)
        grad_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # What is along x is what normalising takes away.
        inner = unit.mul_(along).addcmul_(grad.to(unit.dtype), weight.to(unit.dtype))
        return inner.mul_(inverse.flatten(0, -2)).view(x.shape).to(x.dtype), grad_weight, None, None
