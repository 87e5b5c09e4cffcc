"""One answer written step by step, each step scored: process and outcome rewards as a game that says nothing.

    env = gym.make(
        "TextGame-v0", game="textrl_env.games.steps:Steps", game_kwargs={"process": prm, "outcome": right},
        model=..., rows=problems, stop="\\n", layout="text", max_turns=12,
    )

A step of reasoning is a turn of ``TextGame-v0``: it ends with ``stop``, its reward lands on its last token, and the
answer to it is empty, so the tokens are those of one unbroken answer. ``process`` is asked after every step for what
stands there (a process reward model), ``outcome`` once, at the end. Any reward will do for either. Left out: prompts
that are messages, since a chat template would put headers between the steps; give the text that it makes of them.
"""

from __future__ import annotations

from typing import Any

from reward_models import load_reward
from textrl_env.errors import ArgumentError


class Steps:
    """A :class:`~textrl_env.protocols.Game` that scores the steps of an answer and never interrupts.

    Args:
        process: Scores the answer up to and including a step; a reward, or what
            :func:`reward_models.load_reward` takes. None gives steps nothing.
        outcome: Scores the whole answer, beside its last step's reward; None gives it nothing.
        stop: What ends a step, the environment's ``stop``.
        max_steps: The answer ends with this step at the latest, the environment's ``max_turns``.
    """

    def __init__(
        self, process: Any = None, outcome: Any = None, stop: str = "\n", max_steps: int | None = None
    ) -> None:
        if process is None and outcome is None:
            raise ArgumentError("Steps scores by process=, outcome= or both, and got neither")
        self.process, self.outcome = (
            None if each is None else load_reward(each) for each in (process, outcome)
        )
        self.stop, self.max_steps = stop, max_steps
        self.prompt, self.columns = "", {}
        self.written: list[str] = []

    def reset(self, seed: int | None = None, **row: Any) -> tuple[str, dict[str, Any]]:
        """Begin with the ``prompt`` of a row; its other columns go to the rewards."""
        prompt = row.pop("prompt", None)
        if not isinstance(prompt, str):
            raise ArgumentError(
                f"Steps begins with the column 'prompt' of a row, a text, got {prompt!r}; of messages, give the text "
                "that the chat template makes of them"
            )
        self.prompt, self.columns, self.written = prompt, {k: [v] for k, v in row.items()}, []
        return prompt, {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score a step; one that does not end with ``stop`` was the last."""
        self.written.append(text)
        over = not text.endswith(self.stop) or len(self.written) == self.max_steps
        given = {"process": self._score(self.process), "outcome": self._score(self.outcome) if over else 0.0}
        return "", sum(given.values()), over, False, given

    def _score(self, reward: Any) -> float:
        if reward is None:
            return 0.0
        return float(reward.score([self.prompt], ["".join(self.written)], columns=self.columns).total[0])
