"""Pictures of what was learned in a small world: arrows and values on the grid, bars on the line and for the arms, and
the responses of a token tree against the exact optimum."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from agents.report.metrics import write_number

_CELL = 64
#: (x, y) of the grid's moves: left, down, right, up.
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
_WHAT = {
    "grid": "Arrows are as long as the move is likely; numbers are the critic's values, shades the optimal ones.",
    "line": "How likely each move is in each cell, left, stay and right; the goal is at the right end.",
    "bandit": "Bars: how likely each arm is; dots: its expected reward, the best one filled.",
    "tree": "How likely the policy, the exact optimum and the reference write each response to the first prompt "
    "(numbers of tokens).",
}


def section(policy: dict[str, Any] | None) -> str:
    """The picture of ``policy.json``; nothing without one."""
    draw = {"grid": _grid, "line": _line, "bandit": _bandit, "tree": _tree}
    if policy is None or policy.get("kind") not in draw:
        return ""
    kind = policy["kind"]
    return (
        f"<section><h2>What was learned</h2><p class=quiet>{_WHAT[kind]}</p>"
        f"<div class=wide>{draw[kind](policy)}</div></section>"
    )


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class=toy role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:{width:g}px">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, size: int = 11, anchor: str = "middle", colour: str = "ink") -> str:
    where = f'x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"'
    return f'<text {where} fill="var(--{colour})">{escape(text)}</text>'


def _rectangle(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="var(--{colour})" '
        f'fill-opacity="{opacity:.2f}"/>'
    )


def _grid(policy: dict[str, Any]) -> str:
    rows, columns = len(policy["cells"]), len(policy["cells"][0])
    probs, optimal = np.array(policy["probs"]), np.array(policy["optimal_values"])
    span = max(float(optimal.max() - optimal.min()), 1e-9)
    parts = []
    for r in range(rows):
        for c in range(columns):
            cell, state, x, y = policy["cells"][r][c], r * columns + c, c * _CELL, r * _CELL
            inside = (x + 1, y + 1, _CELL - 2, _CELL - 2)
            if cell in "#HG":
                parts.append(_rectangle(*inside, {"#": "grey", "H": "red", "G": "green"}[cell], 0.75))
                name = {"#": "", "H": "pit", "G": "goal"}[cell]
                parts.append(_text(x + _CELL / 2, y + _CELL / 2 + 4, name, 12))
                continue
            parts.append(
                _rectangle(*inside, "blue", 0.08 + 0.3 * float(optimal[state] - optimal.min()) / span)
            )
            for (dx, dy), prob in zip(_MOVES, probs[state], strict=True):
                parts.append(_arrow(x + _CELL / 2, y + _CELL / 2, dx, dy, float(prob)))
            if policy["values"] is not None:
                parts.append(
                    _text(x + _CELL - 5, y + _CELL - 6, write_number(policy["values"][state], 2), 10, "end")
                )
            if cell == "S":
                parts.append(_text(x + 5, y + 13, "start", 10, "start", "quiet"))
    return _svg(columns * _CELL, rows * _CELL, "Policy and values on the grid", parts)


def _arrow(x: float, y: float, dx: int, dy: int, prob: float) -> str:
    if prob < 0.02:
        return ""
    length = 7 + 17 * prob
    ex, ey = x + dx * length, y + dy * length
    left, right = (ex - 5 * dx - 4 * dy, ey - 5 * dy - 4 * dx), (ex - 5 * dx + 4 * dy, ey - 5 * dy + 4 * dx)
    return (
        f'<g stroke="var(--ink)" stroke-opacity="{0.25 + 0.75 * prob:.2f}" stroke-width="2" fill="none">'
        f'<path d="M{x:g} {y:g}L{ex:g} {ey:g}M{left[0]:g} {left[1]:g}L{ex:g} {ey:g}L{right[0]:g} {right[1]:g}"/></g>'
    )


def _line(policy: dict[str, Any]) -> str:
    probs = np.array(policy["probs"])
    width, height = 58, 110
    parts = []
    for s, row in enumerate(probs):
        x = s * width
        is_goal = s == len(probs) - 1
        for a, (prob, colour) in enumerate(zip(row, ("red", "grey", "blue"), strict=True)):
            if not is_goal:
                parts.append(_rectangle(x + 6 + 15 * a, 12 + height * (1 - prob), 13, height * prob, colour))
        if is_goal:
            parts.append(_text(x + width / 2, 12 + height / 2, "goal", 12, colour="green"))
        else:
            best = policy["values"]
            value = "" if best is None else write_number(best[s], 2)
            parts.append(_text(x + width / 2 - 2, height + 44, value, 10, colour="quiet"))
        label = f"{s} (start)" if s == policy["start"] else str(s)
        parts.append(_text(x + width / 2 - 2, height + 29, label))
    axis = f'<path d="M0 {height + 13}H{len(probs) * width}" stroke="var(--axis)"/>'
    keys = [
        _text(6 + 70 * i, height + 64, word, 11, "start", colour)
        for i, (word, colour) in enumerate((("left", "red"), ("stay", "grey"), ("right", "blue")))
    ]
    return _svg(len(probs) * width, height + 72, "Policy on the line", [*parts, axis, *keys])


def _bandit(policy: dict[str, Any]) -> str:
    probs, means = np.array(policy["probs"]), np.array(policy["means"])
    width, height, drawn = 44, 120, min(len(probs), 6)
    low, span = float(means.min()), max(float(means.max() - means.min()), 1e-9)
    parts = []
    for k in range(drawn):
        top = k * (height + 46)
        for arm, prob in enumerate(probs[k]):
            x = 10 + arm * width
            parts.append(
                _rectangle(x + 8, top + 14 + height * (1 - prob), width - 16, height * prob, "blue", 0.85)
            )
            y = top + 14 + height * (1 - (means[k, arm] - low) / span)
            fill = "gold" if arm == means[k].argmax() else "paper"
            parts.append(
                f'<circle cx="{x + width / 2:g}" cy="{y:.1f}" r="5" stroke="var(--gold)" stroke-width="2" '
                f'fill="var(--{fill})"/>'
            )
            parts.append(_text(x + width / 2, top + height + 30, str(arm)))
        if len(probs) > 1:
            parts.append(_text(10, top + 10, f"context {k}", 11, "start", "quiet"))
    return _svg(
        20 + width * probs.shape[1], drawn * (height + 46), "Policy and expected rewards of the arms", parts
    )


def _tree(policy: dict[str, Any]) -> str:
    # As wide as a narrow screen, on which a picture shrinks with its letters.
    rows, width, step = policy["responses"], 220, 46
    left = max(84, 16 + 7 * max(len(row["text"]) for row in rows))
    largest = max(max(row[name] for name in ("policy", "optimum", "reference")) for row in rows)
    parts = []
    for i, row in enumerate(rows):
        y = i * step + 6
        parts.append(_text(left - 10, y + 15, row["text"], 12, "end"))
        parts.append(_text(left - 10, y + 29, f"score {write_number(row['score'], 2)}", 10, "end", "quiet"))
        for j, (name, colour) in enumerate((("policy", "blue"), ("optimum", "gold"), ("reference", "grey"))):
            length = width * row[name] / max(largest, 1e-9)
            parts.append(_rectangle(left, y + 12 * j, max(length, 0.5), 10, colour))
            parts.append(_text(left + length + 5, y + 12 * j + 9, f"{row[name]:.3f}", 10, "start", "quiet"))
    bottom = len(rows) * step + 18
    parts += [
        _text(left + 76 * i, bottom, word, 12, "start", colour)
        for i, (word, colour) in enumerate((("policy", "blue"), ("optimum", "gold"), ("reference", "grey")))
    ]
    return _svg(left + width + 44, bottom + 8, "Policy, optimum and reference of the token tree", parts)
