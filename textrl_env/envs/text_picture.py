"""The picture of ``TextRLHF-v0``: a prompt, and the tokens that have been written in answer to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from textrl_env.envs.canvas import (
    BLUE,
    CARD,
    GREEN,
    LINE,
    ORANGE,
    PALE_BLUE,
    PALE_ORANGE,
    QUIET,
    Canvas,
    wrapped,
)

WIDTH, HEIGHT = 640, 412
_SIZE, _LINE_HEIGHT = 15, 24
#: Lines of prompt and of response that there is room for.
_PROMPT_LINES, _RESPONSE_LINES = 4, 7


def token_texts(tokenizer: Any, tokens: np.ndarray) -> list[str]:
    """What each token adds to the text; decoded together, since a space or an accent may belong to two of them."""
    pieces, shown = [], 0
    for n in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:n], skip_special_tokens=False)
        # A character that its bytes have not completed is shown with the token that completes it.
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        pieces.append(text[shown:])
        shown = max(shown, len(text))
    return pieces


def draw_response(prompt: str, pieces: list[str], budget: int, kl: float, over: bool) -> np.ndarray:
    """Draw one slot.

    Args:
        prompt: Its text.
        pieces: The text of each token written so far.
        budget: The most tokens that may be written.
        kl: Sum of the KL so far, in nats.
        over: Whether the response has ended.

    Returns:
        uint8 ``[412, 640, 3]``.
    """
    canvas = Canvas(WIDTH, HEIGHT)
    _panel(canvas, 16, 16, "PROMPT", [prompt], _PROMPT_LINES, [None])
    tints = [PALE_BLUE, PALE_ORANGE]  # neighbours differ, so that one sees where a token ends
    colours = [tints[i % 2] for i in range(len(pieces))]
    _panel(canvas, 16, 146, "RESPONSE", pieces or ["..."], _RESPONSE_LINES, colours or [None])
    full = WIDTH - 32
    canvas.rectangle(16, HEIGHT - 44, 16 + full, HEIGHT - 36, LINE, 4)
    if pieces:
        end = 16 + max(full * min(len(pieces) / budget, 1.0), 8)
        canvas.rectangle(16, HEIGHT - 44, end, HEIGHT - 36, GREEN if over else BLUE, 4)
    canvas.text(16, HEIGHT - 28, f"{len(pieces)} of {budget} tokens{', ended' if over else ''}", 12, QUIET)
    canvas.text(WIDTH - 16, HEIGHT - 28, f"KL so far {kl:.2f} nats", 12, ORANGE if kl > 0 else QUIET, "ra")
    return canvas.array()


def _panel(
    canvas: Canvas, left: float, top: float, title: str, pieces: list[str], room: int, tints: list[Any]
) -> None:
    """A card with a title and wrapped text, each piece on its tint; the last lines, where there are too many."""
    right, height = WIDTH - 16, room * _LINE_HEIGHT + (10 if room == _PROMPT_LINES else 24)
    canvas.rectangle(left, top + 12, right, top + 12 + height, CARD, 10, LINE)
    canvas.rectangle(left + 12, top, left + 24 + canvas.text_width(title, 11, True), top + 22, CARD, 6, LINE)
    canvas.text(left + 18, top + 11, title, 11, QUIET, "lm", bold=True)
    lines = wrapped(canvas, pieces, right - left - 36, _SIZE)
    if len(lines) > room:
        lines = lines[-room:]
        canvas.text(right - 14, top + 26, f"the last {room} lines", 10, QUIET, "rt")
    for row, line in enumerate(lines):
        y = top + 28 + row * _LINE_HEIGHT
        for x, text, number in line:
            x += left + 18
            if tints[number] is not None:
                canvas.rectangle(x, y - 1, x + canvas.text_width(text, _SIZE), y + 20, tints[number], 3)
            canvas.text(x, y, text, _SIZE)
