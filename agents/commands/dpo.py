"""``textrl dpo``: learn a policy from a file of comparisons, without a reward model."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from agents.commands import offline

_LearningRate = offline.learning_rate("dpo")


@offline.with_trainer_options
def dpo(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id: policy and reference.", show_default="the embedded SFT model"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='Comparisons: {"prompt", "chosen", "rejected"}; for kto {"prompt", "completion", "label"} too.',
            show_default="preferences.jsonl",
        ),
    ] = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder for the trained model.")] = "runs/dpo",
    loss: Annotated[
        str,
        typer.Option(
            help="sigmoid (DPO), sigmoid_norm (by length), ipo, kto (single judged answers), simpo (no reference), "
            "hinge, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop."
        ),
    ] = "sigmoid",
    beta: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL from the reference.", show_default="0.1; sigmoid_norm 5, simpo 2"
        ),
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of labels taken to be flipped, below 0.5.")
    ] = 0.0,
    gamma: Annotated[float, typer.Option(help="Margin of simpo.")] = 0.5,
    desirable_weight: Annotated[float, typer.Option(help="Of good answers, for kto.")] = 1.0,
    undesirable_weight: Annotated[float, typer.Option(help="Of bad answers, for kto.")] = 1.0,
    reference: Annotated[
        str | None, typer.Option(help="Another reference.", show_default="the model at the start")
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Held-out comparisons, scored at the end.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data; may be a fraction.")] = 1.0,
    learning_rate: _LearningRate = None,
    warmup_ratio: offline.WarmupRatio = 0.1,
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
    """Learn from comparisons directly: DPO and its family.

    The loss is -log sigmoid(beta (log pi/pi_ref(chosen) - log pi/pi_ref(rejected))): the policy itself is the reward
    model. The reference is the model as it is at the start. The output is an ordinary Hugging Face folder.
    """
    from agents.callbacks.progress import ProgressCallback
    from agents.commands.flags import parse_object
    from agents.commands.terminal import quiet_transformers
    from agents.offline.callbacks import StopOnSignals
    from agents.offline.dpo import LOSSES
    from agents.offline.dpo import dpo as train
    from agents.parallel.processes import current
    from textrl_env import embedded
    from textrl_env.errors import check_choice

    check_choice("--loss", loss, LOSSES)
    quiet_transformers()
    options = options or {}
    template = parse_object("--chat-template-kwargs", chat_template_kwargs)
    folder = offline.check_output(output, overwrite, options)
    offline.say_what_a_kill_loses(folder, options)
    source = offline.check_data(data, "preferences.jsonl", "textrl preferences writes it")
    progress = ProgressCallback(title=loss)
    with contextlib.closing(progress), offline.naming(source):
        result = train(
            embedded.path("sft") if model is None else model,
            source,
            folder,
            loss=loss,
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            reference=reference,
            eval_data=eval_data,
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
            skip_bad_rows=skip_bad_rows,
            seed=seed,
            device=device,
            callback=[progress, StopOnSignals(options.get("resume", False))],
            **options,
        )
    if not current().is_main:
        return
    labels = {"margin": "margin (chosen - rejected)", "accuracy": "chosen above rejected"}
    figures: dict[str, float | str] = dict(offline.steps_and_loss(result))
    figures |= {label: result[name] for name, label in labels.items() if name in result}
    figures |= offline.held_out(result)
    offline.keep_note(folder, options, figures)
    offline.report(f"{folder}: {loss} in {progress.progress.seconds:.0f} s", figures)
    offline.print_next(
        [(f"textrl preferences --model {folder} --output again.jsonl", "compare its answers in turn")]
    )
