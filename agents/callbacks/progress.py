"""A progress bar for learning: timesteps, speed, and how the score and the KL stand.

    agent.learn(100_000, progress_bar=True)

On a terminal a live bar; anywhere else (a file, a pipe) a line for every tenth of the way.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback

#: What is shown of the log, in this order: its name there, its name here, its format.
_SHOWN = (
    ("objective/scores", "score", "{:.2f}"),
    ("objective/gold_scores", "gold", "{:.2f}"),
    ("objective/kl", "KL", "{:.2f}"),
    ("rollout/ep_rew_mean", "return", "{:.2f}"),
)
_REFRESH_SECONDS = 0.1


class ProgressCallback(BaseCallback):
    """Shows how far learning has come.

    Args:
        console: Where to; None is standard error, so that results can be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = Console(stderr=True) if console is None else console
        self.progress: Progress | None = None

    def _on_training_start(self) -> None:
        self._start_steps, self._start_time = self.model.num_timesteps, time.perf_counter()
        self._total = self.model.total_timesteps
        self._next_refresh = 0.0
        self._next_line = self.model.num_timesteps + self._total / 10
        self._unit = "tokens" if self.model.policy.whole_episodes else "steps"
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]}"),
                TextColumn("{task.fields[standing]}", style="cyan"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            name = type(self.model).__name__
            self._task = self.progress.add_task(name, total=self._total, speed="", standing="")
            self.progress.start()

    def _on_step(self) -> bool:
        now = time.perf_counter()
        if self.progress is None and self.model.num_timesteps >= self._next_line:
            self._next_line = self.model.num_timesteps + self._total / 10
            self._print_line()
        elif self.progress is not None and now >= self._next_refresh:
            self._next_refresh = now + _REFRESH_SECONDS
            self._refresh()
        return True

    def _refresh(self) -> None:
        done = min(self.model.num_timesteps, self._total)
        self.progress.update(self._task, completed=done, speed=self._speed(), standing=self.standing())

    def _print_line(self) -> None:
        self.console.print(
            f"{type(self.model).__name__} {self.model.num_timesteps:,}/{self._total:,} {self._unit}  "
            f"{self._speed()}  {self.standing()}",
            highlight=False,
            soft_wrap=True,
        )

    def _speed(self) -> str:
        seconds = max(time.perf_counter() - self._start_time, 1e-9)
        return f"{(self.model.num_timesteps - self._start_steps) / seconds:,.0f} {self._unit}/s"

    def standing(self) -> str:
        """The latest score, gold score and KL on text, the mean return elsewhere."""
        latest = self.model.latest
        names = [row for row in _SHOWN if row[0] in latest]
        if any(name == "objective/scores" for name, *_ in names):
            names = [row for row in names if row[1] != "return"]
        return "  ".join(f"{short} {form.format(latest[name])}" for name, short, form in names)

    def _on_training_end(self) -> None:
        if self.progress is None:
            self._print_line()
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after training broke off."""
        if self.progress is not None:
            self._refresh()
            self.progress.stop()
            self.progress = None
