"""Turns what was measured into ratios, each beside its target: docs/speed.md and the README's table.

Several machines stand beside each other, since a ratio of one is not that of another: processors differ in how fast
they multiply float32 and bfloat16, and in what a call of torch costs beside that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ablation

BEGIN, END = "<!-- speed: written by make benchmark -->", "<!-- /speed -->"


@dataclasses.dataclass
class Ratio:
    """One line of the table.

    Attributes:
        what: The work.
        against: Whom or what it is measured against.
        value: The ratio.
        target: What it should be.
        at_most: Whether less is better.
        detail: The two figures behind it.
        headline: Whether the README shows it.
    """

    what: str
    against: str
    value: float
    target: float
    detail: str
    at_most: bool = False
    headline: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.value <= self.target if self.at_most else self.value >= self.target

    def cells(self) -> list[str]:
        """The cells of a table row."""
        bound = f"{'at most' if self.at_most else 'at least'} {self.target:g}"
        return [
            self.what,
            self.against,
            f"{self.value:.2f}",
            bound,
            "yes" if self.met else "**no**",
            self.detail,
        ]


def _best(row: dict[str, Any], side: str) -> tuple[str, dict[str, Any]]:
    """The faster precision of a side."""
    options = {name: value for name, value in row.items() if name.startswith(side + " ")}
    name = min(options, key=lambda n: options[n]["median"])
    return name.removeprefix(side + " "), options[name]


def _times(ours: float, theirs: float, note: str = "") -> str:
    return f"{ours:.2f} s, {theirs:.2f} s{note}"


GRPO_TARGETS = {
    "uniform": 2.0,
    "ragged": 3.0,
    "real-lengths": 3.0,
    "long-prompt": 6.0,
    "few-shot": 3.0,
    "big-vocab": 2.0,
}
WORDS = {
    "uniform": "prompt 16, response 64",
    "ragged": "prompt 16, budget 128, mean length 15",
    "real-lengths": "prompt 64, budget 512, mean length 150",
    "long-prompt": "prompt 256, response 64",
    "few-shot": "32 x 2, prompts of 272 of which 256 alike, response 32",
    "big-vocab": "8 x 256 tokens, vocabulary 151,936",
}


def grpo_ratios(results: dict[str, Any]) -> list[Ratio]:
    """GRPO against TRL and against the floor of its parts."""
    lines = []
    for name, row in results.items():
        what = f"GRPO step, {WORDS[name]}"
        kind, ours = _best(row, "ours")
        if any(side.startswith("TRL") for side in row):
            other, theirs = _best(row, "TRL")
            note = f" ({kind}, {other}{', of the processor' if row.get('by') == 'processor' else ''})"
            detail = _times(ours["median"], theirs["median"], note)
            value = theirs["median"] / ours["median"]
            lines.append(
                Ratio(what, "TRL 1.16, both at their best", value, GRPO_TARGETS[name], detail, headline=True)
            )
            ours32, theirs32 = row["ours float32"], row["TRL float32"]
            if name == "uniform":
                detail = _times(ours32["median"], theirs32["median"])
                value = theirs32["median"] / ours32["median"]
                lines.append(Ratio(what, "TRL 1.16, both float32", value, 2.0, detail))
            if name == "big-vocab":
                value = ours["peak_mb"] / theirs["peak_mb"]
                detail = f"{ours['peak_mb']:.0f} MB, {theirs['peak_mb']:.0f} MB"
                lines.append(Ratio("its peak memory", "TRL 1.16", value, 0.5, detail, at_most=True))
        if name in ("uniform", "ragged"):
            for label in [label for label in ("float32", "bfloat16") if f"floor {label}" in row]:
                floor, mine = row[f"floor {label}"], row[f"ours {label}"]
                value = floor["median"] / mine["median"]
                target = 0.85 if name == "uniform" else 0.7
                detail = _times(mine["median"], floor["median"])
                against = f"decode + reference + update alone, {label}"
                lines.append(Ratio(what, against, value, target, detail))
    return lines


def ppo_ratios(results: dict[str, Any]) -> list[Ratio]:
    """PPO against TRL 0.23.1."""
    if not any(name.startswith("TRL") for name in results):
        return []
    other, theirs = _best(results, "TRL")
    lines = []
    for critic, target in (("head", 3.0), ("separate", 1.5)):
        kind, ours = _best(results, f"ours {critic}")
        what = f"PPO step, 4 epochs, critic {'of its own' if critic == 'separate' else 'a head'}"
        detail = _times(ours["median"], theirs["median"], f" ({kind}, {other})")
        value = theirs["median"] / ours["median"]
        lines.append(Ratio(what, "TRL 0.23.1, both at their best", value, target, detail, headline=True))
        ours32, theirs32 = results[f"ours {critic} float32"]["median"], results["TRL float32"]["median"]
        detail = _times(ours32, theirs32)
        lines.append(Ratio(what, "TRL 0.23.1, both float32", theirs32 / ours32, target, detail))
    return lines


def step_ratios(results: dict[str, Any]) -> list[Ratio]:
    """The step way against a bare loop."""
    mine, bare = results["step_tokens_per_second"], results["bare_tokens_per_second"]
    detail = f"{mine:,.0f} and {bare:,.0f} tokens/s"
    what = "`envs.step`, 64 slots, policy and reference"
    return [Ratio(what, "bare decode loop of one model", results["ratio"], 0.4, detail, headline=True)]


def turns_ratios(results: dict[str, Any]) -> list[Ratio]:
    """Conversations, by processor time."""
    talk = results["conversation"]
    kept, single = talk["cache kept"], talk["one response"]
    what = "four turns of 32 tokens, 64 slots, our time over theirs"
    detail = _times(kept, single, " (of the processor)")
    lines = [
        Ratio(what, "one response of 128 tokens", kept / single, 1.15, detail, at_most=True, headline=True)
    ]
    for name in sorted(n for n in results if n.startswith("TRL ")):
        row = results[name]
        what = f"GRPO step, a tool, {row['turns']} turns, {row['our_tokens']:.0f} tokens of the policy"
        detail = _times(row["ours"], row["trl"], " (of the processor)")
        against = "TRL 1.16's environment_factory"
        lines.append(Ratio(what, against, row["ratio"], 3.0, detail, headline=row["turns"] == 4))
    return lines


def classic_ratios(results: dict[str, Any]) -> list[Ratio]:
    """Without a language model."""
    pole, toys = results["cartpole"], results["toy_envs"]
    start, growth = results["cold_start"], results["memory_growth"]
    detail = (
        f"{_times(pole['ours_seconds'], pole['theirs_seconds'])}; "
        f"greedy return {pole['ours_return']:.0f}, {pole['theirs_return']:.0f}"
    )
    what = "CartPole-v1, 100,000 steps of PPO, our time over theirs"
    lines = [
        Ratio(what, "stable-baselines3", pole["ratio_seconds"], 0.4, detail, at_most=True, headline=True)
    ]
    slots = toys["num_envs"]
    for name in (n for n in toys if n.endswith("-v0")):
        what = f"million steps/s, `{name}`"
        lines.append(Ratio(what, "random actions", toys[name] / 1e6, 2.0, f"{slots:,} slots"))
    for name in (n for n in start if n.startswith("gym.make /")):
        base = name.removeprefix("gym.make / ")
        detail = _times(start["gym.make"], start[base])
        what = '`gym.make("TextRLHF-v0")`, fresh interpreter'
        lines.append(Ratio(what, f"`{base}`", start[name], 1.3, detail, at_most=True))
    what = "seconds of `import textrl_env`"
    lines.append(Ratio(what, "nothing", start["import textrl_env"], 0.3, "", at_most=True))
    for name, row in growth.items():
        what = f"kB of memory an update adds, `{name}`"
        detail = f"{row['updates']:.0f} updates, {row['resident_mb']:.0f} MB"
        lines.append(Ratio(what, "nothing", row["bytes_per_update"] / 1024, 4.0, detail, at_most=True))
    return lines


def scaling_ratios(results: dict[str, Any]) -> list[Ratio]:
    """Slopes of the cost."""
    lines = []
    for axis, row in results.items():
        detail = f"{row['seconds'][0]:.2f} s to {row['seconds'][-1]:.2f} s"
        what = f"cost over {axis}, {row['sizes'][0]:,} to {row['sizes'][-1]:,}"
        lines.append(Ratio(what, "slope in log-log", row["slope"], 1.1, detail, at_most=True))
    return lines


def markdown(head: list[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def table(lines: list[Ratio]) -> str:
    """Everything that was measured on a machine."""
    return markdown(
        ["what", "against", "ratio", "target", "met", "ours, theirs"], [line.cells() for line in lines]
    )


def ratios(results: dict[str, Any]) -> list[Ratio]:
    """All lines of what was measured."""
    lines: list[Ratio] = []
    for name, function in (
        ("grpo", grpo_ratios),
        ("ppo", ppo_ratios),
        ("step", step_ratios),
        ("turns", turns_ratios),
        ("classic", classic_ratios),
        ("scaling", scaling_ratios),
    ):
        if name in results:
            lines += function(results[name])
    return lines


def headlines(machines: dict[str, list[Ratio]]) -> dict[tuple[str, str], dict[str, Ratio]]:
    """What the README shows, by work and opponent, then by machine where it was measured."""
    found: dict[tuple[str, str], dict[str, Ratio]] = {}
    for machine, lines in machines.items():
        for line in lines:
            if line.headline:
                found.setdefault((line.what, line.against), {})[machine] = line
    return found


def over_machines(machines: dict[str, list[Ratio]]) -> str:
    """The headlines, a column for each machine."""
    rows = []
    for name, found in headlines(machines).items():
        marked = {m: f"{x.value:.2f}" if x.met else f"*{x.value:.2f}*" for m, x in found.items()}
        target = next(iter(found.values())).cells()[3]
        rows.append([*name, target, *(marked.get(machine, "–") for machine in machines)])
    return markdown(["what", "against", "target", *machines], rows)


def _range(values: list[float]) -> str:
    """ "1.4 to 2.0", or one number where all are that."""
    low, high = (f"{x:.{1 if x >= 1 else 2}f}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


PAGE = """# How fast

