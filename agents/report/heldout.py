"""Did the run improve the model, or fool the reward? The answer, the picture and the table that it rests on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from agents.evaluation.best_of_n import BestOfN, best_of_n, n_at
from agents.evaluation.diversity import self_similarity
from agents.evaluation.evaluation import mean_of_known
from agents.evaluation.kinds import by_kind
from agents.evaluation.records import BEST, FINAL, REFERENCE, START, EvaluationRecord
from agents.evaluation.verdict import Comparison, Verdict
from agents.report import pictures
from agents.report.findings import GIBBERISH, interval, last_kl, mode_collapse, rate
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
        headline: In a sentence or two.
        details: The figures that it rests on.
        is_good: True for a run whose last policy is better and has lost nothing, False for one that has gone wrong,
            None where it cannot be told.
    """

    word: str
    headline: str
    details: str
    is_good: bool | None

    @property
    def text(self) -> str:
        """In full."""
        return f"{self.headline} {self.details}".rstrip()


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
        return Answer("not decided", f"Not decided: {why}.", "", None)
    if not verdict.can_tell:
        headline = (
            "This page cannot tell: there is no gold judge, and the reward that was trained on cannot judge "
            "itself."
        )
        return _with_collapse(run, Answer("cannot tell", headline, _without_gold(run, verdict), None))
    return _with_collapse(run, _with_gold(run, verdict))


def _with_collapse(run: Run, found: Answer) -> Answer:
    """The answer, and that the policy has come to say one thing only: no judge of single answers sees that."""
    collapse = mode_collapse(run)
    if collapse is None:
        return found
    headline = f"{found.headline} It has come to say the same thing again and again."
    is_good = False if found.is_good is False else None
    return Answer(f"{found.word}, collapsed", headline, f"{found.details} {collapse}", is_good)


def _with_gold(run: Run, verdict: Verdict) -> Answer:
    gain = verdict.gain
    on = f"On {verdict.prompts} {'held-out prompts' if verdict.held_out else 'prompts of the training'}"
    wins = (
        f"{on} the gold judge prefers the last policy's answers to the first one's in {rate(gain.win_rate)} of "
        f"comparisons; the gold score changed by {interval(gain.gold)}, the score by {interval(gain.score)}."
    )
    text = f"{wins} {_since_best(run, verdict)}"
    if verdict.has_fallen:
        return _fallen(verdict, text)
    if verdict.may_have_fallen:
        start = "It improved the model, and may" if verdict.is_better else "It may"
        word = "improved, perhaps past its best" if verdict.is_better else "perhaps past its best"
        return Answer(word, f"{start} have gone past its best; that is not certain.", text, None)
    if verdict.is_better:
        return Answer("improved", "It improved the model.", text, True)
    if verdict.is_fooled:
        return Answer("fooled the reward", "It fooled the reward.", text, False)
    if gain.gold.is_below:
        return Answer("made it worse", "It made the model worse.", text, False)
    return Answer("no difference", "It changed nothing that the gold judge sees.", text, None)


def _fallen(verdict: Verdict, text: str) -> Answer:
    """The answer where gold has certainly fallen since the best policy."""
    if verdict.is_over_optimised and verdict.is_better:
        return Answer(
            "improved, then fooled", "It improved the model and then fooled the reward.", text, False
        )
    if verdict.is_over_optimised:
        return Answer("fooled the reward", "It fooled the reward.", text, False)
    start = (
        "It improved the model and then lost part of that."
        if verdict.is_better
        else "What it gained on its way it has lost again."
    )
    return Answer("rose, then fell", start, text, False)


def _since_best(run: Run, verdict: Verdict) -> str:
    """How the last policy compares with the best one, and how sure that is."""
    since = verdict.since_best
    if since is None:
        # The last policy is the best that was seen while it learned; the first one is not among those.
        return (
            "No policy on its way was better."
            if verdict.is_better
            else "Nothing was gained over the first policy: use that one."
        )
    moment = f"its own best moment, at {verdict.best_timesteps:,} {run.unit},"
    change = f"gold {interval(since.gold)}, score {interval(since.score)}"
    if not since.signs_of_loss:
        missed = f"; a fall of more than {write_number(-since.gold.low, 2)} is ruled out (95 %)" * (
            since.gold.low < 0
        )
        return f"It is not below {moment} beyond noise: {change}{missed}."
    wins = f"Against {moment} it wins {rate(since.win_rate)} of comparisons: {change}."
    has_share = verdict.lost is not None and verdict.lost > 0
    share = f" That is {100 * verdict.lost:.0f} % of what it had gained." if has_share else ""
    if since.signs_of_loss == 1:
        return f"{wins}{share} But {_against_a_fall(since)}, so it may be chance; best/ holds that policy."
    score = since.score
    if not (score.is_above or score.is_below):
        share += " The score does not show it, up or down."
    return f"{wins}{share} The policy to use is the one in best/."


