"""Held-out evaluations on disk: every answer with its scores, one Parquet file for each evaluation.

    runs/first/evaluations/
        000000000000.parquet    of the policy before it has learned anything
        000000015000.parquet    after 15,000 timesteps, and so on
        start.parquet           more answers, by other random numbers, of the first policy,
        best.parquet            when training has ended of the one in best/ (unless that is the last),
        final.parquet           and of the last one. The three are compared by these
        reference.parquet       where there is no gold judge: many answers of the reference to some of the prompts,
                                for its best-of-n

A row is an answer; ``sample`` is -1 for the greedy one. The files are read by the report and by anything that reads
Parquet. Left out: token ids and log-probabilities.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.evaluation import EvaluationResult
from agents.runs.whole import write_table

FOLDER = "evaluations"
#: Evaluations of more answers, at the ends of training.
START, BEST, FINAL = "start", "best", "final"
#: Many answers of the reference, see :func:`agents.evaluation.best_of_n.best_of_n`.
REFERENCE = "reference"
_ENDS = (START, BEST, FINAL, REFERENCE)
_FORMAT = 1
#: Before the names of the prompts' columns and of several rewards.
_COLUMN, _PART = "column/", "rewards/"
_KEY = b"textrl"
#: What a file says beside its rows.
_ABOUT = ("timesteps", "held_out", "distinct_of_10", "tokens", "seconds", "perplexity")


@dataclasses.dataclass(frozen=True)
class EvaluationRecord:
    """A policy's answers to a fixed set of prompts at one time.

    Attributes:
        timesteps: When.
        sampled: Sampled answers, as many to each prompt in every evaluation of a run.
        greedy: One answer of most likely tokens to each prompt.
        held_out: Whether the prompts are none of those that were trained on.
        distinct_of_10: Different answers among ten to the same prompt, mean over some prompts.
        tokens: Generated for it.
        seconds: That it took.
        perplexity: Per token of text of the pre-training, see :mod:`agents.evaluation.alignment_tax`; NaN where it was
            not measured.
    """

    timesteps: int
    sampled: EvaluationResult
    greedy: EvaluationResult
    held_out: bool
    distinct_of_10: float
    tokens: int
    seconds: float
    perplexity: float = math.nan

    @property
    def has_gold(self) -> bool:
        """Whether a gold judge has scored the answers."""
        return self.sampled.gold is not None

    def means(self) -> dict[str, float]:
        """Mean figures by the names that they are logged under, without ``eval/``."""
        sampled, greedy = self.sampled.summary(), self.greedy.summary()
        names = {
            "score": "scores",
            "gold": "gold_scores",
            "kl": "kl",
            "length": "mean_length",
            "ended": "eos_rate",
            "unscored": "unscored",
        }
        found = {name: sampled[key] for key, name in names.items() if key in sampled}
        found |= {f"greedy_{names[key]}": greedy[key] for key in ("score", "gold") if key in greedy}
        return found | {"distinct_of_10": self.distinct_of_10}


def write_evaluation(folder: Path, evaluation: EvaluationRecord, end: str | None = None) -> Path:
    """Write an evaluation below a run directory, whole or not at all.

    Args:
        folder: The run directory.
        evaluation: What to write.
        end: "start", "best", "final" or "reference" for those at the ends of training.
    """
    import pyarrow as pa

    columns: dict[str, list[Any]] = {}
    for first, result in ((0, evaluation.sampled), (-1, evaluation.greedy)):
        for name, values in _rows(result, first).items():
            columns.setdefault(name, []).extend(values)
    about = {name: getattr(evaluation, name) for name in _ABOUT} | {"format": _FORMAT}
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps(about).encode()})
    file = folder / FOLDER / (f"{evaluation.timesteps:012d}.parquet" if end is None else f"{end}.parquet")
    return write_table(file, table)


def _rows(result: EvaluationResult, first: int) -> dict[str, list[Any]]:
    """Columns of the answers of one result, the answers to one prompt neighbours."""
    prompts, samples = result.score.shape
    per_prompt = {"prompt_id": result.prompt_ids.tolist(), "prompt": result.prompts}
    per_prompt |= {f"{_COLUMN}{name}": [_plain(v) for v in values] for name, values in result.columns.items()}
    found = {name: [value for value in values for _ in range(samples)] for name, values in per_prompt.items()}
    found["sample"] = [first + i for _ in range(prompts) for i in range(samples)]
    found["response"] = [text for texts in result.responses for text in texts]
    arrays = {"score": result.score, "kl": result.kl, "length": result.length, "ended": result.ended}
    arrays |= {} if result.gold is None else {"gold": result.gold}
    arrays |= {f"{_PART}{name}": part for name, part in result.parts.items()}
    return found | {name: array.reshape(-1).tolist() for name, array in arrays.items()}


def _plain(value: Any) -> str | None:
    """A value of a prompt's column as text: columns hold anything, and Parquet one type."""
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def read_evaluation(file: Path) -> EvaluationRecord:
    """Read what :func:`write_evaluation` wrote.

    Raises:
        ValueError: It is no such file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
        about = json.loads((table.schema.metadata or {})[_KEY])
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']!r}; this version reads {_FORMAT}")
        rows = table.to_pydict()
        greedy = np.array(rows["sample"]) < 0
        results = [_result(rows, which) for which in (~greedy, greedy)]
    except (pa.ArrowException, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{file} is no evaluation of a run: {error}") from error
    return EvaluationRecord(
        sampled=results[0], greedy=results[1], **{name: about[name] for name in _ABOUT if name in about}
    )


def _result(rows: dict[str, list[Any]], which: np.ndarray) -> EvaluationResult:
    at = np.flatnonzero(which)
    count = len({rows["prompt_id"][i] for i in at})
    shape = (count, len(at) // count)

    def array(name: str) -> np.ndarray:
        return np.array([rows[name][i] for i in at]).reshape(shape)

    def of_prompt(name: str) -> list[Any]:
        return [rows[name][i] for i in at[:: shape[1]]]

    responses = [rows["response"][i] for i in at]
    return EvaluationResult(
        prompts=of_prompt("prompt"),
        responses=[responses[i : i + shape[1]] for i in range(0, len(at), shape[1])],
        score=array("score").astype(np.float64),
        gold=array("gold").astype(np.float64) if "gold" in rows else None,
        parts={n.removeprefix(_PART): array(n).astype(np.float64) for n in rows if n.startswith(_PART)},
        kl=array("kl").astype(np.float64),
        length=array("length").astype(np.int64),
        ended=array("ended").astype(bool),
        prompt_ids=np.array(of_prompt("prompt_id"), dtype=np.int64),
        columns={n.removeprefix(_COLUMN): of_prompt(n) for n in rows if n.startswith(_COLUMN)},
    )


def read_evaluations(folder: Path) -> list[EvaluationRecord]:
    """The evaluations during a run, oldest first; empty where there are none."""
    return [read_evaluation(file) for file in sorted((folder / FOLDER).glob("[0-9]*.parquet"))]


def read_ends(folder: Path) -> dict[str, EvaluationRecord]:
    """Those at the ends of a run by name: "start" and, once it has ended, "best", "final" and "reference"."""
    files = {end: folder / FOLDER / f"{end}.parquet" for end in _ENDS}
    return {end: read_evaluation(file) for end, file in files.items() if file.is_file()}


def drop_after(folder: Path, timesteps: int) -> None:
    """Delete evaluations of policies later than a checkpoint that the run goes on from; they will be made again."""
    for file in (folder / FOLDER).glob("[0-9]*.parquet"):
        if int(file.stem) > timesteps:
            file.unlink()
    for end in (BEST, FINAL, REFERENCE):
        (folder / FOLDER / f"{end}.parquet").unlink(missing_ok=True)
