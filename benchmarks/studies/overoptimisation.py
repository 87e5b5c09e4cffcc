"""Over-optimisation after Gao, Schulman and Hilton (2022, "Scaling Laws for Reward Model Overoptimization").

Reward models learn from 250 to 4,000 comparisons by the raters; best-of-n, PPO and GRPO then optimise them. Gold and
proxy are drawn over the square root of the KL, and their laws fitted: ``R(d) = d (a - b d)`` for best-of-n and
``R(d) = d (a - b log d)`` for reinforcement learning, with ``d = sqrt(KL)`` and R the gain of gold over the SFT model.
Ensembles choose by the mean of several reward models, less their standard deviation. What stopping at a budget of KL
would have kept is read off the evaluations on the way.

Left out: reward models of other sizes; the world has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.best_of_n import best_of_n
from benchmarks.studies import verdict
from benchmarks.studies.frame import (
    LAWS,
    RUNS,
    Fit,
    Job,
    fit,
    markdown,
    mean_and_error,
    peak,
    result_of,
)
from benchmarks.studies.policies import (
    CHOSEN_FROM,
    COMPARED,
    TOKENS,
    Answers,
    Recipe,
    accuracy,
    answers_of_sft,
    read_arrays,
    train,
    train_reward,
    write_arrays,
)

SEEDS = 3
#: Comparisons that reward models learn from, and the size of which ensembles are made.
SIZES, MEMBERS_OF = (250, 1000, 4000), 1000
#: What GRPO is penalised by, beside the default of 0.05.
BETAS = (0.0, 0.2)
#: n of best-of-n.
CHOICES = (1, 2, 4, 8, 16, 32, 64)
#: Nats at which a run might have been stopped.
BUDGETS = (1.0, 2.0, 3.0, 4.0, 6.0)
BEST_OF_N, LEARNING = LAWS


def jobs(seeds: int) -> list[Job]:
    """Reward models, then the runs that other studies have too, then those of this one."""
    found = [answers_of_sft("heldout", CHOSEN_FROM), answers_of_sft("train", COMPARED)]
    for seed in range(seeds):
        found += [reward_job(size, seed) for size in SIZES]
        found += [verdict.job(name, seed) for name in verdict.RECIPES]
        found += [_grpo(f"beta-{beta:g}", seed, beta) for beta in BETAS]
        found += [_grpo(f"rm-{size}", seed, 0.05, size) for size in SIZES]
    return found


def reward_job(size: int, seed: int) -> Job:
    """A job: a reward model of so many comparisons, and what best-of-n makes of it."""

    def run(arrays: Path) -> dict[str, Any]:
        answers = Answers.of("train", COMPARED)
        records = answers.records(answers.compared(size, seed))
        scores = train_reward(records, arrays, seed)
        write_arrays(arrays, {"score": scores})
        return {"size": size} | chosen_by(scores)

    return Job(f"reward-{size}-{seed}", run, seed)


def _grpo(name: str, seed: int, beta: float, size: int | None = None) -> Job:
    def run(arrays: Path) -> dict[str, Any]:
        reward = None
        if size is not None:
            result_of(reward_job(size, seed))
            reward = str(RUNS / reward_job(size, seed).name)
        return train(Recipe("GRPO", beta, seed, reward=reward), arrays)

    return Job(f"grpo-{name}-{TOKENS // 1000}k-{seed}", run, seed)


def chosen_by(scores: np.ndarray) -> dict[str, Any]:
    """Best-of-n by these scores of the held-out answers; the gain of both in standard deviations of single answers."""
    gold = Answers.of("heldout", CHOSEN_FROM).gold
    found = [best_of_n(scores, gold, n) for n in CHOICES]
    return {
        "accuracy": accuracy(scores, gold),
        "n": list(CHOICES),
        "kl": [each.kl_bound for each in found],
        "gold": [each.gold for each in found],
        "score": [each.score for each in found],
        "proxy": [(each.score - found[0].score) / scores.std() for each in found],
    }


def _ensembles(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Best-of-n by several reward models at once; nothing where there are fewer than two."""
    names = [name for name in results if name.startswith(f"reward-{MEMBERS_OF}-")]
    if len(names) < 2:
        return {}
    scores = np.stack([read_arrays(RUNS / name)["score"] for name in names])  # [members, P, n]
    few = f"{len(names)} of {MEMBERS_OF:,}"
    return {
        f"{few}, their mean": chosen_by(scores.mean(0)),
        f"{few}, mean - std": chosen_by(scores.mean(0) - scores.std(0)),
    }


