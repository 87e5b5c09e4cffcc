"""The log of a run: a row for every line, as CSV, TensorBoard events, or to Weights & Biases or Trackio.

A run that goes on from a checkpoint drops the rows that were logged after it; Weights & Biases keeps them.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from google.protobuf.message import DecodeError
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HParam,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    Summary,
)
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from agents.runs.tensorboard import LAYOUT, Settings, describe
from reward_models.names import shorten
from reward_models.warning import warn
from textrl_env.errors import check_choice

#: Bytes of length and checksums around a record of events.
_FRAME = 16
PROGRESS, EVENTS = "progress.csv", "events.out.tfevents."
_STEPS = "time/total_timesteps"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the disk name what was being written; those of a full one do not by themselves."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


class _CSV(CSVOutputFormat):
    """stable-baselines3's CSV, going on after the rows that are there; new columns come in one step."""

    def __init__(self, file: Path, resume_at: int) -> None:
        rows = _rows_until(file, resume_at)
        self.path, self.keys = file, list(rows[0]) if rows else []
        self.separator, self.quotechar = ",", '"'
        with _naming(file):
            self._replace(rows)

    def _replace(self, rows: Sequence[dict[str, str]]) -> None:
        """Put a file with these rows in the place of the one that is there."""
        scratch = self.path.with_suffix(".tmp")
        with scratch.open("w", newline="", encoding="utf-8") as stream:
            if self.keys:
                writer = csv.DictWriter(stream, self.keys, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        os.replace(scratch, self.path)
        self.file = open(self.path, "r+", encoding="utf-8")  # noqa: SIM115 -- close() closes it
        self.file.seek(0, os.SEEK_END)

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Write a row; what is measured before anything has been learned has none, and goes to TensorBoard alone."""
        if _STEPS not in key_values:
            return
        shown = filter_excluded_keys(key_values, key_excluded, "csv")
        fresh = [name for name in shown if name not in self.keys]
        with _naming(self.path):
            if fresh:
                self.file.close()
                rows = list(_rows(self.path)) if self.keys else []
                self.keys += fresh
                self._replace(rows)
            super().write(key_values, key_excluded, step)

    def close(self) -> None:
        with _naming(self.path):
            super().close()


def _rows_until(file: Path, timesteps: int) -> list[dict[str, str]]:
    """The rows logged up to a checkpoint; what came after it will be logged again."""
    rows: list[dict[str, str]] = []
    if file.is_file():
        try:
            for row in _rows(file):
                if _STEPS not in row:
                    raise ValueError(f"{file} has no column {_STEPS!r}")
                if float(row[_STEPS] or 0) <= timesteps:
                    rows.append(row)
        except ValueError as error:  # a log is no reason not to go on
            warn(f"{error}; the {len(rows)} rows before it are kept")
    return rows


def _rows(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a log, cells by column; a last line without its end is still being written, and is left out.

    Raises:
        ValueError: The file, line and column of the first thing that is no log.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            text = stream.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: byte {error.start} is not UTF-8") from None
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]), strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            place = f"{file}, line {reader.line_num}"
            if not names:
                names = cells
                if not names or len(set(names)) < len(names):
                    raise ValueError(f"{place}: expected the names of different columns")
                continue
            if len(cells) != len(names):
                raise ValueError(f"{place}: {len(cells)} cells, and line 1 names {len(names)} columns")
            for name, cell in zip(names, cells, strict=True):
                try:
                    float(cell or 0)
                except ValueError:
                    raise ValueError(f"{place}, column {name!r}: {shorten(cell)} is no number") from None
            yield dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from None


class _Describing:
    """A writer of events that says of each tag what it means; TensorBoard takes that from the first event of a tag."""

    #: The plugin that shows a value, without which readers of event files warn of its metadata, and the class of its
    #: data, without which TensorBoard's fast loader overwrites them.
    _SHOWN_BY: ClassVar[dict[str, tuple[str, int]]] = {
        "simple_value": ("scalars", DATA_CLASS_SCALAR),
        "histo": ("histograms", DATA_CLASS_TENSOR),
        "image": ("images", DATA_CLASS_BLOB_SEQUENCE),
    }

    def __init__(self, file_writer: FileWriter) -> None:
        self._file_writer = file_writer
        self._described: set[str] = set()

    def add_summary(
        self, summary: Summary, global_step: int | None = None, walltime: float | None = None
    ) -> None:
        for value in summary.value:
            meaning = "" if value.tag in self._described else describe(value.tag)
            if meaning:
                self._described.add(value.tag)
                value.metadata.summary_description = meaning
                shown_by = self._SHOWN_BY.get(value.WhichOneof("value"))
                if shown_by is not None:  # texts bring theirs
                    value.metadata.plugin_data.plugin_name, value.metadata.data_class = shown_by
        self._file_writer.add_summary(summary, global_step, walltime)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file_writer, name)


class _TensorBoard(TensorBoardOutputFormat):
    """stable-baselines3's TensorBoard events, without those after the checkpoint that a run resumes from."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        self.folder = folder
        with _naming(folder):
            for file in sorted(
                folder.glob(f"{EVENTS}*")
            ):  # of a run that begins anew, those of the one before
                _forget_events(file, resume_at)
            # Tells a TensorBoard that is already open to forget them too.
            purge_step = resume_at + 1 if resume_at else None
            self.writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step)
            self.writer.file_writer = _Describing(self.writer.file_writer)
            self.writer.add_custom_scalars(LAYOUT)
        self._is_closed = False

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        settings = [name for name, value in key_values.items() if isinstance(value, Settings)]
        rest = {name: value for name, value in key_values.items() if name not in settings}
        with _naming(self.folder):
            for name in settings:
                for summary in key_values[name].summaries():
                    self.writer.file_writer.add_summary(summary)
            super().write(rest, {name: key_excluded[name] for name in rest}, step)

    def close(self) -> None:
        with _naming(self.folder):
            super().close()


