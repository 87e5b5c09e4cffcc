"""Packages that only some games need, and functions that games are given by name."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from reward_models import trust
from reward_models.importing import import_module


def import_extra(module: str, package: str, wanted_by: str, extra: str | None = "games") -> ModuleType:
    """A module of a package that may not be installed.

    Args:
        module: Name of the module.
        package: What pip calls it.
        wanted_by: The game, for the message.
        extra: Of this project, if it has one that installs the package.

    Raises:
        ModuleNotFoundError: The package is not installed; the message says how it is.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there, and something that it needs is not
        command = f"pip install 'textrl-env[{extra}]'" if extra else f"pip install {package}"
        raise ModuleNotFoundError(
            f"{wanted_by} needs the package {package}: {command}", name=error.name
        ) from None


def named_function(spec: str) -> Any:
    """The function that ``"package.module:name"`` names.

    Raises:
        ValueError: It names none.
        ImportError: There is no such module or function, or a file names it and the user does not.
    """
    named = trust.split_spec(spec)
    if named is None or named.arguments is not None:
        raise ValueError(f"{spec!r} names no function; expected 'package.module:function'")
    trust.check_module(named.module, f" (for {spec!r})")
    module = import_module(named.module)
    if not hasattr(module, named.name):
        raise ImportError(f"{named.module!r} has no {named.name!r}")
    found = trust.get_attribute(module, named.name, spec)
    trust.check_owner(found, spec, module.__name__)
    return found
