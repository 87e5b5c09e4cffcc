"""How the cost of a step grows with episodes, response length and vocabulary; draws docs/speed_scaling.png.

    python benchmarks/speed/scaling.py [--repeats 3]

One step of GRPO's work on a small random Llama (generation, reference, forward, backward), over two decades of
each size while the others stay. The slope is that of ``log seconds`` over ``log size`` in the upper decade:
1 is linear, below 1 the fixed costs still show.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import workloads

from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate

BASE = workloads.Workload("base", 16, 32, prompts=8, group_size=8, hidden_size=64, layers=2)
SIZES = {
    "episodes": [16, 50, 160, 500, 1600],
    "response length": [8, 25, 80, 250, 800],
    "vocabulary": [1_000, 3_200, 10_000, 32_000, 100_000],
}
PICTURE = Path(__file__).resolve().parents[2] / "docs" / "speed_scaling.png"


def workload(axis: str, size: int) -> workloads.Workload:
    """The base workload with one size changed; response length and vocabulary with fewer episodes."""
    if axis == "episodes":
        return dataclasses.replace(BASE, prompts=size // 8)
    if axis == "response length":
        return dataclasses.replace(BASE, prompts=4, max_new_tokens=size)
    return dataclasses.replace(BASE, prompts=4, vocab_size=size)


def seconds(work: workloads.Workload, repeats: int) -> float:
    """Median seconds of generation, reference and update."""
    tokenizer = workloads.tokenizer(work.vocab_size)
    policy = CausalLM(workloads.make_model(work), tokenizer, autocast=False)
    reference = policy.clone()
    prompts = [np.array(tokenizer(t)["input_ids"]) for t in workloads.prompts(work)]
    prompts = [prompt for prompt in prompts for _ in range(work.group_size)]
    generator = torch.Generator().manual_seed(0)
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        sequences = generate(policy, prompts, work.max_new_tokens, generator)
        reference.log_probs(sequences)
        # Rows at a time, as micro_batch_size does it: activations stay a fixed size.
        for first in range(0, len(prompts), 128):
            policy.evaluate(sequences[first : first + 128])[0].sum().backward()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:]))


def measure(repeats: int) -> dict[str, dict]:
    """Seconds over every axis, and the slope of the upper decade."""
    result = {}
    for axis, sizes in SIZES.items():
        times = [seconds(workload(axis, size), repeats) for size in sizes]
        slope = np.polyfit(np.log(sizes[-3:]), np.log(times[-3:]), 1)[0]
        result[axis] = {"sizes": sizes, "seconds": times, "slope": float(slope)}
        print(axis, [round(t, 3) for t in times], f"slope {slope:.2f}", flush=True)
    return result


def draw(result: dict[str, dict], path: Path = PICTURE) -> None:
    """One log-log panel for each axis, with a straight line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(result), figsize=(11, 3.4), layout="constrained")
    for panel, (axis, row) in zip(panels, result.items(), strict=True):
        sizes, times = np.array(row["sizes"]), np.array(row["seconds"])
        panel.loglog(sizes, times, "o-", label=f"measured, slope {row['slope']:.2f}")
        panel.loglog(sizes, times[-1] * sizes / sizes[-1], "--", color="grey", label="linear")
        panel.set_xlabel(axis)
        panel.legend(frameon=False)
    panels[0].set_ylabel("seconds a step")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    result = measure(parser.parse_args().repeats)
    draw(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
