"""``textrl gradients``: how biased and how noisy an estimator of the policy gradient is, beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def gradients(
    agent: Annotated[
        str | None,
        typer.Option(help="my_module:MyAgent, file.py:MyAgent or a method of ours; none shows ours alone."),
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="An argument of its constructor, such as group_size=8; repeat."
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD", help="Show it beside this method; repeat.", show_default="all of ours"
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=4, help="Rollouts of 64 responses to measure with.")] = 200,
    output: Annotated[Path | None, typer.Option(help="Write the row as JSON here.")] = None,
) -> None:
    """Measure a policy gradient against the exact one: bias, noise, old samples, other generators."""
    import json

    from rich.console import Console

    from agents.evaluation import estimators

    console = Console()
    ours = _chosen(estimators.stored(), beside)
    row: dict[str, Any] = {}
    label = ""
    if agent is not None:
        label, row = _measured(agent, arg or [], batches, console)
    elif arg or output:
        raise ValueError("--arg and --output are for an --agent that is measured; name one")
    table = _table(ours, label, row)
    notes = _notes(row)
    if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
        table = _table(ours, label, row, _NARROW)
        notes.append("a wider terminal shows old samples and other generators too")
    console.print(table)
    for line in notes:
        console.print(line, style="dim", highlight=False, markup=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({label: row}, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {output}", style="dim", highlight=False)


def _chosen(ours: dict[str, Any], beside: list[str] | None) -> dict[str, Any]:
    from textrl_env.errors import did_you_mean

    for name in beside or ():
        if name not in ours:
            raise ValueError(f"nothing is stored of {name!r}. {did_you_mean(name, ours)}")
    return {name: row for name, row in ours.items() if not beside or name in beside}


def _measured(spec: str, arguments: list[str], batches: int, console: Any) -> tuple[str, dict[str, Any]]:
    """What is found of an agent; what it refuses is told."""
    from agents.algorithms.methods import find_method
    from agents.commands.flags import parse_assignments
    from agents.evaluation import estimators
    from agents.runs.registry import find_agent

    cls = find_agent(spec)
    method = find_method(spec) if ":" not in spec else None
    if method is not None and method.text_only:
        raise ValueError(f"{method.class_name} needs a language model; a table of probabilities has none")
    settings = dict(method.settings if method else {}) | parse_assignments("--arg", arguments)
    row: dict[str, Any] = {"settings": settings, "batches": batches}
    refused: dict[str, str] = {}  # why -> the first part that was
    with console.status(f"measuring {cls.__name__}"):
        for part, found in estimators.measure(cls, settings, batches, method.name if method else ""):
            row[part] = found
            if "refused" in found:
                refused.setdefault(found["refused"], part)
    if all("refused" in row[part] for part in row.keys() - {"settings", "batches"}):
        raise ValueError(f"{cls.__name__} cannot be measured: {next(iter(refused))}")
    for why, part in refused.items():
        console.print(f"{_PARTS.get(part, part)}: {why}", style="yellow", highlight=False)
    return cls.__name__ if method is None else f"{method.name}, now", row


#: What is measured, in words.
_PARTS = {
    "plain": "right or wrong",
    "real": "real scores",
    "turns": "two turns",
    "own": "its own objective",
    "old 4": "4 updates old",
    "old 16": "16 updates old",
    "none": "another generator",
    "temperature none": "a generator at another temperature",
    "bf16 none": "a generator in bfloat16",
}


_COLUMNS = (
    "cosine",
    "bias",
    "verdict",
    "noise",
    "progress",
    "real scores",
    "two turns",
    "4 old",
    "16 old",
    "elsewhere",
    "TIS",
    "MIS",
)
#: Columns, from the left, that fit on 80 characters.
_NARROW = 5


def _table(ours: dict[str, Any], label: str, row: dict[str, Any], columns: int = len(_COLUMNS)) -> Any:
    from rich.table import Table

    from agents.evaluation import estimators

    shown = Table(
        title="The first gradient step against the exact gradient", title_justify="left", expand=False
    )
    shown.add_column("method", style="cyan", no_wrap=True)
    for heading in _COLUMNS[:columns]:
        shown.add_column(heading, justify="right" if heading != "verdict" else "left", no_wrap=True)
    listed = [*ours.items(), *([(label, row)] if row else [])]

    def cell(found: dict[str, Any] | None, name: str, form: str) -> str:
        if not found:
            return "–"
        return "refused" if "refused" in found else format(found[name], form)

    for name, each in sorted(listed, key=lambda item: -item[1].get("plain", {}).get("cosine", -1.0)):
        plain = each.get("plain")
        measured = bool(plain) and "refused" not in plain
        others = ("real", "turns", "old 4", "old 16", *estimators.CORRECTIONS)
        cells = (
            cell(plain, "cosine", ".3f"),
            cell(plain, "bias", ".3f"),
            estimators.verdict(each) if measured else "–",
            cell(plain, "noise", ".0f"),
            f"{estimators.progress(plain):.3f}" if measured else cell(plain, "progress", ""),
            *(cell(each.get(part), "cosine", ".3f") for part in others),
        )
        shown.add_row(
            name,
            *cells[:columns],
            style="bold" if name == label else None,
        )
    return shown


def _notes(row: dict[str, Any]) -> list[str]:
    from agents.evaluation import estimators

    notes = [
        "cosine: of the mean step with the exact gradient of E[score] - kl_coef * KL; bias: what is left of it; noise: "
        "tokens after which scatter and step are equally long; progress: of a step from "
        f"{estimators.STEP_TOKENS} tokens, noise and bias together. More on the columns: docs/gradients.md"
    ]
    found = row.get("plain", {})
    if "z" in found:
        notes.append(_does_it_matter(found))
    return notes


def _does_it_matter(found: dict[str, float]) -> str:
    """Whether a method is biased where answers are right or wrong, and from how many tokens in a step on it matters."""
    from agents.evaluation import estimators

    unbiased = estimators.stored()["rloo"]["plain"]
    tokens = estimators.matters_from(found, unbiased)
    z = f"z = {found['z']:.1f}"
    if tokens is None:
        return f"no significant bias ({z}, significant from 3 on)"
    beyond = f"from {tokens:,.0f} tokens in a step on" if tokens else "with any number of tokens in a step"
    return f"its bias is significant ({z}); {beyond} rloo, which has none, makes more progress"
