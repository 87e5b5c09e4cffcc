"""What is shown of a log: which columns, what people call them, and how their numbers are written."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from agents.evaluation.plots import smoothed
from agents.report.reading import Run

BLUE, GOLD, RED, TEAL, PURPLE, GREEN, GREY = (
    "#1f6fb4",
    "#b8860b",
    "#b03a48",
    "#2a8c82",
    "#77549c",
    "#5d8a3a",
    "#66707a",
)


#: A log of fewer rows has no running mean, and no trend can be read from it.
FEW_ROWS = 10


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of the log as people see it.

    Attributes:
        column: Its name in ``progress.csv``.
        label: What people call it.
        note: What it is, in a few words.
        colour: Of its curve, where it is alone.
        sign: -1 turns a loss back into the quantity.
    """

    column: str
    label: str
    note: str
    colour: str = GREY
    sign: float = 1.0

    def series(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and values ``[n]``; empty where the run has not logged it."""
        steps, values = run.series(self.column)
        return steps, self.sign * values

    def ends(self, run: Run) -> tuple[float, float]:
        """The first and the last row as they were logged; NaN where nothing was."""
        values = self.series(run)[1]
        return (float(values[0]), float(values[-1])) if len(values) else (np.nan, np.nan)

    def tenths(self, run: Run) -> tuple[float, float]:
        """The means of the first and of the last tenth of the rows; NaN where nothing was logged."""
        values = self.series(run)[1]
        if not len(values):
            return np.nan, np.nan
        rows = tenth(values)
        return float(values[:rows].mean()), float(values[-rows:].mean())


SCORE = Metric("objective/scores", "Score", "what is trained on, before the KL penalty", BLUE)
GOLD_SCORE = Metric("objective/gold_scores", "Gold score", "not trained on", GOLD)
KL = Metric("objective/kl", "KL to the reference", "nats in a response", RED)
ENTROPY = Metric("train/entropy_loss", "Entropy", "of an action, in nats", PURPLE, -1.0)
LENGTH = Metric("completions/mean_length", "Response length", "tokens", GREEN)
CUT = Metric("completions/clipped_ratio", "Responses cut off", "share that reaches the budget")
RETURN = Metric("rollout/ep_rew_mean", "Return", "mean of an episode", BLUE)
GAP = Metric("exact/gap", "Gap to the optimum", "1 at the reference, 0 at the optimum", TEAL)
ZERO_STD = Metric("group/frac_zero_std", "Groups without variance", "share; they teach nothing")
APPROX_KL = Metric("train/approx_kl", "KL of an update", "old policy to new, nats")
EXPLAINED = Metric("train/explained_variance", "Explained variance", "of the critic; 1 is perfect")
KL_COEF = Metric("objective/kl_coef", "KL coefficient", "weight of the KL in the reward")
_EPISODE_LENGTH = Metric("rollout/ep_len_mean", "Episode length", "steps", GREEN)

#: Curves by the heading that they stand under.
TEXT_CURVES = (
    SCORE,
    GOLD_SCORE,
    Metric("objective/rlhf_reward", "Reward", "score minus the KL penalty", TEAL),
    KL,
    ENTROPY,
    LENGTH,
    dataclasses.replace(_EPISODE_LENGTH, label="Response length", note="tokens"),
)
OTHER_CURVES = (
    RETURN,
    Metric("rollout/success_rate", "Success rate", "share of episodes", TEAL),
    _EPISODE_LENGTH,
    ENTROPY,
)
EXACT_CURVES = (
    GAP,
    Metric("exact/kl_to_optimum", "KL to the optimal policy", "nats", RED),
    Metric("exact/J", "Objective J", "score minus the KL penalty, exact", BLUE),
)
GROUP_CURVES = (
    Metric("group/reward_std", "Spread within a group", "standard deviation of the reward"),
    ZERO_STD,
)
UPDATE_CURVES = (
    APPROX_KL,
    Metric("train/clip_fraction", "Clip fraction", "share of actions beyond the clip range"),
    EXPLAINED,
    Metric("train/value_loss", "Value loss", "of the critic"),
    Metric("train/grad_norm", "Gradient norm", "before clipping"),
    KL_COEF,
    CUT,
    Metric("completions/distinct_2", "Distinct-2", "share of word pairs that are distinct"),
)
#: What an evaluation on held-out prompts is made of.
EVALUATED = {
    "score": "score",
    "gold": "gold score",
    "kl": "KL to the reference (nats)",
    "length": "tokens in a response",
    "ended": "share that ends within the budget",
}


def tenth(values: np.ndarray) -> int:
    """A tenth of the rows, one at least."""
    return max(len(values) // 10, 1)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The running mean of :func:`agents.evaluation.plots.smoothed`; a log of few rows is left as it is."""
    return smoothed(values) if len(values) >= FEW_ROWS else values


def logged(metrics: Iterable[Metric], runs: Sequence[Run]) -> list[Metric]:
    """The metrics that at least one of the runs has logged."""
    return [metric for metric in metrics if any(len(metric.series(run)[0]) for run in runs)]


def learning_curves(runs: Sequence[Run]) -> list[Metric]:
    """The metrics of the learning curves: each of several rewards is one."""
    found = logged(TEXT_CURVES if runs[0].is_text else OTHER_CURVES, runs)
    if LENGTH in found:
        found = [metric for metric in found if metric.column != _EPISODE_LENGTH.column]
    names = sorted({name for run in runs for name in run.progress if name.startswith("rewards/")})
    parts = [Metric(name, name.removeprefix("rewards/"), "one of several rewards") for name in names]
    return found + logged(parts, runs)


def update_curves(runs: Sequence[Run]) -> list[Metric]:
    """The metrics of the updates."""
    return logged(UPDATE_CURVES, runs)


def constant(metric: Metric, runs: Sequence[Run]) -> float | None:
    """The one value that a metric has in every row of every run, to six digits; None where it moves."""
    values = np.concatenate([metric.series(run)[1] for run in runs])
    if not len(values) or np.ptp(values) > 1e-6 * max(1.0, float(np.abs(values).max())):
        return None
    return float(values[0])


def headline(runs: Sequence[Run]) -> list[Metric]:
    """The metrics of the table of figures."""
    exact = logged((GAP,), runs)
    more = logged((CUT, ZERO_STD), runs) if runs[0].is_text else logged((EXPLAINED, APPROX_KL), runs)
    return learning_curves(runs) + exact + more


def decimals(values: Iterable[float]) -> int:
    """How many decimals the largest of some numbers deserves."""
    sizes = [abs(value) for value in values if np.isfinite(value)]
    largest = max(sizes, default=0.0)
    return 0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 1 else 3


def write_number(value: float, places: int) -> str:
    """A number with a real minus, thousands apart; a dash where there is none."""
    if not np.isfinite(value):
        return "–"
    return f"{round(value, places) + 0.0:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def speed(run: Run) -> float:
    """Timesteps in a second, since the run was started or last resumed; NaN where it is not known."""
    for column in ("time/tokens_per_second", "time/fps"):
        values = run.series(column)[1]
        if len(values):
            return float(values[-1])
    return np.nan
