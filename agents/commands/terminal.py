"""What the verbs print: numbers, samples before and after, and where to go next."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from textrl_env.printable import printable

#: Metrics of the last line of the log that a summary shows, by what people call them.
_METRICS = {
    "rollout/ep_rew_mean": "mean return",
    "rollout/ep_len_mean": "mean length",
    "rollout/success_rate": "success rate",
    "objective/scores": "score",
    "objective/gold_scores": "gold score",
    "objective/kl": "KL from the initial model",
    "train/approx_kl": "KL of an update",
    "train/explained_variance": "explained variance",
    "time/fps": "steps per second",
}


def quiet_transformers() -> None:
    """No bars while weights are loaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


def metrics_table(latest: dict[str, Any]) -> Table:
    """The last line of the log, the part that people look at."""
    table = Table(title="At the end of training", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, label in _METRICS.items():
        if name in latest and not ("objective/scores" in latest and name.startswith("rollout/ep_rew")):
            table.add_row(label, f"{latest[name]:,.0f}" if name == "time/fps" else f"{latest[name]:.3g}")
    return table


#: Columns of the table of presets, by what people call them.
_TRAINED = {
    "network": "a network from scratch",
    "embedded": "the embedded world's language model",
    "full": "every weight of a language model",
    "lora": "LoRA adapters over a language model",
}


def settings_table(agent: Any, run: dict[str, Any]) -> Table:
    """Every setting that is in force, and where it comes from.

    Args:
        agent: Made, its environment too.
        run: More of them, by name.
    """
    from agents.runs.settings import in_force, origin

    settings = in_force(agent)
    trained = settings["trained"]
    table = Table(
        title=f"{type(agent).__name__} trains {_TRAINED[trained['preset']]}: {trained['trained_weights']:,} of "
        f"{trained['weights']:,} weights",
        title_justify="left",
        header_style="bold",
    )
    for heading in ("setting", "value", "from"):
        table.add_column(heading)
    for name, value in settings["agent"].items():
        whence = origin(agent, name)
        style = "bold" if whence == "given" else None if whence == "preset" else "dim"
        table.add_row(name, _short(value), whence, style=style)
    table.add_section()
    for name, value in (settings["policy"] | settings["env"] | run).items():
        table.add_row(name, _short(value), "")
    return table


def unused_template(agent: Any) -> str | None:
    """A hint where prompts that are plain texts go to a model whose chat template would lay out messages."""
    dynamics = getattr(getattr(agent.envs, "unwrapped", None), "dynamics", None)
    prompts, lm = getattr(dynamics, "prompts", None), getattr(dynamics, "lm", None)
    plain = prompts is not None and not prompts.messages
    if not plain or lm is None or not lm.tokenizer.chat_template or agent.preset == "embedded":
        return None
    return (
        "The prompts are plain texts and are given to the model as they stand, although it has a chat template. If it "
        "is to answer as in a chat, write them as messages: "
        '{"prompt": [{"role": "user", "content": "..."}]}'
    )


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
    )


#: Figures of an evaluation, by what people call them.
_FIGURES = {
    "score": "score of the reward",
    "gold": "gold score",
    "kl": "KL (nats)",
    "length": "tokens in an answer",
    "ended": "answers that end",
    "unscored": "answers that no reward applied to",
    "distinct_2": "distinct-2",
    "distinct_of_10": "different answers in ten to one prompt",
    "self_similarity": "words that answers to one prompt share",
    "perplexity": "perplexity of pre-training text",
}


def means_table(means: dict[str, dict[str, float]], title: str) -> Table:
    """Mean figures side by side.

    Args:
        means: For each side, figures by name.
        title: Of the table.
    """
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for side in means:
        table.add_column(side, justify="right")
    for name in dict.fromkeys(name for side in means.values() for name in side):
        values = [side.get(name, 0 if name == "unscored" else math.nan) for side in means.values()]
        cells = (str(value) if name == "unscored" else f"{value:.3f}" for value in values)
        table.add_row(_FIGURES.get(name, name), *cells)
    return table


