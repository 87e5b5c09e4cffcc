"""Errors that say what came, what was expected, and the closest thing that would have worked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from reward_models.names import did_you_mean

__all__ = [
    "ArgumentError",
    "check_choice",
    "check_finite",
    "check_keywords",
    "check_range",
    "did_you_mean",
    "is_finite",
]


class ArgumentError(ValueError, AssertionError):
    """An argument that makes no sense; scripts written for stable-baselines3, which asserts, catch it too."""


def check_choice(name: str, given: Any, options: Iterable[str]) -> None:
    """Raise a ValueError unless ``given`` is one of ``options``."""
    options = list(options)
    if given not in options:
        raise ValueError(
            f"{name}={given!r} is not known; expected one of {options}. {did_you_mean(given, options)}"
        )


def check_range(low: float, high: float | None = None, /, **values: float | None) -> None:
    """Raise an ArgumentError for the first value outside of ``[low, high]``; None, not given, is passed over."""
    for name, value in values.items():
        if value is None:
            continue
        if not (is_finite(value) and low <= value and (high is None or value <= high)):
            expected = f"at least {low}" if high is None else f"in [{low}, {high}]"
            raise ArgumentError(f"{name} must be {expected}, got {value!r}")


def check_finite(**values: float | None) -> None:
    """Raise an ArgumentError for the first value that is no finite number; None, not given, is passed over."""
    for name, value in values.items():
        if not (value is None or is_finite(value)):
            raise ArgumentError(f"{name} must be a finite number, got {value!r}")


def is_finite(value: Any) -> bool:
    """Whether a value is a number, and neither infinite nor NaN."""
    try:
        return math.isfinite(value)
    except TypeError:  # no number
        return False


def check_keywords(
    owner: str, function: Callable, given: Iterable[str], takes_no: Mapping[str, str] | None = None
) -> None:
    """Raise a TypeError naming the first keyword that ``function`` does not take.

    Args:
        owner: Whose arguments they are.
        function: What is to take them.
        given: Names of the keywords.
        takes_no: Keywords that people expect and that it does not have, and why.
    """
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in ("self", "num_slots")]
    for name in given:
        if name not in known and name in (takes_no or {}):
            raise TypeError(f"{owner} takes no {name}: {takes_no[name]}")
        if name not in known:
            raise TypeError(
                f"{owner} got an unexpected keyword argument {name!r}. {did_you_mean(name, known)}"
            )
