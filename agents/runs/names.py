"""Classes and functions by name, as checkpoints write them.

What a file names is imported only as :mod:`reward_models.trust` allows.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from reward_models import trust
from reward_models.importing import import_module
from reward_models.locate import is_reward
from textrl_env.lazy import current_module


def import_name(thing: Any) -> str:
    """``"module:qualname"`` of a class or function; what ``agents`` exports is named there, never by its file."""
    package = __name__.partition(".")[0]
    # Not by an import: the package names every agent, and agents import this module.
    if getattr(sys.modules[package], thing.__name__, None) is thing:
        return f"{package}:{thing.__name__}"
    return f"{thing.__module__}:{thing.__qualname__}"


def resolve_class(name: str, base: type) -> type:
    """The class that :func:`import_name` named, also by a name from before its module moved.

    Args:
        name: ``"module:qualname"``.
        base: What it must be a subclass of.

    Raises:
        ImportError: There is none of that name, or it comes from a file and may not be imported.
        TypeError: It is no subclass of ``base``.
    """
    return check_class(_resolve(name), name, base)


def resolve_function(name: str) -> Any:
    """The same for a function or class that an argument is; of this project only rewards are."""
    found = _resolve(name)
    trust.check_owner(found, name)
    if trust.is_restricted() and trust.is_own(found) and not is_reward(found):
        raise trust.UntrustedNameError(
            f"{name!r} comes from a file and is no function that an argument may be"
        )
    return found


def check_class(found: Any, spec: str, base: type) -> type:
    """``found`` itself; a TypeError unless it is a subclass of ``base``."""
    if not inspect.isclass(found) or not issubclass(found, base):
        raise TypeError(f"{spec} is not a subclass of {base.__module__}.{base.__name__}")
    trust.check_owner(found, spec)
    return found


def _resolve(name: str) -> Any:
    where, _, qualname = name.partition(":")
    trust.check_module(where, f" (for {name!r})")
    own = where.partition(".")[0] in trust.PROJECT
    found: Any = current_module(where) if own else import_module(where)
    for part in qualname.split("."):
        if not hasattr(found, part):
            raise ImportError(f"there is no {name!r} any more: {where} has no {qualname!r}")
        found = trust.get_attribute(found, part, name)
    return found
