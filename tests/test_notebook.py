"""The notebook runs from its first cell to its last, in its small form and without jupyter."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "rlhf_in_one_hour.ipynb"


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_TOKENS", "300")
    matplotlib.use("Agg")
    names = {"__name__": "__notebook__"}
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {i}", "exec"), names)
    shown = capsys.readouterr().out
    assert "gold win rate over the start" in shown and "best of  4" in shown
    # What the cells say of the lectures' numbers holds at any length.
    assert "equal answers  [0. 0. 0. 0. 0. 0. 0. 0.]" in shown


def test_the_notebook_is_stored_without_outputs():
    """So that what a reader sees is what the code of today says."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 10 and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
