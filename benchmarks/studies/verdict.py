"""How often does the verdict of ``textrl report`` miss what is there, and how often does it see what is not?

Three kinds of runs, ten seeds each: PPO, GRPO, and PPO without a KL penalty, with the defaults of ``textrl train`` but
for a higher learning rate. Each run's verdict rests on four answers to each of 128 prompts, as in any run; the truth on
24 fresh answers of the same policies. Verdicts are then drawn again and again from those answers, four at a time, which
tells how much of a verdict is luck; where both sides are drawn from one policy, every alarm is a false one.

Beside them four runs of the command line, which are trained if they are not there (:data:`COMMANDS`).

Runs take half an hour, and their falls are as large as they happen to be. So there is a ladder beside them that trains
nothing: best-of-n of the SFT model's own answers by the reward model, whose gold is known exactly for every n. Its
rungs are compared with one another as the best and the last policy of a run would be.

Left out: luck in the choice of prompts. All policies answer the same 128, and the truth is that on these.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agents.evaluation.best_of_n import best_of_n, chosen
from agents.evaluation.evaluation import EvaluationResult
from agents.evaluation.verdict import Comparison, compare
from benchmarks.studies.frame import ROOT, RUNS, Job, markdown, result_of
from benchmarks.studies.policies import (
    ANSWERS,
    CHOSEN_FROM,
    RATE,
    TOKENS,
    Answers,
    Recipe,
    answers_of_sft,
    read_arrays,
    train,
)

SEEDS = 10
PAGE = ROOT / "docs" / "seeing.md"
RECIPES: dict[str, dict[str, Any]] = {
    "PPO": {"agent": "PPO", "kl_coef": 0.1},
    "GRPO": {"agent": "GRPO", "kl_coef": 0.05},
    "PPO without KL": {"agent": "PPO", "kl_coef": 0.0},
}
#: Runs of the command line, whose verdicts are drawn again too.
COMMANDS = {
    "demo": ["demo"],
    "grpo-60k": ["train", "--agent", "grpo", "--total-timesteps", "60000"],
    "grpo-100k": ["train", "--agent", "grpo"],
    "ppo-without-kl": [
        *["train", "--agent", "ppo", "--kl-coef", "0", "--total-timesteps", "24000"],
        *["--learning-rate", "1e-3", "--eval-every", "8000"],
    ],
}
#: Verdicts that are drawn for each run, and answers of each.
_DRAWS, _ANSWERS = 200, 4
#: True falls of gold that count as one, and as none.
FALL, LEVEL = 0.04, 0.01
#: Rungs of the ladder: the n of the "best" policy, and of the "last" ones that it is compared with.
TOP, RUNGS = 8, (8, 7, 6, 5, 4, 3, 2)


def jobs(seeds: int) -> list[Job]:
    """The ladder, and for each run its training and what its verdicts might have been."""
    found = [answers_of_sft("heldout", CHOSEN_FROM), Job("verdict-ladder", _ladder, -1)]
    found += [_command(name) for name in COMMANDS]
    for seed in range(seeds):
        for name in RECIPES:
            found += [job(name, seed), _drawn_again(name, seed)]
    return found


def job(name: str, seed: int) -> Job:
    """One run by the name of its recipe; other studies use it too."""
    slug = name.lower().replace(" ", "-")
    return Job(f"{slug}-{TOKENS // 1000}k-{seed}", partial(train, Recipe(seed=seed, **RECIPES[name])), seed)


def _command(name: str) -> Job:
    """A run of the command line: many answers of its best and its last policy, and verdicts drawn from them."""

    def run(arrays: Path) -> dict[str, Any]:
        import torch

        from agents.evaluation.evaluation import evaluate_policy, heldout_env
        from agents.evaluation.records import read_ends

        torch.set_num_threads(1)
        if not (arrays / "final").is_dir():
            command = [sys.executable, "-m", "agents.cli", *COMMANDS[name], "--run-dir", str(arrays)]
            subprocess.run(command, cwd=ROOT, check=True)
        if not (arrays / "best").is_dir():
            return {"change": None}  # the last policy is the best
        env = heldout_env()
        sides = [
            evaluate_policy(arrays / end, env, ANSWERS, 2000 + i) for i, end in enumerate(("best", "final"))
        ]
        ends = {name: record.means() for name, record in read_ends(arrays).items()}
        pool = Pool(*((side.score, side.gold) for side in sides))
        golds = [ends[end]["gold_scores"] for end in ("start", "best", "final")]
        return {"golds": golds, "kl": ends["final"]["kl"]} | _drawn_from(pool)

    return Job(f"verdict-of-{name}", run, -1)


def _drawn_from(pool: Pool) -> dict[str, Any]:
    """What is true of a run, and what its verdicts might have been."""
    return {
        "change": pool.change,
        "error": pool.error,
        "drawn": shares(pool.draws()),
        "null": shares(pool.draws(null=True)),
    }


def _drawn_again(name: str, seed: int) -> Job:
    """Verdicts drawn from the many answers of a run's best and last policy."""

    def run(arrays: Path) -> dict[str, Any]:
        trained = job(name, seed)
        if "best" not in result_of(trained)["ends"]:
            return {"change": None}
        known = read_arrays(RUNS / trained.name)
        pool = Pool(*((known[f"pool_{end}_score"], known[f"pool_{end}_gold"]) for end in ("best", "final")))
        return _drawn_from(pool)

    return Job(f"verdict-{job(name, seed).name}", run, seed)


