"""Games as foreign code: called, checked, and named where they fail.

What a game is handed is its own copy; what it returns is checked before it is believed. Games may be called in threads,
with a deadline; one that fails can be given a fallback reward, and its episode ends.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from reward_models.data.chat import problem_in, readable
from reward_models.handing_over import own_copy
from reward_models.names import shorten
from reward_models.warning import warn
from textrl_env.errors import check_range
from textrl_env.games.loading import GameFactory
from textrl_env.protocols import Game

#: A text, or messages.
Observation = str | list[dict[str, Any]]


class Answer(NamedTuple):
    """What a game answered to one turn of the policy.

    Attributes:
        observation: A text, or messages.
        reward: Of the turn.
        terminated: Whether the game has ended.
        truncated: Whether a time limit of the game's own has cut it off.
        info: The game's.
        failed: Whether the game failed, and this takes the place of an answer.
    """

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    failed: bool = False

    @property
    def text(self) -> str:
        """The answer as people read it."""
        return as_text(self.observation)


def as_text(observation: Observation) -> str:
    """A text as it is; messages without any template."""
    return observation if isinstance(observation, str) else readable(observation) if observation else ""


class _Call:
    """One call of a game, perhaps in a thread of its own."""

    def __init__(self, slot: int, where: str, function: Callable[[], Any]) -> None:
        self.slot, self.where, self.function = slot, where, function
        self.began: float | None = None
        self.over = False
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Call the game and note what came of it."""
        self.began = time.monotonic()
        try:
            self.result = self.function()
        except BaseException as error:
            error.add_note(f"in the game: {self.where}")
            self.error = error


class Players:
    """As many games as there are slots, each played by itself.

    Args:
        make: Makes a game; a slot's is made when it is first needed.
        timeout: Seconds for one call of a game; None waits for ever. A game that is over time cannot be stopped: it
            goes on in its thread, what it returns is not read, and the slot gets another one.
        fallback: The reward of a turn whose game failed or took too long, and whose episode ends with it; None raises
            the error. A game that has never answered raises it too: it is wrong rather than unlucky.
        workers: Games that are called at the same time, each in a thread.

    Attributes:
        answered: Turns that games have answered so far.
        failed: Turns so far that got the fallback.
    """

    def __init__(
        self,
        make: GameFactory,
        timeout: float | None = None,
        fallback: float | None = None,
        workers: int = 1,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"game_timeout must be a number of seconds > 0 or None, got {timeout!r}")
        if fallback is not None and not math.isfinite(fallback):
            raise ValueError(f"game_fallback must be a finite number or None, got {fallback!r}")
        check_range(1, game_workers=workers)
        self.make, self.timeout, self.fallback, self.workers = make, timeout, fallback, workers
        self.games: dict[int, Game] = {}
        self.answered, self.failed = 0, 0
        self._waiting: list[_Call] = []
        self._running: list[_Call] = []
        self._changed = threading.Condition()

    def prepare(self, slot: int) -> Game:
        """The game of a slot, made now if there is none."""
        if slot not in self.games:
            self.games[slot] = self.make()
        return self.games[slot]

    def start(self, slot: int, seed: int, row: Mapping[str, Any]) -> tuple[Observation, dict[str, Any]]:
        """Begin the game of a slot anew; its opening and its info.

        Raises:
            Exception: Whatever the game raised, with a note of where.
            TimeoutError: It took too long.
            TypeError: What it returned is no opening.
        """
        game = self.prepare(slot)
        shown = "".join(f", {name}={shorten(value, 40)}" for name, value in row.items())
        where = f"{_name(game)}.reset(seed={seed}{shown})"
        handed = own_copy(dict(row))
        (call,) = self._calls([_Call(slot, where, lambda: game.reset(seed=seed, **handed))])
        if call.error is not None:
            raise call.error
        returned = call.result
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Mapping):
            raise TypeError(f"{where} must return (observation, info), got {shorten(returned)}")
        return _observation(returned[0], where), dict(returned[1])

    def answer(self, slots: Sequence[int] | np.ndarray, texts: Sequence[str]) -> list[Answer]:
        """What the games of some slots say to what the policy wrote, one text for each."""
        calls = [self._step(int(slot), text) for slot, text in zip(slots, texts, strict=True)]
        self._calls(calls)
        return [self._answer_of(call) for call in calls]

    def ask(self, slots: Sequence[int] | np.ndarray, texts: Sequence[str]) -> None:
        """As :meth:`answer`, without waiting; :meth:`hear` gives the answers."""
        self._submit([self._step(int(slot), text) for slot, text in zip(slots, texts, strict=True)])

    def hear(self, patience: float | None = None) -> list[tuple[int, Answer]]:
        """Slots and answers of games that were asked, in the order of the slots.

        Args:
            patience: Seconds after which those that have answered go on without the others; None waits for all.
        """
        return [(call.slot, self._answer_of(call)) for call in self._wait(patience)]

    @property
    def busy(self) -> bool:
        """Whether some games that were asked have not been heard yet."""
        return bool(self._running or self._waiting)

    # -- calls, in threads where that was asked for ---------------------------------------------------------

    def _step(self, slot: int, text: str) -> _Call:
        game = self.games[slot]
        where = f"{_name(game)}.step({shorten(text)})"
        return _Call(slot, where, lambda: _checked_answer(game.step(text), where))

    def _calls(self, calls: list[_Call]) -> list[_Call]:
        """Calls, run to their end or their deadline."""
        self._submit(calls)
        while self.busy:
            self._wait(None)
        return calls

    def _submit(self, calls: list[_Call]) -> None:
        if self.timeout is None and self.workers == 1:
            for call in calls:
                call.run()
            self._running += calls
            return
        self._waiting += calls
        self._fill()

    def _fill(self) -> None:
        """Start calls that wait, as far as there are workers."""
        working = sum(not self._is_over(call) for call in self._running)
        while self._waiting and working < self.workers:
            call = self._waiting.pop(0)
            call.began = time.monotonic()
            self._running.append(call)
            working += 1
            threading.Thread(target=self._work, args=(call,), daemon=True, name=call.where).start()

    def _work(self, call: _Call) -> None:
        call.run()
        with self._changed:
            call.over = True
            self._changed.notify_all()

    def _is_over(self, call: _Call) -> bool:
        """Whether a call has ended, or has been given up."""
        late = self.timeout is not None and time.monotonic() - call.began > self.timeout
        return call.over or late

    def _wait(self, patience: float | None) -> list[_Call]:
        """Calls that are over: all that there are, or after a while those that happen to be."""
        if self.timeout is None and self.workers == 1:
            over, self._running = self._running, []
            for call in over:
                call.over = True
            return over
        began = time.monotonic()
        while True:
            with self._changed:
                self._fill()
                over = [call for call in self._running if self._is_over(call)]
                everything = len(over) == len(self._running) and not self._waiting
                if everything or (over and patience is not None and time.monotonic() - began >= patience):
                    break
                self._changed.wait(self._pause(began, patience))
        self._running = [call for call in self._running if call not in over]
        for call in over:
            if not call.over:
                call.error = TimeoutError(
                    f"the game took more than game_timeout={self.timeout:g} seconds: {call.where}"
                )
                call.over = True
                del self.games[call.slot]  # its thread is still at it
        return sorted(over, key=lambda call: call.slot)

    def _pause(self, began: float, patience: float | None) -> float | None:
        """Seconds until something may be over by time alone; None if nothing can be."""
        now = time.monotonic()
        ends = [] if self.timeout is None else [call.began + self.timeout - now for call in self._running]
        if patience is not None:
            ends.append(began + patience - now)
        return max(min(ends), 0.0) + 0.001 if ends else None

    def _answer_of(self, call: _Call) -> Answer:
        """What a call gave, or what takes its place."""
        error = call.error
        if error is None:
            self.answered += 1
            return call.result
        if self.fallback is None or not self.answered or not isinstance(error, Exception):
            raise error
        self.games.pop(call.slot, None)  # in whatever state it is
        before, self.failed = self.failed, self.failed + 1
        if self.failed.bit_length() > before.bit_length():  # the 1st, 2nd, 4th, 8th, ...
            warn(
                f"{self.failed} turns so far got the fallback {self.fallback:g}, and their episodes ended, since the "
                f"game failed: {type(error).__name__}: {error} ({'; '.join(getattr(error, '__notes__', ()))})"
            )
        return Answer("", self.fallback, True, False, {}, failed=True)


