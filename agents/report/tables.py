"""The facts and figures of a report as tables of HTML: one run's, several beside each other, and held-out ones."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

import numpy as np

from agents.report import metrics, pictures
from agents.report.metrics import Metric, decimals, write_number
from agents.report.reading import STEPS, Group, Run, all_settings, default_of, settings


def facts_and_figures(run: Run) -> str:
    """What was run and, beside it, where its curves begin and end."""
    rows = []
    for metric in metrics.headline([run]):
        first, last = ends = metric.ends(run)
        cells = [write_number(value, decimals(ends)) for value in (first, last, last - first)]
        cells[2] = f"+{cells[2]}" if last > first else cells[2]
        rows.append([_named(metric), *map(num, cells)])
    figures = table(["", "#first", "#last", "#change"], rows)
    note = "<p class=quiet>The first and the last row of the log; what was measured while training.</p>"
    return (
        f"<section class=two><div><h2>What was run</h2>{_facts([run])}</div>"
        f"<div><h2>What came of it</h2>{figures}{note}</div></section>"
    )


def _facts(runs: Sequence[Run]) -> str:
    """What was run; the runs differ by the seed only."""
    run, many = runs[0], len(runs) > 1
    rows = {"Runs" if many else "Run": ", ".join(str(each.folder) for each in runs)}
    rows |= {"Agent": run.agent_name, "Environment": run.env_name}
    model = run.config["env_kwargs"].get("model")
    if model is not None or run.env_name == "TextRLHF-v0":
        rows["Model"] = setting(model or "the embedded one")
    rows["Seeds" if many else "Seed"] = ", ".join(str(each.config["seed"]) for each in runs)
    given = {name: pair for name, pair in settings(run.config).items() if name != "model"}
    rows |= {} if many else _cost(run)
    return _list(rows | {name: _with_default(*pair) for name, pair in given.items()}, code=given)


def _cost(run: Run) -> dict[str, str]:
    """How long a run has learned, how fast, and when."""
    rows = {"Learned for": f"{run.num_timesteps:,} {run.unit}, {_rows(len(run.series(STEPS)[0]))} logged"}
    if np.isfinite(metrics.speed(run)):
        rows["Speed"] = f"{metrics.speed(run):,.0f} {run.unit} per second, updates included"
    memory = run.series("memory/peak_mb")[1]
    if len(memory):
        rows["Peak memory"] = f"{memory.max():,.0f} MB"
    if run.started is not None:
        rows["Started"] = f"{datetime.fromtimestamp(run.started, UTC):%Y-%m-%d %H:%M} UTC"
    return rows


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")


def _list(rows: dict[str, str], code: Container[str]) -> str:
    """Names and what they stand for; those in ``code`` are names of settings."""
    items = (
        f"<dt{' class=code' if name in code else ''}>{escape(name)}</dt><dd>{escape(value)}</dd>"
        for name, value in rows.items()
    )
    return f"<dl>{''.join(items)}</dl>"


def _with_default(value: Any, default: Any) -> str:
    return setting(value) if default is None else f"{setting(value)}  (default {setting(default)})"


def left_alone(run: Run) -> str:
    """The hyper-parameters at their defaults, folded away; nothing where the run has not noted them."""
    left = {name: setting(value) for name, value in run.config["agent_defaults"].items()}
    if not left:
        return ""
    return f"<details><summary>Left at their defaults</summary>{_list(left, left)}</details>"


def setting(value: Any) -> str:
    """A setting's value as text."""
    return value if isinstance(value, str) else json.dumps(value)


def comparison(groups: Sequence[Group]) -> str:
    """Where each group's curves end, and the settings that tell the groups apart."""
    runs = [run for group in groups for run in group.runs]
    shown, unit = metrics.headline(runs), runs[0].unit
    columns = [_column(metric, groups) for metric in shown]
    rows = []
    for i, group in enumerate(groups):
        name = f"<span class=name>{swatch(i, groups)}{escape(group.label)}</span>"
        longest = max(run.num_timesteps for run in group.runs)
        speed = write_number(mean(map(metrics.speed, group.runs)), 0)
        cells = [_seeds(group), f"{longest:,}", *(column[i] for column in columns), speed]
        rows.append([name, *map(num, cells)])
    heads = ["", "#seeds", f"#{unit}", *(f"#{escape(metric.label)}" for metric in shown), f"#{unit} a second"]
    note = "The last rows of the logs"
    if any(len(group.runs) > 1 for group in groups):
        note += "; of several seeds the mean, and the lowest and the highest under it"
    figures = f"<div class=wide>{table(heads, rows)}</div><p class=quiet>{note}.</p>"
    settings_of = f"<h2>What was run</h2>{_facts(runs)}" if len(groups) == 1 else _differences(groups)
    return f"<section><h2>What came of it</h2>{figures}</section><section>{settings_of}</section>"


