"""``textrl preferences``: sample answers, have them compared, write the comparisons to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from agents.commands import offline

_JUDGE, _RATERS = "Judge", "Simulated raters"


@offline.with_loading_options
def preferences(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the model that answers.", show_default="the embedded SFT model"
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=".jsonl, .txt, .csv or .parquet.", show_default="embedded"),
    ] = None,
    judge: Annotated[
        str,
        typer.Option(
            metavar="J",
            help="Who compares: gold (the embedded world's rubric), reward (its reward model), the folder or hub id "
            "of a reward model, package.module:function, file.py:function, or the http(s) URL of an OpenAI-style API.",
            rich_help_panel=_JUDGE,
        ),
    ] = "gold",
    output: Annotated[
        str, typer.Option(metavar="FILE", help="Where the comparisons go, one a line (.jsonl).")
    ] = "preferences.jsonl",
    answers_per_prompt: Annotated[
        int, typer.Option(min=2, help="Answers to each prompt; all pairs are compared.")
    ] = 2,
    pairs_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="At most so many pairs of each prompt.", show_default="all")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    max_new_tokens: offline.MaxNewTokens = None,
    ties: Annotated[
        str, typer.Option(help="Pairs the judge cannot tell apart: skip, or coin.", rich_help_panel=_JUDGE)
    ] = "skip",
    judge_model: Annotated[
        str | None,
        typer.Option(help="With a URL: what the server calls the model.", rich_help_panel=_JUDGE),
    ] = None,
    judge_rubric: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="With a URL: the question, a text with {prompt}, {first} and {second}, asking for A, B or C.",
            rich_help_panel=_JUDGE,
        ),
    ] = None,
    judge_key_env: Annotated[
        str,
        typer.Option(help="With a URL: environment variable that holds the key.", rich_help_panel=_JUDGE),
    ] = "OPENAI_API_KEY",
    judge_timeout: Annotated[
        float, typer.Option(help="With a URL: seconds to wait for a verdict.", rich_help_panel=_JUDGE)
    ] = 60.0,
    judge_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="With a URL: a further field of the request, as JSON; null leaves one out; repeatable.",
            rich_help_panel=_JUDGE,
        ),
    ] = None,
    raters: Annotated[
        int,
        typer.Option(
            min=1, help="Raters for each pair, each with records of its own.", rich_help_panel=_RATERS
        ),
    ] = 1,
    rater_scale: Annotated[
        float | None,
        typer.Option(
            help="Log-odds per unit of score; inf is no noise.",
            show_default="6 for gold, otherwise inf",
            rich_help_panel=_RATERS,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 64,
    chat_template_kwargs: offline.ChatTemplateKwargs = None,
    allow_control_tokens: offline.AllowControlTokens = False,
    too_long: offline.TooLong = "cut",
    skip_bad_rows: offline.SkipBadRows = False,
    seed: Annotated[int, typer.Option(min=0, help="Of answers, pairs and raters.")] = 0,
    device: offline.Device = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over an earlier output.")] = False,
    options: dict[str, Any] | None = None,
) -> None:
    """Sample answers to prompts and have a judge compare them.

    Each line of the output is one comparison: prompt, chosen, rejected. A judge that scores can be asked through
    simulated raters, who err by Bradley-Terry; a language model is asked about every pair in both orders, and a verdict
    that changes with the order is a tie. What has been judged is written at once, into OUTPUT.part.jsonl until all are.
    """
    from agents.callbacks.progress import ProgressBar
    from agents.commands.flags import parse_assignments, parse_object
    from agents.commands.terminal import quiet_transformers
    from agents.preferences.collection import collect_preferences, part_of
    from agents.preferences.judges import RUBRIC, load_judge
    from textrl_env import embedded
    from textrl_env.data.prompts import load_prompts

    quiet_transformers()
    template = parse_object("--chat-template-kwargs", chat_template_kwargs)
    path = offline.check_output(output, overwrite)
    if part_of(path).exists() and not overwrite:
        raise FileExistsError(
            f"{part_of(path)} holds the comparisons of a run that ended early; give it another name to keep them, or "
            "--overwrite"
        )
    spec: Any = judge
    if judge.startswith(("http://", "https://")):
        rubric = RUBRIC if judge_rubric is None else Path(judge_rubric).read_text(encoding="utf-8")
        settings = {"api_key_env": judge_key_env, "rubric": rubric, "timeout": judge_timeout}
        fields = parse_assignments("--judge-arg", judge_arg or ())
        spec = load_judge(judge, model=judge_model, request=fields, **settings)
    questions = load_prompts(
        embedded.path("prompts_train") if prompts is None else prompts, skip_bad_rows=skip_bad_rows
    )
    progress = ProgressBar("preferences", len(questions), "prompts")
    try:
        records, statistics = collect_preferences(
            embedded.path("sft") if model is None else model,
            questions,
            spec,
            path,
            answers_per_prompt=answers_per_prompt,
            pairs_per_prompt=pairs_per_prompt,
            raters=raters,
            rater_scale=rater_scale,
            ties=ties,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            device=device,
            chat_template_kwargs=template,
            allow_control_tokens=allow_control_tokens,
            too_long=too_long,
            **(options or {}),
            callback=lambda done, total: progress.show(done),
        )
        progress.finish()
    finally:
        progress.close()
    offline.report(
        f"{path}: {len(records):,} comparisons in {progress.seconds:.0f} s",
        _figures(statistics),
        questions.skipped,
    )
    if not records:
        raise ValueError(
            f"{path} is empty: no pair could be told apart; try more --answers-per-prompt, a higher --temperature, "
            "or --ties coin"
        )
    again = f" --model {model}" if model is not None else ""
    offline.print_next(
        [
            (f"textrl reward{again} --data {path}", "a reward model from them"),
            (f"textrl dpo{again} --data {path}", "or a policy from them, without a reward model"),
        ]
    )


def _figures(statistics: dict[str, float]) -> dict[str, float | str]:
    """The statistics by names that people read."""
    percent = {
        "agreement": "agreement of two raters",
        "expected_agreement": "expected agreement of two raters",
        "rater_accuracy": "a rater prefers the better answer",
        "cut_off": "answers cut off at the budget",
    }
    counts = {
        "prompts": "prompts",
        "cut": "prompts that were too long, cut",
        "skipped": "prompts that were left out",
        "pairs": "pairs compared",
        "identical": "identical pairs, skipped",
        "ties": "ties",
        "unclear": "unclear verdicts",
    }
    shown: dict[str, float | str] = {
        label: f"{statistics[name]:,.0f}"
        for name, label in counts.items()
        if name in statistics and (statistics[name] or name not in ("cut", "skipped"))
    }
    return shown | {label: f"{statistics[name]:.1%}" for name, label in percent.items() if name in statistics}
