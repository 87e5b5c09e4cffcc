"""Modules by name and files by path, as ``python -m`` would find them: the working directory counts too.

Whether a name that comes out of a file may be imported at all is :mod:`reward_models.trust`'s.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from reward_models import trust
from reward_models.names import did_you_mean


@contextlib.contextmanager
def importable(*folders: str | Path) -> Iterator[None]:
    """Folders that modules are found in first, for as long as the context lasts."""
    added = [str(folder) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def import_module(name: str) -> ModuleType:
    """Import a module, also from the working directory.

    Raises:
        ModuleNotFoundError: There is none; the message names the nearest. An import that fails inside the module
            is raised as it is.
    """
    allowed = trust.allowed_file(name)
    if allowed is not None:
        return import_file(allowed)
    with importable(os.getcwd()):
        importlib.invalidate_caches()
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if name != missing and not name.startswith(missing + "."):
                raise
            parent, _, last = missing.rpartition(".")
            raise ModuleNotFoundError(
                f"there is no module {missing!r}. {did_you_mean(last, _modules_in(parent))}",
                name=missing,
            ) from error


def import_file(file: str | Path, name: str | None = None) -> ModuleType:
    """Import a file.

    Args:
        file: A ``.py`` file; what it imports may lie beside it or in the working directory.
        name: What to call the module. None is the name of the file, by which a checkpoint can name a class in it; a
            file that was imported by its name is not read again.

    Raises:
        FileNotFoundError: There is no such file; the message names the nearest.
        ImportError: Another module has the file's name.
    """
    file = Path(file).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {str(file)!r}. {_nearest_file(file)}".strip())
    if name is None:
        name = file.stem
        known = sys.modules.get(name)
        if known is not None:
            place = getattr(known, "__file__", None)
            if place is None or Path(place).resolve() != file:
                raise ImportError(f"the name of {file} is taken by the module {name!r}; rename the file")
            return known
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with importable(os.getcwd(), file.parent):
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


def _nearest_file(file: Path) -> str:
    if not file.parent.is_dir():
        return f"There is no folder {str(file.parent)!r} either."
    there = [entry.name for entry in file.parent.glob("*.py")]
    return did_you_mean(file.name, there) if there else ""


def _modules_in(parent: str) -> list[str]:
    """The modules of a package, or those in the working directory and the packages of this project."""
    if parent:
        return [module.name for module in pkgutil.iter_modules(importlib.import_module(parent).__path__)]
    return [*(module.name for module in pkgutil.iter_modules([os.getcwd()])), "agents", "reward_models"]
