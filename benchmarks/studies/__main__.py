"""Studies of reinforcement learning from human feedback in the embedded world, each from one command.

    python benchmarks/studies verdict                  # all of it; what was done before is not done again
    python benchmarks/studies verdict --seeds 3        # fewer seeds than it asks for
    python benchmarks/studies verdict --minutes 10     # no job is begun that would end later
    python benchmarks/studies verdict --only-table     # of what is there

Prints the table, draws the figure and puts both on their page (docs/studies.md, the verdict's table on docs/seeing.md).
Left out: real models; each study is the question in small, with a judge that is known.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.studies import frame  # noqa: E402

STUDIES = (
    "verdict",
    "overoptimisation",
    "frontier",
    "demonstrations",
    "labels",
    "exploration",
    "variance",
)


def main() -> None:
    """Do what is left of a study, and write its table and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, help="how many; each study has its own number")
    parser.add_argument("--minutes", type=float, help="begin no job that would end later")
    parser.add_argument("--only-table", action="store_true", help="of the results that are there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*evaluations? (was|were) skipped")
    study = importlib.import_module(f"benchmarks.studies.{options.study}")
    seeds = study.SEEDS if options.seeds is None else options.seeds
    jobs = study.jobs(seeds)
    results = frame.read(jobs) if options.only_table else frame.do(jobs, options.minutes)
    print(f"{len(results)} of {len(jobs)} jobs are done", flush=True)
    if not results:
        return
    text = study.table(results)
    print(text)
    frame.FIGURES.mkdir(exist_ok=True)
    study.figure(results, frame.FIGURES / f"{options.study}.png")
    frame.put_into(getattr(study, "PAGE", frame.PAGE), options.study, text)


if __name__ == "__main__":
    main()
