"""Steps of PPO on small networks; prints one line of JSON.

python benchmarks/speed/small.py cartpole-v1|embedded [--adam]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from agents import PPO
from agents.policies.mlp import MlpPolicy
from agents.process import tune_process

CARTPOLE = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "n_envs": 8}


class Clock(BaseCallback):
    """Seconds from one rollout to the next; stops after ``steps``."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.starts = steps, []

    def _on_rollout_start(self) -> None:
        self.starts.append(time.perf_counter())

    def _on_step(self) -> bool:
        return len(self.starts) <= self.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("cartpole-v1", "embedded"))
    parser.add_argument("--adam", action="store_true", help="torch's Adam over every tensor")
    arguments = parser.parse_args()
    tune_process()
    MlpPolicy.flat = not arguments.adam
    agent: Any
    if arguments.task == "embedded":
        agent, clock = PPO("auto", "TextRLHF-v0", seed=0), Clock(6)
    else:
        agent, clock = PPO("MlpPolicy", "CartPole-v1", seed=0, **CARTPOLE), Clock(100)
    agent.learn(10**9, callback=clock, log_interval=None)
    print(json.dumps({"seconds": [b - a for a, b in zip(clock.starts[1:], clock.starts[2:], strict=False)]}))


if __name__ == "__main__":
    main()
