"""The optimisation loop that supervised fine-tuning and preference learning share.

Batches of records of like length, a learning rate that warms up and then follows a cosine down to zero, a clipped
gradient, one seed, one log. What a batch's loss is, is the caller's: a function that back-propagates it and says
what it was. Left out: several processes, mixed precision.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from agents.process import tuned_for


def optimise(
    model: PreTrainedModel,
    lengths: Sequence[int],
    accumulate: Callable[[list[int]], dict[str, float]],
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    warmup_ratio: float,
    weight_decay: float,
    max_grad_norm: float,
    dropout: bool,
    seed: int,
    logger: Any,
    log_interval: int,
    callback: Callable[[int, dict[str, float]], bool] | None,
) -> list[dict[str, float]]:
    """Train a model in place on records that are known by their indices.

    Args:
        model: Trained in place; left in eval mode.
        lengths: Of each record, in tokens; records of like length share a batch.
        accumulate: Takes the indices of a batch, back-propagates its loss, returns metrics ("loss" among them).
        epochs: Passes over the records; may be a fraction.
        learning_rate: Peak of Adam's learning rate.
        batch_size: Records per optimiser step.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: Decoupled weight decay, on matrices only.
        max_grad_norm: The gradient's norm is clipped here.
        dropout: Whether the model's dropout is active.
        seed: Of data order and dropout.
        logger: A stable-baselines3 ``Logger``, or None.
        log_interval: Optimiser steps between logged rows.
        callback: Called after every optimiser step with the step's number and its metrics; False stops.

    Returns:
        The metrics of every step, with ``learning_rate`` and ``grad_norm``.
    """
    if batch_size < 1 or not epochs > 0:
        raise ValueError(f"batch_size must be at least 1 and epochs > 0, got {batch_size} and {epochs}")
    rng = random.Random(seed)
    total_steps = count_steps(len(lengths), batch_size, epochs)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), lr=learning_rate)
    history: list[dict[str, float]] = []
    model.train(dropout)
    with tuned_for(model, large_tensors=True), torch.random.fork_rng(enabled=dropout):
        if dropout:
            torch.manual_seed(seed)
        while len(history) < total_steps:
            for indices in batches(lengths, batch_size, rng):
                rate = learning_rate * warmup_cosine(len(history), total_steps, warmup_ratio)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad(set_to_none=True)
                metrics = accumulate(indices)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
                if not math.isfinite(norm):
                    raise FloatingPointError(
                        f"the gradient norm became {norm} at step {len(history) + 1}; "
                        "a lower learning_rate usually helps"
                    )
                optimizer.step()
                history.append(metrics | {"learning_rate": rate, "grad_norm": norm})
                _log(logger, history[-1], len(history), log_interval)
                if callback is not None and not callback(len(history), history[-1]):
                    total_steps = len(history)
                if len(history) == total_steps:
                    break
    model.eval()
    return history


def count_steps(num_records: int, batch_size: int, epochs: float) -> int:
    """Optimiser steps that :func:`optimise` will take."""
    return max(1, round(epochs * math.ceil(num_records / batch_size)))


def tail_mean(history: Sequence[dict[str, float]], name: str) -> float:
    """Mean of a metric over the last tenth of the steps (of those that have it); NaN if none has."""
    values = [metrics[name] for metrics in history[-max(1, len(history) // 10) :] if name in metrics]
    return sum(values) / len(values) if values else math.nan


def batches(lengths: Sequence[int], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """One epoch of shuffled batches of indices whose lengths are alike (little padding).

    Shuffles, sorts pools of 32 batches by length, cuts them up, and shuffles the batches.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    cut = []
    for start in range(0, len(order), 32 * batch_size):
        pool = sorted(order[start : start + 32 * batch_size], key=lambda i: lengths[i])
        cut += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    rng.shuffle(cut)
    yield from cut


def warmup_cosine(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(warmup_ratio * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def _parameter_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def _log(logger: Any, metrics: dict[str, float], step: int, log_interval: int) -> None:
    """Record a row; a metric without a group of its own ("rewards/...") goes under "train/"."""
    if logger is None or (step != 1 and step % log_interval):
        return
    for name, value in metrics.items():
        logger.record(name if "/" in name else f"train/{name}", value)
    logger.dump(step)
