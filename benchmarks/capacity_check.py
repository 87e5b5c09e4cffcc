"""Is the capacity model right? Its predictions beside updates that are really run, on one CPU thread.

    python benchmarks/capacity_check.py

Each run trains a random Llama for three steps, in processes of its own. Memory is the peak of a process above what
it held before the models were made (a tiny run before that loads what loads lazily), with an allocator that gives
freed blocks back. Time is processor time, so that busy neighbours count for less: the faster of the last two steps.
The predictions take three figures of this machine: operations per second of matrix products in the shapes of the
run, bytes/s of a copy, and the host's seconds for a layer. Linux only (it resets the kernel's high-water mark).
Left out: GPUs, networks, reward models.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, the root is not on the path

import torch

import agents
from benchmarks.capacity_step import Device, Step
from benchmarks.llama_costs import Shape, parameter_count
from benchmarks.random_llama import count_even, make_lm, make_prompts
from textrl_env.envs.text_rlhf import TextRLHFEnv
from textrl_env.lm.decoding import generate


class Case(NamedTuple):
    """One measured run; ``what`` says what dominates it."""

    what: str
    shape: Shape
    agent: str = "GRPO"
    critic: str = "none"
    episodes: int = 16
    prompt: int = 16
    response: int = 64
    micro: int = 4
    dtype: str = "float32"

    @property
    def group(self) -> int:
        """Episodes that share a prompt."""
        return 4 if self.agent == "GRPO" else 1


CASES = (
    Case("GRPO", Shape(1024, 256, 768, 4, 4, 4)),
    Case("GRPO, larger", Shape(1024, 512, 1536, 8, 8, 4)),
    Case("GRPO, larger still", Shape(1024, 1024, 2816, 8, 16, 4), episodes=8),
    Case("the same under autocast", Shape(1024, 1024, 2816, 8, 16, 4), episodes=8, dtype="bfloat16"),
    Case("one row", Shape(1024, 1024, 2816, 8, 16, 4), "REINFORCE", episodes=1, micro=1),
    Case("PPO, value head", Shape(1024, 512, 1536, 8, 8, 4), "PPO", "head"),
    Case("PPO, critic of its own", Shape(1024, 512, 1536, 8, 8, 4), "PPO", "separate"),
    Case("long responses", Shape(1024, 256, 768, 4, 4, 4), response=256, micro=16),
    Case("long prompts", Shape(1024, 256, 768, 4, 4, 4), prompt=256, micro=16),
    Case("large vocabulary", Shape(65536, 128, 384, 2, 4, 4), response=128, episodes=8, micro=8),
)
TINY = Case("warm-up", Shape(64, 32, 64, 2, 2, 2), response=8)


def fastest(function: Callable[[], Any], times: int = 5) -> float:
    """Processor seconds of the fastest of several calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(times):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds)


def clocked(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function; the processor seconds of each call are appended to ``seconds``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = function(*args, **kwargs)
        seconds.append(time.process_time() - started)
        return result

    return call


def copy_bandwidth() -> float:
    """Bytes per second, read and written."""
    source, target = torch.ones(2**26), torch.empty(2**26)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))


def matmul_rate(shape: Shape, rows: int, dtype: torch.dtype) -> float:
    """Operations per second of ``rows`` states times as many matrices of the MLP's shape as the model has."""
    states = torch.randn(rows, shape.hidden, dtype=dtype)
    matrices = [torch.randn(shape.intermediate, shape.hidden, dtype=dtype) for _ in range(3 * shape.layers)]
    seconds = fastest(lambda: [states @ matrix.T for matrix in matrices])
    return 2 * rows * shape.hidden * shape.intermediate * len(matrices) / seconds


def layer_seconds() -> float:
    """What the host needs for one layer of a decoding step: the slope over layers of a model too small to compute."""
    prompts = [torch.arange(4).numpy()]
    seconds = {}
    for layers in (2, 18):
        lm = make_lm(Shape(16, 16, 16, layers, 2, 2))
        seconds[layers] = fastest(lambda lm=lm: generate(lm, prompts, 16))
    return (seconds[18] - seconds[2]) / 16 / 16


