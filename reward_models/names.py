"""The nearest thing that would have worked, for error messages, and names to call a reward by."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import Any


def did_you_mean(given: str, options: Iterable[str]) -> str:
    """A sentence naming the closest option, or all of them when none is close.

    Args:
        given: What the user wrote.
        options: What would have worked.
    """
    options = sorted({str(option) for option in options})
    if not options:
        return "There is nothing to choose from."
    close = difflib.get_close_matches(str(given), options, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(options)}."


def name_of(function: Any) -> str:
    """What to call a callable in logs and errors: its ``__name__``, "reward" for a lambda, or its class."""
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", type(function).__name__)
    return "reward" if name == "<lambda>" else name


def unique_names(names: Iterable[str]) -> list[str]:
    """The names with "_2", "_3", ... put behind those that came before."""
    taken: set[str] = set()
    result = []
    for name in names:
        candidate, count = name, 1
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        taken.add(candidate)
        result.append(candidate)
    return result


def shorten(value: Any, width: int = 80) -> str:
    """``repr(value)``, cut in the middle when it is longer than ``width``."""
    text = repr(value)
    half = (width - 3) // 2
    return text if len(text) <= width else f"{text[:half]}...{text[-half:]}"
