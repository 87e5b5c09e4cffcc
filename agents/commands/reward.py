"""``textrl reward``: train a reward model on a file of comparisons."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def reward(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model whose body it starts from.",
            show_default="the embedded SFT model",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Comparisons: {"prompt", "chosen", "rejected"}, and "margin" if wanted.',
            show_default="preferences.jsonl",
        ),
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder for the reward model.")] = "runs/reward",
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out comparisons, scored at the end.")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the comparisons; more than one overfits easily.",
            show_default="1; embedded model 3",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak of Adam's; warm-up, then a cosine to zero.", show_default="1e-5; embedded model 1e-3"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Comparisons per optimiser step.")] = 64,
    centering: Annotated[
        float, typer.Option(help="Pulls scores towards 0, which comparisons leave free.")
    ] = 0.0,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be read; stop otherwise.")
    ] = False,
    log_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="TensorBoard events and progress.csv go here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the new head and the data's order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an earlier output.")] = False,
) -> None:
    """Train a reward model on comparisons: it learns to score the chosen answer above the rejected one.

    Bradley-Terry: the loss is -log sigmoid(r(chosen) - r(rejected)). Scores are normalised to mean 0 and standard
    deviation 1 on the answers that were compared. The output is an AutoModelForSequenceClassification with one label.
    """
    from agents.commands import offline
    from agents.commands.terminal import quiet_transformers
    from agents.offline.trainer import count_steps
    from reward_models.bradley_terry import train_reward_model
    from textrl_env import embedded

    quiet_transformers()
    folder = offline.check_output(output, overwrite)
    source = offline.check_data(data, "preferences.jsonl", "textrl preferences writes it")
    start = str(embedded.path("sft") if model is None else model)
    rows, skipped = comparisons(source, skip_bad_rows)
    held_out = None if eval_data is None else comparisons(eval_data, skip_bad_rows)[0]
    rate = learning_rate or (1e-3 if model is None else 1e-5)
    epochs = epochs or (3.0 if model is None else 1.0)
    with offline.Progress("reward", count_steps(len(rows), batch_size, epochs), log_dir=log_dir) as progress:
        result = train_reward_model(
            start,
            rows,
            folder,
            eval_pairs=held_out,
            epochs=epochs,
            learning_rate=rate,
            batch_size=batch_size,
            centering=centering,
            seed=seed,
            device=device,
            logger=progress,
            log_interval=1,
        )
    figures = {name: result[name] for name in ("loss", "accuracy", "steps")}
    scale = result["normalisation"]
    figures |= {
        "scores before normalising": f"mean {scale['mean']:.3g}, standard deviation {scale['std']:.3g}"
    }
    if "eval" in result:
        figures |= {f"held-out {name}": result["eval"][name] for name in ("loss", "accuracy", "ece")}
    offline.report(
        f"{folder}: learned from {len(rows):,} comparisons in {progress.seconds:.0f} s", figures, skipped
    )
    again = f" --model {model} --prompts FILE" if model is not None else ""
    offline.print_next([(f"textrl train{again} --reward {folder} --agent grpo", "reinforcement learning")])


def comparisons(source: str, skip_bad_rows: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Comparisons, texts or messages, and what was wrong with the rows left out."""
    from reward_models.data.records import load_records, with_prompts

    sides = ("prompt", "chosen", "rejected")
    optional = ("margin", "chosen_ended", "rejected_ended")
    records = load_records(source, optional=optional, skip_bad_rows=skip_bad_rows, forms=(sides, sides[1:]))
    records = with_prompts(records, skip_bad_rows)
    rows = [{name: value for name, value in row.items() if value is not None} for row in records.rows()]
    return rows, records.skipped
