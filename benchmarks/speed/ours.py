"""One of our agents on one workload; prints one line of JSON.

python benchmarks/speed/ours.py WORKLOAD FOLDER [--agent grpo] [--critic head] [--bf16] [--steps 6]
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import time
from typing import Any

import gymnasium as gym
import workloads
from stable_baselines3.common.callbacks import BaseCallback

import textrl_env  # noqa: F401  (registers the environments)
from agents import GRPO, PPO
from agents.process import tune_process


class Clock(BaseCallback):
    """Seconds of every step (a rollout and the update after it) and of its rollout; stops after ``steps``."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.starts: list[float] = []
        self.rollouts: list[float] = []
        self.processor: list[float] = []
        self.lengths: list[float] = []

    def _on_rollout_start(self) -> None:
        self.starts.append(time.perf_counter())
        self.processor.append(time.process_time())

    def _on_rollout_end(self) -> None:
        self.rollouts.append(time.perf_counter() - self.starts[-1])
        self.lengths.append(float(self.locals["rollout"].lengths.float().mean()))

    def _on_step(self) -> bool:
        return len(self.starts) <= self.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=workloads.WORKLOADS)
    parser.add_argument("folder")
    parser.add_argument("--agent", choices=("grpo", "ppo"), default="grpo")
    parser.add_argument("--critic", choices=("head", "separate"), default="head")
    parser.add_argument("--classifier", default=None, help="reward model; the default is a function")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    tune_process()
    work = workloads.WORKLOADS[arguments.workload] if arguments.agent == "grpo" else workloads.PPO_WORKLOAD
    env = gym.make(
        "TextRLHF-v0",
        model=arguments.folder,
        reward=arguments.classifier or workloads.reward,
        prompts=workloads.prompts(work, 64 * work.prompts),
        kl_coef=workloads.KL_COEF,
        max_new_tokens=work.max_new_tokens,
        autocast=arguments.bf16,
        device="cpu",
    )
    common: dict[str, Any] = {
        "learning_rate": workloads.LEARNING_RATE,
        "n_episodes": work.episodes,
        "batch_size": None,
        "seed": 0,
    }
    if arguments.agent == "grpo":
        agent = GRPO("auto", env, group_size=work.group_size, **common)
    else:
        agent = PPO("auto", env, n_epochs=4, critic=arguments.critic, **common)
    clock = Clock(arguments.steps)
    agent.learn(10**9, callback=clock)
    steps = [b - a for a, b in zip(clock.starts, clock.starts[1:], strict=False)]
    print(
        json.dumps(
            {
                "seconds": steps[1:],
                "cpu_seconds": [b - a for a, b in itertools.pairwise(clock.processor)][1:],
                "rollout_seconds": clock.rollouts[1 : len(steps)],
                "mean_length": sum(clock.lengths) / len(clock.lengths),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
