"""Hyper-parameters as command-line flags: names and types from the signature, help from the docstring.

Any agent class, one's own too, gets its flags this way; nothing has to be declared twice. What a subclass
passes to its base, or says in its table of fixed settings (:mod:`agents.arguments`), is not a flag.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from agents import presets
from agents.arguments import entry, named_parameters
from textrl_env.errors import did_you_mean

#: Constructor arguments that have flags of their own or none.
_NOT_HYPER = frozenset(
    (
        "self",
        "policy",
        "env",
        "env_kwargs",
        "policy_kwargs",
        "n_envs",
        "tensorboard_log",
        "verbose",
        "seed",
        "device",
    )
)
_METAVARS = {
    "bool": "true|false",
    "dtype": "TEXT",
    "int": "INT",
    "float": "FLOAT",
    "str": "TEXT",
    "Schedule": "FLOAT|linear:FLOAT",
}
#: The command line logs without being asked.
REPORT_TO = "csv,tensorboard"


@dataclass(frozen=True)
class Flag:
    """One hyper-parameter.

    Attributes:
        name: As in the constructor.
        types: The alternatives of its type, as text: "int", "float", "bool", "str", "Schedule", "None", ...
        default: Its default, or ``inspect.Parameter.empty``.
        help: The text of the docstring.
        owner: The class whose constructor has it.
        by_model: Its default where what is trained decides, see :mod:`agents.presets`.
    """

    name: str
    types: tuple[str, ...]
    default: Any
    help: str
    owner: str
    by_model: presets.ByModel | None = None

    @property
    def option(self) -> str:
        """As on the command line, ``--like-this``."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_bool(self) -> bool:
        """Whether it is a switch."""
        return self.types == ("bool",)

    @property
    def metavar(self) -> str:
        """What its value looks like, for the help."""
        shown = [_METAVARS.get(each, "JSON") for each in self.types if each != "None"]
        return "|".join([*dict.fromkeys(shown), *(["none"] if "None" in self.types else [])])


def hyper_parameters(cls: type) -> list[Flag]:
    """The flags of an agent class, its own first, then those of its bases that ``**kwargs`` lets through."""
    flags: dict[str, Flag] = {}
    fixed = set(getattr(cls, "takes_no", ()))
    helps: dict[str, str] = {}
    for owner in cls.__mro__[:-1]:
        helps = docstring_arguments(owner) | helps
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(vars(owner)["__init__"]).parameters.values()
        for parameter in named_parameters(vars(owner)["__init__"]):
            said = entry(cls, parameter.name, owner)
            if parameter.name in _NOT_HYPER | fixed | flags.keys() or (said is not None and said.fixed):
                continue
            default = parameter.default if said is None else said.value
            types = _types_of(parameter.annotation, default)
            whose = (owner if said is None else said.owner).__name__
            flags[parameter.name] = Flag(parameter.name, types, default, "", whose)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
        fixed |= _passed_to_base(vars(owner)["__init__"])
    return [
        Flag(f.name, f.types, f.default, helps.get(f.name, ""), f.owner, _by_model(f, cls))
        for f in flags.values()
    ]


def _by_model(flag: Flag, cls: type) -> presets.ByModel | None:
    """The defaults of a hyper-parameter by what is trained; None for one that has the same everywhere."""
    if flag.default is not None or flag.name not in presets.DEFAULTS:
        return None
    return presets.ByModel(*(presets.default(flag.name, cls, column) for column in presets.ByModel._fields))


def dataclass_flags(module: str, name: str) -> list[Flag]:
    """The flags of a dataclass whose docstring has an ``Args:`` section, read without importing its module.

    Help shall answer at once, and what trains a model imports torch. What it has from a base is left out.

    Args:
        module: Dotted name of the module.
        name: Of the dataclass; its defaults have to be literals.
    """
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    (found,) = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name)
    helps = _arguments_of(ast.get_docstring(found) or "")
    return [
        Flag(
            field.target.id,
            _types_of(ast.unparse(field.annotation), None),
            ast.literal_eval(field.value),
            helps.get(field.target.id, ""),
            name,
        )
        for field in found.body
        if isinstance(field, ast.AnnAssign)
    ]


def loading_flags() -> list[Flag]:
    """How a model is loaded, for every verb that loads one."""
    return dataclass_flags("reward_models.loading", "LoadOptions")


def trainer_flags() -> list[Flag]:
    """What every trainer on files can do; ``textrl train`` takes those of them that are not an agent's already."""
    return [*dataclass_flags("agents.offline.options", "TrainerOptions"), *loading_flags()]


def docstring_arguments(owner: type) -> dict[str, str]:
    """The ``Args:`` section of a Google-style docstring, by argument."""
    return _arguments_of(inspect.cleandoc(vars(owner).get("__doc__") or ""))


def _arguments_of(doc: str) -> dict[str, str]:
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if section is None:
        return {}
    entries = re.split(r"^(?=\S)", textwrap.dedent(section[1]), flags=re.MULTILINE)
    found = {}
    for each in entries:
        name, colon, text = each.partition(":")
        if colon and re.fullmatch(r"\w+(?: \(.*\))?", name):
            found[name.split(" ")[0]] = " ".join(text.split()).replace("``", "")
    return found


