"""What each fast way earns: one of our own steps with everything on, and with one thing off at a time.

Run by ``python benchmarks/speed --only ablation``, about five minutes. Every figure is a process of its own; rounds of
all of them follow one another, so that a machine that slows down does so for each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import workloads

ROUNDS = 2
#: Steps of a process, the first of which is not counted.
STEPS = 3
#: What is off, and the public switch that does it.
SWITCHES = {
    "everything on": {},
    "fused Llama forward": {"TEXTRL_DISABLE": "fused"},
    "shared prompts": {"TEXTRL_DISABLE": "shared_prompts"},
    "packing": {"TEXTRL_DISABLE": "packing"},
    "cache for decoding": {"TEXTRL_DISABLE": "cache"},
}
#: Without a cache a long response takes minutes; what it brings needs no ablation.
STEP_OF = {
    "uniform": ("everything on", "fused Llama forward", "shared prompts", "packing"),
    "long-prompt": ("everything on", "fused Llama forward", "shared prompts", "packing"),
}
SMALL = {
    "CartPole-v1": {
        "everything on": ((), {}),
        "flat Adam": (("--adam",), {}),
        "one thread": ((), {"TEXTRL_TUNE_PROCESS": "0"}),
    },
    "embedded world": {
        "everything on": ((), {}),
        "fused Llama forward": ((), {"TEXTRL_DISABLE": "fused"}),
        "one thread": ((), {"TEXTRL_TUNE_PROCESS": "0"}),
    },
}


def measure(run: Callable[..., dict[str, Any]], folder: Callable[[str], Path]) -> dict[str, Any]:
    """Seconds of a step of every row.

    Args:
        run: Runs a script of this folder with arguments and ``environment``, and returns the JSON it prints.
        folder: Where the model of a workload lies.

    Returns:
        ``{work: {what is off: [seconds of each step]}}``.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for work, names in STEP_OF.items():
            for name in names:
                arguments = (work, folder(work), "--steps", STEPS)
                result = run("ours.py", *arguments, environment=SWITCHES[name])
                found.setdefault(work, {}).setdefault(name, []).extend(result["seconds"])
        for work, rows in SMALL.items():
            for name, (flags, environment) in rows.items():
                result = run("small.py", work.split()[0].lower(), *flags, environment=environment)
                found.setdefault(work, {}).setdefault(name, []).extend(result["seconds"])
    return found


def table(found: dict[str, Any]) -> str:
    """A Markdown table: how much longer a step takes without each."""
    lines = ["| step | without | seconds | longer by |", "| --- | --- | --- | --- |"]
    for work, rows in found.items():
        what = f"GRPO, {work}" if work in workloads.WORKLOADS else f"PPO, {work}"
        base = statistics.median(rows["everything on"])
        for name, seconds in rows.items():
            median = statistics.median(seconds)
            without = "(everything on)" if name == "everything on" else name
            longer = "" if name == "everything on" else f"{100 * (median / base - 1):+.0f} %"
            lines.append(f"| {what} | {without} | {median:.3g} | {longer} |")
    return "\n".join(lines)
