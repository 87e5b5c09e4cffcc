"""Prompts and other training data, from lists, files and datasets, checked row by row.

    prompts = load_prompts("prompts.jsonl")                       # for the environments
    pairs = load_records("pairs.jsonl", ("prompt", "chosen", "rejected"))   # for training on files

A source is a list of texts, message lists or dicts; a path to .jsonl, .json, .csv, .parquet or .txt (one text
per line); or a ``datasets.Dataset``. Every error names the place: "prompts.jsonl, line 7: ...".

Left out on purpose: shuffling and splitting, and the chat template (which belongs to a tokenizer). How files
are read is :mod:`textrl_env.data.rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_models.base import RESERVED
from textrl_env.data.rows import BadRow, describe, read_rows, source_name
from textrl_env.errors import did_you_mean


@dataclass(frozen=True)
class RecordSet:
    """Rows of a data set, column by column.

    Attributes:
        columns: Each column by name, one entry for each row; None where a row does not have it.
        skipped: What was wrong with the rows that were left out.
    """

    columns: dict[str, list[Any]]
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, column: str) -> list[Any]:
        if column not in self.columns:
            raise KeyError(f"no column {column!r}. {did_you_mean(column, self.columns)}")
        return self.columns[column]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows as dicts, in order."""
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))


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
            any other columns; a path to .jsonl, .json, .csv, .parquet or .txt; or a ``datasets.Dataset``.
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
    texts = [prompt if isinstance(prompt, str) else _readable(prompt) for prompt in prompts]
    return PromptSet(texts, columns, messages if any(messages) else None, records.skipped)


def load_records(
    source: Any,
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    skip_bad_rows: bool = False,
    name: str = "data",
) -> RecordSet:
    """Load rows and check their columns.

    What a column may hold goes by its name: ``prompt`` is a text that is not empty or a message list;
    ``completion``, ``chosen`` and ``rejected`` a text (an answer may be empty) or a message list;
    ``messages`` a message list; ``label`` a bool, or 0 or 1. Any other column may hold anything.

    Args:
        source: As in :func:`load_prompts`. Where rows are mere texts, they are the one required column.
        required: Columns that every row must have.
        optional: Columns that are checked where they are there. All other columns are kept as they are.
        skip_bad_rows: Leave bad rows out, and say in ``skipped`` what was wrong with each.
        name: What errors call a source that is no file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A row is bad, or there is none; the message names the place.
        TypeError: Not something that can be loaded from.
    """
    only = required[0] if len(required) == 1 else None
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for where, row in read_rows(source, name, only):
        problem = row.reason if isinstance(row, BadRow) else _check_row(row, required, optional)
        if problem is None:
            rows.append(row)
        elif skip_bad_rows:
            skipped.append(f"{where}{problem}")
        else:
            raise ValueError(f"{where}{problem}")
    if not rows:
        why = f" but bad rows ({skipped[0]})" if skipped else ""
        raise ValueError(f"{source_name(source, name)}: there is nothing in it{why}")
    names = dict.fromkeys([*required, *(column for row in rows for column in row)])
    return RecordSet({column: [row.get(column) for row in rows] for column in names}, skipped)


# -- one row --------------------------------------------------------------------------------------------


def _check_row(row: dict[str, Any], required: Sequence[str], optional: Sequence[str]) -> str | None:
    """What is wrong with a row, to be put behind its place, or None; tidies ``label`` up in place."""
    for column in required:
        if row.get(column) is None:
            if column in row:
                return f", column {column!r}: it is empty"
            there = ", ".join(repr(key) for key in row) or "nothing"
            return (
                f": there is no column {column!r}, only {there}. {did_you_mean(column, row) if row else ''}"
            )
    for column in (*required, *optional):
        if row.get(column) is None or column not in _COLUMN_CHECKS:
            continue
        problem = _COLUMN_CHECKS[column](row[column])
        if problem is not None:
            return f", column {column!r}: {problem}"
        if column == "label":
            row[column] = _label(row[column])
    return None


def _check_text(value: Any) -> str | None:
    if isinstance(value, str):
        return None
    if isinstance(value, list | tuple):
        return _check_messages(value)
    return f"expected a text or a list of messages, got {describe(value)}"


def _check_prompt(value: Any) -> str | None:
    if isinstance(value, str) and not value.strip():
        return "the text is empty"
    return _check_text(value)


def _check_messages(value: Any) -> str | None:
    if not isinstance(value, list | tuple):
        return f"expected a list of messages, got {describe(value)}"
    if not value:
        return "the list of messages is empty"
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            return f"message {i}: expected {{'role': ..., 'content': ...}}, got {describe(message)}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                came = describe(message[key]) if key in message else f"only {sorted(message)}"
                return f"message {i}: expected a text as {key!r}, got {came}"
    return None


def _label(value: Any) -> bool | None:
    """A label as a bool, or None if it is none."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str):
        return words.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


def _check_label(value: Any) -> str | None:
    return f"expected true or false (or 1, 0), got {describe(value)}" if _label(value) is None else None


#: What a column of this name may hold: functions that return what is wrong, or None.
_COLUMN_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "prompt": _check_prompt,
    "completion": _check_text,
    "chosen": _check_text,
    "rejected": _check_text,
    "messages": _check_messages,
    "label": _check_label,
}


def _readable(messages: Sequence[Mapping[str, str]]) -> str:
    """A message list as text for people: the content alone if there is one message."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
