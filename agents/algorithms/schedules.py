"""Hyper-parameters that change while a run goes on, in stable-baselines3's form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.utils import FloatSchedule

from textrl_env.errors import ArgumentError, check_choice, is_finite

#: A number, "linear:3e-4" (down to 0), or a function of the remaining progress (1 at the start, 0 at the end).
Schedule = float | str | Callable[[float], float]


def schedule_value(schedule: Schedule, progress_remaining: float) -> float:
    """The value of a schedule at some remaining progress in [0, 1].

    Raises:
        ValueError: It is no schedule, or the value is NaN or infinite.
    """
    value = _schedule_value(schedule, progress_remaining)
    if not math.isfinite(value):
        raise ValueError(
            f"the schedule {schedule!r} gives {value} at a remaining progress of {progress_remaining:g}; expected a "
            "finite number"
        )
    return value


def _schedule_value(schedule: Schedule, progress_remaining: float) -> float:
    if callable(schedule):
        return float(schedule(progress_remaining))
    if isinstance(schedule, str):
        shape, _, initial = schedule.partition(":")
        try:
            return float(initial if shape == "linear" else "") * progress_remaining
        except ValueError:
            raise ArgumentError(
                f'a schedule is a number, "linear:3e-4" or a function, got {schedule!r}'
            ) from None
    return float(schedule)


class ScheduleFunction(FloatSchedule):
    """A schedule as stable-baselines3's PPO keeps it: a function of the remaining progress, ``clip_range(1.0)``.

    It equals what it was made of, so that ``agent.clip_range == 0.2`` stays true.

    Args:
        given: A number, "linear:0.2" or a function.
    """

    def __init__(self, given: Schedule) -> None:
        self.given = given.given if isinstance(given, ScheduleFunction) else given
        super().__init__(functools.partial(_schedule_value, given) if isinstance(given, str) else given)

    def __eq__(self, other: object) -> bool:
        return self.given == (other.given if isinstance(other, ScheduleFunction) else other)

    def __hash__(self) -> int:
        return hash(self.given)

    def __repr__(self) -> str:
        return repr(self.given)


class TabulatedSchedule:
    """A function of the remaining progress by its values at equal distances, with straight lines between them.

    What a checkpoint makes of a function that no name leads to.

    Args:
        values: From a remaining progress of 0 to one of 1.
        name: Of the function that it stands for.
    """

    #: How many values :meth:`of` takes; a power of two and one, so that halves, quarters, ... are among the places.
    PLACES = 1025

    def __init__(self, values: Sequence[float], name: str) -> None:
        self.values = np.asarray(values, dtype=np.float64)
        self.__name__ = name

    @classmethod
    def of(cls, function: Callable[[float], float]) -> TabulatedSchedule:
        """The table of a function."""
        places = np.linspace(0.0, 1.0, cls.PLACES).tolist()
        name = getattr(function, "__name__", type(function).__name__)
        return cls([float(function(place)) for place in places], name)

    def __call__(self, progress_remaining: float) -> float:
        places = np.linspace(0.0, 1.0, len(self.values))
        return float(np.interp(progress_remaining, places, self.values))


#: What ``lr_scheduler_type`` may be: transformers' names, without those that read the loss.
LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
)
#: Steps that a run is divided into for transformers' schedulers, which count in steps and not in shares.
_PARTS = 10_000


def lr_multiplier(
    lr_scheduler_type: str, warmup_ratio: float = 0.0, lr_scheduler_kwargs: dict[str, Any] | None = None
) -> Callable[[float], float]:
    """What the learning rate is multiplied by after some share of a run, by one of transformers' schedulers.

    Args:
        lr_scheduler_type: One of :data:`LR_SCHEDULERS`. A constant rate with a warm-up warms up.
        warmup_ratio: Share of the run in which the rate rises from 0, a straight line.
        lr_scheduler_kwargs: More arguments of the scheduler, for example ``{"min_lr_rate": 0.1}``; those that are
            numbers of steps count 10,000 to the run.

    Returns:
        A function of the share of the run that is done, in [0, 1].
    """
    check_choice("lr_scheduler_type", lr_scheduler_type, LR_SCHEDULERS)
    if not 0 <= warmup_ratio < 1:
        raise ValueError(f"warmup_ratio is a share of the run, in [0, 1), got {warmup_ratio}")
    if lr_scheduler_type == "constant":
        if not warmup_ratio:
            return lambda done: 1.0
        lr_scheduler_type = "constant_with_warmup"
    import torch
    from transformers.optimization import get_scheduler

    # A stand-in: the rates of an agent's own optimiser are set by the agent, also after a checkpoint.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    steps = {"num_warmup_steps": round(warmup_ratio * _PARTS), "num_training_steps": _PARTS}
    (multiplier,) = get_scheduler(
        lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=lr_scheduler_kwargs
    ).lr_lambdas
    return lambda done: float(multiplier(done * _PARTS))


def check_schedule(name: str, schedule: Schedule | None, positive: bool = False) -> None:
    """Raise an ArgumentError for a schedule that starts negative, not finite, or (where ``positive``) at 0."""
    if schedule is None:
        return
    try:
        value = _schedule_value(schedule, 1.0)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error}") from None
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ArgumentError(f"{name} must be a number {'> 0' if positive else '>= 0'}, got {schedule!r}")


def check_numbers(positive: bool = False, **values: float) -> None:
    """Raise an ArgumentError for a coefficient that is negative or not finite, or 0 where it must be positive."""
    for name, value in values.items():
        if not (is_finite(value) and (value > 0 or (value == 0 and not positive))):
            raise ArgumentError(
                f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value!r}"
            )
