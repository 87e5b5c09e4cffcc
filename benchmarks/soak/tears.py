"""A file of the newest checkpoint missing, emptied, cut or changed: named at `--resume`, and the one before taken."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

from cases import Case, all_cases, result_of
from processes import FailsAlone, run
from table import Table

#: So many tears are looked at through the loader for each that is gone on with by a command.
_LOOKS = 10


class Tears:
    """Tears checkpoints of every kind."""

    def __init__(self, place: Path, table: Table, rng: random.Random) -> None:
        self.place, self.table, self.rng = place, table, rng
        self.cases = [each for each in all_cases() if each.verb in ("train", "sft", "reward", "dpo")]
        self.whole: dict[str, tuple[Path, dict[str, bytes]]] = {}

    def once(self) -> None:
        """One case: some tears through the loader, one through the command line."""
        case = self.rng.choice(self.cases)
        kept, result = self._checkpoints_of(case)
        for _ in range(_LOOKS if case.verb == "train" else 0):
            folder, torn, how = self._tear(kept)
            self._look(case, folder, torn, how)
        _, torn, how = self._tear(kept)
        self._go_on(case, torn, how, result)

    def _checkpoints_of(self, case: Case) -> tuple[Path, dict[str, bytes]]:
        """A run that has only just not finished, with its two newest checkpoints; made once."""
        if case.name not in self.whole:
            out = self.place / "out"
            shutil.rmtree(out, ignore_errors=True)
            ended = run(case.command, self.place)
            if ended.code or len(list(out.glob("checkpoint-*"))) < 2:
                raise FailsAlone(f"{case.name} fails or makes one checkpoint only:\n{ended.output}")
            result = result_of(case, self.place)
            for path in [out / "final", *(out.glob("*.*") if case.verb != "train" else [])]:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            kept = self.place / f"kept-{len(self.whole)}"
            shutil.move(out, kept)
            self.whole[case.name] = kept, result
        return self.whole[case.name]

    def _tear(self, kept: Path) -> tuple[Path, Path, str]:
        """A copy of a run with one file of its newest checkpoint torn: the run, the file, and how."""
        folder = self.place / "out"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        file = self.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = bytearray(file.read_bytes())
        how = self.rng.choice(["missing", "empty", "cut", "changed"])
        if how == "missing":
            file.unlink()
        elif how == "empty":
            file.write_bytes(b"")
        elif how == "cut":
            file.write_bytes(content[: self.rng.randrange(len(content))])
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(content)
        return folder, file, how

    def _look(self, case: Case, folder: Path, torn: Path, how: str) -> None:
        from agents.runs.run_directory import newest_whole

        newest = folder / torn.relative_to(folder).parts[0]
        name = torn.relative_to(newest).as_posix()
        _, taken, told = newest_whole(folder)
        row = self.table.row(f"a file of a checkpoint {how}")
        if taken != newest and f"{newest} is torn: " in told[0] and name in told[0]:
            row.add("the file is named, and the checkpoint before is taken")
        elif torn.name == "manifest.json" and taken == newest:  # a space for a space: it says the same
            row.add("a change of the manifest that changes nothing of what it says")
        else:
            row.add("", f"{case.name}, {name}: {told}")

    def _go_on(self, case: Case, torn: Path, how: str, result: dict[str, bytes]) -> None:
        ended = run(case.again, self.place)
        found = result_of(case, self.place)
        named = re.search(
            rf"is torn: {re.escape(torn.name)}|is torn: \S*{re.escape(torn.name)}", ended.output
        )
        row = self.table.row(f"a file of a checkpoint {how}, then gone on with")
        same = ended.code == 0 and found == result
        if named and same:
            row.add("the file is named, the checkpoint before is taken, and the run ends with the same bits")
        elif same and torn.name == "manifest.json":
            row.add("a change of the manifest that changes nothing of what it says")
        else:
            row.add(
                ended.output[-80:], f"{case.name}, {torn.name} {how}: {ended.code}\n{ended.output[-2000:]}"
            )
