"""Rows from lists, files and datasets, each with the place it stands in, for errors that can be acted on.

Reads .jsonl, .json, .csv, .parquet and .txt (one text per line). A row that cannot be read is handed out as a
:class:`BadRow`, so that the caller can stop at it or leave it out; a file that cannot be read at all raises.

Left out on purpose: downloading, and compressed files. Cells of a .csv file stay texts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textrl_env.errors import did_you_mean


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be read."""

    reason: str


#: A place ("prompts.jsonl, line 7") and what stands there.
Row = tuple[str, dict[str, Any] | BadRow]


def describe(value: Any) -> str:
    """The type and the beginning of a value, for errors."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def source_name(source: Any, name: str) -> str:
    """What errors call a source: a file by its own name."""
    return Path(source).name if isinstance(source, str | Path) else name


def read_rows(source: Any, name: str, only: str | None) -> Iterable[Row]:
    """Rows, each with its place.

    Args:
        source: A list, a dict of columns, a path, or a ``datasets.Dataset``.
        name: What places are called in a source that is no file.
        only: The column that a row is which is a mere text or list; None if rows have to be dicts.
    """
    if isinstance(source, str | Path):
        return _read_file(Path(source).expanduser(), only)
    if isinstance(source, Mapping):
        return _read_columns(source, name)
    if type(source).__module__.split(".")[0] == "datasets" or isinstance(source, Sequence):
        return ((f"{name}[{i}]", _as_row(item, only)) for i, item in enumerate(source))
    raise TypeError(
        f"{name} has to be a list of texts or dicts, a path to one of {', '.join(_READERS)}, "
        f"or a datasets.Dataset; got {describe(source)}"
    )


def _as_row(item: Any, only: str | None) -> dict[str, Any] | BadRow:
    if isinstance(item, Mapping):
        return dict(item)
    if only is None:
        return BadRow(f": expected a dict of columns, got {describe(item)}")
    if isinstance(item, str | list | tuple):
        return {only: item}
    return BadRow(f": expected a text, a list of messages or a dict, got {describe(item)}")


def _read_columns(columns: Mapping[str, Any], name: str) -> Iterator[Row]:
    """A dict of columns, as in ``Dataset.to_dict()``."""
    if _is_dataset_dict(columns):
        raise TypeError(f"{name} holds several splits ({', '.join(columns)}); give one of them")
    lengths = {}
    for column, values in columns.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name}: a dict has to hold columns (lists), got {column!r}: {describe(values)}")
        lengths[column] = len(values)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{name}: the columns differ in length: {lengths}")
    for i, values in enumerate(zip(*columns.values(), strict=True)):
        yield f"{name}[{i}]", dict(zip(columns, values, strict=True))


def _is_dataset_dict(source: Any) -> bool:
    return type(source).__name__ in ("DatasetDict", "IterableDatasetDict")


def _read_file(path: Path, only: str | None) -> Iterable[Row]:
    if not path.is_file():
        raise FileNotFoundError(_no_such_file(path))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path.name}: files ending in {path.suffix or 'nothing'!r} cannot be read; "
            f"expected one of {', '.join(_READERS)}"
        )
    return reader(path, only)


def _no_such_file(path: Path) -> str:
    if path.is_dir():
        files = [entry.name for entry in path.iterdir() if entry.suffix.lower() in _READERS]
        inside = f" It holds {', '.join(sorted(files)[:10])}." if files else ""
        return f"{str(path)!r} is a folder; expected a file.{inside}"
    parent = path.parent
    if not parent.is_dir():
        return f"there is no file {str(path)!r}, and no folder {str(parent)!r}"
    there = [entry.name for entry in parent.iterdir() if entry.suffix.lower() in _READERS]
    nearest = did_you_mean(path.name, there) if there else f"{str(parent)!r} holds no data file."
    return f"there is no file {str(path)!r} (a single prompt goes into a list: [prompt]). {nearest}"


def _text_of_file(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path.name}, line {line}: not UTF-8 text ({error.reason})") from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its place; only line ends of text files count as such."""
    for number, line in enumerate(_text_of_file(path).replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield f"{path.name}, line {number}", line


def _read_txt(path: Path, only: str | None) -> Iterator[Row]:
    if only is None:
        raise ValueError(f"{path.name}: a .txt file holds one text per line, but several columns are needed")
    for where, line in _lines(path):
        yield where, {only: line}


def _read_jsonl(path: Path, only: str | None) -> Iterator[Row]:
    for where, line in _lines(path):
        try:
            yield where, _as_row(json.loads(line), only)
        except json.JSONDecodeError as error:
            yield where, BadRow(f": not JSON: {error.msg} at character {error.colno}")


def _read_json(path: Path, only: str | None) -> Iterator[Row]:
    try:
        content = json.loads(_text_of_file(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path.name}, line {error.lineno}: not JSON: {error.msg} at character {error.colno} "
            "(one object per line goes into a .jsonl file)"
        ) from error
    if isinstance(content, dict):
        yield from _read_columns(content, path.name)
    elif isinstance(content, list):
        for i, item in enumerate(content):
            yield f"{path.name}, item {i}", _as_row(item, only)
    else:
        raise ValueError(f"{path.name}: expected a list of rows, got {describe(content)}")


def _read_csv(path: Path, only: str | None) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_text_of_file(path), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path.name}, line {reader.line_num}"
            if None in row:
                yield (
                    where,
                    BadRow(f": {len(row[None])} more cells than the {len(row) - 1} columns of line 1"),
                )
            else:
                yield where, row
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path, only: str | None) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            f"{path.name}: reading .parquet needs pyarrow: pip install 'textrl-env[data]'"
        ) from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: not a parquet file: {error}") from error
    for i, row in enumerate(table.to_pylist()):
        yield f"{path.name}, row {i}", row


_READERS: dict[str, Callable[[Path, str | None], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
