"""What the verbs that learn from files share: where output may go, progress, the log, and the closing lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textrl_env.printable import printable

#: What is shown of the metrics while training, in this order, and what it is called.
_SHOWN = {
    "train/loss": "loss",
    "train/accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}
_REFRESH_SECONDS = 0.1


class Progress:
    """A bar on a terminal, elsewhere a line for every tenth of the way; on standard error.

    It has the two methods of a stable-baselines3 ``Logger`` that trainers call, so that it can be handed to them as
    one, and hands rows on to a real one.

    Args:
        title: What is being done.
        total: Steps in all, as far as can be told.
        unit: What a step is.
        log_dir: Folder for TensorBoard events and ``progress.csv``; None logs nothing.
        log_interval: Steps between two logged rows.
    """

    def __init__(
        self,
        title: str,
        total: int,
        unit: str = "steps",
        log_dir: str | Path | None = None,
        log_interval: int = 10,
    ) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self.title, self.total, self.unit, self.log_interval = title, total, unit, log_interval
        self.row: dict[str, float] = {}
        self.logger: Any = None
        if log_dir is not None:
            from stable_baselines3.common.logger import configure

            self.logger = configure(str(log_dir), ["csv", "tensorboard"])
        self._bar: Any = None
        self._next_line, self._next_refresh = total / 10, 0.0
        self._start = time.perf_counter()

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[standing]}", style="cyan"),
                TimeRemainingColumn(compact=True),
            )
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(self.title, total=self.total, standing="")
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.logger is not None:
            self.logger.close()

    def record(self, name: str, value: float) -> None:
        """One metric of the row to come."""
        self.row[name] = value

    def dump(self, step: int) -> None:
        """A row is complete."""
        if self.logger is not None and (step == 1 or step % self.log_interval == 0 or step == self.total):
            for name, value in self.row.items():
                self.logger.record(name, value)
            self.logger.dump(step)
        self.show(step, self._standing())
        self.row = {}

    def show(self, step: int, standing: str = "") -> None:
        """So many steps are done, and this is how it stands."""
        now = time.perf_counter()
        if self._bar is not None:
            if now >= self._next_refresh or step >= self.total:
                self._next_refresh = now + _REFRESH_SECONDS
                self._bar.update(self._task, completed=min(step, self.total), standing=standing)
        elif step >= self._next_line:
            while self._next_line <= step:
                self._next_line += max(self.total / 10, 1)
            line = f"{self.title} {step:,}/{self.total:,} {self.unit}  {standing}".rstrip()
            self.console.print(line, highlight=False, soft_wrap=True)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._start

    def _standing(self) -> str:
        return "  ".join(
            f"{short} {self.row[name]:.3f}" for name, short in _SHOWN.items() if name in self.row
        )


def check_output(path: str | Path, overwrite: bool) -> Path:
    """A folder or file that may be written: it is not there, or is empty, or may be overwritten."""
    path = Path(path).expanduser()
    there = any(path.iterdir()) if path.is_dir() else path.exists()
    if there and not overwrite:
        raise FileExistsError(f"{path} is already there; give another --output, or --overwrite")
    return path


def check_data(data: str | None, default: str, how: str) -> str:
    """The data file; without one the default if it is there, otherwise an error with the command that makes it."""
    if data is not None:
        return data
    if not Path(default).is_file():
        raise FileNotFoundError(f"give --data FILE; without it {default} is taken, which is not here: {how}")
    return default


def report(headline: str, figures: dict[str, float | str], skipped: Sequence[str] = ()) -> None:
    """What came out, in a few lines; then the first of the rows that were left out."""
    from rich.console import Console

    console = Console()
    console.print(f"\n{printable(headline)}", style="bold", highlight=False, markup=False, soft_wrap=True)
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        shown = value if isinstance(value, str) else f"{value:.4g}"
        line = f"  {name:<{width}}  {printable(shown)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if skipped:
        line = f"  {len(skipped)} bad rows were left out, the first: {printable(skipped[0])}"
        console.print(line, style="yellow", markup=False)


def print_next(commands: Sequence[tuple[str, str]]) -> None:
    """What to type next; lines that can be copied whole."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print("\nNext", style="bold")
    for command, meaning in commands:
        line = Text(f"  {command}", style="cyan")
        line.append(f"   # {meaning}", style="dim")
        console.print(line, soft_wrap=True)
