"""docs/gradients.md, its picture and docs/methods.md, from what benchmarks/gradients.py has measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from agents.algorithms import methods
from agents.evaluation import estimators as est

DOCS = Path(__file__).resolve().parent.parent / "docs"
METHODS_DOCUMENT, DOCUMENT, PICTURE = (
    DOCS / name for name in ("methods.md", "gradients.md", "gradients.png")
)
#: Tokens of a rollout at which lines of equal progress are drawn, and the table's last column is said.
BUDGET = 256

METHODS_PAGE = """# Methods

Written by `python benchmarks/gradients.py --methods` from the table in
[`agents/algorithms/methods/__init__.py`](../agents/algorithms/methods/__init__.py). Each is a class of `agents` and a
name for `textrl train --agent`; its file has the equations. *First step* is what theory expects of it against the
gradient of `E[score] - kl_coef * KL`: {expectations}. What was measured is in [gradients.md](gradients.md).

{families}
A method of one's own needs no entry: `--agent my_module:MyAgent`. To add one here, write a class in a file of
`agents/algorithms/methods/` and its entry in the table, then this page again.
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

Responses of up to 4 tokens, right or wrong (score 1 or 0), one prompt solved in most attempts and one in few,
`kl_coef` 0.1; {batches} rollouts, the same for all. *Cosine* is that of the mean step with the gradient of `J`,
sampling noise taken out; *bias* what is left at the best length, relative to the gradient; *z* its significance (none:
below 3). *Noise* is how many tokens it takes until the scatter of the mean step is as long as the step. *Progress* is
what counts: the expected cosine of a single step from {budget} tokens, `cosine / sqrt(1 + noise / {budget})`. *Real
scores* is the cosine where every response has a score of its own and all are equally long (`kl_coef` 0.5).

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
*Elsewhere*: a generator 32 updates behind wrote them, and the policy says the log-probabilities; uncorrected, with
truncated (`sequence_truncate`, 3) and with masked (`sequence_mask`, 1/3 to 3) importance weights. Cosines with the
gradient of `J`.

{old}

- A ratio that is one number for a response leaves its clip soon: GSPO's and LUSPO's default (3e-4) lets go of nearly
  all samples that are a few updates old, and the 0.2 of RLOO, whose ratio is of whole responses, of most after 16.
- SAPO, CISPO, DPPO and KL-Cov keep the direction with samples 16 updates old; the clip of each token loses it.

## Where it ends, and what it costs

From the reference, {updates} rollouts of 64 responses for every method, {epochs} passes over each (methods without a
ratio one), Adam at 0.05 falling to 0: `(J* - J) / (J* - J_ref)` in per cent, exact, median of {seeds} seeds, the worst
in brackets. *Cost* is the time of an update of one pass on the embedded world, relative to GRPO's beside it.

{ends}

