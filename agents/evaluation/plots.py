"""The learning curve of a run as a picture, drawn from its progress.csv."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.evaluation import mean_interval, means_of_known
from agents.evaluation.records import EvaluationRecord
from textrl_env.printable import printable

#: What is drawn of a text run: the column, the panel's heading, its colour.
TEXT_PANELS = (
    ("objective/scores", "Score of the reward model (proxy)", "#1f6fb4"),
    ("objective/gold_scores", "Gold score (not trained on)", "#b8860b"),
    ("objective/kl", "KL from the initial model (nats)", "#b03a48"),
)
#: And of any other.
PANELS = (("rollout/ep_rew_mean", "Mean return of an episode", "#1f6fb4"),)
#: Letters of the title that are as wide as a panel, on the safe side.
_LETTERS_OF_A_PANEL = 38
_INK, _QUIET, _AXIS = "#222222", "#888888", "#cccccc"
_PROXY, _GOLD = "#1f6fb4", "#b8860b"


def plot_learning_curve(
    progress: dict[str, list[float]], file: str | Path, title: str, unit: str | None = None
) -> Path:
    """Draw score, gold score and KL (or the mean return) against the timesteps.

    Args:
        progress: Columns of a progress.csv, as :func:`agents.runs.logs.read_progress` gives them.
        file: Where to, .png or .svg.
        title: One sentence on what the picture shows.
        unit: What a timestep is; None is "tokens" on text and "steps" elsewhere.

    Raises:
        ValueError: The run has logged none of these.
    """
    from matplotlib.figure import Figure

    is_text = "objective/scores" in progress
    panels = [panel for panel in (TEXT_PANELS if is_text else PANELS) if panel[0] in progress]
    if is_text and "objective/gold_scores" not in progress:  # nothing to tell a proxy from
        panels = [
            (name, "Mean reward" if name == "objective/scores" else heading, ink)
            for name, heading, ink in panels
        ]
    if not panels:
        raise ValueError(
            f"there is no score and no return among {sorted(progress)}; has the run logged anything?"
        )
    unit = unit or ("tokens" if is_text else "steps")
    steps = np.array(progress["time/total_timesteps"])
    figure = Figure(figsize=(4.2 * len(panels), 3.7), dpi=150, layout="constrained")
    title = textwrap.fill(title, _LETTERS_OF_A_PANEL * len(panels))
    figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK, x=0.012, ha="left")
    for axes, (column, heading, colour) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        values = np.array(progress[column])
        smooth = smoothed(values)
        draw_curve(axes, steps, values, smooth, colour)
        axes.annotate(
            f"{smooth[-1]:.2f}",
            (steps[-1], smooth[-1]),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
        axes.set_title(heading, fontsize=10.5, color=_INK, loc="left")
        axes.set_xlabel(f"{unit} seen", fontsize=9.5, color=_INK)
        axes.set_xlim(0, steps[-1] * 1.14)
        style_axes(axes)
    figure.savefig(file)
    return Path(file)


def draw_curve(
    axes: Any, steps: np.ndarray, values: np.ndarray, smooth: np.ndarray, colour: str, style: str = "-"
) -> None:
    """Draw what was logged faintly and its running mean over it.

    Args:
        axes: matplotlib's.
        steps: Timesteps ``[n]``.
        values: What was logged then ``[n]``.
        smooth: Their running mean ``[n]``, see :func:`smoothed`.
        colour: Of both lines.
        style: matplotlib's line style of the running mean.
    """
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, style, color=colour, linewidth=2)


def style_axes(axes: Any) -> None:
    """Quiet axes over timesteps: horizontal grid lines, no frame, thousands as "30k"."""
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if isinstance(numbers := axes.yaxis.get_major_formatter(), ScalarFormatter):
        numbers.set_useOffset(False)  # "1.0984" can be read, "0.0004" beside "+1.098" cannot
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.tick_params(labelsize=9, colors=_QUIET, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")


def short_count(count: float) -> str:
    """Timesteps in a few characters: "500", "30k", "1.5M"."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:g}"


def smoothed(values: np.ndarray, fraction: float = 0.1) -> np.ndarray:
    """A centred running mean over ``fraction`` of the points.

    Towards the ends the window shrinks on both sides alike, so the first and the last point are what was measured: a
    window that only looked inwards would lift the beginning of a rising curve.

    What is not finite is left out; NaN where a window holds nothing else.
    """
    count = len(values)
    at, half = np.arange(count), max(int(count * fraction / 2), 1)
    half = np.minimum(half, np.minimum(at, count - 1 - at))
    there = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    low, high = at - half, at + half + 1
    total, number = sums[high] - sums[low], counts[high] - counts[low]
    smooth = np.divide(total, number, out=np.full(count, np.nan), where=number > 0)
    return np.where(there & (half == 0), values, smooth)


