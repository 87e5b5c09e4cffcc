"""Agents and policies by name: built in, ``"module:Class"`` or ``"path/to/file.py:Class"``.

The working directory counts as a place to import from, as it does for ``python -m``. What a file names is imported
only as :mod:`reward_models.trust` allows.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from agents.algorithms import methods
from agents.base import Agent
from agents.policies.base import Policy
from agents.runs.names import check_class
from reward_models import trust
from reward_models.importing import import_file, import_module
from textrl_env.errors import did_you_mean

#: Names of the agents that come with the package.
AGENTS = methods.names()


def find_agent(spec: str) -> type:
    """The agent class that a name means.

    Args:
        spec: A name in :data:`AGENTS`, that of its class, ``"my_module:MyAgent"`` or ``"path/to/file.py:MyAgent"``.

    Raises:
        ValueError: No such agent; the message names the nearest.
        ImportError: No such module or class.
        TypeError: Not a subclass of :class:`~agents.base.Agent`.
    """
    known = AGENTS | {name.rpartition(":")[2].lower(): name for name in AGENTS.values()}
    if ":" not in spec and spec.lower() not in known:
        raise ValueError(
            f"there is no agent {spec!r}. {did_you_mean(spec.lower(), AGENTS)} "
            "One of your own is my_module:MyAgent or path/to/file.py:MyAgent."
        )
    return _find_class(known.get(spec.lower(), spec), Agent)


def find_policy(spec: str) -> str | type:
    """A policy class from ``"module:Class"``; the names of policies that come with the package stay names."""
    return _find_class(spec, Policy) if ":" in spec else spec


def _find_class(spec: str, base: type) -> type:
    where, _, name = spec.rpartition(":")
    trust.check_module(where, f" (for {spec!r})")
    is_file = where.endswith(".py")
    module = import_file(where) if is_file else import_module(where)
    # At the end of the path, where nothing is shadowed: what the class imports later, and checkpoints that name it.
    folder = str(Path(where).expanduser().resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    if not hasattr(module, name):
        classes = [
            n for n, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)
        ]
        hint = did_you_mean(name, classes) if classes else f"It defines no {base.__name__}."
        raise ImportError(f"{where} has no {name!r}. {hint}")
    return check_class(trust.get_attribute(module, name, spec), spec, base)
