"""Full and read-only disks: the path in the message, the checkpoint before whole, the same bits once there is room.

The disk is a small one in memory where this process may mount one; elsewhere files may not grow past a limit, and
folders are without the right to write (which does not stop root).
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from cases import Case, all_cases, result_of
from processes import Ended, FailsAlone, run
from table import Table

_PLENTY = 64 * 2**20


class Disk:
    """Inflicts full and read-only disks on every case in turn."""

    def __init__(self, place: Path, table: Table, rng: random.Random) -> None:
        self.table, self.rng = table, rng
        self.disk = place / "disk"
        self.disk.mkdir()
        self.mounted = _command("mount", "-t", "tmpfs", "-o", f"size={_PLENTY}", "tmpfs", str(self.disk))
        for path in [p for p in place.iterdir() if p != self.disk and not p.name.startswith(".")]:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            copy(path, self.disk / path.name)
        self.cases = all_cases()
        rng.shuffle(self.cases)
        self.alone: dict[str, tuple[dict[str, bytes], int]] = {}
        self.turn = 0

    def close(self) -> None:
        """Unmount the disk."""
        if self.mounted:
            _command("umount", str(self.disk))

    def once(self) -> None:
        """The next case: a disk that is full at a random moment, then with room again; then one without rights."""
        case = self.cases[self.turn % len(self.cases)]
        self.turn += 1
        if case.name not in self.alone:
            self._clear()
            before = self._used()
            ended = run(case.command, self.disk)
            if ended.code:
                raise FailsAlone(f"{case.name} fails when it is left alone:\n{ended.output}")
            self.alone[case.name] = result_of(case, self.disk), self._used() - before
        self._full(case, *self.alone[case.name])
        self._read_only(case)

    def _used(self) -> int:
        """Bytes on the disk; where it is one of its own, as that counts them: its folders take none."""
        if self.mounted:
            disk = os.statvfs(self.disk)
            return (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        return _bytes_in(self.disk)

    def _full(self, case: Case, result: dict[str, bytes], size: int) -> None:
        self._clear()
        room = self.rng.randint(1, max(size, 2))
        ended = self._with_room(room, case)
        row = self.table.row("the disk is full at a random moment")
        if ended.code == 0:
            row.add("there was room enough", "" if result_of(case, self.disk) == result else "other bits")
            return
        lost = self._what_is_wrong(case, ended)
        told = "exit code 2, and what cannot be written, by its path"
        again = case.again if (self.disk / "out" / "config.json").exists() else case.command
        again = case.again if case.verb != "train" else again
        later = run(again, self.disk)
        if later.code == 2 and "holds no checkpoint yet" in later.output:
            later = run([*case.command, "--overwrite"], self.disk)
        if later.code or result_of(case, self.disk) != result:
            lost = lost or f"with room again: exit code {later.code}\n{later.output[-1500:]}"
        row.add(f"{told}; with room again it goes on to the same bits", lost and f"{case.name}: {lost}")

    def _with_room(self, room: int, case: Case) -> Ended:
        if not self.mounted:
            limit = max(room // 4, 1)

            def small_files() -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            return run(case.command, self.disk, before=small_files)
        _command("mount", "-o", f"remount,size={self._used() + room + 4096}", str(self.disk))
        try:
            # What it says goes elsewhere: the output of this process is no part of the fault.
            return _run_outside(case, self.disk)
        finally:
            _command("mount", "-o", f"remount,size={_PLENTY}", str(self.disk))

    def _what_is_wrong(self, case: Case, ended: Ended) -> str:
        from agents.runs.whole import TornCheckpointError, check_whole

        last = (ended.output.strip().splitlines() or [""])[-1]
        if ended.code != 2 or case.output.partition(".")[0] not in last or not _says_full(last):
            return f"exit code {ended.code}\n{ended.output[-1500:]}"
        for folder in [*self.disk.glob("out/checkpoint-*"), *self.disk.glob("out/final")]:
            try:
                check_whole(folder)
            except TornCheckpointError as error:
                return str(error)
        left = [str(path) for path in self.disk.rglob(".*.new")]
        return f"left lying about: {left}" if left else ""

    def _read_only(self, case: Case) -> None:
        self._clear()
        row = self.table.row("the disk may only be read")
        if self.mounted:
            _command("mount", "-o", "remount,ro", str(self.disk))
            undo: Callable[[], object] = lambda: _command("mount", "-o", "remount,rw", str(self.disk))  # noqa: E731
        elif os.getuid():
            self.disk.chmod(0o555)
            undo = lambda: self.disk.chmod(0o755)  # noqa: E731
        else:
            return
        try:
            ended = _run_outside(case, self.disk)
        finally:
            undo()
        last = (ended.output.strip().splitlines() or [""])[-1]
        named = ended.code == 2 and "out" in last and ("Read-only" in last or "Permission" in last)
        row.add(
            "exit code 2, and what cannot be written, by its path" if named else last[-80:],
            "" if named else f"{case.name}: {ended.code}\n{ended.output[-1500:]}",
        )

    def _clear(self) -> None:
        for path in [*self.disk.glob("out*"), *self.disk.glob(".out*")]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _run_outside(case: Case, disk: Path) -> Ended:
    """Run a case on the disk, its output written elsewhere."""
    from processes import finish, start

    output = disk.parent / ".output-disk"
    try:
        return finish(start(case.command, disk, output), output)
    finally:
        output.unlink(missing_ok=True)


def _says_full(line: str) -> bool:
    return any(text in line for text in ("No space left", "File too large", "os error 28", "os error 27"))


def _command(*words: str) -> bool:
    return subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def _blocks(path: Path) -> int:
    """What a file takes on the disk, in bytes of whole pages."""
    return -(-path.lstat().st_size // 4096) * 4096


def _bytes_in(folder: Path) -> int:
    return sum(_blocks(path) for path in folder.rglob("*"))