def _against_a_fall(since: Comparison) -> str:
    """What speaks against a fall of gold where only one of the two ways to count shows it."""
    if since.gold.is_below:
        return "the win rate's interval holds 50 %"
    return "the gold score has risen" if since.gold.is_above else "the interval of the gold score holds 0"


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
        f"By it the last policy's answers beat the first one's in {rate(gain.win_rate)} of comparisons on "
        f"{verdict.prompts} {'held-out prompts' if verdict.held_out else 'prompts of the training'}, the score "
        f"changed by {interval(gain.score)}, {write_number(kl, 1)} nats from the reference. {far} Answers have "
        f"{final.sampled.length.mean():.1f} tokens ({start.sampled.length.mean():.1f} at first), "
        f"{100 * final.sampled.ended.mean():.0f} % of them end ({100 * start.sampled.ended.mean():.0f} %)."
        + (
            ""
            if mode_collapse(run)
            else f" Of ten answers to one prompt {final.distinct_of_10:.1f} differ "
            f"({start.distinct_of_10:.1f} at first)."
        )
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
    headline = f"<strong>{escape(found.headline)}</strong> {escape(found.details)}".rstrip().replace(
        " %", "\N{NO-BREAK SPACE}%"
    )
    answered = f'<p class="verdict {style}">{headline}</p>'
    return f"{answered}{_picture([run])}{_table(run)}{_best_of_reference(run)}{_kinds(run)}"


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
        "standard deviations of its answers"
    )
    gold = any(run.evaluations[0].has_gold for run in there)
    note += f"{', so that both have one scale' if gold else ''}. Bars are 95 % intervals over prompts"
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


#: Answers of the reference to choose among.
_SIZES = (1, 2, 4, 8, 16, 32)


def _best_of_reference(run: Run) -> str:
    """What the reference reaches by choosing among its answers, beside the last policy at its KL."""
    if REFERENCE not in run.ends or FINAL not in run.ends:
        return ""
    reference, last = run.ends[REFERENCE].sampled, run.ends[FINAL].sampled
    # Where a reward does not apply to some answers, there is no best one.
    known = np.flatnonzero(~np.isnan(reference.score).any(1))
    there = [last.prompts.index(reference.prompts[i]) for i in known]
    reached = mean_of_known(last.score[there])
    if math.isnan(reached):
        return ""
    kl = max(float(last.kl[there].mean()), 0.0)
    found = [best_of_n(reference.score[known], None, n) for n in _SIZES if n <= reference.score.shape[1]]
    rows = [
        [f"best of {b.n}", num(write_number(b.score, 2)), num(write_number(b.kl_bound, 2))] for b in found
    ]
    rows.append(["last policy", num(write_number(reached, 2)), num(write_number(kl, 2))])
    shown = table(["", "#score", "#KL, nats"], rows, "narrow")
    note = (
        f"{len(known)} of the prompts, {reference.score.shape[1]} answers of the reference to each. Best "
        "of n is at most log n - (n - 1)/n nats from the reference."
    )
    head = "What the reference reaches by choosing among its own answers"
    says = f"<p>{escape(_at_the_same_kl(found, reached, kl))}</p>"
    return f"<h3>{head}</h3>{says}<div class=wide>{shown}</div><p class=quiet>{note}</p>"


def _at_the_same_kl(found: Sequence[BestOfN], reached: float, kl: float) -> str:
    """The last policy beside the best-of-n that may go as far from the reference as it does."""
    n, most = n_at(kl), found[-1]
    if n <= most.n:
        nearest = min(found, key=lambda b: abs(b.kl_bound - kl))
        return (
            f"For {write_number(kl, 1)} nats the last policy scores {write_number(reached, 2)}. Choosing the best of "
            f"{nearest.n} answers of the reference by the same reward scores {write_number(nearest.score, 2)}, for at "
            f"most {write_number(nearest.kl_bound, 1)} nats, and every answer is one that the reference writes."
        )
    times = f"{n:,.0f}" if n < 1e6 else f"10^{math.log10(n):.0f}" if math.isfinite(n) else "endlessly many"
    beyond = (
        "The score of the last policy is beyond what the reference is seen to reach, where the reward has never been "
        "compared with anything."
        if reached > most.score
        else "The last policy scores no more than that: it has gone further than its score needs."
    )
    return (
        f"The last policy scores {write_number(reached, 2)} at {write_number(kl, 1)} nats, as far as the best of "
        f"{times} answers could be. The best of {most.n} of the reference by the same reward scores "
        f"{write_number(most.score, 2)} for at most {write_number(most.kl_bound, 1)} nats. {beyond}"
    )


def _kinds(run: Run) -> str:
    """What has become of each kind of prompt: gold and refusals, first and last policy."""
    column = run.kind_column
    if column is None:
        return ""
    first, last = (by_kind(run.ends[end].sampled, column) for end in (START, FINAL))
    judged = "score" if np.isnan([kind.gold for kind in first]).all() else "gold"
    marked = {(change.kind, change.what) for change in run.changes if change.name}
    worse = {loss.kind for loss in run.losses}
    rows = []
    for before, after in zip(first, last, strict=True):
        values = [getattr(side, judged) for side in (before, after)]
        style = "num flag" if before.name in worse else "num"
        cells = [num(str(before.prompts)), num(write_number(values[0], 2))]
        cells.append(f'<td class="{style}">{write_number(values[1], 2)}</td>')
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
    return float("nan") if result.gold is None else mean_of_known(result.gold)


_FIGURES = (
    ("gold score", lambda e: _gold(e), 3),
    ("gold score of greedy answers", lambda e: _gold(e, greedy=True), 3),
    ("score, what is trained on", lambda e: mean_of_known(e.sampled.score), None),
    ("answers to which no reward applied", lambda e: e.sampled.unscored or math.nan, 0),
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