def _column(metric: Metric, groups: Sequence[Group]) -> list[str]:
    """Where a metric ends, one cell for each group, all with as many decimals."""
    lasts = [[metric.ends(run)[1] for run in group.runs] for group in groups]
    places = decimals(value for values in lasts for value in values)
    return [_spread(values, places) for values in lasts]


def _spread(values: Sequence[float], places: int) -> str:
    there = [value for value in values if np.isfinite(value)]
    average = write_number(mean(values), places)
    if len(there) < 2:
        return average
    return f"{average}<small>{write_number(min(there), places)} to {write_number(max(there), places)}</small>"


def _differences(groups: Sequence[Group]) -> str:
    configs = [group.runs[0].config for group in groups]
    given = [all_settings(config) for config in configs]
    rows = []
    for name in dict.fromkeys(name for each in given for name in each):
        values = [setting(s.get(name, default_of(c, name))) for s, c in zip(given, configs, strict=True)]
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(name)}</code>", *map(escape, values)])
    heads = ["", *(swatch(i, groups) + escape(group.label) for i, group in enumerate(groups))]
    return f"<h2>Settings that differ</h2><div class=wide>{table(heads, rows)}</div>"


def evaluation(run: Run, label: str) -> str:
    """What ``textrl demo`` has measured on held-out prompts."""
    found = run.evaluation or {}
    before, after = found.get("before", {}), found.get("after", {})
    rows = [
        [label, *(num(write_number(end, decimals(ends))) for end in ends)]
        for name, label in metrics.EVALUATED.items()
        if np.isfinite(ends := (before.get(name, np.nan), after.get(name, np.nan))).all()
    ]
    if not rows:
        return ""
    head = "On held-out prompts" + (f": {escape(label)}" if label else "")
    return f"<section><h2>{head}</h2>{_win_rate(found)}{table(['', '#before', '#after'], rows, 'narrow')}</section>"


def _win_rate(found: dict[str, Any]) -> str:
    if not {"win_rate", "win_rate_low", "win_rate_high", "prompts"} <= found.keys():
        return ""
    rate, low, high = (f"{100 * found[name]:.1f} %" for name in ("win_rate", "win_rate_low", "win_rate_high"))
    return (
        f"<p>The gold judge prefers the trained model's answers to the initial model's in <strong>{rate}</strong> "
        f"of comparisons (95 % confidence {low} to {high}, ties count half, {found['prompts']} prompts).</p>"
    )


# -- pieces -------------------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """Cells are HTML; a heading that begins with "#" stands over numbers.

    In the style "samples" each cell has its heading with it, since narrow screens show a row as a card.
    """
    cells = [[cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row] for row in rows]
    if style == "samples":
        labels = [f' data-label="{escape(h.removeprefix("#"))}"' for h in heads]
        cells = [[f"<td{at}{c[3:]}" for c, at in zip(row, labels, strict=True)] for row in cells]
    head = "".join(f"<th class=num>{h[1:]}</th>" if h.startswith("#") else f"<th>{h}</th>" for h in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def num(cell: str) -> str:
    """A cell of :func:`table` that holds a number."""
    return f"<td class=num>{cell}</td>"


def _named(metric: Metric) -> str:
    return f"{escape(metric.label)} <span class=quiet>{escape(metric.note)}</span>"


def swatch(index: int, groups: Sequence[Group]) -> str:
    """A piece of a group's line for a legend; nothing where there is one group only."""
    if len(groups) < 2:
        return ""
    style = ("solid", "dashed", "dotted")[index // len(pictures.PALETTE) % len(pictures.LINES)]
    return f'<i style="border-top:3px {style} {pictures.page_colour(index)}"></i>'


def _seeds(group: Group) -> str:
    seeds = [run.config["seed"] for run in group.runs]
    return ", ".join(map(str, seeds)) if len(seeds) <= 3 else f"{len(seeds)} of them"


def mean(values: Iterable[float]) -> float:
    """Of the finite ones; NaN if there is none."""
    there = [value for value in values if np.isfinite(value)]
    return float(np.mean(there)) if there else float("nan")
