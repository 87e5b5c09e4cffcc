"""Faults that are really inflicted on runs, and what became of each: kills, tears, full disks, rubbish, long runs.

    python benchmarks/soak --minutes 60                   # make soak
    python benchmarks/soak --minutes 5 --only kills       # a part; the counts of parts add up in benchmarks/soak.json
    python benchmarks/soak --page docs/reliability.md     # put the table into the page

Prints the table: fault, tries, lost, what the user saw. "Lost" counts what must not happen: a run that was gone on with
and ends with other bits than one left alone, damage that nobody notices, an error without its place, silence. Left out:
power failures, for which a machine would have to be switched off.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

import processes  # noqa: E402
from table import Table  # noqa: E402

PARTS = ("kills", "tears", "disk", "fuzz", "leaks")
#: The share of the time that a part may take. Fuzz and leaks end by their counts, after about two thirds of an hour.
_SHARES = {"kills": 0.25, "tears": 0.05, "disk": 0.05}


def soak(options: argparse.Namespace, table: Table) -> None:
    """Inflict the chosen faults."""
    processes.prepare()
    # Modules of this folder import those of the project, which have to come after the settings of the process.
    import cases
    import disk
    import fuzz
    import kills
    import leaks
    import tears

    rng = random.Random(options.seed)
    parts = options.only or PARTS
    share = sum(_SHARES.get(part, 0.0) for part in parts) or 1.0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        cases.make_place(place)

        def repeat(part: str, once: Callable[[], None]) -> None:
            scale = 1.0 if options.only else share
            end = time.monotonic() + 60 * options.minutes * _SHARES[part] / share * scale
            tries = 0
            while time.monotonic() < end and (options.tries is None or tries < options.tries):
                try:
                    once()
                except processes.FailsAlone as error:
                    table.row("left alone").add("it fails", str(error))
                tries += 1
                if options.keep:
                    table.write(options.keep)

        if "kills" in parts:
            killing, shared = kills.Kills(place, table, rng), kills.SharedRuns(place, table, rng)

            def kill() -> None:
                killing.once()
                if killing.turn % 5 == 3:
                    shared.once()
                if killing.turn % 10 == 1:
                    kills.two_at_once(place, table, rng)
                    kills.by_a_launcher(place, table, rng)

            repeat("kills", kill)
        if "tears" in parts:
            repeat("tears", tears.Tears(place, table, rng).once)
        if "disk" in parts:
            filling = disk.Disk(place, table, rng)
            try:
                repeat("disk", filling.once)
            finally:
                filling.close()
        if "fuzz" in parts:
            fuzz.fuzz_all(place, table, options.examples, options.seed, options.formats, options.keep)
        if "leaks" in parts:
            leaks.long_run(place, table, options.updates)


def main() -> int:
    """Run the chosen parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts; all by default")
    parser.add_argument("--tries", type=int, help="at most so many rounds of each part")
    parser.add_argument("--examples", type=int, default=10_000, help="inputs for each format and verb")
    parser.add_argument("--formats", nargs="+", help="of the fuzz: words in the names of its rows")
    parser.add_argument("--updates", type=int, default=2000, help="of the long run")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is done and when")
    parser.add_argument("--keep", type=Path, help="JSON file in which the counts of several parts add up")
    parser.add_argument("--page", type=Path, help="a page with the marks of the table; alone, nothing is run")
    options = parser.parse_args()
    table = Table()
    if options.keep:
        table.read(options.keep)
    if options.page is None or options.only:
        print(f"seed {options.seed}", file=sys.stderr)
        soak(options, table)
    if options.keep:
        table.write(options.keep)
    if options.page is not None:
        table.put_into(options.page)
    print(table.markdown())
    table.complain()
    return 1 if any(row.lost for row in table.rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
