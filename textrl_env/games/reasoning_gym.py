"""The tasks and verifiers of the package reasoning-gym as games: ``game="reasoning_gym:chain_sum"``.

A seed is a question. With one attempt it is a game of one turn; with more, a wrong answer may be given again. The
reward is the task's own score, from 0 to 1.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Callable
from typing import Any

from reward_models.names import shorten
from reward_models.warning import warn
from textrl_env.errors import check_range, did_you_mean
from textrl_env.games.extras import import_extra

#: What stands in the tags of reasoning-gym's own prompts.
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
#: How a verifier runs what a model wrote as Python, in place of reading it.
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\((?:answer|str\(answer)")


class Task:
    """A task of reasoning-gym, shared by all the slots that play it: some take seconds to make.

    Args:
        name: Such as "chain_sum".
        config: Of the task.

    Attributes:
        unscored: Answers so far on which the task's own verifier failed.

    Raises:
        ModuleNotFoundError: reasoning-gym is not installed.
        ValueError: There is no such task, or it does not take that config.
    """

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.library = import_extra("reasoning_gym", "reasoning-gym", f"game='reasoning_gym:{name}'")
        known = import_extra("reasoning_gym.factory", "reasoning-gym", name).DATASETS
        if name not in known:
            raise ValueError(f"reasoning-gym has no task {name!r}. {did_you_mean(name, known)}")
        for taken in ("seed", "size"):
            if taken in config:
                raise ValueError(f"{taken!r} is no config of a task here: every start has a seed of its own")
        self.name, self.config, self.unscored = name, config, 0
        self._sets: dict[str, Any] = {}
        self._lock = threading.RLock()  # games may be called in threads
        data, _ = self.question(0, {})
        if self._evaluates(data):
            warn(
                f"reasoning-gym's verifier of {name} evaluates answers as Python, so what the model writes is run as "
                "code in this process; train on it only where that can do no harm, such as in a container"
            )

    @staticmethod
    def _evaluates(data: Any) -> bool:
        """Whether the task's verifier runs answers as code."""
        try:
            source = inspect.getsource(type(data).score_answer)
        except (OSError, TypeError):  # no source at hand, so nothing can be told
            return False
        return _EVALUATES.search(source) is not None

    def question(self, seed: int, row: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The data set for the config of a row, and its question with a number."""
        with self._lock:
            key = json.dumps(row, sort_keys=True, default=repr)
            if key not in self._sets:
                self._sets[key] = self._made(row, 0)
            try:
                # An item is drawn from the data set's seed and its number, whatever the size.
                return self._sets[key], self._sets[key][seed]
            except IndexError:  # except in those that draw all items when they are made
                own = self._made(row, seed)
                return own, own[0]

    def score(self, data: Any, entry: dict[str, Any], answer: str) -> float:
        """What the task's verifier gives an answer, from 0 to 1; 0 where it fails, which is counted and warned of."""
        with self._lock:
            try:
                return float(data.score_answer(answer=answer, entry=entry))
            except Exception as error:
                before, self.unscored = self.unscored, self.unscored + 1
                if self.unscored.bit_length() > before.bit_length():  # the 1st, 2nd, 4th, 8th, ...
                    warn(
                        f"{self.unscored} answers so far count as wrong, since the verifier of reasoning-gym's "
                        f"{self.name} failed on them, last on {shorten(answer)}: {type(error).__name__}: {error}"
                    )
                return 0.0

    def _made(self, row: dict[str, Any], seed: int) -> Any:
        config = self.config | row
        try:
            return self.library.create_dataset(self.name, **config, seed=seed, size=1)
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"reasoning-gym's {self.name} does not take the config {config}: {error}"
            ) from error


class ReasoningGym:
    """Questions of a task, one for each seed.

    Args:
        task: The task.
        attempts: Answers that may be given. The reward of a turn is by how much its answer is better than the best
            before.
        enough: Score that ends the game.
        instruction: Put below the question.
        retry: What a wrong answer is told.
    """

    def __init__(
        self,
        task: Task,
        attempts: int = 1,
        enough: float = 1.0,
        instruction: str = "",
        retry: str = "That is not right. Try again.",
    ) -> None:
        check_range(1, attempts=attempts)
        self.task, self.attempts, self.enough = task, attempts, enough
        self.instruction, self.retry = instruction, retry

    def reset(self, seed: int | None = None, **row: Any) -> tuple[str, dict[str, Any]]:
        """The question with the number ``seed``; a row holds more of the task's config."""
        self.data, self.entry = self.task.question(seed or 0, row)
        self.left, self.best = self.attempts, 0.0
        question = self.entry["question"]
        return f"{question}\n{self.instruction}" if self.instruction else question, {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score an answer: what stands in the last ``<answer>`` tags, or the whole text where there are none."""
        tagged = _ANSWER.findall(text)
        score = self.task.score(self.data, self.entry, (tagged[-1] if tagged else str(text)).strip())
        gain, self.best = max(score - self.best, 0.0), max(score, self.best)
        self.left -= 1
        over = score >= self.enough or self.left == 0
        return "" if over else self.retry, gain, over, False, {}


def load(
    name: str,
    attempts: int = 1,
    enough: float = 1.0,
    instruction: str = "",
    retry: str = "That is not right. Try again.",
    **config: Any,
) -> Callable[[], ReasoningGym]:
    """A factory of games from the name of a task; see :class:`ReasoningGym`.

    Args:
        name: Such as "chain_sum".
        attempts: Answers that may be given.
        enough: Score that ends the game.
        instruction: Put below the question.
        retry: What a wrong answer is told.
        **config: Of the task, such as ``min_terms=2``.
    """
    task = Task(name, config)
    return lambda: ReasoningGym(task, attempts, enough, instruction, retry)
