"""A page about training from files: supervised fine-tuning, reward models, DPO and its family, one log or several.

    write_report("runs/sft")          # a model's folder with logs/ in it, or the folder of the log

Such a run has a log and no environment: the page has its curves, each with the held-out one over it, the figures at
both ends, what to look out for, and the command to run it again. Left out: settings at their defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from agents.report import pictures
from agents.report.findings import Finding
from agents.report.metrics import BLUE, GOLD, decimals, write_number
from agents.report.style import CSS
from agents.report.tables import num, table
from agents.runs.logs import PROGRESS, read_progress
from agents.runs.training_note import TrainingNote, read_note

STEPS = "time/total_timesteps"
#: Where a model's folder has its log.
LOGS = "logs"
#: What curves are called: the column without its group, the label, and what it is.
_LABELS = {
    "loss": ("Loss", "what is minimised"),
    "perplexity": ("Perplexity", "of a token"),
    "accuracy": ("Accuracy", "chosen above rejected"),
    "ece": ("Calibration error", "how far confidence is from accuracy"),
    "rewards/accuracies": ("Accuracy", "chosen above rejected"),
    "rewards/margins": ("Margin", "reward of chosen minus rejected"),
    "rewards/chosen": ("Reward of chosen", "beta times log pi / pi_ref"),
    "rewards/rejected": ("Reward of rejected", "beta times log pi / pi_ref"),
    "logps/chosen": ("Log-probability of chosen", "nats"),
    "logps/rejected": ("Log-probability of rejected", "nats"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", "after warm-up and schedule"),
}
SFT = "Supervised fine-tuning"
_OF_TOKENS = "share of tokens that were the likeliest"
#: A held-out loss that has risen by so much since its lowest point.
_RISEN = 0.02
_FEW = 10


@dataclasses.dataclass(frozen=True)
class Log:
    """The log of training from a file.

    Attributes:
        folder: As it was given.
        progress: Columns; NaN where a row has none.
        note: What the command has left at its end; None where it has left nothing.
    """

    folder: Path
    progress: dict[str, list[float]]
    note: TrainingNote | None = None

    def series(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values ``[n]`` of the rows that have a finite value."""
        values = np.array(self.progress.get(column, []), dtype=np.float64)
        steps = np.array(self.progress[STEPS])[: len(values)]
        there = np.isfinite(values) & np.isfinite(steps)
        return steps[there], values[there]

    def column(self, name: str, held_out: bool) -> str:
        """The column of a metric of :data:`_LABELS` while training, or on held-out data."""
        return f"eval/{name}" if held_out else name if "/" in name else f"train/{name}"

    @property
    def label(self) -> str:
        """The name of the folder that was trained into, of which the logs are a folder themselves."""
        return self.folder.parent.name if self.folder.name == LOGS else self.folder.name

    @property
    def what(self) -> str:
        """What was trained."""
        if any(name.startswith(("rewards/", "eval/rewards/")) for name in self.progress):
            return "Preference optimisation"
        is_reward = "train/accuracy" in self.progress or "eval/ece" in self.progress
        return "Reward model" if is_reward and "eval/perplexity" not in self.progress else SFT


def find_log(folder: Path) -> Path | None:
    """The folder of the log of training from a file, or None: the folder itself, or ``logs`` in a model's folder."""
    for place in (folder, folder / LOGS):
        if (place / PROGRESS).is_file() and not (place / "config.json").is_file():
            return place
    # The log may have been sent into the model's own folder, whose config.json is the model's.
    return None


def read_log(folder: Path) -> Log:
    """Read the log in ``folder``.

    Raises:
        ValueError: It has no rows, or no steps.
    """
    progress = read_progress(folder)
    if STEPS not in progress:
        raise ValueError(
            f"{folder / PROGRESS} has no column {STEPS!r}, so it is no log of textrl sft, reward or dpo"
        )
    if not np.isfinite(progress[STEPS]).any():
        raise ValueError(f"{folder / PROGRESS} has no row yet; let it go on for longer, then report it")
    return Log(folder, progress, read_note(folder))


