"""Signals at random moments, and the run gone on with by the words that the user was told, to the same bits.

A run is hit one to three times. After SIGTERM and Ctrl-C the next command is the one that the output names; after
``kill -9``, which leaves nobody to say anything, it is ``--resume``, and what that answers is followed.
"""

from __future__ import annotations

import csv
import os
import random
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from cases import Case, all_cases, result_of
from processes import RAISED, Ended, FailsAlone, Hit, finish, run, start
from table import Table

_FAULTS = {
    signal.SIGKILL: "`kill -9` at a random moment",
    signal.SIGTERM: "SIGTERM at a random moment",
    signal.SIGINT: "Ctrl-C at a random moment",
}
#: What the command after ``kill -9`` tells, and how the table calls it.
_ANSWERS = (
    (r"resuming .* at [\d,]+ timesteps, from ", "goes on from a checkpoint that it names"),
    (r"holds no checkpoint yet; start it anew with: ", "no checkpoint yet, and the line to start anew"),
    (r"is not a run directory: it has no config\.json", "not begun yet: no run there"),
    (r"resuming at step [\d,]+ of ", "goes on from a checkpoint that it names"),
    (r"there was no checkpoint yet: starting", "no checkpoint yet, and that it starts anew"),
    (r"is complete at [\d,]+ timesteps", "complete already"),
)
#: What a process that is asked to stop tells.
_FAREWELLS = (
    (r"waiting for (.|\n)*go on with: ", "what is waited for, what was saved, and the line to go on"),
    (r"comparisons until then are in ", "how many comparisons are kept, and where"),
    (r"textrl: (terminated|aborted)", "terminated or aborted, while nothing could be saved yet"),
)
#: Columns of the log that differ between two runs of the same thing.
_TIMES = ("time/", "memory/", "eval/seconds")
_MOST_COMMANDS = 8
#: Seconds that a launcher leaves to the others of a process that has ended.
_GRACE = 30.0


