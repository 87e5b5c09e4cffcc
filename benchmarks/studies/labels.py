"""Comparisons or marks? What a reward model learns from raters who compare, and from raters who give marks.

A rater who compares two answers prefers the better one by Bradley-Terry. A rater who gives marks sees one answer at a
time: the mark is gold plus half as much noise as a comparison has (so that two marks by one rater are as good as one
comparison), plus what is the rater's own: a strict one and a lenient one differ by an offset, and one spreads marks
where another does not. Two answers are then ordered by the marks of two different raters. As many pairs either way.

Left out: what marks have that comparisons have not, by how much one answer is better.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.best_of_n import best_of_n
from benchmarks.studies.frame import Job, markdown, mean_and_error
from benchmarks.studies.policies import CHOSEN_FROM, COMPARED, Answers, accuracy, answers_of_sft, train_reward
from textrl_env.embedded import raters

SEEDS = 3
PAIRS = 2000
#: Standard deviation of raters' offsets, and of the logarithm of how far they spread their marks.
OFFSETS = (0.0, 0.15, 0.3)
_SPREAD = 0.3
#: Raters who give marks.
RATERS = 20


def jobs(seeds: int) -> list[Job]:
    """One for each reward model."""
    found = [answers_of_sft("heldout", CHOSEN_FROM), answers_of_sft("train", COMPARED)]
    for seed in range(seeds):
        found += [_job(None, seed), *(_job(offset, seed) for offset in OFFSETS)]
    return found


def _job(offset: float | None, seed: int) -> Job:
    def run(arrays: Path) -> dict[str, Any]:
        answers = Answers.of("train", COMPARED)
        choices = answers.compared(PAIRS, seed) if offset is None else marked(answers, PAIRS, seed, offset)
        heldout = Answers.of("heldout", CHOSEN_FROM)
        scores = train_reward(answers.records(choices), arrays, seed)
        return {
            "labels_right": answers.right(choices),
            "accuracy": accuracy(scores, heldout.gold),
            "best_of_16": best_of_n(scores, heldout.gold, 16).gold,
        }

    return Job(f"labels-{'compared' if offset is None else f'marks-{offset:g}'}-{seed}", run, seed)


def marked(answers: Answers, count: int, seed: int, offset: float) -> list[tuple[int, int, int]]:
    """Pairs ordered by the marks that two raters gave, one to each answer."""
    rng = np.random.default_rng([seed, 2])
    offsets = offset * rng.standard_normal(RATERS)
    spreads = np.exp(_SPREAD * rng.standard_normal(RATERS)) if offset else np.ones(RATERS)
    # A comparison adds logistic noise of variance (pi / scale)^2 / 3 to a difference; each of two marks half of it.
    noise = np.pi / raters.SCALE / np.sqrt(6)
    choices = []
    for prompt, one, other in answers.pairs(count, seed):
        who = rng.choice(RATERS, 2, replace=False)
        gold = answers.gold[prompt, [one, other]]
        marks = offsets[who] + spreads[who] * (gold + noise * rng.standard_normal(2))
        choices.append((prompt, one, other) if marks[0] >= marks[1] else (prompt, other, one))
    return choices


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each kind of label."""
    labels = {"labels-compared-": "comparisons"}
    labels |= {"labels-marks-0-": "marks, all raters alike"}
    labels |= {f"labels-marks-{o:g}-": f"marks, raters differ by {o:g} (and in spread)" for o in OFFSETS if o}
    rows = []
    for prefix, label in labels.items():
        found = [r for name, r in results.items() if name.startswith(prefix)]
        if found:
            shares = [mean_and_error([100 * r[name] for r in found]) for name in ("labels_right", "accuracy")]
            rows.append([label, len(found), *shares, mean_and_error([r["best_of_16"] for r in found])])
    heads = ["labels", "#seeds", "#labels that gold agrees with, %", "#accuracy of the reward model, %"]
    return markdown([*heads, "#gold of its best of 16"], rows)


def figure(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Accuracy of the reward model by what it learned from."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import style_axes

    canvas = Figure(figsize=(6.4, 3.2), dpi=130, layout="constrained")
    axes = canvas.subplots()
    names = ["labels-compared-", *(f"labels-marks-{offset:g}-" for offset in OFFSETS)]
    for i, prefix in enumerate(names):
        found = [100 * r["accuracy"] for name, r in results.items() if name.startswith(prefix)]
        if found:
            axes.plot([i] * len(found), found, "o", color="#1f6fb4" if i == 0 else "#b8860b", markersize=6)
            axes.hlines(np.mean(found), i - 0.25, i + 0.25, color="#444444", linewidth=1.5)
    style_axes(axes)
    axes.set_xticks(
        range(len(names)), ["comparisons", *(f"marks, offsets {o:g}" for o in OFFSETS)], fontsize=9
    )
    axes.set_ylabel("accuracy against gold, %", fontsize=9)
    canvas.savefig(file)