# -- findings -----------------------------------------------------------------------------------------------


def examine_log(log: Log) -> list[Finding]:
    """Everything that a log warns of."""
    checks = (_short, _not_finite, _no_held_out, _over_fitting, _coin, _both_fall)
    return [found for found in (check(log) for check in checks) if found is not None]


def _short(log: Log) -> Finding | None:
    rows = len(log.series(STEPS)[0])
    return None if rows >= _FEW else Finding("short log", f"{log.label}: the log has {rows} rows.")


def _not_finite(log: Log) -> Finding | None:
    values = np.array(log.progress.get("train/loss", []))
    evaluated = np.isfinite(
        log.progress.get("eval/loss", [np.nan] * len(values))
    )  # a row of its own, perhaps
    bad = int((~np.isfinite(values) & ~evaluated[: len(values)]).sum())
    if not bad:
        return None
    text = f"{log.label}: the loss is not a finite number in {bad} rows."
    return Finding("numbers that are not finite", text, "A smaller learning rate usually helps.")


def _no_held_out(log: Log) -> Finding | None:
    if any(name.startswith("eval/") for name in log.progress):
        return None
    text = (
        f"{log.label}: nothing was measured on held-out data, so learning by heart cannot be told from "
        "learning."
    )
    return Finding("no held-out data", text, "--eval-data FILE --eval-every STEPS measure it on the way.")


def _over_fitting(log: Log) -> Finding | None:
    steps, values = log.series("eval/loss")
    if len(values) < 3:
        return None
    lowest = int(values.argmin())
    if values[-1] <= values[lowest] + _RISEN * abs(values[lowest]):
        return None
    text = (
        f"{log.label}: the held-out loss was lowest at step {steps[lowest]:,.0f}, {values[lowest]:.4g}, and ends "
        f"at {values[-1]:.4g}."
    )
    return Finding(
        "over-fitting", text, "Fewer --epochs, a smaller learning rate, weight decay or more data help."
    )


def _coin(log: Log) -> Finding | None:
    for name in ("accuracy", "rewards/accuracies"):
        values = log.series(log.column(name, held_out=True))[1]
        if len(values) and values[-1] <= 0.5 and log.what != SFT:
            text = f"{log.label}: it prefers the chosen answer in {values[-1]:.1%} of held-out comparisons."
            return Finding("no better than a coin", text, "Are chosen and rejected the right way round?")
    return None


def _both_fall(log: Log) -> Finding | None:
    chosen = log.series("logps/chosen")[1]
    rejected = log.series("logps/rejected")[1]
    if len(chosen) < _FEW or len(rejected) < _FEW:
        return None
    change = chosen[-1] - chosen[0]
    if not change < -1.0:
        return None
    text = f"{log.label}: the chosen answers have become less likely, too, by {-change:.1f} nats each."
    advice = "The margin grows because the rejected ones fall faster. A larger --beta keeps them nearer."
    return Finding("chosen answers become less likely", text, advice)


# -- the page -----------------------------------------------------------------------------------------------


def render_logs(logs: Sequence[Log], findings: Sequence[Finding], head: str) -> str:
    """The page.

    Args:
        logs: At least one.
        findings: Of all of them.
        head: What stands in the head of every report.
    """
    names = [log.label for log in logs]
    title = f"{logs[0].what}: {names[0]}" if len(logs) == 1 else f"{len(logs)} logs: {', '.join(names)}"
    lead = _summary(logs[0]) if len(logs) == 1 else " ".join(f"{log.label}: {_summary(log)}" for log in logs)
    boxes = "".join(
        f"<li><strong>{escape(f.name[0].upper() + f.name[1:])}</strong><br>{escape(f.text)}<br>{escape(f.advice)}</li>"
        for f in findings
    )
    found = f"<ul class=findings>{boxes}</ul>" if boxes else "<p class=quiet>Nothing that was looked for.</p>"
    parts = [
        f"<header><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p></header>",
        f"<section><h2>To look out for</h2>{found}</section>",
        _figures(logs, names),
        _curves(logs, names),
        _notes(logs),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}<title>{escape(title)}</title>\n<style>{CSS}</style>\n'
        f"</head>\n<body>\n<main>\n{''.join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _notes(logs: Sequence[Log]) -> str:
    """What each command printed at its end, and the command."""
    notes = {log.label: log.note for log in logs if log.note is not None}
    if not notes:
        return ""
    told = []
    for label, note in notes.items():
        rows = [[escape(name), escape(value)] for name, value in note.figures.items()]
        heading = f"<h3>{escape(label)}</h3>" if len(logs) > 1 else ""
        told.append(f"{heading}{table(['', ''], rows, 'narrow')}")
    commands = "\n".join(dict.fromkeys(note.command for note in notes.values()))
    return (
        f"<section><h2>Told at its end</h2>{''.join(told)}</section>"
        f"<section><h2>To run it again</h2><pre>{escape(commands)}</pre></section>"
    )


