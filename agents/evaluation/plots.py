"""The learning curve of a run as a picture, drawn from its progress.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

#: What is drawn of a text run: the column, the panel's heading, its colour.
TEXT_PANELS = (
    ("objective/scores", "Score of the reward model (proxy)", "#1f6fb4"),
    ("objective/gold_scores", "Gold score (not trained on)", "#b8860b"),
    ("objective/kl", "KL from the initial model (nats)", "#b03a48"),
)
#: And of any other.
PANELS = (("rollout/ep_rew_mean", "Mean return of an episode", "#1f6fb4"),)
_INK, _QUIET = "#222222", "#888888"


def plot_learning_curve(
    progress: dict[str, list[float]], file: str | Path, title: str, unit: str | None = None
) -> Path:
    """Draw score, gold score and KL (or the mean return) against the timesteps.

    Args:
        progress: Columns of a progress.csv, as :func:`agents.runs.run_directory.read_progress` gives them.
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
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_formatter(lambda x, _: short_count(x))
    axes.xaxis.set_major_locator(MaxNLocator(5))
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
