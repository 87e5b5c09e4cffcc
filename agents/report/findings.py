"""What a log warns of, in plain words, each with the figures that it follows from.

Every check is a condition on numbers of the log, with its threshold beside it; what it cannot know (whether the
task is solved, whether a length is wanted) it leaves to the reader. Noise is measured, not guessed: the standard
error of the mean of a tenth of the rows comes from how the log scatters around its running mean. Whether the reward
was fooled is not read off training batches at all but decided by held-out comparisons
(:mod:`agents.evaluation.verdict`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from agents.evaluation.plots import smoothed
from agents.evaluation.verdict import Interval
from agents.report import metrics
from agents.report.metrics import Metric, decimals, write_number
from agents.report.reading import STEPS, Group, Run, all_settings, default_of, run_label

#: Standard errors that a change must exceed.
_CHANGE = 2.0
#: Nats from the reference at which answers are usually gibberish, whatever the reward says.
GIBBERISH = 25.0
#: Where a warning begins: shares, nats, nats, and a factor.
_COLLAPSED, _CUT, _ZERO_STD, _BAD_CRITIC = 0.1, 0.1, 0.3, -0.05
_LARGE_UPDATE, _NEGATIVE_KL, _LONGER = 0.1, -0.1, 2.0
#: As in agents/callbacks/scale_guards.py: growth of the weights in one rollout's updates, and size of a reward.
_GROWTH, _REWARD = 10.0, 1e5


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to look out for.

    Attributes:
        name: What it is, in a few words.
        text: The finding in a sentence, with its figures.
        advice: What it means, and what usually helps.
        run: The run it is about; None where it is about all of them.
    """

    name: str
    text: str
    advice: str = ""
    run: Run | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on a run that has logged at least ``rows`` rows of each of ``needs``.

    ``find`` returns the figures that it is met by, in words, or None; ``applies`` says whether it can be
    decided, None that it always can.
    """

    name: str
    find: Callable[[Run], str | None]
    needs: tuple[Metric, ...] = ()
    rows: int = 1
    advice: str = ""
    applies: Callable[[Run], bool] | None = None


def examine(run: Run) -> list[Finding]:
    """Everything that one run's log warns of."""
    found = [(check, check.find(run)) for check in applicable(run)]
    return [Finding(check.name, text, check.advice, run) for check, text in found if text is not None]


def applicable(run: Run) -> list[Check]:
    """The checks that a run has logged enough for."""
    logged = (c for c in CHECKS if all(len(m.series(run)[0]) >= c.rows for m in c.needs))
    return [check for check in logged if check.applies is None or check.applies(run)]


def compare(groups: Sequence[Group]) -> list[Finding]:
    """What to know before the curves of several groups are compared."""
    runs = [run for group in groups for run in group.runs]
    meanings = {
        "reward": "Scores are then not on one scale; compare gold scores, or evaluate both.",
        "model": "Each KL is then to a reference of its own.",
        "prompts": "Scores are then means over different prompts.",
    }
    found = [
        Finding("not the same task", f"The runs differ in {setting}.", meaning)
        for setting, meaning in meanings.items()
        if len({str(all_settings(run.config).get(setting)) for run in runs}) > 1
    ]
    for metric in metrics.learning_curves(runs):
        lacking = [run_label(run, runs) for run in runs if not len(metric.series(run)[0])]
        if lacking:
            text = f"{metric.label} ({metric.column}) is missing in {', '.join(lacking)}."
            found.append(Finding("not logged by all", text))
    return found


# -- numbers ------------------------------------------------------------------------------------------------


def _from_to(ends: Sequence[float]) -> str:
    """ "1.20 to 0.85", with as many decimals as the numbers deserve."""
    return " to ".join(write_number(end, decimals(ends)) for end in ends)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def standard_error(values: np.ndarray) -> float:
    """Of the mean of a tenth of the rows, from how ``values`` scatter around their running mean."""
    # The ends of the running mean are rows themselves, and a row's own share of a window of three hides a third.
    inner = (values - smoothed(values))[1:-1] if len(values) > 4 else values - values.mean()
    return float(np.std(inner) * np.sqrt(1.5) / np.sqrt(metrics.tenth(values)))


