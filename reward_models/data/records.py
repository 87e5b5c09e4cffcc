"""Records to learn from: rows of any source, their columns checked by what their names promise.

    pairs = load_records("pairs.jsonl", ("prompt", "chosen", "rejected"))
    shown = load_records("chats.parquet", forms=(("messages",), ("prompt", "completion"), ("text",)))

The sources are those of :mod:`reward_models.data.rows`. Every error names the place: "pairs.jsonl, line 7, column
'chosen': ...".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_models.data.chat import (
    problem_in,
    problem_in_settings,
    problem_in_text,
    problem_in_tools,
    split_prompt,
)
from reward_models.data.rows import BadRow, Bare, describe, read_rows, source_name
from reward_models.names import did_you_mean


@dataclass(frozen=True)
class RecordSet:
    """Rows of a data set, column by column.

    Attributes:
        columns: Each column by name, one entry for each row; None where a row does not have it.
        skipped: What was wrong with the rows that were left out.
        places: Where each row stands, for errors: "pairs.jsonl, line 7".
    """

    columns: dict[str, list[Any]]
    skipped: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, column: str) -> list[Any]:
        if column not in self.columns:
            raise KeyError(f"no column {column!r}. {did_you_mean(column, self.columns)}")
        return self.columns[column]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows as dicts, in order; each has every column."""
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))


def load_records(
    source: Any,
    required: Sequence[str] = (),
    optional: Sequence[str] = (),
    skip_bad_rows: bool = False,
    name: str = "data",
    forms: Sequence[Sequence[str]] = (),
) -> RecordSet:
    """Load rows and check their columns.

    What a column may hold goes by its name: ``prompt`` is a text that is not empty or a message list;
    ``completion``, ``chosen``, ``rejected`` and ``text`` a text (an answer may be empty) or, but for ``text``, a
    message list; ``messages`` a message list; ``label``, ``ended``, ``chosen_ended`` and ``rejected_ended`` a bool, or
    0 or 1; ``margin`` a number; beside messages, ``tools`` a list of JSON schemas and ``chat_template_kwargs`` an
    object, or JSON of these. Any other column may hold anything.

    Args:
        source: A list of dicts, a path, a dataset; see :mod:`reward_models.data.rows`. Rows may be mere texts or
            message lists where a form has one column that can hold them.
        required: Columns that every row must have.
        optional: Columns that are checked where they are there. All other columns are kept as they are.
        skip_bad_rows: Leave bad rows out, and tell in ``skipped`` what was wrong with each.
        name: What errors call a source that is no file.
        forms: Instead of ``required``: every row must have all columns of one of these, and the first of which it has
            all is its form.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A row is bad, or there is none; the message names the place.
        TypeError: Not something that can be loaded from.
    """
    forms = forms or (tuple(required),)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    places: list[str] = []
    for where, row in read_rows(source, name, _bare(forms)):
        problem = row.reason if isinstance(row, BadRow) else _check_row(row, forms, optional)
        if problem is None:
            rows.append(row)
            places.append(where)
        elif skip_bad_rows:
            skipped.append(f"{where}{problem}")
        else:
            raise ValueError(f"{where}{problem}")
    if not rows:
        why = f" but bad rows ({skipped[0]})" if skipped else ""
        raise ValueError(f"{source_name(source, name)}: there is nothing in it{why}")
    shared = forms[0] if len(forms) == 1 else ()
    names = dict.fromkeys([*shared, *(column for row in rows for column in row)])
    return RecordSet({column: [row.get(column) for row in rows] for column in names}, skipped, places)


def with_prompts(records: RecordSet, skip_bad_rows: bool = False) -> RecordSet:
    """Comparisons with a prompt each: where there is none, it is what both sides begin with.

    Raises:
        ValueError: Two sides have no beginning in common; the place is named.
    """
    rows, skipped, places = [], list(records.skipped), []
    for where, row in zip(records.places, records.rows(), strict=True):
        if row.get("prompt") is None and row.get("chosen") is not None:
            try:
                sides = split_prompt(row["chosen"], row["rejected"])
            except ValueError as error:
                if not skip_bad_rows:
                    raise ValueError(f"{where}: {error}") from None
                skipped.append(f"{where}: {error}")
                continue
            row = row | dict(zip(("prompt", "chosen", "rejected"), sides, strict=True))
        rows.append(row)
        places.append(where)
    names = dict.fromkeys(column for row in rows for column in row)
    return RecordSet({column: [row.get(column) for row in rows] for column in names}, skipped, places)


