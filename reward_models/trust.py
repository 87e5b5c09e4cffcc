"""Names that come out of a file, and which of them may be imported.

A checkpoint and the ``config.json`` of a run name classes, functions and rewards: ``"my_module:reward"``. Whoever
made the file chose those names, so nothing is imported for them unless it belongs to this project, or to a module
that the user names in the same call: ``trust_modules=["my_module"]`` in Python, ``--allow-module my_module`` on the
command line. What a user writes in a call is not restricted::

    with names_from("runs/one/agent.json", ["my_module"]):
        load_reward("my_module:reward")     # imported
        load_reward("os:system('...')")     # UntrustedNameError, before anything is imported

Left out: a sandbox. Code that the user allows runs with all the user's rights.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

#: Top-level packages whose classes and functions a file may name.
PROJECT = ("agents", "textrl_env", "reward_models")

_SPEC = re.compile(r"^(?P<module>[^:()]+):(?P<name>[A-Za-z_][\w.]*)(?P<arguments>\(.*\))?$", re.DOTALL)
_MODULE = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


class UntrustedNameError(ImportError):
    """A file names code that the user has not named; nothing of it has been imported."""


class Spec(NamedTuple):
    """``"module:name(arguments)"`` in its parts; ``module`` may be the path of a ``.py`` file."""

    module: str
    name: str
    arguments: str | None


def split_spec(text: str) -> Spec | None:
    """The parts of ``"module:name"``, ``"file.py:name"`` or either with arguments; None for any other text."""
    match = _SPEC.match(text)
    if match and (match["module"].endswith(".py") or _MODULE.match(match["module"])):
        return Spec(match["module"], match["name"], match["arguments"])
    return None


def literal_arguments(text: str, spec: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of ``"(...)"``, read as literals and never evaluated.

    Raises:
        ValueError: One of them is no literal.
    """
    try:
        call = ast.parse(f"f{text}", mode="eval").body
        if not isinstance(call, ast.Call) or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("not a plain call")
        args = [ast.literal_eval(argument) for argument in call.args]
        return args, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"the arguments in {spec!r} have to be literals (numbers, strings, lists): {error}"
        ) from error


# -- what is trusted ------------------------------------------------------------------------------------------


def _python_call(modules: Sequence[str]) -> str:
    return f"load(..., trust_modules={list(modules)!r})"


@dataclass(frozen=True)
class _Trust:
    """Where names come from, and the modules that may be imported for them."""

    source: str
    modules: tuple[str, ...]
    remedy: Callable[[Sequence[str]], str]

    def allows(self, module: str) -> bool:
        if module.endswith(".py"):
            return any(_same_file(module, named) for named in self.modules)
        named = (Path(m).stem if m.endswith(".py") else m for m in (*PROJECT, *self.modules))
        return any(module == name or module.startswith(f"{name}.") for name in named)

    def refusal(self, modules: Iterable[str], what: str = "") -> UntrustedNameError:
        modules = list(dict.fromkeys(modules))
        shown = ", ".join(repr(module) for module in modules)
        plural = "s" if len(modules) > 1 else ""
        start = f"{self.source} names code of the module{plural} {shown}{what}, and nothing was imported"
        own = [m for m in modules if m.partition(".")[0] in sys.stdlib_module_names]
        if own:
            return UntrustedNameError(
                f"{start}: {', '.join(own)} is part of Python and no run needs it by name, so do not use this file"
            )
        if "__main__" in modules:
            return UntrustedNameError(
                f"{start}: it was defined in the script that wrote the file. Define it in a module, or give it to "
                "load() again, as in load(..., env_kwargs={'reward': reward})"
            )
        return UntrustedNameError(
            f"{start}. What a file names runs only if you name its module too; if you know it: "
            f"{self.remedy([*self.modules, *modules])}"
        )


_ACTIVE: ContextVar[_Trust | None] = ContextVar("names_from", default=None)


@contextlib.contextmanager
def names_from(
    source: str | Path,
    modules: Sequence[str] = (),
    remedy: Callable[[Sequence[str]], str] | None = None,
) -> Iterator[None]:
    """Inside, names are taken to come from the file ``source``.

    Args:
        source: What errors call the file.
        modules: Modules and ``.py`` files that the user has named in this call.
        remedy: From modules, what the user may type to allow them; None is that of the block around this one.
    """
    if isinstance(modules, str):
        raise TypeError(f"trust_modules is a list of module names, got the string {modules!r}")
    outer = _ACTIVE.get()
    remedy = remedy or (outer.remedy if outer else _python_call)
    token = _ACTIVE.set(_Trust(str(source), tuple(str(m) for m in modules), remedy))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def check_module(module: str, what: str = "") -> None:
    """Raise an UntrustedNameError where a file names this module and the user does not.

    Args:
        module: Dotted name, or the path of a ``.py`` file.
        what: What it is needed for, as " (for ...)".
    """
    trust = _ACTIVE.get()
    if trust is not None and not trust.allows(module):
        raise trust.refusal([module], what)


