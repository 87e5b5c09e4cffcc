"""A progress bar for learning: how far, how fast, and how the score and the KL (or the loss) stand.

    agent.learn(100_000, progress_bar=True)

On a terminal a live bar; anywhere else (a file, a pipe) a line for every tenth of the way. Trainers on files and the
collecting of preferences show the same one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from stable_baselines3.common.callbacks import BaseCallback

#: What is shown of the log, in this order: its name there, its name here, its format.
_SHOWN = (
    ("objective/scores", "score", "{:.2f}"),
    ("objective/gold_scores", "gold", "{:.2f}"),
    ("objective/kl", "KL", "{:.2f}"),
    ("rollout/ep_rew_mean", "return", "{:.2f}"),
    ("loss", "loss", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("rewards/accuracies", "accuracy", "{:.3f}"),
    ("rewards/margins", "margin", "{:.3f}"),
)
_REFRESH_SECONDS = 0.1


class ProgressBar:
    """A bar on a terminal, elsewhere a line for every tenth of the way.

    Args:
        title: What is being done.
        total: How many of the units make the whole.
        unit: What is counted.
        start: How many are done already.
        console: Where to; None is standard error, so that results can be piped.
    """

    def __init__(
        self, title: str, total: int, unit: str = "steps", start: int = 0, console: Console | None = None
    ) -> None:
        self.console = Console(stderr=True) if console is None else console
        self.title, self.total, self.unit = title, total, unit
        self.done, self._start, self._start_time = start, start, time.perf_counter()
        self._next_refresh, self._next_line = 0.0, start + total / 10
        self._figures = ""
        self._printed = -1
        self._complete = start, 0.0  # how many were done when, with nothing of it left to do
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[speed]}"),
                TextColumn("{task.fields[figures]}", style="cyan"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._task = self.bar.add_task(title, total=total, speed="", figures="")
            self.bar.start()

    def show(self, done: int, figures: str = "", complete: bool = True) -> None:
        """So many are done, and this is how it stands; shown now and then.

        Args:
            done: So many.
            figures: How it stands.
            complete: Whether nothing of the work on those is still to come. Speed is told by such moments alone: half
                way, with all collected and nothing learned, it would be too high.
        """
        self.done, self._figures = done, figures
        if complete:
            self._complete = done, self.seconds
        now = time.perf_counter()
        if self.bar is None and done >= self._next_line:
            self._next_line = done + self.total / 10
            self._print_line()
        elif self.bar is not None and now >= self._next_refresh:
            self._next_refresh = now + _REFRESH_SECONDS
            self._refresh()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._start_time

    def _speed(self) -> str:
        done, seconds = self._complete
        if done == self._start:
            return f"{self.seconds:,.0f} s, first update"
        return f"{(done - self._start) / max(seconds, 1e-9):,.0f} {self.unit}/s"

    def _refresh(self) -> None:
        done = min(self.done, self.total)
        self.bar.update(self._task, completed=done, speed=self._speed(), figures=self._figures)

    def _print_line(self) -> None:
        self._printed = self.done
        line = f"{self.title} {self.done:,}/{self.total:,} {self.unit}  {self._speed()}  {self._figures}"
        self.console.print(line.rstrip(), highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """The end has come: show it."""
        if self.bar is None and self._printed != self.done:
            self._print_line()
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after something broke off."""
        if self.bar is not None:
            self._refresh()
            self.bar.stop()
            self.bar = None


class ProgressCallback(BaseCallback):
    """Shows how far learning has come.

    Args:
        console: Where to; None is standard error, so that results can be piped.
        title: What is being done; None is the name of the agent's class.
    """

    def __init__(self, console: Console | None = None, title: str | None = None) -> None:
        super().__init__()
        self.console, self.title = console, title
        self.progress: ProgressBar | None = None

    def _on_training_start(self) -> None:
        unit = getattr(self.model, "unit", None) or (
            "tokens" if self.model.policy.whole_episodes else "steps"
        )
        self.progress = ProgressBar(
            self.title or type(self.model).__name__,
            self.model.total_timesteps,
            unit,
            self.model.num_timesteps,
            self.console,
        )

    def _on_step(self) -> bool:
        # An agent learns from its steps later; a step of a trainer on files is all there is.
        complete = getattr(self.model, "unit", None) is not None
        self.progress.show(self.model.num_timesteps, latest_figures(self.model.latest), complete)
        return True

    def _on_rollout_start(self) -> None:
        self.progress.show(self.model.num_timesteps, latest_figures(self.model.latest))

    def _on_training_end(self) -> None:
        self.progress.show(self.model.num_timesteps, latest_figures(self.model.latest))
        self.progress.finish()

    def close(self) -> None:
        """Leave the terminal as it was; also after training broke off."""
        if self.progress is not None:
            self.progress.close()


def latest_figures(latest: Mapping[str, float]) -> str:
    """The score, gold score and KL on text, the mean return elsewhere, the loss and the accuracy of trainers on files.

    Args:
        latest: The latest row of the log.
    """
    rows = [row for row in _SHOWN if row[0] in latest]
    if any(name == "objective/scores" for name, *_ in rows):
        rows = [row for row in rows if row[1] != "return"]
    return "  ".join(f"{short} {form.format(latest[name])}" for name, short, form in rows)