def _checked_answer(returned: Any, where: str) -> Answer:
    """What a game's ``step`` returned, as it is believed.

    Raises:
        TypeError, ValueError: It is no answer.
    """
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise TypeError(
            f"{where} must return (observation, reward, terminated, truncated, info), got {shorten(returned)}"
        )
    observation, reward, terminated, truncated, info = returned
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, (bool, np.bool_)):
            raise TypeError(f"{where}: {name} must be True or False, got {shorten(flag)}")
    if not isinstance(info, Mapping):
        raise TypeError(f"{where}: info must be a dict, got {shorten(info)}")
    number = _reward(reward, where)
    return Answer(_observation(observation, where), number, bool(terminated), bool(truncated), dict(info))


def _observation(observation: Any, where: str) -> Observation:
    """A copy of what a game showed; None is no words."""
    if observation is None:
        return ""
    if isinstance(observation, str):
        return str(observation)
    if isinstance(observation, Mapping):
        observation = [observation]
    if isinstance(observation, list | tuple):
        problem = problem_in(observation)
        if problem is None:
            return [dict(own_copy(dict(message))) for message in observation]
        raise TypeError(f"{where}: {problem}")
    raise TypeError(f"{where}: an observation is a text or a list of messages, got {shorten(observation)}")


def _reward(reward: Any, where: str) -> float:
    try:
        number = float(reward)
    except (TypeError, ValueError):
        raise TypeError(f"{where}: the reward must be a number, got {shorten(reward)}") from None
    if not math.isfinite(number):
        raise ValueError(f"{where}: the reward must be finite, got {number}")
    return number


def _name(game: Any) -> str:
    return type(game).__name__