def _bare(forms: Sequence[Sequence[str]]) -> Bare | None:
    """The columns that a mere text and a mere list of messages go into, if there are any."""
    alone = [form[0] for form in forms if len(form) == 1]
    if not alone:
        return None
    text = next((column for column in alone if column != "messages"), alone[0])
    return Bare(text, "messages" if "messages" in alone else text)


# -- one row --------------------------------------------------------------------------------------------


def _check_row(
    row: dict[str, Any], forms: Sequence[Sequence[str]], optional: Sequence[str] = ()
) -> str | None:
    """What is wrong with a row, to be put behind its place, or None; tidies flags and numbers up in place."""
    form = next((form for form in forms if all(row.get(column) is not None for column in form)), None)
    if form is None:
        return _missing(row, forms)
    for column in (*form, *optional):
        if row.get(column) is None or column not in _COLUMNS:
            continue
        check, tidy = _COLUMNS[column]
        if row[column] == "" and tidy is not _as_it_is and column in optional:
            row[column] = None  # an empty cell of a .csv file
            continue
        problem = check(row[column])
        if problem is not None:
            return f", column {column!r}: {problem}"
        row[column] = tidy(row[column])
    if any(isinstance(row.get(column), list | tuple) for column in form):  # a template will read them
        for column, check in _FOR_TEMPLATES.items():
            problem = check(row.get(column))
            if problem is not None:
                return f", column {column!r}: {problem}"
    return None


def _missing(row: dict[str, Any], forms: Sequence[Sequence[str]]) -> str:
    there = ", ".join(repr(key) for key in row) or "nothing"
    forms = [form for form in forms if not any(set(other) < set(form) for other in forms)]
    if len(forms) > 1:
        wanted = ", or ".join(" and ".join(repr(column) for column in form) for form in forms)
        strange = [key for key in row if not any(key in form for form in forms)]
        hint = did_you_mean(strange[0], {c for form in forms for c in form}) if strange else ""
        return f": a record has {wanted}; this one has only {there}. {hint}".rstrip()
    column = next(column for column in forms[0] if row.get(column) is None)
    if column in row:
        return f", column {column!r}: it is empty"
    return f": there is no column {column!r}, only {there}. {did_you_mean(column, row) if row else ''}"


def _check_string(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"expected a text, got {describe(value)}"
    return problem_in_text(value)


def _check_text(value: Any) -> str | None:
    if isinstance(value, str):
        return _check_string(value)
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
    return problem_in(value)


def _flag(value: Any) -> bool | None:
    """A flag as a bool, or None if it is none; a .csv file holds texts."""
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str):
        return words.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


def _check_flag(value: Any) -> str | None:
    return f"expected true or false (or 1, 0), got {describe(value)}" if _flag(value) is None else None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _check_number(value: Any) -> str | None:
    number = _number(value)
    return (
        None if number is not None and math.isfinite(number) else f"expected a number, got {describe(value)}"
    )


def _as_it_is(value: Any) -> Any:
    return value


#: What is checked where a row has messages.
_FOR_TEMPLATES = {"tools": problem_in_tools, "chat_template_kwargs": problem_in_settings}
#: What a column of this name may hold: a function that tells what is wrong, and one that tidies up what is right.
_COLUMNS: dict[str, tuple[Callable[[Any], str | None], Callable[[Any], Any]]] = {
    "prompt": (_check_prompt, _as_it_is),
    "completion": (_check_text, _as_it_is),
    "chosen": (_check_text, _as_it_is),
    "rejected": (_check_text, _as_it_is),
    "text": (_check_string, _as_it_is),
    "messages": (_check_messages, _as_it_is),
    "label": (_check_flag, _flag),
    "ended": (_check_flag, _flag),
    "chosen_ended": (_check_flag, _flag),
    "rejected_ended": (_check_flag, _flag),
    "margin": (_check_number, _number),
}
