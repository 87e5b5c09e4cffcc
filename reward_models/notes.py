"""What a reward function logs beside its scores, through the two functions that TRL hands it.

def reward(prompts, completions, log_metric, log_extra, **columns):
    log_metric("accuracy", 0.5)          # a number for the log
    log_extra("extracted", ["4", "5"])   # a column of the samples, one value for each completion
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from reward_models.names import shorten

#: What the names of columns begin with, where notes travel beside scores.
METRIC, EXTRA = "metric/", "extra/"


class Notes:
    """Metrics and columns that reward functions have logged about one batch.

    Attributes:
        metrics: Values by name.
        extras: Values by column, in the order of the rows.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; several of one name are averaged, over all batches between two lines of the log.

        Raises:
            TypeError: The name is no text or the value no number.
        """
        value = value.item() if hasattr(value, "item") and getattr(value, "shape", ()) == () else value
        if not isinstance(name, str) or not isinstance(value, numbers.Real):
            raise TypeError(f"log_metric wants a name and a number, got {shorten(name)} and {shorten(value)}")
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a column of the samples, one value for each completion.

        Raises:
            TypeError: The column is no text or the values are no list.
        """
        if not isinstance(column, str) or isinstance(values, str) or not hasattr(values, "__iter__"):
            raise TypeError(
                f"log_extra wants a column's name and a list, got {shorten(column)} and {shorten(values)}"
            )
        self.extras.setdefault(column, []).extend(values)

    def add(self, others: Notes, who: str, count: int) -> None:
        """Add what one call about ``count`` rows has logged.

        Raises:
            ValueError: A column has another number of values.
        """
        for column, values in others.extras.items():
            if len(values) != count:
                raise ValueError(
                    f"the reward {who!r} gave log_extra({column!r}, ...) {len(values)} values for {count} completions"
                )
            self.extras.setdefault(column, []).extend(values)
        for name, values in others.metrics.items():
            self.metrics.setdefault(name, []).extend(values)

    def columns(self, count: int) -> dict[str, np.ndarray]:
        """Arrays ``[count]``, a metric's mean in every row; of two rewards with one column the later one's.

        A column that has no value for some rows (their reward failed) is left out.
        """
        found = {METRIC + name: np.full(count, np.mean(values)) for name, values in self.metrics.items()}
        for column, values in self.extras.items():
            if len(values) >= count:
                found[EXTRA + column] = array = np.empty(count, dtype=object)
                array[:] = values[-count:]
        return found

    def __deepcopy__(self, memo: dict) -> Notes:
        return self  # functions get copies of everything else


def pass_on(
    columns: Mapping[str, np.ndarray],
    log_metric: Callable[[str, float], None] | None,
    log_extra: Callable[[str, Sequence[Any]], None] | None,
) -> None:
    """Log once more what :meth:`Notes.columns` returned, where there is something to log with."""
    for name, values in columns.items():
        if name.startswith(METRIC) and log_metric is not None and len(values):
            log_metric(name.removeprefix(METRIC), float(values[0]))
        elif name.startswith(EXTRA) and log_extra is not None:
            log_extra(name.removeprefix(EXTRA), values.tolist())
