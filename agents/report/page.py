"""The report as one HTML file: no scripts, no fonts, no pictures from anywhere.

Everything that a run has written is text here: it is escaped, and the page forbids every script but its own, which
searches the samples (:mod:`agents.report.browser`). How the page looks is in :mod:`agents.report.style`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

from agents.report import browser, heldout, metrics, pictures, toys
from agents.report.findings import Finding, applicable
from agents.report.metrics import Metric, decimals, write_number
from agents.report.reading import Group, Run, run_label
from agents.report.samples import Pair, pairs
from agents.report.style import CSS
from agents.report.tables import (
    comparison,
    evaluation,
    facts_and_figures,
    left_alone,
    mean,
    num,
    swatch,
    table,
)
from textrl_env.printable import printable

#: Marks a file as a report, near its beginning.
GENERATOR = '<meta name="generator" content="textrl report">'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_WITH_SCRIPT = f"{_POLICY}; script-src '{browser.script_hash()}'"
#: In the head of every page, up to its title.
HEAD = (
    f'<meta charset="utf-8">\n{GENERATOR}\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
)
#: Pairs of samples of one run, and of each of several.
_PAIRS, _PAIRS_OF_SEVERAL = 8, 4
#: Groups that the summary names one by one.
_RANKED = 4
#: Characters of a prompt or response that are shown.
_LONGEST = 600


def render(groups: Sequence[Group], findings: Sequence[Finding]) -> str:
    """The page.

    Args:
        groups: The runs, see :func:`agents.report.reading.group_runs`.
        findings: Of all of them.
    """
    runs = [run for group in groups for run in group.runs]
    heading = title(groups)
    alone = len(runs) == 1
    parts = [
        f"<header><h1>{escape(heading)}</h1><p class=lead>{escape(summary(groups))}</p></header>",
        heldout.section(runs),
        _findings(findings, runs),
        (facts_and_figures(runs[0]) if alone else comparison(groups)),
        *(
            evaluation(run, "" if alone else run_label(run, runs))
            for run in runs
            if run.evaluation and not run.ends
        ),
        toys.section(runs[0].toy) if alone else "",
        *_curves(groups, runs),
        *(_samples(run, alone, run_label(run, runs)) for run in runs),
        *([browser.section(runs[0]), browser.microscope(runs[0])] if alone else []),
        *_training(groups, runs),
        _reproduce(runs),
    ]
    policy = _WITH_SCRIPT if any("<script>" in part for part in parts) else _POLICY
    head = HEAD.replace(_POLICY, policy)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}<title>{escape(heading)}</title>\n<style>{CSS}</style>\n'
        "</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def title(groups: Sequence[Group]) -> str:
    """What the page is about."""
    run = groups[0].runs[0]
    if len(groups) > 1:
        return f"{len(groups)} settings on {run.env_name} compared"
    seeds = len(groups[0].runs)
    return f"{run.agent_name} on {run.env_name}" + (f", {seeds} seeds" if seeds > 1 else "")


def summary(groups: Sequence[Group]) -> str:
    """What came of it, in one sentence."""
    run = groups[0].runs[0]
    names = (metrics.SCORE, metrics.GOLD_SCORE) if run.is_text else (metrics.RETURN,)
    if len(groups) > 1:
        ranked = (_ranked(metric, groups) for metric in names)
        return " ".join(f"{each}." for each in ranked if each)
    clauses = []
    for metric in metrics.logged(names, groups[0].runs):
        first, last = (mean(values) for values in zip(*(metric.ends(r) for r in groups[0].runs), strict=True))
        places = min(decimals((first, last)), 2)
        change = f"{write_number(first, places)} to {write_number(last, places)}"
        clauses.append(f"the {metric.label.lower()} {'went ' if not clauses else ''}from {change}")
    kl = mean([metrics.KL.ends(r)[1] for r in groups[0].runs])
    if np.isfinite(kl):
        clauses.append(f"{write_number(kl, 1)} nats from the reference")
    if run.is_text and clauses:
        clauses[0] = f"while training {clauses[0]}"
    sentence = ", ".join(clauses) or "nothing was logged that can be summed up"
    return f"{sentence[0].upper()}{sentence[1:]}, in {run.num_timesteps:,} {run.unit}."


def _ranked(metric: Metric, groups: Sequence[Group]) -> str:
    """ "Gold score at the end: a 0.84, b 0.71", the highest first; of many the highest and the lowest."""
    lasts = {group.label: mean([metric.ends(run)[1] for run in group.runs]) for group in groups}
    there = sorted((label for label in lasts if np.isfinite(lasts[label])), key=lambda label: -lasts[label])
    places = decimals(lasts.values())
    shown = there if len(there) <= _RANKED else [there[0], there[-1]]
    ranking = (" to " if len(shown) < len(there) else ", ").join(
        f"{label} {write_number(lasts[label], places)}" for label in shown
    )
    return f"{metric.label} at the end: {ranking}" if there else ""


# -- findings -----------------------------------------------------------------------------------------------


def _findings(findings: Sequence[Finding], runs: Sequence[Run]) -> str:
    """One box for each finding by name, a line in it for each run that has it."""
    boxes = []
    for name in dict.fromkeys(finding.name for finding in findings):
        lines = []
        for finding in (each for each in findings if each.name == name):
            is_named = finding.run is not None and len(runs) > 1
            where = f"<b>{escape(run_label(finding.run, runs))}</b> " if is_named else ""
            lines.append(f"{where}{escape(finding.text)}")
        advice = dict.fromkeys(finding.advice for finding in findings if finding.name == name)
        lines += [escape(each) for each in advice if each]
        boxes.append(
            f"<li><strong>{escape(name[0].upper() + name[1:])}</strong><br>{'<br>'.join(lines)}</li>"
        )
    checked = dict.fromkeys(check.name for run in runs for check in applicable(run))
    clear = [name for name in checked if name not in {finding.name for finding in findings}]
    rest = f"<p class=quiet>Looked for and not found: {escape(', '.join(clear))}.</p>" if clear else ""
    found = f"<ul class=findings>{''.join(boxes)}</ul>" if boxes else ""
    return f"<section><h2>To look out for</h2>{found}{rest}</section>"


# -- curves -------------------------------------------------------------------------------------------------


def _curves(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    """What came of it: learning curves, what each nat has bought, and the distance from the exact optimum."""
    how = (
        "Faint is what was logged while training, bold its running mean over a tenth of the rows, narrower towards the "
        "ends."
    )
    if len(groups) > pictures.FAINT:
        how = "Running means over a tenth of the rows."
    if any(len(group.runs) > 1 for group in groups):
        how = (
            "Of several seeds, the interquartile mean of their running means and its 95 % bootstrap interval over "
            "seeds."
        )
    bought = "What each nat has bought: open dots where learning begins, full ones where it ends."
    judged = metrics.logged((metrics.SCORE, metrics.GOLD_SCORE), runs)
    judged = judged if metrics.logged((metrics.KL,), runs) else []
    return [
        _moving("Learning curves", metrics.learning_curves(runs), groups, runs, how),
        _plots("Score against KL", bought, judged, pictures.frontier, groups),
        _plots("The exact optimum", "", metrics.logged(metrics.EXACT_CURVES, runs), pictures.curve, groups),
    ]


def _training(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    """How it went."""
    return [
        _moving("Groups", metrics.logged(metrics.GROUP_CURVES, runs), groups, runs),
        _moving("Updates", metrics.update_curves(runs), groups, runs),
    ]


def _moving(
    heading: str, shown: Sequence[Metric], groups: Sequence[Group], runs: Sequence[Run], how: str = ""
) -> str:
    """A section of curves; what never changed is a number, since an empty chart hides what moves."""
    still = {metric: value for metric in shown if (value := metrics.constant(metric, runs)) is not None}
    parts = (f"{metric.label} {value:.3g}".replace("-", "\N{MINUS SIGN}") for metric, value in still.items())
    told = escape(f"The same throughout: {', '.join(parts)}.") if still else ""
    moved = [metric for metric in shown if metric not in still]
    if not moved:
        return f"<section><h2>{heading}</h2><p class=quiet>{told}</p></section>" if told else ""
    return _plots(heading, f"{how} {told}".strip(), moved, pictures.curve, groups)


def _plots(
    heading: str,
    how: str,
    shown: Sequence[Metric],
    draw: Callable[[Metric, Sequence[Group]], str],
    groups: Sequence[Group],
) -> str:
    """A section of pictures, nothing where nothing is shown."""
    if not shown:
        return ""
    captions = (f"<strong>{escape(m.label)}</strong> <span>{escape(m.note)}</span>" for m in shown)
    figures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{draw(metric, groups)}</figure>"
        for caption, metric in zip(captions, shown, strict=True)
    )
    how = f"<p class=quiet>{how}</p>" if how else ""
    names = "".join(
        f"<span>{swatch(i, groups)}{escape(group.label)}</span>" for i, group in enumerate(groups)
    )
    legend = f"<p class=legend>{names}</p>" if len(groups) > 1 else ""
    return f"<section><h2>{heading}</h2>{how}{legend}<div class=plots>{figures}</div></section>"


# -- samples ------------------------------------------------------------------------------------------------


def _samples(run: Run, alone: bool, label: str) -> str:
    """An answer of the first and of the last policy to the same prompts; else the first and last that were recorded."""
    answers = browser.first_and_last(run, _PAIRS if alone else _PAIRS_OF_SEVERAL)
    if answers:
        names = ["score", *(["gold"] if "gold" in answers[0][3] else []), "KL"]
        heads = [
            "prompt",
            *[h for side in ("first policy", "last policy") for h in (side, *(f"#{n}" for n in names))],
        ]
        body = f"<div class=wide>{table(heads, browser.sample_table_rows(answers, names), 'samples')}</div>"
        return _folded("First and last answers", body, alone, label)
    if not run.tables:
        return ""
    found = pairs(run.tables, _PAIRS if alone else _PAIRS_OF_SEVERAL)
    if found:
        has_gold = any("score/gold" in pair.first for pair in found)
        numbers = [("score", "score"), *([("score/gold", "gold")] if has_gold else []), ("kl_sum", "KL")]
        heads = ["prompt", *[h for side in ("first", "last") for h in (side, *(f"#{n}" for _, n in numbers))]]
        rows = [_sample_row(pair, [name for name, _ in numbers], run.unit) for pair in found]
        body = f"<div class=wide>{table(heads, rows, 'samples')}</div>"
        body = "<p class=quiet>The same prompts, as recorded while training; KL in nats.</p>" + body
    else:
        body = "<p class=quiet>No prompt was recorded twice, so there is no first and last to compare.</p>"
    return _folded("The same prompts, early and late", body, alone, label)


def _folded(heading: str, body: str, alone: bool, label: str) -> str:
    """A section of one run, folded away where there are several."""
    if alone:
        return f"<section><h2>{heading}</h2>{body}</section>"
    return f"<section><details><summary>{heading} of {escape(label)}</summary>{body}</details></section>"


def _sample_row(pair: Pair, numbers: Sequence[str], unit: str) -> list[str]:
    row = [escape(printable(_cut(pair.prompt)))]
    for cells, at in ((pair.first, pair.first_at), (pair.last, pair.last_at)):
        row.append(f"{escape(printable(_cut(cells['response'])))}<small>at {at:,} {unit}</small>")
        row += [num(escape(cells.get(name, "–").replace("-", "\N{MINUS SIGN}"))) for name in numbers]
    return row


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _reproduce(runs: Sequence[Run]) -> str:
    lines = dict.fromkeys(run.config["command"] for run in runs if run.config["command"])
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in run.config["versions"].items()) for run in runs)
    rest = left_alone(runs[0]) if len(runs) == 1 else ""
    commands = f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""
    notes = "".join(f"<p class=quiet>{escape(line)}</p>" for line in versions)
    return f"<section><h2>To run it again</h2>{commands}{notes}{rest}</section>"