class Kills:
    """Runs one case after another, each with signals."""

    def __init__(self, place: Path, table: Table, rng: random.Random) -> None:
        self.place, self.table, self.rng = place, table, rng
        self.cases = all_cases()
        rng.shuffle(self.cases)
        self.alone: dict[str, tuple[dict[str, bytes], list[dict[str, str]], Ended]] = {}
        self.turn = 0

    def once(self) -> None:
        """The next case, hit by each signal in turn."""
        case = self.cases[self.turn % len(self.cases)]
        number = list(_FAULTS)[(self.turn + self.turn // len(self.cases)) % len(_FAULTS)]
        self.turn += 1
        result, log, alone = self._left_alone(case)
        _clear(case, self.place)
        seen: list[str] = []
        ended = self._hit(case, number, alone, seen)
        lost = _wrong(case, self.place, ended, result, log)
        for text in seen:
            row = self.table.row(_FAULTS[number])
            silent = "" if text else f"silence at the end of\n{ended.output[-1000:]}"
            row.add(text, (lost or silent) and f"{case.name}: {lost or silent}")

    def _left_alone(self, case: Case) -> tuple[dict[str, bytes], list[dict[str, str]], Ended]:
        if case.name not in self.alone:
            _clear(case, self.place)
            ended = run(case.command, self.place, waits_for=self.place / case.output)
            if ended.code:
                raise FailsAlone(f"{case.name} fails when it is left alone:\n{ended.output}")
            self.alone[case.name] = result_of(case, self.place), _log(self.place / "out"), ended
        return self.alone[case.name]

    def _hit(self, case: Case, number: int, alone: Ended, seen: list[str]) -> Ended:
        """Run a case with one to three signals, and then to its end; notes what the user saw after each."""
        command, hits = case.command, self.rng.randint(1, 3)
        for _ in range(_MOST_COMMANDS):
            aims = [Hit.at_random(self.rng, number, alone)] if hits else []
            ended = run(command, self.place, aims)
            hits -= 1 if hits else 0
            if ended.code == RAISED:
                return ended
            if seen and seen[-1] == "":  # what `kill -9` was followed by
                seen[-1] = _told(_ANSWERS, ended.output)
                if not seen[-1] and ended.was_hit and ended.code:
                    seen[-1] = "hit again before it could answer"
                elif not seen[-1]:
                    seen[-1] = _silent_again(case) if ended.code == 0 else ""
            if ended.code == 0:
                return ended
            if ended.was_hit and ended.code < 0:
                seen.append("")
                command = case.again
            elif ended.was_hit and ended.code in (130, 143):
                seen.append(_told(_FAREWELLS, ended.output))
                command = _next_command(ended.output) or case.again
            else:
                command = _next_command(ended.output) or case.command
        return ended


def two_at_once(place: Path, table: Table, rng: random.Random) -> None:
    """Two processes go on with one run: one of them is refused, the other ends as if it were alone."""
    case = rng.choice([each for each in all_cases() if each.verb == "train"])
    _clear(case, place)
    alone = run([*case.command, "--keep", "99"], place)
    if alone.code or not any((place / "out").glob("checkpoint-*")):
        raise FailsAlone(f"{case.name} fails or makes no checkpoint when it is left alone:\n{alone.output}")
    result, log = result_of(case, place), _log(place / "out")
    _, *later = sorted((place / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    for path in [*later, place / "out" / "final"]:
        shutil.rmtree(path)
    outputs = [place / f".output-{number}" for number in range(2)]
    processes = [start(case.again, place, output) for output in outputs]
    ends = [finish(process, output) for process, output in zip(processes, outputs, strict=True)]
    refused = [end for end in ends if re.search(r"is in use by process \d+ on \S+ since", end.output)]
    lost = _wrong(case, place, next((e for e in ends if e.code == 0), ends[0]), result, log)
    row = table.row("two processes go on with one run at once")
    if refused:
        row.add("one goes on, the other is refused with process, host and time", lost)
    else:  # the first was through before the second looked
        row.add(
            "one after the other: complete already", lost or ("" if ends[0].code == 0 else ends[0].output)
        )
    for output in outputs:
        output.unlink(missing_ok=True)


def by_a_launcher(place: Path, table: Table, rng: random.Random) -> None:
    """Two processes of one launcher: both are refused before they write anything."""
    case = rng.choice(all_cases())
    _clear(case, place)

    def as_one_of_two() -> None:
        os.environ["WORLD_SIZE"] = "2"

    ended = run(case.command, place, before=as_one_of_two)
    named = ended.code == 2 and "one of 2 processes that a launcher has started" in ended.output
    nothing = not (place / case.output).exists()
    row = table.row("started by a launcher of two processes")
    row.add("refused, with the launcher's variable" if named else "", "" if nothing else "files were written")


class SharedRuns:
    """One of two processes that share a run is killed: the other names it and ends, and both go on to the same bits."""

    def __init__(self, place: Path, table: Table, rng: random.Random) -> None:
        self.place, self.table, self.rng = place, table, rng
        on_text = [each for each in all_cases() if each.verb == "train" and " on text" in each.name]
        self.cases = on_text + [each for each in all_cases() if each.verb in ("sft", "reward", "dpo")]

    def once(self) -> None:
        """One case, one kill."""
        case = self.rng.choice(self.cases)
        _clear(case, self.place)
        whole = self._together(case.command)
        if any(end.code for end in whole):
            raise FailsAlone(f"{case.name} fails in two processes:\n{whole[0].output}\n{whole[1].output}")
        result, log = result_of(case, self.place), _log(self.place / "out")
        _clear(case, self.place)
        rank = self.rng.randrange(2)
        aim = Hit.at_random(self.rng, signal.SIGKILL, whole[rank])
        ends = self._together(case.command, rank, aim)
        survivor = ends[1 - rank]
        seen = self._told(survivor) if ends[rank].was_hit else "both were through before it"
        command = case.command
        if case.verb != "train" or (self.place / "out" / "config.json").is_file():
            command = case.again
        for _ in range(_MOST_COMMANDS):
            ends = self._together(command)
            if ends[0].code == 0:
                break
            command = _next_command(ends[0].output) or case.command
        lost = _wrong(case, self.place, ends[0], result, log)
        lost = lost or ("" if seen else f"silence of the other process: {survivor}")
        row = self.table.row("`kill -9` of one of two processes that share a run")
        row.add(seen, lost and f"{case.name}: {lost}")

    def _told(self, survivor: Ended) -> str:
        if re.search(r"is gone, killed or crashed|a process was lost", survivor.output):
            return "the other says which process is gone, and ends; both go on to the same bits"
        if survivor.code in (0, -signal.SIGTERM, -signal.SIGKILL, 143):
            return "the other had not met it yet, or needed it no more; the launcher ends it"
        if re.search(r"textrl: .{20}", survivor.output):  # while they are meeting
            return "the other says what it waited for in vain, and ends; both go on to the same bits"
        return ""

    def _together(self, command: Sequence[str], rank: int = 0, aim: Hit | None = None) -> list[Ended]:
        """Run a command in two processes as a launcher does: where one is killed, the other is ended after a while."""
        port = str(self.rng.randrange(20_000, 60_000))
        outputs = [self.place / f".output-{number}" for number in range(2)]

        def as_rank(number: int) -> Callable[[], None]:
            names = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
            return lambda: os.environ.update(names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})

        processes = [start(command, self.place, outputs[k], as_rank(k)) for k in range(2)]
        ends: dict[int, Ended] = {}
        ends[rank] = finish(processes[rank], outputs[rank], [] if aim is None else [aim])
        patience = [Hit(number, 0.0, _GRACE) for number in (signal.SIGTERM, signal.SIGKILL)]
        other = 1 - rank
        ends[other] = finish(processes[other], outputs[other], patience)
        for output in outputs:
            output.unlink(missing_ok=True)
        return [ends[0], ends[1]]


def _wrong(case: Case, place: Path, ended: Ended, result: dict[str, bytes], log: list[dict[str, str]]) -> str:
    """What is not as it would be without any signal; empty if all is."""
    if ended.code:
        return f"exit code {ended.code}\n{ended.output[-2000:]}"
    found = result_of(case, place)
    if found != result or not result:
        return f"other bits in {[n for n in result | found if found.get(n) != result.get(n)]}\n{ended.output[-1000:]}"
    if (now := _log(place / "out")) != log:
        return f"another log: {_differences(log, now)}"
    left = [str(path) for path in place.rglob(".*.new")]
    return f"left lying about: {left}" if left else ""


def _log(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's log, without times."""
    file = folder / "progress.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    shown = ("time/total_timesteps", "time/iterations")
    return [{n: v for n, v in row.items() if n in shown or not n.startswith(_TIMES)} for row in rows]


def _differences(left_alone: list[dict[str, str]], now: list[dict[str, str]]) -> str:
    """Where two logs differ."""
    if len(left_alone) != len(now):
        return f"{len(left_alone)} rows became {len(now)}"
    rows = enumerate(zip(left_alone, now, strict=True), 1)
    found = [(k, n, a.get(n), b.get(n)) for k, (a, b) in rows for n in a | b if a.get(n) != b.get(n)]
    return "; ".join(f"row {k}, {name}: {a} became {b}" for k, name, a, b in found[:5])


def _told(tells: Sequence[tuple[str, str]], output: str) -> str:
    return next((text for pattern, text in tells if re.search(pattern, output)), "")


def _silent_again(case: Case) -> str:
    """What the user saw of a command that was simply typed again and went through."""
    if case.verb == "evaluate":
        return "typed again, the same figures"
    if case.verb == "preferences":
        return "typed again, the same comparisons"
    return ""


def _next_command(output: str) -> list[str] | None:
    """The command that the output tells to type."""
    found = re.findall(r"(?:go on with|start it anew with): textrl (.+)", output)
    return shlex.split(found[-1]) if found else None


def _clear(case: Case, place: Path) -> None:
    for path in [place / case.output, *place.glob("out*"), *place.glob(".out*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
