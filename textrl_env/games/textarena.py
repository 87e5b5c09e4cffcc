"""Games of the package textarena, against a scripted or a frozen opponent: ``game="textarena:Nim-v0"``.

    game_kwargs={"opponent": "my_module:play"}                       # a function from what it has seen to its move
    game_kwargs={"opponent": FrozenModel("Qwen/Qwen2.5-0.5B-Instruct")}

The policy has one seat, the opponent all the others; games for one player need none. The policy is shown what is new
since its last turn, and not the whole game again.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

from reward_models.names import shorten
from textrl_env.errors import did_you_mean
from textrl_env.games.extras import import_extra, named_function

#: From all that a player has seen so far to its move; ``opponent(seen, rng)`` gets the game's random.Random as well.
Opponent = Callable[..., str]

#: Moves of others between two turns of the policy, more than any game has.
_MOST_MOVES = 1000
#: Games that are begun until one comes to the policy's first turn.
_MOST_STARTS = 20
#: textarena draws from Python's own random numbers, which belong to all.
_RANDOM = threading.RLock()


class TextArena:
    """A game of textarena.

    Args:
        make: Makes an environment of textarena that shows observations as they come (``-raw``).
        name: For messages.
        opponent: Plays the other seats; None for games of one player. What it draws at random should come from
            ``rng``, so that a seed begins alike.
        players: Seats.
        seat: The policy's, from 0; None draws it from the seed.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        name: str,
        opponent: Opponent | None = None,
        players: int = 1,
        seat: int | None = None,
    ) -> None:
        self.make, self.name, self.opponent, self.players, self.fixed_seat = (
            make,
            name,
            opponent,
            players,
            seat,
        )
        self._random: Any = None
        self._wants_rng = opponent is not None and "rng" in inspect.signature(opponent).parameters

    def reset(self, seed: int | None = None, **row: Any) -> tuple[str, dict[str, Any]]:
        """Begin a game; others move first where it is their turn. A row may hold the ``seat``.

        A game that others end before the policy's first turn, by moves that are none, is begun again.
        """
        self.rng = random.Random(f"textarena {seed}")
        seat = row.get("seat", self.fixed_seat)
        self.seat = self.rng.randrange(self.players) if seat is None else seat
        self._random = random.Random(seed).getstate()
        for _ in range(_MOST_STARTS):
            self.seen = [""] * self.players
            with self._own_random():
                self.env = self.make()
                self.env.reset(num_players=self.players, seed=seed)
            shown, done = self._until_my_turn()
            if not done:
                return shown, {}
        raise ValueError(
            f"{self.name} was over before the policy's first turn {_MOST_STARTS} times, with the seed {seed}: "
            f"{self._reason(self.env.close()[1])}; the others have seen {shorten(self.seen)}"
        )

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """A move, and those of the others up to the next turn; the reward is textarena's, when the game is over."""
        shown, done = ("", True) if self._move(str(text)) else self._until_my_turn()
        if not done:
            return shown, 0.0, False, False, {}
        rewards, info = self.env.close()
        reason = self._reason(info)
        return reason, float((rewards or {}).get(self.seat, 0.0)), True, False, {}

    def _until_my_turn(self) -> tuple[str, bool]:
        """Let others move; what the policy is shown then, and whether the game is over."""
        for _ in range(_MOST_MOVES):
            with self._own_random():
                player, messages = self.env.get_observation()
            shown = self._text(player, messages)
            self.seen[player] += shown
            if player == self.seat:
                return shown.strip("\n"), False
            if self.opponent is None:
                raise ValueError(f"{self.name} has {self.players} players; give opponent=")
            seen = self.seen[player].strip("\n")
            move = self.opponent(seen, rng=self.rng) if self._wants_rng else self.opponent(seen)
            if not isinstance(move, str):
                raise TypeError(f"the opponent in {self.name} must return a text, got {shorten(move)}")
            self.seen[player] += f"\n[Player {player}] {move}"
            if self._move(move):
                return "", True
        raise RuntimeError(
            f"{self.name}: the others have moved {_MOST_MOVES} times, and it is not the policy's turn"
        )

    def _move(self, text: str) -> bool:
        """Make a move; whether the game is over."""
        with self._own_random():
            done, _ = self.env.step(action=text)
        return bool(done)

    def _reason(self, info: Any) -> str:
        return str((info or {}).get(self.seat, {}).get("reason") or "")

    def _text(self, player: int, messages: Any) -> str:
        """Messages for a player, one a line, without its own moves."""
        names = self.env.state.role_mapping
        lines = []
        for sender, message, kind in messages:
            if sender == player and kind.name == "PLAYER_ACTION":
                continue
            lines.append(message if sender < 0 else f"[{names.get(sender, f'Player {sender}')}] {message}")
        return "".join(f"\n{line}" for line in lines)

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Random numbers of this game's own for textarena, which no other game and nothing else draws from."""
        with _RANDOM:
            others = random.getstate()
            random.setstate(self._random)
            try:
                yield
            finally:
                self._random = random.getstate()
                random.setstate(others)