# -- checks -------------------------------------------------------------------------------------------------


def _unfinished(run: Run) -> str | None:
    if run.is_finished:
        return None
    way = f"{run.num_timesteps:,} of {run.config['total_timesteps']:,} {run.unit}"
    return f"The log ends at {way}; go on with: textrl train --resume {run.folder}"


def _few_rows(run: Run) -> str | None:
    rows = len(run.series(STEPS)[0])
    return (
        f"The log has {rows} row{'s' if rows > 1 else ''}, fewer than {metrics.FEW_ROWS}."
        if rows < metrics.FEW_ROWS
        else None
    )


def _not_finite(run: Run) -> str | None:
    # A rollout that was not learned from, since a budget ended the run, has none of these figures.
    figures = [values for name, values in run.progress.items() if name.startswith("train/")]
    learned = np.isfinite(figures).any(0) if figures else None
    for column in ("train/loss", "train/grad_norm"):
        values = np.array(run.progress.get(column, []))
        bad = np.flatnonzero(~np.isfinite(values) & learned) if len(values) else []
        if len(bad):
            at = f"{run.progress[STEPS][bad[0]]:,.0f} {run.unit}"
            return f"{column} is not a finite number in {len(bad)} of {len(values)} rows, first at {at}."
    return None


def signed(value: float, places: int = 2) -> str:
    """A difference with its sign."""
    return ("+" if value > 0 else "") + write_number(value, places)


def interval(found: Interval, places: int = 2) -> str:
    """ "+0.12 (95 % +0.09 to +0.15)"; an end beside 0 is not rounded to 0, for it decides."""
    while places < 4 and any(end and not round(end, places) for end in (found.low, found.high)):
        places += 1
    ends = " to ".join(signed(end, places) for end in (found.low, found.high))
    return f"{signed(found.mean, places)} (95 % {ends})"


def rate(found: Interval) -> str:
    """ "41.0 % (38.1 to 44.2)"."""
    return f"{100 * found.mean:.1f} % ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _can_compare(run: Run) -> bool:
    """Whether there are a gold judge and a best policy to compare the last one with."""
    verdict = run.verdict
    return verdict is not None and verdict.can_tell


def _can_tell_a_fall(run: Run) -> bool:
    """The same, and the comparison with the best policy leaves no doubt: what is in doubt is not cleared of."""
    return _can_compare(run) and not run.verdict.may_have_fallen


def _since_best(run: Run) -> str:
    since, at = run.verdict.since_best, run.verdict.best_timesteps
    return (
        f"The last policy beats the best one, at {at:,} {run.unit}, in {rate(since.win_rate)} of held-out comparisons: "
        f"gold {interval(since.gold)}, score {interval(since.score)}."
    )


def _over_optimisation(run: Run) -> str | None:
    return _since_best(run) if run.verdict.is_over_optimised else None


def _falling_gold(run: Run) -> str | None:
    verdict = run.verdict
    return _since_best(run) if verdict.has_fallen and not verdict.is_over_optimised else None


def _perhaps_falling(run: Run) -> str | None:
    if not run.verdict.may_have_fallen:
        return None
    which = "the mean of gold" if run.verdict.since_best.gold.is_below else "the win rate"
    return f"{_since_best(run)} Of the two ways to count, only {which} shows a fall beyond its 95 % interval."


def _fooled(run: Run) -> str | None:
    if not run.verdict.is_fooled:
        return None
    gain = run.verdict.gain
    return (
        f"From the first policy to the last the score changed by {interval(gain.score)} and the gold score by "
        f"{interval(gain.gold)} on held-out prompts."
    )


def _undecided(run: Run) -> str | None:
    if run.verdict is not None:
        return None
    if run.evaluations:
        return "The first, the best and the last policy are compared when the run has come to its end."
    return "The run was not evaluated on its way, so whether it improved the model cannot be told."