def _ladder(arrays: Path) -> dict[str, Any]:
    answers = Answers.of("heldout", CHOSEN_FROM)
    rungs = [Rung(n, answers.score, answers.gold) for n in RUNGS]
    return {"rungs": [{"n": rung.n, "change": rung.change, "drawn": shares(rung.draws())} for rung in rungs]}


# -- rules ------------------------------------------------------------------------------------------------------


def both_ways(since: Comparison) -> str:
    """The rule of the report."""
    return ("level", "in doubt", "fallen")[since.signs_of_loss]


@dataclasses.dataclass(frozen=True)
class Pool:
    """Answers of the best and the last policy of one run, as ``[P, n]`` scores and gold scores."""

    best: tuple[np.ndarray, np.ndarray]
    last: tuple[np.ndarray, np.ndarray]

    @property
    def change(self) -> float:
        """The true change of gold since the best policy, on these prompts."""
        return float(self.last[1].mean() - self.best[1].mean())

    @property
    def error(self) -> float:
        """The standard error of that, from how answers to one prompt scatter."""
        parts = [gold.var(1, ddof=1).mean() / gold.size for gold in (self.best[1], self.last[1])]
        return float(np.sqrt(sum(parts)))

    def draws(self, null: bool = False) -> Iterator[Comparison]:
        """Comparisons of four answers a side; with ``null`` both sides are the best policy's, no answer in both."""
        rng = np.random.default_rng(0)
        count = self.best[1].shape[1]
        for _ in range(_DRAWS):
            rows = rng.permuted(np.tile(np.arange(count), (len(self.best[1]), 1)), axis=1)
            a, b = rows[:, :_ANSWERS], rows[:, _ANSWERS : 2 * _ANSWERS]
            yield compare(_result(*(self.best if null else self.last), a), _result(*self.best, b))


@dataclasses.dataclass(frozen=True)
class Rung:
    """The best of ``TOP`` answers against the best of ``n``: policies whose gold is known exactly.

    Attributes:
        n: Of the policy that plays the last one.
        score: Of the answers that both choose among, ``[P, N]``.
        gold: Of the same.
    """

    n: int
    score: np.ndarray
    gold: np.ndarray

    @property
    def change(self) -> float:
        """The true change of gold."""
        return best_of_n(self.score, self.gold, self.n).gold - best_of_n(self.score, self.gold, TOP).gold

    def draws(self) -> Iterator[Comparison]:
        """Comparisons of four answers a side, each drawn as its policy would choose it."""
        rng = np.random.default_rng(self.n)
        cumulated = [np.cumsum([chosen(row, n) for row in self.score], 1) for n in (self.n, TOP)]
        for _ in range(_DRAWS):
            sides = []
            for chances in cumulated:
                drawn = rng.random((len(chances), _ANSWERS)) * chances[:, -1:]
                at = (drawn[:, :, None] > chances[:, None, :]).sum(2)  # [P, 4]
                sides.append(_result(self.score, self.gold, at))
            yield compare(*sides)


def shares(drawn: Iterable[Comparison]) -> dict[str, float]:
    """Of verdicts that say that gold fell, by its mean alone and by both ways, and of those in doubt."""
    found = list(drawn)
    words = [both_ways(since) for since in found]
    return {
        "by gold alone": float(np.mean([since.gold.is_below for since in found])),
        "by both": words.count("fallen") / len(found),
        "in doubt": words.count("in doubt") / len(found),
    }


def _result(score: np.ndarray, gold: np.ndarray, at: np.ndarray) -> EvaluationResult:
    """The chosen answers as an evaluation, with nothing but their scores."""
    score, gold = (np.take_along_axis(values, at, 1) for values in (score, gold))
    nothing = np.zeros(score.shape)
    prompts = [str(i) for i in range(len(score))]
    texts = [[""] * score.shape[1]] * len(score)
    return EvaluationResult(
        prompts, texts, score, gold, {}, nothing, nothing, nothing > 0, np.arange(len(score))
    )


# -- the page ----------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """The ladder, what the verdicts of the runs were, and how often each rule alarms where gold fell and where not."""
    parts = []
    if "verdict-ladder" in results:
        rows = [
            [f"{abs(rung['change']):.3f}", *_per_cent(rung["drawn"])]
            for rung in results["verdict-ladder"]["rungs"]
        ]
        heads = ["true fall of gold", *_HEADS]
        parts += [f"Policies whose gold is known exactly, {_DRAWS} verdicts each.", markdown(heads, rows)]
    commands = _commands(results)
    if commands:
        parts += [
            f"Runs of the command line: {_DRAWS} verdicts each, drawn from {ANSWERS} answers a side.",
            commands,
        ]
    runs = _runs(results)
    if runs:
        parts += [f"Runs of {TOKENS:,} tokens at a learning rate of {RATE:g}.", runs]
    rates = _rates(results)
    if rates:
        parts += [f"Verdicts drawn again, {_DRAWS} from the answers of each of those runs.", rates]
    return "\n\n".join(parts)


