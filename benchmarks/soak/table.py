"""The table of docs/reliability.md: fault, tries, lost, what the user saw; kept as JSON, so that parts add up."""

from __future__ import annotations

import collections
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

MARKS = ("<!-- soak: begin -->", "<!-- soak: end -->")
#: Texts of the last column that are shown; the rest is counted together.
_SHOWN = 4
#: Characters of what is told about a try that was lost.
_LONGEST = 1500


@dataclass
class Row:
    """One line of the table.

    Attributes:
        fault: What was done.
        tries: How often.
        lost: One text for each try that ended as it must not: other bits, an error without its place, silence.
        seen: What the user saw, and how often.
    """

    fault: str
    tries: int = 0
    lost: list[str] = field(default_factory=list)
    seen: collections.Counter[str] = field(default_factory=collections.Counter)

    def add(self, seen: str, lost: str = "", tries: int = 1) -> None:
        """Count a try.

        Args:
            seen: What the user saw.
            lost: Why it must not be so; empty if all is well.
            tries: How many at once.
        """
        self.tries += tries
        self.seen[seen or "nothing"] += tries
        if lost or not seen:
            self.lost.append((lost or "silence")[-_LONGEST:])

    def cells(self) -> str:
        """As a line of Markdown."""
        common = self.seen.most_common(_SHOWN)
        texts = [f"{text} ({count:,})" for text, count in common]
        rest = self.tries - sum(count for _, count in common)
        texts += [f"other messages of that kind ({rest:,})"] if rest else []
        return f"| {self.fault} | {self.tries:,} | {len(self.lost):,} | {'; '.join(texts)} |"


class Table:
    """Rows by fault, in the order in which they were first seen."""

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}

    def row(self, fault: str) -> Row:
        """The line of a fault."""
        return self.rows.setdefault(fault, Row(fault))

    def read(self, file: Path) -> None:
        """Add what an earlier part has written."""
        if not file.is_file():
            return
        for fault, kept in json.loads(file.read_text(encoding="utf-8")).items():
            row = self.row(fault)
            row.tries += kept["tries"]
            row.lost += kept["lost"]
            row.seen.update(kept["seen"])

    def write(self, file: Path) -> None:
        """Write what :meth:`read` reads."""
        kept = {
            row.fault: {"tries": row.tries, "lost": row.lost, "seen": dict(row.seen)}
            for row in self.rows.values()
        }
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """The whole table."""
        head = ["| fault | tries | lost | what the user saw |", "|---|---|---|---|"]
        return "\n".join([*head, *(row.cells() for row in self.rows.values())])

    def put_into(self, page: Path) -> None:
        """Replace what stands between the marks of a page."""
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        page.write_text(f"{before}{MARKS[0]}\n{self.markdown()}\n{MARKS[1]}{after}", encoding="utf-8")

    def complain(self) -> None:
        """Show what was lost, the first of each row, on standard error."""
        for row in self.rows.values():
            for text in row.lost[:3]:
                print(f"\nlost: {row.fault}\n{text[:_LONGEST]}", file=sys.stderr)