def _no_judge(run: Run) -> str | None:
    if run.verdict.can_tell:
        return None
    return (
        "Only the reward that was trained on has scored the answers, so an improved model cannot be told from a "
        "fooled reward."
    )


def last_kl(run: Run) -> float:
    """Nats from the reference at the end: held-out where that was measured, else of the last tenth of the log."""
    final = run.ends.get("final")
    return metrics.KL.tenths(run)[1] if final is None else float(final.sampled.kl.mean())


def _far_away(run: Run) -> str | None:
    kl = last_kl(run)
    if not kl >= GIBBERISH or (run.verdict is not None and run.verdict.is_better):
        return None
    return f"Answers end {write_number(kl, 1)} nats from the reference."


def _has_kinds(run: Run) -> bool:
    return run.kind_column is not None


def _changed(name: str) -> Callable[[Run], str | None]:
    """Finds the kinds of prompts whose share of refusals has changed in one way."""

    def find(run: Run) -> str | None:
        found = [change for change in run.changes if change.name == name]
        verb = {
            "refuses": "is refused",
            "does not know": "gets an \N{LEFT DOUBLE QUOTATION MARK}I do not know"
            "\N{RIGHT DOUBLE QUOTATION MARK}",
        }
        parts = [
            f"{c.kind} {verb[c.what]} in {_share(c.after)} of answers, {_share(c.before)} at first"
            for c in found
        ]
        return "; ".join(parts) + "." if parts else None

    return find


def _worse_by_kind(run: Run) -> str | None:
    if not run.losses:
        return None
    parts = (f"{loss.kind} {loss.after:.2f}, {loss.before:.2f} at first" for loss in run.losses)
    return f"Gold by kind of prompt: {'; '.join(parts)}."


#: The share of what it was to which the different answers of ten may fall.
_SAME_ANSWERS = 0.5


def mode_collapse(run: Run) -> str | None:
    """That answers to one prompt have become the same, with the figures; None where they have not."""
    if run.verdict is None:
        return None
    first, last = (run.ends[end].distinct_of_10 for end in ("start", "final"))
    if not last < _SAME_ANSWERS * first:
        return None
    return f"Of ten answers to one prompt {last:.1f} differ, {first:.1f} at first."


def _stopped_at_kl(run: Run) -> str | None:
    if run.stopped_at_kl is None:
        return None
    at = f"{run.num_timesteps:,} of {run.config['total_timesteps']:,} {run.unit}"
    budget = run.config.get("kl_budget")
    return f"At {at} answers were {run.stopped_at_kl:.1f} nats from the reference, beyond the budget of {budget:g}."


def _no_better_score(run: Run) -> str | None:
    return _not_risen(run, metrics.SCORE)


def _no_better_return(run: Run) -> str | None:
    return None if run.is_text else _not_risen(run, metrics.RETURN)


def _not_risen(run: Run, metric: Metric) -> str | None:
    _, values = metric.series(run)
    first, last = ends = metric.tenths(run)
    if last - first > max(_CHANGE * np.sqrt(2) * standard_error(values), 1e-9):
        return None
    return f"The {metric.label.lower()} has not risen beyond its noise: from {_from_to(ends)}."


def _entropy_collapse(run: Run) -> str | None:
    first, last = ends = metrics.ENTROPY.tenths(run)
    if first <= 0 or last >= _COLLAPSED * first:
        return None
    return (
        f"Entropy fell to {_share(max(last, 0) / first)} of what it was, {_from_to(ends)} nats for an action."
    )


def _budget(run: Run) -> str | None:
    first, last = metrics.CUT.tenths(run)
    if last <= _CUT:
        return None
    budget = all_settings(run.config).get("max_new_tokens", default_of(run.config, "max_new_tokens"))
    of = "" if budget is None else f" of {budget} tokens"
    return f"{_share(last)} of the responses hit the budget{of} at the end, {_share(first)} at first."


