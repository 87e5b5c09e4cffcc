"""docs/gradients.md, its picture and docs/methods.md, from what benchmarks/gradients.py has measured."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from agents.algorithms import methods
from agents.evaluation import estimators as est

DOCS = Path(__file__).resolve().parent.parent / "docs"
METHODS_DOCUMENT, DOCUMENT, PICTURE = (
    DOCS / name for name in ("methods.md", "gradients.md", "gradients.png")
)
#: A larger step than that of the table, for the first lines.
LARGE_STEP = 4096

METHODS_PAGE = """# Methods

Written by `python benchmarks/gradients.py --methods` from the table in
[`agents/algorithms/methods/__init__.py`](../agents/algorithms/methods/__init__.py). Each is a class of `agents` and a
name for `textrl train --agent`; its file has the equations. *First step* is what theory expects of it against the
gradient of `E[score] - kl_coef * KL`: {expectations}. What was measured is in [gradients.md](gradients.md).

{families}
Left out until somebody asks for them: self-play, and reward models that write their judgement (a language model that
compares two answers is there, as a judge of `textrl preferences`).

A method of one's own needs no entry: `--agent my_module:MyAgent`. To add one here, write a class in a file of
`agents/algorithms/methods/` (what it changes of a base class's settings needs no constructor, see
[your own](your_own.md#a-method)) and its entry in the table; that alone makes it a name for `--agent` and a class of
`agents`. `python benchmarks/gradients.py --only NAME` measures it and writes it into this page and into
[gradients.md](gradients.md), a minute or two. `tests/test_methods.py` then names what is still missing: a test that
holds it to its paper's formula and a planted bug in `benchmarks/mutations.py`.
"""


def methods_page() -> str:
    """docs/methods.md, from the table of methods."""
    families = ""
    for family, what in methods.FAMILIES.items():
        rows = [m for m in methods.METHODS if m.family == family]
        if rows:
            families += f"## {family.capitalize()}: {what}\n\n"
            families += (
                "| `--agent` | class | paper | what it changes | first step |\n|---|---|---|---|---|\n"
            )
            families += "".join(map(_method_line, rows)) + "\n"
    expectations = ", ".join(f"*{name}* has {what}" for name, what in methods.EXPECTATIONS.items())
    return METHODS_PAGE.format(families=families, expectations=expectations)


def _method_line(method: methods.Method) -> str:
    paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
    expects = method.expects + (f"; that of {method.climbs}" if method.climbs else "")
    return f"| `{method.name}` | `{method.class_name}` | {paper} | {method.changes} | {expects} |\n"


PAGE = """# Which gradients are the gradient

Written by `python benchmarks/gradients.py`. The objective is `J = E[score] - kl_coef * KL(pi || pi_ref)`, the KL that
of whole responses. The policy is a table over a language of three tokens, so the gradient of `J` is known exactly; the
estimators are the agents' own first gradient step after a rollout of 64 responses, 8 to a prompt, through all of their
own code. `textrl gradients --agent my_module:MyAgent` measures one of your own and prints it beside these.

## Is it biased, and does it matter?

![bias against noise, one dot for each method](gradients.png)

{short}

The world of the table: responses of up to 4 tokens, right or wrong (score 1 or 0), one prompt solved in most attempts
and one in few, `kl_coef` 0.1; {batches} rollouts, the same for all. Its columns:

- *cosine* of the mean step with the gradient of `J`, sampling noise taken out; *bias*: what is left at the best length,
  relative to the gradient; *z*: its significance (none: below 3)
- *noise*: how many tokens it takes until the scatter of the mean step is as long as the step
- *progress*: noise and bias together, the expected cosine of a single step from {budget} tokens,
  `cosine / sqrt(1 + noise / {budget})`
- *matters from*: with this many tokens in a step and more, RLOO makes more progress; with fewer, less noise makes up
  for the bias (always: RLOO is ahead at any number; –: no significant bias)
- *real scores*: the cosine where every response has a score of its own and all are equally long (`kl_coef` 0.5)
- *two turns*: that of conversations: a turn of up to 2 tokens, an answer drawn by a table, a second turn; the first
  earns 0.5 or nothing, the second 1 or nothing
- *verdict*, of the worst of the three worlds: *right direction* (no significant bias, or a cosine above 0.999),
  *nearly* (above 0.99) or *biased*; *theory*: what was [expected](methods.md)
- *cost*: processor time of an update of one pass over 32 answers on the embedded world, relative to GRPO's beside it,
  the two in turn

{plain}

- PPO, VC-PPO and VAPO have a critic that lags behind: the exact values of the reference.
- Methods that differ in their ratios and clips alone take the same first step, and are one dot.
- The division by a group's standard deviation weighs prompts by how hard they are, and a mean over each response
  favours short ones: both are a bias against `J`.

## What it climbs instead

Where scores are right and wrong and there is no KL, a method whose advantages depend on the scores of a group alone
climbs `sum over prompts of F(rate)`, `rate` being the share of right answers. This is `F'`, exactly, at 8 answers to a
prompt, and the cosine of the mean step with that objective's own gradient:

{own}

## Samples that are old, and samples from elsewhere

The same world. *Old*: the policy wrote the samples 4 or 16 updates ago, each of which moves its logits by 0.5 times the
exact gradient, and learns from them with their old log-probabilities, as in the later passes over a rollout.
Cosines with the gradient of `J`.

{old}

- A ratio that is one number for a response leaves its clip soon: GSPO's and LUSPO's default (3e-4) lets go of nearly
  all samples that are a few updates old, and the 0.2 of RLOO, whose ratio is of whole responses, of most after 16.
- SAPO, CISPO, DPPO and KL-Cov keep the direction with samples 16 updates old; the clip of each token loses it.

*Elsewhere*: a generator that is not the policy wrote the samples, 32 updates behind, at temperature 0.8 or rounded to
bfloat16, and the policy says the log-probabilities; uncorrected, with truncated (`sequence_truncate`, 3) and with
masked (`sequence_mask`, 1/3 to 3) importance weights.

{elsewhere}

- DPPO, VESPO and ScaleRL put the generator into their own ratio and take no other weight, so their last two columns are
  equal.

## Where it ends

From the reference, {updates} rollouts of 64 responses for every method, {epochs} passes over each (methods without a
ratio one), Adam at 0.05 falling to 0: `(J* - J) / (J* - J_ref)` in per cent, exact, median of {seeds} seeds, the worst
in brackets; responses of one turn, and conversations of two.

{ends}

- GDPO and process supervision divide scores and leave the KL at its size, so scores weigh more than in `J`: little is
  lost where `kl_coef` is small, more than half of it at 0.3 with responses of one turn.
- PPO, VC-PPO and VAPO, with a critic, are among the nearest everywhere; ScaleRL is nearest where `kl_coef` is small.
  REINFORCE and GPG, which take a single pass, are the furthest of those whose step has the right direction.

One world of each kind and one learning rate for all: the order of neighbours means little. A method that climbs another
objective (MaxRL, pass@k) is measured by `J` all the same. A tiny transformer in a game of two turns is in
[turns.md](turns.md#what-is-exact).

## On text

The same methods in the embedded world (a transformer of 228,288 weights, a learned reward, `kl_coef` 0.05): 30,000
tokens from its SFT model at the rate of its preset, then 8 answers to each held-out prompt. *J on text* is their score
less the KL charged, plus or minus its standard error over seeds, *gold* what the hidden rubric gives; beside them
*progress* and the gap at `kl_coef` 0.1 from above (`python benchmarks/on_text.py order`).

{order}

PPO, first in the exact worlds, is first here in each seed. Between the others there is less than 0.1, of which a seed
makes up to 0.05, so neither *progress* nor the gap can order them. REINFORCE, which the exact worlds rank low because
its steps of 256 tokens are noisy, does as well as the rest where a step has 500 and 60 of them are made; RAFT, which
imitates and does not weigh, is last in gold by a tenth.

## On a real model

SmolLM2-135M learns two-digit sums with a verifiable reward (LoRA, everything as in
[examples/two_digit_sums.py](../examples/two_digit_sums.py)): about 4,400 tokens, seven rollouts of 64 answers, three
seeds of the methods that ended nearest to the optimum (SAPO, which did as GRPO does, left out). *Right* is of 150
held-out sums, 10.7 % before; *while learning* is the mean of the rollouts after the first (`python
benchmarks/on_text.py real --model build/smollm2`, six minutes of one core a run).

{real}

The exact worlds name the winner: PPO makes the most progress in them, ends nearest to the optimum, and is first on
the real model in the mean and with every seed but one. They do not order the rest, and neither do three seeds: what
differs between the other four is less than what a seed does to each of them. In the third seed the first rollout of
the four held one right answer in 64: GRPO's step from it went seven nats far and it found no right answer again, the
other three went less far and came back. PPO asks 64 different sums where a group method asks 8, so it hardly draws
so poor a rollout: part of its lead is that.

# What the bias comes from

*Relative bias* is here `|E g - grad J| / |grad J|`, the length included.

## Estimators

`vocab_size=3, horizon=3, num_prompts=2, eos=False, kl_coef=0.5`, 400 rollouts of 64 episodes each; k1 in the reward
unless the name says otherwise.

{estimators}

- A baseline that knows nothing of the own episode leaves the gradient alone. GRPO's mean includes it, which
  shortens the gradient by `1/G`; the division by the group's standard deviation weighs prompts differently.
- GAE is exact with an exact critic at any lambda, and with a wrong critic only at lambda = 1.
- Normalising advantages changes the length of the gradient and, because the standard deviation is of the same
  batch, hardly its direction.
- **k2 as a loss is not unbiased here**: a loss on each token's KL does not know that a token also decides
  which prefixes, and which KL, come later. In the reward, k1 does. For one token it is exact, see below.

## Means over steps

`vocab_size=3, horizon=4, num_prompts=2, eos=True, kl_coef=0.5`, RLOO's advantages; "token" and "sequence" multiplied by
the best single number.

{averages}

Only a constant divides every episode alike. The token mean divides by the batch's own length, which fades as
batches grow; the sequence mean favours short responses, which does not (Liu et al. 2025, Dr. GRPO).

## Where the KL is charged

The KL alone, exact expectations, no sampling. *One instance* is a softmax over five arms, logits of the
reference and of the policy drawn from N(0, 1) (`ref_seed=35`, policy seed 36); *median*
is over other draws of both; *length* is relative to the true gradient; *three tokens* is the tree above.

{placements}

The published figures for such a policy are 1.000, 1.000, 0.902, 0.040 and zero for the last
(arXiv 2510.01555, 2512.21852); their decimals depend on the draw, and this instance was chosen among some
thousand to resemble them. k2 in the reward is there for completeness.

## Responses that another distribution wrote

The same tree; REINFORCE with the mean of the others, its responses written by a table that is not the policy's:
rounded to bfloat16, at another temperature, or as many updates behind (each moves the logits by 0.5 times the
exact gradient). The corrections are `importance_sampling_mode` with its bounds; "mask" leaves out what is beyond them.

{corrections}

Only the ratio of whole responses is unbiased, and only without a cap. A cap of 3 does not bind where the two
distributions are near each other, so that nothing is lost; far apart, it keeps the variance down at the price of a
bias. A token's own ratio leaves out how likely the response was before and after it, and may do worse than nothing.
The ratio of a long response varies more than that of three tokens: its range is in the log
(`sampling/importance_sampling_ratio/*`).

## GAE with exact values

Largest difference between the mean estimate after any prefix and token, and the exact advantage (the KL
included): {gae}.
"""


def table(heads: str, rows: list[list[str]]) -> str:
    """A Markdown table."""
    names = heads.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(found: dict[str, Any] | None, name: str, form: str = ".3f") -> str:
    """A number of a row, a dash where it was not measured, "refused" where the method refuses."""
    if not found:
        return "–"
    return "refused" if "refused" in found else format(found[name], form)


def matters_from(found: dict[str, float] | None, rows: dict[str, dict[str, Any]]) -> str:
    """From how many tokens in a step on a bias matters, in words."""
    tokens = est.matters_from(found, rows["rloo"]["plain"]) if found else None
    if tokens is None:
        return "–"
    return f"{tokens:,.0f}" if tokens else "always"


def plain_table(rows: dict[str, dict[str, Any]]) -> str:
    """Bias and noise of every method, the most progress first."""
    lines = []
    listed = [m for m in methods.METHODS if not m.text_only]
    measured = {m.name: rows.get(m.name, {}).get("plain") for m in listed}
    ranked = sorted(listed, key=lambda m: -est.progress(measured[m.name]) if measured[m.name] else 0.0)
    for method in ranked:
        found, real = measured[method.name], rows.get(method.name, {}).get("real")
        cells = [number(found, "cosine"), number(found, "bias"), number(found, "z", ".1f")]
        row = rows.get(method.name, {})
        cells += [est.verdict(row) if found else "–", method.expects, number(found, "noise", ".0f")]
        cells += [f"{est.progress(found):.3f}" if found else "–", matters_from(found, rows)]
        cells += [number(real, "cosine")]
        cells += [number(row.get("turns"), "cosine"), f"{row['cost']:.2f}" if "cost" in row else "–"]
        lines.append([f"`{method.name}`", *cells])
    return table(
        "method|cosine|bias|z|verdict|theory|noise|progress|matters from|real scores|two turns|cost", lines
    )


SHORT = """**In short.** {verdicts}. Whether a bias matters is a question of size: a step is bias and noise, and more
tokens take away the noise alone. GRPO's step is {degrees} degrees off and has {share} of the noise of RLOO's, which has
no bias: from {budget} tokens they make about the same *progress* ({step_grpo} and {step_rloo}), from {large:,}
RLOO makes more ({large_grpo} and {large_rloo}). For a whole run, [where it ends](#where-it-ends) says it: over the
{methods} methods, rank correlations with the final distance from the optimum at `kl_coef` {betas} are {matter_bias} of
the bias, {matter_noise} of the noise and {matter_progress} of *progress*, the two together (-1: the best step ends
nearest)."""


def in_short(rows: dict[str, dict[str, Any]], betas: str) -> str:
    """The answer to the page's question, in numbers."""
    found = {name: est.verdict(row) for name, row in rows.items() if "cosine" in row.get("plain", {})}
    words = {"right direction": "These have the right direction", "nearly": "these nearly so"}
    parts = []
    for verdict, said in words.items():
        parts.append(f"{said}: " + ", ".join(f"`{name}`" for name, each in found.items() if each == verdict))
    biased = sum(each == "biased" for each in found.values())
    grpo, rloo = rows["grpo"]["plain"], rows["rloo"]["plain"]
    numbers = {
        f"{prefix}_{name}": f"{est.progress(plain, tokens):.3f}"
        for name, plain in (("grpo", grpo), ("rloo", rloo))
        for prefix, tokens in (("step", est.STEP_TOKENS), ("large", LARGE_STEP))
    }
    text = SHORT.format(
        verdicts="; ".join([*parts, f"the other {biased} are biased"]),
        degrees=f"{math.degrees(math.acos(grpo['cosine'])):.0f}",
        share=f"{100 * grpo['noise'] / rloo['noise']:.0f} %",
        budget=est.STEP_TOKENS,
        large=LARGE_STEP,
        methods=len(rows),
        betas=betas,
        **numbers,
        **{f"matter_{what}": matters(rows, what) for what in ("bias", "noise", "progress")},
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def matters(rows: dict[str, dict[str, Any]], what: str) -> str:
    """Rank correlations over all methods of something with where they end, for each coefficient, in words."""
    named = {
        "bias": lambda plain: math.acos(min(plain["cosine"], 1.0)),
        "noise": lambda plain: plain["noise"],
        "progress": lambda plain: est.progress(plain),
    }
    complete = [row for row in rows.values() if "cosine" in row.get("plain", {}) and row.get("gaps")]
    seeds = common_seeds(rows)
    if len(complete) < 3 or not seeds:
        return "–"
    given = [named[what](row["plain"]) for row in complete]
    found = []
    for beta in sorted(complete[0]["gaps"], key=float):
        found.append(
            rank_correlation(given, [float(np.median(row["gaps"][beta][:seeds])) for row in complete])
        )
    return ", ".join(f"{x:+.2f}" for x in found)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; what is equal shares the mean of its ranks."""
    ranks = []
    for values in (a, b):
        array = np.round(np.asarray(values), 9)
        ranks.append([(array < x).sum() + ((array == x).sum() - 1) / 2 for x in array])
    return float(np.corrcoef(ranks)[0, 1])


def own_table(rows: dict[str, dict[str, Any]]) -> str:
    """What methods climb where scores are right and wrong."""
    rates = (0.01, 0.1, 0.5, 0.9, 0.99)
    names = {name: f"`{name}`" for name in est.OWN} | {"grpo": "`grpo`, without its mean over each response"}
    climbs = {m.name: m.climbs for m in methods.METHODS}
    lines = []
    for name, label in names.items():
        own = rows.get(name, {}).get("own") if name != "grpo" else None
        weights = [f"{est.own_weight(name, rate):.2f}" for rate in rates]
        lines.append([label, *weights, number(own, "cosine"), climbs[name] or "the share of right answers"])
    lines[-1][-1] = "no closed form; tends to 2 arcsin(sqrt(rate)) for large groups"
    return table("method|" + "|".join(f"rate {rate:g}" for rate in rates) + "|cosine|F", lines)


def old_table(rows: dict[str, dict[str, Any]]) -> str:
    """Sensitivity to samples that are old."""
    return _cosines(rows, "method|fresh|4 old|16 old", ("plain", "old 4", "old 16"))


def elsewhere_table(rows: dict[str, dict[str, Any]]) -> str:
    """Sensitivity to samples of another table, with and without importance weights."""
    heads = [
        f"{generator}{', ' + c if c != 'none' else ''}"
        for generator in est.ELSEWHERE
        for c in est.CORRECTIONS
    ]
    parts = tuple(prefix + c for prefix in est.ELSEWHERE.values() for c in est.CORRECTIONS)
    return _cosines(rows, "|".join(["method", *heads]), parts)


def _cosines(rows: dict[str, dict[str, Any]], heads: str, parts: tuple[str, ...]) -> str:
    lines = []
    for method in (m for m in methods.METHODS if not m.text_only):
        row = rows.get(method.name, {})
        lines.append([f"`{method.name}`", *(number(row.get(part), "cosine") for part in parts)])
    return table(heads, lines)


def common_seeds(rows: dict[str, dict[str, Any]]) -> int:
    """How many seeds of the distance from the optimum every method has that has any, everywhere."""
    from benchmarks.gradients import ENDS

    begun = [row for row in rows.values() if row.keys() & ENDS.keys()]
    return min(
        (len(seeds) for row in begun for where in ENDS for seeds in (row.get(where) or {"": []}).values()),
        default=0,
    )


def ends_table(rows: dict[str, dict[str, Any]]) -> str:
    """Distance from the optimum of every method, in both worlds, over the seeds that all have."""
    from benchmarks.gradients import BETAS, ENDS

    betas, seeds = [f"{beta:g}" for beta in BETAS], common_seeds(rows)
    lines = []
    for method in (m for m in methods.METHODS if rows.get(m.name, {}).keys() & ENDS.keys()):
        gaps = [rows[method.name].get(where, {}).get(beta, []) for where in ENDS for beta in betas]
        cells = [f"{100 * np.median(g[:seeds]):.2f} ({100 * max(g[:seeds]):.2f})" if g else "–" for g in gaps]
        lines.append([f"`{method.name}`", *cells])
    if not lines or not seeds:
        return "*Not measured yet: `python benchmarks/gradients.py` goes on with it.*"
    heads = [f"{turns}kl_coef {beta}" for turns in ("", "two turns, ") for beta in betas]
    return table("|".join(["method", *heads]), lines)


def anatomy_tables(found: dict[str, Any]) -> dict[str, str]:
    """The tables of the second half."""

    def judged(name: str, cosine: float, bias: float, z: float) -> list[str]:
        words = "unbiased" if z < 3 else "right direction, another length" if cosine > 0.999 else "biased"
        return [name, f"{cosine:.3f}", f"{bias:.3f}", f"{z:.1f}", words]

    estimators = []
    for name, (expected, *numbers) in found["estimators"].items():
        label, *cells = judged(name, *numbers)
        estimators.append([label, expected, *cells])
    corrections = [
        [generator, *judged(mode, *numbers)]
        for generator, modes in found["corrections"].items()
        for mode, numbers in modes.items()
    ]
    places = [
        [name, *("zero gradient" if x is None else f"{x:.3f}" for x in numbers)]
        for name, numbers in found["placements"].items()
    ]
    return {
        "estimators": table("estimator|expected|cosine|relative bias|z|verdict", estimators),
        "averages": table(
            "mean over steps|cosine|relative bias|z|verdict",
            [judged(name, *numbers) for name, numbers in found["averages"].items()],
        ),
        "corrections": table("generator|correction|cosine|relative bias|z|verdict", corrections),
        "placements": table(
            "estimator|cosine, one instance|median of 30|length|cosine, three tokens", places
        ),
        "gae": ", ".join(f"{error:.1e} at lambda = {x}" for x, error in found["gae"].items()),
    }


def write_pages(anatomy: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    """Write docs/gradients.md and its picture from what has been measured."""
    from benchmarks import on_text
    from benchmarks.gradients import BETAS, EPOCHS, UPDATES
    from benchmarks.gradients_picture import draw_picture

    text = PAGE.format(
        batches=max(row["batches"] for row in rows.values()),
        budget=est.STEP_TOKENS,
        updates=UPDATES,
        epochs=EPOCHS,
        seeds=common_seeds(rows),
        short=in_short(rows, ", ".join(f"{beta:g}" for beta in BETAS)),
        plain=plain_table(rows),
        own=own_table(rows),
        old=old_table(rows),
        elsewhere=elsewhere_table(rows),
        order=on_text.order_table(on_text.stored(), rows),
        real=on_text.real_table(on_text.stored(), rows),
        ends=ends_table(rows),
        **anatomy_tables(anatomy),
    )
    DOCUMENT.write_text(text, encoding="utf-8")
    draw_picture(rows, PICTURE, est.STEP_TOKENS)
