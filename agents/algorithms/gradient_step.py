"""The gradient of one minibatch, in micro-batches, and its norm."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from agents.algorithms import maths
from agents.algorithms.flat_adam import FlatAdam
from agents.policies.base import Evaluation, Policy
from agents.rollouts.rollout import Rollout
from textrl_env.errors import ArgumentError

#: ``loss(batch, new)``: the loss of every step ``[b, T]``, and quantities ``[b, T]`` to log.
Loss = Callable[[Rollout, Evaluation], tuple[Tensor, dict[str, Tensor]]]


def check_steps(what: str, given: Tensor, mask: Tensor) -> None:
    """Raise an ArgumentError unless there is one number for each step: what merely broadcasts may be wrong unnoticed.

    Args:
        what: What is to have them, such as "advantages() of MyAgent".
        given: ``[B, T]``.
        mask: ``[B, T]``.
    """
    if getattr(given, "shape", None) != mask.shape:
        came = f"the shape {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise ArgumentError(
            f"{what} must have one number for each step, the shape [B, T] = {list(mask.shape)}, got {came}"
        )


def accumulate_gradients(
    policy: Policy,
    batch: Rollout,
    loss: Loss,
    weights: Tensor,
    micro_batch_size: int | None = None,
    fresh: bool = False,
    rows: np.ndarray | None = None,
    passes: int = 0,
) -> tuple[list[str], Tensor]:
    """Add the gradient of ``sum(weights * loss)`` to the policy's parameters.

    The weights belong to the whole minibatch, so the gradient does not depend on how it is cut into micro-batches, and
    those of several processes add up.

    Args:
        policy: Evaluates the rows.
        batch: Rows of a rollout, ``[b, T]``.
        loss: Of every step.
        weights: ``[b, T]``, how the steps are averaged.
        micro_batch_size: Rows evaluated at once; None takes all.
        fresh: No step has been taken since the rollout, so the old log-probabilities are the new ones.
        rows: The share of this process; None is all of the minibatch.
        passes: Of the policy, at least so many: where its weights are split over processes, all of them take as many.

    Returns:
        Names of what is logged, "loss" first, and their masked means ``[1 + M]`` on the policy's device.
    """
    shares = maths.loss_weights(batch.mask, "token")
    if rows is not None:
        idle = len(rows) == 0  # more processes than rows: a row is evaluated, and counts nothing
        here = torch.from_numpy(np.zeros(1, dtype=np.int64) if idle else rows).to(batch.mask.device)
        batch = batch.part(rows if not idle else np.zeros(1, dtype=np.int64))
        weights, shares = (x[here] * (not idle) for x in (weights, shares))
    loss_total: Tensor | float = 0.0
    totals: Tensor | float = 0.0
    names: list[str] = []
    pieces = list(batch.micro_batches(micro_batch_size))
    for turn, (micro, at) in enumerate(pieces + pieces[:1] * (passes - len(pieces))):
        new, batch.evaluation = batch.evaluation if fresh else None, None
        if new is None or new.log_probs.shape != micro.mask.shape:
            new = policy.evaluate(micro)
        if not (micro.mask.is_cpu and micro.mask.all()):  # looking at a GPU's mask would mean waiting for it
            # Values at padding mean nothing and could overflow a ratio; 0 times inf is NaN.
            new = Evaluation(*(None if x is None else torch.where(micro.mask, x, 0.0) for x in new))
        if fresh:
            micro.log_probs = new.log_probs.detach()
        losses, metrics = loss(micro, new)
        check_steps("what loss() returns", losses, micro.mask)
        for name, value in metrics.items():
            check_steps(f"the metric {name!r} that loss() returns", value, micro.mask)
        total = (losses * weights[at]).sum()
        counted = shares[at]
        if turn >= len(pieces):  # a pass for the others' sake
            total, counted = total * 0.0, counted * 0.0
        total.backward()
        metrics = {"entropy": new.entropy} | metrics
        names = list(metrics)
        # All metrics in one go: for small networks they would cost as much as the loss.
        stacked = torch.stack([value.detach() for value in metrics.values()])  # [M, b, T]
        totals = totals + stacked.flatten(1) @ counted.flatten().to(stacked.dtype)
        loss_total = loss_total + total.detach()
    return ["loss", *names], torch.cat([loss_total.view(1).to(totals.dtype), totals])


@torch.no_grad()
def evaluate_entropies(
    policy: Policy,
    batch: Rollout,
    micro_batch_size: int | None = None,
    rows: np.ndarray | None = None,
    passes: int = 0,
) -> Tensor:
    """The policy's entropies ``[b, T]``, 0 in other processes' rows; arguments as of :func:`accumulate_gradients`."""
    found = torch.zeros(batch.mask.shape, device=batch.mask.device)
    mine = batch if rows is None else batch.part(rows if len(rows) else np.zeros(1, dtype=np.int64))
    pieces = list(mine.micro_batches(micro_batch_size))
    for turn, (micro, at) in enumerate(pieces + pieces[:1] * (passes - len(pieces))):
        entropy = policy.evaluate(micro).entropy.float()
        if turn < len(pieces) and (rows is None or len(rows)):
            here = at if rows is None else torch.from_numpy(rows).to(found.device)[at]
            found[here] = entropy * micro.mask
    return found


def clip_gradients(optimizer: torch.optim.Optimizer, policy: Policy, max_norm: float) -> float | Tensor:
    """Scale the gradient down to ``max_norm``; returns the norm it had.

    A critic whose weights are in groups of their own is clipped apart, and its norm not counted: an error of the values
    must not shorten the policy's step.
    """
    if isinstance(optimizer, FlatAdam):
        return optimizer.clip_grad_norm(max_norm)
    critic = [p for group in optimizer.param_groups if group["critic"] for p in group["params"]]
    if not critic:
        return _whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm))
    torch.nn.utils.clip_grad_norm_(critic, max_norm)
    actor = [p for group in optimizer.param_groups if not group["critic"] for p in group["params"]]
    return _whole(torch.nn.utils.clip_grad_norm_(actor, max_norm))


def _whole(norm: Tensor) -> Tensor:
    """The norm of gradients that may be split over processes."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def read_scalars(values: Tensor, norm: float | Tensor) -> list[float]:
    """The numbers of ``values`` and the gradient's norm, in one transfer from the device.

    This is where a gradient step waits for a GPU, and the only place.
    """
    return torch.cat(
        [values, torch.as_tensor(norm, dtype=values.dtype, device=values.device).view(1)]
    ).tolist()
