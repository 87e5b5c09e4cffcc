"""Any Gymnasium environment as a game: an observation is put into words, and what was written becomes an action.

    GymnasiumGame(gym.make("FrozenLake-v1"))                            # a pair of functions that is given here
    GymnasiumGame(env, to_text=lambda observation: ..., to_action=lambda text: ...)

Environments whose spaces are ``gymnasium.spaces.Text`` need no functions. Pairs are given for GridWorld (ours),
FrozenLake, Taxi, Blackjack and CartPole.

A text that is no action changes nothing in the environment: the game answers with what can be said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from reward_models import trust
from reward_models.names import shorten
from textrl_env.games.extras import named_function
from textrl_env.protocols import Game

ToText = Callable[[Any], str]
#: An action, or None where the text is none.
ToAction = Callable[[str], Any]

#: An id of Gymnasium, with the module that registers it in front or without.
_ID = re.compile(r"(?:[\w.]+:)?[\w./-]+-v\d+")


class Words(NamedTuple):
    """How an environment is played in words.

    Attributes:
        to_text: Observation to text.
        to_action: Text to action; None where it is none.
        rules: What stands above the first observation.
        choices: What can be said, for the answer to a text that is no action.
    """

    to_text: ToText
    to_action: ToAction
    rules: str = ""
    choices: str = ""


class GymnasiumGame:
    """A Gymnasium environment as a game.

    Args:
        env: The environment.
        to_text: Observation to text; None takes the given one, or the observation itself if it is a text.
        to_action: Text to action, or to None if it is no action; None takes the given one, or the text itself if
            actions are texts.
        rules: Put above the first observation; None takes the given one.
        invalid_reward: Of a turn whose text is no action. The environment does not notice such a turn.
        invalid_text: What such a turn is answered with; None names what can be said.
        cue: Put behind every text that the policy answers, such as ``"\\n> "``: where no chat template lays out the
            conversation, it tells a turn from what stands before it.

    Raises:
        TypeError: A function is needed and none was given.
    """

    def __init__(
        self,
        env: gym.Env,
        to_text: ToText | None = None,
        to_action: ToAction | None = None,
        rules: str | None = None,
        invalid_reward: float = 0.0,
        invalid_text: str | None = None,
        cue: str = "",
    ) -> None:
        for name, function in (("to_text", to_text), ("to_action", to_action)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function or None, got {shorten(function)}")
        if not isinstance(cue, str):
            raise TypeError(f"cue must be a text, got {shorten(cue)}")
        self.env, self.invalid_reward, self.cue = env, invalid_reward, cue
        given = _given_words(env)
        self.to_text = to_text or (given.to_text if given else _texts_as_they_are(env))
        self.to_action = to_action or (given.to_action if given else _actions_as_they_are(env))
        own_words = given is not None and to_action is None
        self.rules = rules if rules is not None else given.rules if own_words else ""
        choices = given.choices if own_words else _described(env.action_space)
        self.invalid_text = f"Not understood. Expected {choices}." if invalid_text is None else invalid_text

    def reset(self, seed: int | None = None, **row: Any) -> tuple[str, dict[str, Any]]:
        """Begin an episode; a row is handed to the environment as its options."""
        observation, _ = self.env.reset(seed=seed, options=row or None)
        text = self._text(observation) + self.cue
        return f"{self.rules}\n{text}" if self.rules else text, {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the action that was written."""
        action = self.to_action(text)
        if action is None:
            return self.invalid_text + self.cue, self.invalid_reward, False, False, {}
        observation, reward, terminated, truncated, info = self.env.step(action)
        # What a stranger's info says otherwise is a stranger's, but this key is everybody's.
        success = {"is_success": bool(info["is_success"])} if "is_success" in info else {}
        over = terminated or truncated
        text = self._text(observation) + ("" if over else self.cue)
        return text, float(reward), bool(terminated), bool(truncated), success

    def _text(self, observation: Any) -> str:
        text = self.to_text(observation)
        if not isinstance(text, str):
            raise TypeError(f"to_text must return a text, got {shorten(text)} for {shorten(observation)}")
        return text


def load(game_id: str, **kwargs: Any) -> Callable[[], GymnasiumGame]:
    """A factory of games from an id of Gymnasium.

    Args:
        game_id: Such as ``"FrozenLake-v1"`` or ``"my_module:MyEnv-v0"``.
        **kwargs: ``to_text``, ``to_action`` (functions, or ``"module:function"``), ``rules``, ``invalid_reward``,
            ``invalid_text`` and ``cue`` are for :class:`GymnasiumGame`; the rest is for ``gym.make``.
    """
    names = ("to_text", "to_action", "rules", "invalid_reward", "invalid_text", "cue")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    for name in ("to_text", "to_action"):
        if isinstance(own.get(name), str):
            own[name] = named_function(own[name])
    if ":" in game_id:  # Gymnasium imports the module in front
        trust.check_module(game_id.partition(":")[0], f" (for the game {game_id!r})")
    return lambda: GymnasiumGame(gym.make(game_id, **kwargs), **own)


def is_id(text: str) -> bool:
    """Whether a text is an id of Gymnasium: with a version, or the name of something registered."""
    return _ID.fullmatch(text) is not None or any(spec.name == text for spec in gym.registry.values())


def adapt(made: Any) -> Game | None:
    """A game around a Gymnasium environment; None for anything else."""
    return GymnasiumGame(made) if isinstance(made, gym.Env) else None


# -- what is said of actions ----------------------------------------------------------------------------------


