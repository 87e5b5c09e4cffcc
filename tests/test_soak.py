"""The soak in short: processes really killed at random moments, torn files, a full disk, and what the user saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the soak needs Linux")
def test_processes_that_are_killed_and_files_that_are_torn_lose_nothing_and_nobody_is_left_in_silence(
    tmp_path,
):
    keep = tmp_path / "table.json"
    signals = {f"{signal} at a random moment" for signal in ("`kill -9`", "SIGTERM", "Ctrl-C")}
    rows: dict = {}
    for seed in range(5, 9):  # a process may end before its signal; rows of the same file add up
        command = [sys.executable, "benchmarks/soak", "--only", "kills", "tears", "disk", "--tries", "2"]
        command += ["--seed", str(seed), "--keep", str(keep)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr[-3000:]
        rows = json.loads(keep.read_text())
        if rows.keys() & signals:
            break
    assert {"the disk is full at a random moment", "two processes go on with one run at once"} <= rows.keys()
    assert rows.keys() & signals and any(fault.startswith("a file of a checkpoint") for fault in rows)
    for fault, row in rows.items():
        assert row["tries"] and not row["lost"] and "nothing" not in row["seen"], (fault, row)
        assert f"| {fault} | {row['tries']:,} | 0 | " in ended.stdout


def test_a_try_that_the_user_saw_nothing_of_counts_as_lost_and_parts_add_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "soak"))
    monkeypatch.delitem(sys.modules, "table", raising=False)
    from table import MARKS, Table

    for text in ("named", "", "named"):
        table = Table()
        table.read(tmp_path / "kept.json")
        table.row("a fault").add(text)
        table.write(tmp_path / "kept.json")
    assert table.rows["a fault"].lost == ["silence"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    table.put_into(page)
    assert "| a fault | 3 | 1 | named (2); nothing (1) |" in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert "old" not in page.read_text()