def kinds_table(sides: dict[str, Any], column: str, flagged: Sequence[tuple[str, str]] = ()) -> Table:
    """Gold (or the score, without a gold judge) and refusals by kind of prompt, sides next to each other.

    Args:
        sides: An :class:`~agents.evaluation.evaluation.EvaluationResult` for each side, on the same prompts.
        column: That tells the kinds apart.
        flagged: Kinds and the columns ("gold", "refuses", "does not know") whose last figure is shown in red.
    """
    from agents.evaluation.kinds import by_kind

    found = {side: by_kind(result, column) for side, result in sides.items()}
    judge = "score" if next(iter(sides.values())).gold is None else "gold"
    table = Table(title=f"By {column}: {', '.join(sides)}", title_justify="left", header_style="bold")
    table.add_column("")
    for heading in ("prompts", judge, "refuses", "does not know"):
        table.add_column(heading, justify="right")
    for kinds in zip(*found.values(), strict=True):
        cells: list[Any] = [printable(kinds[0].name), str(kinds[0].prompts)]
        for what, name in ((judge, judge), ("refuses", "refuses"), ("does not know", "does_not_know")):
            values = [getattr(kind, name) for kind in kinds]
            *shown, last = [f"{v:.2f}" if what == judge else f"{100 * v:3.0f} %" for v in values]
            style = "bold red" if (kinds[0].name, what) in flagged else ""
            cells.append(Text.assemble("  ".join(shown), "  " if shown else "", (last, style)))
        table.add_row(*cells)
    return table


def print_changes(console: Console, changes: Sequence[Any], losses: Sequence[Any]) -> None:
    """What has gone wrong by kind of prompt, a line for each.

    Args:
        console: To print to.
        changes: Of refusals, see :class:`agents.evaluation.kinds.Change`.
        losses: Of gold, see :class:`agents.evaluation.kinds.Loss`.
    """
    for loss in losses:
        line = f"{printable(loss.kind)} has a gold score of {loss.after:.2f}, {loss.before:.2f} before"
        console.print(Text.assemble(("worse at some prompts: ", "red"), line))
    does = {"refuses": "refused", "does not know": "answered with \u201cI do not know\u201d"}
    for change in changes:
        line = f"{printable(change.kind)} is {does[change.what]} in {change.after:.0%} of answers, "
        console.print(Text.assemble((f"{change.name}: ", "red"), line, f"{change.before:.0%} before"))


def best_of_table(chosen: Sequence[Any], passing: dict[int, float], passes_from: float | None) -> Table:
    """What choosing among answers buys, see :mod:`agents.evaluation.best_of_n`.

    Args:
        chosen: The best of n.
        passing: pass@k by k.
        passes_from: The score from which an answer passes.
    """
    table = Table(title="The best of n answers by the reward", title_justify="left", header_style="bold")
    by_n = {each.n: each for each in chosen}
    has_gold = any(each.gold == each.gold for each in chosen)
    heads = ["n"]
    heads += ["score", *(["gold"] if has_gold else []), "KL (nats), at most", "estimated"] if chosen else []
    heads += [f"pass@n (from {passes_from:g})"] if passing else []
    for heading in heads:
        table.add_column(heading, justify="right")
    for n in sorted(by_n.keys() | passing.keys()):
        each = by_n.get(n)
        cells = [str(n)]
        if chosen:
            values = (
                []
                if each is None
                else [each.score, *([each.gold] if has_gold else []), each.kl_bound, each.kl]
            )
            cells += [f"{value:.3f}" for value in values] or [""] * (len(heads) - 1 - bool(passing))
        table.add_row(*cells, *([f"{passing[n]:.1%}"] if n in passing else []))
    return table


def samples_table(before: Any, after: Any, rows: Sequence[int], title: str) -> Table:
    """Answers before and after, side by side, each with its score.

    Args:
        before: An :class:`~agents.evaluation.evaluation.EvaluationResult`.
        after: Another on the same prompts.
        rows: Which prompts; the first answer to each is shown.
        title: Of the table.
    """
    judge = "score" if before.gold is None else "gold"
    table = Table(title=title, title_justify="left", header_style="bold", show_lines=True)
    for heading in ("prompt", "before", judge, "after", judge):
        is_number = heading == judge
        table.add_column(
            heading, overflow="fold", justify="right" if is_number else "left", no_wrap=is_number
        )
    for row in rows:
        cells: list[Any] = [Text(printable(before.prompts[row]))]
        for result in (before, after):
            value = getattr(result, judge)[row, 0]
            cells += [Text(printable(result.responses[row][0])), f"{value:.2f}"]
        if cells[4] != cells[2]:
            cells[4] = Text(cells[4], style="green" if float(cells[4]) > float(cells[2]) else "red")
        table.add_row(*cells)
    return table


def print_files(
    console: Console, folder: Path, what: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]]
):
    """Where things are, and what to type next; lines that can be copied whole."""
    console.print("\nFiles", style="bold")
    for name, meaning in what:
        console.print(f"  {folder / name}  [dim]{meaning}[/dim]", highlight=False, soft_wrap=True)
    console.print("\nNext", style="bold")
    for command, meaning in commands:
        line = Text(f"  {command}", style="cyan")
        line.append(f"   # {meaning}", style="dim")
        console.print(line, soft_wrap=True)
    console.print()
