"""``textrl reward``: train a reward model on a file of comparisons."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from agents import presets
from agents.commands import offline

_LearningRate = offline.learning_rate("reward")


@offline.with_trainer_options
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
            show_default=presets.describe_on_files("reward", "epochs"),
        ),
    ] = None,
    learning_rate: _LearningRate = None,
    warmup_ratio: offline.WarmupRatio = 0.05,
    weight_decay: offline.WeightDecay = 0.0,
    max_grad_norm: offline.MaxGradNorm = 1.0,
    batch_size: offline.BatchSize = 64,
    centering: Annotated[
        float, typer.Option(help="Pulls scores towards 0, which comparisons leave free.")
    ] = 0.0,
    max_length: offline.MaxLength = None,
    too_long: offline.TooLong = "cut",
    skip_bad_rows: offline.SkipBadRows = False,
    chat_template_kwargs: offline.ChatTemplateKwargs = None,
    allow_control_tokens: offline.AllowControlTokens = False,
    seed: offline.Seed = 0,
    device: offline.Device = "auto",
    overwrite: offline.Overwrite = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Train a reward model on comparisons: it learns to score the chosen answer above the rejected one.

    Bradley-Terry: the loss is -log sigmoid(r(chosen) - r(rejected)). Scores are normalised to mean 0 and standard
    deviation 1 on the answers that were compared. The output is an AutoModelForSequenceClassification with one label.
    """
    from agents.callbacks.progress import ProgressCallback
    from agents.commands.flags import parse_object
    from agents.commands.terminal import quiet_transformers
    from agents.offline.callbacks import StopOnSignals
    from agents.offline.reward_model import train_reward_model
    from agents.parallel.processes import current
    from textrl_env import embedded

    quiet_transformers()
    options = options or {}
    template = parse_object("--chat-template-kwargs", chat_template_kwargs)
    folder = offline.check_output(output, overwrite, options)
    offline.say_what_a_kill_loses(folder, options)
    source = offline.check_data(data, "preferences.jsonl", "textrl preferences writes it")
    start = str(embedded.path("sft") if model is None else model)
    rows, skipped = comparisons(source, skip_bad_rows)
    held_out = None if eval_data is None else comparisons(eval_data, skip_bad_rows)[0]
    progress = ProgressCallback(title="reward")
    with contextlib.closing(progress), offline.naming(source):
        result = train_reward_model(
            start,
            rows,
            folder,
            eval_pairs=held_out,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_length=max_length,
            too_long=too_long,
            chat_template_kwargs=template,
            allow_control_tokens=allow_control_tokens,
            warmup_ratio=warmup_ratio,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            centering=centering,
            seed=seed,
            device=device,
            callback=[progress, StopOnSignals(options.get("resume", False))],
            **options,
        )
    if not current().is_main:
        return
    scale = result["normalisation"]
    figures: dict[str, float | str] = dict(offline.steps_and_loss(result)) | {
        "accuracy": result["accuracy"],
        "scores before normalising": f"mean {scale['mean']:.3g}, standard deviation {scale['std']:.3g}",
    }
    if "eval" in result:
        figures |= {f"held-out {name}": result["eval"][name] for name in ("loss", "accuracy", "ece")}
        figures |= _by_kind(held_out, result["eval"]["right"])
    offline.keep_note(folder, options, figures)
    offline.report(f"{folder}: a reward model in {progress.progress.seconds:.0f} s", figures, skipped)
    _warn_of_coin(result)
    again = f" --model {model} --prompts FILE" if model is not None else ""
    offline.print_next([(f"textrl train{again} --reward {folder} --agent grpo", "reinforcement learning")])


def _by_kind(rows: list[dict[str, Any]], right: list[float]) -> dict[str, str]:
    """Held-out accuracy by the column "kind", where there is one."""
    found: dict[str, list[float]] = {}
    for row, each in zip(rows, right, strict=True):
        if "kind" in row:
            found.setdefault(str(row["kind"]), []).append(each)
    return {
        f"held-out accuracy, {kind}": f"{sum(values) / len(values):.3f} of {len(values):,}"
        for kind, values in found.items()
    }


def _warn_of_coin(result: dict[str, Any]) -> None:
    """A reward model that does not beat a coin is no reward; say so before saying what comes next."""
    from rich.console import Console

    held_out = "eval" in result
    accuracy = result["eval"]["accuracy"] if held_out else result["accuracy"]
    if accuracy > 0.5:
        return
    where = "held-out comparisons" if held_out else "the comparisons that it was trained on"
    Console(stderr=True).print(
        f"[bold red]No better than a coin:[/bold red] it prefers the chosen answer in {accuracy:.1%} of {where}. A "
        "policy trained on it would learn noise, or the opposite of what the raters like. Are chosen and rejected the "
        "right way round? Otherwise more comparisons, more --epochs or another --learning-rate are needed first.",
        highlight=False,
        soft_wrap=True,
    )


def comparisons(source: str, skip_bad_rows: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Comparisons, texts or messages, and what was wrong with the rows left out."""
    from reward_models.comparisons import comparison_records

    records = comparison_records(source, skip_bad_rows)
    rows = [{name: value for name, value in row.items() if value is not None} for row in records.rows()]
    return rows, records.skipped