# -- the page ---------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """Best-of-n, learning and early stopping, each a table."""
    parts = [_best_of_n_table(results), _learning_table(results), _budget_table(results)]
    return "\n\n".join(part for part in parts if part)


def _best_of_n_table(results: dict[str, dict[str, Any]]) -> str:
    of_size = {
        f"{size:,}": [r for name, r in results.items() if name.startswith(f"reward-{size}-")]
        for size in SIZES
    }
    of_size |= {name: [found] for name, found in _ensembles(results).items()}
    shown = [CHOICES.index(n) for n in (1, 4, 16, 64)]
    rows = []
    for name, found in of_size.items():
        if found:
            golds = [mean_and_error([r["gold"][i] for r in found]) for i in shown]
            right = mean_and_error([100 * r["accuracy"] for r in found])
            rows.append([name, len(found), right, *golds, *_law(BEST_OF_N, [_points([r]) for r in found])])
    heads = [
        "comparisons",
        "#models",
        "#accuracy, %",
        "#n = 1",
        "#4",
        "#16",
        "#64",
        "a",
        "b",
        "#highest at, nats",
    ]
    return f"Gold of the best of n by a reward model.\n\n{markdown(heads, rows)}"


def _points(found: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Distances and gains of gold of best-of-n."""
    distance = [float(np.sqrt(kl)) for r in found for kl in r["kl"]]
    return distance, [gold - r["gold"][0] for r in found for gold in r["gold"]]


def _law(law: str, seeds: list[tuple[list[float], list[float]]]) -> list[str]:
    """The coefficients of a law with their errors, and where it is highest.

    Each seed is fitted by itself and the error is that of their mean: points of one seed share their answers, so what
    least squares says of them is too sure. It is all there is of one seed.
    """
    together = fit(law, *([x for points in seeds for x in points[i]] for i in (0, 1)))
    found = [fit(law, *points) for points in seeds if sum(d > 0 for d in points[0]) > 2]
    cells = []
    for name in ("a", "b"):
        values = [getattr(each, name) for each in found]
        if len(values) > 1:
            middle, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
        else:
            middle, error = getattr(together, name), getattr(together, f"{name}_error")
        cells.append(f"{middle:.3f} ± {error:.3f}")
    return [*cells, _where(law, together, max(max(points[0]) for points in seeds))]


def _where(law: str, found: Fit, furthest: float) -> str:
    at = peak(law, found)
    # A peak far beyond every point is an extrapolation, and said to be one.
    return f"{at:.1f}" if at <= 2 * furthest**2 else f"beyond {furthest**2:.1f}"


def groups(results: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of every kind by what the page calls them."""
    names = {name: [verdict.job(name, seed).name for seed in range(100)] for name in verdict.RECIPES}
    labels = {"PPO": "PPO, beta 0.1", "GRPO": "GRPO, beta 0.05", "PPO without KL": "PPO, beta 0"}
    found = {label: names[name] for name, label in labels.items()}
    found |= {f"GRPO, beta {b:g}": [_grpo(f"beta-{b:g}", s, b).name for s in range(100)] for b in BETAS}
    found |= {
        f"GRPO, beta 0.05, {n:,} comparisons": [_grpo(f"rm-{n}", s, 0.05, n).name for s in range(100)]
        for n in SIZES
    }
    there = {label: [results[name] for name in names if name in results] for label, names in found.items()}
    return {label: runs for label, runs in there.items() if runs}


def learning_points(runs: list[dict[str, Any]], what: str = "gold_scores") -> tuple[list[float], list[float]]:
    """Distances and gains of all evaluations on the way."""
    distance, gain = [], []
    for run in runs:
        for point in run["points"]:
            distance.append(float(np.sqrt(max(point["kl"], 0.0))))
            gain.append(point[what] - run["points"][0][what])
    return distance, gain


def _learning_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for label, runs in groups(results).items():
        best = mean_and_error([r["ends"].get("best", r["ends"]["final"])["gold"] for r in runs])
        last = mean_and_error([r["ends"]["final"]["gold"] for r in runs])
        kl = mean_and_error([r["ends"]["final"]["kl"] for r in runs])
        rows.append([label, len(runs), best, last, kl, *_law(LEARNING, [learning_points([r]) for r in runs])])
    if not rows:
        return ""
    heads = ["run", "#seeds", "#gold, best", "#gold, last", "#KL, last", "a", "b", "#highest at, nats"]
    return f"Gold of policies that learned for {TOKENS:,} tokens.\n\n{markdown(heads, rows)}"


def _budget_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for label, runs in groups(results).items():
        cells = []
        for budget in BUDGETS:
            # The last evaluation before the KL first goes beyond the budget, as --kl-budget stops a run.
            kept = [stopped(run, budget) for run in runs]
            reached = any(point["kl"] > budget for run in runs for point in run["points"])
            cells.append(mean_and_error(kept) if reached else "–")
        rows.append([label, *cells, mean_and_error([run["points"][-1]["gold_scores"] for run in runs])])
    if not rows:
        return ""
    heads = ["run", *(f"#{budget:g} nats" for budget in BUDGETS), "#to the end"]
    return (
        "Gold at the last evaluation before a run leaves a budget of KL (a dash where it never does).\n\n"
        + markdown(heads, rows)
    )


def stopped(run: dict[str, Any], budget: float) -> float:
    beyond = [i for i, point in enumerate(run["points"]) if point["kl"] > budget]
    last = (beyond[0] - 1) if beyond else len(run["points"]) - 1
    return run["points"][max(last, 0)]["gold_scores"]


def figure(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Gold over the distance for best-of-n and for learning, points and fitted laws."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import style_axes

    canvas = Figure(figsize=(13.0, 4.0), dpi=130, layout="constrained")
    left, middle, right = canvas.subplots(1, 3, sharey=True)
    colours = ("#b8860b", "#c0504d", "#1f6fb4", "#2e7d4f", "#6a4c93")
    series = {
        f"{size:,} comparisons": [r for name, r in results.items() if name.startswith(f"reward-{size}-")]
        for size in SIZES
    }
    series |= {name: [found] for name, found in _ensembles(results).items()}
    for (label, found), colour in zip(series.items(), colours, strict=False):
        if found:
            _draw(left, label, BEST_OF_N, _points(found), colour)
    by_data = {label: runs for label, runs in groups(results).items() if "comparisons" in label}
    by_beta = {label: runs for label, runs in groups(results).items() if label not in by_data}
    for axes, shown in ((middle, by_beta), (right, by_data)):
        for (label, runs), colour in zip(shown.items(), colours, strict=False):
            _draw(axes, label.removeprefix("GRPO, beta 0.05, "), LEARNING, learning_points(runs), colour)
    left.set_title("best of n, by what the reward model has seen", fontsize=10.5, loc="left")
    middle.set_title("learning, by beta", fontsize=10.5, loc="left")
    right.set_title("GRPO at beta 0.05, likewise", fontsize=10.5, loc="left")
    for axes in (left, middle, right):
        style_axes(axes)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.axhline(0, color="#cccccc", linewidth=1)
        axes.set_xlabel("square root of the KL (nats)", fontsize=9)
        if axes.lines[1:]:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.set_visible(False)  # nothing of it has been run
    left.set_ylabel("gain of gold over the SFT model", fontsize=9)
    canvas.savefig(file)


def _draw(axes: Any, label: str, law: str, points: tuple[list[float], list[float]], colour: str) -> None:
    distance, gain = (np.array(x) for x in points)
    axes.plot(distance, gain, "o", color=colour, markersize=3.5, alpha=0.7)
    found = fit(law, *points)
    x = np.linspace(0.05, distance.max(), 100)
    axes.plot(x, x * (found.a - found.b * LAWS[law](x)), color=colour, linewidth=1.8, label=label)
