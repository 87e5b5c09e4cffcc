"""Adam for a policy: groups of weights by rate and decay, with moments in 32 bits or in eight."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

from agents.algorithms.flat_adam import FlatAdam
from agents.policies.base import Policy
from textrl_env.errors import did_you_mean

#: By transformers' names: where an optimiser is and the package that it comes with. Both are AdamW with moments in
#: blocks of eight bits (Dettmers et al. 2022, arXiv:2110.02861); a paged one moves them to the host where memory is
#: short.
OPTIMIZERS = {
    "adamw_8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "paged_adamw_8bit": ("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes"),
}


def named_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class of one of :data:`OPTIMIZERS`.

    Raises:
        ImportError: Its package is not installed.
        ValueError: There is none of that name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer_class={name!r} is not known; expected a class or one of {list(OPTIMIZERS)}. "
            f"{did_you_mean(name, OPTIMIZERS)}"
        )
    module, attribute, package = OPTIMIZERS[name]
    if importlib.util.find_spec(package) is None:
        raise ImportError(
            f"optimizer_class={name!r} needs {package}, which is not installed: pip install {package}"
        )
    return getattr(importlib.import_module(module), attribute)


def make_optimizer(
    policy: Policy,
    weight_decay: float = 0.0,
    critic_apart: bool = False,
    optimizer_class: type[torch.optim.Optimizer] | str | None = None,
    optimizer_kwargs: dict[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Adam over what a policy trains, its learning rates still to be set.

    Args:
        policy: Its parameters that require a gradient.
        weight_decay: As in AdamW, of matrices only: biases, gains of norms and other vectors are left alone, as
            transformers does. 0 is plain Adam.
        critic_apart: Whether the weights that only the critic has are in groups of their own, ``group["critic"]``,
            after those of the policy.
        optimizer_class: Another than Adam, with its own defaults; or one of :data:`OPTIMIZERS` by name, with Adam's.
        optimizer_kwargs: Its arguments (or Adam's), the learning rate excluded.
    """
    owned = {id(p) for p in policy.critic_parameters()} if critic_apart else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in policy.parameters():
        if parameter.requires_grad:
            decays = weight_decay > 0 and parameter.ndim >= 2
            groups.setdefault((id(parameter) in owned, decays), []).append(parameter)
    # Epsilon 1e-5 as in the reference implementations of PPO.
    of_ours = optimizer_class is None or isinstance(optimizer_class, str)
    settings: dict[str, Any] = {"lr": 0.0} | ({"eps": 1e-5} if of_ours else {})
    if isinstance(optimizer_class, str):
        optimizer_class = named_optimizer(optimizer_class)
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
