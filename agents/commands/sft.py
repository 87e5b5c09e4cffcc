"""``textrl sft``: supervised fine-tuning on a file of demonstrations."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from agents.commands import offline

#: The page of tokens, in the output folder.
PAGE = "tokens.html"


_LearningRate = offline.learning_rate("sft")


@offline.with_trainer_options
def sft(
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help='Demonstrations: {"prompt", "completion"}, {"messages"} or {"text"} '
            "(.jsonl, .json, .csv, .parquet, .txt, or a folder that datasets saved).",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a causal LM, or an adapter's folder.",
            show_default="the embedded base model",
        ),
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder for the trained model.")] = "runs/sft",
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out demonstrations, scored at the end.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data; may be a fraction.")] = 1.0,
    learning_rate: _LearningRate = None,
    warmup_ratio: offline.WarmupRatio = 0.05,
    weight_decay: offline.WeightDecay = 0.0,
    max_grad_norm: offline.MaxGradNorm = 1.0,
    batch_size: offline.BatchSize = 32,
    micro_batch_size: offline.MicroBatchSize = None,
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
    """Fine-tune a model on demonstrations: the first step after pre-training.

    The loss is the mean of -log p over the tokens of the answers (end token included); prompts carry none. The output
    is an ordinary Hugging Face folder; tokens.html in it shows some records token by token, before and after.
    """
    from agents.callbacks.progress import ProgressCallback
    from agents.commands.flags import parse_object
    from agents.commands.terminal import quiet_transformers
    from agents.evaluation.token_page import TokenPage
    from agents.offline.callbacks import StopOnSignals
    from agents.offline.demonstration_data import load_demonstrations
    from agents.offline.sft import sft as train
    from agents.parallel.processes import current
    from textrl_env import embedded

    quiet_transformers()
    options = options or {}
    template = parse_object("--chat-template-kwargs", chat_template_kwargs)
    folder = offline.check_output(output, overwrite, options)
    offline.say_what_a_kill_loses(folder, options)
    rows, skipped = load_demonstrations(data, skip_bad_rows)
    held_out = None if eval_data is None else load_demonstrations(eval_data, skip_bad_rows)[0]
    shown = _some(rows if held_out is None else held_out)
    page = TokenPage(folder / PAGE, shown, max_length, template, allow_control_tokens)
    progress = ProgressCallback(title="sft")
    with contextlib.closing(progress), offline.naming(data):
        result = train(
            embedded.path("base") if model is None else model,
            rows,
            folder,
            eval_data=held_out,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            too_long=too_long,
            chat_template_kwargs=template,
            allow_control_tokens=allow_control_tokens,
            warmup_ratio=warmup_ratio,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            device=device,
            callback=[progress, page, StopOnSignals(options.get("resume", False))],
            **options,
        )
    if not current().is_main:
        return
    figures: dict[str, float | str] = dict(offline.steps_and_loss(result))
    figures["tokens that carried loss"] = f"{result['tokens']:,.0f}"
    figures |= offline.held_out(result)
    offline.keep_note(folder, options, figures)
    offline.report(f"{folder}: fine-tuned in {progress.progress.seconds:.0f} s", figures, skipped)
    if page.written:
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
