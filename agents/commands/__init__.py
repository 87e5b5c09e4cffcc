"""The verbs of the command line, one module each, and the one list that names them.

A verb ``x`` is a function ``x`` in ``agents/commands/x.py`` with typer's annotations; adding one is that file and
a name in :data:`VERBS`. Modules must be cheap to import: torch and transformers are imported inside functions.
A module may set ``SETTINGS``, keywords of ``typer.Typer.command``.
"""

from __future__ import annotations

from contextvars import ContextVar

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
    "envs",
)

#: What was typed after ``textrl``, for messages that say how to go on.
command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())
