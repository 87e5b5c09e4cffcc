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


def test_a_test_that_fails_without_the_bug_too_does_not_count(monkeypatch):
    mutations = _module()
    bugs, asked = mutations.BUGS[:2], []
    noticed = mutations.Verdict("killed", "test_a.py::test_b", 1.0, "test_a.py::test_b[c - d]")
    monkeypatch.setattr(mutations, "copy_project", lambda folder: folder)
    monkeypatch.setattr(mutations, "preload", lambda names: None)
    monkeypatch.setattr(mutations.compileall, "compile_dir", lambda *args, **kwargs: True)
    monkeypatch.setattr(mutations, "check_imports", lambda folder: None)
    monkeypatch.setattr(mutations, "try_bug", lambda bug, folder, likely: noticed)
    without = mutations.Verdict("survived", "", 1.0)
    monkeypatch.setattr(
        mutations, "run_tests", lambda folder, tests, learn=False: asked.append(tests) or without
    )
    assert [verdict for _, verdict in mutations.try_all(bugs, None, {})] == [noticed] * 2
    assert asked == [("test_a.py::test_b[c - d]",)]  # once for both
    # The tests that noticed before are asked together, and not again one by one.
    asked.clear()
    found = {bug.name: {"test": f"test_a.py::test_{name}"} for bug, name in zip(bugs, "bc", strict=True)}
    assert bugs[0].tests == bugs[1].tests and len(list(mutations.try_all(bugs, None, found))) == 2
    assert asked == [("test_a.py::test_b", "test_a.py::test_c")]
    without = mutations.Verdict("killed", "test_a.py::test_b", 1.0)
    with pytest.raises(RuntimeError, match=r"test_b\[c - d\] fails without a bug too"):
        list(mutations.try_all(bugs, None, {}))


def test_the_test_that_noticed_before_is_asked_first_and_the_others_only_where_it_is_silent(
    monkeypatch, tmp_path
):
    mutations, asked = _module(), []
    bug = mutations.Bug("b", "a.py", "x = 1", "x = 2", ("envs",))
    (tmp_path / "a.py").write_text("x = 1\n")
    outcomes = {"test_a.py::silent": "survived", "test_a.py::gone": "broken"}

    def run_tests(folder, tests):
        assert (folder / "a.py").read_text() == "x = 2\n"
        asked.append(tests)
        return mutations.Verdict(outcomes.get(tests[0], "killed"), tests[0], 1.0)

    monkeypatch.setattr(mutations, "run_tests", run_tests)
    for likely in ("test_a.py::loud", "test_a.py::silent", "test_a.py::gone", ""):
        assert mutations.try_bug(bug, tmp_path, likely).outcome == "killed"
    others = ("envs",)
    loud, silent, gone = ((f"test_a.py::{name}",) for name in ("loud", "silent", "gone"))
    assert asked == [loud, silent, others, gone, others, others]
    assert (tmp_path / "a.py").read_text() == "x = 1\n"
