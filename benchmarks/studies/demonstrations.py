"""What do demonstrations teach? LIMA in small, and what a few hundred refusals do.

The base model is fine-tuned on 3,030 demonstrations by imperfect people (six for each training prompt), on the 200 best
of them, and on 200 taken at random, after Zhou et al. (2023, "LIMA: Less Is More for Alignment"). Then on 1,500
demonstrations none of which refuses anything, with 0 to 300 refusals of harmful requests mixed in (after Bianchi et al.
2024, "Safety-Tuned LLaMAs"): how many harmful requests are refused afterwards, and how many harmless ones?

Left out: demonstrations written by other models.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.frame import ROOT, Job, markdown, mean_and_error

SEEDS = 3
#: Demonstrations of each training prompt, how many are kept, and refusals that are mixed in.
EACH, KEPT, REFUSALS = 6, 200, (0, 10, 30, 100, 300)
#: Demonstrations without a refusal, beside them.
OTHERS = 1500
#: Gradient steps of every model, so that none has seen more than another.
STEPS, BATCH = 190, 32
SETS = ("noisy", "best", "random")


def jobs(seeds: int) -> list[Job]:
    """One for each model."""
    found = []
    for seed in range(seeds):
        found += [_lima(name, seed) for name in SETS] + [_refusing(count, seed) for count in REFUSALS]
    return found


def _lima(name: str, seed: int) -> Job:
    def run(arrays: Path) -> dict[str, Any]:
        from textrl_env.embedded import gold_score

        written = demonstrations(seed)
        if name == "best":
            gold = gold_score([r["prompt"] for r in written], [r["completion"] for r in written])
            # Of equals the first ones written; the best 200 of all, whatever they ask.
            written = [written[i] for i in np.argsort(-np.array(gold), kind="stable")[:KEPT]]
        elif name == "random":
            written = random.Random(seed).sample(written, KEPT)
        return _fine_tuned(written, seed)

    return Job(f"sft-{name}-{seed}", run, seed)


def _refusing(count: int, seed: int) -> Job:
    def run(arrays: Path) -> dict[str, Any]:
        from agents.evaluation.kinds import ANSWERS, REFUSES, manner

        rng = random.Random(seed)
        written = demonstrations(seed)
        none = [r for r in written if manner(r["completion"]) == ANSWERS]
        refusals = [
            r for r in demonstrations(seed + 100, 60, ("harm",)) if manner(r["completion"]) == REFUSES
        ]
        return _fine_tuned(rng.sample(none, OTHERS) + refusals[:count], seed) | {"refusals": count}

    return Job(f"sft-refusals-{count}-{seed}", run, seed)


def demonstrations(seed: int, each: int = EACH, kinds: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """What imperfect people would answer to the training prompts.

    Args:
        seed: Of the writing and of the order.
        each: Demonstrations of each prompt.
        kinds: Only prompts of these kinds; None is all.
    """
    sys.path.insert(0, str(ROOT / "examples"))
    import make_embedded_world

    from textrl_env import embedded
    from textrl_env.data.prompts import load_prompts
    from textrl_env.embedded import world

    rng = random.Random(seed)
    asked = [world.question_of(prompt) for prompt in load_prompts(embedded.path("prompts_train")).texts]
    asked = [q for q in asked if kinds is None or q.kind in kinds]
    found = [
        {"prompt": q.prompt, "completion": make_embedded_world.demonstration(q, rng)}
        for q in asked
        for _ in range(each)
    ]
    rng.shuffle(found)
    return found


def _fine_tuned(records: list[dict[str, str]], seed: int) -> dict[str, Any]:
    """Gold of the model that learned from these, and what it declines, by kind of prompt."""
    import torch

    from agents.evaluation.evaluation import evaluate_policy, heldout_env
    from agents.evaluation.kinds import by_kind
    from agents.offline.sft import sft
    from textrl_env import embedded

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"epochs": STEPS * BATCH / len(records), "batch_size": BATCH, "learning_rate": 1.5e-3}
        sft(embedded.path("base"), records, folder, seed=seed, device="cpu", **settings)
        found = evaluate_policy(folder, heldout_env(), 8, seed)
    kinds = {kind.name: kind for kind in by_kind(found, "kind")}
    harmless = [k for name, k in kinds.items() if name not in ("harm", "unknowable")]
    prompts = [k.prompts for k in harmless]
    return {
        "records": len(records),
        "gold": found.summary()["gold"],
        "length": found.summary()["length"],
        "harm_refused": kinds["harm"].refuses,
        "harmless_refused": float(np.average([k.refuses for k in harmless], weights=prompts)),
        "tool_refused": kinds["tool"].refuses,
        "gold_harm": kinds["harm"].gold,
    }


# -- the page ---------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """Gold by what was learned from, and refusals by how many were taught."""
    words = {
        "noisy": "3,030, by imperfect people",
        "best": "the 200 best of these by gold",
        "random": "200 of these at random",
    }
    rows = []
    for name in SETS:
        found = _of(results, f"sft-{name}-")
        if found:
            cells = [mean_and_error([r[figure] for r in found]) for figure in ("gold", "length")]
            rows.append([words[name], len(found), *cells])
    parts = [markdown(["demonstrations", "#seeds", "#gold", "#tokens in an answer"], rows)] if rows else []
    rows = []
    for count in REFUSALS:
        found = _of(results, f"sft-refusals-{count}-")
        if found:
            names = ("harm_refused", "tool_refused", "harmless_refused")
            cells = [mean_and_error([100 * r[figure] for r in found]) for figure in names]
            rows.append(
                [
                    f"{count} beside {OTHERS:,} others",
                    len(found),
                    *cells,
                    mean_and_error([r["gold"] for r in found]),
                ]
            )
    heads = [
        "refusals taught",
        "#seeds",
        "#harmful refused, %",
        "#how-to refused, %",
        "#all harmless, %",
        "#gold",
    ]
    parts += [markdown(heads, rows)] if rows else []
    return "\n\n".join(parts)


def _of(results: dict[str, dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    return [r for name, r in results.items() if name.startswith(prefix)]


def figure(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Gold by set; refusals of harmful and harmless requests over how many were taught."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import style_axes

    canvas = Figure(figsize=(8.4, 3.4), dpi=130, layout="constrained")
    left, right = canvas.subplots(1, 2)
    for i, name in enumerate(SETS):
        golds = [r["gold"] for r in _of(results, f"sft-{name}-")]
        if golds:
            left.bar(i, np.mean(golds), color="#1f6fb4", width=0.6, alpha=0.35)
            left.plot([i] * len(golds), golds, "o", color="#1f6fb4", markersize=5)
    style_axes(left)
    left.set_xticks(range(3), ["3,030 noisy", "200 best", "200 random"], fontsize=9)
    left.set_title("gold on held-out prompts", fontsize=10.5, loc="left")
    series = {"harm_refused": ("harmful", "#c0504d"), "tool_refused": ("how-to", "#b8860b")}
    series |= {"harmless_refused": ("all harmless", "#1f6fb4")}
    for figure_name, (label, colour) in series.items():
        shown = [(n, [100 * r[figure_name] for r in _of(results, f"sft-refusals-{n}-")]) for n in REFUSALS]
        shown = [(n, shares) for n, shares in shown if shares]
        if shown:
            right.plot([n for n, _ in shown], [np.mean(s) for _, s in shown], "o-", color=colour, label=label)
    style_axes(right)
    right.set_xscale("symlog", linthresh=10)
    right.set_xticks(REFUSALS, [str(n) for n in REFUSALS])
    right.set_xlabel("refusals among the demonstrations", fontsize=9)
    right.set_title("refused, per cent", fontsize=10.5, loc="left")
    if right.lines:
        right.legend(frameon=False, fontsize=8.5)
    else:
        right.set_visible(False)  # nothing of it has been run
    canvas.savefig(file)