Not more than three seeds, this one world, and one learning rate for all: the order of neighbours means nothing. With
responses of one turn; what GRPO and others do over several turns is in [turns.md](turns.md#what-is-exact).

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


def progress(found: dict[str, float], budget: int = BUDGET) -> float:
    """The expected cosine of one step from so many tokens with the exact gradient."""
    return found["cosine"] / math.sqrt(1 + found["noise"] / budget)


def plain_table(rows: dict[str, dict[str, Any]]) -> str:
    """Bias and noise of every method, the most progress first."""
    lines = []
    listed = [m for m in methods.METHODS if not m.text_only]
    measured = {m.name: rows.get(m.name, {}).get("plain") for m in listed}
    ranked = sorted(listed, key=lambda m: -progress(measured[m.name]) if measured[m.name] else 0.0)
    for method in ranked:
        found, real = measured[method.name], rows.get(method.name, {}).get("real")
        cells = [number(found, "cosine"), number(found, "bias"), number(found, "z", ".1f")]
        cells += [
            est.verdict(rows[method.name]) if found else "–",
            method.expects,
            number(found, "noise", ".0f"),
        ]
        cells += [f"{progress(found):.3f}" if found else "–", number(real, "cosine")]
        lines.append([f"`{method.name}`", *cells])
    return table("method|cosine|bias|z|verdict|theory|noise|progress|real scores", lines)


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
    """Sensitivity to samples that are old or of another table."""
    parts = ("plain", "old 4", "old 16", *est.CORRECTIONS)
    lines = []
    for method in (m for m in methods.METHODS if not m.text_only):
        row = rows.get(method.name, {})
        lines.append([f"`{method.name}`", *(number(row.get(part), "cosine") for part in parts)])
    return table("method|fresh|4 old|16 old|elsewhere|with TIS|with MIS", lines)


def ends_table(rows: dict[str, dict[str, Any]]) -> str:
    """Distance from the optimum and cost of every method."""
    betas = sorted({beta for row in rows.values() for beta in row.get("gaps", {})}, key=float)
    lines = []
    for method in (m for m in methods.METHODS if rows.get(m.name, {}).keys() & {"gaps", "cost"}):
        row = rows[method.name]
        gaps = [row.get("gaps", {}).get(beta, []) for beta in betas]
        cells = [f"{100 * np.median(g):.2f} ({100 * max(g):.2f})" if g else "–" for g in gaps]
        lines.append([f"`{method.name}`", *cells, f"{row['cost']:.2f}" if "cost" in row else "–"])
    if not lines:
        return "*Not measured yet: `python benchmarks/gradients.py` goes on with it.*"
    return table("|".join(["method", *(f"kl_coef {beta}" for beta in betas), "cost"]), lines)


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
    from benchmarks.gradients import EPOCHS, SEEDS, UPDATES

    text = PAGE.format(
        batches=max(row["batches"] for row in rows.values()),
        budget=BUDGET,
        updates=UPDATES,
        epochs=EPOCHS,
        seeds=SEEDS,
        plain=plain_table(rows),
        own=own_table(rows),
        old=old_table(rows),
        ends=ends_table(rows),
        **anatomy_tables(anatomy),
    )
    DOCUMENT.write_text(text, encoding="utf-8")
    draw_picture(rows)


# -- the picture --------------------------------------------------------------------------------------------


def groups_of_dots(rows: dict[str, dict[str, Any]]) -> list[tuple[float, float, list[str]]]:
    """Noise, angle in degrees and the names of the methods at that place, of which there may be many."""
    places: list[tuple[float, float, list[str]]] = []
    for method in methods.METHODS:
        found = rows.get(method.name, {}).get("plain", {})
        if "cosine" not in found:
            continue
        noise, angle = found["noise"], math.degrees(math.acos(min(found["cosine"], 1.0)))
        for x, y, names in places:
            if abs(math.log(noise / x)) < 0.03 and abs(angle - y) < 0.6:
                names.append(method.name)
                break
        else:
            places.append((noise, angle, [method.name]))
    return places


def draw_picture(rows: dict[str, dict[str, Any]]) -> None:
    """One dot for each method: how noisy its step is and how far its mean points away from the gradient."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = groups_of_dots(rows)
    families = {method.name: method.family for method in methods.METHODS}
    colours = dict(
        zip(methods.FAMILIES, ("#1f2937", "#2563eb", "#059669", "#d97706", "#9333ea", "#dc2626"), strict=True)
    )
    figure, axes = plt.subplots(figsize=(7.2, 4.8), dpi=130, layout="constrained")
    low, high = (f(x for x, _, _ in places) for f in (min, max))
    top = max(y for _, y, _ in places)
    grid = np.geomspace(low / 1.5, high * 2.2, 200)
    for level in (0.5, 0.6, 0.7, 0.8, 0.9):
        cosine = level * np.sqrt(1 + grid / BUDGET)
        inside = cosine <= 1
        line = np.degrees(np.arccos(cosine[inside]))
        axes.plot(grid[inside], line, color="#d1d5db", lw=0.8, zorder=0)
        if len(line) and line[0] < top + 4:
            axes.annotate(
                f"{level:g}", (grid[0], line[0]), color="#9ca3af", fontsize=7, va="center", ha="right"
            )
    best = sorted(places)
    frontier = [p for i, p in enumerate(best) if all(p[1] < q[1] - 1e-9 for q in best[:i])]
    axes.step(
        *zip(*((x, y) for x, y, _ in frontier), strict=True),
        where="post",
        color="#111827",
        lw=1,
        ls=":",
        zorder=1,
    )
    used: list[tuple[float, float]] = []
    for x, y, names in sorted(places, key=lambda p: p[1]):
        kinds = [colours[families[name]] for name in names]
        axes.scatter([x], [y], s=34, color=kinds[0], edgecolor="white", lw=0.6, zorder=3)
        at = y
        while any(abs(math.log(x / u)) < 0.9 and abs(at - v) < top / 26 for u, v in used):
            at += top / 26
        used.append((x, at))
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        axes.annotate(
            shown,
            (x, y),
            (x * 1.05, at),
            fontsize=7,
            color=kinds[0],
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#9ca3af", "lw": 0.5} if at != y else None,
        )
    axes.set(
        xscale="log", xlabel="noise: tokens until the scatter is as long as the step", ylim=(-1.5, top + 4)
    )
    axes.set_xlim(low / 1.5, high * 2.2)
    shown_ticks = [x for x in (10, 20, 30, 50, 75, 100, 150, 200, 300, 500) if low / 1.5 < x < high * 2.2]
    axes.set_xticks(shown_ticks, [str(x) for x in shown_ticks])
    axes.set_xticks([], minor=True)
    axes.set_ylabel("bias: degrees between the mean step and the gradient")
    axes.set_title(
        f"Grey: equal progress of a step from {BUDGET} tokens. Dotted: nothing is better in both",
        fontsize=8,
        loc="left",
    )
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=colour, label=name)
        for name, colour in colours.items()
        if any(families[n] == name for _, _, names in places for n in names)
    ]
    axes.legend(handles=handles, fontsize=7, frameon=False, loc="upper right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(PICTURE)
    plt.close(figure)
