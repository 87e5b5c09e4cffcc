"""Names that are imported when they are first used, and modules that have moved.

Both keep ``import textrl_env`` and ``import agents`` free of torch and transformers.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose public names live in its modules (PEP 562).

    Args:
        package: Name of the package, its ``__name__``.
        names: Public name to the module that defines it.
    """

    def get(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(names[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return get, listed


class _MovedModule(ModuleType):
    """Stands where a module used to be and hands out what is in the new one."""

    _new: str

    def __init__(self, old: str, new: str) -> None:
        super().__init__(old, f"Moved to {new}.")
        self.__dict__["_new"] = new

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(importlib.import_module(self._new), name)
        warnings.warn(f"{self.__name__} has moved to {self._new}", DeprecationWarning, stacklevel=2)
        return value


def moved_modules(moved: Mapping[str, str]) -> None:
    """Let modules be imported by the names that they had before, with a DeprecationWarning at first use.

    Args:
        moved: Old dotted name to new dotted name.
    """
    for old, new in moved.items():
        sys.modules.setdefault(old, _MovedModule(old, new))


def current_module(name: str) -> ModuleType:
    """Import a module by its present name or by one from before it moved, without a warning."""
    module = importlib.import_module(name)
    return importlib.import_module(module._new) if isinstance(module, _MovedModule) else module
