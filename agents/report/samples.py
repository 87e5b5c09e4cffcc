"""The samples that a run has recorded while training: TensorBoard's text tab as tables, first and last by prompt."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event

from agents.rollouts.episode_log import read_table
from agents.runs.logs import EVENTS, read_events

_TAG = "samples/table/text_summary"


@dataclasses.dataclass(frozen=True)
class Table:
    """What one line of the log has recorded.

    Attributes:
        timesteps: When.
        rows: Cells by column: "response", "score", "kl_sum", and where known "prompt" and "score/gold".
    """

    timesteps: int
    rows: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The first and the last recorded response to one prompt, cells by column, and when each was given."""

    prompt: str
    first: dict[str, str]
    first_at: int
    last: dict[str, str]
    last_at: int


def read_tables(folder: Path) -> tuple[list[Table], float | None]:
    """The tables in the TensorBoard events of ``folder``, oldest first, and the time of the first event."""
    events: list[Event] = []
    for file in sorted(folder.glob(f"{EVENTS}*")):
        found, unread = read_events(file)
        if unread:
            warnings.warn(
                f"{file}: the last {unread:,} of {file.stat().st_size:,} bytes cannot be read (a record is damaged, or "
                "was cut off when the process ended), so samples of that part are missing",
                stacklevel=2,
            )
        events += found
    tables = [
        Table(event.step, read_table(value.tensor.string_val[0].decode(errors="replace")))
        for event in events
        for value in event.summary.value
        if value.tag == _TAG and value.tensor.string_val
    ]
    return tables, min((event.wall_time for event in events), default=None)


def pairs(tables: list[Table], count: int = 8) -> list[Pair]:
    """Prompts that were recorded more than once, those first whose first and last response lie furthest apart.

    Args:
        tables: Oldest first.
        count: Pairs to return at most.
    """
    seen: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for table in tables:
        for row in table.rows:
            if "prompt" in row:
                seen.setdefault(row["prompt"], []).append((table.timesteps, row))
    found = [
        Pair(prompt, first, first_at, last, last_at)
        for prompt, ((first_at, first), *_, (last_at, last)) in (
            (p, s) for p, s in seen.items() if len(s) > 1
        )
        if first_at < last_at
    ]
    return sorted(found, key=lambda pair: pair.first_at - pair.last_at)[:count]
