"""The pictures of a report, as SVG that stands in the page: curves, and the score against the KL.

Text in them is text, in the page's own type. One run is drawn as logged with its running mean, several runs of the
same settings as the interquartile mean of their running means with its bootstrap interval.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.evaluation.plots import draw_curve, proxy_and_gold_figure, style_axes
from agents.report.metrics import (
    BLUE,
    GOLD,
    GREEN,
    GREY,
    KL,
    PURPLE,
    RED,
    TEAL,
    Metric,
    decimals,
    running_mean,
    write_number,
)
from agents.report.reading import Group, Run

#: Of groups, in their order; then dashed, then dotted.
PALETTE = (BLUE, GOLD, RED, TEAL, PURPLE, GREEN, GREY)
LINES = ("-", "--", ":")
#: Inches; the page shows them about a fifth larger.
_SIZE, _WIDE, _NARROW = (3.9, 2.45), (7.6, 3.3), (3.9, 3.3)
#: Up to so many groups, single runs show what was logged behind their running mean.
FAINT = 3
_POINTS, _RESAMPLES = 200, 1000
#: More points than a curve can show make the page large.
_DRAWN = 600
_INK, _QUIET, _GRID_DARK = "#222222", "#888888", "#cccccc"
#: Colours of the pictures that are the page's own, so that they change with it between light and dark.
_OF_PAGE = {
    _INK: "ink",
    _QUIET: "quiet",
    _GRID_DARK: "axis",
    "#e6e6e6": "line",
    "#ffffff": "paper",
    BLUE: "blue",
    GOLD: "gold",
    RED: "red",
    TEAL: "teal",
    PURPLE: "purple",
    GREEN: "green",
    GREY: "grey",
}

Curve = tuple[np.ndarray, np.ndarray]


def curve(metric: Metric, groups: Sequence[Group]) -> str:
    """A metric against timesteps, every group in its colour."""
    figure, axes = _figure()
    alone = len(groups) == 1
    end = max(metric.series(run)[0][-1] for g in groups for run in g.runs if len(metric.series(run)[0]))
    for i, group in enumerate(groups):
        found = [series for series in map(metric.series, group.runs) if len(series[0])]
        if not found:
            continue
        colour = metric.colour if alone else group_colour(i)
        line = LINES[i // len(PALETTE) % len(LINES)]
        last = _draw(axes, found, colour, line, len(groups) <= FAINT)
        if alone:
            _write_last(axes, *last, colour)
    axes.set_xlim(0, end * (1.17 if alone else 1.02))
    _finish(axes, groups[0].runs[0].unit)
    return _svg(figure, f"{metric.label} against {groups[0].runs[0].unit}", metric.column)


def training_curve(name: str, lines: Sequence[tuple[Curve, str, bool, str]]) -> str:
    """A metric against steps of training from a file: what was logged, and dots for what was held out.

    Args:
        name: Of the metric.
        lines: Steps and values, colour, whether held out, and label of each.
    """
    figure, axes = _figure()
    for (steps, values), colour, held_out, label in lines:
        if held_out:
            axes.plot(steps, values, "-", color=colour, linewidth=1.2, marker="o", markersize=4, label=label)
        else:
            draw_curve(axes, *_thin(steps, values, running_mean(values)), colour)
            axes.plot([], [], color=colour, linewidth=2, label=label)
    axes.set_xlim(0, max(float(steps.max()) for (steps, _), *_ in lines) * 1.02)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=_QUIET)
    _finish(axes, "steps")
    return _svg(figure, f"{name} against steps", f"training {name}")


def frontier(metric: Metric, groups: Sequence[Group]) -> str:
    """A metric against the KL: an open dot where the runs begin, a full one where they end."""
    figure, axes = _figure()
    for i, group in enumerate(groups):
        both = [run for run in group.runs if len(metric.series(run)[0]) and len(KL.series(run)[0])]
        if not both:
            continue
        colour = metric.colour if len(groups) == 1 else group_colour(i)
        if len(both) == 1 and len(groups) <= FAINT:
            steps, values = metric.series(both[0])
            x, y = _thin(np.interp(steps, *KL.series(both[0])), values)
            axes.plot(x, y, ".", color=colour, alpha=0.25, markersize=4)
        grid, y, *_ = mean_and_band([metric.series(run) for run in both])
        kl_grid, kl, *_ = mean_and_band([KL.series(run) for run in both])
        x = np.interp(grid, kl_grid, kl)
        axes.plot(*_thin(x, y), LINES[i // len(PALETTE) % len(LINES)], color=colour, linewidth=2)
        dot = {"marker": "o", "color": colour, "markersize": 5, "zorder": 3}
        axes.plot(x[0], y[0], markerfacecolor="white", **dot)
        axes.plot(x[-1], y[-1], **dot)
    _finish(axes, f"{KL.label} ({KL.note})")
    return _svg(figure, f"{metric.label} against the KL", f"frontier {metric.column}")


def proxy_and_gold(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """Proxy and gold at every evaluation over the square root of the KL, once for wide screens and once for narrow."""
    found = []
    for name, size in (("wide-only", _WIDE), ("narrow-only", _NARROW)):
        figure = proxy_and_gold_figure(
            [run.evaluations for run in runs], labels, [group_colour(i) for i in range(len(runs))], size
        )
        picture = _svg(figure, "Proxy and gold over the square root of the KL", f"proxy and gold {name}")
        found.append(f"<div class={name}>{picture}</div>")
    return "".join(found)


def group_colour(index: int) -> str:
    """The colour of a group."""
    return PALETTE[index % len(PALETTE)]


def page_colour(index: int) -> str:
    """The colour of a group as the page's style names it."""
    return f"var(--{_OF_PAGE[group_colour(index)]})"