def check_values(*values: Any) -> None:
    """Raise an UntrustedNameError for all modules at once that strings inside these values name."""
    trust = _ACTIVE.get()
    if trust is None:
        return
    foreign = [module for module in named_modules(values) if not trust.allows(module)]
    if foreign:
        raise trust.refusal(foreign)


def check_owner(found: Any, spec: str, home: str = "") -> None:
    """Raise an UntrustedNameError where a class or function is only passed on by the module that a file names.

    ``"my_module:system"`` may be ``os.system``, imported there.

    Args:
        found: What the name led to.
        spec: The name.
        home: ``__name__`` of the module that it was looked for in.
    """
    trust = _ACTIVE.get()
    if trust is None:
        return
    if isinstance(found, ModuleType):
        raise UntrustedNameError(f"{trust.source} names {spec!r}, which is a module and no class or function")
    if inspect.isclass(found) or inspect.isroutine(found):
        owner = getattr(found, "__module__", None) or "builtins"
        if owner != home and not trust.allows(owner):
            raise trust.refusal([owner], f", as {spec!r}")


def is_restricted() -> bool:
    """Whether names come from a file at the moment."""
    return _ACTIVE.get() is not None


def is_own(found: Any) -> bool:
    """Whether a class or function is one of this project's."""
    return (getattr(found, "__module__", None) or "").partition(".")[0] in PROJECT


def allowed_file(module: str) -> Path | None:
    """The ``.py`` file that the user has allowed under this name, if it was allowed as a file."""
    trust = _ACTIVE.get()
    named = () if trust is None else trust.modules
    return next((Path(m) for m in named if m.endswith(".py") and Path(m).stem == module), None)


def get_attribute(owner: Any, name: str, spec: str) -> Any:
    """``owner.name``; what a file names is reached through classes only, never through a module's imports.

    Raises:
        AttributeError: It has none.
    """
    found = getattr(owner, name)
    if is_restricted() and isinstance(found, ModuleType):
        check_owner(found, spec)
    return found


# -- what a file names ----------------------------------------------------------------------------------------

#: Makers of rules, whose text arguments are patterns and column names and never name code.
_RULES = frozenset(
    (
        "contains",
        "exact_answer",
        "format_reward",
        "length_penalty",
        "numeric_answer",
        "overlong_penalty",
        "regex_match",
        "repetition_penalty",
    )
)

#: The package that transformers imports the code of a model as.
REMOTE_CODE = "transformers_modules"
#: Arguments that hold texts to learn from.
_DATA = ("prompts", "ptx_data", "rows", "stop")
#: The word before the colon of a game: a module, or a library that an adapter plays.
_GAME_WORD = re.compile(r"^([A-Za-z_]\w*(?:\.\w+)*):")
#: Spelled like one, and only an address.
_NO_MODULES = ("openenv",)


def named_modules(value: Any) -> Iterator[str]:
    """The modules that texts anywhere in a JSON-like value name, as ``"module:name"``.

    Prompts and demonstrations are data and are left out. Code that comes with a model (``trust_remote_code``) runs as
    a part of :data:`REMOTE_CODE`.
    """
    if isinstance(value, str):
        spec = split_spec(value)
        if spec is not None:
            yield spec.module
            if spec.arguments is not None and not (spec.module == "reward_models" and spec.name in _RULES):
                yield from named_modules(literal_arguments(spec.arguments, value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key == "trust_remote_code" and item:
                yield REMOTE_CODE
            if key == "game" and isinstance(item, str):
                yield from _modules_of_game(item)
            elif key not in _DATA:
                yield from named_modules(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from named_modules(item)


def _modules_of_game(game: str) -> Iterator[str]:
    """The module or library that a game's name begins with, whatever follows: ``"gem:game:Mastermind-v0"``.

    Libraries that adapters play count, although no file chooses what is imported there: verifiers of reasoning-gym
    evaluate what a model writes, and a file chooses both the task and the model.
    """
    named, word = split_spec(game), _GAME_WORD.match(game)
    if named is not None:
        yield from named_modules([game])
    elif word is not None and word[1] not in _NO_MODULES:
        yield word[1]


def foreign_modules(*values: Any) -> list[str]:
    """The modules outside this project that texts inside these values name, each once."""
    return [
        m
        for m in dict.fromkeys(named_modules(values))
        if m.endswith(".py") or m.partition(".")[0] not in PROJECT
    ]


def _same_file(one: str, other: str) -> bool:
    return other.endswith(".py") and Path(one).expanduser().resolve() == Path(other).expanduser().resolve()