Written by `make benchmark`. The two sides of a line were measured in one run, each in a process of its
own, one after another; medians of the steps after the first. The model is a random Llama with hidden size 256, 4
layers and a vocabulary of 1,024, a step has 64 episodes (8 prompts times 8), unless the row names others. A ratio
against a peer is the peer's time over ours.

## Over machines

{over}

In italics what misses its target. *At their best* is bfloat16 where the processor multiplies it (AVX-512), float32
elsewhere.

{machines}

*Decode + reference + update alone* is plain transformers: a sampling loop with its dynamic cache that drops rows
as they end, one forward pass over as many real tokens in full rows, and forward, backward and Adam on the same. A
step can cost less than that, because the prompt of a group is read once and not once for each answer.

![Cost of a step over its sizes](speed_scaling.png)

## What is missed, and why

- **GRPO, uniform.** Both sides make the same products: 64 tokens for each of 64 rows, once to write them, once for the
  reference, and three times for the update. There is no padding to save, and a prompt of 16 is hardly worth sharing.
  In float32 products are nearly all of it, and a step here already costs three quarters of the floor of its parts;
  what bfloat16 saves where the processor has it is what makes the ratio 2. A real run's lengths differ: that row is
  *real-lengths*.
- **GRPO, long prompts.** The target was set on a machine where TRL took 13.3 s for this step, and 1.9 s for the uniform
  one. Ours costs a third of the floor of its own parts, because the eight answers to a prompt read it once. What is
  left is as much generation as update; a step with short prompts and as many tokens to write already takes two thirds
  of it.