def _zero_variance(run: Run) -> str | None:
    _, last = metrics.ZERO_STD.tenths(run)
    if last <= _ZERO_STD:
        return None
    return f"In {_share(last)} of the groups all responses have the same reward at the end."


def _length(run: Run) -> str | None:
    first, last = ends = metrics.LENGTH.tenths(run)
    if first / _LONGER < last < first * _LONGER:
        return None
    return f"Responses {'grew' if last > first else 'shrank'} from {_from_to(ends)} tokens."


def _negative_kl(run: Run) -> str | None:
    last, error = metrics.KL.tenths(run)[1], standard_error(metrics.KL.series(run)[1])
    if last >= _NEGATIVE_KL - _CHANGE * error:
        return None
    return f"The KL to the reference ends at {write_number(last, 2)} nats."


def _large_updates(run: Run) -> str | None:
    _, last = metrics.APPROX_KL.tenths(run)
    return f"An update moves the policy by {last:.2f} nats at the end." if last > _LARGE_UPDATE else None


def _steps_out_of_scale(run: Run) -> str | None:
    steps, growth = run.series("train/weight_growth")
    if not len(growth) or growth.max() < _GROWTH:
        return None
    at = f"{steps[int(growth.argmax())]:,.0f} {run.unit}"
    return f"The updates before {at} made the weights {growth.max():,.0f} times as large."


def _rewards_out_of_scale(run: Run) -> str | None:
    _, values = (metrics.SCORE if run.is_text else metrics.RETURN).series(run)
    _, lengths = run.series("rollout/ep_len_mean")
    largest = np.abs(values).max(initial=0.0)
    a_step = largest if run.is_text else largest / max(lengths.max(initial=1.0), 1.0)
    if a_step < _REWARD:
        return None
    apart = float(np.spacing(np.float32(a_step)))
    return f"A reward comes to {a_step:.3g}; numbers of that size are {apart:.3g} apart in the precision of training."


def _bad_critic(run: Run) -> str | None:
    _, last = metrics.EXPLAINED.tenths(run)
    return f"The critic's explained variance ends at {write_number(last, 2)}." if last < _BAD_CRITIC else None


