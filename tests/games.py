"""Small games for the tests, in the words of :mod:`tests.tiny`."""

from __future__ import annotations

import functools
import zlib

import numpy as np

from tests.tiny import WORDS


class Copycat:
    """Shows some words; the reward is how many of the first one come back; over after ``rounds`` turns."""

    def __init__(self, rounds: int = 2) -> None:
        self.rounds = rounds

    def reset(self, seed=None, **row):
        rng = np.random.default_rng(seed)
        self.word = row.get("word") or WORDS[rng.integers(3, len(WORDS))]
        self.round = 0
        return f"{self.word} {self.word}", {}

    def step(self, text):
        self.round += 1
        reward = float(text.split().count(self.word))
        return self.word, reward, self.round >= self.rounds, False, {}


class Wild:
    """Answers of any length, rewards of any size, an end or a time limit at any turn; all of it drawn from the seed
    and from what was said."""

    def __init__(self, ends: float = 0.2, limits: float = 0.1, longest: int = 4) -> None:
        self.ends, self.limits, self.longest = ends, limits, longest

    def reset(self, seed=None, **row):
        self.seed, self.turn = seed, 0
        rng = np.random.default_rng([seed, 7])
        return " ".join(rng.choice(WORDS[3:], size=1 + rng.integers(4))), {}

    def step(self, text):
        rng = np.random.default_rng([self.seed, self.turn, zlib.crc32(text.encode())])
        self.turn += 1
        answer = " ".join(rng.choice(WORDS[3:], size=rng.integers(self.longest + 1)))
        draw = rng.random()
        return answer, float(rng.normal()), draw < self.ends, self.ends <= draw < self.ends + self.limits, {}


#: The words of a world that is small enough to enumerate.
FEW_WORDS = ["<eos>", "<unk>", "a", "b"]


@functools.cache
def table_outcomes(said: tuple[str, ...]) -> list[tuple[float, str, float, bool]]:
    """What may be answered to a conversation, from a table of random numbers: probability, text, reward, end."""
    rng = np.random.default_rng(zlib.crc32(repr(said).encode()))
    first = 0.2 + 0.6 * rng.random()
    over = bool(rng.random() < 0.2)
    rewards = rng.normal(size=2)
    return [(first, "a", rewards[0], over), (1 - first, "b b", rewards[1], False)]


class Table:
    """Answers by :func:`table_outcomes`, drawn from the seed."""

    def reset(self, seed=None, **row):
        self.seed, self.said = seed, ()
        return "b a", {}

    def step(self, text):
        self.said = (*self.said, text)
        drawn = np.random.default_rng([self.seed, len(self.said)]).random()
        outcomes = table_outcomes(self.said)
        _, answer, reward, over = outcomes[0] if drawn < outcomes[0][0] else outcomes[1]
        return answer, reward, over, False, {}