_HEADS = ("#fell, by gold alone", "#fell, by both", "#in doubt")


def _per_cent(drawn: dict[str, float]) -> list[str]:
    return [f"{100 * share:.1f} %" for share in drawn.values()]


def _commands(results: dict[str, dict[str, Any]]) -> str:
    """A row for each run of the command line, the largest fall first."""
    rows = []
    for name, words in COMMANDS.items():
        found = results.get(_command(name).name)
        if found is not None and found["change"] is not None:
            true = f"{found['change']:+.3f} ± {found['error']:.3f}"
            alarms = 100 * found["null"]["by both"]
            cells = [f"`textrl {' '.join(words)}`", true, *_per_cent(found["drawn"]), f"{alarms:.1f} %"]
            rows.append((found["change"], cells))
    heads = ["run", "#gold, best to last", *_HEADS, "#fell, the best policy twice"]
    return markdown(heads, [cells for _, cells in sorted(rows)]) if rows else ""


def _runs(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for kind in RECIPES:
        of = {job(kind, seed).name for seed in range(100)} & results.keys()
        found = [results[name] for name in of]
        if not found:
            continue
        golds = [np.mean([r["ends"].get(end, r["ends"]["final"])["gold"] for r in found]) for end in _ENDS]
        words = [_word(r) for r in found]
        counts = [words.count(word) for word in ("level", "in doubt", "fallen", "over-optimised")]
        kl = np.mean([r["ends"]["final"]["kl"] for r in found])
        rows.append([kind, len(found), ", ".join(f"{g:.2f}" for g in golds), f"{kl:.1f}", *counts])
    heads = ["run", "#seeds", "gold at first, best, last", "#KL, nats", "#improved", "#in doubt"]
    return markdown([*heads, "#fell, score level or lower", "#fell, score higher"], rows) if rows else ""


_ENDS = ("start", "best", "final")


def _word(result: dict[str, Any]) -> str:
    since = result["verdict"]["since_best"]
    if since is None:
        return "level"
    signs = (since["gold"]["high"] < 0) + (since["win_rate"]["high"] < 0.5)
    if signs == 2:
        return "over-optimised" if since["score"]["low"] > 0 else "fallen"
    return ("level", "in doubt")[signs]


def _rates(results: dict[str, dict[str, Any]]) -> str:
    """Shares of drawn verdicts by what is true."""
    found = _drawn(results)
    groups = {
        f"a fall of {FALL:g} or more": [r["drawn"] for r in found if r["change"] <= -FALL],
        f"a fall of {LEVEL:g} to {FALL:g}": [r["drawn"] for r in found if -FALL < r["change"] <= -LEVEL],
        f"no fall of {LEVEL:g} or more": [r["drawn"] for r in found if r["change"] > -LEVEL],
        "the same policy twice": [r["null"] for r in found],
    }
    rows = []
    for name, members in groups.items():
        if members:
            means = {word: float(np.mean([drawn[word] for drawn in members])) for word in members[0]}
            rows.append([name, len(members), *_per_cent(means)])
    return markdown(["what is true of best against last", "#runs", *_HEADS], rows) if rows else ""


def _drawn(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the runs whose last policy is not the best one."""
    names = {_command(name).name for name in COMMANDS}
    runs = [r for name, r in results.items() if name not in names]
    return [r for r in runs if r.get("change") is not None and "null" in r]


def figure(results: dict[str, dict[str, Any]], file: Path) -> None:
    """How often each rule says that gold fell, over the true change."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import style_axes

    canvas = Figure(figsize=(7.2, 3.6), dpi=150, layout="constrained")
    axes = canvas.subplots()
    commands = (results.get(_command(name).name, {"change": None}) for name in COMMANDS)
    found = [*results.get("verdict-ladder", {"rungs": []})["rungs"], *_drawn(results)]
    found += [each for each in commands if each["change"] is not None]
    colours = {"by gold alone": "#888888", "by both": "#1f6fb4", "in doubt": "#b8860b"}
    for (name, colour), marker in zip(colours.items(), "o^x", strict=True):
        marks = [100 * each["drawn"][name] for each in found]
        axes.plot([each["change"] for each in found], marks, marker, color=colour, label=name, markersize=6)
    style_axes(axes)
    axes.xaxis.set_major_formatter("{x:.2f}")
    axes.axvline(0, color="#cccccc", linewidth=1)
    axes.set_xlabel(
        "true change of gold from the best policy to the last, a mark for each rung and run", fontsize=9
    )
    axes.set_ylabel("verdicts, per cent", fontsize=9)
    axes.legend(frameon=False, fontsize=9)
    canvas.savefig(file)
