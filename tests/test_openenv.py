"""Games behind an OpenEnv server: the messages of its WebSocket, and a real server where the package is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from textrl_env.games.loading import load_game

websockets = pytest.importorskip("websockets.sync.server")


class Server:
    """Speaks OpenEnv's messages on loopback: each session repeats what it hears, twice."""

    def __init__(self):
        self.seen, self.sessions = [], 0
        self.server = websockets.serve(self._talk, "127.0.0.1", 0)
        self.port = self.server.socket.getsockname()[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _talk(self, connection):
        self.sessions += 1
        turns = 0
        for raw in connection:
            message = json.loads(raw)
            self.seen.append(message)
            kind, data = message["type"], message.get("data", {})
            if kind == "close":
                return
            if kind == "reset":
                turns, reply = (
                    0,
                    self._observation(f"{data.get('word', 'a')} {data.get('seed')}", None, False),
                )
            elif data.get("message") == "fail":
                reply = {"type": "error", "data": {"message": "no luck", "code": "EXECUTION_ERROR"}}
            elif "message" not in data:
                problems = [{"loc": ["message"], "msg": "Field required"}]
                reply = {"message": "Invalid message", "code": "VALIDATION_ERROR", "errors": problems}
                reply = {"type": "error", "data": reply}
            elif data["message"] == "hang":
                continue
            else:
                turns += 1
                reply = self._observation(data["message"], float(len(data["message"])), turns == 2)
            connection.send(json.dumps(reply))

    @staticmethod
    def _observation(text, reward, done):
        observation = {"text": text, "length": len(text)}
        return {"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()


@pytest.fixture(scope="module")
def real_port():
    """The port of a real OpenEnv server; ``OPENENV_PYTHON`` is a Python that has the package, if this one does not."""
    python = os.environ.get("OPENENV_PYTHON")
    if python is None and importlib.util.find_spec("openenv") is None:
        pytest.skip("openenv-core is not installed; OPENENV_PYTHON may name a Python that has it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("openenv_echo.py"))
    process = subprocess.Popen([python or sys.executable, script, str(port)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield port
    process.terminate()
    process.wait(30)


def play(port):
    """What every server here does, through the client."""
    game = load_game(f"openenv:http://127.0.0.1:{port}")()
    assert game.reset(seed=3, word="b") == ("b 3", {})
    assert game.step("abc") == ("abc", 3.0, False, False, {})
    assert game.step("ab")[:3] == ("ab", 2.0, True)
    assert game.reset(seed=4)[0] == "a 4"
    with pytest.raises(RuntimeError, match=r"no luck \(EXECUTION_ERROR\)"):
        game.step("fail")
    assert game.step("a")[1] == 1.0  # the session goes on
    wrong = load_game(f"openenv:127.0.0.1:{port}", {"action": "code"})()
    wrong.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"VALIDATION_ERROR\): message: Field required"):
        wrong.step("x")
    wrong.close()
    game.close()


def test_a_real_openenv_server_is_played(real_port):
    play(real_port)


def test_the_messages_of_openenv_are_spoken(server):
    play(server.port)
    assert server.seen[0] == {"type": "reset", "data": {"word": "b", "seed": 3}}
    assert server.seen[1] == {"type": "step", "data": {"message": "abc"}}
    assert server.seen[-1] == {"type": "close"}


def test_every_slot_has_a_session_of_its_own(server):
    from tests.test_text_game import bound, make_game

    envs = bound(make_game(2, f"openenv:127.0.0.1:{server.port}", num_seeds=1, layout="text"))
    _, infos = envs.reset(seed=0)
    assert list(infos["prompt"]) == ["a 0", "a 0"] and server.sessions == 2


def test_fields_and_functions_say_what_is_sent_and_shown(server):
    address = f"openenv:ws://127.0.0.1:{server.port}/ws"
    game = load_game(address, {"observation": "length"})()
    assert game.reset(seed=3)[0] == "3"
    functions = {
        "action": lambda text: {"message": text.upper()},
        "observation": lambda seen: f"<{seen['text']}>",
    }
    game = load_game(address, functions)()
    assert game.reset(seed=3)[0] == "<a 3>" and game.step("x")[0] == "<X>"
    with pytest.raises(KeyError, match=r"has no field 'texts'\. Did you mean 'text'"):
        load_game(address, {"observation": "texts"})().reset(seed=0)


def test_a_server_that_is_not_there_or_does_not_answer_is_named(server):
    with pytest.raises(ConnectionError, match=r"no OpenEnv server answers at ws://127\.0\.0\.1:1/ws"):
        load_game("openenv:127.0.0.1:1")().reset(seed=0)
    game = load_game(f"openenv:127.0.0.1:{server.port}", {"timeout": 0.2})()
    game.reset(seed=0)
    with pytest.raises(ConnectionError, match="has not answered"):
        game.step("hang")
    assert game.reset(seed=1)[0] == "a 1"  # with a session of its own