class FrozenModel:
    """A language model as an opponent; loaded at its first move, and shared by all slots.

    Args:
        model: Folder, hub id or live model, as for ``TextGame-v0``.
        max_new_tokens: Of a move.
        temperature: Of the sampling; 0 takes the likeliest token.
        **options: As for :meth:`textrl_env.lm.causal_lm.CausalLM.load`.
    """

    def __init__(
        self, model: Any, max_new_tokens: int = 64, temperature: float = 1.0, **options: Any
    ) -> None:
        self.model, self.max_new_tokens, self.temperature, self.options = (
            model,
            max_new_tokens,
            temperature,
            options,
        )
        self._loaded: Any = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> FrozenModel:
        return self

    def __call__(self, seen: str, rng: random.Random) -> str:
        """The move after all that was seen, which is one message of the user where there is a chat template."""
        import numpy as np
        import torch

        from reward_models.data.encoding import TextEncoder
        from textrl_env.lm.causal_lm import CausalLM
        from textrl_env.lm.decoding import generate

        with self._lock:
            if self._loaded is None:
                lm = CausalLM.load(self.model, temperature=self.temperature or 1.0, **self.options)
                self._loaded = lm, TextEncoder(lm.tokenizer)
            lm, encoder = self._loaded
            chat = bool(lm.tokenizer.chat_template)
            ids = np.array(
                encoder.prompt([{"role": "user", "content": seen}] if chat else seen), dtype=np.int64
            )
            generator = torch.Generator().manual_seed(rng.getrandbits(63))
            (tokens,), _ = generate(lm, [ids], self.max_new_tokens, generator, self.temperature == 0)
        ends = len(tokens) > 0 and tokens[-1] in lm.eos_ids
        return encoder.decode(tokens[:-1] if ends else tokens, not chat)


def load(
    name: str,
    opponent: Opponent | str | None = None,
    players: int | None = None,
    seat: int | None = None,
    **kwargs: Any,
) -> Callable[[], TextArena]:
    """A factory of games from a name of textarena's.

    Args:
        name: Such as "Nim-v0".
        opponent: A function from what it has seen to its move, or ``"module:function"``; None in games of one player.
        players: Seats; 2 with an opponent, else 1.
        seat: The policy's, from 0; None draws it from the seed.
        **kwargs: For the environment.

    Raises:
        ModuleNotFoundError: textarena is not installed.
        ValueError: It has no such game, or the seat is none.
    """
    library = import_extra("textarena", "textarena", f"game='textarena:{name}'", extra="textarena")
    known = import_extra("textarena.envs.registration", "textarena", name).ENV_REGISTRY
    if name not in known:
        raise ValueError(f"textarena has no game {name!r}. {did_you_mean(name, known)}")
    if isinstance(opponent, str):
        opponent = named_function(opponent)
    if opponent is not None and not callable(opponent):
        raise TypeError(f"opponent must be a function from a text to a text, got {shorten(opponent)}")
    players = players or (1 if opponent is None else 2)
    if seat is not None and not 0 <= seat < players:
        raise ValueError(f"seat must be in [0, {players - 1}], got {seat}")
    raw = f"{name}-raw" if f"{name}-raw" in known else name
    return lambda: TextArena(lambda: library.make(raw, **kwargs), name, opponent, players, seat)
