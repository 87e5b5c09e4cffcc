"""Gradient checkpointing: layers whose activations are computed again in the backward pass instead of being kept.

Chen et al. 2016, arXiv:1604.06174. transformers' own switch works in training mode only, in which dropout is on; here
models stay in eval mode. :func:`switch_on` marks the layers of a model, :func:`recomputed` acts on them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from textrl_env.lm.precision import for_both_passes


def switch_on(model: nn.Module) -> None:
    """Mark the layers of a model, as transformers does.

    Raises:
        ValueError: It has no layers that can be computed again.
    """
    for layer in _layers(model):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def is_on(model: nn.Module) -> bool:
    """Whether layers of a model are marked."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextlib.contextmanager
def recomputed(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Inside, the layers of a model keep no activations for the backward pass, which may come later.

    Args:
        model: Or a part of one.
        enabled: False changes nothing.

    Raises:
        ValueError: It has no layers that can be computed again.
    """
    layers = _layers(model) if enabled else []
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _recomputing(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers that gradient_checkpointing could act on")
    return layers


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recompute(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=for_both_passes, **kwargs)

    return recompute
