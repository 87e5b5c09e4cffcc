"""The notebook that measures an estimator of one's own runs as it stands, and its claims hold."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import matplotlib

from examples.your_estimator import AboveMean

NOTEBOOK = Path(__file__).parents[1] / "examples" / "your_estimator.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def body(cls_source: str) -> str:
    """The statements of a class, without docstrings and comments."""
    lines = [line.split("  #")[0].rstrip() for line in cls_source.splitlines()]
    return "\n".join(line for line in lines if line.strip() and not line.strip().startswith('"""'))


def test_the_notebook_runs_and_finds_the_bias_that_it_tells_of(monkeypatch):
    matplotlib.use("Agg")
    source = "\n\n".join(code_cells())
    source, sizes = re.subn(r"^(BATCHES|TOKENS) = [\d_]+", small, source, flags=re.MULTILINE)
    assert sizes == 2
    space = {"__name__": "notebook"}
    exec(compile(source, str(NOTEBOOK), "exec"), space)
    assert space["above"]["z"] > 3 > space["all_of_them"]["z"]
    assert len(space["axes"].lines) == 2
    assert all(len(line.get_xdata()) >= 1 for line in space["axes"].lines)


def small(match: re.Match) -> str:
    return f"{match[1]} = {24 if match[1] == 'BATCHES' else 1}"


def test_the_example_and_the_notebook_have_the_same_estimator():
    cells = "\n\n\n".join(code_cells())
    found = re.search(r"class AboveMean\(.*?(?=\n\n\n|\Z)", cells, re.DOTALL)[0]
    assert body(found) == body(inspect.getsource(AboveMean))