- **PPO.** Four passes of forward and backward over 64 different prompts are the same products on both sides; what can
  be saved is the critic's body (a value head instead), one forward pass (the rollout's evaluation is the first
  update's), generation and precision. In float32 the products weigh most, so least is saved.
- **Several turns.** A model of four layers and width 128 has small products to make on both sides. Of ours 31 % is
  generation, 13 % the reference, 43 % the gradient, and 7 % the layout of what the game answers.
- **CartPole.** A gradient step takes 0.78 ms: 0.18 ms are matrix products and activations, 0.25 ms autograd's calls for
  them, the rest the loss, the log and the optimiser, a few microseconds for each call of torch. A backward pass by hand
  was slower than autograd's. Acting and stepping take a sixth of the time. The second machine's 0.66 is of before the
  collector stopped looking for environments with a KL at every step: in one process, in turn, it went from 0.64 to
  0.58 there.
- **Cold start.** `import transformers` loads next to nothing; the class of the model, without which there is no
  environment, takes as long again (`transformers.modeling_utils` brings in `torch.distributed.tensor`, `torch._dynamo`
  and sympy). Against that import `gym.make` adds a few per cent.

## What earns its place

`python benchmarks/speed --only ablation`: our own step with everything on, and with one thing off at a time, float32.

{ablation}

