"""Classes whose public methods are tools, as trl takes them as ``environment_factory``.

    class Calculator:
        def reset(self, question, answer, **row): ...     # the row; what it returns goes to the end of the prompt
        def multiply(self, a: float, b: float) -> float:  # a tool; its schema comes from type hints and docstring
            '''Multiply two numbers. ...'''
        def get_reward(self): ...                         # what the episode is worth so far

The model calls tools in its text. Calls are read by the tokenizer's own format where it has one
(``response_template``), else as ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. Each call gets a message
of the role "tool"; one that cannot be made gets an error there. A turn without a call ends the episode.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from reward_models.function import wait_for
from reward_models.names import shorten
from textrl_env.errors import did_you_mean
from textrl_env.protocols import Game

#: Methods of a class of tools that are no tools.
NO_TOOLS = ("reset", "get_reward")
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


class ToolCall(NamedTuple):
    """A call that a model wrote.

    Attributes:
        name: Of the tool; "" where it cannot be told.
        arguments: By name.
        problem: Why it cannot be made; None if it can.
    """

    name: str
    arguments: dict[str, Any]
    problem: str | None = None


class ToolGame:
    """A class of tools as a game.

    ``get_reward`` is asked after every turn, and the reward of a turn is by how much it has grown: so an episode's
    score is what ``get_reward`` returned last, whatever ended the episode (trl asks once, when everything is over).

    Args:
        environment: The object with the tools.
        reward: A function of the environment and the turn's text, for one without ``get_reward``.

    Raises:
        TypeError: Nothing rewards, or the arguments of a tool have no type hints.
    """

    def __init__(self, environment: Any, reward: Callable[[Any, str], float] | None = None) -> None:
        from transformers.utils import get_json_schema

        name = type(environment).__name__
        if not callable(getattr(environment, "reset", None)):
            raise TypeError(f"{name} has no reset(**row)")
        if reward is None and not callable(getattr(environment, "get_reward", None)):
            raise TypeError(
                f"{name} has public methods, which would be its tools, but no get_reward() (nor step(text), as a game "
                "has), so nothing would reward an episode; add get_reward(), or give game=lambda: "
                f"ToolGame({name}(), reward=function of the environment and the text of a turn)"
            )
        self.environment, self.reward = environment, reward
        self.tools = {tool: getattr(environment, tool) for tool in _tool_names(environment)}
        self.schemas = []
        for tool, method in self.tools.items():
            try:
                self.schemas.append(get_json_schema(method))
            except Exception as error:
                raise TypeError(
                    f"the tool {name}.{tool} has no schema: {error} (a tool has a docstring that tells of every "
                    "argument under 'Args:', and type hints; a method that is no tool begins with '_')"
                ) from error
        self._takes_seed = _names_seed(environment.reset)
        self.worth = 0.0

    def __deepcopy__(self, memo: dict) -> ToolGame:
        return ToolGame(copy.deepcopy(self.environment, memo), self.reward)

    def reset(self, seed: int | None = None, **row: Any) -> tuple[Any, dict[str, Any]]:
        """Begin anew: the row's prompt, and behind it what the environment's ``reset`` returns."""
        handed = row | ({"seed": seed} if self._takes_seed else {})
        try:
            inspect.signature(self.environment.reset).bind(**handed)
        except TypeError as error:
            has = f"has the columns {sorted(row)}" if row else "has no columns, since there are no rows"
            raise TypeError(
                f"{type(self.environment).__name__}.reset(): {error}; the row {has}. Give rows= (--rows FILE) with "
                "what reset() takes"
            ) from None
        shown = _waited(self.environment.reset(**handed))
        self.worth = 0.0
        return _opening(row.get("prompt"), shown), {"tools": self.schemas}

    def step(self, text: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Make the calls of a turn; without any the episode is over."""
        answers = [(call.name, self._result(call)) for call in find_calls(text, self.schemas)]
        reward = self._gain(text)
        if getattr(text, "chat", True):
            shown = [{"role": "tool", "name": name, "content": result} for name, result in answers]
        else:
            shown = "".join(f"\n<tool_response>\n{result}\n</tool_response>\n" for _, result in answers)
        return shown, reward, not answers, False, {}

    def _result(self, call: ToolCall) -> str:
        """What a tool answered, as text, or an error for the model to read."""
        if call.problem is not None:
            return _error(call.problem)
        if call.name not in self.tools:
            return _error(f"there is no tool {call.name!r}. {did_you_mean(call.name, self.tools)}")
        method = self.tools[call.name]
        try:
            inspect.signature(method).bind(**call.arguments)
        except TypeError as error:
            return _error(f"{call.name}: {error}; expected {call.name}{inspect.signature(method)}")
        try:
            return str(_waited(method(**call.arguments)))
        except Exception as error:  # a tool that fails is part of the task, as it is in trl
            return _error(f"{type(error).__name__}: {error}")

    def _gain(self, text: str) -> float:
        found = self.reward(self.environment, text) if self.reward else self.environment.get_reward()
        worth = _waited(found)
        try:
            number = float(worth)
        except (TypeError, ValueError):
            name = "reward" if self.reward else f"{type(self.environment).__name__}.get_reward()"
            raise TypeError(f"{name} must return a number, got {shorten(worth)}") from None
        gain, self.worth = number - self.worth, number
        return gain