def run(case: Case, steps: int = 3) -> dict[str, float]:
    """Train for some steps; processor seconds of decoding, scoring and updating in the faster of the last two."""
    lm = make_lm(case.shape, dtype=getattr(torch, case.dtype))
    env = TextRLHFEnv(
        model=lm,
        reward=count_even,
        prompts=make_prompts(1000, case.prompt, case.shape.vocab),
        max_new_tokens=case.response,
        device="cpu",
    )
    arguments: dict[str, Any] = {"group_size": case.group}
    arguments |= {"critic": case.critic, "n_epochs": 1} if case.agent == "PPO" else {}
    arguments |= {"n_episodes": case.episodes, "batch_size": None, "micro_batch_size": case.micro}
    agent = getattr(agents, case.agent)("auto", env, learning_rate=1e-5, seed=0, **arguments)
    collect, decode, update = [], [], []
    agent.collect, agent.train = clocked(agent.collect, collect), clocked(agent.train, update)
    agent.policy.generate = clocked(agent.policy.generate, decode)
    agent.learn(steps * case.episodes * case.response, log_interval=None)
    score = [whole - part for whole, part in zip(collect, decode, strict=True)]
    return {"decode": min(decode[1:]), "score": min(score[1:]), "update": min(update[1:])}


def memory_bytes(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def peak_bytes(case: Case) -> int:
    """Peak memory of one case in this process, above what it held before; what is freed counts no more."""
    torch.set_num_threads(1)
    run(TINY)
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    run(case, steps=2)
    return memory_bytes("VmHWM") - before


def step_seconds(case: Case) -> dict[str, float]:
    """Seconds of one case in this process, and the operations per second that its two shapes of products reach."""
    torch.set_num_threads(1)
    kind = getattr(torch, case.dtype)
    seconds = run(case)
    return seconds | {
        "decoding": matmul_rate(case.shape, case.episodes, kind),
        "updating": matmul_rate(case.shape, case.micro * case.response, kind),
    }


def in_a_process(function: Callable[[Case], Any], case: Case, **environment: str) -> Any:
    """Call the function in a fresh process with these environment variables."""
    os.environ.update(environment)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, (case,))
    finally:
        for name in environment:
            del os.environ[name]


def predict(case: Case, rates: tuple[float, float], bandwidth: float, layer: float) -> dict[str, float]:
    """What the capacity model says of the same case, from operations per second when decoding and when updating."""
    decoding, updating = (
        Step(
            case.shape,
            device=Device(flops, bandwidth, 1e15, 1.0),
            critic=case.critic,
            episodes=case.episodes,
            prompt=case.prompt,
            response=case.response,
            group=case.group,
            micro=case.micro,
            precision="float32" if case.dtype == "float32" else "autocast",
            mfu=1.0,
            mbu=1.0,
            layer_seconds=layer,
            host_waits=True,
            reserve=0.0,
        )
        for flops in rates
    )
    seconds = updating.seconds()
    return {
        "peak": updating.peak_bytes(),
        "decode": decoding.decode_seconds(),
        "score": seconds["reference and values"],
        "update": seconds["update"] + seconds["optimiser"],
    }


def main() -> None:
    torch.set_num_threads(1)
    bandwidth, layer = copy_bandwidth(), layer_seconds()
    print(
        f"One thread; a copy moves {bandwidth / 1e9:.1f} GB/s, the host needs {1e6 * layer:.0f} us for a layer.\n"
    )
    titles = ["run", "parameters", "GFLOP/s at its shapes"]
    for name in ("peak, MB", "decode, s", "score, s", "update, s"):
        titles += [name, "predicted / measured"]
    print("| " + " | ".join(titles) + " |\n" + "| --- " + "| --: " * (len(titles) - 1) + "|", flush=True)
    for case in CASES:
        measured = in_a_process(step_seconds, case)
        measured["peak"] = in_a_process(peak_bytes, case, MALLOC_MMAP_THRESHOLD_="131072")
        rates = measured["decoding"], measured["updating"]
        predicted = predict(case, rates, bandwidth, layer)
        cells = [case.what, f"{parameter_count(case.shape) / 1e6:.1f}M"]
        cells.append(", ".join(f"{rate / 1e9:.0f}" for rate in rates))
        cells += [f"{measured['peak'] / 1e6:.0f}", f"{predicted['peak'] / measured['peak']:.2f}"]
        for name in ("decode", "score", "update"):
            cells += [f"{measured[name]:.2f}", f"{predicted[name] / measured[name]:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