#: Height of two lines of words at the foot of a picture, in points.
_FOOT = 30.0


def proxy_and_gold_figure(
    evaluations: Sequence[EvaluationRecord] | Sequence[Sequence[EvaluationRecord]],
    labels: Sequence[str] = ("",),
    colours: Sequence[str] = (_PROXY,),
    size: tuple[float, float] = (7.6, 3.3),
) -> Any:
    """Proxy and gold at every evaluation over the square root of the KL, gold's peak marked.

    Both are the change since the first policy in standard deviations of its answers, so one axis holds them. With one
    run, colours tell proxy from gold; with several they tell the runs apart, and dashes the proxy.

    Args:
        evaluations: Of one run, or a list for each of several.
        labels: Of the runs.
        colours: Of the runs; one run has those of proxy and gold.
        size: Inches.

    Returns:
        matplotlib's figure.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    runs = (
        [list(evaluations)]
        if isinstance(evaluations[0], EvaluationRecord)
        else [list(each) for each in evaluations]
    )
    alone, narrow = len(runs) == 1, size[0] < 5
    figure = Figure(figsize=size)
    figure.subplots_adjust(left=0.13 if narrow else 0.07, right=0.985, bottom=0.14, top=0.97)
    axes = figure.subplots()
    axes.axhline(0, color=_AXIS, linewidth=1)
    for points, label, colour in zip(runs, labels, colours, strict=True):
        x = np.sqrt([max(float(e.sampled.kl.mean()), 0.0) for e in points])
        for name in ("score", "gold"):
            if getattr(points[0].sampled, name) is None:
                continue
            ink = {"score": _PROXY, "gold": _GOLD}[name] if alone else colour
            mean, low, high = _gains(points, name)
            line = "--" if name == "score" and not alone else "-"
            axes.plot(x, mean, line, color=ink, linewidth=2, marker="o", markersize=4)
            if alone:
                axes.vlines(x, low, high, color=ink, alpha=0.45, linewidth=1.5)
            called = {"score": "proxy", "gold": "gold"}[name]
            _write_at(axes, x[-1], mean[-1], called if alone else f"{label}: {called}", ink)
            if name == "gold":
                _mark_peak(axes, x, mean, points, ink, in_words=alone)
    top = max(axes.get_xlim()[1], 0.5)
    # Room for what stands at the ends of the lines, about 0.085 inches a letter.
    longest = len("proxy") if alone else max(len(f"{label}: proxy") for label in labels)
    room = min((0.085 * longest + 0.15) / (size[0] * (0.855 if narrow else 0.915)), 0.5)
    axes.set_xlim(-0.02 * top, top / (1 - room))
    if alone and points[0].has_gold:
        # Below every line, for the words at the foot.
        low, high = axes.get_ylim()
        height = 72 * size[1] * axes.get_position().height
        axes.set_ylim(high - (high - low) / (1 - _FOOT / height), high)
    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda root, _: f"{root:.3g}"))
    axes.set_xlabel("square root of the KL to the reference (nats)", fontsize=9, color=_QUIET, loc="right")
    return figure


def _gains(points: Sequence[EvaluationRecord], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The change since the first evaluation and its interval, in standard deviations of the first one's answers."""
    found = [means_of_known(getattr(e.sampled, name)) for e in points]
    spread = max(float(np.nan_to_num(np.nanstd(getattr(points[0].sampled, name)))), 1e-9)
    gains = [(x - found[0]) / spread for x in found]
    gains = [gain[~np.isnan(gain)] for gain in gains]
    rows = [mean_interval(gain) if len(gain) else (np.nan,) * 3 for gain in gains]
    mean, low, high = (np.array(column) for column in zip(*rows, strict=True))
    return mean, low, high


def _mark_peak(
    axes: Any, x: np.ndarray, gold: np.ndarray, points: Sequence[EvaluationRecord], ink: str, in_words: bool
) -> None:
    """A ring where gold is highest, and what is there in words at the foot of the picture."""
    if np.isnan(gold).all():
        return
    peak = int(np.nanargmax(gold))
    ring = {"markerfacecolor": "none", "markeredgewidth": 1.8, "markersize": 13}
    axes.plot(x[peak], gold[peak], "o", color=ink, **ring)
    if not in_words:
        return
    axes.axvline(x[peak], color=ink, linewidth=1, linestyle=":", alpha=0.8, zorder=0)
    kl = max(float(points[peak].sampled.kl.mean()), 0.0)
    text = f"gold is highest at {kl:.1f} nats,\n{points[peak].timesteps:,} timesteps"
    on_the_left = x[peak] > 0.5 * x.max()
    where = {"xytext": (-5 if on_the_left else 5, 4), "textcoords": "offset points", "va": "bottom"}
    where |= {"ha": "right" if on_the_left else "left", "xycoords": ("data", "axes fraction")}
    axes.annotate(text, (x[peak], 0.0), **where, color=ink, fontsize=9)


