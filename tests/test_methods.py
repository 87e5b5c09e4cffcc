"""The table of methods is what the package exports, the command line takes and the docs list."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

import agents
from agents.algorithms import methods
from agents.runs.registry import AGENTS, find_agent
from benchmarks.gradients import METHODS_DOCUMENT, methods_page

ROOM = Path(methods.__file__).parent
every_method = pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)


def test_names_and_classes_are_there_once():
    for key in ("name", "class_name"):
        values = [getattr(method, key).lower() for method in methods.METHODS]
        assert len(set(values)) == len(values)


@every_method
def test_a_method_is_exported_under_its_class_and_found_under_its_name(method):
    cls = getattr(agents, method.class_name)
    assert method.class_name in agents.__all__
    assert cls.__module__ == method.module and issubclass(cls, agents.Agent)
    for name in (method.name, method.class_name, method.class_name.upper()):
        assert find_agent(name) is cls and methods.find_method(name) is method
    assert AGENTS[method.name] == f"agents:{method.class_name}"


def test_every_agent_that_is_exported_is_in_the_table():
    exported = {name for name in agents.__all__ if _is_method(getattr(agents, name))}
    assert exported == {method.class_name for method in methods.METHODS}


def _is_method(thing) -> bool:
    return isinstance(thing, type) and issubclass(thing, agents.Agent) and thing is not agents.Agent


def test_every_file_of_the_room_is_a_method_of_the_table():
    files = {file.stem for file in ROOM.glob("*.py")} - {"__init__"}
    listed = {m.module.rpartition(".")[2] for m in methods.METHODS if m.module.startswith(methods.__name__)}
    assert files == listed


@every_method
def test_an_entry_says_what_it_is(method):
    assert method.family in methods.FAMILIES
    assert method.expects in methods.EXPECTATIONS
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", method.paper)
    assert method.changes and not method.changes.endswith(".")
    source = Path(agents.__file__).parents[1].joinpath(*method.module.split(".")).with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    assert method.paper in docstring, "the file's docstring names the paper"


def test_the_page_of_methods_is_that_of_the_table():
    written = METHODS_DOCUMENT.read_text(encoding="utf-8")
    assert written == methods_page(), "write it again: python benchmarks/gradients.py --methods"


def test_a_method_that_has_moved_is_found_where_it_was():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from agents.algorithms.gigpo import GiGPO
        from agents.algorithms.grpo_variants import RLOO
    assert (RLOO, GiGPO) == (agents.RLOO, agents.GiGPO)
    assert {str(w.message) for w in caught} == {
        "agents.algorithms.grpo_variants has moved to agents",
        "agents.algorithms.gigpo has moved to agents.algorithms.methods.gigpo",
    }
