"""What a class of agents takes, and the tables in which it may say so without a constructor of its own.

A method that gives other values to what a base class has says them in its class::

    class DrGRPO(GRPO):
        fixed = {"scale": "none", "average": "constant"}  # part of the method: giving one is an error

    class GSPO(GRPO):
        defaults = {"clip_range": 3e-4, "clip_range_high": 4e-4}  # another default, which may be changed

An entry holds for the constructors of the bases of the class that it stands in; of several entries for one argument
that of the nearest class counts. ``takes_no`` names the arguments that mean nothing to a method, and why.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from textrl_env.errors import did_you_mean

#: Arguments of stable-baselines3's agents that have no counterpart, and why.
_OF_SB3 = {
    "rollout_buffer_class": "a rollout is agents.Rollout, whatever collects it",
    "rollout_buffer_kwargs": "a rollout is agents.Rollout, whatever collects it",
}
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Entry(NamedTuple):
    """What a class says of an argument: its value, whether it is part of the method, and the class."""

    value: Any
    fixed: bool
    owner: type


class ClassTables:
    """Constructors that heed the tables of the class, and remember what was given."""

    #: Arguments of base classes that are part of this method; giving one is an error.
    fixed: ClassVar[dict[str, Any]] = {}
    #: Arguments of base classes that have another default in this method.
    defaults: ClassVar[dict[str, Any]] = {}
    #: Arguments of a base class that mean nothing to this method, and why; giving one is an error.
    takes_no: ClassVar[dict[str, str]] = {}
    #: The arguments as they were given, by name.
    init_kwargs: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _heed_tables(cls, cls.__init__)

    def __new__(cls, *args: Any, **kwargs: Any) -> ClassTables:
        # Remember the arguments as they were given, so that save() can write them, also for plug-in agents.
        agent = super().__new__(cls)
        check_keywords(cls, kwargs)
        agent.init_kwargs = _by_name(cls, args, kwargs)
        return agent

    def keep_path(self, name: str, given: Any) -> Any:
        """An argument that may name a file or folder: absolute where it does, so that a checkpoint goes on anywhere."""
        if isinstance(given, (str, Path)) and Path(given).expanduser().exists():
            given = self.init_kwargs[name] = str(Path(given).expanduser().resolve())
        return given


def constructors(cls: type) -> dict[type, Callable]:
    """The classes from ``cls`` up that have a constructor, and these."""
    return {base: vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)}


def named_parameters(constructor: Callable) -> list[inspect.Parameter]:
    """What a constructor takes by name, without ``self``."""
    _, *parameters = inspect.signature(constructor).parameters.values()
    return [parameter for parameter in parameters if parameter.kind in _NAMED]


def argument_names(cls: type) -> list[str]:
    """The arguments of all constructors from ``cls`` up, its own first."""
    return list(dict.fromkeys(p.name for each in constructors(cls).values() for p in named_parameters(each)))


def entry(cls: type, name: str, owner: type) -> Entry | None:
    """What the classes between ``cls`` and ``owner``, whose constructor takes the argument, say of it; None: nothing.

    Args:
        cls: The class that is made.
        name: Of the argument.
        owner: One of its bases, or itself.
    """
    for base in cls.__mro__[: cls.__mro__.index(owner)]:
        for table, fixed in (("fixed", True), ("defaults", False)):
            found = vars(base).get(table, {})
            if name in found:
                return Entry(found[name], fixed, base)
    return None


def entries(cls: type) -> dict[str, Entry]:
    """What a class and its bases say of arguments, by name."""
    found: dict[str, Entry] = {}
    for owner, constructor in constructors(cls).items():
        for parameter in named_parameters(constructor):
            said = entry(cls, parameter.name, owner)
            if said is not None and parameter.name not in found:
                found[parameter.name] = said
    return found


def check_keywords(cls: type[ClassTables], given: dict[str, Any]) -> None:
    """Raise a TypeError for a keyword that no constructor from ``cls`` up takes, or that is part of the method."""
    known = argument_names(cls)
    for name in given:
        if name not in known and name in _OF_SB3:
            raise TypeError(f"{cls.__name__} takes no {name}: {_OF_SB3[name]}; leave it out")
        if name not in known:
            raise TypeError(
                f"{cls.__name__} got an unexpected keyword argument {name!r}. {did_you_mean(name, known)}"
            )
        why = refusal(cls, name)
        if why is not None:
            raise TypeError(f"{cls.__name__} takes no {name}: {why}")


def refusal(cls: type[ClassTables], name: str) -> str | None:
    """Why a class refuses an argument of one of its constructors; None where it takes it, or none has it."""
    if name in cls.takes_no:
        return cls.takes_no[name]
    for owner, constructor in constructors(cls).items():
        if any(parameter.name == name for parameter in named_parameters(constructor)):
            said = entry(cls, name, owner)
            return f"{said.value!r} is part of the method" if said is not None and said.fixed else None
    return None


def _by_name(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that the constructors give them; ``*args`` of one are those of the next."""
    found: dict[str, Any] = {}
    for constructor in constructors(cls).values():
        signature = inspect.signature(constructor)
        bound = signature.bind_partial(None, *args, **kwargs).arguments
        bound.pop(next(iter(signature.parameters)))
        args, kwargs = (), {}
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL:
                args = bound.pop(parameter.name, ())
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs = bound.pop(parameter.name, {})
        found |= bound
        if not args:
            break
    return found | kwargs


def _heed_tables(owner: type, constructor: Callable) -> Callable:
    """A constructor that takes what classes below its own say of its arguments, whoever calls it."""
    parameters = named_parameters(constructor)
    names = [parameter.name for parameter in parameters]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(constructor)
    def construct(self: ClassTables, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        given = dict(zip(positional, args, strict=False)) | kwargs
        for name in names if cls is not owner else ():
            said = entry(cls, name, owner)
            if said is None:
                continue
            if name not in given:
                kwargs[name] = said.value
            elif said.fixed and given[name] != said.value:
                raise TypeError(
                    f"{cls.__name__} gives {name}={given[name]!r} to {owner.__name__}, but in {said.owner.__name__} "
                    f"{name}={said.value!r} is part of the method; a class that changes it says so in its own table "
                    f'of fixed settings, fixed = {{"{name}": {given[name]!r}}}'
                )
        constructor(self, *args, **kwargs)

    return construct
