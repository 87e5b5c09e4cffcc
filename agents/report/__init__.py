"""A page about one run directory or several: what was run, what came of it, and what to look out for.

    from agents.report import write_report

    report = write_report("runs/first")                          # runs/first/report.html
    report = write_report(["runs/a", "runs/b"], "ab.html")       # one laid over the other

The page is one HTML file, its pictures and samples inside it, so it can be sent as it is. ``textrl report`` is
this function, and takes what ``textrl sft``, ``reward`` and ``dpo`` leave too (:mod:`agents.report.training_logs`). It
reads what a run has logged and neither loads a model nor imports anyone's code. Left out: runs that are known from
TensorBoard events alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from agents.report import page
from agents.report.findings import Finding, compare, examine
from agents.report.reading import Group, Run, check_comparable, group_runs, read_run
from agents.report.training_logs import Log, examine_log, find_log, read_log, render_logs
from agents.runs import run_directory as run_directories

__all__ = ["Finding", "Group", "Report", "Run", "read_run", "write_report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`write_report` has read and written.

    Attributes:
        page: The HTML file.
        groups: The runs, those of the same settings together.
        findings: Warnings and remarks, each with the run it is about.
        logs: Those of training from files; there are no groups then.
    """

    page: Path
    groups: list[Group]
    findings: list[Finding]
    logs: list[Log] = dataclasses.field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        """All runs, in the order of the page."""
        return [run for group in self.groups for run in group.runs]


def write_report(
    run_dirs: str | Path | Sequence[str | Path], output: str | Path | None = None, by: str | None = None
) -> Report:
    """Write a page about run directories.

    Args:
        run_dirs: A run directory, or several on one environment. Runs whose settings differ by the seed only are
            drawn as a mean and a band.
        output: The page, ``.html``; None is ``report.html`` in the run directory, or in the folder that all of
            several lie in. An earlier report there is replaced, nothing else is.
        by: The column of the prompts that tells their kinds apart; None is "kind", where there is one.

    Raises:
        FileNotFoundError: There is no such folder, or it is no run directory.
        FileExistsError: ``output`` is there and is not a report.
        ValueError: A run has not finished a rollout, or the runs cannot be compared.
    """
    folders = [run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs)
    places = [find_log(Path(folder).expanduser()) for folder in folders]
    logs = [read_log(place) for place in places if place is not None]
    if logs:
        if len(logs) < len(folders):
            raise ValueError("logs of training from files and runs of textrl train have no page in common")
        return _report_of_logs(logs, [Path(folder) for folder in folders], output)
    read = [read_run(folder, by) for folder in folders]
    check_comparable(read)
    file = _output_file(output, [run.folder for run in read])
    groups = group_runs(read)
    findings = [finding for run in read for finding in examine(run)] + compare(groups)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page.render(groups, findings), encoding="utf-8")
    return Report(file, groups, findings)


def _report_of_logs(logs: list[Log], folders: list[Path], output: str | Path | None) -> Report:
    file = _output_file(output, folders)
    findings = [finding for log in logs for finding in examine_log(log)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(render_logs(logs, findings, page.HEAD), encoding="utf-8")
    return Report(file, [], findings, logs)


def _output_file(output: str | Path | None, folders: list[Path]) -> Path:
    """Where the page goes; never over a file that is not a report."""
    if output is None:
        parents = (
            [str(folder) for folder in folders] if len(folders) == 1 else [str(f.parent) for f in folders]
        )
        common = (
            parents[0]
            if len(set(parents)) == 1
            else os.path.commonpath([os.path.abspath(p) for p in parents])
        )
        file = Path(common) / run_directories.REPORT
    else:
        file = Path(output).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder; name a file in it: {file / run_directories.REPORT}")
    if file.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the report is a page of HTML, got {file.name!r}; try {file.with_suffix('.html')}")
    if file.exists() and page.GENERATOR not in file.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise FileExistsError(f"{file} is already there and is not a report; give another --output")
    return file
