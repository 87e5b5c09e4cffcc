"""How far a run of several processes is from the run of one: the table of docs/processes.md.

    python benchmarks/processes.py [--counts 2 4]

The runs of :mod:`tests.shared_runs`, three updates each on a tiny Llama, with gloo: whether the tokens of every rollout
are the same, and the largest difference of the first gradient, of the last weights, and of any figure that is logged;
for the trainers on files of the weights that they write. Takes some two minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script, the root is not on the path

from agents.parallel import processes  # noqa: E402
from tests import shared_runs  # noqa: E402


def work(rank: int, count: int, port: int, folder: Path) -> None:
    """What one of ``count`` processes does; the main one writes what it saw."""
    shared_runs.be(rank, count, port)
    with processes.started():
        found: dict[str, Any] = {name: shared_runs.run(make) for name, make in shared_runs.RUNS.items()}
        found |= shared_runs.trainings(folder)
        if rank == 0:
            (folder / f"{count}.json").write_text(json.dumps(found))


def run(count: int, folder: Path) -> dict[str, Any]:
    """What ``count`` processes see."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.shared_runs"])
    ranks = [context.Process(target=work, args=(rank, count, port, folder)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise RuntimeError(f"{count} processes ended with {[process.exitcode for process in ranks]}")
    return json.loads((folder / f"{count}.json").read_text())


def largest(one: Any, other: Any) -> float:
    """The largest difference of two lists of numbers."""
    return float(np.abs(np.subtract(one, other)).max())


def differences(one: dict[str, Any], several: dict[str, Any]) -> list[str]:
    """Cells of the table."""
    weights = largest(one["weights"], several["weights"])
    if "gradients" not in one:
        return ["", "", f"{weights:.0e}", ""]
    figures = [
        abs(value - several["latest"][name])
        for name, value in one["latest"].items()
        if not name.startswith(("time/", "memory/")) and value == value  # NaN is what a run has no figure of
    ]
    same = "the same" if one["tokens"] == several["tokens"] else "**others**"
    gradient = largest(one["gradients"][0], several["gradients"][0])
    return [same, f"{gradient:.0e}", f"{weights:.0e}", f"{max(figures):.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shared_runs.write_inputs(folder)
        one = run(1, folder)
        print("| run | processes | tokens | first gradient | last weights | figures |")
        print("| --- | --: | --- | --: | --: | --: |")
        for count in arguments.counts:
            several = run(count, folder)
            for name, alone in one.items():
                print(
                    f"| {name} | {count} | " + " | ".join(differences(alone, several[name])) + " |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
