"""All samples of every update on disk, as Parquet that the report, or anything else, can search.

    runs/first/samples/000000000512.parquet    the responses that the update at 512 timesteps learned from

A row is a response with its prompt, score, gold score, rewards, KL, length, return and advantage (a mean over its
tokens), and with the columns that tell kinds of prompts apart (``prompt/kind``). A few rows of each file also have
their tokens with log-probability, reference, KL, reward, value and advantage of each, which is what the report looks at
under the microscope; all of them would make files of the size of rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.runs.whole import write_table

FOLDER = "samples"
#: Rows of an update that are kept token by token.
DETAILED = 8
#: Columns of lists, one entry for each token.
PER_TOKEN = ("tokens", "log_probs", "ref_log_probs", "kls", "rewards", "values", "advantages")
#: What the names of columns begin with that came with the prompts.
OF_PROMPTS = "prompt/"
#: Columns of ours, also where an update has none of them; a reward's column of such a name gets another.
OWN = (
    *("prompt", "response", "response_length", "stop_reason", "scored", "score", "kl_sum", "turns"),
    *("return", "advantage", *PER_TOKEN),
)


def write_samples(folder: Path, timesteps: int, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write the samples of one update below a run directory, whole or not at all.

    Args:
        folder: The run directory.
        timesteps: When the update came.
        columns: Equally many values each.
    """
    import pyarrow as pa

    return write_table(folder / FOLDER / f"{timesteps:012d}.parquet", pa.table(dict(columns)))


def sample_files(folder: Path) -> list[tuple[int, Path]]:
    """The files of a run with the timesteps of their updates, oldest first."""
    return [(int(file.stem), file) for file in sorted((folder / FOLDER).glob("[0-9]*.parquet"))]


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        ValueError: It is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} holds no samples of a run: {error}") from error
    if rows and "response" not in rows[0]:
        raise ValueError(f"{file} holds no samples of a run: it has no column 'response'")
    return rows


def drop_after(folder: Path, timesteps: int) -> None:
    """Delete the samples of updates after a checkpoint that the run goes on from; they will be drawn again."""
    for at, file in sample_files(folder):
        if at > timesteps:
            file.unlink()
