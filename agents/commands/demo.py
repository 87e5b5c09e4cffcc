"""``textrl demo``: reinforcement learning from human feedback, whole, on two CPU cores in about two minutes.

PPO trains the embedded world's assistant against its reward model. On the way, and more thoroughly at the end,
answers to questions that were never trained on are judged by the gold rubric, which the reward model only knows
through simulated raters; the best policy is kept, and the demo ends on it. The hyper-parameters are the constants
below. ``--game grid`` shows another story, :mod:`agents.commands.demo_grid`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

#: PPO's, and the KL coefficient of ``TextRLHF-v0``.
HYPER_PARAMETERS: dict[str, Any] = {
    "learning_rate": "linear:4e-4",
    "n_episodes": 256,
    "batch_size": 64,
    "n_epochs": 2,
    "target_kl": 0.05,
}
KL_COEF = 0.1
TOTAL_TIMESTEPS = 120_000
#: Evaluations on the way.
EVALUATIONS = 8
#: Rows of the table of answers.
_ROWS = 8


def demo(
    run_dir: Annotated[
        str | None,
        typer.Option(
            help="Where everything goes; an earlier run there is replaced.",
            show_default="runs/demo, with a game runs/GAME",
        ),
    ] = None,
    game: Annotated[
        str | None,
        typer.Option(help='"grid": a language model learns to walk over a board that it reads as text.'),
    ] = None,
    total_timesteps: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to learn for.", show_default=f"{TOTAL_TIMESTEPS}, of a game fewer"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything.")] = 0,
) -> None:
    """Train a tiny assistant with PPO and compare its answers with those from before (2 minutes, 2 CPU cores)."""
    import torch
    from rich.console import Console

    from agents.commands.terminal import quiet_transformers
    from textrl_env.errors import check_choice

    if game is not None:
        from agents.commands import demo_grid

        check_choice("--game", game, ("grid",))
        folder = Path(run_dir or f"runs/{game}")
        demo_grid.run(folder, total_timesteps or demo_grid.TOTAL_TIMESTEPS, seed)
        return
    run_dir, total_timesteps = run_dir or "runs/demo", total_timesteps or TOTAL_TIMESTEPS
    # A model this small gains nothing from a second thread, and one thread sums alike on every machine.
    torch.set_num_threads(1)
    started = time.perf_counter()
    console = Console()
    quiet_transformers()
    folder = Path(run_dir)
    _introduce(console, total_timesteps)
    _train(folder, total_timesteps, seed)
    _report(console, folder)
    console.print(f"That took {time.perf_counter() - started:.0f} s.", style="dim", highlight=False)


def _introduce(console: Any, total_timesteps: int) -> None:
    console.print(
        "\n[bold]A small assistant learns from human feedback.[/bold]\n"
        "A token is a step, an answer an episode, a learned reward model gives the reward, and a KL penalty "
        f"keeps the policy near the model it starts from. PPO takes {total_timesteps:,} steps.\n",
        highlight=False,
    )


def _train(folder: Path, total_timesteps: int, seed: int) -> None:
    from agents.commands.learning import learn
    from agents.runs import run_directory as runs
    from agents.runs.lock import locked

    config = runs.new_config(
        agent="ppo",
        agent_kwargs=HYPER_PARAMETERS,
        env="TextRLHF-v0",
        env_kwargs={"kl_coef": KL_COEF},
        total_timesteps=total_timesteps,
        seed=seed,
        save_every=total_timesteps,
        eval_every=max(total_timesteps // EVALUATIONS, 1),
        command="textrl demo",
    )
    runs.check_directory(folder, overwrite=True)
    agent = runs.make_agent(config)
    with locked(folder):
        runs.prepare_directory(folder, overwrite=True)
        runs.write_config(folder, config)
        learn(agent, folder, config)


def _report(console: Any, folder: Path) -> None:
    from agents.commands import terminal
    from agents.evaluation.evaluation import win_rate
    from agents.evaluation.kinds import changes, losses
    from agents.evaluation.plots import plot_learning_curve
    from agents.evaluation.records import read_ends
    from agents.runs import run_directory as runs
    from agents.runs.logs import read_progress

    ends = read_ends(folder)
    before, final = ends["start"], ends["final"]
    best = ends.get("best", final)
    prompts, samples = before.sampled.score.shape
    rows = range(0, prompts, max(prompts // _ROWS, 1))
    console.print(
        terminal.samples_table(before.sampled, best.sampled, rows, "Held-out questions, before and after")
    )
    rate, low, high = win_rate(best.sampled.gold, before.sampled.gold)
    first, last = before.sampled.summary(), best.sampled.summary()
    results = {
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "before": first,
        "after": last,
        "after_timesteps": best.timesteps,
        "prompts": prompts,
        "samples_per_prompt": samples,
    }
    runs.write_json(folder / runs.EVALUATION, results)
    shown = {"before": before, "best": best} | ({} if best is final else {"last": final})
    extra = ("distinct_of_10", "perplexity")
    sides = {
        name: end.sampled.summary() | {figure: getattr(end, figure) for figure in extra}
        for name, end in shown.items()
    }
    console.print(_comparison(sides))
    compared = {"before": before.sampled, "best": best.sampled}
    found = [change for change in changes(*compared.values(), "kind") if change.name]
    worse = losses(*compared.values(), "kind")
    flagged = [(change.kind, change.what) for change in found] + [(loss.kind, "gold") for loss in worse]
    console.print(terminal.kinds_table(compared, "kind", flagged))
    terminal.print_changes(console, found, worse)
    console.print(
        f"\n[bold]Gold win rate over the initial model: {rate:.1%}[/bold] "
        f"(95 % confidence {low:.1%} to {high:.1%}; ties count half; {prompts} prompts)",
        highlight=False,
    )
    console.print(_which(best, final), highlight=False)
    verb = "raises" if last["gold"] > first["gold"] else "takes"
    title = (
        f"PPO {verb} the gold score from {first['gold']:.2f} to {last['gold']:.2f} "
        f"(held out), {last['kl']:.1f} nats from where it began"
    )
    plot_learning_curve(read_progress(folder), folder / "learning_curve.png", title)
    what = [
        ("learning_curve.png", "score, gold score and KL against tokens"),
        *([] if best is final else [("best", "the best model, an ordinary Hugging Face folder")]),
        (
            "final",
            "the last model" if best is not final else "the trained model, an ordinary Hugging Face folder",
        ),
        ("evaluation.json", "the figures above"),
        ("evaluations", "every held-out answer, as Parquet"),
        ("progress.csv", "the log"),
    ]
    commands = [
        (
            f"textrl report {folder}",
            "did it improve the model, or fool the reward? One page that can be sent",
        ),
        (f"tensorboard --logdir {folder}", "http://localhost:6006/#custom_scalars: the curves that matter"),
        ("textrl train --agent grpo --run-dir runs/grpo", "the same world with GRPO, no critic"),
        ("textrl train --kl-coef 0 --run-dir runs/hacked", "no KL: watch score and gold score part ways"),
        ("textrl envs", "the other environments"),
    ]
    terminal.print_files(console, folder, what, commands)


def _which(best: Any, final: Any) -> str:
    """Which policy the demo ends on, and how the last one compares with it."""
    from agents.evaluation.evaluation import win_rate

    if best is final:
        return f"The last policy, at {final.timesteps:,} tokens, is also the best that was seen on the way."
    rate, low, high = win_rate(final.sampled.gold, best.sampled.gold)
    return (
        f"This is the best policy seen on the way, at {best.timesteps:,} of {final.timesteps:,} tokens; the last one "
        f"beats it in {rate:.1%} of comparisons ({low:.1%} to {high:.1%})."
    )


def _comparison(sides: dict[str, dict[str, float]]) -> Any:
    from rich.table import Table

    table = Table(title="Means over held-out answers", title_justify="left", header_style="bold")
    for heading in ("", *sides):
        table.add_column(heading, justify="right" if heading else "left")
    labels = {
        "score": "score of the reward model (proxy)",
        "gold": "gold score",
        "kl": "KL from the initial model (nats)",
        "length": "tokens in an answer",
        "distinct_of_10": "different answers in ten to one question",
        "perplexity": "perplexity of pre-training text",
    }
    for name, label in labels.items():
        values = (side[name] + 0.0 if name != "kl" else max(side[name], 0.0) for side in sides.values())
        table.add_row(label, *(f"{value:.2f}" for value in values))
    return table
