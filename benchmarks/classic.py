"""The parts without a language model: CartPole against stable-baselines3, toy environments, cold start, memory.

What it does: prints the time of PPO on CartPole-v1 as a share of stable-baselines3's (same steps, network and
hyper-parameters, those tuned in rl-zoo), the steps per second of the toy vector envs, what ``gym.make`` costs in a
fresh interpreter beside the imports it cannot do without, and whether memory grows with the number of updates.
Every measurement runs in a process of its own with one thread (more make neither side faster on such networks);
sides that are compared take turns, and medians are reported.
How to run: ``python benchmarks/classic.py``, or ``python benchmarks/classic.py --only cartpole --repeats 5``.
Left out: GPUs, and everything about language models but their start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TUNED = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0}
N_ENVS, STEPS, WARM_UP = 8, 100_000, 2_000
TOYS = ("ToyBandit-v0", "LineWorld-v0", "GridWorld-v0", "TokenTree-v0")

#: What a fresh interpreter runs. The last is measured against the others.
STARTS = {
    "import textrl_env": "import textrl_env",
    "torch and transformers": "import torch, transformers",
    "and the auto class": "import torch, transformers; from transformers import AutoModelForCausalLM",
    "and the model's class": "import torch, transformers; from transformers import LlamaForCausalLM",
    "gym.make": "import gymnasium, textrl_env; gymnasium.make('TextRLHF-v0')",
}


# -- in a process of its own --------------------------------------------------------------------------------


def _train_ours(steps: int, seed: int) -> Any:
    from agents import PPO

    settings = TUNED | {"learning_rate": "linear:1e-3", "clip_range": "linear:0.2"}
    return PPO("MlpPolicy", "CartPole-v1", n_envs=N_ENVS, seed=seed, **settings), steps


def _train_theirs(steps: int, seed: int) -> Any:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=seed)
    settings = TUNED | {"learning_rate": lambda left: 1e-3 * left, "clip_range": lambda left: 0.2 * left}
    return PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings), steps


def _greedy_return(agent: Any, episodes: int = 20) -> float:
    import gymnasium as gym

    env, total = gym.make("CartPole-v1"), 0.0
    for seed in range(episodes):
        observation, done = env.reset(seed=seed)[0], False
        while not done:
            action = int(agent.predict(observation, deterministic=True)[0])
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
    return total / episodes


def _cartpole_child(side: str, steps: int, seed: int) -> dict[str, float]:
    make = _train_ours if side == "ours" else _train_theirs
    make(WARM_UP, seed)[0].learn(WARM_UP)
    agent, steps = make(steps, seed)
    wall, cpu = time.perf_counter(), time.process_time()
    agent.learn(steps)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "return": _greedy_return(agent)}


def _toys_child(num_envs: int, seconds: float) -> dict[str, float]:
    import gymnasium as gym

    import textrl_env  # noqa: F401

    gym.logger.min_level = gym.logger.ERROR  # no policy is bound here
    speeds = {}
    for env_id in TOYS:
        envs = gym.make_vec(env_id, num_envs=num_envs)
        envs.reset(seed=0)
        envs.action_space.seed(0)
        actions = [envs.action_space.sample() for _ in range(16)]
        rates = []
        for _ in range(6):  # the first is the warm-up
            steps, started = 0, time.perf_counter()
            while time.perf_counter() - started < seconds:
                envs.step(actions[steps % 16])
                steps += 1
            rates.append(steps * num_envs / (time.perf_counter() - started))
        speeds[env_id] = statistics.median(rates[1:])
    return speeds


def _memory_child(env_id: str, updates: int) -> dict[str, float]:
    import numpy as np
    from stable_baselines3.common.callbacks import BaseCallback

    from agents import PPO

    class Watch(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.resident: list[int] = []

        def _on_rollout_start(self) -> None:
            self.resident.append(
                int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            )

        def _on_step(self) -> bool:
            return len(self.resident) <= updates

    watch = Watch()
    settings = {"n_envs": N_ENVS, **TUNED} if env_id == "CartPole-v1" else {"n_episodes": 16, "n_epochs": 1}
    PPO("auto", env_id, seed=0, **settings).learn(10**9, callback=watch, log_interval=10)
    later = np.array(watch.resident[updates // 4 :])  # the first quarter fills caches
    slope = np.polyfit(np.arange(len(later)), later, 1)[0]
    return {"updates": len(later), "bytes_per_update": float(slope), "resident_mb": later[-1] / 2**20}


_CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "cartpole": _cartpole_child,
    "toys": _toys_child,
    "memory": _memory_child,
}


def _python(*arguments: str) -> Any:
    """The JSON that a fresh interpreter prints last, run with one thread."""
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _in_process(name: str, *arguments: Any) -> dict[str, float]:
    """Run one of the functions above in a process of its own."""
    return _python(__file__, "--child", name, json.dumps(arguments))


def _seconds_of(statement: str) -> float:
    code = f"import time; started = time.perf_counter(); {statement}; print(time.perf_counter() - started)"
    return _python("-c", code)


# -- what other scripts call --------------------------------------------------------------------------------


def cartpole(repeats: int = 5, steps: int = STEPS) -> dict[str, Any]:
    """PPO on CartPole-v1, ours and stable-baselines3's in turn; every repetition has a seed of its own."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for seed in range(repeats):
        for side in runs:
            runs[side].append(_in_process("cartpole", side, steps, seed))

    def median(side: str, name: str) -> float:
        return statistics.median(run[name] for run in runs[side])

    result: dict[str, Any] = {"steps": steps, "repeats": repeats}
    for side in runs:
        result |= {f"{side}_{name}": median(side, name) for name in ("seconds", "cpu_seconds", "return")}
    for name in ("seconds", "cpu_seconds"):
        result[f"ratio_{name}"] = result[f"ours_{name}"] / result[f"theirs_{name}"]
    return result


def toy_envs(num_envs: int = 4096, seconds: float = 0.5) -> dict[str, float]:
    """Env steps per second of each toy vector env, random actions through the public interface."""
    return {"num_envs": num_envs} | _in_process("toys", num_envs, seconds)


def cold_start(repeats: int = 5) -> dict[str, float]:
    """Seconds of each of ``STARTS`` in fresh interpreters, and ``gym.make`` as a multiple of the imports."""
    seconds: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(repeats):
        for name in STARTS:
            seconds[name].append(_seconds_of(STARTS[name]))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    bases = [name for name in STARTS if name not in ("import textrl_env", "gym.make")]
    return medians | {f"gym.make / {name}": medians["gym.make"] / medians[name] for name in bases}


def memory_growth(updates: int = 800) -> dict[str, dict[str, float]]:
    """Resident memory against the number of updates, as a slope over the last three quarters of a run."""
    return {
        "CartPole-v1": _in_process("memory", "CartPole-v1", updates),
        "TextRLHF-v0": _in_process("memory", "TextRLHF-v0", updates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {
        "cartpole": lambda: cartpole(args.repeats),
        "toy_envs": toy_envs,
        "cold_start": lambda: cold_start(args.repeats),
        "memory_growth": memory_growth,
    }
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, arguments = args.child
        print(json.dumps(_CHILDREN[name](*json.loads(arguments))))
        return
    for name in args.only:
        print(f"{name}: {json.dumps(parts[name](), indent=2)}", flush=True)


if __name__ == "__main__":
    main()
