"""``textrl sft``: supervised fine-tuning on a file of demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

#: The page of tokens, in the output folder.
PAGE = "tokens.html"


def sft(
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help='Demonstrations, one JSON object a line: {"prompt", "completion"}, {"messages"} or {"text"} '
            "(.jsonl, .json, .csv or .parquet).",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a causal LM.", show_default="the embedded base model"),
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder for the trained model.")] = "runs/sft",
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out demonstrations, scored at the end.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data; may be a fraction.")] = 1.0,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak of Adam's; warm-up, then a cosine to zero.", show_default="1e-4; embedded model 2e-3"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Records per optimiser step.")] = 32,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Records per forward pass: less memory, same result.", show_default="all"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longer records are cut here, in tokens.", show_default="what the model holds"
        ),
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave out rows that cannot be read; stop otherwise.")
    ] = False,
    log_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="TensorBoard events and progress.csv go here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the data's order.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an earlier output.")] = False,
) -> None:
    """Fine-tune a model on demonstrations: the first step after pre-training.

    The loss is the mean of -log p over the tokens of the answers (end token included); prompts carry none. The output
    is an ordinary Hugging Face folder; tokens.html in it shows some records token by token, before and after.
    """
    from agents.commands import offline
    from agents.commands.terminal import quiet_transformers
    from agents.evaluation.token_heatmap import score_tokens
    from agents.offline.demonstration_data import load_demonstrations
    from agents.offline.sft import load_model
    from agents.offline.sft import sft as train
    from agents.offline.trainer import count_steps
    from textrl_env import embedded

    quiet_transformers()
    folder = offline.check_output(output, overwrite)
    rows, skipped = load_demonstrations(data, skip_bad_rows)
    held_out = None if eval_data is None else load_demonstrations(eval_data, skip_bad_rows)[0]
    rate = learning_rate or (2e-3 if model is None else 1e-4)
    steps = count_steps(len(rows), batch_size, epochs)
    start = embedded.path("base") if model is None else model
    learner, tokenizer = load_model(start, None, device)
    shown = _some(rows if held_out is None else held_out)
    before = score_tokens(learner, tokenizer, shown, max_length)
    with offline.Progress("sft", steps, log_dir=log_dir) as progress:
        result = train(
            learner,
            rows,
            folder,
            tokenizer=tokenizer,
            eval_data=held_out,
            epochs=epochs,
            learning_rate=rate,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            seed=seed,
            device=device,
            logger=progress,
            log_interval=1,
        )
        if before:
            scored = {"before": before, "after": score_tokens(learner, tokenizer, shown, max_length)}
            _show_tokens(scored, folder, progress, steps)
    figures = {name.replace("_", " "): value for name, value in result.items()}
    offline.report(
        f"{folder}: fine-tuned on {len(rows):,} records in {progress.seconds:.0f} s", figures, skipped
    )
    if before:
        print(f"\n{folder / PAGE} shows how sure the model is of every token, before and after")
    offline.print_next(
        [
            (f"textrl preferences --model {folder} --prompts FILE --judge J", "compare its answers"),
            (f"textrl train --model {folder} --prompts FILE --reward R", "reinforcement learning from here"),
        ]
    )


def _some(rows: list[dict[str, Any]], count: int = 8) -> list[dict[str, Any]]:
    """``count`` rows, spread over all of them."""
    return rows[:: max(len(rows) // count, 1)][:count]


def _show_tokens(scored: dict[str, Any], folder: Path, progress: Any, step: int) -> None:
    """How sure the model was and is of every token: a page beside the model, and a picture in TensorBoard."""
    from stable_baselines3.common.logger import TensorBoardOutputFormat

    from agents.evaluation.token_heatmap import heatmap_html
    from agents.evaluation.token_heatmap_image import heatmap_image

    title = "What fine-tuning has taught: how sure the model is of every token"
    (folder / PAGE).write_text(heatmap_html(scored, title), encoding="utf-8")
    for output in () if progress.logger is None else progress.logger.output_formats:
        if isinstance(output, TensorBoardOutputFormat):  # the CSV would get an empty row
            output.writer.add_image("samples/tokens", heatmap_image(scored, title), step, dataformats="HWC")
