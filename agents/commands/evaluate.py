"""``textrl evaluate``: how good a model's answers are, and how often they beat another's."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from agents.commands import offline


@offline.with_loading_options
def evaluate(
    model: Annotated[str, typer.Option(help="Folder or hub id of the model to judge.")],
    against: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model to beat.", show_default="the embedded SFT model"),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts.", show_default="the embedded held-out prompts"),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="Scores the answers: folder, hub id or module:function.", show_default="embedded"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 4,
    max_new_tokens: offline.MaxNewTokens = None,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the figures there, as JSON.")
    ] = None,
    chat_template_kwargs: offline.ChatTemplateKwargs = None,
    allow_control_tokens: offline.AllowControlTokens = False,
    device: offline.Device = "auto",
    options: dict[str, Any] | None = None,
) -> None:
    """Score a model's answers and compare them with another model's.

    The judge is the gold rubric on the embedded prompts and the reward elsewhere. Every answer of one model is
    compared with every answer of the other to the same prompt; ties count half. The KL is from --against.
    """
    from pathlib import Path

    from rich.console import Console

    from agents.commands.flags import parse_object
    from agents.commands.terminal import means_table, quiet_transformers
    from agents.evaluation.diversity import distinct_n
    from agents.evaluation.evaluation import evaluate_policy, heldout_env, win_rate
    from agents.runs.run_directory import write_json
    from textrl_env.envs.text_rlhf import TextRLHFEnv
    from textrl_env.lm.causal_lm import CausalLM

    quiet_transformers()
    if prompts is not None and (reward is None or against is None):
        raise ValueError(
            "--prompts of your own need --reward, and --against a model that speaks their language"
        )
    arguments = {"model": against, "reward": reward, "max_new_tokens": max_new_tokens}
    loading = {"temperature": temperature, "device": device} | (options or {})
    arguments |= loading | {"allow_control_tokens": allow_control_tokens}
    arguments["chat_template_kwargs"] = parse_object("--chat-template-kwargs", chat_template_kwargs)
    env = heldout_env(**arguments) if prompts is None else TextRLHFEnv(prompts=prompts, **arguments)
    judged = CausalLM.load(model, **loading)
    sides = {
        "against": evaluate_policy(env.lm, env, samples, seed),
        "model": evaluate_policy(judged, env, samples, seed + 1),
    }
    means = {name: result.summary() for name, result in sides.items()}
    for name, result in sides.items():
        means[name]["distinct_2"] = distinct_n([text for texts in result.responses for text in texts], 2)
    judge = "score" if sides["model"].gold is None else "gold"
    rate, low, high = win_rate(getattr(sides["model"], judge), getattr(sides["against"], judge))
    console = Console()
    console.print(means_table(means, f"{len(sides['model'].prompts)} prompts, {samples} answers to each"))
    console.print(
        f"Win rate of {model} by {judge}: [bold]{rate:.1%}[/bold] "
        f"(95 % confidence {low:.1%} to {high:.1%}; ties count half)",
        highlight=False,
    )
    if output is not None:
        figures = {"win_rate": rate, "confidence_interval": [low, high], "judge": judge} | means
        write_json(Path(output), figures)
        console.print(f"Written to {output}", style="dim")
