"""What every study shares: jobs whose results are kept as they come, and a place on the page for the table.

A study is a module with ``TITLE``, ``jobs(seeds)``, ``table(results)`` and ``figure(results, file)``. A job is one
policy trained or one thing measured, minutes at most; its result is a JSON document of its own in ``runs/studies/``,
so a study that was interrupted, or given so many minutes, goes on where it stopped. Jobs of one name are done once,
whichever study asks for them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
#: Results of jobs.
RUNS = ROOT / "runs" / "studies"
PAGE, FIGURES = ROOT / "docs" / "studies.md", ROOT / "docs" / "studies"


@dataclasses.dataclass(frozen=True)
class Job:
    """Something that is done once.

    Attributes:
        name: Of its result, with everything in it that the result depends on.
        run: Does it; returns what JSON can hold. It is given a folder for files that are too large for that.
        seed: Jobs of low seeds are done first, so that what is there of a study is complete for some seeds.
    """

    name: str
    run: Callable[[Path], dict[str, Any]]
    seed: int = 0


def do(jobs: Sequence[Job], minutes: float | None = None, folder: Path = RUNS) -> dict[str, dict[str, Any]]:
    """Do what has not been done yet.

    Args:
        jobs: All of a study.
        minutes: No job is begun that would end later than this, judged by the longest one so far; None is no limit.
        folder: Of the results.

    Returns:
        What is there by the jobs' names, in their order.
    """
    started, longest = time.monotonic(), 0.0
    for job in sorted(jobs, key=lambda job: job.seed):
        file = folder / f"{job.name}.json"
        if file.is_file():
            continue
        if minutes is not None and time.monotonic() - started + longest > 60 * minutes:
            break
        begun = time.monotonic()
        result_of(job, folder)
        seconds = time.monotonic() - begun
        longest = max(longest, seconds)
        print(f"{seconds:6.0f} s  {job.name}", flush=True)
    return read(jobs, folder)


def result_of(job: Job, folder: Path = RUNS) -> dict[str, Any]:
    """The result of a job that another one needs, which is done first if it has not been."""
    file = folder / f"{job.name}.json"
    if not file.is_file():
        write_json(file, job.run(file.with_suffix("")))
    return json.loads(file.read_text())


def read(jobs: Sequence[Job], folder: Path = RUNS) -> dict[str, dict[str, Any]]:
    """The results that are there, by the jobs' names."""
    files = {job.name: folder / f"{job.name}.json" for job in jobs}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def write_json(file: Path, document: dict[str, Any]) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(file)


# -- the page -------------------------------------------------------------------------------------------------


def markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; a heading that begins with "#" stands over numbers."""
    line = "| " + " | ".join(head.removeprefix("#") for head in heads) + " |"
    rule = "| " + " | ".join("---:" if head.startswith("#") else "---" for head in heads) + " |"
    return "\n".join([line, rule, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of a study.

    Raises:
        ValueError: The page has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    whole = page.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{page} has no marks {begin} and {end}")
    before, _, rest = whole.partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


# -- numbers --------------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> str:
    """ "0.71 ± 0.02", the standard error over seeds; one value stands alone."""
    found = np.asarray(values, dtype=float)
    if not len(found):
        return "–"
    if len(found) == 1:
        return f"{found[0]:.2f}"
    return f"{found.mean():.2f} ± {found.std(ddof=1) / np.sqrt(len(found)):.2f}"


@dataclasses.dataclass(frozen=True)
class Fit:
    """``a`` and ``b`` of a law after Gao, Schulman and Hilton (2022), with their standard errors.

    Attributes:
        a: Where the curve starts to rise, per unit of the distance ``d``.
        b: What bends it.
        a_error: Of ``a``.
        b_error: Of ``b``.
        residual: Root mean square of what the law leaves.
        points: How many it was fitted to.
    """

    a: float
    b: float
    a_error: float
    b_error: float
    residual: float
    points: int


#: The laws, by what they multiply ``b`` with: ``R(d) = d (a - b f(d))``.
LAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"d (a - b d)": lambda d: d, "d (a - b log d)": np.log}


def fit(law: str, distance: Sequence[float], gain: Sequence[float]) -> Fit:
    """Least squares of a law; both are linear in ``a`` and ``b``.

    Args:
        law: A key of :data:`LAWS`.
        distance: ``sqrt(KL)`` of each point, above 0.
        gain: What the reward gained over the reference there.

    Raises:
        ValueError: There are fewer than three points with a distance above 0.
    """
    d, y = np.asarray(distance, dtype=float), np.asarray(gain, dtype=float)
    d, y = d[d > 0], y[d > 0]
    if len(d) < 3:
        raise ValueError(f"two coefficients and their errors want three points at least, got {len(d)}")
    design = np.stack([d, -d * LAWS[law](d)], 1)
    (a, b), *_ = np.linalg.lstsq(design, y, rcond=None)
    left = y - design @ np.array([a, b])
    variance = left @ left / (len(d) - 2)
    a_error, b_error = np.sqrt(np.diag(variance * np.linalg.inv(design.T @ design)))
    values = (a, b, a_error, b_error, np.sqrt(np.mean(left**2)))
    return Fit(*(float(value) for value in values), len(d))


def peak(law: str, found: Fit) -> float:
    """The KL at which a fitted law is highest, ``inf`` where it does not bend down, in nats."""
    if found.b <= 0:
        return float("inf")
    # d a - b d^2 is highest at a / 2b; d a - b d log d where a = b (log d + 1).
    ratio = found.a / found.b
    if law == "d (a - b d)":
        return float((ratio / 2) ** 2)
    return float("inf") if ratio > 100 else float(np.exp(2 * (ratio - 1)))
