"""Modules, classes and functions by name: imported from the working directory too, or from a file."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import agents
from textrl_env.errors import did_you_mean
from textrl_env.lazy import current_module


def name_of(thing: Any) -> str:
    """``"module:qualname"`` of a class or function; what ``agents`` exports is named there, never by its file."""
    if getattr(agents, thing.__name__, None) is thing:
        return f"agents:{thing.__name__}"
    return f"{thing.__module__}:{thing.__qualname__}"


def resolve(name: str) -> Any:
    """The object that :func:`name_of` named, also by a name from before its module moved."""
    module, _, qualname = name.partition(":")
    thing: Any = current_module(module)
    for part in qualname.split("."):
        thing = getattr(thing, part)
    return thing


def import_module(name: str) -> ModuleType:
    """Import a module, also from the working directory.

    Raises:
        ModuleNotFoundError: There is none; the message names the nearest.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        modules = [module.name for module in pkgutil.iter_modules([here])]
        hint = did_you_mean(name, modules) if modules else ""
        raise ModuleNotFoundError(f"there is no module {name!r} here or installed. {hint}".strip()) from error


def import_file(file: Path) -> ModuleType:
    """Import a file as the module of its name, so that a checkpoint can name the class in it.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: Another module has that name.
    """
    file = file.expanduser().resolve()
    if not file.is_file():
        names = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        hint = did_you_mean(file.name, names) if names else ""
        raise FileNotFoundError(f"there is no file {file}. {hint}".strip())
    known = sys.modules.get(file.stem)
    if known is not None:
        spec = getattr(known, "__file__", None)
        if spec is None or Path(spec).resolve() != file:
            raise ImportError(f"the name of {file} is taken by the module {file.stem!r}; rename the file")
        return known
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent))  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module
