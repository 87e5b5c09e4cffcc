"""Environments behind an OpenEnv server: ``game="openenv:http://localhost:8000"``.

A thin client of the server's WebSocket (``/ws``), one session for each slot. It sends JSON and gets JSON:

    {"type": "reset", "data": {"seed": 3}}      -> {"type": "observation", "data": {"observation", "reward", "done"}}
    {"type": "step", "data": {"message": "hi"}} -> the same
    anything that fails                         -> {"type": "error", "data": {"message", "code"}}

A turn becomes an action by ``action``, an observation becomes text by ``observation``: names of fields, or functions.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from reward_models.names import shorten
from textrl_env.errors import did_you_mean
from textrl_env.games.extras import import_extra, named_function


class OpenEnvGame:
    """An environment of an OpenEnv server as a game.

    Args:
        url: Of the server; ``http``, ``https``, ``ws`` and ``wss`` will do.
        action: The action's field that the turn's text goes into, or a function from the text to the action, a dict.
        observation: The observation's field that is shown, or a function from the observation, a dict, to a text or
            messages. None shows the only text that it has.
        timeout: Seconds to wait for the connection and for each answer.
    """

    def __init__(
        self,
        url: str,
        action: str | Callable[[str], Mapping[str, Any]] = "message",
        observation: str | Callable[[dict[str, Any]], Any] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.url, self.action, self.observation, self.timeout = url, action, observation, timeout
        self._client = import_extra(
            "websockets.sync.client", "websockets", f"game='openenv:{url}'", "openenv"
        )
        self._socket: Any = None
        self._open = contextlib.ExitStack()  # holds the connection

    def __deepcopy__(self, memo: dict) -> OpenEnvGame:
        return OpenEnvGame(self.url, self.action, self.observation, self.timeout)

    def reset(self, seed: int | None = None, **row: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; the server takes of the seed and the row what its environment has parameters for."""
        answer = self._ask({"type": "reset", "data": row | ({} if seed is None else {"seed": seed})})
        return self._shown(answer), {}

    def step(self, text: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action; a reward that is None is 0."""
        data = {self.action: str(text)} if isinstance(self.action, str) else dict(self.action(text))
        answer = self._ask({"type": "step", "data": data})
        reward = answer.get("reward")
        return (
            self._shown(answer),
            0.0 if reward is None else float(reward),
            bool(answer.get("done")),
            False,
            {},
        )

    def close(self) -> None:
        """Give the session back."""
        if self._socket is not None:
            with contextlib.suppress(Exception):  # the server may have gone first
                self._socket.send(json.dumps({"type": "close"}))
        self._drop()

    def _drop(self) -> None:
        self._socket = None
        with contextlib.suppress(Exception):
            self._open.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message; the data of the answer."""
        if self._socket is None:
            self._socket = self._connect()
        try:
            self._socket.send(json.dumps(message))
            answer = json.loads(self._socket.recv(timeout=self.timeout))
        except Exception as error:
            self._drop()  # a late answer would be taken for that to the next message
            raise ConnectionError(
                f"the OpenEnv server {self.url} has not answered {shorten(message)}: {type(error).__name__}: {error}"
            ) from error
        data = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(data, dict):
            raise TypeError(
                f"the OpenEnv server {self.url} must answer with type and data, got {shorten(answer)}"
            )
        if answer.get("type") == "error":
            details = "; ".join(_problem(each) for each in data.get("errors", ()))
            raise RuntimeError(
                f"the OpenEnv server {self.url} answered {shorten(message)} with an error: {data.get('message')} "
                f"({data.get('code')}){f': {details}' if details else ''}"
            )
        return data

    def _connect(self) -> Any:
        address = _address(self.url)
        try:
            # A proxy is for the world outside, and a model's observations may be large.
            connection = self._client.connect(
                address, open_timeout=self.timeout, close_timeout=1, max_size=2**27, proxy=None
            )
            return self._open.enter_context(connection)
        except Exception as error:
            raise ConnectionError(
                f"no OpenEnv server answers at {address}: {type(error).__name__}: {error}"
            ) from error

    def _shown(self, answer: dict[str, Any]) -> Any:
        observation = answer.get("observation")
        if not isinstance(observation, dict):
            raise TypeError(f"the OpenEnv server {self.url} must send an observation, got {shorten(answer)}")
        if callable(self.observation):
            return self.observation(observation)
        if self.observation is not None:
            if self.observation not in observation:
                raise KeyError(
                    f"the observation of {self.url} has no field {self.observation!r}. "
                    f"{did_you_mean(self.observation, observation)}"
                )
            shown = observation[self.observation]
            return shown if shown is None or isinstance(shown, str | list) else json.dumps(shown)
        texts = [name for name, value in observation.items() if isinstance(value, str)]
        if len(texts) != 1:
            raise ValueError(
                f"the observation of {self.url} has {len(texts)} texts among its fields {sorted(observation)}; say "
                "which is shown: observation='field', or a function"
            )
        return observation[texts[0]]


def load(
    url: str,
    action: str | Callable[[str], Mapping[str, Any]] = "message",
    observation: str | Callable[[dict[str, Any]], Any] | None = None,
    timeout: float = 60.0,
) -> Callable[[], OpenEnvGame]:
    """A factory of games from the address of a server; see :class:`OpenEnvGame`.

    Args:
        url: Of the server.
        action: A field, a function, or ``"module:function"``.
        observation: A field, a function, or ``"module:function"``.
        timeout: Seconds to wait for each answer.
    """
    action, observation = _named(action), _named(observation)
    return lambda: OpenEnvGame(url, action, observation, timeout)


def _named(given: Any) -> Any:
    """A function by its name; all else as it is."""
    return named_function(given) if isinstance(given, str) and ":" in given else given


def _address(url: str) -> str:
    """Where the WebSocket of a server is."""
    plain = url.rstrip("/")
    if re.match(r"wss?://|https?://", plain) is None:
        plain = f"ws://{plain}"
    plain = re.sub(r"^http", "ws", plain)
    return plain if plain.endswith("/ws") else f"{plain}/ws"


def _problem(error: Any) -> str:
    """One of the errors of pydantic, in short."""
    if not isinstance(error, Mapping):
        return shorten(error)
    return f"{'.'.join(map(str, error.get('loc', ())))}: {error.get('msg')}"