def _summary(log: Log) -> str:
    clauses = []
    for held_out in (True, False):
        for name in ("loss", "accuracy", "rewards/accuracies", "perplexity"):
            values = log.series(log.column(name, held_out))[1]
            if len(values):
                where = "on held-out data" if held_out else "while training"
                ends = [write_number(value, decimals(values[[0, -1]])) for value in values[[0, -1]]]
                change = f"from {ends[0]} to {ends[1]}" if len(values) > 1 else ends[0]
                clauses.append(f"{_LABELS[name][0].lower()} {where} {change}")
        if clauses:
            break
    steps = int(log.series(STEPS)[0].max())
    sentence = ", ".join(clauses) or "nothing was logged that can be summed up"
    return f"{sentence[0].upper()}{sentence[1:]}, in {steps:,} steps."


def _figures(logs: Sequence[Log], names: Sequence[str]) -> str:
    rows = []
    for log, label in zip(logs, names, strict=True):
        for name, (called, _) in _LABELS.items():
            for held_out in (False, True):
                values = log.series(log.column(name, held_out))[1]
                if len(values):
                    ends = values[[0, -1]]
                    who = [escape(label)] if len(logs) > 1 else []
                    where = "held out" if held_out else "training"
                    places = decimals(ends)
                    shown = [f"{v:.3g}" if name == "learning_rate" else write_number(v, places) for v in ends]
                    first = shown[0] if len(values) > 1 else "–"  # what was measured once has only a last
                    rows.append([*who, escape(called), where, num(first), num(shown[1])])
    heads = [*([""] if len(logs) > 1 else []), "", "", "#first", "#last"]
    return f"<section><h2>What came of it</h2><div class=wide>{table(heads, rows, 'narrow')}</div></section>"


def _curves(logs: Sequence[Log], names: Sequence[str]) -> str:
    figures = []
    for name, (called, note) in _LABELS.items():
        lines = []
        for i, (log, label) in enumerate(zip(logs, names, strict=True)):
            for held_out in (False, True):
                series = log.series(log.column(name, held_out))
                if len(series[0]):
                    colour = (GOLD if held_out else BLUE) if len(logs) == 1 else pictures.group_colour(i)
                    word = "held out" if held_out else "training"
                    lines.append((series, colour, held_out, word if len(logs) == 1 else f"{label}, {word}"))
        # What was measured once is in the table; a chart of one dot shows nothing more.
        if any(len(steps) > 1 for (steps, _), *_ in lines):
            is_of_tokens = name == "accuracy" and logs[0].what == SFT
            note = _OF_TOKENS if is_of_tokens else note
            caption = f"<strong>{escape(called)}</strong> <span>{escape(note)}</span>"
            picture = pictures.training_curve(called, lines)
            figures.append(f"<figure><figcaption>{caption}</figcaption>{picture}</figure>")
    how = "Faint is what was logged, bold its running mean; dots are measured on held-out data."
    return (
        f"<section><h2>Curves</h2><p class=quiet>{how}</p><div class=plots>{''.join(figures)}</div></section>"
    )