def _passed_to_base(init: Any) -> set[str]:
    """Names of the keywords in ``super().__init__(...)``; none where the source is not at hand."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(init)))
    except (OSError, TypeError, SyntaxError):
        return set()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None}


def _types_of(annotation: Any, default: Any) -> tuple[str, ...]:
    """The alternatives of a type; from the default where nothing is annotated."""
    if annotation is inspect.Parameter.empty:
        known = default is not None and default is not inspect.Parameter.empty
        return (type(default).__name__,) if known else ("Any", "None")
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    optional = re.fullmatch(r"(?:typing\.)?Optional\[(.*)\]", text)
    text = f"{optional[1]} | None" if optional else text
    return tuple(part.strip().rpartition(".")[2] for part in re.split(r"\|(?![^\[]*\])", text))


def parse_value(flag: Flag, text: str) -> Any:
    """The value that a flag's text means.

    Raises:
        ValueError: It does not fit the flag's type.
    """
    if text.lower() == "none" and "None" in flag.types:
        return None
    try:
        return _parse(flag.types, text)
    except ValueError:
        raise ValueError(f"{flag.option} takes {flag.metavar}, got {text!r}") from None


def _parse(types: tuple[str, ...], text: str) -> Any:
    if "Schedule" in types and text.startswith("linear:"):
        float(text.partition(":")[2])
        return text
    if "int" in types and "float" not in types and ("str" not in types or re.fullmatch(r"[-+\d_]+", text)):
        number = float(text) if re.search(r"[.eE]", text) else int(text)
        if number != int(number):
            raise ValueError(text)
        return int(number)
    if {"float", "Schedule"} & set(types):
        return float(text)
    if "bool" in types and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text if "str" in types else parse_json(text)


def parse_values(flags: Iterable[Flag], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of those flags that were given (are not None), by name."""
    own = {flag.name: flag for flag in flags}
    found = {}
    for name, value in given.items():
        if name in own and value is not None:
            found[name] = value if isinstance(value, bool) else parse_value(own[name], value)
    # The only list that is easier typed with commas than as JSON.
    targets = found.get("lora_targets", "all-linear")
    if isinstance(targets, str) and targets != "all-linear":
        found["lora_targets"] = [name.strip() for name in targets.split(",")]
    return found


def parse_json(text: str) -> Any:
    """JSON where it is JSON, a text otherwise."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_assignments(option: str, assignments: Iterable[str]) -> dict[str, Any]:
    """``["a=1", "b=text"]`` as a dict, values as JSON where they are JSON."""
    found = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"{option} takes key=value, got {assignment!r}")
        found[name.strip()] = parse_json(value)
    return found


def parse_object(option: str, text: str | None) -> dict[str, Any] | None:
    """A JSON object as a dict; None stays None.

    Raises:
        ValueError: It is no JSON object.
    """
    if text is None:
        return None
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(
            f"{option} takes a JSON object such as '{{\"enable_thinking\": false}}', got {text!r}"
        )
    return value


def as_typer_parameters(
    flags: list[Flag], panels: Mapping[str, str] | None = None, defaults: Mapping[str, Any] | None = None
) -> list[inspect.Parameter]:
    """Typer options for flags; what is not given arrives as None.

    Args:
        flags: What there is.
        panels: The panel of each in the help; None groups them by the class that has them.
        defaults: What the help says of those whose default the command line changes.
    """
    parameters = []
    for flag in flags:
        required = flag.default is inspect.Parameter.empty
        default = (defaults or {}).get(flag.name)
        shown = _default(flag) if default is None else default
        text = flag.help if required else f"{flag.help} [default: {shown}]"
        panel = f"Hyper-parameters of {flag.owner}" if panels is None else panels[flag.name]
        common = {"help": escape(text.strip()), "rich_help_panel": panel, "show_default": False}
        if flag.is_bool:
            negative = flag.option.replace("--", "--no-", 1)
            annotation: Any = Annotated[bool | None, typer.Option(f"{flag.option}/{negative}", **common)]
        else:
            option = typer.Option(flag.option, metavar=flag.metavar, **common)
            annotation = Annotated[str | None, option]
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(flag.name, keyword_only, default=None, annotation=annotation))
    return parameters


def _default(flag: Flag) -> str:
    if flag.by_model is None:
        return _show(flag.default)
    network, world, full, lora = map(_show, flag.by_model)
    if network == world == full == lora:
        return network
    mine = full if full == lora else f"{full} for every weight of a language model, {lora} for LoRA"
    return (
        f"{mine}; {world} in the embedded world; {network} for networks"
        if world != network
        else f"{mine}; else {world}"
    )


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default is None else str(default)


def check_options(
    args: list[str], options: Iterable[str], why_not: Callable[[str], str | None] = lambda name: None
) -> None:
    """Raise a ValueError for the first ``--option`` that is not one.

    Args:
        args: The command line.
        options: What there is.
        why_not: What to say of an option that there is elsewhere; None has the nearest named.
    """
    options = list(options)
    for arg in args:
        if arg == "--":
            return
        name = arg.partition("=")[0]
        if name.startswith("--") and name not in options:
            known = why_not(name)
            if known is not None:
                raise ValueError(known)
            near = did_you_mean(name, options)
            hint = near if near.startswith("Did") else "--help lists them all."
            raise ValueError(f"there is no flag {name}. {hint}")
