"""Did the run improve the model, or fool the reward? The answer, the picture and the table that it rests on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape

import numpy as np

from agents.evaluation.diversity import self_similarity
from agents.evaluation.kinds import by_kind
from agents.evaluation.records import BEST, FINAL, START, EvaluationRecord
from agents.evaluation.verdict import Verdict
from agents.report import pictures
from agents.report.findings import GIBBERISH, interval, last_kl, rate
from agents.report.metrics import decimals, write_number
from agents.report.reading import Run, run_label
from agents.report.tables import num, table

QUESTION = "Did it improve the model, or fool the reward?"
#: What the columns of the table are called.
_ENDS = {START: "first policy", BEST: "best policy", FINAL: "last policy"}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a page says of a run.

    Attributes:
        word: In two or three words.
        text: In full, with its figures.
        is_good: True for a run whose last policy is better and has lost nothing, False for one that has gone wrong,
            None where it cannot be told.
    """

    word: str
    text: str
    is_good: bool | None


def answer(run: Run) -> Answer | None:
    """The answer for one run; None for one that the question is not asked of."""
    if not run.has_question:
        return None
    verdict = run.verdict
    if verdict is None:
        why = (
            "the run has not come to its end"
            if run.evaluations
            else "nothing was measured on held-out prompts on its way (textrl train --eval-every)"
        )
        return Answer("not decided", f"Not decided: {why}.", None)
    if not verdict.can_tell:
        return Answer("cannot tell", _without_gold(run, verdict), None)
    return _with_gold(run, verdict)


def _with_gold(run: Run, verdict: Verdict) -> Answer:
    gain, since = verdict.gain, verdict.since_best
    on = f"On {verdict.prompts} {'held-out prompts' if verdict.held_out else 'prompts of the training'}"
    wins = (
        f"{on} the gold judge prefers the last policy's answers to the first one's in {rate(gain.win_rate)} of "
        f"comparisons; the gold score changed by {interval(gain.gold)}, the score by {interval(gain.score)}."
    )
    fallen = ""
    if verdict.has_fallen:
        fallen = (
            f" But it beats its own best moment, at {verdict.best_timesteps:,} {run.unit}, in only "
            f"{rate(since.win_rate)} of them: since then the gold score changed by {interval(since.gold)}, the score "
            f"by {interval(since.score)}. The policy to use is the one in best/."
        )
    elif since is not None:
        fallen = (
            f" It is no worse than the best policy on its way, at {verdict.best_timesteps:,} {run.unit}, beyond noise: "
            f"gold {interval(since.gold)}."
        )
    if verdict.is_over_optimised:
        word = "improved, then fooled" if verdict.is_better else "fooled the reward"
        start = (
            "It improved the model and then fooled the reward. "
            if verdict.is_better
            else "It fooled the reward. "
        )
        return Answer(word, start + wins + fallen, False)
    if verdict.has_fallen:
        start = (
            "It improved the model and then lost part of that. "
            if verdict.is_better
            else "It became unsteady. "
        )
        return Answer("rose, then fell", start + wins + fallen, False)
    if verdict.is_better:
        return Answer("improved", "It improved the model. " + wins + fallen, True)
    if verdict.is_fooled:
        return Answer("fooled the reward", "It fooled the reward. " + wins + fallen, False)
    if gain.gold.is_below:
        return Answer("made it worse", "It made the model worse. " + wins + fallen, False)
    return Answer("no difference", "It changed nothing that the gold judge sees. " + wins + fallen, None)


def _without_gold(run: Run, verdict: Verdict) -> str:
    gain, final = verdict.gain, run.ends[FINAL]
    kl = last_kl(run)
    far = (
        f"That is far: beyond {GIBBERISH:g} nats answers are often gibberish that the reward happens to like."
        if kl >= GIBBERISH
        else "What follows can only make one or the other more likely."
    )
    start = run.ends[START]
    return (
        "This page cannot tell: there is no gold judge, and the reward that was trained on cannot judge itself. By it "
        f"the last policy's answers beat the first one's in {rate(gain.win_rate)} of comparisons on {verdict.prompts} "
        f"{'held-out prompts' if verdict.held_out else 'prompts of the training'}, the score changed by "
        f"{interval(gain.score)}, {write_number(kl, 1)} nats from the reference. {far} Answers have "
        f"{final.sampled.length.mean():.1f} tokens ({start.sampled.length.mean():.1f} at first), "
        f"{100 * final.sampled.ended.mean():.0f} % of them end ({100 * start.sampled.ended.mean():.0f} %), and of ten "
        f"to one prompt {final.distinct_of_10:.1f} differ ({start.distinct_of_10:.1f})."
    )


def section(runs: Sequence[Run]) -> str:
    """The part of the page that answers the question; nothing for runs that are no texts."""
    answers = [(run, answer(run)) for run in runs]
    if any(found is None for _, found in answers):
        return ""
    body = _one(*answers[0]) if len(runs) == 1 else _several(answers)
    return f"<section><h2>{QUESTION}</h2>{body}</section>"


def _one(run: Run, found: Answer) -> str:
    style = {True: "good", False: "bad", None: "unknown"}[found.is_good]
    said = f'<p class="verdict {style}">{escape(found.text)}</p>'
    return f"{said}{_picture([run])}{_table(run)}{_kinds(run)}"


