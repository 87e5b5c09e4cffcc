"""Games from what users give: a class or a factory, a name of one, or anything that an adapter knows how to play.

    make = load_game("my_module:MyGame")
    game = make()                          # one for each slot

An adapter is a function in one of two tables:

- :data:`SPELLINGS`, for texts such as ``"reasoning_gym:chain_sum"``: by the word before the colon, a function of the
  rest that returns a factory;
- :data:`ADAPTERS`, for objects: each gets what the factory made and returns a game, or None where it is not its kind.

Both name functions as ``"module:function"``, so that nothing is imported which is not played.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reward_models import trust
from reward_models.importing import import_file, import_module
from reward_models.names import shorten
from textrl_env.errors import did_you_mean
from textrl_env.games import gymnasium_env, strings
from textrl_env.protocols import Game

#: Makes a game of its own at each call.
GameFactory = Callable[[], Game]

#: Word before the colon -> ``"module:function"`` with ``function(rest, **game_kwargs) -> GameFactory``.
SPELLINGS: dict[str, str] = {
    "gem": "textrl_env.games.strings:load_gem",
    "openenv": "textrl_env.games.openenv:load",
    "reasoning_gym": "textrl_env.games.reasoning_gym:load",
    "skyrl_gym": "textrl_env.games.strings:load_skyrl",
    "textarena": "textrl_env.games.textarena:load",
}
#: ``"module:function"`` with ``function(made) -> Game | None``, tried in this order on what is no game by itself.
ADAPTERS: list[str] = ["textrl_env.games.gymnasium_env:adapt", "textrl_env.games.tools:adapt"]


def load_game(game: Any, game_kwargs: Mapping[str, Any] | None = None) -> GameFactory:
    """A factory of games.

    Args:
        game: A class or factory, an object to be copied, ``"package.module:Name"``, ``"file.py:Name"``, an id of
            Gymnasium such as ``"FrozenLake-v1"``, or what an adapter knows.
        game_kwargs: Passed to the class or factory.

    Raises:
        ImportError: No such module or name.
        TypeError: What was given, or what it makes, is nothing that can be played.
    """
    kwargs = dict(game_kwargs or {})
    if isinstance(game, str):
        word, _, rest = game.partition(":")
        if word in SPELLINGS:
            if word != "openenv":  # an address; the others run a library's code
                trust.check_module(word, f" (for the game {game!r})")
            return _checked(_function(SPELLINGS[word])(rest, **kwargs), game)
        if gymnasium_env.is_id(game):
            return _checked(gymnasium_env.load(game, **kwargs), game)
        game = _find(game)
    if strings.is_skyrl_class(game):
        return _checked(strings.from_skyrl_class(game, **kwargs), game)
    if callable(game) and not (isinstance(game, Game) and not inspect.isclass(game)):
        return _checked(lambda: game(**kwargs), game)
    if kwargs:
        raise TypeError(
            f"game_kwargs={shorten(kwargs)} is for a class or a factory, got the object {shorten(game)}; give its "
            "class, or leave game_kwargs out"
        )
    return _checked(lambda: copy.deepcopy(game), game)


def _checked(make: Callable[[], Any], given: Any) -> GameFactory:
    """The factory, whose products are games or are made ones by an adapter."""

    def factory() -> Game:
        made = make()
        if inspect.isclass(made):
            raise TypeError(
                f"game={shorten(given)} made the class {made.__name__} and no game; give the class itself"
            )
        for name in ADAPTERS:
            adapted = _function(name)(made)
            if adapted is not None:
                return adapted
        if isinstance(made, Game):
            return made
        wanted = "reset(seed=None, **row) -> observation, info and step(text) -> five values"
        missing = [name for name in ("reset", "step") if not callable(getattr(made, name, None))]
        raise TypeError(
            f"game={shorten(given)} makes a {type(made).__name__}, which has no {' and no '.join(missing)}; a game has "
            f"{wanted}"
        )

    return factory


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _find(spec: str) -> Any:
    """What ``"package.module:Name"`` or ``"file.py:Name"`` names."""
    named = trust.split_spec(spec)
    if named is None:
        known = ", ".join(f"{word}:..." for word in SPELLINGS)
        raise ValueError(
            f"game={spec!r} names no game; expected 'package.module:Name', 'file.py:Name', an id of Gymnasium such as "
            f"'FrozenLake-v1'"
            f"{f', or one of {known}' if known else ''}"
        )
    trust.check_module(named.module, f" (for the game {spec!r})")
    module = _import(named.module)
    found: Any = module
    for part in named.name.split("."):
        if not hasattr(found, part):
            known = [name for name, value in vars(found).items() if callable(value) and name[0] != "_"]
            raise ImportError(f"{named.module!r} has no {named.name!r}. {did_you_mean(part, known)}")
        found = trust.get_attribute(found, part, spec)
    trust.check_owner(found, spec, module.__name__)
    if named.arguments is not None:
        args, kwargs = trust.literal_arguments(named.arguments, spec)
        return lambda **more: found(*args, **(kwargs | more))
    return found


def _import(name: str) -> Any:
    allowed = trust.allowed_file(name)
    if allowed is None and not name.endswith(".py"):
        return import_module(name)
    file = Path(allowed or name).expanduser().resolve()
    # A name of its own, so that a file called like a module that is loaded already can be given.
    return import_file(file, f"_game_file_{file.stem}_{abs(hash(str(file))):x}")
