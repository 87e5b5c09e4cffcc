"""Prompts for the environments, from lists, files and datasets, checked row by row.

    prompts = load_prompts("prompts.jsonl")

A source is a list of texts, message lists or dicts; a path to .jsonl, .json, .csv, .parquet or .txt (one text per
line); a folder that ``datasets`` saved; or its ``Dataset`` or ``IterableDataset``. Every error names the place:
"prompts.jsonl, line 7: ...". Reading and checking are those of :mod:`reward_models.data`, as for all training data.

Left out on purpose: shuffling and splitting, and the chat template (which belongs to a tokenizer).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reward_models.base import RESERVED
from reward_models.data.chat import readable
from reward_models.data.records import RecordSet, load_records
from reward_models.data.rows import source_name

__all__ = ["PromptSet", "RecordSet", "load_prompts", "load_records"]


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and what came with them.

    Attributes:
        texts: One text for each prompt; of a message list, a readable rendering without any chat template.
        columns: The other columns by name, one entry for each prompt; rewards receive them as keywords.
        messages: For each prompt its message list, or None where it is a text; None if all are texts.
        skipped: What was wrong with the rows that were left out.
    """

    texts: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    messages: list[list[dict[str, Any]] | None] | None = None
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)


def load_prompts(source: Any, name: str = "prompts", skip_bad_rows: bool = False) -> PromptSet:
    """Load prompts and the columns that come with them.

    Args:
        source: A list of texts, of message lists, or of dicts with a ``prompt`` (text or message list) and
            any other columns; a path; or a dataset of ``datasets``. See the module's docstring.
        name: What errors call a source that is no file.
        skip_bad_rows: Leave bad rows out, and say in ``skipped`` what was wrong with each.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A row is bad, or there is none; the message names the place.
        TypeError: Not something that prompts can be loaded from.
    """
    if isinstance(source, PromptSet):
        return source
    records = load_records(source, ("prompt",), name=name, skip_bad_rows=skip_bad_rows)
    columns = dict(records.columns)
    prompts = columns.pop("prompt")
    for column in columns:
        if column in RESERVED:
            raise ValueError(
                f"{source_name(source, name)}: a column of prompts cannot be called {column!r}, because "
                f"rewards receive {', '.join(RESERVED)} themselves; rename it"
            )
    messages = [None if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = [prompt if isinstance(prompt, str) else readable(prompt) for prompt in prompts]
    return PromptSet(texts, columns, messages if any(messages) else None, records.skipped)
