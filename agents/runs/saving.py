"""When a run is saved, and what becomes of it when it is asked to stop: the same for everything that learns."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agents.parallel.processes import current

#: Seconds within which a second signal is the first one's echo.
_ECHO = 2.0


class TrainingInterrupted(Exception):
    """Training stopped between two updates because it was asked to; a checkpoint has been written.

    Args:
        number: The signal that asked for it.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; a checkpoint has been written")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that this signal has ended."""
        return 128 + self.number


def parse_save_every(given: int | str) -> tuple[int | None, float | None]:
    """When to write checkpoints: steps and seconds between them, None where one is not given.

    Args:
        given: Steps (a run's timesteps, a trainer's optimiser steps), a time ("90s", "15m", "2h"), or both with a comma
            between: whichever comes first.

    Raises:
        ValueError: It is none of these.
    """
    steps: int | None = None
    seconds: float | None = None
    for part in str(given).replace("_", "").split(","):
        found = re.fullmatch(r"\s*([1-9]\d*)\s*([smh]?)\s*", part)
        if found is None:
            raise ValueError(
                f"save_every={given!r} must be steps (5000), a time (90s, 15m, 2h), or both (5000,15m)"
            )
        if found[2]:
            seconds = int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]
        else:
            steps = int(found[1])
    return steps, seconds


def what_a_kill_loses(save_every: int | str | None, unit: str) -> str:
    """For the one who starts a run.

    Args:
        save_every: As :func:`parse_save_every` reads it; None makes no checkpoints.
        unit: What a step is called.
    """
    if save_every is None:
        return "no checkpoint on the way; a kill loses everything"
    steps, seconds = parse_save_every(save_every)
    between = [] if steps is None else [f"{steps:,} {unit}"]
    if seconds is not None:
        between.append(f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} seconds")
    return f"a checkpoint every {' or '.join(between)}; a kill loses what came after the last, and nothing before"


class SaveSchedule:
    """Knows when the next checkpoint is due.

    Args:
        save_every: As :func:`parse_save_every` reads it; None is never.
    """

    def __init__(self, save_every: int | str | None) -> None:
        self.steps, self.seconds = (None, None) if save_every is None else parse_save_every(save_every)
        self.start(0)

    def start(self, done: int) -> None:
        """A run begins, or goes on, with so many steps done."""
        self._next = self._following_multiple(done)
        self._saved_at = time.monotonic()

    def is_due(self, done: int) -> bool:
        """Whether to save now; if so, the next one is due later."""
        late = self.seconds is not None and time.monotonic() - self._saved_at >= self.seconds
        if done < self._next and not late:
            return False
        self._next = self._following_multiple(done)
        return True

    def saved(self) -> None:
        """A checkpoint has been written: the time counts from here."""
        self._saved_at = time.monotonic()

    def _following_multiple(self, done: int) -> float:
        return math.inf if self.steps is None else (done // self.steps + 1) * self.steps


class StopRequest:
    """Whether somebody asked for a stop, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None


@contextmanager
def stop_on_signals(request: StopRequest, waits_for: str, at_stake: Callable[[], str]) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a stop, the second interrupts at once; both say so.

    Of several processes the main one decides, and the others go on until it says so. Does nothing in a thread that is
    not the main one, which may set no handlers.

    Args:
        request: Where the first is noted.
        waits_for: What is finished before the stop, for the message.
        at_stake: Says what is lost if the process ends now.
    """

    processes, asked_at = current(), -math.inf

    def handle(number: int, frame: Any) -> None:
        nonlocal asked_at
        if not processes.is_main:
            return
        if request:
            # A launcher hands on what the terminal has sent to everyone, so that one signal comes twice.
            if processes.are_several and time.monotonic() - asked_at < _ECHO:
                return
            _tell(f"leaving at once; {at_stake()}")
            if callable(before[number]):
                before[number](number, frame)  # as it would have ended without us
            raise KeyboardInterrupt
        request.number, asked_at = number, time.monotonic()
        _tell(f"waiting for {waits_for}, then a checkpoint is written; once more leaves at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(text: str) -> None:
    """A line on standard error from a signal handler, where buffered streams may not be used."""
    with contextlib.suppress(OSError):
        os.write(2, f"\ntextrl: {text}\n".encode())
