"""Modules, classes and functions by name: imported from the working directory too, or from a file.

What a file names is imported only as :mod:`reward_models.trust` allows.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import agents
from reward_models import trust
from reward_models.locate import is_reward
from textrl_env.errors import did_you_mean
from textrl_env.lazy import current_module


def name_of(thing: Any) -> str:
    """``"module:qualname"`` of a class or function; what ``agents`` exports is named there, never by its file."""
    if getattr(agents, thing.__name__, None) is thing:
        return f"agents:{thing.__name__}"
    return f"{thing.__module__}:{thing.__qualname__}"


def resolve_class(name: str, base: type) -> type:
    """The class that :func:`name_of` named, also by a name from before its module moved.

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


def import_module(name: str) -> ModuleType:
    """Import a module, also from the working directory.

    Raises:
        ModuleNotFoundError: There is none; the message names the nearest.
    """
    allowed = trust.allowed_file(name)
    if allowed is not None:
        return import_file(allowed)
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
        text = f"there is no module {name!r} here or installed. {hint}".strip()
        raise ModuleNotFoundError(text, name=name) from error


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
