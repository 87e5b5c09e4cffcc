"""The picture of docs/gradients.md: bias against noise, one dot for the methods that take the same first step."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from agents.algorithms import methods

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = dict(
    zip(methods.FAMILIES, ("#1f2937", "#2563eb", "#059669", "#d97706", "#9333ea", "#dc2626"), strict=True)
)
#: Names in a line of a label.
IN_A_LINE = 3
#: Where a label may stand beside its dot, in points: the nearest that is free is taken.
DISTANCES, ANGLES = (
    (7, 14, 22, 32, 44, 58, 74, 92),
    np.radians((0, 20, -20, 40, -40, 60, -60, 90, -90, 120, -120, 150, -150, 180)),
)


def groups_of_dots(rows: dict[str, dict[str, Any]]) -> list[tuple[float, float, list[str]]]:
    """Noise, angle in degrees and the names of the methods at that place, of which there may be many."""
    places: list[tuple[float, float, list[str]]] = []
    for method in methods.METHODS:
        found = rows.get(method.name, {}).get("plain", {})
        if "cosine" not in found:
            continue
        noise, angle = found["noise"], math.degrees(math.acos(min(found["cosine"], 1.0)))
        for x, y, names in places:
            if abs(math.log(noise / x)) < 0.02 and abs(_height(angle) - _height(y)) < 0.12:
                names.append(method.name)
                break
        else:
            places.append((noise, angle, [method.name]))
    return places


def _height(degrees: Any) -> Any:
    """How high an angle is drawn: small ones are told apart, 0 is the bottom."""
    return np.sign(degrees) * np.sqrt(np.abs(degrees))


def frontier_of(places: list[tuple[float, float, list[str]]]) -> list[tuple[float, float]]:
    """Noise and angle of the dots that no other beats in both, by their noise."""
    best = sorted((x, y) for x, y, _ in places)
    return [(x, y) for i, (x, y) in enumerate(best) if all(y < v - 1e-9 for _, v in best[:i])]


def draw_picture(rows: dict[str, dict[str, Any]], path: Path, budget: int) -> None:
    """One dot for each first step: how noisy it is and how far its mean points away from the gradient.

    Args:
        rows: What is stored of the methods.
        path: Where it is written.
        budget: Tokens of a rollout at which lines of equal progress are drawn.
    """
    places = groups_of_dots(rows)
    families = {method.name: method.family for method in methods.METHODS}
    figure, axes = plt.subplots(figsize=(8.2, 5.4), dpi=150, layout="constrained")
    low, high = min(x for x, _, _ in places) / 1.35, max(x for x, _, _ in places) * 1.6
    top = max(y for _, y, _ in places) * 1.18
    axes.set(xscale="log", xlim=(low, high))
    axes.set_yscale("function", functions=(_height, lambda z: np.sign(z) * np.square(z)))
    axes.set_ylim(-0.35, top)
    axes.set_yticks([y for y in (0, 1, 2, 5, 10, 20, 30, 45, 60) if y < top])
    ticks = [x for x in (10, 20, 30, 40, 50, 70, 100, 150, 200, 300, 500) if low < x < high]
    axes.set_xticks(ticks, [str(x) for x in ticks])
    axes.set_xticks([], minor=True)
    grid = np.geomspace(low, high, 400)
    for level in (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9):
        cosine = level * np.sqrt(1 + grid / budget)
        inside = cosine <= 1
        line = np.degrees(np.arccos(cosine[inside]))
        axes.plot(grid[inside], line, color="#d1d5db", lw=0.8, zorder=0)
        seen = np.flatnonzero(line < top)
        if len(seen):
            at = seen[0] + 10 if line[0] < top else seen[0] + 4
            axes.annotate(
                f"{level:g}",
                (grid[at], line[at]),
                color="#9ca3af",
                fontsize=7,
                va="center",
                ha="center",
                bbox={"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none"},
                zorder=1,
            )
    axes.step(*zip(*frontier_of(places), strict=True), where="post", color="#111827", lw=1, ls=":", zorder=2)
    for x, y, names in places:
        axes.scatter([x], [y], s=40, color=COLOURS[families[names[0]]], edgecolor="white", lw=0.7, zorder=4)
    axes.set_xlabel("noise: tokens until the scatter is as long as the step")
    axes.set_ylabel("bias: degrees between the mean step and the gradient")
    axes.set_title(
        f"Grey: equal progress of a step from {budget} tokens. Dotted: nothing is better in both",
        fontsize=8.5,
        loc="left",
    )
    shown = {families[name] for _, _, names in places for name in names[:1]}
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=colour, label=methods.FAMILIES[name])
        for name, colour in COLOURS.items()
        if name in shown
    ]
    axes.legend(handles=handles, fontsize=7.5, frameon=False, loc="lower left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.canvas.draw()
    _label(axes, places, [COLOURS[families[names[0]]] for _, _, names in places])
    figure.savefig(path)
    plt.close(figure)


def _label(axes: Any, places: list[tuple[float, float, list[str]]], colours: list[str]) -> None:
    """Name every dot, where its name hides no other and no dot."""
    renderer = axes.figure.canvas.get_renderer()
    point = axes.figure.dpi / 72
    dots = [axes.transData.transform((x, y)) for x, y, _ in places]
    frame = axes.get_window_extent(renderer)
    taken = [(x - 5 * point, y - 5 * point, x + 5 * point, y + 5 * point) for x, y in dots]
    legend = axes.get_legend().get_window_extent(renderer)
    taken.append((legend.x0, legend.y0, legend.x1, legend.y1))
    corners = [axes.transData.transform(corner) for corner in frontier_of(places)]
    for (x, y), (right, below) in itertools.pairwise(corners):  # the steps of the dotted line
        taken += [(x, y - point, right, y + point), (right - point, below, right + point, y)]
    leaders: list[tuple[Any, Any]] = []
    # Those with the nearest neighbours choose first.
    crowded = sorted(range(len(dots)), key=lambda i: sorted(math.dist(dots[i], each) for each in dots)[1])
    for i in crowded:
        text = _in_lines(places[i][2])
        probe = axes.text(0.5, 0.5, text, fontsize=7.5, transform=axes.transAxes, linespacing=1.1)
        size = probe.get_window_extent(renderer)
        probe.remove()
        options = []
        for distance, angle in itertools.product(DISTANCES, ANGLES):
            dx, dy = distance * point * math.cos(angle), distance * point * math.sin(angle)
            x = dots[i][0] + dx - (size.width if dx < -1e-6 else size.width / 2 if abs(dx) < 1e-6 else 0.0)
            y = dots[i][1] + dy - size.height / 2
            box = x, y, x + size.width, y + size.height
            inside = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1
            tip = (dots[i][0] + dx, dots[i][1] + dy)
            others = taken[:i] + taken[i + 1 :]
            clashes = sum(_overlap(box, other) for other in others)
            clashes += sum(_crosses(dots[i], tip, other) for other in others) if distance > 8 else 0
            clashes += sum(_crosses(*leader, box) for leader in leaders)
            options.append((clashes + 100 * (not inside), len(options), box, tip, distance))
        _, _, box, tip, distance = min(options, key=lambda option: option[:2])
        taken.append(box)
        x, y = axes.transData.inverted().transform((box[0], (box[1] + box[3]) / 2))
        ground = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8}
        axes.text(
            x, y, text, fontsize=7.5, color=colours[i], va="center", linespacing=1.1, bbox=ground, zorder=3
        )
        if distance > 8:
            leaders.append((dots[i], tip))
            ends = axes.transData.inverted().transform([dots[i], tip])
            axes.plot(*ends.T, color="#9ca3af", lw=0.6, zorder=3)


def _in_lines(names: list[str]) -> str:
    return ",\n".join(", ".join(names[i : i + IN_A_LINE]) for i in range(0, len(names), IN_A_LINE))


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _crosses(start: Any, end: Any, box: tuple[float, ...]) -> bool:
    """Whether a straight line passes through a box."""
    for share in np.linspace(0.15, 1.0, 24):
        x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
        if box[0] < x < box[2] and box[1] < y < box[3]:
            return True
    return False
