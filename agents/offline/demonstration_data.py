"""Demonstrations: what supervised fine-tuning learns from, in each of the forms that people have them in.

A record is ``{"messages": [...]}``, ``{"prompt", "completion"}`` (texts, or message lists on either side) or
``{"text"}``; a file may mix them. A mere text (a line of a .txt file) is ``{"text"}``.
"""

from __future__ import annotations

from typing import Any

from reward_models.data.records import load_records

FORMS = (("messages",), ("prompt", "completion"), ("text",))


def load_demonstrations(data: Any, skip_bad_rows: bool = False) -> tuple[list[dict[str, Any]], list[str]]:
    """Records that :func:`agents.offline.sft.encode_demonstration` takes, and what was wrong with those left out.

    Args:
        data: Any source of :mod:`reward_models.data.rows`.
        skip_bad_rows: Leave bad rows out instead of stopping at the first.

    Raises:
        ValueError: A bad row, or none at all; its place is named.
    """
    records = load_records(data, skip_bad_rows=skip_bad_rows, forms=FORMS)
    rows = [{name: value for name, value in row.items() if value is not None} for row in records.rows()]
    return rows, records.skipped
