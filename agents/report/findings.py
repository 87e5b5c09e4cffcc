"""What a log warns of, in plain words, each with the figures that it follows from.

Every check is a condition on numbers of the log, with its threshold beside it; what it cannot know (whether the
task is solved, whether a length is wanted) it leaves to the reader. Noise is measured, not guessed: the standard
error of a running mean comes from how the log scatters around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from agents.evaluation.plots import smoothed
from agents.report import metrics
from agents.report.metrics import Metric, decimals, write_number
from agents.report.reading import STEPS, Group, Run, all_settings, default_of, run_label

#: Standard errors that a change must exceed, and a fall from the highest of many points: noise alone falls that far
#: in fewer than 1 % of logs of 10 to 300 rows.
_CHANGE, _FALL = 2.0, 6.0
#: Where a warning begins: shares, nats, nats, and a factor.
_COLLAPSED, _CUT, _ZERO_STD, _BAD_CRITIC = 0.1, 0.1, 0.3, -0.05
_LARGE_UPDATE, _NEGATIVE_KL, _LONGER = 0.1, -0.1, 2.0


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
    run: Run | None = None


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition on a run that has logged at least ``rows`` rows of each of ``needs``.

    ``find`` returns the figures that it is met by, in words, or None.
    """

    name: str
    find: Callable[[Run], str | None]
    needs: tuple[Metric, ...] = ()
    rows: int = 1
    advice: str = ""


def examine(run: Run) -> list[Finding]:
    """Everything that one run's log warns of."""
    found = [(check, check.find(run)) for check in applicable(run)]
    return [Finding(check.name, text, check.advice, run) for check, text in found if text is not None]


def applicable(run: Run) -> list[Check]:
    """The checks that a run has logged enough for."""
    return [check for check in CHECKS if all(len(m.series(run)[0]) >= check.rows for m in check.needs)]


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
    """Of a point at the end of :func:`agents.evaluation.plots.smoothed`, from how ``values`` scatter around it."""
    half = max(int(len(values) * 0.05), 1)
    return float(np.std(values - smoothed(values)) / np.sqrt(half + 1))


# -- checks -------------------------------------------------------------------------------------------------


def _unfinished(run: Run) -> str | None:
    if run.is_finished:
        return None
    way = f"{run.num_timesteps:,} of {run.config['total_timesteps']:,} {run.unit}"
    return f"The log ends at {way}; go on with: textrl train --resume {run.folder}"


def _few_rows(run: Run) -> str | None:
    rows = len(run.series(STEPS)[0])
    return f"The log has {rows} rows, fewer than {metrics.FEW_ROWS}." if rows < metrics.FEW_ROWS else None


def _not_finite(run: Run) -> str | None:
    for column in ("train/loss", "train/grad_norm"):
        values = np.array(run.progress.get(column, []))
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            at = f"{run.progress[STEPS][bad[0]]:,.0f} {run.unit}"
            return f"{column} is not a finite number in {len(bad)} of {len(values)} rows, first at {at}."
    return None


def _gold_fall(run: Run) -> tuple[str, str, bool] | None:
    """Gold's fall from its highest and the score's way since, in words, and whether the score rose beyond noise."""
    steps, gold = metrics.GOLD_SCORE.series(run)
    score_steps, score = metrics.SCORE.series(run)
    smooth_gold, smooth_score = smoothed(gold), np.interp(steps, score_steps, smoothed(score))
    peak = int(smooth_gold.argmax())
    if smooth_gold[peak] - smooth_gold[-1] <= max(_FALL * standard_error(gold), 1e-9):
        return None
    since = f"Since {steps[peak]:,.0f} {run.unit} the gold score has fallen"
    rose = smooth_score[-1] - smooth_score[peak] > max(_CHANGE * standard_error(score), 1e-9)
    fall = f"{since} from {_from_to((smooth_gold[peak], smooth_gold[-1]))}"
    return fall, f"from {_from_to((smooth_score[peak], smooth_score[-1]))}", bool(rose)


def _over_optimisation(run: Run) -> str | None:
    match _gold_fall(run):
        case fall, way, True:
            return f"{fall} while the score rose {way}."
    return None


def _falling_gold(run: Run) -> str | None:
    match _gold_fall(run):
        case fall, way, False:
            return f"{fall}; the score, {way}, did not rise in that time."
    return None


def _no_better_score(run: Run) -> str | None:
    return _not_risen(run, metrics.SCORE)


def _no_better_return(run: Run) -> str | None:
    return None if run.is_text else _not_risen(run, metrics.RETURN)


def _not_risen(run: Run, metric: Metric) -> str | None:
    _, values = metric.series(run)
    first, last = ends = metric.ends(run)
    if last - first > max(_CHANGE * np.sqrt(2) * standard_error(values), 1e-9):
        return None
    return f"The {metric.label.lower()} has not risen beyond its noise: from {_from_to(ends)}."


def _entropy_collapse(run: Run) -> str | None:
    first, last = ends = metrics.ENTROPY.ends(run)
    if first <= 0 or last >= _COLLAPSED * first:
        return None
    return (
        f"Entropy fell to {_share(max(last, 0) / first)} of what it was, {_from_to(ends)} nats for an action."
    )


def _budget(run: Run) -> str | None:
    first, last = metrics.CUT.ends(run)
    if last <= _CUT:
        return None
    budget = all_settings(run.config).get("max_new_tokens", default_of(run.config, "max_new_tokens"))
    of = "" if budget is None else f" of {budget} tokens"
    return f"{_share(last)} of the responses hit the budget{of} at the end, {_share(first)} at first."


def _zero_variance(run: Run) -> str | None:
    _, last = metrics.ZERO_STD.ends(run)
    if last <= _ZERO_STD:
        return None
    return f"In {_share(last)} of the groups all responses have the same reward at the end."


def _length(run: Run) -> str | None:
    first, last = ends = metrics.LENGTH.ends(run)
    if first / _LONGER < last < first * _LONGER:
        return None
    return f"Responses {'grew' if last > first else 'shrank'} from {_from_to(ends)} tokens."


def _negative_kl(run: Run) -> str | None:
    last, error = metrics.KL.ends(run)[1], standard_error(metrics.KL.series(run)[1])
    if last >= _NEGATIVE_KL - _CHANGE * error:
        return None
    return f"The KL to the reference ends at {write_number(last, 2)} nats."


def _large_updates(run: Run) -> str | None:
    _, last = metrics.APPROX_KL.ends(run)
    return f"An update moves the policy by {last:.2f} nats at the end." if last > _LARGE_UPDATE else None


def _bad_critic(run: Run) -> str | None:
    _, last = metrics.EXPLAINED.ends(run)
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
        "over-optimisation",
        _over_optimisation,
        (metrics.SCORE, metrics.GOLD_SCORE),
        _MANY,
        "The reward is pleased where the gold judge is not. A larger KL coefficient or an earlier end usually helps.",
    ),
    Check(
        "falling gold score",
        _falling_gold,
        (metrics.SCORE, metrics.GOLD_SCORE),
        _MANY,
        "Learning has become unsteady. A smaller learning rate or an earlier end usually helps.",
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
