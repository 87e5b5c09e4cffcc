"""What training from a file says at its end, beside its log: the command, and figures that are no curves.

    runs/reward/logs/run.json

The report shows both: the command, and what was measured once, such as a reward model's accuracy by kind.
Left out: runs that were not started by ``textrl``, which have no command.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from agents.runs.whole import write_text

FILE = "run.json"


@dataclasses.dataclass(frozen=True)
class TrainingNote:
    """What is kept.

    Attributes:
        command: As it was typed.
        figures: By the names that people read, as they were printed.
    """

    command: str
    figures: Mapping[str, str]


def write_note(folder: Path, note: TrainingNote) -> None:
    """Write it into the folder of a log; an earlier one is replaced."""
    write_text(
        folder / FILE, json.dumps({"command": note.command, "figures": dict(note.figures)}, indent=2) + "\n"
    )


def read_note(folder: Path) -> TrainingNote | None:
    """Read it; None where there is none.

    Raises:
        ValueError: It is something else; the message names the file.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        command, figures = document["command"], document["figures"]
        if not isinstance(command, str) or not all(isinstance(value, str) for value in figures.values()):
            raise TypeError("expected texts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no note of training from a file: {type(error).__name__}: {error}"
        ) from None
    return TrainingNote(command, figures)
