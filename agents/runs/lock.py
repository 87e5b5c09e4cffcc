"""One process at a time in a run directory.

The lock is the operating system's, so it ends with the process that holds it, however that ends. A note beside it says
who holds it; one that a dead process left is recognised by the lock being free.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, HOLDER = ".lock", ".lock.json"


class RunInUseError(RuntimeError):
    """Another process works in the run directory."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run directory, which is made if it is not there.

    Raises:
        RunInUseError: Another process holds it; the message names the process, its host and since when.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, note = FileLock(folder / LOCK), folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunInUseError(
            f"{folder} is in use by {_describe(note)}; wait for it to end, or stop it"
        ) from None
    try:
        holder = _read(note)
        if holder.get("host") not in (None, socket.gethostname()):
            # Locks of another machine may be invisible here, on a network disk.
            raise RunInUseError(
                f"{folder} is in use by {_describe(note)}, as far as can be seen from here; if that process is gone, "
                f"delete {note}"
            )
        now = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        note.write_text(json.dumps(now) + "\n")
        try:
            yield
        finally:
            note.unlink(missing_ok=True)
    finally:
        lock.release()


def _read(note: Path) -> dict:
    try:
        found = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(note: Path) -> str:
    holder = _read(note)
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