On {ablation_machine}; steps of one kind differ by a tenth from round to round.

What stays has a switch. `CausalLM.load(..., disable=["fused"])`, or `TEXTRL_DISABLE=fused,shared_prompts` in the
environment, leaves out a fast way (`fused`, `shared_prompts`, `packing`, `cache`); `TEXTRL_TUNE_PROCESS=0` leaves the
process alone. One thread for small networks changes the whole process, so only the command line sets it unasked; a
program that calls `learn()` asks with `agents.process.tune_process()`. It earns its place on a busy machine: beside
other jobs a step without it took 29 % longer (CartPole) and 20 % (the embedded world), on an idle one it makes no
difference. Telling the C library to keep freed memory is gone: in six runs in turn on an idle machine a uniform step
took 2.09, 2.08 and 1.92 s with it, 2.09, 1.93 and 2.19 s without (2.55 s before sequences became one ragged batch).

## Where the time goes

| machine | workload | ours: rollout, update | floor: decode, reference, update |
|---|---|---|---|
{parts}
"""


def _parts(machine: str, results: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in results.items():
        for label in [label for label in ("float32", "bfloat16") if f"floor {label}" in row]:
            ours, floor = row[f"ours {label}"], row[f"floor {label}"]["parts"]
            rollout = sorted(ours["rollout_seconds"])[len(ours["rollout_seconds"]) // 2]
            mine = f"{rollout:.2f} s, {ours['median'] - rollout:.2f} s"
            bare = ", ".join(f"{floor[part]:.2f} s" for part in ("decode", "reference", "update"))
            rows.append(f"| {machine} | {name}, {label} | {mine} | {bare} |")
    return rows


def write(machines: dict[str, dict[str, Any]], root: Path) -> None:
    """docs/speed.md, and the lines between the README's two marks.

    Args:
        machines: What was measured on each, by the parts' names.
        root: Of the project.
    """
    lines = {machine: ratios(results) for machine, results in machines.items()}
    print(over_machines(lines))
    of_ablation = [machine for machine, results in machines.items() if "ablation" in results]
    page = PAGE.format(
        over=over_machines(lines),
        machines="\n\n".join(f"## {machine}\n\n{table(found)}" for machine, found in lines.items()),
        ablation=ablation.table(machines[of_ablation[-1]]["ablation"])
        if of_ablation
        else "Not measured yet.",
        ablation_machine=of_ablation[-1] if of_ablation else "no machine",
        parts="\n".join(row for m, results in machines.items() for row in _parts(m, results.get("grpo", {}))),
    )
    (root / "docs" / "speed.md").write_text(page)
    readme = root / "README.md"
    text = readme.read_text()
    if BEGIN in text:
        before, rest = text.split(BEGIN)
        after = rest.split(END)[1]
        short = markdown(
            ["what", "against", f"ratio, over {len(lines)} machines"],
            [[*name, _range([x.value for x in found.values()])] for name, found in headlines(lines).items()],
        )
        readme.write_text(before + BEGIN + "\n" + short + "\n" + END + after)
