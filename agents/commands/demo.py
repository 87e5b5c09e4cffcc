"""``textrl demo``: reinforcement learning from human feedback, whole, on two CPU cores in about two minutes.

PPO trains the embedded world's assistant against its reward model; then answers to questions that were never
trained on are compared with those from before, by the gold rubric that the reward model only knows through
simulated raters. The hyper-parameters are the constants below.
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
#: Answers to each held-out prompt, before and after.
N_SAMPLES = 4
#: Rows of the table of answers.
_ROWS = 8


def demo(
    run_dir: Annotated[
        str, typer.Option(help="Where everything goes; an earlier run there is replaced.")
    ] = "runs/demo",
    total_timesteps: Annotated[int, typer.Option(min=1, help="Tokens to learn for.")] = TOTAL_TIMESTEPS,
    seed: Annotated[int, typer.Option(min=0, help="Of everything.")] = 0,
) -> None:
    """Train a tiny assistant with PPO and compare its answers with those from before (2 minutes, 2 CPU cores)."""
    import torch
    from rich.console import Console

    from agents.commands.terminal import quiet_transformers

    # A model this small gains nothing from a second thread, and one thread sums alike on every machine.
    torch.set_num_threads(1)
    started = time.perf_counter()
    console = Console()
    quiet_transformers()
    folder = Path(run_dir)
    _introduce(console, total_timesteps)
    agent = _train(folder, total_timesteps, seed)
    trained = time.perf_counter() - started
    console.print("Answering questions that were never trained on ...", style="dim")
    before, after = _evaluate(agent, seed)
    _report(console, folder, before, after)
    evaluated = time.perf_counter() - started - trained
    console.print(f"Training took {trained:.0f} s, the rest {evaluated:.0f} s.", style="dim", highlight=False)


def _introduce(console: Any, total_timesteps: int) -> None:
    console.print(
        "\n[bold]A small assistant learns from human feedback.[/bold]\n"
        "A token is a step, an answer an episode, a learned reward model gives the reward, and a KL penalty "
        f"keeps the policy near the model it starts from. PPO takes {total_timesteps:,} steps.\n",
        highlight=False,
    )


def _train(folder: Path, total_timesteps: int, seed: int) -> Any:
    from agents.callbacks.progress import ProgressCallback
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
        command="textrl demo",
    )
    runs.check_directory(folder, overwrite=True)
    agent = runs.make_agent(config)
    bar = ProgressCallback()
    try:
        with locked(folder):
            runs.prepare_directory(folder, overwrite=True)
            runs.write_config(folder, config)
            runs.train(agent, folder, config, [bar])
    except runs.TrainingInterrupted:
        bar.close()
        print(f"stopped at {agent.num_timesteps:,} timesteps; go on with: textrl train --resume {folder}")
        raise typer.Exit(130) from None
    finally:
        bar.close()
    return agent


def _evaluate(agent: Any, seed: int) -> tuple[Any, Any]:
    """The initial model and the trained one on the held-out prompts, sampled from different streams."""
    from agents.evaluation.evaluation import evaluate_policy, heldout_env

    env = heldout_env(agent.text_env)
    before = evaluate_policy(env.lm, env, N_SAMPLES, seed=2 * seed)
    return before, evaluate_policy(agent, env, N_SAMPLES, seed=2 * seed + 1)


def _report(console: Any, folder: Path, before: Any, after: Any) -> None:
    from agents.commands import terminal
    from agents.evaluation.evaluation import win_rate
    from agents.evaluation.plots import plot_learning_curve
    from agents.runs import run_directory as runs

    rows = range(0, len(before.prompts), max(len(before.prompts) // _ROWS, 1))
    console.print(terminal.samples_table(before, after, rows, "Held-out questions, before and after"))
    rate, low, high = win_rate(after.gold, before.gold)
    first, last = before.summary(), after.summary()
    results = {
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "before": first,
        "after": last,
        "prompts": len(before.prompts),
        "samples_per_prompt": N_SAMPLES,
    }
    runs.write_json(folder / runs.EVALUATION, results)
    console.print(_comparison(first, last))
    console.print(
        f"\n[bold]Gold win rate over the initial model: {rate:.1%}[/bold] "
        f"(95 % confidence {low:.1%} to {high:.1%}; ties count half; {len(before.prompts)} prompts)",
        highlight=False,
    )
    title = (
        f"PPO raises the gold score from {first['gold']:.2f} to {last['gold']:.2f} "
        f"(held out), {last['kl']:.1f} nats from where it began"
    )
    plot_learning_curve(runs.read_progress(folder), folder / "learning_curve.png", title)
    what = [
        ("learning_curve.png", "score, gold score and KL against tokens"),
        ("final", "the trained model, an ordinary Hugging Face folder"),
        ("evaluation.json", "the figures above"),
        ("progress.csv", "the log"),
    ]
    commands = [
        (f"tensorboard --logdir {folder}", "the curves live, and every table of samples"),
        (f"textrl report {folder}", "the run as one page that can be sent"),
        ("textrl train --agent grpo --run-dir runs/grpo", "the same world with GRPO, no critic"),
        ("textrl train --kl-coef 0 --run-dir runs/hacked", "no KL: watch score and gold score part ways"),
        ("textrl envs", "the other environments"),
    ]
    terminal.print_files(console, folder, what, commands)


def _comparison(first: dict[str, float], last: dict[str, float]) -> Any:
    from rich.table import Table

    table = Table(title="Means over held-out answers", title_justify="left", header_style="bold")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    labels = {
        "score": "score of the reward model (proxy)",
        "gold": "gold score",
        "kl": "KL from the initial model (nats)",
        "length": "tokens in an answer",
    }
    for name, label in labels.items():
        table.add_row(label, f"{abs(first[name]) if name == 'kl' else first[name]:.2f}", f"{last[name]:.2f}")
    return table
