"""The heatmap of :mod:`agents.evaluation.token_heatmap` as a picture, for TensorBoard and documents.

Set in a monospaced font, whose widths are known without asking a renderer. Left out: the probabilities as numbers,
for which there is the page.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agents.evaluation.token_heatmap import Scored, TokenScore, check_scored, colour, prompt_length, summary

#: In a monospaced font everything has a width: of a letter, between tokens, of the column of names, of a line.
_LETTER, _GAP, _NAMES, _LINE = 0.0835, 0.05, 0.85, 10.0


def heatmap_image(
    scored: Mapping[str, Scored], title: str = "How sure the model is of every token"
) -> np.ndarray:
    """The same as a picture, uint8 ``[height, width, 3]``, for TensorBoard and documents.

    Args:
        scored: As for :func:`heatmap_html`.
        title: The heading.

    Raises:
        ValueError: The models have scored different numbers of records, or none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_scored(scored)
    lines = [line for i in range(len(next(iter(scored.values())))) for line in _lines(i, scored)]
    heights = [0.8]  # of the middle of each line, from the top
    for following, _ in lines[1:]:
        heights.append(heights[-1] + (0.27 if following == "" else 0.42 if following == "prompt" else 0.3))
    height = heights[-1] + 0.35
    figure = Figure(figsize=(_NAMES + _LINE + 0.2, height), dpi=110)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _NAMES + _LINE + 0.2), ylim=(height, 0))
    axes.axis("off")
    figures = [f"{name} {summary(found)['loss']:.2f}" for name, found in scored.items()]
    axes.text(0.15, 0.32, title, fontsize=13, fontweight="bold", color="#1f2328", va="center")
    shown = f"nats per token: {', '.join(figures)}"
    axes.text(_NAMES + _LINE, 0.32, shown, fontsize=9.5, color="#6b7280", va="center", ha="right")
    for y, (name, tokens) in zip(heights, lines, strict=True):
        axes.text(0.15, y, name, fontsize=9, color="#6b7280", va="center")
        _draw_line(axes, y, tokens)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _lines(index: int, scored: Mapping[str, Scored]) -> list[tuple[str, list[TokenScore]]]:
    """The lines of one record; one that is too long goes on in a line without a name."""
    first = next(iter(scored.values()))[index]
    rows = [("prompt", list(first[: prompt_length(first)]))]
    rows += [(name, list(found[index][prompt_length(found[index]) :])) for name, found in scored.items()]
    lines: list[tuple[str, list[TokenScore]]] = []
    for name, tokens in rows:
        lines.append((name, []))
        used = 0.0
        for token in tokens:
            if used + _width(token) > _LINE and lines[-1][1]:
                lines.append(("", []))
                used = 0.0
            lines[-1][1].append(token)
            used += _width(token) + _GAP
    return lines


def _width(token: TokenScore) -> float:
    return _LETTER * len(token.text) + 0.14


def _draw_line(axes: Any, y: float, tokens: Sequence[TokenScore]) -> None:
    from matplotlib.patches import FancyBboxPatch

    x = _NAMES
    for token in tokens:
        shade = tuple(c / 255 for c in colour(token.prob))
        box = {"boxstyle": "round,pad=0,rounding_size=0.05", "linewidth": 0, "facecolor": shade}
        axes.add_patch(FancyBboxPatch((x, y - 0.12), _width(token), 0.24, **box))
        ink = "#4b5563" if token.prob is None else "#1f2328"
        label = {"fontsize": 10, "family": "monospace", "color": ink, "va": "center_baseline", "ha": "center"}
        axes.text(x + _width(token) / 2, y - 0.012, token.text.replace("$", r"\$"), **label)
        if token.prob is not None and not token.is_first_choice:
            span = (x + 0.05, x + _width(token) - 0.05)
            axes.plot(
                span, (y + 0.095, y + 0.095), color="#1f2328", alpha=0.7, linewidth=1, linestyle=(0, (3, 2))
            )
        x += _width(token) + _GAP


def png(image: np.ndarray) -> bytes:
    """A picture ``[height, width, 3]`` as the bytes of a PNG file."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image, format="png")
    return buffer.getvalue()
