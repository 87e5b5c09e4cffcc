"""``textrl evaluate``: how good a model's answers are, and how often they beat another's."""

from __future__ import annotations

from collections.abc import Container
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from agents.commands import offline


class _Command(TyperCommand):
    """Takes ``--best-of 1 4 16`` as one option: typer's options have one value each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _joined(args, "--best-of"))


def _joined(args: list[str], option: str) -> list[str]:
    """The arguments with the numbers after an option in one, "1,4,16"."""
    if option not in args:
        return args
    at = args.index(option) + 1
    end = at
    while end < len(args) and args[end].replace(",", "").isdecimal():
        end += 1
    return [*args[:at], ",".join(args[at:end]), *args[end:]] if end > at else args


SETTINGS = {"cls": _Command}


@offline.with_loading_options
def evaluate(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN_DIR]",
            help="A run of textrl train or demo: its best/ (else final/) is judged, against what it began with.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model to judge.", show_default="best/ or final/ of RUN_DIR"
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model to beat.",
            show_default="what RUN_DIR began with, or the embedded SFT model",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts.",
            show_default="those that RUN_DIR was evaluated on, or the embedded held-out ones",
        ),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(help="Scores the answers: folder, hub id or module:function.", show_default="embedded"),
    ] = None,
    gold: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="A second judge.", show_default="the embedded rubric on embedded prompts"
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Answers to each prompt.", show_default="4, or the largest --best-of"),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Figures by this column of the prompts, refusals among them; none for none.",
            show_default="kind, where there is one",
        ),
    ] = None,
    best_of: Annotated[
        str | None,
        typer.Option(
            metavar="N...",
            help="Also the best of so many answers by the reward, 1 4 16, with the KL that this costs.",
            show_default=False,
        ),
    ] = None,
    passes_from: Annotated[
        float | None,
        typer.Option(
            metavar="SCORE",
            help="Also pass@k at 1 and --best-of: answers with this score or more, by gold where there is a judge.",
            show_default="1 where all scores are 0 or 1",
        ),
    ] = None,
    perplexity_of: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts (a column text) whose perplexity tells what was unlearned.",
            show_default="embedded pages for the embedded vocabulary",
        ),
    ] = None,
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

    The judge is the gold rubric on the embedded prompts, --gold where it is given, and the reward elsewhere. Every
    answer of one model is compared with every answer of the other to the same prompt; ties count half. The KL is
    from --against.
    """
    from rich.console import Console

    from agents.commands import terminal
    from agents.commands.flags import parse_object
    from agents.evaluation.evaluation import evaluate_policy, heldout_env
    from textrl_env.envs.text_rlhf import TextRLHFEnv
    from textrl_env.lm.causal_lm import CausalLM

    terminal.quiet_transformers()
    sizes = _sizes(best_of)
    count = samples or max([4, *sizes])
    if max(sizes, default=1) > count:
        raise ValueError(
            f"--best-of {max(sizes)} wants as many answers to each prompt, and --samples is {count}"
        )
    given = {"model": model, "against": against, "prompts": prompts, "reward": reward, "gold": gold}
    given |= {"max_new_tokens": max_new_tokens}
    if run is not None:
        there = {name: value for name, value in given.items() if value is not None}
        given = _of_run(run, there) | there
    model, against, prompts = given["model"], given["against"], given["prompts"]
    if model is None:
        raise ValueError("give a RUN_DIR, or --model, the folder of the model to judge")
    if prompts is not None and (given["reward"] is None or against is None):
        raise ValueError(
            "--prompts of your own need --reward, and --against a model that speaks their language"
        )
    arguments = {"model": against} | {name: given[name] for name in ("reward", "max_new_tokens")}
    arguments |= {} if given["gold"] is None else {"gold": given["gold"]}
    loading = {"temperature": temperature, "device": device} | (options or {})
    arguments |= loading | {"allow_control_tokens": allow_control_tokens}
    arguments["chat_template_kwargs"] = parse_object("--chat-template-kwargs", chat_template_kwargs)
    env = heldout_env(**arguments) if prompts is None else TextRLHFEnv(prompts=prompts, **arguments)
    judged = CausalLM.load(model, **loading)
    sides = {
        "against": evaluate_policy(env.lm, env, count, seed),
        "model": evaluate_policy(judged, env, count, seed + 1),
    }
    console = Console()
    figures = _compare(console, model, sides, {"against": env.lm, "model": judged}, perplexity_of)
    figures |= _kinds(console, sides, by)
    figures |= _choosing(console, sides["model"], sizes, passes_from)
    if output is not None:
        from pathlib import Path

        from agents.runs.run_directory import write_json

        write_json(Path(output), figures)
        console.print(f"Written to {output}", style="dim")


def _sizes(best_of: str | None) -> list[int]:
    """The numbers of ``--best-of``."""
    words = [] if best_of is None else best_of.replace(",", " ").split()
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"--best-of takes numbers of answers (1 4 16), got {best_of!r}")
    return [int(word) for word in words]


