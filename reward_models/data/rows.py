"""Rows from lists, files and datasets, each with the place it stands in, for errors that can be acted on.

Reads .jsonl (.ndjson), .json, .csv, .tsv, .parquet, .txt (one text per line), folders that ``datasets`` wrote with
``save_to_disk``, and its ``Dataset`` and ``IterableDataset``. A row that cannot be read is handed out as a
:class:`BadRow`, so that the caller can stop at it or leave it out; a file that cannot be read at all raises.

A line of a text file ends at a line feed (with or without a carriage return) and nowhere else: JSON may hold U+2028,
U+2029 and U+0085 inside a string, where ``str.splitlines`` would cut it. Files are UTF-8, or UTF-16 or UTF-32 with
their byte order mark.

Left out: downloading, and compressed files. Cells of a .csv file stay texts.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reward_models.names import did_you_mean


@dataclass(frozen=True)
class BadRow:
    """Why a row cannot be read."""

    reason: str


class Bare(NamedTuple):
    """The columns that rows mean which are no dict of columns: a mere text, or a mere list of messages."""

    text: str
    messages: str


#: A place ("prompts.jsonl, line 7") and what stands there.
Row = tuple[str, dict[str, Any] | BadRow]

#: Byte order marks and what they announce; UTF-32's little-endian mark begins with UTF-16's, so it comes first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
#: What ``save_to_disk`` leaves in the folder of a dataset, and of a dict of splits.
_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"


def describe(value: Any) -> str:
    """The type and the beginning of a value, for errors."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def source_name(source: Any, name: str) -> str:
    """What errors call a source: a file by its own name."""
    return Path(source).name if isinstance(source, str | Path) else name


def read_rows(source: Any, name: str, bare: Bare | None) -> Iterable[Row]:
    """Rows, each with its place.

    Args:
        source: A list or another iterable, a dict of columns, a path, or a dataset of ``datasets``.
        name: What places are called in a source that is no file.
        bare: The columns of rows that are a mere text or list; None if rows have to be dicts.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file cannot be read at all.
        TypeError: Not something that rows can be read from.
    """
    if isinstance(source, str | Path):
        return _read_path(Path(source).expanduser(), bare)
    if isinstance(source, Mapping):
        return _read_columns(source, name)
    package = type(source).__module__.split(".")[0]
    if package in ("pandas", "polars"):
        way = "to_dicts()" if package == "polars" else "to_dict('records')"
        raise TypeError(f"{name} is a {package} {type(source).__name__}; give its rows, frame.{way}")
    if isinstance(source, Iterable) and not isinstance(source, bytes):
        return ((f"{name}[{i}]", _as_row(item, bare)) for i, item in enumerate(source))
    raise TypeError(
        f"{name} has to be a list of texts or dicts, a path to one of {', '.join(_READERS)}, "
        f"or a datasets.Dataset; got {describe(source)}"
    )


def _as_row(item: Any, bare: Bare | None) -> dict[str, Any] | BadRow:
    if isinstance(item, Mapping):
        return dict(item)
    if bare is None:
        return BadRow(f": expected a dict of columns, got {describe(item)}")
    if isinstance(item, str):
        return {bare.text: item}
    if isinstance(item, list | tuple):
        return {bare.messages: item}
    return BadRow(f": expected a text, a list of messages or a dict, got {describe(item)}")


def _read_columns(columns: Mapping[str, Any], name: str) -> Iterator[Row]:
    """A dict of columns, as in ``Dataset.to_dict()``."""
    if type(columns).__name__ in ("DatasetDict", "IterableDatasetDict"):
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


# -- files --------------------------------------------------------------------------------------------------


def _read_path(path: Path, bare: Bare | None) -> Iterable[Row]:
    if (path / _SAVED).is_file() or (path / _SAVED_SPLITS).is_file():
        return _read_saved_dataset(path)
    if not path.is_file():
        raise FileNotFoundError(_no_such_file(path))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path.name}: files ending in {path.suffix or 'nothing'!r} cannot be read; "
            f"expected one of {', '.join(_READERS)}"
        )
    return reader(path, bare)


def _no_such_file(path: Path) -> str:
    if path.is_dir():
        files = [entry.name for entry in path.iterdir() if entry.suffix.lower() in _READERS]
        inside = f" It holds {', '.join(sorted(files)[:10])}." if files else ""
        return f"{str(path)!r} is a folder; expected a file, or a folder that datasets has saved.{inside}"
    parent = path.parent
    if not parent.is_dir():
        return f"there is no file {str(path)!r}, and no folder {str(parent)!r}"
    there = [entry.name for entry in parent.iterdir() if entry.suffix.lower() in _READERS]
    near = did_you_mean(path.name, there) if there else f"{str(parent)!r} holds no data file."
    return f"there is no file {str(path)!r} (a single prompt goes into a list: [prompt]). {near}"


