"""``textrl dpo``: learn a policy from a file of comparisons, without a reward model."""

from __future__ import annotations

from typing import Annotated

import typer


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
            help="sigmoid (DPO), sigmoid_norm (by length), ipo, kto (single judged answers), simpo (no reference)."
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
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak of Adam's; warm-up, then a cosine to zero.", show_default="1e-6; embedded model 3e-4"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Comparisons per optimiser step.")] = 32,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Comparisons per forward pass: less memory, same result.", show_default="all"
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Longer sequences are cut here, in tokens.", show_default="what the model holds"
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
    """Learn from comparisons directly: DPO and its family.

    The loss is -log sigmoid(beta (log pi/pi_ref(chosen) - log pi/pi_ref(rejected))): the policy itself is the reward
    model. The reference is the model as it is at the start. The output is an ordinary Hugging Face folder.
    """
    from agents.commands import offline
    from agents.commands.terminal import quiet_transformers
    from agents.offline.dpo import LOSSES
    from agents.offline.dpo import dpo as train
    from agents.offline.trainer import count_steps
    from reward_models.data.records import load_records
    from textrl_env import embedded
    from textrl_env.errors import check_choice

    check_choice("--loss", loss, LOSSES)
    quiet_transformers()
    folder = offline.check_output(output, overwrite)
    source = offline.check_data(data, "preferences.jsonl", "textrl preferences writes it")
    rows = load_records(source, skip_bad_rows=True)
    count = len(rows) * (2 if loss == "kto" and "chosen" in rows.columns else 1)
    with offline.Progress(loss, count_steps(count, batch_size, epochs), log_dir=log_dir) as progress:
        result = train(
            embedded.path("sft") if model is None else model,
            source,
            folder,
            loss=loss,
            beta=beta or {"sigmoid_norm": 5.0, "simpo": 2.0}.get(loss, 0.1),
            label_smoothing=label_smoothing,
            gamma=gamma,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            reference=reference,
            eval_data=eval_data,
            epochs=epochs,
            learning_rate=learning_rate or (3e-4 if model is None else 1e-6),
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            max_length=max_length,
            skip_bad_rows=skip_bad_rows,
            seed=seed,
            device=device,
            logger=progress,
            log_interval=1,
        )
    labels = {
        "margin": "margin (chosen - rejected)",
        "accuracy": "chosen above rejected",
        "skipped": "left out",
    }
    figures = {labels.get(name, name.replace("_", " ")): value for name, value in result.items()}
    offline.report(f"{folder}: {loss} in {progress.seconds:.0f} s", figures)
    offline.print_next(
        [(f"textrl preferences --model {folder} --output again.jsonl", "compare its answers in turn")]
    )
