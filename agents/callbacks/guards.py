"""Guards: what goes wrong is reported while it goes wrong, in one line that names what to change.

    GRPO("auto", env).learn(100_000, Guards())

``textrl train`` has them on (``--no-guards`` turns them off). They look at every rollout of a language model and stop
nothing. A line is printed when a guard trips, and again only after it has been quiet; ``guard/<name>`` in the log is 1
as long as it is tripped. What each looks for, and why at these numbers, stands beside its threshold below; they are
arguments, for tasks on which they are wrong. Left out: rewards that the policy games in good language, which take a
second judge to see (``--gold``), and tasks that are no texts.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents.callbacks.kl_control import episode_kl
from agents.evaluation.diversity import distinct_n
from agents.rollouts.rollout import Rollout

#: Rollouts whose mean is where a run began and where it stands; one rollout is too noisy.
_MEAN_OF = 3


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the guards look at in one rollout; NaN where there is no such thing.

    Attributes:
        kl: From the reference, nats in a response.
        length: Tokens of a response.
        entropy: Nats of a token, from the sampled tokens.
        score: Raw reward.
        score_error: Its standard error, over the starts of the rollout.
        clipped_ratio: Share of responses that the budget cut off.
        distinct_2: Distinct pairs of words over all pairs.
        equal_groups: Share of groups whose answers all score alike.
        kl_loss: The KL that the loss of the last update had, nats in a token.
    """

    kl: float = math.nan
    length: float = math.nan
    entropy: float = math.nan
    score: float = math.nan
    score_error: float = math.nan
    clipped_ratio: float = math.nan
    distinct_2: float = math.nan
    equal_groups: float = math.nan
    kl_loss: float = math.nan

    def known(self) -> dict[str, float]:
        """The numbers that are there, for JSON."""
        return {name: value for name, value in dataclasses.asdict(self).items() if not math.isnan(value)}

    @property
    def kl_of_a_token(self) -> float:
        """Nats of KL in a token."""
        return self.kl / self.length if self.length else math.nan


def read_rollout(agent: Any, rollout: Rollout) -> Reading:
    """Measure one rollout, before the agent learns from it."""
    tokens, text = int(rollout.mask.sum()), agent.episodes.text
    values = {"length": tokens / max(int(rollout.done.sum()), 1)}
    values["entropy"] = -float((rollout.log_probs * rollout.mask).sum()) / max(tokens, 1)
    if rollout.ref_log_probs is not None:
        values["kl"] = episode_kl(rollout)[0]
    if text.get("score"):  # everything since the last line of the log; this rollout is at its end
        score, reasons, responses = (text[n][-len(rollout) :] for n in ("score", "stop_reason", "response"))
        values["score"] = float(np.mean(score))
        starts = np.reshape(score, (-1, agent.group_size)).mean(1)
        if len(starts) > 1:
            values["score_error"] = float(starts.std(ddof=1) / math.sqrt(len(starts)))
        values["clipped_ratio"] = float(np.mean([reason == "length" for reason in reasons]))
        # Of answers of a word or two there are hardly any pairs, and their share would mean nothing.
        if sum(len(response.split()) - 1 for response in responses) >= len(responses):
            values["distinct_2"] = distinct_n(responses, 2)
    if agent.group_size > 1 and hasattr(agent, "equal_groups"):
        values["equal_groups"] = float(agent.equal_groups(rollout).float().mean())
    values["kl_loss"] = agent.latest.get("train/kl_loss", math.nan)
    return Reading(**values)


