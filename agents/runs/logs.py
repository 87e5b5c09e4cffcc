"""The log of a run: a row for every line, as CSV, TensorBoard events, or to Weights & Biases.

A run that goes on from a checkpoint drops the rows that were logged after it.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import logger
from stable_baselines3.common.logger import CSVOutputFormat, KVWriter, Logger, TensorBoardOutputFormat
from torch.utils.tensorboard import SummaryWriter

from reward_models.names import shorten
from textrl_env.errors import check_choice

PROGRESS = "progress.csv"
_STEPS = "time/total_timesteps"


class _CSV(CSVOutputFormat):
    """stable-baselines3's CSV, going on after the rows that are there."""

    def __init__(self, file: Path, resume_at: int) -> None:
        rows = _rows_until(file, resume_at)
        self.keys = list(rows[0]) if rows else []
        self.separator, self.quotechar = ",", '"'
        text = io.StringIO(newline="")
        if rows:
            writer = csv.DictWriter(text, self.keys, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        scratch = file.with_suffix(".tmp")
        scratch.write_text(text.getvalue())
        os.replace(scratch, file)
        self.file = open(file, "r+")  # noqa: SIM115 -- close() closes it
        self.file.seek(0, os.SEEK_END)


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
            logger.warn(f"{error}; the {len(rows)} rows before it are kept")
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


class _TensorBoard(TensorBoardOutputFormat):
    """stable-baselines3's TensorBoard events, hiding those after the checkpoint that a run resumes from."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        purge_step = resume_at + 1 if resume_at else None
        self.writer = SummaryWriter(log_dir=str(folder), purge_step=purge_step)
        self._is_closed = False


class _WandB(KVWriter):
    """Rows to Weights & Biases, which keeps its settings in the environment (WANDB_PROJECT, WANDB_MODE, ...)."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("report_to='wandb' needs wandb: pip install wandb") from error
        self.run = wandb.init(
            dir=str(folder), name=folder.resolve().name, resume="allow" if resume_at else None
        )

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        numbers = {
            name: value for name, value in key_values.items() if isinstance(value, int | float | np.number)
        }
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


#: Where a log can go, by the names of ``report_to``.
_OUTPUTS: dict[str, Callable[[Path, int], KVWriter]] = {
    "csv": lambda folder, resume_at: _CSV(folder / PROGRESS, resume_at),
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
}


def open_logger(
    folder: Path, resume_at: int = 0, report_to: Sequence[str] = ("csv", "tensorboard")
) -> Logger:
    """stable-baselines3's logger into a folder: progress.csv and TensorBoard events, or what ``report_to`` names.

    Args:
        folder: The run directory.
        resume_at: Timesteps of the checkpoint that the run goes on from; later rows are dropped.
        report_to: Any of "csv", "tensorboard" and "wandb"; "none" is nowhere.

    Raises:
        ValueError: An unknown name.
    """
    for name in report_to:
        check_choice("report_to", name, [*_OUTPUTS, "none"])
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
