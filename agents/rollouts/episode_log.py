"""What finished episodes looked like: returns, lengths, scores and texts, kept for the log."""

from __future__ import annotations

import html
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from agents.evaluation.diversity import distinct_n
from agents.rollouts.rollout import Rollout
from reward_models.notes import EXTRA, METRIC
from reward_models.warning import warn
from textrl_env.printable import markdown_cell

#: Rows of the table of samples.
_TABLE_ROWS = 8
#: What the names of our own figures begin with; a reward's metric of such a name gets another.
_OURS = (
    *("objective/", "rewards/", "completions/", "samples/", "rollout/", "group/", "exact/", "eval/"),
    *("train/", "val/", "guard/", "sampling/", "distillation/", "time/", "memory/", "histogram/"),
)
#: Mean distance in nats from which a generator's log-probabilities are another model's and not rounding.
_GENERATOR_GAP = 0.05


class EpisodeLog:
    """Collects episodes between two lines of the log.

    Args:
        window: Episodes that ``rollout/ep_rew_mean`` averages over (at least all since the last line).
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.returns: deque[float] = deque(maxlen=window)
        self.lengths: deque[int] = deque(maxlen=window)
        self.successes: deque[bool] = deque(maxlen=window)
        #: What stable-baselines3's callbacks read: return ``r``, length ``l`` and seconds since the start ``t``.
        self.infos: deque[dict[str, float]] = deque(maxlen=window)
        self._started = time.time()
        self.text: dict[str, list[Any]] = {}
        self.score_seconds = 0.0
        self._sampling: dict[str, tuple[list[float], Callable]] = {}
        self._warned_of_generator = False
        self._taken_names: set[str] = set()
        self._running_return = np.zeros(1)
        self._running_length = np.zeros(1, dtype=np.int64)

    def begin(self, num_envs: int) -> None:
        """Start counting anew in ``num_envs`` slots."""
        self._running_return = np.zeros(num_envs)
        self._running_length = np.zeros(num_envs, dtype=np.int64)

    def forget(self) -> None:
        """Forget the episodes of an earlier call of ``learn``."""
        for kept in (self.returns, self.lengths, self.successes, self.infos):
            kept.clear()

    def get_state(self) -> dict[str, list]:
        """What a resumed run needs, JSON-able."""
        return {
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "successes": list(self.successes),
            "running_return": self._running_return.tolist(),
            "running_length": self._running_length.tolist(),
        }

    def set_state(self, state: dict[str, list]) -> None:
        """Go on from what :meth:`get_state` returned."""
        for name in ("returns", "lengths", "successes"):
            setattr(self, name, deque(state[name], maxlen=max(self.window, len(state[name]))))
        self._running_return = np.array(state["running_return"], dtype=np.float64)
        self._running_length = np.array(state["running_length"], dtype=np.int64)

    def step(
        self, rewards: np.ndarray, alive: np.ndarray, done: np.ndarray, ends: dict[str, Any], scored: bool
    ) -> None:
        """Note one step of every slot.

        Args:
            rewards: ``[N]``.
            alive: bool ``[N]``, slots whose step counts.
            done: bool ``[N]``.
            ends: The info of episodes that ended in this step, ``[N]`` arrays.
            scored: Whether ``ends`` come from an environment that scores responses, as ``TextRLHF-v0`` does.
        """
        self._running_return += rewards * alive
        self._running_length += alive
        if not done.any():
            return
        monitored = _monitored(ends)
        for slot in np.flatnonzero(done & alive):
            if monitored is None:
                self.add(self._running_return[slot], self._running_length[slot])
            else:
                self.add(*(column[slot] for column in monitored))
            if "is_success" in ends and np.all(ends.get("_is_success", [True] * (slot + 1))[slot]):
                self.successes.append(bool(ends["is_success"][slot]))
            if scored and "score" in ends:
                self._add_text_end(ends, slot)
        self._running_return[done] = 0.0
        self._running_length[done] = 0

    def add(self, episode_return: float, length: int) -> None:
        """Note one finished episode."""
        self.returns.append(float(episode_return))
        self.lengths.append(int(length))
        seconds = round(time.time() - self._started, 6)
        self.infos.append({"r": float(episode_return), "l": int(length), "t": seconds})

    def _add_text_end(self, ends: dict[str, Any], slot: int) -> None:
        for name in ("score", "stop_reason", "response", "response_length", "kl_sum", "turns"):
            if name in ends:
                self.text.setdefault(name, []).append(ends[name][slot])
        told = "scored" in ends and np.all(ends.get("_scored", [True] * (slot + 1))[slot])
        self.text.setdefault("scored", []).append(bool(ends["scored"][slot]) if told else True)
        for name in ends:
            if name.startswith(("score/", METRIC)):
                self.text.setdefault(name, []).append(float(ends[name][slot]))
            elif name.startswith(EXTRA):
                self.text.setdefault(name, []).append(ends[name][slot])

    def add_text(self, episodes: Any) -> None:
        """Note whole :class:`~textrl_env.envs.writing.Episodes`."""
        if len(episodes) > self.returns.maxlen:
            self.returns = deque(self.returns, maxlen=len(episodes))
            self.lengths = deque(self.lengths, maxlen=len(episodes))
        lengths = episodes.mask.sum(1)
        for total, length in zip(episodes.rewards.sum(1), lengths, strict=True):
            self.add(total, length)
        columns = {
            "score": episodes.score,
            "scored": np.ones(len(episodes), dtype=bool) if episodes.scored is None else episodes.scored,
            "stop_reason": episodes.stop_reason,
            "prompt": episodes.prompts,
            "response": episodes.responses,
            "response_length": lengths,
            "kl_sum": episodes.kl.sum(1),
            "token_ids": list(episodes.tokens),
            **({"turns": episodes.turns} if hasattr(episodes, "turns") else {}),
        } | {f"score/{name}": part for name, part in episodes.parts.items()}
        for name, values in (columns | episodes.logged).items():
            self.text.setdefault(name, []).extend(values)
        if getattr(episodes, "success", None) is not None:
            self.successes.extend(episodes.success.tolist())
        self.score_seconds += episodes.score_seconds

    def note_generator(
        self, found: dict[str, tuple[float, Callable]], remedy: str, sampling: Mapping[str, Any] | None = None
    ) -> None:
        """Note how far the log-probabilities that a generator reported are from the policy's.

        Warns once where that is more than rounding.

        Args:
            found: What :func:`~agents.algorithms.importance.describe_sampling` returned.
            remedy: What is done about it.
            sampling: What the user changed about sampling, which alone makes a difference.
        """
        for name, (value, together) in found.items():
            self._sampling.setdefault(name, ([], together))[0].append(value)
        gap = found["sampling/sampling_logp_difference/mean"][0]
        if not gap <= _GENERATOR_GAP and not self._warned_of_generator:
            self._warned_of_generator = True
            cause = "Has it the policy's present weights and temperature?"
            if sampling:
                asked = ", ".join(f"{name}={value}" for name, value in sampling.items())
                cause = (
                    f"Sampling by {asked} is from another distribution than the policy's; is that all of it?"
                )
            warn(
                f"the generator reports log-probabilities that are {gap:.3g} nats from the policy's on average; the "
                f"policy's own are used, {remedy}. {cause}"
            )

    def log(self, record: Callable[..., None], rollout: Rollout | None, is_text: bool) -> None:
        """Record everything under its name and forget the texts."""
        if self.returns:
            record("rollout/ep_rew_mean", float(np.mean(self.returns)))
            record("rollout/ep_len_mean", float(np.mean(self.lengths)))
        if self.successes:
            record("rollout/success_rate", float(np.mean(self.successes)))
        if "score" in self.text:
            self._log_scores(record)
        if rollout is not None and rollout.ref_log_probs is not None:
            _log_objective(record, rollout)
        if is_text and self.text.get("response"):
            self._log_completions(record)
            record("time/score_seconds", self.score_seconds)
        for name, (values, together) in self._sampling.items():
            record(name, together(values))
        self.text, self._sampling = {}, {}
        self.score_seconds = 0.0

    def _log_scores(self, record: Callable[..., None]) -> None:
        # Rows to which no reward applied are not of value 0: they have none.
        scores = np.where(self.text["scored"], self.text["score"], np.nan)
        record("objective/scores", _mean_of_numbers(scores))
        if not all(self.text["scored"]):
            record("objective/unscored", float(np.mean(np.logical_not(self.text["scored"]))))
        for name, values in self.text.items():
            if name == "score/gold":
                record("objective/gold_scores", _mean_of_numbers(values))
            elif name.startswith("score/"):
                # NaN where one of several rewards did not apply.
                record(f"rewards/{name.removeprefix('score/')}", _mean_of_numbers(values))
            elif name.startswith(METRIC):
                record(self._shown_as(name), _mean_of_numbers(values))

    def _shown_as(self, metric: str) -> str:
        """A metric of a reward goes by its own name, unless that might be a figure of ours."""
        own = metric.removeprefix(METRIC)
        if not own.startswith(_OURS):
            return own
        if own not in self._taken_names:
            self._taken_names.add(own)
            warn(
                f"figures of training are called like {own!r}, which the reward logs; it is logged as {metric!r}"
            )
        return metric

    def _log_completions(self, record: Callable[..., None]) -> None:
        lengths = np.array(self.text["response_length"])
        record("completions/mean_length", float(lengths.mean()))
        record("completions/min_length", int(lengths.min()))
        record("completions/max_length", int(lengths.max()))
        cut = [reason == "length" for reason in self.text["stop_reason"]]
        record("completions/clipped_ratio", float(np.mean(cut)))
        if "turns" in self.text:
            record("completions/mean_turns", float(np.mean(self.text["turns"])))
            full = [reason == "context" for reason in self.text["stop_reason"]]
            record("completions/context_full_ratio", float(np.mean(full)))
        record("completions/distinct_2", distinct_n(self.text["response"], 2))
        record("samples/table", self.table(), exclude=("stdout", "log", "csv", "json"))

    def table(self) -> str:
        """A Markdown table of some prompts, responses, scores and KLs."""
        names = [n for n in ("prompt", "response", "score", "score/gold", "kl_sum") if n in self.text]
        rows = [names, ["---"] * len(names)]
        for i in range(min(_TABLE_ROWS, len(self.text["response"]))):
            cells = [self.text[name][i] for name in names]
            rows.append(
                [f"{c:.2f}" if isinstance(c, (float, np.floating)) else markdown_cell(str(c)) for c in cells]
            )
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _monitored(ends: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns and lengths ``[N]`` as a Monitor or RecordEpisodeStatistics inside has counted them, if there is one."""
    episode = ends.get("episode")
    if not (isinstance(episode, dict) and "r" in episode and "l" in episode):
        return None
    return np.asarray(episode["r"], dtype=np.float64), np.asarray(episode["l"])


def _mean_of_numbers(values: list[float]) -> float:
    """Mean without the NaNs; NaN if there is nothing else."""
    numbers = [value for value in values if not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else float("nan")


def read_table(table: str) -> list[dict[str, str]]:
    """The rows of what :meth:`EpisodeLog.table` wrote, cells by the names in its first row."""
    # Bars inside cells are entities; before version 0.2 they came after a backslash.
    names, _, *rows = [line[2:-2].split(" | ") for line in table.split("\n")]
    return [
        dict(zip(names, (html.unescape(cell.replace("\\|", "|")) for cell in row), strict=True))
        for row in rows
    ]


def _log_objective(record: Callable[..., None], rollout: Rollout) -> None:
    """Sums over an episode, averaged over the episodes of the rollout; real steps only."""
    mask, episodes = rollout.mask, max(int(rollout.done.sum()), 1)

    def mean(per_step: Tensor) -> float:
        return float((per_step * mask).sum()) / episodes

    record("objective/kl", mean(rollout.log_probs - rollout.ref_log_probs))
    record("objective/entropy", -mean(rollout.log_probs))
    record("objective/non_score_reward", -mean(rollout.penalties))
    record("objective/rlhf_reward", mean(rollout.rewards))
