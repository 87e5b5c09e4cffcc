"""The embedded world as a game: a question, and a second chance where the answer was not good enough."""

from __future__ import annotations

import json
from typing import Any

from textrl_env import embedded


class SecondChance:
    """Asks a question of the embedded world, and asks it again after a poor answer.

    The reward of a turn is by how much the gold rubric likes its answer better than the best one before.

    Args:
        chances: Answers that may be given.
        enough: Gold score that ends the game.
    """

    def __init__(self, chances: int = 2, enough: float = 0.8) -> None:
        self.chances, self.enough = chances, enough
        lines = embedded.path("prompts_train").read_text(encoding="utf-8").splitlines()
        self.questions = [json.loads(line)["prompt"] for line in lines]

    def reset(self, seed: int | None = None, **row: Any) -> tuple[str, dict[str, Any]]:
        """Choose the question by the seed."""
        self.question = self.questions[(seed or 0) % len(self.questions)]
        self.best, self.left = 0.0, self.chances
        return self.question, {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the answer, and ask again if it was poor."""
        score = embedded.gold_score([self.question], [text])[0]
        reward, self.best = max(score - self.best, 0.0), max(score, self.best)
        self.left -= 1
        over = score >= self.enough or self.left == 0
        return "" if over else self.question, reward, over, False, {}
