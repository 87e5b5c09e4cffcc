"""Adam for a policy: groups of weights by rate and decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from agents.algorithms.flat_adam import FlatAdam
from agents.policies.base import Policy


def make_optimizer(
    policy: Policy,
    weight_decay: float = 0.0,
    critic_apart: bool = False,
    optimizer_class: type[torch.optim.Optimizer] | None = None,
    optimizer_kwargs: dict[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Adam over what a policy trains, its learning rates still to be set.

    Args:
        policy: Its parameters that require a gradient.
        weight_decay: As in AdamW, of matrices only: biases, gains of norms and other vectors are left alone, as
            transformers does. 0 is plain Adam.
        critic_apart: Whether the weights that only the critic has are in groups of their own, ``group["critic"]``,
            after those of the policy.
        optimizer_class: Another than Adam, with its own defaults.
        optimizer_kwargs: Its arguments (or Adam's), the learning rate excluded.
    """
    owned = {id(p) for p in policy.critic_parameters()} if critic_apart else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in policy.parameters():
        if parameter.requires_grad:
            decays = weight_decay > 0 and parameter.ndim >= 2
            groups.setdefault((id(parameter) in owned, decays), []).append(parameter)
    # Epsilon 1e-5 as in the reference implementations of PPO.
    settings: dict[str, Any] = {"lr": 0.0} | ({"eps": 1e-5} if optimizer_class is None else {})
    settings |= optimizer_kwargs or {}
    plain = optimizer_class is None and not optimizer_kwargs
    if plain and policy.flat and len(groups) == 1 and not weight_decay:
        (parameters,) = groups.values()
        optimizer: torch.optim.Optimizer = FlatAdam(parameters, **settings)
    else:
        make = optimizer_class or (torch.optim.AdamW if weight_decay else torch.optim.Adam)
        if optimizer_class is None:
            settings.setdefault("fused", policy.device.type in ("cpu", "cuda"))
        listed = [
            {"params": parameters, "critic": critic, "weight_decay": weight_decay if decays else 0.0}
            for (critic, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]
        optimizer = make(listed, **settings)
    for group in optimizer.param_groups:
        group.setdefault("critic", False)
    return optimizer
