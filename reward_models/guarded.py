"""A reward that may be slow or fail: a deadline, further attempts, and a score for rows that it cannot score.

Guarded(my_reward, timeout=10, retries=2, fallback=0.0)
"reward_models:Guarded('my_module:reward', timeout=10, fallback='drop')"    # on the command line
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tenacity import Retrying, stop_after_attempt, wait_exponential

from reward_models.base import Batch, Reward, RewardResult
from reward_models.contract import load_reward
from reward_models.warning import warn

#: The fallback that leaves a row without a score.
DROP = "drop"


class Guarded(Reward):
    """Another reward, with a deadline, retries and a fallback.

    Where a whole batch fails, it is halved until the rows at fault stand alone, so the others keep their scores. The
    log shows the share of rows that failed, as ``rewards/<name>/failed``. A reward that has not scored a
    single row yet raises its error instead: it is wrong rather than unlucky.

    Args:
        reward: What :func:`reward_models.load_reward` takes.
        timeout: Seconds for one attempt; None waits for ever. Code that is over time cannot be stopped: it goes on
            in its thread, and what it returns is not read.
        retries: Further attempts after an error or a timeout.
        retry_wait: Seconds before the first of them; doubles with each.
        fallback: What becomes of a row that fails every attempt: a number is its score; "drop" gives it none, so that
            nothing is learned from it, and in a weighted sum the other rewards alone count; None raises its error.
            Prompts whose answers fail more often are then learned from less often.

    Attributes:
        scored: Rows so far, those that failed among them.
        failed: Rows so far that got the fallback or were dropped.
    """

    def __init__(
        self,
        reward: Any,
        timeout: float | None = None,
        retries: int = 0,
        retry_wait: float = 1.0,
        fallback: float | str | None = None,
    ) -> None:
        self.reward = load_reward(reward)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be a number of seconds > 0 or None, got {timeout!r}")
        if retries < 0 or not retry_wait >= 0:
            raise ValueError(f"retries and retry_wait must be >= 0, got {retries!r} and {retry_wait!r}")
        if fallback not in (None, DROP) and (isinstance(fallback, str) or not math.isfinite(fallback)):
            raise ValueError(f'fallback must be a finite number, "drop" or None, got {fallback!r}')
        self.timeout, self.retries, self.retry_wait, self.fallback = timeout, retries, retry_wait, fallback
        self.name = self.reward.name
        self.scored, self.failed = 0, 0

    @property
    def names(self) -> tuple[str, ...]:
        return self.reward.names if self.fallback is None else (*self.reward.names, f"{self.name}/failed")

    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        if self.fallback is None or (self.fallback == DROP and not optional):  # a score is asked for
            return self._attempts(batch, optional)
        errors: list[Exception] = []
        result = self._part(batch, optional, errors)
        if errors and self.scored == len(errors) == len(batch):
            raise errors[-1]
        before, self.failed = self.failed, self.failed + len(errors)
        if errors and self.failed.bit_length() > before.bit_length():  # the 1st, 2nd, 4th, 8th, ...
            notes = "; ".join(getattr(errors[-1], "__notes__", ()))
            fate = "have no score" if self.fallback == DROP else f"got the fallback {self.fallback:g}"
            warn(
                f"{self.failed} completions so far {fate} of the reward {self.name!r}, "
                f"which failed: {type(errors[-1]).__name__}: {errors[-1]} ({notes})"
            )
        return result

    @property
    def _failed_score(self) -> float:
        return math.nan if self.fallback == DROP else float(self.fallback)

    def _part(self, batch: Batch, optional: bool, errors: list[Exception]) -> RewardResult:
        """Scores of some rows; where they fail together, of each half by itself."""
        try:
            result = self._attempts(batch, optional)
        except Exception as error:
            if len(batch) == 1:
                self.scored += 1
                errors.append(error)
                parts = dict.fromkeys(self.reward.names, np.full(1, np.nan)) | {self.names[-1]: np.ones(1)}
                return RewardResult(np.full(1, self._failed_score), parts)
            middle = len(batch) // 2
            rows = (slice(middle), slice(middle, None))
            halves = [self._part(batch.rows(half), optional, errors) for half in rows]
            parts = {name: np.concatenate([half.parts[name] for half in halves]) for name in self.names}
            return RewardResult(np.concatenate([half.total for half in halves]), parts)
        self.scored += len(batch)
        return RewardResult(result.total, result.parts | {self.names[-1]: np.zeros(len(batch))})

    def _attempts(self, batch: Batch, optional: bool) -> RewardResult:
        retrying = Retrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_exponential(multiplier=self.retry_wait),
            reraise=True,
        )
        return retrying(self._in_time, lambda: self.reward.evaluate_own(batch, optional), len(batch))

    def _in_time(self, call: Callable[[], RewardResult], count: int) -> RewardResult:
        if self.timeout is None:
            return call()
        outcome: dict[str, Any] = {}

        def work() -> None:
            try:
                outcome["result"] = call()
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=work, daemon=True, name=f"reward {self.name}")
        thread.start()
        thread.join(self.timeout)
        if "error" in outcome:
            raise outcome["error"]
        if "result" not in outcome:
            raise TimeoutError(
                f"the reward {self.name!r} did not score {count} completions within {self.timeout:g} seconds"
            )
        return outcome["result"]

    def use_ids(self, tokenizer: Any) -> bool:
        return self.reward.use_ids(tokenizer)

    def get_state(self) -> dict[str, Any]:
        return {"scored": self.scored, "failed": self.failed, "reward": self.reward.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"scored", "failed", "reward"}:
            raise ValueError(f"the state of a Guarded has failed, reward and scored, got {sorted(state)}")
        self.reward.set_state(state["reward"])
        self.scored, self.failed = int(state["scored"]), int(state["failed"])