def _read_saved_dataset(path: Path) -> Iterator[Row]:
    if (path / _SAVED_SPLITS).is_file():
        splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        raise ValueError(
            f"{str(path)!r} holds several splits ({', '.join(splits)}); give the folder of one of them"
        )
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{path.name}: a saved dataset needs datasets: pip install 'textrl-env[data]'"
        ) from error
    for i, row in enumerate(datasets.load_from_disk(str(path))):
        yield f"{path.name}, row {i}", row


def _text_of_file(path: Path) -> str:
    data = path.read_bytes()
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        line = data.count(b"\n", 0, error.start) + 1
        column = len(data[start : error.start].decode(encoding, errors="replace")) + 1
        wanted = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise ValueError(
            f"{path.name}, line {line}: not {wanted} text at character {column} ({error.reason}); "
            "save the file as UTF-8"
        ) from error


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its place."""
    return _split_lines(_text_of_file(path), path.name)


def _split_lines(text: str, name: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield f"{name}, line {number}", line


def _read_txt(path: Path, bare: Bare | None) -> Iterator[Row]:
    if bare is None:
        raise ValueError(f"{path.name}: a .txt file holds one text per line, but several columns are needed")
    for where, line in _lines(path):
        yield where, {bare.text: line}


def _read_jsonl(path: Path, bare: Bare | None) -> Iterator[Row]:
    return _json_lines(_text_of_file(path), path.name, bare)


def _json_lines(text: str, name: str, bare: Bare | None) -> Iterator[Row]:
    for where, line in _split_lines(text, name):
        try:
            row = _as_row(json.loads(line), bare)
        except (ValueError, RecursionError) as error:
            row = BadRow(f": {_not_json(error)}")
        yield where, row


def _not_json(error: ValueError | RecursionError) -> str:
    """Why Python cannot read a JSON text, to be put behind its line."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "cannot be read: it is nested too deeply"
    return "cannot be read: it holds a number of more than 4,300 digits"


def _read_json(path: Path, bare: Bare | None) -> Iterator[Row]:
    text = _text_of_file(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a second object after the first: JSON lines, by the name of .json
            yield from _json_lines(text, path.name, bare)
            return
        raise ValueError(
            f"{path.name}, line {error.lineno}: {_not_json(error)} (one object per line goes into a .jsonl file)"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}, line 1 or below: {_not_json(error)}") from None
    if isinstance(content, dict) and not all(isinstance(value, list) for value in content.values()):
        yield f"{path.name}, line 1", content  # a single row
    elif isinstance(content, dict):
        yield from _read_columns(content, path.name)
    elif isinstance(content, list):
        for i, item in enumerate(content):
            yield f"{path.name}, item {i}", _as_row(item, bare)
    else:
        raise ValueError(f"{path.name}: expected a list of rows, got {describe(content)}")


def _read_csv(path: Path, bare: Bare | None) -> Iterator[Row]:
    text = _text_of_file(path)
    header = text.partition("\n")[0]
    # Spreadsheets of countries that write 0,5 put semicolons between the cells.
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    before = csv.field_size_limit(sys.maxsize)  # 131,072 characters otherwise, which a document may exceed
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        for row in reader:
            inside = sum(cell.count("\n") for cell in row.values() if isinstance(cell, str))
            where = f"{path.name}, line {reader.line_num - inside}"  # where the row begins
            if None in row:
                yield (
                    where,
                    BadRow(f": {len(row[None])} more cells than the {len(row) - 1} columns of line 1"),
                )
            else:
                yield where, row
    except csv.Error as error:
        raise ValueError(f"{path.name}, line {reader.line_num}: not CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, bare: Bare | None) -> Iterator[Row]:
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
    try:
        rows = table.to_pylist()
    except ValueError:  # a cell that is no text, in a column of texts
        rows = [_parquet_row(table, i) for i in range(table.num_rows)]
    for i, row in enumerate(rows):
        yield f"{path.name}, row {i}", row


def _parquet_row(table: Any, i: int) -> Any:
    """One row, or why it is none."""
    found = {}
    for name in table.column_names:
        try:
            (found[name],) = table.column(name).slice(i, 1).to_pylist()
        except ValueError as error:
            return BadRow(f", column {name!r}: it cannot be read: {error}")
    return found


_READERS: dict[str, Callable[[Path, Bare | None], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
