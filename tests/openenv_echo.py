"""A real OpenEnv server around a small environment: ``python tests/openenv_echo.py PORT``."""

from __future__ import annotations

import sys

import uvicorn
from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app


class Word(Action):
    """What is said."""

    message: str


class Heard(Observation):
    """What is shown."""

    text: str
    length: int = 0


class Echo(Environment):
    """Repeats what it hears, pays its length, and is over after two turns."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self.turns = 0

    def reset(self, seed=None, episode_id=None, word="a", **kwargs):
        self.turns = 0
        return Heard(text=f"{word} {seed}", done=False, reward=None)

    def step(self, action, timeout_s=None, **kwargs):
        if action.message == "fail":
            raise ValueError("no luck")
        self.turns += 1
        length = len(action.message)
        return Heard(text=action.message, length=length, done=self.turns == 2, reward=float(length))

    @property
    def state(self):
        return State(step_count=self.turns)


if __name__ == "__main__":
    app = create_fastapi_app(Echo, Word, Heard, max_concurrent_envs=8)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
