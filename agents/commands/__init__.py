"""The verbs of the command line, one module each, and the one list that names them.

A verb ``x`` is a function ``x`` in ``agents/commands/x.py`` with typer's annotations; adding one is that file and
a name in :data:`VERBS`. Modules must be cheap to import: torch and transformers are imported inside functions.
A module may set ``SETTINGS``, keywords of ``typer.Typer.command``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

#: In the order in which ``textrl --help`` lists them.
VERBS: tuple[str, ...] = (
    "demo",
    "train",
    "sft",
    "reward",
    "preferences",
    "dpo",
    "evaluate",
    "report",
    "gradients",
    "envs",
)

#: What was typed after ``textrl``, for messages that say how to go on.
command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())


class StoppedError(BaseException):
    """A verb was interrupted; unlike KeyboardInterrupt, typer leaves it alone."""


def interruptible(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb whose KeyboardInterrupt gets out of typer, as the cause of a :class:`StoppedError`."""

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise StoppedError from error

    return run
