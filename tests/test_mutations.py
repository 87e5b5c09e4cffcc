"""The planted bugs of ``benchmarks/mutations.py`` still have a place in the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _bugs():
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BUGS


@pytest.mark.parametrize("bug", _bugs(), ids=lambda bug: bug.name)
def test_a_planted_bug_replaces_text_that_is_there_exactly_once(bug):
    text = (ROOT / bug.file).read_text(encoding="utf-8")
    assert text.count(bug.old) == 1, f"{bug.file} holds {bug.old!r} {text.count(bug.old)} times"
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in bug.tests)