class GuardCallback(BaseCallback):
    """A callback that announces what goes wrong, a line for each.

    Args:
        emit: What is called with each line; None prints it to standard error.
        verbose: As in stable-baselines3.

    Attributes:
        messages: Every line so far, with its timestep.
    """

    def __init__(self, emit: Callable[[str], None] | None = None, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.emit = emit
        self.messages: list[tuple[int, str]] = []

    def _on_step(self) -> bool:
        return True

    def _announce(self, name: str, message: str) -> str:
        """Show the line of a guard that has tripped, and return it."""
        unit = "tokens" if self.model.policy.whole_episodes else "steps"
        line = f"guard {name} at {self.num_timesteps:,} {unit}: {message}"
        self.messages.append((self.num_timesteps, line))
        if self.emit is not None:
            self.emit(line)
        else:
            print(line, file=sys.stderr, flush=True)
        return line


class Guards(GuardCallback):
    """Prints a line when learning a language model goes wrong in one of seven known ways.

    Args:
        max_early_kl: Nats of KL in a response within the first ``early_updates`` rollouts that were learned from. A run
            that goes well has tenths of a nat there; a learning rate a thousand times too large has dozens.
        early_updates: How many those are.
        max_clipped_ratio: Share of responses that the budget may cut off. A cut answer is scored as it stands, so a
            reward that reads the end of an answer sees none.
        min_entropy_share: Share of the entropy at the start that should be left. Below, answers hardly differ, and
            without differences nothing is learned.
        max_equal_groups: Share of groups that may score alike, rollout after rollout; they have no gradient.
        runaway_kl: Nats of KL in a token, in responses that are ``runaway_kl_of_response`` nats or more away, at which
            a score that has risen is no longer believed; no improvement of an answer is so unlikely under the model
            that it started from.
        runaway_kl_of_response: See ``runaway_kl``.
        min_score_fall: Standard errors by which the score of three rollouts has to lie below that of the first.
        max_kl_loss: Nats in a token of a KL that is part of the loss. Its estimator k3 grows with the exponential of
            how much rarer a token has become than the reference has it, so one token can outweigh the reward of all.
        min_distinct_share: Share of the start's distinct-2 below which a score that has risen is not believed either:
            the answers repeat one thing.
        emit: What is called with each line; None prints it to standard error.
        verbose: As in stable-baselines3.

    Attributes:
        messages: Every line so far, with its timestep.
    """

    NAMES = ("early_kl", "cut_off", "entropy", "equal_groups", "score_falls", "kl_loss", "gibberish")

    def __init__(
        self,
        max_early_kl: float = 5.0,
        early_updates: int = 5,
        max_clipped_ratio: float = 0.5,
        min_entropy_share: float = 0.1,
        max_equal_groups: float = 0.9,
        runaway_kl: float = 0.25,
        runaway_kl_of_response: float = 10.0,
        min_distinct_share: float = 0.2,
        min_score_fall: float = 4.0,
        max_kl_loss: float = 3.0,
        emit: Callable[[str], None] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(emit, verbose)
        self.max_early_kl, self.early_updates = max_early_kl, early_updates
        self.max_clipped_ratio, self.min_entropy_share = max_clipped_ratio, min_entropy_share
        self.max_equal_groups = max_equal_groups
        self.runaway_kl, self.runaway_kl_of_response = runaway_kl, runaway_kl_of_response
        self.min_distinct_share = min_distinct_share
        self.min_score_fall, self.max_kl_loss = min_score_fall, max_kl_loss
        self._first: list[Reading] = []
        self._last: deque[Reading] = deque(maxlen=_MEAN_OF)
        self._tripped: set[str] = set()
        self._rollouts = 0

    def get_state(self) -> dict[str, Any]:
        """Where the run began, its last rollouts, and which guards have tripped."""
        return {
            "first": [reading.known() for reading in self._first],
            "last": [reading.known() for reading in self._last],
            "tripped": sorted(self._tripped),
            "rollouts": self._rollouts,
            "kl_loss": self.model.latest.get("train/kl_loss"),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self._first = [Reading(**values) for values in state["first"]]
        self._last = deque((Reading(**values) for values in state["last"]), maxlen=_MEAN_OF)
        self._tripped, self._rollouts = set(state["tripped"]), int(state["rollouts"])
        if state["kl_loss"] is not None:
            self.model.latest["train/kl_loss"] = float(state["kl_loss"])

    def _on_rollout_end(self) -> None:
        if not self.model.policy.whole_episodes:
            return
        reading = read_rollout(self.model, self.locals["rollout"])
        if len(self._first) < _MEAN_OF:
            self._first.append(reading)
        self._last.append(reading)
        self._rollouts += 1
        for name in self.NAMES:
            message = getattr(self, f"_{name}")(reading)
            self.logger.record(f"guard/{name}", float(message is not None))
            if message is not None and name not in self._tripped:
                self._report(name, message)
            (self._tripped.discard if message is None else self._tripped.add)(name)

    def _report(self, name: str, message: str) -> None:
        line = self._announce(name, message)
        self.logger.record(f"guard/{name}_text", line, exclude=("stdout", "log", "csv", "json"))

    # -- the guards: a message, or None ---------------------------------------------------------------------

    def _early_kl(self, reading: Reading) -> str | None:
        updates = self._rollouts - 1
        if (
            not 1 <= updates <= self.early_updates
            or reading.kl <= self.max_early_kl
            or math.isnan(reading.kl)
        ):
            return None
        return (
            f"{reading.kl:.1f} nats of KL in a response after {updates} update{'s' if updates > 1 else ''}: the steps "
            f"are too large. Lower --learning-rate (now {self.model.learning_rate}), or lengthen --warmup-ratio"
        )

    def _cut_off(self, reading: Reading) -> str | None:
        if not reading.clipped_ratio > self.max_clipped_ratio:
            return None
        budget = getattr(self.model.text_env, "max_new_tokens", None)
        return (
            f"{reading.clipped_ratio:.0%} of the answers are cut off by the budget and scored as they stand. Raise "
            f"--max-new-tokens{'' if budget is None else f' (now {budget})'}, or make endings pay with "
            "--missing-eos-penalty"
        )

    def _entropy(self, reading: Reading) -> str | None:
        start = _mean(self._first, "entropy")
        if len(self._last) < _MEAN_OF or not start > 0:
            return None
        now = _mean(self._last, "entropy")
        if not now < self.min_entropy_share * start:
            return None
        return (
            f"the entropy of a token is {now:.3f} nats, {now / start:.0%} of what it was: answers hardly differ, and "
            "without differences nothing is learned. Raise --kl-coef or --ent-coef, or lower --learning-rate"
        )

    def _equal_groups(self, reading: Reading) -> str | None:
        shares = [past.equal_groups for past in self._last]
        if len(shares) < _MEAN_OF or not min(shares) > self.max_equal_groups:
            return None
        return (
            f"in {reading.equal_groups:.0%} of the groups all answers score alike, so they teach nothing. Choose "
            "prompts that are neither too easy nor too hard, grade the --reward, raise --group-size (now "
            f"{self.model.group_size}) or --temperature, or use --agent dapo, which samples anew"
        )

    def _score_falls(self, reading: Reading) -> str | None:
        start, now = self._first[0], _mean(self._last, "score")
        if self._rollouts <= _MEAN_OF:
            return None
        error = math.hypot(start.score_error, _mean(self._last, "score_error") / math.sqrt(len(self._last)))
        if not start.score - now > self.min_score_fall * error:
            return None
        return (
            f"the score has fallen from {start.score:.3g} to {now:.3g} since the run began: the steps are too "
            "large, or the KL pulls harder than the reward. Lower --learning-rate (now "
            f"{self.model.learning_rate}), --n-epochs (now {self.model.n_epochs}) or --kl-coef (now "
            f"{self.model.kl_coef:g})"
        )

    def _kl_loss(self, reading: Reading) -> str | None:
        if not reading.kl_loss > self.max_kl_loss:
            return None
        return (
            f"the KL in the loss was {reading.kl_loss:.1f} nats a token in the last update: a few tokens that the "
            "reference finds likely have become rare, and outweigh the reward. Charge the KL in the reward (--kl-in "
            f"reward), or lower --learning-rate (now {self.model.learning_rate}) or --n-epochs (now "
            f"{self.model.n_epochs})"
        )

    def _gibberish(self, reading: Reading) -> str | None:
        if self._rollouts <= _MEAN_OF or not self._score_has_risen():
            return None
        kl, length = _mean(self._last, "kl"), _mean(self._last, "length")
        distinct, before = _mean(self._last, "distinct_2"), _mean(self._first, "distinct_2")
        why = None
        if kl >= self.runaway_kl_of_response and kl / length > self.runaway_kl:
            why = f"the answers are {kl:.1f} nats from the reference ({kl / length:.2f} a token)"
        elif distinct < self.min_distinct_share * before:
            why = f"distinct-2 of the answers has fallen from {before:.2f} to {distinct:.2f}"
        if why is None:
            return None
        first, last = _mean(self._first, "score"), _mean(self._last, "score")
        return (
            f"the score rose from {first:.3g} to {last:.3g}, but {why}: the reward may like gibberish. Read "
            f"samples/table; raise --kl-coef (now {self.model.kl_coef:g}), lower --learning-rate, or mend the --reward"
        )

    def _score_has_risen(self) -> bool:
        return _mean(self._last, "score") > _mean(self._first, "score")


def _mean(readings: Sequence[Reading] | deque[Reading], name: str) -> float:
    values = [getattr(reading, name) for reading in readings]
    return float(np.mean(values)) if values else math.nan
