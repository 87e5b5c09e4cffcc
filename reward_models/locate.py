"""Rewards by name: ``"package.module:function"``, ``"file.py:function"``, or a model folder.

The working directory counts as a place to import from, as it does for ``python -m``. What a file names is imported
only as :mod:`reward_models.trust` allows.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from reward_models import trust
from reward_models.base import Reward
from reward_models.importing import import_file, import_module
from reward_models.names import did_you_mean
from reward_models.rules import FACTORIES

_REWARDS = "Reward classes, the rules of reward_models, and functions of prompts and completions"
_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w-][\w.-]*$")


def find_reward(spec: str) -> Any:
    """What a string names: a model as a Reward, or the function, Reward or list that :func:`load_reward` makes one of.

    Args:
        spec: A model folder or hub id, ``"package.module:name"`` or ``"file.py:name"``, with literal arguments if
            wanted.

    Raises:
        FileNotFoundError: No such model folder or file.
        ImportError: No such module or name.
        TypeError: What is named makes rewards and is none, or is nothing that can score.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"the folder {spec!r} is no reward model: it holds no config.json, but "
                f"{', '.join(sorted(entry.name for entry in path.iterdir())[:10]) or 'nothing'}"
            )
        return _load_model(str(path))
    if path.is_file():
        if path.suffix == ".py":
            raise ValueError(f"{spec!r} is a file; name the function in it, as in '{spec}:reward'")
        raise ValueError(f"{spec!r} is a file; a reward model is a folder, with config.json and the weights")
    named = trust.split_spec(spec)
    if named is not None:
        return _find_function(spec, *named)
    if _HUB_ID.match(spec) and not _is_near_miss(path):
        return _load_model(spec)
    raise FileNotFoundError(_no_such_path(path, spec))


def _load_model(path_or_id: str) -> Reward:
    from reward_models.classifier import HFRewardModel

    try:
        return HFRewardModel(path_or_id)
    except OSError as error:
        if Path(path_or_id).is_dir():
            raise
        raise FileNotFoundError(
            f"{_no_such_path(Path(path_or_id), path_or_id)} The hub did not have it either: {error}"
        ) from error


def _find_function(spec: str, module_name: str, name: str, arguments: str | None) -> Any:
    trust.check_module(module_name, f" (for the reward {spec!r})")
    module = _import(module_name)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ImportError(f"{module_name!r} has no {name!r}. {did_you_mean(part, _callables(found))}")
        found = trust.get_attribute(found, part, spec)
    if not is_reward(found):
        trust.check_owner(found, spec, module.__name__)
        if trust.is_restricted() and trust.is_own(found):
            raise trust.UntrustedNameError(
                f"{spec!r} comes from a file and is no reward; rewards are {_REWARDS}"
            )
    if arguments is not None:
        args, kwargs = trust.literal_arguments(arguments, spec)
        return found(*args, **kwargs)
    if not callable(found) and not isinstance(found, list | tuple):
        raise TypeError(f"{spec!r} is a {type(found).__name__}, not a reward function")
    if inspect.isclass(found) or _is_factory(found):
        raise TypeError(f"{spec!r} makes rewards and is none itself; call it: '{spec}()', with its arguments")
    return found


def is_reward(found: Any) -> bool:
    """Whether this is a reward or makes one: a Reward, a rule, or a function of this project that takes completions."""
    if (
        isinstance(found, Reward)
        or (inspect.isclass(found) and issubclass(found, Reward))
        or _is_factory(found)
    ):
        return trust.is_own(found)
    if not inspect.isfunction(found) or not trust.is_own(found):
        return False
    return {"prompts", "completions"} <= inspect.signature(found).parameters.keys()


def _is_factory(found: Any) -> bool:
    """Whether this is one of the factories of :mod:`reward_models.rules`, which a user may forget to call."""
    return any(found is factory for factory in FACTORIES)


def _import(name: str) -> ModuleType:
    allowed = trust.allowed_file(name)
    if allowed is None and not name.endswith(".py"):
        return import_module(name)
    file = Path(allowed or name).expanduser().resolve()
    if not file.is_file():
        raise FileNotFoundError(_no_such_path(Path(allowed or name), name))
    # A name of its own, so that a file called like a module that is loaded already can be given.
    return import_file(file, f"_reward_file_{file.stem}_{abs(hash(str(file))):x}")


def _callables(module: Any) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _is_near_miss(path: Path) -> bool:
    """Whether the first folder of the path is here, so that a local path was meant and not a hub id."""
    return Path(path.parts[0]).is_dir() if path.parts else False


def _no_such_path(path: Path, spec: str) -> str:
    """A sentence on how far the path exists and what is there."""
    path = path.expanduser()
    parent = path.parent
    missing = path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, missing = parent.parent, parent.name
    there = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))[:20]
    found = did_you_mean(missing, there) if there else "That folder is empty."
    return (
        f"{spec!r} is neither there nor 'package.module:function': "
        f"{str(parent)!r} has no {missing!r}. {found}"
    )
