"""Does it fit, and how long does it take? A step of reinforcement learning from human feedback, by arithmetic.

    python benchmarks/capacity.py --params 7e9 --reward-params 7e9 --lora-rank 16 --gpus 1 8 64 --device H100

Prints a Markdown table with a column for each number of GPUs; the formulas are in ``benchmarks/capacity_step.py``,
and ``benchmarks/capacity_check.py`` holds them against measured runs. Left out: models that are not dense Llamas.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, the root is not on the path

from benchmarks import llama_costs as costs
from benchmarks.capacity_step import DEVICES, Step


def table(steps: list[Step]) -> str:
    """Markdown: a row for each quantity, a column for each step."""
    rows: list[tuple[str, list[str]]] = []
    fits = [step.fits() for step in steps]

    def add(name: str, values: list[float], form: str = "{:.1f}", always: bool = True) -> None:
        if any(values):  # what does not fit takes no time either
            cells = [form.format(x) if always or f else "" for x, f in zip(values, fits, strict=True)]
            rows.append((name, cells))

    resident = [step.resident_bytes() for step in steps]
    for name in resident[0]:
        add(f"{name}, GB", [each[name] / 1e9 for each in resident])
    add("whole weights to decode with, GB", [step.gathered_bytes() / 1e9 for step in steps])
    add("rows decoded at once", [step.decode_rows() for step in steps], "{:.0f}")
    add("their cache, GB", [step.decode_rows() * step.row_bytes() / 1e9 for step in steps])
    add("micro-batch in the update, GB", [step.update_bytes() / 1e9 for step in steps])
    add("**peak, GB**", [step.peak_bytes() / 1e9 for step in steps])
    verdict = ["yes" if each else "**no**" for each in fits]
    rows.append((f"fits in {steps[0].device.memory / 1e9:.0f} GB", verdict))
    add("largest policy that fits, billions", [step.largest() / 1e9 for step in steps])
    seconds = [step.seconds() for step in steps]
    for name in seconds[0]:
        add(f"{name}, s", [each[name] for each in seconds], "{:.2f}", always=False)
    add("**step, s**", [sum(each.values()) for each in seconds], "{:.1f}", always=False)
    written = [step.episodes * step.response for step in steps]
    speeds = [n / sum(each.values()) for n, each in zip(written, seconds, strict=True)]
    add("tokens/s", speeds, "{:,.0f}", always=False)
    bounds = [max(each, key=each.get) for each in (step.token_seconds() for step in steps)]
    rows.append(("decoding is bound by", [b if f else "" for b, f in zip(bounds, fits, strict=True)]))
    add("sent by each GPU, GB", [sum(step.network_bytes().values()) / 1e9 for step in steps])
    sizes = [f"{costs.parameter_count(step.policy) / 1e9:.1f}B" for step in steps]
    several = len(set(sizes)) > 1
    head = [f"{step.gpus} GPU{'s' if step.gpus > 1 else ''}" for step in steps]
    head = ["", *(f"{size}, {gpus}" if several else gpus for size, gpus in zip(sizes, head, strict=True))]
    lines = [head, ["---", *("--:" for _ in steps)], *([name, *cells] for name, cells in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse_arguments(words: list[str] | None = None) -> tuple[list[Step], str]:
    """Steps, one for each number of GPUs, and a line that says what they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {field.name: field.default for field in dataclasses.fields(Step)}
    parser.add_argument(
        "--params", type=float, nargs="+", default=[7e9], help="of the policy; a column for each"
    )
    parser.add_argument("--reward-params", type=float, default=0, help="of the reward model; 0 is a function")
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--device", choices=DEVICES, default="H100")
    parser.add_argument("--sharding", choices=("full", "learned", "none"), default="full")
    parser.add_argument("--critic", choices=("none", "head", "separate"), default="none")
    parser.add_argument("--precision", choices=costs.PRECISIONS, default=defaults["precision"])
    for name in ("episodes", "prompt", "response", "group", "micro", "epochs", "lora_rank"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    for name in ("logits_at_once", "mfu", "mbu", "layer_seconds", "node_bandwidth", "reserve"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=defaults[name])
    for name in ("eight_bit", "four_bit", "offload", "checkpointing", "recorded"):
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    given = vars(parser.parse_args(words))
    policies = [costs.shape_for(count, given["vocab"]) for count in given.pop("params")]
    reward = given.pop("reward_params")
    reward = costs.shape_for(reward, given["vocab"]) if reward else None
    del given["vocab"]
    name, gpus = given.pop("device"), given.pop("gpus")
    steps = [
        Step(policy, reward, device=DEVICES[name], gpus=count, **given)
        for policy in policies
        for count in gpus
    ]
    sizes = ", ".join(
        f"{costs.parameter_count(policy) / 1e9:.2f}B policy ({policy.layers} layers of {policy.hidden})"
        for policy in policies
    )
    what = (
        f"{sizes}, {name}, {given['precision']}, {given['episodes']} episodes of {given['prompt']} + "
        f"{given['response']} tokens"
    )
    return steps, what


def main() -> None:
    steps, what = parse_arguments()
    print(f"{what}\n\n{table(steps)}")


if __name__ == "__main__":
    main()
