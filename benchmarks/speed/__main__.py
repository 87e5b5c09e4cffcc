"""Speed, against what the parts cost by themselves and against every peer, in one run.

    python benchmarks/speed [--repeats 6] [--only grpo ppo step turns classic scaling ablation] [--no-peers]

Every measurement is a process of its own, one after another, with torch's default threads; medians of the steps
after the first. Peers get virtual environments of their own in .peers. Writes docs/speed.md, benchmarks/speed.json
and the README's table; run it on an idle machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

import ablation  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import scaling  # noqa: E402
import workloads  # noqa: E402

SCRATCH = ROOT / "build" / "speed"
RESULTS = ROOT / "benchmarks" / "speed.json"
PRECISIONS = {"float32": (), "bfloat16": ("--bf16",)}


def run(
    python: Path | str, script: str, *arguments: Any, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """The JSON that a script prints in its last line."""
    command = [str(python), str(HERE / script), *map(str, arguments)]
    switches = [f"{name}={value}" for name, value in (environment or {}).items()]
    print("  " + " ".join([*switches, script, *map(str, arguments)]), flush=True)
    variables = os.environ | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables)
    if done.returncode:
        raise RuntimeError(f"{script} {arguments} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if "seconds" in result:
        result["median"] = statistics.median(result["seconds"])
    return result


def grpo(
    steps: int,
    with_peers: bool,
    before: dict[str, Any],
    names: Sequence[str] = tuple(workloads.WORKLOADS),
    precisions: Sequence[str] = tuple(PRECISIONS),
    by_processor: bool = False,
) -> dict[str, Any]:
    """Workloads: ours, the floor of its parts and TRL, in float32 and bfloat16."""
    results = dict(before)
    for name in names:
        work = workloads.WORKLOADS[name]
        folder = workloads.model_folder(work, SCRATCH)
        # Where lengths vary from step to step, more of them.
        count = 2 * steps if work.mean_length else steps
        row: dict[str, Any] = {}
        for label in precisions:
            flags = PRECISIONS[label]
            row[f"ours {label}"] = run(sys.executable, "ours.py", name, folder, "--steps", count, *flags)
            if not by_processor:
                row[f"floor {label}"] = run(sys.executable, "floor.py", name, folder, "--repeats", 3, *flags)
            if with_peers:
                python = peers.python_of("trl-1.16", ROOT / ".peers")
                row[f"TRL {label}"] = run(python, "trl_grpo.py", name, folder, "--steps", count, *flags)
        if by_processor:  # on a busy machine the clock counts what others did
            row["by"] = "processor"
            for side in row.values():
                if "cpu_seconds" in side:
                    side["median"] = statistics.median(side["cpu_seconds"])
        results[name] = row
    return results


def ppo(
    steps: int,
    with_peers: bool,
    before: dict[str, Any],
    precisions: Sequence[str] = tuple(PRECISIONS),
) -> dict[str, Any]:
    """Four epochs on 64 episodes, with both critics, against the last TRL that had PPO."""
    work = workloads.PPO_WORKLOAD
    folder = workloads.model_folder(work, SCRATCH)
    scorer = ("--classifier", workloads.reward_folder(work, SCRATCH))
    results: dict[str, Any] = {}
    for label in precisions:
        flags = PRECISIONS[label]
        for critic in ("head", "separate"):
            arguments = (work.name, folder, "--agent", "ppo", "--critic", critic, *scorer, "--steps", steps)
            results[f"ours {critic} {label}"] = run(sys.executable, "ours.py", *arguments, *flags)
        if with_peers:
            python = peers.python_of("trl-0.23", ROOT / ".peers")
            old = SCRATCH / "trl-0.23"
            results[f"TRL {label}"] = run(python, "trl_ppo.py", old, "--steps", steps, *flags)
    return results


def step(steps: int, with_peers: bool, before: dict[str, Any]) -> dict[str, Any]:
    """The step way against a bare decode loop."""
    folder = workloads.model_folder(workloads.PPO_WORKLOAD, SCRATCH)
    return run(sys.executable, "step_way.py", folder, "--repeats", max(5, steps))


def turns(steps: int, with_peers: bool, before: dict[str, Any]) -> dict[str, Any]:
    """Conversations: against one response with as many tokens, and TRL's environment_factory; processor time."""
    results = dict(before) | {"conversation": run(sys.executable, "../turns.py", "--only", "speed")}
    for count in (2, 4) if with_peers else ():
        flags = ("--turns", count, "--steps", steps, "--folder", SCRATCH / f"tools-{count}")
        results[f"TRL {count}"] = run(sys.executable, "../turns_trl.py", *flags)
    return results


def classic(steps: int, with_peers: bool, before: dict[str, Any]) -> dict[str, Any]:
    """CartPole against stable-baselines3, toy environments, cold start, memory."""
    import classic as work

    repeats = max(5, steps)
    return {
        "cartpole": work.cartpole(repeats),
        "toy_envs": work.toy_envs(),
        "cold_start": work.cold_start(repeats),
        "memory_growth": work.memory_growth(),
    }


def scaling_slopes(steps: int, with_peers: bool, before: dict[str, Any]) -> dict[str, Any]:
    """Cost over two decades of every size."""
    result = scaling.measure(3)
    scaling.draw(result)
    return result


def without_each(steps: int, with_peers: bool, before: dict[str, Any]) -> dict[str, Any]:
    """Our own steps with one fast way off at a time."""
    return ablation.measure(
        functools.partial(run, sys.executable),
        lambda name: workloads.model_folder(workloads.WORKLOADS[name], SCRATCH),
    )


PARTS = {
    "grpo": grpo,
    "ppo": ppo,
    "step": step,
    "turns": turns,
    "classic": classic,
    "scaling": scaling_slopes,
}
PARTS["ablation"] = without_each


def this_machine() -> str:
    """What tells machines apart that one may find oneself on: "x86_64, 2 cores, AVX2"."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {capability.replace('AVX512', 'AVX-512')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=6, help="steps of each side, the first not counted")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workloads", nargs="+", choices=workloads.WORKLOADS, default=None, help="of grpo")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of grpo and ppo"
    )
    parser.add_argument(
        "--by-processor", action="store_true", help="grpo by processor time, on a busy machine"
    )
    parser.add_argument("--no-peers", action="store_true", help="make and time no peers")
    parser.add_argument("--machine", help="what it is called; None names the processor's instruction set")
    arguments = parser.parse_args()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    # Parts that are not run now, and other machines, keep what was measured before.
    machines = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = machines.setdefault(arguments.machine or this_machine(), {})
    options: dict[str, dict[str, Any]] = {
        "grpo": {
            "names": arguments.workloads or list(workloads.WORKLOADS),
            "precisions": arguments.precisions,
            "by_processor": arguments.by_processor,
        },
        "ppo": {"precisions": arguments.precisions},
    }
    for name in arguments.only:
        print(name, flush=True)
        before = results.get(name, {})
        results[name] = PARTS[name](
            arguments.repeats, not arguments.no_peers, before, **options.get(name, {})
        )
        RESULTS.write_text(json.dumps(machines, indent=1) + "\n")
    report.write(machines, ROOT)


if __name__ == "__main__":
    main()
