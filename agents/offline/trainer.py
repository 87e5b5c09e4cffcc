"""The optimisation loop of every trainer on files: fine-tuning, preference learning, reward models.

Batches of an epoch, a learning rate that follows one of transformers' schedules, a clipped gradient, one seed, one log,
held-out records now and then, checkpoints to go on from. What a batch is and what its loss is, is the caller's: see
:class:`Task`. Several processes share the batches (:mod:`agents.parallel.processes`).

A run that was stopped and goes on with ``resume=True`` ends with bitwise the weights of one that was not, on the CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from agents.algorithms.schedules import lr_multiplier
from agents.offline.callbacks import StepCallback, StepCallbacks
from agents.offline.checkpoints import Checkpoints
from agents.offline.learner import Learner
from agents.offline.options import TrainerOptions
from agents.parallel.processes import Processes, current, fingerprint
from agents.process import tuned_for
from agents.runs.logs import open_logger
from agents.runs.saving import SaveSchedule, TrainingInterrupted


class Task(NamedTuple):
    """What one method of training brings to the loop.

    Attributes:
        batches: One epoch of batches, in an order drawn from a random stream.
        backward: Back-propagates the mean loss of a batch; returns metrics, "loss" among them. Of several processes
            each does its share of the records, gradients still to be added up, and returns the metrics of all.
        evaluate: Metrics of the held-out records; None where there are none.
        identity: What a run that goes on must have in common with its checkpoint beside the loop's own settings:
            the :func:`digest_of_data`, the loss.
    """

    batches: Callable[[random.Random], Iterable[Any]]
    backward: Callable[[Any], dict[str, float]]
    evaluate: Callable[[], dict[str, float]] | None = None
    identity: Mapping[str, Any] = MappingProxyType({})


class Trained(NamedTuple):
    """How training went: the metrics of every step, and of the held-out records at the end (empty without them)."""

    history: list[dict[str, float]]
    held_out: dict[str, float]


def optimise(
    learner: Learner,
    task: Task,
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
    callback: StepCallback | None,
    options: TrainerOptions,
    output: str | Path | None = None,
) -> Trained:
    """Train a model in place.

    Args:
        learner: The model; left in eval mode.
        task: Its batches and their loss.
        epochs: Passes over the records; may be a fraction.
        learning_rate: Peak of Adam's learning rate.
        batch_size: Records per optimiser step.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: Decoupled weight decay, on matrices only.
        max_grad_norm: The gradient's norm is clipped here.
        dropout: Whether the model's dropout is active.
        seed: Of data order and dropout.
        logger: A stable-baselines3 ``Logger``, or None for the one that ``options.report_to`` asks for.
        log_interval: Optimiser steps between logged rows.
        callback: Called after every optimiser step; see :mod:`agents.offline.callbacks`.
        options: The schedule, evaluation, checkpoints and logs.
        output: Where checkpoints and logs go.

    Returns:
        The metrics of every step, with ``learning_rate`` and ``grad_norm``, and those of the held-out records.

    Raises:
        ValueError: A setting out of range, or a checkpoint of another run.
        FloatingPointError: The gradient is no number any more.
        TrainingInterrupted: A signal came, ``callback`` holds a
            :class:`~agents.offline.callbacks.StopOnSignals`, and there is an output folder: a checkpoint is in it.
    """
    if batch_size < 1 or not epochs > 0:
        raise ValueError(f"batch_size must be at least 1 and epochs > 0, got {batch_size} and {epochs}")
    processes = current()
    if processes.are_several and dropout:
        raise ValueError(
            "dropout draws its random numbers by place in a batch, so that several processes would not train as one "
            "does: leave dropout off, or start one process"
        )
    processes.check_divides(batch_size=batch_size)
    if output is None and (options.save_every is not None or options.resume):
        raise ValueError("save_every and resume need an output folder, where the checkpoints are")
    per_epoch = sum(1 for _ in task.batches(random.Random(seed)))
    total_steps = max(1, round(epochs * per_epoch))
    multiplier = lr_multiplier(options.lr_scheduler_type, warmup_ratio, _plain(options.lr_scheduler_kwargs))
    named = learner.parameters()
    optimizer = torch.optim.AdamW(_parameter_groups(named, weight_decay), lr=learning_rate)
    # What a checkpoint must have in common with the run that goes on from it.
    identity = {
        "batches": per_epoch,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_ratio": warmup_ratio,
        "total_steps": total_steps,
        "seed": seed,
        "dropout": dropout,
    } | dict(task.identity)
    if (frozen := learner.digest_of_frozen()) is not None:
        identity["weights under the adapter"] = frozen
    processes.check_alike(identity | {"weights": fingerprint(p for _, p in named)})
    checkpoints = Checkpoints(learner, optimizer, output, options.keep, identity)
    history: list[dict[str, float]] = checkpoints.resume() if options.resume else []
    if not options.resume:
        processes.on_main(checkpoints.discard)
    first = len(history)
    held_out: dict[str, float] = {}
    schedule = SaveSchedule(options.save_every)
    schedule.start(first)
    callback = callback if processes.is_main else None
    with (
        _log_of(logger, options, output, first, processes.is_main) as logger,
        tuned_for(learner.model),
        torch.random.fork_rng(enabled=dropout),
        learner.saving_memory(),
        _noting(checkpoints),
        StepCallbacks(callback, learner, logger, total_steps, first, checkpoints.at_stake) as on_step,
    ):
        if dropout:
            torch.manual_seed(seed)
            checkpoints.restore_random_state()
        learner.model.train(dropout)
        for step, batch in enumerate(_stream(task.batches, random.Random(seed)), 1):
            if step <= first:  # the order of the data goes on where it was
                continue
            if step > total_steps:
                break
            # The middle of a step, so that neither the first nor the last is one of rate 0.
            rate = learning_rate * multiplier((step - 0.5) / total_steps)
            metrics = _one_step(learner, task, batch, optimizer, rate, max_grad_norm, step)
            history.append(metrics)
            ends = step == total_steps
            if task.evaluate is not None and (ends or _is_due(step, options.eval_every)):
                held_out = processes.on_main(lambda: _look(learner, task.evaluate, dropout))
                metrics |= {f"eval/{name}": value for name, value in held_out.items()}
            saves = processes.on_main(lambda step=step: schedule.is_due(step))  # clocks differ
            if saves:
                processes.on_main(lambda: checkpoints.save(history))
                schedule.saved()
            _log(logger, metrics, step, step == 1 or ends or step % log_interval == 0)
            goes_on, stopped_by = _ask(processes, on_step, step, metrics)
            if not goes_on:
                if stopped_by is not None and output is not None and not ends:
                    if not saves:
                        processes.on_main(lambda: checkpoints.save(history))
                    raise TrainingInterrupted(stopped_by)
                break
        if task.evaluate is not None and not held_out:  # stopped early, or resumed at the end
            held_out = processes.on_main(lambda: _look(learner, task.evaluate, dropout))
    learner.warn_of_rounding()
    learner.finish()
    return Trained(history, held_out)


@contextlib.contextmanager
def _noting(checkpoints: Checkpoints) -> Iterator[None]:
    """Errors within it say which checkpoint there is."""
    try:
        yield
    except Exception as error:
        note = None if isinstance(error, TrainingInterrupted) else checkpoints.note_of_last()
        if note is not None:
            error.add_note(note)
        raise


@contextlib.contextmanager
def _log_of(
    given: Any, options: TrainerOptions, output: str | Path | None, first: int, is_main: bool
) -> Iterator[Any]:
    """The logger that was given, or the one that ``options.report_to`` asks for, which is closed at the end.

    Of several processes only the main one has any.
    """
    if not is_main or given is not None or options.reports == ["none"]:
        yield given if is_main else None
        return
    logger = open_logger(_log_folder(options, output), first, options.reports)
    try:
        yield logger
    finally:
        logger.close()


def _ask(
    processes: Processes, on_step: StepCallbacks, step: int, metrics: dict[str, float]
) -> tuple[bool, int | None]:
    """Whether callbacks want to go on, and the signal that asked for a stop; they are called in the main process."""
    return processes.on_main(lambda: (bool(on_step(step, metrics)), on_step.stopped_by))


def _one_step(
    learner: Learner,
    task: Task,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    rate: float,
    max_grad_norm: float,
    step: int,
) -> dict[str, float]:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    with learner.precision():
        metrics = task.backward(batch)
    current().sum_gradients(p for _, p in learner.parameters())
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in learner.parameters()], max_grad_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm became {norm} at step {step}; a lower learning_rate usually helps"
        )
    optimizer.step()
    return metrics | {"learning_rate": rate, "grad_norm": norm}


def _look(learner: Learner, evaluate: Callable[[], dict[str, float]], dropout: bool) -> dict[str, float]:
    learner.model.eval()
    with torch.no_grad(), learner.precision():
        found = evaluate()
    learner.model.train(dropout)
    return found


def _stream(batches: Callable[[random.Random], Iterable[Any]], rng: random.Random) -> Iterator[Any]:
    """The batches of one epoch after the other, without end."""
    while True:
        yield from batches(rng)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _plain(mapping: Any) -> dict[str, Any] | None:
    """A mapping as a dict; a text, as the command line has it, as JSON."""
    if isinstance(mapping, str):
        mapping = json.loads(mapping)
    return None if mapping is None else dict(mapping)


def _log_folder(options: TrainerOptions, output: str | Path | None) -> Path:
    if options.log_dir is not None:
        return Path(options.log_dir)
    if output is None:
        raise ValueError(f"report_to={options.report_to!r} needs log_dir or an output folder to write to")
    return Path(output) / "logs"


def tail_mean(history: Sequence[dict[str, float]], name: str) -> float:
    """Mean of a metric over the last tenth of the steps (of those that have it); NaN if none has."""
    values = [metrics[name] for metrics in history[-max(1, len(history) // 10) :] if name in metrics]
    return sum(values) / len(values) if values else math.nan


def digest_of_data(sequences: Iterable[Sequence[int]]) -> str:
    """A short text that tells two data sets apart.

    Args:
        sequences: Token ids and labels of the records, in order.
    """
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(array("q", [len(sequence), *sequence]).tobytes())
    return digest.hexdigest()[:12]


def length_batches(lengths: Sequence[int], batch_size: int) -> Callable[[random.Random], Iterator[list[int]]]:
    """Shuffled batches of indices whose records are of like length (little padding), for :class:`Task`.

    Shuffles, sorts pools of 32 batches by length, cuts them up, and shuffles the batches.

    Args:
        lengths: Of each record, in tokens.
        batch_size: Records in a batch.
    """

    def batches(rng: random.Random) -> Iterator[list[int]]:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        cut = []
        for start in range(0, len(order), 32 * batch_size):
            pool = sorted(order[start : start + 32 * batch_size], key=lambda i: lengths[i])
            cut += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        rng.shuffle(cut)
        yield from cut

    return batches


def _parameter_groups(
    named: Sequence[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    trained = [parameter for _, parameter in named]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _log(logger: Any, metrics: dict[str, float], step: int, is_due: bool) -> None:
    """Record a row; a metric without a group of its own ("rewards/...") goes under "train/"."""
    if logger is None or not (is_due or any(name.startswith("eval/") for name in metrics)):
        return
    for name, value in ({"time/total_timesteps": step} | metrics).items():
        logger.record(name if "/" in name else f"train/{name}", value)
    logger.dump(step)
