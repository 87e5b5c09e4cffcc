"""Reward functions: which arguments a function asks for, waiting for async ones, checking what comes back."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from reward_models.base import Batch, Reward, RewardResult, check_scores
from reward_models.handing_over import describe_failure, messages_hint, own_copy
from reward_models.names import did_you_mean, name_of, shorten
from reward_models.notes import Notes


class FunctionReward(Reward):
    """A function ``function(prompts, completions, **columns) -> list[float]`` as a reward.

    How it is called, and what None means, is told in :mod:`reward_models.contract`.

    Args:
        function: The callable, sync or async.
        name: What to call it; its own name by default.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        if not callable(function):
            raise TypeError(f"a reward function has to be callable, got {shorten(function)}")
        self.function = function
        self.name = name or name_of(function)

    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        call = replace(batch, notes=Notes())
        args, kwargs = own_copy(_arguments(self.function, self.name, call))
        try:
            values = self.function(*args, **kwargs)
            if inspect.isawaitable(values):
                values = wait_for(values)
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            handed = args or [kwargs.get(name, getattr(batch, name)) for name in ("prompts", "completions")]
            note = f"raised while the reward {self.name!r} scored {describe_failure(error, *handed[:2])}"
            if not isinstance(error, Exception):  # a reward may fail, and may not end the run
                what = f"{type(error).__name__}: {error}".rstrip(": ")
                error = RuntimeError(f"the reward {self.name!r} tried to leave the program with {what}")
            error.add_note(note)
            if hint := messages_hint(error, batch.completions):
                error.add_note(hint)
            raise error
        scores = check_scores(values, batch, self.name, optional)
        batch.notes.add(call.notes, self.name, len(batch))  # an attempt that failed has logged nothing
        return RewardResult(scores, {self.name: scores})


def _arguments(function: Callable, name: str, batch: Batch) -> tuple[list[Any], dict[str, Any]]:
    """The positional and keyword arguments that a function's signature asks for."""
    offered = batch.offered()
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtins without a signature
        return [batch.prompts, batch.completions], {}
    if _wants_positions(parameters, offered):
        args = [offered.pop("prompts"), offered.pop("completions")]
        parameters = (
            parameters[1:] if parameters[0].kind is inspect.Parameter.VAR_POSITIONAL else parameters[2:]
        )
    else:
        args = []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in offered:
            raise TypeError(
                f"reward {name!r} asks for {parameter.name!r}, which is not there. "
                f"{did_you_mean(parameter.name, batch.offered())}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return args, offered
    return args, {p.name: offered[p.name] for p in named if p.name in offered}


def _wants_positions(parameters: list[inspect.Parameter], offered: Mapping[str, Any]) -> bool:
    """Whether a function names its prompts and completions otherwise, as in ``lambda p, c: ...``."""
    first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
    if {"prompts", "completions"} & {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}:
        return False
    if not first and parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return True
    return len(first) == 2 and not any(p.name in offered and p.kind is not p.POSITIONAL_ONLY for p in first)


def wait_for(awaitable: Any) -> Any:
    """Wait for a coroutine, also from inside a running event loop (a notebook)."""

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = asyncio.run(wait())
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