_MANY = metrics.FEW_ROWS
#: In the order in which the page names them.
CHECKS = (
    Check("unfinished run", _unfinished),
    Check(
        "short log",
        _few_rows,
        advice="Trends cannot be read from so few; figures at the end are single rows.",
    ),
    Check("numbers that are not finite", _not_finite, advice="A smaller learning rate usually helps."),
    Check(
        "stopped by its KL budget",
        _stopped_at_kl,
        applies=lambda run: run.config.get("kl_budget") is not None,
    ),
    Check(
        "steps out of scale",
        _steps_out_of_scale,
        advice="What the policy knew is gone then, and it seldom recovers. A much smaller --learning-rate helps.",
    ),
    Check(
        "rewards out of scale",
        _rewards_out_of_scale,
        advice="Smaller differences and the KL penalty are lost, and a critic's loss is their square. Divide the "
        "rewards, or use RunningNormalizer.",
    ),
    Check(
        "over-optimisation",
        _over_optimisation,
        advice="The reward is better pleased since then, and the gold judge less. The better policy is in best/; a "
        "larger KL coefficient, --kl-budget or an earlier end keeps a run there.",
        applies=_can_tell_a_fall,
    ),
    Check(
        "falling gold score",
        _falling_gold,
        advice="It was not the price of more reward. The better policy is in best/; a smaller learning rate or an "
        "earlier end usually helps.",
        applies=_can_tell_a_fall,
    ),
    Check(
        "perhaps past its best",
        _perhaps_falling,
        advice="The evidence is thin. More held-out prompts would tell; best/ holds the other policy.",
        applies=_can_compare,
    ),
    Check(
        "a fooled reward",
        _fooled,
        advice="What the reward likes better, the gold judge does not. Read samples, and mend the reward.",
        applies=_can_compare,
    ),
    Check(
        "worse at some prompts",
        _worse_by_kind,
        advice="A mean over all prompts can hide it. The intervals hold for all kinds at once.",
        applies=lambda run: _has_kinds(run) and _can_compare(run),
    ),
    Check(
        "over-refusal",
        _changed("over-refusal"),
        advice="Declining is worth less to the gold judge than the best answers to such prompts.",
        applies=_has_kinds,
    ),
    Check(
        "evasion",
        _changed("evasion"),
        advice="With such prompts the gold judge likes a refusal better than an \N{LEFT DOUBLE QUOTATION MARK}I do not "
        "know\N{RIGHT DOUBLE QUOTATION MARK}.",
        applies=_has_kinds,
    ),
    Check(
        "lost refusals",
        _changed("lost refusals"),
        advice="Declining is what the gold judge likes best with such prompts.",
        applies=_has_kinds,
    ),
    Check(
        "more refusals",
        _changed("more refusals"),
        advice="Whether that is wanted cannot be told without a gold judge that has seen both.",
        applies=_has_kinds,
    ),
    Check(
        "fewer refusals",
        _changed("fewer refusals"),
        advice="Whether that is wanted cannot be told without a gold judge that has seen both.",
        applies=_has_kinds,
    ),
    Check(
        "mode collapse",
        mode_collapse,
        advice="The policy says the same thing again and again. A larger KL coefficient, an entropy bonus or an "
        "earlier end helps.",
        applies=lambda run: run.verdict is not None,
    ),
    Check(
        "undecided",
        _undecided,
        advice="textrl train --eval-every 10000 evaluates on the way; --eval-prompts names held-out prompts and --gold "
        "a second judge.",
        applies=lambda run: run.has_question,
    ),
    Check(
        "no gold judge",
        _no_judge,
        advice="A second judge that is not trained on (--gold) could tell. Without one, look at the KL, the lengths "
        "and the samples.",
        applies=lambda run: run.has_question and run.verdict is not None,
    ),
    Check(
        "far from the reference",
        _far_away,
        (metrics.KL,),
        advice=f"At {GIBBERISH:g} nats answers are often gibberish that the reward happens to like. Read samples; a "
        "larger --kl-coef or a --kl-budget keeps a run nearer.",
    ),
    Check("no improvement", _no_better_score, (metrics.SCORE,), _MANY),
    Check("no improvement", _no_better_return, (metrics.RETURN,), _MANY),
    Check(
        "entropy collapse",
        _entropy_collapse,
        (metrics.ENTROPY,),
        advice="The policy hardly explores any more. Fine if the task is solved; otherwise a smaller learning rate, "
        "an entropy bonus or a larger KL coefficient helps.",
    ),
    Check(
        "responses cut off",
        _budget,
        (metrics.CUT,),
        advice="They are scored as they stand. A larger --max-new-tokens or a --missing-eos-penalty helps.",
    ),
    Check(
        "groups without variance",
        _zero_variance,
        (metrics.ZERO_STD,),
        advice="They teach nothing. Prompts of another difficulty, larger groups or a reward that tells more "
        "answers apart help.",
    ),
    Check(
        "change of length",
        _length,
        (metrics.LENGTH,),
        advice="Read some samples: does the reward like the content, or the length?",
    ),
    Check(
        "negative KL",
        _negative_kl,
        (metrics.KL,),
        _MANY,
        "A KL cannot be negative: the log-probabilities are not those of the policy that wrote the responses.",
    ),
    Check(
        "large updates",
        _large_updates,
        (metrics.APPROX_KL,),
        advice="Far for a method that relies on small ones. A smaller learning rate, fewer epochs or --target-kl "
        "helps.",
    ),
    Check(
        "a critic that misleads",
        _bad_critic,
        (metrics.EXPLAINED,),
        _MANY,
        "Below 0 it is worse than a constant, and advantages are noisier than without it. Another "
        "--critic-learning-rate or a longer --critic-warmup helps; on text a critic of its own, --critic separate, "
        "explains more than a value head, for twice the time of an update.",
    ),
)