def one_of(names: Sequence[str]) -> ToAction:
    """A function from a text to the index of the name in it, as a whole word; of several names the last counts.

    A text that is nothing but a number is the index itself. The case of letters does not count.
    """
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b", re.IGNORECASE)
    index = {name.casefold(): i for i, name in enumerate(names)}

    def to_action(text: str) -> int | None:
        found = pattern.findall(text)
        if found:
            return index[found[-1].casefold()]
        number = text.strip()
        return int(number) if number.isascii() and number.isdigit() and int(number) < len(names) else None

    return to_action


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _texts_as_they_are(env: gym.Env) -> ToText:
    if isinstance(env.observation_space, gym.spaces.Text):
        return str
    raise TypeError(
        f"the observations of {_name(env)} are {env.observation_space} and no texts, and no words are given for it "
        f"(only for {', '.join(sorted(GIVEN))}); give to_text, a function from an observation to a text: "
        "game=lambda: GymnasiumGame(env, to_text=..., to_action=...)"
    )


def _actions_as_they_are(env: gym.Env) -> ToAction:
    space = env.action_space
    if isinstance(space, gym.spaces.Text):
        return lambda text: text if space.contains(text) else None
    raise TypeError(
        f"the actions of {_name(env)} are {space} and no texts, and no words are given for it (only for "
        f"{', '.join(sorted(GIVEN))}); give to_action, a function from a text to an action, or to None where it is "
        "none: game=lambda: GymnasiumGame(env, to_text=..., to_action=...)"
    )


def _described(space: gym.Space) -> str:
    if isinstance(space, gym.spaces.Text):
        characters = "".join(sorted(space.character_set))
        return f"{space.min_length} to {space.max_length} characters out of {shorten(characters, 80)}"
    return f"an action of {space}"


def _name(env: gym.Env) -> str:
    return type(env.unwrapped).__name__ if env.spec is None else env.spec.id


# -- words that are given -------------------------------------------------------------------------------------


def _given_words(env: gym.Env) -> Words | None:
    """The words of the environment, if they are given here."""
    name = type(env.unwrapped).__name__.removesuffix("Env") if env.spec is None else env.spec.name
    make = GIVEN.get(name)
    return None if make is None else make(env.unwrapped)


_MOVES = ("left", "down", "right", "up")


def _moves(slippery: bool) -> str:
    return f"Say {_listed(_MOVES)}.{' The floor is slippery.' if slippery else ''}"


def _map_of(cells: np.ndarray) -> Callable[[Any], str]:
    """From the number of a cell to a picture of the map in letters, "A" standing there."""

    def to_text(observation: Any) -> str:
        drawn = cells.copy()
        drawn.flat[int(observation)] = "A"
        return "\n".join("".join(row) for row in drawn)

    return to_text


def _grid_world(env: Any) -> Words:
    rules = f"Walk from A to G. # is a wall, H a pit. {_moves(env.dynamics.slip > 0)}"
    return Words(_map_of(env.dynamics.cells), one_of(_MOVES), rules, _listed(_MOVES))


def _frozen_lake(env: Any) -> Words:
    cells = np.array([[cell.decode() for cell in row] for row in env.desc])
    # A state of the model from which some move has several outcomes.
    slippery = any(len(outcomes) > 1 for moves in env.P.values() for outcomes in moves.values())
    rules = f"Cross the lake from A to G. F is ice, H a hole. {_moves(slippery)}"
    return Words(_map_of(cells), one_of(_MOVES), rules, _listed(_MOVES))


def _taxi(env: Any) -> Words:
    names = ("south", "north", "east", "west", "pickup", "dropoff")
    places = ("R", "G", "Y", "B")
    cells = np.array([[cell.decode() for cell in row] for row in env.desc])

    def to_text(observation: Any) -> str:
        row, column, passenger, destination = env.decode(int(observation))
        drawn = cells.copy()
        drawn[row + 1, 2 * column + 1] = "T"
        board = "\n".join("".join(line) for line in drawn)
        where = "in the taxi" if passenger == len(places) else f"at {places[passenger]}"
        # The taxi may stand on a place, and hides its letter.
        corners = ", ".join(
            f"{place} row {r} column {c}" for place, (r, c) in zip(places, env.locs, strict=True)
        )
        return (
            f"{board}\nTaxi: row {row} column {column}. Places: {corners}.\n"
            f"The passenger is {where} and wants to go to {places[destination]}."
        )

    rules = f"T is the taxi; it passes : and no |. Say {_listed(names)}."
    return Words(to_text, one_of(names), rules, _listed(names))


def _blackjack(env: Any) -> Words:
    names = ("stick", "hit")

    def to_text(observation: Any) -> str:
        mine, dealers, ace = (int(number) for number in observation)
        return f"You have {mine}{', with an ace that counts 11' if ace else ''}. The dealer shows {dealers}."

    return Words(
        to_text, one_of(names), "Come nearer to 21 than the dealer. Say stick or hit.", _listed(names)
    )


def _cart_pole(env: Any) -> Words:
    names = ("left", "right")

    def to_text(observation: Any) -> str:
        place, speed, angle, turning = (float(number) for number in observation)
        return f"cart {place:.2f}, speed {speed:.2f}, angle {np.degrees(angle):.1f}, turning {np.degrees(turning):.1f}"

    rules = (
        "Balance the pole. Cart in metres, speed in metres a second, angle in degrees, turning in degrees a second. "
        "Say left or right to push the cart."
    )
    return Words(to_text, one_of(names), rules, _listed(names))


#: Name of an environment, without its version, to what makes its words from it.
GIVEN: Mapping[str, Callable[[Any], Words]] = {
    "GridWorld": _grid_world,
    "FrozenLake": _frozen_lake,
    "Taxi": _taxi,
    "Blackjack": _blackjack,
    "CartPole": _cart_pole,
}
