"""One board, two learners: an MLP that gets the cell's number, and a language model that reads the board as text.

    python examples/one_board.py [--seeds 10] [--jobs 2]

Both learn the same ``GridWorld-v0`` (at most 10 moves) by GRPO. The MLP gets the cell as a one-hot array and acts one
of four moves. The language model reads the board in letters and writes "right" and an end of line; it has learnt from
random walks before, so that both begin as random walkers. Walks, weights and order of a run come from its seed. Success
over episodes and over moves goes to ``docs/one_board.png``, the table to the terminal. Every seed's result is a JSON in
the folder, so the command goes on where it was stopped.

Left out: other agents (REINFORCE and PPO run the same way), and boards that differ between episodes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.commands.demo_grid import GAME, HYPER_PARAMETERS, MAP, MAX_MOVES, TOTAL_TIMESTEPS

#: What each learner is called, its line in the picture, and its colour.
LEARNERS = {
    "mlp": ("MLP, the cell's number", "#1f6fb4"),
    "lm": ("language model, the board as text", "#b8860b"),
}
#: Of the MLP: GRPO's as in benchmarks/learning.py, with the language model's batches.
MLP = {"n_episodes": 64, "learning_rate": 1e-2, "scale": "none"}
MLP_STEPS = 12_000
#: The share of successful walks that counts as learnt.
GOAL = 0.95


def learn(learner: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train one learner with one seed; success before, after and on the way."""
    import gymnasium as gym
    import torch

    import textrl_env  # noqa: F401  registers the ids
    from agents import GRPO
    from agents.commands.demo_grid import Success, make_grid_walker, success_rate

    torch.set_num_threads(1)
    started = time.process_time()
    if learner == "mlp":
        env: Any = gym.make_vec("GridWorld-v0", num_envs=64, map=MAP, max_episode_steps=MAX_MOVES)
        agent, steps = GRPO("MlpPolicy", env, seed=seed, **MLP), MLP_STEPS
    else:
        walker = folder / f"walker_{seed}"
        make_grid_walker(walker, seed)
        env = gym.make("TextGame-v0", **GAME | {"model": str(walker)})
        agent, steps = GRPO("auto", env, seed=seed, **HYPER_PARAMETERS), TOTAL_TIMESTEPS
    made = time.process_time() - started
    curve = Success()
    agent.learn(steps, curve, log_interval=None)
    seconds = time.process_time() - started
    episodes, moves, timesteps, success = (list(column) for column in zip(*curve.points, strict=True))
    return {
        "learner": learner,
        "seed": seed,
        "episodes": episodes,
        "moves": moves,
        "timesteps": timesteps,
        "success": success,
        "before": success[0],
        "after": success_of_mlp(agent) if learner == "mlp" else success_rate(agent),
        "seconds": seconds,
        "seconds_before_learning": made,
    }


def success_of_mlp(agent: Any, episodes: int = 256, seed: int = 10_000) -> float:
    """The share of fresh episodes in which the present policy, sampled, reaches the goal."""
    import gymnasium as gym

    env = gym.make_vec("GridWorld-v0", num_envs=episodes, map=MAP, max_episode_steps=MAX_MOVES)
    observation, _ = env.reset(seed=seed)
    over, success = np.zeros((2, episodes), dtype=bool)
    while not over.all():
        action, _ = agent.predict(observation)
        observation, _, terminated, truncated, info = env.step(action)
        ends = (terminated | truncated) & ~over
        # Where an episode has ended the next one has begun, and its last info stands apart.
        success[ends] = info["final_info"]["is_success"][ends] if ends.any() else False
        over |= ends
    return float(success.mean())


def run(job: tuple[str, int, Path]) -> dict[str, Any]:
    """Train, or read what an earlier call has left."""
    learner, seed, folder = job
    file = folder / f"{learner}_{seed}.json"
    if not file.is_file():
        result = learn(learner, seed, folder)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
        unfinished.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


def reached(result: dict[str, Any], axis: str) -> float:
    """Episodes, moves or timesteps after which three updates in a row had been successful; infinite if none were."""
    for i in range(len(result["success"]) - 2):
        if min(result["success"][i : i + 3]) >= GOAL:
            return result[axis][i]
    return float("inf")


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, medians over seeds with the worst and the best."""
    lines = [
        "| | seeds | success before | after (worst seed) | episodes to 95 % | moves to 95 % | CPU seconds |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for learner, (label, _) in LEARNERS.items():
        runs = [r for r in results if r["learner"] == learner]
        if not runs:
            continue
        before, after, seconds = ([r[name] for r in runs] for name in ("before", "after", "seconds"))
        needed = [
            f"{statistics.median(reached(r, axis) for r in runs):,.0f}" for axis in ("episodes", "moves")
        ]
        lines.append(
            f"| {label} | {len(runs)} | {np.mean(before):.1%} | {np.mean(after):.1%} ({min(after):.1%}) "
            f"| {needed[0]} | {needed[1]} | {statistics.median(seconds):.0f} |"
        )
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Success over episodes and over moves: medians over seeds in bands from the lowest to the highest."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import smoothed, style_axes

    figure = Figure(figsize=(9.0, 3.7), dpi=150, layout="constrained")
    figure.suptitle(
        "The same board, learnt from arrays and from text", fontsize=12, fontweight="bold", x=0.012, ha="left"
    )
    for axes, (axis, heading) in zip(
        figure.subplots(1, 2, sharey=True),
        (("episodes", "Success over episodes"), ("moves", "Success over steps on the board")),
        strict=True,
    ):
        for learner, (label, colour) in LEARNERS.items():
            runs = [r for r in results if r["learner"] == learner]
            if not runs:
                continue
            ends = [r[axis][-1] for r in runs]
            at = np.linspace(0, min(ends), 200)
            curves = [np.interp(at, r[axis], smoothed(np.array(r["success"]), 0.06)) for r in runs]
            low, middle, high = np.quantile(curves, [0, 0.5, 1], axis=0)
            axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(at, middle, color=colour, linewidth=2, label=f"{label} ({len(runs)} seeds)")
        axes.axhline(GOAL, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axes.set_title(heading, fontsize=10.5, loc="left")
        axes.set_xlabel({"episodes": "episodes seen", "moves": "moves seen"}[axis], fontsize=9.5)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        style_axes(axes)
    figure.axes[0].legend(loc="lower right", fontsize=9, frameon=False)
    figure.supxlabel(
        "medians over seeds, bands from the lowest to the highest", fontsize=8.5, color="#888888"
    )
    figure.savefig(file)


def main() -> None:
    """Train what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--learners", nargs="+", default=list(LEARNERS), choices=LEARNERS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--folder", type=Path, default=Path("build/one_board"), help="where results are kept")
    parser.add_argument("--picture", type=Path, default=Path("docs/one_board.png"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (learner, seed, arguments.folder) for seed in range(arguments.seeds) for learner in arguments.learners
    ]
    results = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for result in pool.imap_unordered(run, jobs):
            results.append(result)
            print(
                f"[{len(results)}/{len(jobs)}] {result['learner']} seed {result['seed']}: {result['before']:.1%} to "
                f"{result['after']:.1%} in {result['seconds']:.0f} s of CPU",
                flush=True,
            )
    print("\n" + table(results))
    draw(results, arguments.picture)


if __name__ == "__main__":
    main()