class ToolGames:
    """Several classes of tools; the column ``environment`` of a row says which one is played.

    Args:
        factories: By name.
    """

    def __init__(self, factories: Mapping[str, Callable[[], Any]]) -> None:
        self.games = {name: ToolGame(make()) for name, make in factories.items()}

    def reset(self, seed: int | None = None, **row: Any) -> tuple[Any, dict[str, Any]]:
        """Begin the game that the row names."""
        name = row.pop("environment", None)
        if name not in self.games:
            raise ValueError(
                f"a row's 'environment' must name one of {sorted(self.games)}, got {shorten(name)}; the rows of "
                "rows= need that column"
            )
        self.game = self.games[name]
        return self.game.reset(seed, **row)

    def step(self, text: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A turn of the game that is played."""
        return self.game.step(text)


def adapt(made: Any) -> Game | None:
    """A game around an object with tools, or around a dict of classes of them; None for anything else.

    An object that has ``step`` as well is a game of its own if its ``reset`` takes a seed, as games do.
    """
    if isinstance(made, dict) and made and all(callable(make) for make in made.values()):
        return ToolGames(made)
    if isinstance(made, (ToolGame, ToolGames)) or not callable(getattr(made, "reset", None)):
        return None
    steps = callable(getattr(made, "step", None))
    if callable(getattr(made, "get_reward", None)):
        return None if steps and _names_seed(made.reset) else ToolGame(made)
    return None if steps or not _tool_names(made) else ToolGame(made)


def find_calls(text: str, schemas: list[dict[str, Any]] | None = None) -> list[ToolCall]:
    """The calls of tools in a turn, good and bad ones, in their order.

    Args:
        text: What the policy wrote; a :class:`textrl_env.games.layout.Turn` is read by its tokenizer's own format.
        schemas: Of the tools.
    """
    parse = getattr(text, "parsed", None)
    try:
        message = parse(schemas) if parse is not None else None
    except Exception as error:  # whatever a parser makes of a model's text
        return [ToolCall("", {}, f"the tool call cannot be read: {error}")]
    if message is not None:
        return [_read(call) for call in message.get("tool_calls") or ()]
    return [_read_json(body) for body in _TAGGED.findall(text)]


def _read_json(body: str) -> ToolCall:
    try:
        return _read(json.loads(body))
    except ValueError as error:
        return ToolCall("", {}, f"the tool call is no JSON: {error}")


def _read(call: Any) -> ToolCall:
    """A call out of ``{"name": ..., "arguments": {...}}``, bare or under "function"."""
    wanted = 'expected {"name": ..., "arguments": {...}}'
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return ToolCall("", {}, f"the tool call names no tool; {wanted}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return ToolCall(function["name"], {}, f"the arguments are no JSON; {wanted}")
    if not isinstance(arguments, Mapping):
        return ToolCall(function["name"], {}, f"the arguments are no object; {wanted}")
    return ToolCall(function["name"], dict(arguments))


def _tool_names(environment: Any) -> list[str]:
    """Public methods, found on the class: on the object, properties would be evaluated."""
    members = inspect.getmembers(type(environment), inspect.isfunction)
    return [name for name, _ in members if name not in NO_TOOLS and not name.startswith("_")]


def _names_seed(reset: Callable[..., Any]) -> bool:
    return "seed" in inspect.signature(reset).parameters


def _opening(prompt: Any, shown: Any) -> Any:
    """A prompt, a text or messages, with what a reset returned at the end of its last message."""
    if shown is None:
        return prompt
    if not isinstance(shown, str | list):
        raise TypeError(f"reset() must return None, a text or parts of a content, got {shorten(shown)}")
    if not prompt:
        return shown if isinstance(shown, str) else [{"role": "user", "content": shown}]
    if isinstance(prompt, str):
        return (
            _joined(prompt, shown)
            if isinstance(shown, str)
            else [{"role": "user", "content": _joined(prompt, shown)}]
        )
    return [*prompt[:-1], {**prompt[-1], "content": _joined(prompt[-1]["content"], shown)}]


def _joined(content: Any, shown: Any) -> Any:
    if isinstance(content, str) and isinstance(shown, str):
        return content + shown
    return [part for each in (content, shown) for part in (_part(each) if isinstance(each, str) else each)]


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _waited(value: Any) -> Any:
    """What a method returned, awaited if it is async."""
    return wait_for(value) if inspect.isawaitable(value) else value


def _error(problem: str) -> str:
    return json.dumps({"error": problem}, ensure_ascii=False)
