"""Packages that only some games need."""

from __future__ import annotations

import importlib
from types import ModuleType


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