def _several(answers: Sequence[tuple[Run, Answer]]) -> str:
    runs = [run for run, _ in answers]
    rows = []
    for run, found in answers:
        means = {end: e.means() for end, e in run.ends.items()}
        golds = [means.get(end, {}).get("gold_scores", np.nan) for end in (START, BEST, FINAL)]
        golds[1] = golds[2] if BEST not in means else golds[1]
        wins = "–" if run.verdict is None else rate(run.verdict.gain.win_rate)
        cells = [*(write_number(gold, 3) for gold in golds), wins, write_number(last_kl(run), 2)]
        rows.append([escape(run_label(run, runs)), escape(found.word), *map(num, cells)])
    heads = [
        "",
        "",
        "#gold at first",
        "#at its best",
        "#at the end",
        "#win rate over the first",
        "#KL at the end",
    ]
    return f"<div class=wide>{table(heads, rows)}</div>{_picture(runs)}"


def _picture(runs: Sequence[Run]) -> str:
    there = [run for run in runs if run.evaluations]
    if not there:
        return ""
    note = (
        "One dot for each evaluation on the way, all on the same prompts; the change since the first policy in "
        "standard deviations of its answers, so that both have one scale. Bars are 95 % intervals over prompts"
    )
    gold = any(run.evaluations[0].has_gold for run in there)
    note += "; the ring marks where gold is highest." if gold else "."
    what = "Proxy and gold" if gold else "Proxy (there is no gold judge)"
    figure = pictures.proxy_and_gold(there, [run_label(run, list(runs)) for run in there])
    return (
        f"<figure class=main><figcaption><strong>{what} over the square root of the KL</strong> "
        f"<span>{note}</span></figcaption>{figure}</figure>"
    )


def _table(run: Run) -> str:
    """The first, the best and the last policy side by side."""
    ends = {name: run.ends[name] for name in _ENDS if name in run.ends}
    if not ends:
        return ""
    rows = [_row(label, [get(e) for e in ends.values()], places) for label, get, places in _FIGURES]
    judged = [row for row in rows if row is not None]
    heads = ["", *(f"#{_ENDS[name]}<br>{e.timesteps:,}" for name, e in ends.items())]
    sampled = next(iter(ends.values())).sampled
    note = (
        f"{len(sampled.prompts)} prompts, {sampled.score.shape[1]} sampled answers to each; answers that no policy was "
        "chosen by."
    )
    return f"<div class=wide>{table(heads, judged, 'narrow')}</div><p class=quiet>{note}</p>"


def _kinds(run: Run) -> str:
    """What has become of each kind of prompt: gold and refusals, first and last policy."""
    column = run.kind_column
    if column is None:
        return ""
    first, last = (by_kind(run.ends[end].sampled, column) for end in (START, FINAL))
    judged = "score" if np.isnan([kind.gold for kind in first]).all() else "gold"
    marked = {(change.kind, change.what) for change in run.changes if change.name}
    rows = []
    for before, after in zip(first, last, strict=True):
        values = [getattr(side, judged) for side in (before, after)]
        cells = [num(str(before.prompts)), *(num(write_number(value, 2)) for value in values)]
        for what, name in (("refuses", "refuses"), ("does not know", "does_not_know")):
            shown = [f"{100 * getattr(side, name):.0f} %" for side in (before, after)]
            style = "num flag" if (before.name, what) in marked else "num"
            cells += [num(shown[0]), f'<td class="{style}">{shown[1]}</td>']
        rows.append([escape(before.name), *cells])
    heads = ["", "#prompts", f"#{judged}<br>first", "#<br>last", "#refuses<br>first", "#<br>last"]
    heads += ["#does not know<br>first", "#<br>last"]
    return f"<h3>By {escape(column)} of prompt</h3><div class=wide>{table(heads, rows, 'narrow kinds')}</div>"


def _gold(evaluation: EvaluationRecord, greedy: bool = False) -> float:
    result = evaluation.greedy if greedy else evaluation.sampled
    return float("nan") if result.gold is None else float(np.nanmean(result.gold))


_FIGURES = (
    ("gold score", lambda e: _gold(e), 3),
    ("gold score of greedy answers", lambda e: _gold(e, greedy=True), 3),
    ("score, what is trained on", lambda e: e.sampled.score.mean(), None),
    ("KL to the reference, nats", lambda e: max(e.sampled.kl.mean(), 0.0), 2),
    ("tokens in an answer", lambda e: e.sampled.length.mean(), 1),
    ("share that ends within the budget", lambda e: e.sampled.ended.mean(), 3),
    ("different answers in ten to one prompt", lambda e: e.distinct_of_10, 1),
    ("words that answers to one prompt share", lambda e: self_similarity(e.sampled.responses), 3),
    ("perplexity of pre-training text", lambda e: e.perplexity, 2),
)


def _row(label: str, values: Sequence[float], places: int | None) -> list[str] | None:
    if not np.isfinite(values).any():
        return None
    places = decimals(values) if places is None else places
    return [escape(label), *(num(write_number(float(value), places)) for value in values)]
