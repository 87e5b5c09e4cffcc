"""The body of a Llama-like model in fewer and larger operations than its modules take.

Llama, Mistral, Qwen2, Qwen3 and whatever else is put together from the same parts: pre-normalisation by the root
mean square, rotary positions, grouped heads, a gated MLP. :class:`FusedLlama` reads the weights of a transformers
model and takes the place of its ``forward``, with gradients, caches, masks and gradient checkpointing. It takes only
models all of whose parts it knows (:func:`check_parts`), and its log-probabilities are compared with those of the
model's own modules before it is used (:mod:`~textrl_env.lm.self_check`). Left out: dropout, layers that see different
windows, mixtures of experts, quantised weights, and hooks on modules that it does not call, where it stands aside.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from textrl_env.lm.precision import for_both_passes
from textrl_env.lm.shared_prompts import SharedPrompts, added_to_scores

#: What a module may consist of. Anything else (a multiplier, a switch for rotation) is a part that is not known here.
_LAYER = {"hidden_size", "self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {
    *(
        "config",
        "layer_idx",
        "layer_type",
        "head_dim",
        "num_key_value_groups",
        "num_heads",
        "num_key_value_heads",
    ),
    *("scaling", "is_causal", "attention_dropout", "sliding_window", "hidden_size"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"),
}
_MLP = {"config", "hidden_size", "intermediate_size", "gate_proj", "up_proj", "down_proj", "act_fn"}
_NORM = {"variance_epsilon", "weight"}
_BODY = {
    "config",
    "padding_idx",
    "vocab_size",
    "has_sliding_layers",
    "embed_tokens",
    "layers",
    "norm",
    "rotary_emb",
}
#: What every module has, and what says nothing of what it computes.
_ANY_MODULE = set(vars(nn.Module()))
_HARMLESS = {"gradient_checkpointing", "forward"}


class KeyValueCache(Protocol):
    """What takes the keys and values of new tokens and gives those to look at."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """``[R, heads, W, d]`` twice in, ``[R, heads, T, d]`` twice out."""


class BodyOutput(NamedTuple):
    """The part of a transformers body's output that is used here."""

    last_hidden_state: Tensor


class FusedLlama:
    """A transformers body and its weights, computed without calling its larger modules.

    Args:
        body: The body. Its linear layers may be anything callable, adapters for example.

    Raises:
        AttributeError: It has not the parts of a Llama.
    """

    def __init__(self, body: nn.Module) -> None:
        self.body = body
        self.layers = [_Layer(layer) for layer in body.layers]
        self.norm, self.rotary, self.embedding = body.norm, body.rotary_emb, body.embed_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def checkpoints(self) -> bool:
        """Whether the body's gradient checkpointing is on."""
        return any(getattr(layer, "gradient_checkpointing", False) for layer in self.body.layers)

    def stands_aside(self) -> bool:
        """Whether somebody listens to modules that are not called here, or has replaced their ``forward``."""
        skipped = [self.body, self.norm, *itertools.chain(*(layer.skipped for layer in self.layers))]
        return any(map(is_watched, skipped))

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool = False,
        prompts: SharedPrompts | None = None,
    ) -> BodyOutput:
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
        # A layer that is computed again in the backward pass would write to the cache twice.
        again = self.checkpoints and torch.is_grad_enabled() and past_key_values is None
        for index, layer in enumerate(self.layers):
            arguments = (hidden, rotation, attention, index, low)
            if again:
                hidden = checkpoint(layer, *arguments, use_reentrant=False, context_fn=for_both_passes)
            else:
                hidden = layer(*arguments)
        return BodyOutput(_normalised(hidden, self.norm, hidden.dtype))


def check_parts(body: nn.Module) -> None:
    """Raise an AttributeError where a body holds something that :class:`FusedLlama` would leave out.

    Numbers alone do not show it: a multiplier may be near 1, and in a fresh model attention is so even that positions
    hardly matter.
    """
    known = {"input_layernorm": _NORM, "post_attention_layernorm": _NORM, "q_norm": _NORM, "k_norm": _NORM}
    known |= {"self_attn": _ATTENTION, "mlp": _MLP}
    # A model holds much that says nothing of what it computes: of that only numbers and parts count.
    computes = {n: x for n, x in _parts(body).items() if isinstance(x, (float, nn.Module, nn.Parameter))}
    _check_known(body, computes, _BODY)
    _check_known(body.norm, _parts(body.norm), _NORM)
    for layer in body.layers:
        _check_known(layer, _parts(layer), _LAYER)
        for name, module in layer.named_modules():
            last = name.rpartition(".")[2]
            if last in known:
                _check_known(module, _parts(module), known[last])


def _parts(module: nn.Module) -> dict[str, Any]:
    own = {name: value for name, value in vars(module).items() if name not in _ANY_MODULE}
    for named in (module.named_parameters, module.named_buffers):
        own |= dict(named(recurse=False))
    own |= dict(module.named_children())
    return {name: x for name, x in own.items() if not name.startswith("_") and name not in _HARMLESS}


def _check_known(module: nn.Module, parts: Iterable[str], known: set[str]) -> None:
    unknown = sorted(set(parts) - known)
    if unknown:
        raise AttributeError(f"{type(module).__name__} has parts that a Llama has not: {', '.join(unknown)}")


def is_watched(module: nn.Module) -> bool:
    """Whether a module has hooks or a ``forward`` of its own, so that calling it may do more than its class says."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return any(hooks) or "forward" in vars(module)


class _Layer:
    """The parts of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        attention, mlp = layer.self_attn, layer.mlp
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
        self.out, self.head_dim, self.scaling = attention.o_proj, attention.head_dim, attention.scaling
        self.query_norm, self.key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.gate, self.up, self.down, self.activation = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
        norms = [x for x in (self.before, self.between, self.query_norm, self.key_norm) if x is not None]
        self.skipped = [layer, attention, mlp, *norms]  # modules that are not called

    def __call__(
        self, hidden: Tensor, rotation: _Rotation, attention: _Attention, index: int, low: torch.dtype
    ) -> Tensor:
        hidden = hidden + self.attend(_normalised(hidden, self.before, low), rotation, attention, index)
        return hidden + self.feed(_normalised(hidden, self.between, low))

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

    def __init__(
        self, mask: Tensor | None, cache: KeyValueCache | None, prompts: SharedPrompts | None
    ) -> None:
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