def read_events(file: Path) -> tuple[list[Event], int]:
    """What TensorBoard can read of a file of events, and how many bytes behind it can not be read.

    It stops at the first record that is damaged, or that a kill has cut off, without a word.
    """
    events, read = [], 0
    for record in RawEventFileLoader(str(file)).Load():
        try:
            events.append(Event.FromString(record))
        except DecodeError:
            break
        read += len(record) + _FRAME
    return events, file.stat().st_size - read


def _forget_events(file: Path, timesteps: int) -> None:
    """Take the events after a checkpoint out of a file: they will be written again.

    TensorBoard hides only numbers for which it is told that a run went back; texts would stand there twice. What lies
    behind a record that a kill has cut off cannot be read and goes too.
    """
    events, _ = read_events(file)
    kept = [event for event in events if event.step <= timesteps and not event.HasField("session_log")]
    if len(kept) == len(events):
        return
    scratch = file.with_name(f".{file.name}.new")
    with scratch.open("wb") as stream:
        writer = RecordWriter(stream)
        for event in kept:
            writer.write(event.SerializeToString())
    os.replace(scratch, file)


class _Tracker(KVWriter):
    """The settings and the numbers of every row to a tracker that has runs with ``config``, ``log`` and ``finish``."""

    run: Any
    #: How its ``config.update`` is told that a run that goes on may have other settings.
    may_change: ClassVar[dict[str, bool]] = {}

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        numbers = {
            name: value for name, value in key_values.items() if isinstance(value, int | float | np.number)
        }
        for value in key_values.values():
            if isinstance(value, HParam):
                self.run.config.update(value.hparam_dict, **self.may_change)
        if numbers:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class _WandB(_Tracker):
    """Weights & Biases, which keeps its settings in the environment (WANDB_PROJECT, WANDB_MODE, ...)."""

    may_change: ClassVar[dict[str, bool]] = {"allow_val_change": True}

    def __init__(self, folder: Path, resume_at: int) -> None:
        import wandb

        self.run = wandb.init(
            dir=str(folder), name=folder.resolve().name, resume="allow" if resume_at else None
        )


class _Trackio(_Tracker):
    """Trackio, into the project that TRACKIO_PROJECT names; other settings are in the environment too."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        import trackio

        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "textrl"),
            name=folder.resolve().name,
            resume="allow" if resume_at else "never",
        )


#: Where a log can go, by the names of ``report_to``.
_OUTPUTS: dict[str, Callable[[Path, int], KVWriter]] = {
    "csv": lambda folder, resume_at: _CSV(folder / PROGRESS, resume_at),
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}
#: Those that are packages of their own.
_TRACKERS = ("wandb", "trackio")


def report_names(report_to: str | Sequence[str]) -> list[str]:
    """The names in ``report_to``, a list or a text with commas between them."""
    listed = report_to.split(",") if isinstance(report_to, str) else report_to
    return [name.strip() for name in listed]


def check_reports(names: Sequence[str]) -> None:
    """Raise for a place that a log cannot go to, before anything is done.

    Raises:
        ValueError: An unknown name, or "none" beside others.
        ImportError: A tracker that is not installed.
    """
    for name in names:
        check_choice("report_to", name, [*_OUTPUTS, "none"])
        if name in _TRACKERS and not _is_installed(name):
            raise ImportError(f"report_to={name!r} needs the package {name}: pip install {name}")
    if "none" in names and len(names) > 1:
        raise ValueError(f"report_to={','.join(names)!r} says none and more; give one or the other")


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def open_logger(
    folder: Path, resume_at: int = 0, report_to: Sequence[str] = ("csv", "tensorboard")
) -> Logger:
    """stable-baselines3's logger into a folder: progress.csv and TensorBoard events, or what ``report_to`` names.

    Args:
        folder: The run directory.
        resume_at: Timesteps of the checkpoint that the run goes on from; later rows are dropped.
        report_to: Any of "csv", "tensorboard", "wandb" and "trackio"; "none" is nowhere.

    Raises:
        ValueError: An unknown name.
        ImportError: A tracker that is not installed.
    """
    check_reports(report_to)
    folder.mkdir(parents=True, exist_ok=True)
    return Logger(str(folder), [_OUTPUTS[name](folder, resume_at) for name in report_to if name != "none"])


def read_progress(folder: Path) -> dict[str, list[float]]:
    """The columns of progress.csv as numbers, NaN where a row has none.

    Raises:
        ValueError: It is no log; the message names file, line and column.
    """
    rows = list(_rows(folder / PROGRESS))
    names = rows[0].keys() if rows else ()
    return {name: [float(row[name]) if row[name] else float("nan") for row in rows] for name in names}
