"""The samples that a run has recorded while training: TensorBoard's text tab as tables, first and last by prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from agents.rollouts.episode_log import read_table
from agents.runs.logs import EVENTS

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
    if not any(folder.glob(f"{EVENTS}*")):
        return [], None
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    try:
        started = events.FirstEventTimestamp()
    except ValueError:  # a file without a whole event
        return [], None
    if _TAG not in events.Tags()["tensors"]:
        return [], started
    tensors = events.Tensors(_TAG)
    return [Table(t.step, read_table(t.tensor_proto.string_val[0].decode())) for t in tensors], started


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
