"""The planted bugs of ``benchmarks/mutations.py`` still have a place in the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _bugs():
    return _module().BUGS


def _module():
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_tells_what_was_noticed_from_what_has_not_been_planted():
    mutations = _module()
    first, second, third = mutations.BUGS[:3]
    noticed = {"planted": mutations.fingerprint(first), "outcome": "killed", "test": "test_a.py::test_b"}
    survived = noticed | {"planted": mutations.fingerprint(second), "outcome": "survived"}
    other = noticed | {"planted": "of another change"}
    page = mutations.document(
        [first, second, third], {first.name: noticed, second.name: survived, third.name: other}
    )
    assert "1 of 2 bugs that have been planted are noticed; the list has 3." in page
    rows = [line.rpartition("| ")[2].rstrip(" |") for line in page.splitlines() if line.startswith("| ")]
    assert rows[-3:] == ["`test_a.py::test_b`", "**survived**", ""]


@pytest.mark.parametrize("bug", _bugs(), ids=lambda bug: bug.name)
def test_a_planted_bug_replaces_text_that_is_there_exactly_once(bug):
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.old) == 1, f"{bug.file} holds {bug.old!r} {text.count(bug.old)} times"
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in bug.tests)
