"""A canvas for the pictures that environments draw of themselves (``render_mode="rgb_array"``).

Shapes and text are drawn at twice the size and scaled down, so that their edges are smooth. Pillow and the fonts of
matplotlib are loaded with the first picture, not with the package.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

Colour = tuple[int, int, int]

PAPER: Colour = (250, 248, 243)
CARD: Colour = (255, 255, 255)
LINE: Colour = (216, 211, 199)
INK: Colour = (44, 48, 58)
QUIET: Colour = (128, 131, 140)
BLUE: Colour = (70, 116, 186)
PALE_BLUE: Colour = (221, 231, 246)
GREEN: Colour = (66, 160, 106)
ORANGE: Colour = (222, 98, 60)
PALE_ORANGE: Colour = (251, 228, 217)

_SCALE = 2


class Canvas:
    """An image to draw on; lengths are in pixels of the finished picture, from its upper left corner.

    Args:
        width: Pixels.
        height: Pixels.
        background: Colour of the empty canvas.
    """

    def __init__(self, width: int, height: int, background: Colour = PAPER) -> None:
        from PIL import Image, ImageDraw

        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), background)
        self._draw = ImageDraw.Draw(self._image)

    def rectangle(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        fill: Colour,
        radius: float = 0.0,
        outline: Colour | None = None,
    ) -> None:
        """A filled rectangle, its corners rounded by ``radius``."""
        corners = [x * _SCALE for x in (left, top, right, bottom)]
        width = 0 if outline is None else _SCALE
        self._draw.rounded_rectangle(corners, radius * _SCALE, fill, outline, width)

    def disc(self, x: float, y: float, radius: float, fill: Colour) -> None:
        """A filled circle around (x, y)."""
        self._draw.circle((x * _SCALE, y * _SCALE), radius * _SCALE, fill)

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * _SCALE, y * _SCALE) for x, y in points], fill)

    def line(
        self, start: tuple[float, float], end: tuple[float, float], fill: Colour, width: float = 1
    ) -> None:
        """A straight line."""
        points = [tuple(z * _SCALE for z in point) for point in (start, end)]
        self._draw.line(points, fill, round(width * _SCALE))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = 13,
        fill: Colour = INK,
        anchor: str = "la",
        bold: bool = False,
    ) -> None:
        """One line of text at (x, y); ``anchor`` says which of its points that is, as Pillow has it."""
        self._draw.text((x * _SCALE, y * _SCALE), text, fill, _font(size, bold), anchor)

    def text_width(self, text: str, size: int = 13, bold: bool = False) -> float:
        """How wide a line of text is, in pixels."""
        return self._draw.textlength(text, _font(size, bold)) / _SCALE

    def array(self) -> np.ndarray:
        """The picture, uint8 ``[height, width, 3]``."""
        from PIL import Image

        return np.array(self._image.resize((self.width, self.height), Image.Resampling.BOX))


@functools.cache
def _font(size: int, bold: bool) -> Any:
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size * _SCALE)


def bars(
    canvas: Canvas,
    box: tuple[float, float, float, float],
    values: np.ndarray,
    labels: list[str],
    colours: list[Colour],
    number: str = "{:.2f}",
) -> None:
    """Upright bars from a line at zero, each with its label below and its value beside its end.

    Args:
        canvas: To draw on.
        box: left, top, right, bottom.
        values: ``[n]``.
        labels: ``n`` texts.
        colours: ``n`` colours.
        number: How a value is written.
    """
    left, top, right, bottom = box
    top, bottom = top + 16, bottom - 32  # room for values above and below, and for labels
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (bottom - top) / ((high - low) or 1.0)
    zero = top + high * scale
    step = (right - left) / len(values)
    size = 11 if step >= 34 else 9 if step >= 26 else 0
    for i, value in enumerate(values):
        x, end = left + (i + 0.5) * step, zero - value * scale
        half = min(0.36 * step, 22)
        canvas.rectangle(x - half, min(zero, end), x + half, max(zero, end) + 0.5, colours[i])
        if size:
            above = value >= 0
            y = end - 3 if above else end + 3
            canvas.text(x, y, number.format(value), size, QUIET, "mb" if above else "mt")
            canvas.text(x, bottom + 18, labels[i], size + 1, INK, "mt")
    canvas.line((left, zero), (right, zero), LINE)


def wrapped(canvas: Canvas, pieces: list[str], width: float, size: int) -> list[list[tuple[float, str, int]]]:
    """Break pieces of one text into lines no wider than ``width``.

    Args:
        canvas: Whose font measures them.
        pieces: The text in order, a line break as a newline within.
        width: Pixels.
        size: Of the font.

    Returns:
        Lines of (x, text, number of the piece).
    """
    lines: list[list[tuple[float, str, int]]] = [[]]
    x = 0.0
    for number, piece in enumerate(pieces):
        for i, part in enumerate(piece.split("\n")):
            if i:
                lines.append([])
                x = 0.0
            for word in _words(canvas, part, width, size):
                long = canvas.text_width(word, size)
                if x > 0 and x + long > width:
                    lines.append([])
                    word = word.lstrip()
                    x, long = 0.0, canvas.text_width(word, size)
                if word:
                    lines[-1].append((x, word, number))
                    x += long
    return lines


def _words(canvas: Canvas, text: str, width: float, size: int) -> list[str]:
    """Words with the space before them; one too long for a line in as many parts as it needs."""
    words: list[str] = []
    for word in text.split(" "):
        word = f" {word}" if words else word
        while canvas.text_width(word, size) > width:
            fits = next(
                n for n in range(len(word), 0, -1) if n == 1 or canvas.text_width(word[:n], size) <= width
            )
            words.append(word[:fits])
            word = word[fits:]
        words.append(word)
    return words
