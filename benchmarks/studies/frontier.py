"""The frontier of methods: how much gold does each reach, and how far from the SFT model does it go for it?

PPO, GRPO, REINFORCE and RLOO learn from the embedded reward model; DPO learns from 4,000 comparisons of the raters
without one; SFT on the best samples imitates the best of eight answers by the reward model; best-of-n chooses among n
answers when asked. All start from the SFT model and are judged on the 128 held-out prompts by the gold rubric.

Left out: tuning. Each method has the settings that the command line starts from, but for a learning rate of 1e-3 in
those that sample, and DPO and SFT have two strengths each.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies import overoptimisation, verdict
from benchmarks.studies.frame import Job, markdown, mean_and_error
from benchmarks.studies.policies import (
    CHOSEN_FROM,
    COMPARED,
    TOKENS,
    Answers,
    Recipe,
    answers_of_sft,
    measure,
    train,
)

SEEDS = 3
#: Methods that learn by sampling, beside those of the verdict's study, with the penalty of GRPO there.
SAMPLING = ("REINFORCE", "RLOO")
#: Weights of the KL in DPO, and passes over the best samples.
DPO_BETAS, PASSES = (0.3, 0.1), (1, 3)
COMPARISONS = 4000


def jobs(seeds: int) -> list[Job]:
    """The cheap ones of a seed first."""
    found = [answers_of_sft("heldout", CHOSEN_FROM), answers_of_sft("train", COMPARED), _best_of_n()]
    for seed in range(seeds):
        found += [_dpo(beta, seed) for beta in DPO_BETAS] + [_imitate(passes, seed) for passes in PASSES]
        found += [verdict.job(name, seed) for name in ("PPO", "GRPO")]
        found += [_sampling(name, seed) for name in SAMPLING]
    return found


def _sampling(name: str, seed: int) -> Job:
    return Job(f"{name.lower()}-{TOKENS // 1000}k-{seed}", partial(train, Recipe(name, 0.05, seed)), seed)


def _dpo(beta: float, seed: int) -> Job:
    def run(arrays: Path) -> dict[str, Any]:
        from agents.offline.dpo import dpo
        from textrl_env import embedded

        answers = Answers.of("train", COMPARED)
        records = answers.records(answers.compared(COMPARISONS, seed))
        with tempfile.TemporaryDirectory() as folder:
            dpo(embedded.path("sft"), records, folder, beta=beta, batch_size=64, seed=seed, device="cpu")
            return measure(folder, seed=seed)

    return Job(f"dpo-{beta:g}-{seed}", run, seed)


def _imitate(passes: int, seed: int) -> Job:
    def run(arrays: Path) -> dict[str, Any]:
        from agents.offline.sft import sft
        from textrl_env import embedded

        train_answers = Answers.of("train", COMPARED)
        best = train_answers.score.argmax(1)
        records = [
            {"prompt": prompt, "completion": texts[i]}
            for prompt, texts, i in zip(train_answers.prompts, train_answers.responses, best, strict=True)
        ]
        with tempfile.TemporaryDirectory() as folder:
            settings = {"epochs": passes, "learning_rate": 1e-3, "seed": seed, "device": "cpu"}
            sft(embedded.path("sft"), records, folder, **settings)
            return measure(folder, seed=seed)

    return Job(f"imitate-{passes}-{seed}", run, seed)


def _best_of_n() -> Job:
    def run(arrays: Path) -> dict[str, Any]:
        heldout = Answers.of("heldout", CHOSEN_FROM)
        return overoptimisation.chosen_by(heldout.score) | {"win_rate": _wins(heldout)}

    return Job("best-of-n", run, -1)


def _wins(heldout: Answers) -> list[float]:
    """How often the best of n beats a single answer, ties counting half."""
    from agents.evaluation.best_of_n import chosen

    rates = []
    for n in overoptimisation.CHOICES:
        wins = []
        for score, gold in zip(heldout.score, heldout.gold, strict=True):
            against = (gold[:, None] > gold[None, :]) + 0.5 * (gold[:, None] == gold[None, :])
            wins.append(chosen(score, n) @ against.mean(1))
        rates.append(float(np.mean(wins)))
    return rates


# -- the page ---------------------------------------------------------------------------------------------------


def found_of(results: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Figures of the finished policies by what the page calls them, one for each seed."""
    labels = {
        "PPO": [verdict.job("PPO", seed).name for seed in range(100)],
        "GRPO": [verdict.job("GRPO", seed).name for seed in range(100)],
    }
    labels |= {name: [_sampling(name, seed).name for seed in range(100)] for name in SAMPLING}
    labels |= {f"DPO, beta {beta:g}": [_dpo(beta, seed).name for seed in range(100)] for beta in DPO_BETAS}
    for passes in PASSES:
        name = f"SFT on the best of {COMPARED}, {passes} pass{'es' * (passes > 1)}"
        labels[name] = [_imitate(passes, seed).name for seed in range(100)]
    found = {}
    for label, names in labels.items():
        there = [_figures(results[name]) for name in names if name in results]
        if there:
            found[label] = there
    return found


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    if "ends" not in result:
        return result
    last = result["ends"]["final"]
    return last | {"win_rate": result["verdict"]["gain"]["win_rate"]["mean"], "points": result["points"]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each method, in the order of its gold."""
    rows = []
    for label, found in found_of(results).items():
        cells = [mean_and_error([each[name] for each in found]) for name in ("kl", "gold", "score")]
        wins = mean_and_error([100 * each["win_rate"] for each in found])
        rows.append([np.mean([each["gold"] for each in found]), [label, len(found), *cells, wins]])
    chosen = results.get("best-of-n")
    for i, n in enumerate(overoptimisation.CHOICES if chosen else ()):
        if n in (1, 4, 16, 64):
            kl, gold, wins = chosen["kl"][i], chosen["gold"][i], 100 * chosen["win_rate"][i]
            label = f"best of {n}" if n > 1 else "SFT model"
            rows.append(
                [gold, [label, "–", f"{kl:.2f}", f"{gold:.2f}", f"{chosen['score'][i]:.2f}", f"{wins:.2f}"]]
            )
    rows.sort(key=lambda row: -row[0])
    heads = ["method", "#seeds", "#KL, nats", "#gold", "#proxy", "#win rate over SFT, %"]
    return markdown(heads, [row for _, row in rows])


def figure(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Gold over KL: a mark for each policy, a line for best-of-n, thin lines for what policies passed on their way."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import style_axes

    canvas = Figure(figsize=(7.6, 4.4), dpi=130, layout="constrained")
    axes = canvas.subplots()
    chosen = results.get("best-of-n")
    if chosen:
        axes.plot(
            chosen["kl"],
            chosen["gold"],
            "-",
            color="#888888",
            linewidth=2,
            label="best of n (bound on its KL)",
        )
        for kl, gold, n in zip(chosen["kl"], chosen["gold"], chosen["n"], strict=True):
            axes.annotate(
                str(n), (kl, gold), xytext=(0, -11), textcoords="offset points", fontsize=7, color="#888888"
            )
    colours = ("#1f6fb4", "#c0504d", "#2e7d4f", "#6a4c93", "#b8860b", "#d98880", "#444444", "#7fb3d5")
    for (label, found), colour, marker in zip(found_of(results).items(), colours, "os^Dv<>p", strict=False):
        axes.plot(
            [f["kl"] for f in found],
            [f["gold"] for f in found],
            marker,
            color=colour,
            label=label,
            markersize=6,
        )
        for points in (f["points"] for f in found if "points" in f):
            way = [p["kl"] for p in points], [p["gold_scores"] for p in points]
            axes.plot(*way, color=colour, linewidth=0.8, alpha=0.4, zorder=0)
    style_axes(axes)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("KL to the SFT model (nats)", fontsize=9)
    axes.set_ylabel("gold on held-out prompts", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    canvas.savefig(file)
