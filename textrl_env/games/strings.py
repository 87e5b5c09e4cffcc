"""Environments that speak in strings: GEM's, which are games as they are, and skyrl-gym's.

    "gem:game:GuessTheNumber-v0"     gem.make("game:GuessTheNumber-v0")
    "skyrl_gym:gsm8k"                skyrl_gym.make("gsm8k", env_config=..., extras=row)
    MySkyRLEnv                       a class with init(prompt) and step(action), made anew for each episode

GEM's ``reset(seed)`` and ``step(action)`` return what Gymnasium's do, so any class in that style plays without help.
skyrl-gym makes an object for each row of the data; its ``step`` returns a dict with ``observations`` (messages),
``reward`` and ``done``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from reward_models.names import shorten
from textrl_env.errors import did_you_mean
from textrl_env.games.extras import import_extra


class SkyRLGame:
    """An environment of skyrl-gym as a game: each episode plays a new one, made for a row.

    Args:
        make: Makes the environment from its ``extras``, which are the row.
        name: For messages.
    """

    def __init__(self, make: Callable[[dict[str, Any]], Any], name: str) -> None:
        self.make, self.name = make, name
        self.env: Any = None

    def reset(self, seed: int | None = None, **row: Any) -> tuple[Any, dict[str, Any]]:
        """Make the environment of a row, and begin with its ``prompt``; the seed is its extra "seed"."""
        if "prompt" not in row:
            came = did_you_mean("prompt", row) if row else "There are no rows; give rows=."
            raise ValueError(
                f"{self.name} begins with the column 'prompt' of a row, which is not there. {came}"
            )
        self._close()
        self.env = self.make({"seed": seed} | row)
        prompt, info = self.env.init(row["prompt"])
        return prompt, dict(info)

    def step(self, text: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """A turn."""
        returned = self.env.step(str(text))
        if not isinstance(returned, Mapping) or not {"observations", "reward", "done"} <= set(returned):
            raise TypeError(
                f"{self.name}.step must return a dict with observations, reward and done, got {shorten(returned)}"
            )
        observations = returned["observations"] or ("" if returned["done"] else [])
        return observations, returned["reward"], bool(returned["done"]), False, {}

    def _close(self) -> None:
        close = getattr(self.env, "close", None)
        if callable(close):
            close()


def is_skyrl_class(thing: Any) -> bool:
    """Whether something is a class in the style of skyrl-gym: ``init`` and ``step``, and no ``reset``."""
    has = {name: callable(getattr(thing, name, None)) for name in ("init", "step", "reset")}
    return inspect.isclass(thing) and has["init"] and has["step"] and not has["reset"]


def from_skyrl_class(cls: type, **kwargs: Any) -> Callable[[], SkyRLGame]:
    """A factory of games from a class that is made with ``extras`` (and ``env_config``, where it takes one)."""
    taken = inspect.signature(cls).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if ("env_config" in taken or anything) and "env_config" not in kwargs:
        kwargs = kwargs | {"env_config": {}}

    def make(row: dict[str, Any]) -> Any:
        return cls(**kwargs, **({"extras": row} if "extras" in taken or anything else {}))

    return lambda: SkyRLGame(make, cls.__name__)


def load_skyrl(name: str, env_config: Mapping[str, Any] | None = None) -> Callable[[], SkyRLGame]:
    """A factory of games from a name that skyrl-gym knows."""
    skyrl_gym = import_extra("skyrl_gym", "skyrl-gym", f"game='skyrl_gym:{name}'", extra=None)

    def make(row: dict[str, Any]) -> Any:
        return skyrl_gym.make(name, env_config=dict(env_config or {}), extras=row)

    return lambda: SkyRLGame(make, name)


def load_gem(name: str, **kwargs: Any) -> Callable[[], Any]:
    """A factory of games from a name that GEM knows."""
    gem = import_extra("gem", "gem-llm", f"game='gem:{name}'", extra=None)
    return lambda: gem.make(name, **kwargs)
