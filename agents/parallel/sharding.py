"""Weights, gradients and optimiser states split over the processes of a run, by torch's FSDP2.

The policy that is trained is split; beside it every process keeps the weights whole and without gradients, to write
responses with, to evaluate and to save (:attr:`~agents.policies.causal_lm.CausalLMPolicy.lm`). They are put together
again after every update. Whatever concerns split tensors is done by all processes at once.

With adapters only these are split: the weights under them are the reference's, which every process holds. Left out: a
reference that is split; decoding with weights that are split.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def split(policy: nn.Module, count: int) -> None:
    """Split what a policy trains over ``count`` processes, each of which holds the same weights now.

    Every layer is a unit whose weights are gathered when it computes, and what is in no layer (embeddings, head, norms)
    is one more.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    mesh = init_device_mesh(next(policy.parameters()).device.type, (count,))
    frozen = {
        p for p in policy.parameters() if not p.requires_grad
    }  # the reference's, which is whole here anyway
    for layer in [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh, ignored_params=frozen)
    # Gathered again in the backward pass: weights left whole after a pass without one would be used after a step.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(
                1.0
            )  # weights of the loss are of the whole minibatch: gradients add up
            module.set_force_sum_reduction_for_comms(True)


def is_split(tensor: Tensor) -> bool:
    """Whether a process holds a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all of its elements; a message to all processes where it is split."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in every process, split as ``other`` is; no message."""
    if not is_split(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def put_together(trained: nn.Module, into: nn.Module) -> None:
    """Copy the trained weights of a split module into those of the same module that is whole."""
    targets = dict(into.named_parameters())
    for name, weight in trained.named_parameters():
        if weight.requires_grad:
            targets[name].copy_(whole(weight))


def load_weights(policy: nn.Module, weights: dict[str, Tensor]) -> Any:
    """``policy.load_state_dict(weights, strict=False)``, of whole weights into those of a policy that may be split."""
    present = policy.state_dict()
    fitted = {name: like(w, present[name]) if name in present else w for name, w in weights.items()}
    return policy.load_state_dict(fitted, strict=False)