def _of_run(run: str, given: Container[str]) -> dict[str, Any]:
    """What to judge of a run directory, against what, on which prompts and by whom.

    Args:
        run: Its folder.
        given: What is said otherwise; code that the run names is not looked at then.
    """
    from pathlib import Path

    from agents.runs import run_directory as runs
    from reward_models import trust

    folder = Path(run)
    config = runs.read_config(folder)
    env = config["env_kwargs"]
    there = [folder / name for name in (runs.BEST, runs.FINAL) if (folder / name / "config.json").is_file()]
    if not there:
        raise FileNotFoundError(f"{folder} has neither best/ nor final/ with a language model to judge")
    names = ("reward", "gold", "max_new_tokens")
    with runs.names_of_run(folder, ()):
        trust.check_values([env.get(name) for name in names if name not in given])
    prompts = config.get("eval_prompts") or env.get("prompts")
    return {"model": str(there[0]), "against": env.get("model"), "prompts": prompts} | {
        name: env.get(name) for name in names
    }


def _compare(
    console: Any, model: str, sides: dict[str, Any], models: dict[str, Any], perplexity_of: str | None
) -> dict[str, Any]:
    """Means side by side and the win rate; returns them."""
    from agents.commands.terminal import means_table
    from agents.evaluation.alignment_tax import perplexity, pretraining_texts
    from agents.evaluation.best_of_n import length_controlled_win_rate
    from agents.evaluation.diversity import distinct_n, distinct_of, self_similarity
    from agents.evaluation.evaluation import win_rate
    from textrl_env.data.prompts import load_records
    from textrl_env.printable import printable

    texts = None if perplexity_of is None else list(load_records(perplexity_of, ("text",)).columns["text"])
    means = {name: result.summary() for name, result in sides.items()}
    for name, result in sides.items():
        responses = result.responses
        found = {
            "distinct_2": distinct_n([text for answers in responses for text in answers], 2),
            "distinct_of_10": distinct_of(responses, 10),
            "self_similarity": self_similarity(responses),
        }
        lm = models[name]
        read = pretraining_texts(lm.tokenizer) if texts is None else texts
        found |= {"perplexity": perplexity(lm, read)} if read else {}
        means[name] |= {figure: value for figure, value in found.items() if value == value}
    judge = "score" if sides["model"].gold is None else "gold"
    a, b = (getattr(sides[name], judge) for name in ("model", "against"))
    rate, low, high = win_rate(a, b, leave_out_missing=True)
    controlled = length_controlled_win_rate(a, b, sides["model"].length, sides["against"].length)
    prompts, count = a.shape
    console.print(means_table(means, f"{prompts} prompts, {count} answers to each"))
    console.print(
        f"Win rate of {printable(model)} by {judge}: [bold]{rate:.1%}[/bold] "
        f"(95 % confidence {low:.1%} to {high:.1%}; ties count half); {controlled:.1%} at equal lengths",
        highlight=False,
    )
    figures = {"win_rate": rate, "confidence_interval": [low, high], "judge": judge}
    return figures | {"length_controlled_win_rate": controlled} | means


def _kinds(console: Any, sides: dict[str, Any], by: str | None) -> dict[str, Any]:
    """Figures by kind of prompt, and which refusals have gone wrong; returns them."""
    import dataclasses

    from agents.commands.terminal import kinds_table, print_changes
    from agents.evaluation.kinds import by_kind, changes, column_of, losses

    column = None if by == "none" else column_of(list(sides.values()), by)
    if column is None:
        return {}
    found = [change for change in changes(sides["against"], sides["model"], column) if change.name]
    worse = losses(sides["against"], sides["model"], column)
    flagged = [(change.kind, change.what) for change in found] + [(loss.kind, "gold") for loss in worse]
    console.print(kinds_table(sides, column, flagged))
    print_changes(console, found, worse)
    return {
        f"by_{column}": {
            side: {kind.name: dataclasses.asdict(kind) for kind in by_kind(result, column)}
            for side, result in sides.items()
        }
    }


def _choosing(console: Any, result: Any, sizes: list[int], passes_from: float | None) -> dict[str, Any]:
    """Best-of-n and pass@k; returns them."""
    import dataclasses

    import numpy as np

    from agents.commands.terminal import best_of_table
    from agents.evaluation.best_of_n import best_of_n, pass_at_k

    judged = result.score if result.gold is None else result.gold
    judged = judged[~np.isnan(judged).any(1)]
    scored = ~np.isnan(result.score).any(1)
    if not scored.all():
        console.print(
            f"{(~scored).sum()} prompts with answers that have no score are left out of what follows."
        )
    if passes_from is None and judged.size and np.isin(judged, (0.0, 1.0)).all():
        passes_from = 1.0
    passing = {}
    if passes_from is not None and judged.size:
        passing = {k: pass_at_k(judged >= passes_from, k) for k in sorted({1, *sizes})}
    gold = None if result.gold is None else result.gold[scored]
    chosen = [best_of_n(result.score[scored], gold, n) for n in sizes] if scored.any() else []
    if chosen or passing:
        console.print(best_of_table(chosen, passing, passes_from))
    figures: dict[str, Any] = {"best_of": [dataclasses.asdict(each) for each in chosen]} if chosen else {}
    return figures | ({"pass_at_k": passing} if passing else {})