def mean_and_band(series: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The interquartile mean of running means over several runs, and its interval.

    Runs log at timesteps of their own, so all are read off at common ones, from where the last of them begins. Up to
    a tenth before the longest ends, a run counts on with its last value; one that ended earlier leaves the mean there.

    The interquartile mean leaves out the lowest and the highest quarter of the runs (none of fewer than four), and the
    interval is a 95 % percentile bootstrap over runs: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of
    the Statistical Precipice" (the library rliable).

    Args:
        series: Timesteps and values of each run.

    Returns:
        Timesteps, mean, lower and upper end of the interval, ``[n]`` each.
    """
    if len(series) == 1:
        steps, values = series[0]
        smooth = running_mean(values)
        return steps, smooth, smooth, smooth
    start, end = max(steps[0] for steps, _ in series), max(steps[-1] for steps, _ in series)
    grid = np.linspace(start, end, _POINTS)
    read = np.array([_read_off(grid, steps, running_mean(values)) for steps, values in series])
    found = np.array([_interquartile(column[np.isfinite(column)]) for column in read.T])
    return grid, found[:, 0], found[:, 1], found[:, 2]


def _interquartile(values: np.ndarray) -> tuple[float, float, float]:
    """The interquartile mean of some runs and its 95 % interval."""
    draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(_trimmed(values[draws]), [2.5, 97.5])
    return float(_trimmed(values[None])[0]), float(low), float(high)


def _trimmed(values: np.ndarray) -> np.ndarray:
    """The means ``[n]`` of the rows of ``[n, runs]`` without the lowest and the highest quarter."""
    cut = values.shape[1] // 4
    return np.sort(values, axis=1)[:, cut : values.shape[1] - cut].mean(1)


def _read_off(grid: np.ndarray, steps: np.ndarray, smooth: np.ndarray) -> np.ndarray:
    """A curve at the timesteps of a grid that begins no earlier than it and ends where the longest run does."""
    right = smooth[-1] if steps[-1] >= 0.9 * grid[-1] else np.nan
    return np.interp(grid, steps, smooth, right=right)


def _draw(axes: Any, series: list[Curve], colour: str, line: str, faint: bool) -> tuple[float, float]:
    """One group; returns where its curve ends."""
    if len(series) == 1 and faint:
        steps, values = series[0]
        smooth = running_mean(values)
        draw_curve(axes, *_thin(steps, values, smooth), colour, line)
        return float(steps[-1]), float(smooth[-1])
    grid, mean, low, high = _thin(*mean_and_band(series))
    axes.fill_between(grid, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(grid, mean, line, color=colour, linewidth=2)
    return float(grid[-1]), float(mean[-1])


def _thin(*columns: np.ndarray) -> list[np.ndarray]:
    """At most :data:`_DRAWN` points, evenly spread, the last among them."""
    every = -(-len(columns[0]) // _DRAWN)
    return [column[::-1][::every][::-1] for column in columns]


def _write_last(axes: Any, x: float, y: float, colour: str) -> None:
    number = write_number(y, min(decimals([y]), 2))
    where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(
        number, (x, y), **where, color=colour, fontsize=9.5, fontweight="bold", annotation_clip=False
    )


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE)
    figure.subplots_adjust(left=0.135, right=0.985, bottom=0.185, top=0.965)
    return figure, figure.subplots()


def _finish(axes: Any, label: str) -> None:
    style_axes(axes)
    axes.set_xlabel(label, fontsize=9, color=_QUIET, loc="right", labelpad=2)
    low, high = axes.get_ylim()
    if high - low < 1e-6 * max(abs(high), 1e-3):  # a constant: no ticks of its rounding errors
        axes.set_ylim(low - 0.05 * max(abs(low), 1.0), high + 0.05 * max(abs(high), 1.0))


def _svg(figure: Any, description: str, salt: str) -> str:
    """A figure as an ``<svg>`` that scales with the page and shares no id with another."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    # The page has the style and the type, the size is the column's, and ids would repeat from picture to picture.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'font-family: [^;"]*; ', "", re.sub(r'<g id="[^"]*"', "<g", svg))
    svg = re.sub(r'(?<=[0-9a-z"]) (?:width|height)="[0-9.]+pt"', "", svg)
    for colour, name in _OF_PAGE.items():
        svg = svg.replace(f": {colour}", f": var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
