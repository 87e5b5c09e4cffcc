"""The notebook that measures an estimator of one's own runs as it stands, and its claims hold."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import matplotlib
import pytest

from agents import GRPO
from agents.cli import main
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


class OneNumberForAResponse(GRPO):
    def advantages(self, rollout):
        return self.episode_scores(rollout)


class OneColumn(GRPO):
    def advantages(self, rollout):
        return self.episode_scores(rollout)[:, None]


class OneMetric(GRPO):
    def loss(self, batch, new):
        losses, metrics = super().loss(batch, new)
        return losses, metrics | {"mine": losses.mean()}


class NotANumber(GRPO):
    def advantages(self, rollout):
        return super().advantages(rollout) * float("nan")


class Nothing(GRPO):
    def advantages(self, rollout):
        return super().advantages(rollout) * 0.0


class Misspelt(GRPO):
    def advantages(self, rollout):
        return rollout.reward


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (
            OneNumberForAResponse,
            r"advantages\(\) of OneNumberForAResponse .* \[64, 4\], got the shape \[64\]",
        ),
        (OneColumn, r"got the shape \[64, 1\]"),
        (OneMetric, r"the metric 'mine' that loss\(\) returns .* got the shape \[\]"),
        (NotANumber, "a step of NotANumber is not finite"),
        (Nothing, "every step of Nothing is 0"),
        (Misspelt, r"no attribute 'reward' \(test_your_estimator\.py, line \d+; --debug"),
    ],
)
def test_a_mistake_in_ones_own_estimator_is_told_and_not_measured(cls, told, capsys):
    assert main(["gradients", "--agent", f"tests.test_your_estimator:{cls.__name__}", "--batches", "4"]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_an_argument_that_is_refused_everywhere_is_an_error(capsys):
    assert main(["gradients", "--agent", "grpo", "--arg", "group_size=7", "--batches", "4"]) == 2
    assert (
        "GRPO cannot be measured: n_episodes=64 must be a multiple of group_size=7" in capsys.readouterr().err
    )