def _write_at(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    where = {"xytext": (11, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, y), **where, color=colour, fontsize=9.5, fontweight="bold", annotation_clip=False)


#: Rows of the strip of an episode: the column, what it is called, and whether 0 is the middle of its colours.
STRIP = (
    ("log_probs", "log pi", False),
    ("ref_log_probs", "log pi of the reference", False),
    ("kls", "KL", True),
    ("rewards", "reward", True),
    ("values", "value", True),
    ("advantages", "advantage", True),
)
#: Tokens of an episode in its picture.
_STRIP_TOKENS = 40


def episode_strip(row: Mapping[str, Any]) -> Any:
    """An episode token by token: log-probabilities, KL, rewards, values and advantages as coloured cells.

    Args:
        row: A sample with its tokens, see :mod:`agents.runs.samples`.

    Returns:
        matplotlib's figure.
    """
    from matplotlib.figure import Figure

    count = len(row["tokens"])
    tokens = [_drawable(token.strip() or repr(token)) for token in row["tokens"][:_STRIP_TOKENS]]
    shown = [(name, label, signed) for name, label, signed in STRIP if row.get(name)]
    # Inches: labels at the left, a cell a token, and room at the right for a last token written askew.
    width, height = 1.6 + 0.62 * len(tokens) + 0.6, 1.15 + 0.36 * len(shown)
    figure = Figure(figsize=(max(width, 5), height), dpi=110)
    axes = figure.subplots()
    figure.subplots_adjust(
        left=1.5 / max(width, 5), right=1 - 0.6 / max(width, 5), top=1 - 1.1 / height, bottom=0.02
    )
    asked = _drawable(" ".join(str(row["prompt"]).split()))
    letters = int(max(width, 5) / 0.085)  # that fit
    asked = asked if len(asked) <= letters else f"{asked[:letters]}\N{HORIZONTAL ELLIPSIS}"
    figure.text(0.06 / max(width, 5), 1 - 0.2 / height, asked, fontsize=9.5, color=_INK, parse_math=False)
    worth = f"score {_written(row['score'])}"
    if row.get("score/gold") is not None and np.isfinite(row["score/gold"]):
        worth += f", gold {_written(row['score/gold'])}"
    worth += f"; the first {len(tokens)} of {count:,} tokens" if count > len(tokens) else ""
    figure.text(0.06 / max(width, 5), 1 - 0.4 / height, worth, fontsize=8.5, color=_QUIET)
    for at, (name, _, signed) in enumerate(shown):
        values = np.array(row[name][: len(tokens)], dtype=np.float64)
        strength = np.abs(values) / max(float(np.abs(values).max()), 1e-9)
        for i, (value, share) in enumerate(zip(values, strength, strict=True)):
            colour = "#c0504d" if value < 0 or not signed else "#2e7d4f"
            axes.add_patch(_cell(i, at, colour, float(share)))
            axes.text(i + 0.5, at + 0.5, _written(value), ha="center", va="center", fontsize=7.5, color=_INK)
    axes.set_xlim(0, len(tokens))
    axes.set_ylim(len(shown), 0)
    axes.set_yticks(np.arange(len(shown)) + 0.5, [label for _, label, _ in shown], fontsize=8.5)
    axes.set_xticks(np.arange(len(tokens)) + 0.5, tokens, fontsize=8.5, rotation=30, ha="left")
    for label in axes.get_xticklabels():
        label.set_parse_math(False)  # a dollar sign is one
    axes.xaxis.tick_top()
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    return figure


def _drawable(text: str) -> str:
    """The text with characters that matplotlib's font has no picture of written out, as ``\\u65e5``."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if font.get_char_index(ord(c)) else ascii(c)[1:-1] for c in printable(text))


def _written(value: float) -> str:
    """With two decimals, and no minus before a zero."""
    return f"{round(float(value), 2) + 0.0:.2f}"


def _cell(column: int, row: int, colour: str, strength: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column + 0.03, row + 0.06), 0.94, 0.88, color=colour, alpha=0.08 + 0.62 * strength, linewidth=0
    )
