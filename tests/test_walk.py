"""The walk from prompts to the gradient in docs/design.md is the one that an update takes."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import agents
from tests.tiny import make_env, make_lm

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def walk() -> list[str]:
    """Dotted names in the numbered table."""
    return re.findall(r"^\| \d+ \| `([\w.]+)` \|", DESIGN.read_text(encoding="utf-8"), re.MULTILINE)


def code_of(dotted: str):
    """The code object of a function, or of a method of a class, by its dotted name."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return getattr(found, "__wrapped__", found).__code__
    raise AssertionError(f"{dotted} is not there")


def test_a_walk_has_at_most_twelve_stations():
    assert 1 < len(walk()) <= 12


@pytest.mark.parametrize(("method", "kwargs"), [("GRPO", {"group_size": 2}), ("PPO", {"batch_size": 2})])
def test_an_update_calls_what_the_walk_names_in_its_order(method, kwargs):
    names = {code_of(name): name for name in walk()}
    agent = getattr(agents, method)("auto", make_env(lm=make_lm()), n_episodes=4, seed=0, **kwargs)
    seen: list[str] = []

    def note(frame, event, argument):
        name = names.get(frame.f_code)
        if event == "call" and name and name not in seen:
            seen.append(name)

    sys.setprofile(note)
    try:
        agent.learn(1)
    finally:
        sys.setprofile(None)
    # PPO asks its critic as soon as it has generated.
    assert seen == walk() if method == "GRPO" else sorted(seen) == sorted(walk())
