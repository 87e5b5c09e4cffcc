"""``textrl report``: one page about a run directory, or about several laid over each other."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def report(
    run_dirs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR...", help="What textrl train, demo, sft, reward or dpo has written."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The page, .html.",
            show_default="report.html in the run directory, or beside several",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Tell kinds of prompts by this column of them.",
            show_default="kind, where there is one",
        ),
    ] = None,
) -> None:
    """Write a page about a run that can be sent as it is: settings, figures, curves, samples, warnings.

    Several runs on one environment are laid over each other; those whose settings differ by the seed only become
    a mean and a band.
    """
    from rich.console import Console
    from rich.text import Text

    from agents.report import write_report
    from agents.report.heldout import answer
    from agents.report.reading import run_label
    from textrl_env.printable import printable

    made = write_report(run_dirs, output, by)
    console = Console()
    if made.logs:
        for finding in made.findings:
            text = printable(f"{finding.text} {finding.advice}")
            name = f"{finding.name[0].upper()}{finding.name[1:]}: "
            console.print(Text.assemble((name, "bold yellow"), text), soft_wrap=True)
        console.print(Text.assemble(("The page: ", "bold"), str(made.page)), soft_wrap=True)
        return
    console.print(_ends(made.runs[0]) if len(made.runs) == 1 else _comparison(made.groups))
    for run in made.runs:
        found = answer(run)
        if found is not None:
            where = "" if len(made.runs) == 1 else f"{printable(run_label(run, made.runs))}: "
            style = {True: "green", False: "red", None: "yellow"}[found.is_good]
            console.print(Text.assemble((where, "bold"), (found.text, style)), soft_wrap=True)
    for finding in made.findings:
        is_named = finding.run is not None and len(made.runs) > 1
        where = f" ({run_label(finding.run, made.runs)})" if is_named else ""
        name = f"{finding.name[0].upper()}{finding.name[1:]}{where}"
        console.print(Text.assemble((f"{name}: ", "bold yellow"), printable(finding.text)), soft_wrap=True)
    console.print(Text.assemble(("The page: ", "bold"), str(made.page)), soft_wrap=True)


def _ends(run: Any) -> Any:
    """Where one run's curves begin and end."""
    from rich.table import Table

    from agents.report.metrics import decimals, headline, speed, write_number
    from textrl_env.printable import printable

    title = f"{printable(run.agent_name)} on {printable(run.env_name)}, {run.num_timesteps:,} {run.unit}"
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("", "first", "last"):
        table.add_column(heading, justify="right" if heading else "left")
    for metric in headline([run]):
        ends = metric.ends(run)
        table.add_row(metric.label, *(write_number(end, decimals(ends)) for end in ends))
    table.add_row(f"{run.unit} per second", "", write_number(speed(run), 0))
    return table


def _comparison(groups: Any) -> Any:
    """Where the curves of several runs end, a column for each group: metrics have longer names than runs."""
    from rich.table import Table

    from agents.report.metrics import decimals, headline, write_number
    from agents.report.tables import mean

    runs = [run for group in groups for run in group.runs]
    table = Table(title=f"At the end, on {runs[0].env_name}", title_justify="left", header_style="bold")
    table.add_column("")
    for group in groups:
        seeds = f" ({len(group.runs)} runs)" if len(group.runs) > 1 else ""
        table.add_column(f"{group.label}{seeds}", justify="right", overflow="fold")
    for metric in headline(runs):
        lasts = [mean(metric.ends(run)[1] for run in group.runs) for group in groups]
        table.add_row(metric.label, *(write_number(last, decimals(lasts)) for last in lasts))
    return table
