"""Other libraries' agents on an environment of this project, each in a virtual environment of its own.

    python benchmarks/other_agents.py                    # all of them, a table at the end
    python benchmarks/other_agents.py tianshou torchrl   # some

Makes ``.peers/NAME`` by pip where it is not there (torch first, as the build for the CPU), runs the examples of
``examples/other_agents`` in it, and prints what they report: the return of the first and of the last tenth of the
episodes, and the largest difference between the log-probabilities that the library wrote down and those that the
environment charged the KL for. ``docs/other_agents.md`` holds the table of the last run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from speed.peers import environment

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "other_agents"
_BASE = ["torch==2.13.0", "-e", str(ROOT)]
#: What each library needs, and the example that it runs; the versions are those of the table in the docs.
LIBRARIES: dict[str, tuple[list[str] | None, str]] = {
    "cleanrl": (None, "cleanrl_ppo.py"),  # needs nothing but this project
    "stable-baselines3": ([*_BASE, "stable-baselines3==2.9.2", "sb3-contrib==2.9.2"], "sb3_agents.py"),
    "tianshou": ([*_BASE, "tianshou==2.0.1"], "tianshou_ppo.py"),
    "torchrl": ([*_BASE, "torchrl==0.14.1"], "torchrl_ppo.py"),
    # Not ray[rllib], which pins an older gymnasium than this project needs; what RLlib imports is named instead.
    "rllib": (
        [*_BASE, "ray==2.60.0", *["dm-tree", "pyarrow", "lz4", "scipy", "ormsgpack", "pandas"]],
        "rllib_ppo.py",
    ),
    "skrl": ([*_BASE, "skrl==2.1.1"], "skrl_ppo.py"),
}


def run(name: str, under: Path, arguments: list[str]) -> list[dict[str, Any]]:
    """Run one library's example; returns its lines, with the seconds that all of it took.

    Raises:
        RuntimeError: The example failed; the end of what it printed is in the message.
    """
    requirements, example = LIBRARIES[name]
    python = sys.executable if requirements is None else environment(under / name, requirements)
    started = time.perf_counter()
    result = subprocess.run(
        [str(python), str(EXAMPLES / example), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"library"')]
    if result.returncode or not lines:
        raise RuntimeError(f"{name} failed:\n{(result.stdout + result.stderr)[-3000:]}")
    return [line | {"seconds": round(time.perf_counter() - started)} for line in lines]


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as a Markdown table."""
    rows = [
        "| library | agent | env | return: first | last tenth | largest difference of a log-probability |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        difference = line.get("largest_difference")
        shown = "no KL" if difference is None else f"{difference:.0g} in {line['steps_compared']:,} steps"
        cells = [f"{line['library']} {line['version']}", line["agent"], line["env"]]
        cells += [f"{line['return_first']:.2f}", f"{line['return_last']:.2f}", shown]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(LIBRARIES)}; all if none is given")
    parser.add_argument("--under", type=Path, default=ROOT / ".peers", help="folder of the environments")
    parser.add_argument("--json", type=Path, help="where to write the lines")
    options, arguments = parser.parse_known_args()
    if unknown := set(options.names) - set(LIBRARIES):
        parser.error(f"{', '.join(sorted(unknown))} is none of {', '.join(LIBRARIES)}")
    lines, failed = [], []
    for name in options.names or LIBRARIES:
        try:
            lines += run(name, options.under, arguments)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            failed.append(name)
            print(error, file=sys.stderr, flush=True)
    print(table(lines))
    if options.json is not None:
        options.json.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
