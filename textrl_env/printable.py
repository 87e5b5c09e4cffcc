"""Text that models and files have written, made safe to show.

Prompts, answers and file names may hold what a terminal or a browser obeys: colours, titles, links, images that are
fetched from elsewhere. Whatever leaves the process passes through here; an HTML page escapes besides.
"""

from __future__ import annotations

import re

#: Controls other than tab and newline, and marks that change the direction of writing.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
#: What means something in Markdown or HTML.
_MARKUP = re.compile(r"[&<>!\[\]*_`~|\\]")


def printable(text: str) -> str:
    r"""The text with every control character written out, as ``\x1b`` for an escape."""
    return _OBEYED.sub(lambda match: ascii(match[0])[1:-1], text)


def markdown_cell(text: str) -> str:
    """The text as a cell of a Markdown table that shows it letter by letter, in one line.

    ``html.unescape`` reads it back.
    """
    one_line = printable(text.replace("\n", " "))
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", one_line)
