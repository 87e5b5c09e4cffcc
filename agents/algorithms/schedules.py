"""Hyper-parameters that change while a run goes on, in stable-baselines3's form."""

from __future__ import annotations

from collections.abc import Callable

#: A number, "linear:3e-4" (down to 0), or a function of the remaining progress (1 at the start, 0 at the end).
Schedule = float | str | Callable[[float], float]


def schedule_value(schedule: Schedule, progress_remaining: float) -> float:
    """The value of a schedule at some remaining progress in [0, 1]."""
    if callable(schedule):
        return float(schedule(progress_remaining))
    if isinstance(schedule, str):
        shape, _, initial = schedule.partition(":")
        if shape != "linear" or not initial:
            raise ValueError(f'a schedule is a number, "linear:3e-4" or a function, got {schedule!r}')
        return float(initial) * progress_remaining
    return float(schedule)
