"""A real pre-trained model and two-digit sums: GRPO here and in TRL, the same model, adapters, prompts and budget.

    python benchmarks/real_model.py [--minutes 10] [--until] [--seeds 0] [--bf16] [--model build/smollm2]

Each side is a process of its own, one after another, for so many minutes of training: the task and the settings of
``examples/two_digit_sums.py``, LoRA 16 on every linear layer, 8 prompts times 8 answers of at most 12 tokens in a step
(a rollout and all its passes), temperature 0.7, KL coefficient 0.01. ``--bf16`` gives both sides bfloat16 autocast,
which only pays where the processor has it. Prints the seconds of a step, by the clock and of all cores together (which
a busy machine disturbs less), the peak memory, the share of right answers, and how long each side took until five steps
in a row averaged ``TARGET`` (with ``--until`` it stops there); writes benchmarks/real_model.json. The KL is charged in
the reward here; TRL has it in the loss only, where two passes over a rollout make its estimator explode, so it gets its
own default of none, and needs no pass of the reference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE.parent)]

import two_digit_sums  # noqa: E402

#: Share of right answers, over five steps, that counts as having learned.
TARGET = 0.4
#: The example's own, for both sides.
GRPO_SETTINGS, RANK = two_digit_sums.AGENTS["grpo"], two_digit_sums.POLICY["lora_rank"]
EPISODES, GROUP = GRPO_SETTINGS["n_episodes"], GRPO_SETTINGS["group_size"]
MINIBATCH, PASSES = GRPO_SETTINGS["batch_size"], GRPO_SETTINGS["n_epochs"]
#: Optimiser steps, which TRL calls steps, for each rollout.
UPDATES = EPISODES // MINIBATCH * PASSES


def reached(scores: list[float]) -> bool:
    """Whether the last five steps average ``TARGET``."""
    return len(scores) >= 5 and statistics.mean(scores[-5:]) >= TARGET


def report(side: str, ends: list[float], cpu: list[float], scores: list[float]) -> None:
    """One line for each step, on standard error."""
    right = scores[len(ends) - 1]
    line = f"{side}: step {len(ends)}, {ends[-1]:.0f} s, {cpu[-1]:.0f} core seconds, right {right:.2f}"
    print(line, file=sys.stderr, flush=True)


def ours(model: str, minutes: float, seed: int, bf16: bool, until: bool) -> dict[str, Any]:
    """GRPO of this project."""
    import gymnasium as gym
    from stable_baselines3.common.callbacks import BaseCallback

    import textrl_env  # noqa: F401  (registers the environments)
    from agents import GRPO
    from agents.process import tune_process

    tune_process()

    class Steps(BaseCallback):
        """Notes when each step began and what its answers scored."""

        def _on_training_start(self) -> None:
            self.began = time.perf_counter()
            self.ends, self.cpu, self.scores = [], [], []

        def _on_rollout_start(self) -> None:
            if self.scores:
                self.ends.append(time.perf_counter() - self.began)
                self.cpu.append(time.process_time())
                report("ours", self.ends, self.cpu, self.scores)
                if until and reached(self.scores):
                    self.model.total_timesteps = self.model.num_timesteps

        def _on_rollout_end(self) -> None:
            self.scores.append(float(sum(self.model.episodes.text["score"])) / EPISODES)

        def _on_step(self) -> bool:
            return True

    env = gym.make(
        "TextRLHF-v0",
        model=model,
        reward=two_digit_sums.REWARD,
        prompts=two_digit_sums.problems()[0],
        **two_digit_sums.ENV,
        autocast=bf16,
        device="cpu",
    )
    agent = GRPO("auto", env, policy_kwargs=two_digit_sums.POLICY, seed=seed, **GRPO_SETTINGS)
    steps = Steps()
    agent.learn(10**9, callback=[steps, two_digit_sums.StopAfter(60 * minutes)])
    return {"ends": steps.ends, "cpu": steps.cpu, "scores": steps.scores[: len(steps.ends)]}


def trl(model: str, minutes: float, seed: int, bf16: bool, until: bool) -> dict[str, Any]:
    """TRL's GRPO trainer."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reward_models import numeric_answer

    right = numeric_answer(column="answer")

    def reward(prompts: Any, completions: Any, answer: Any, **columns: Any) -> list[float]:
        return right(prompts, [completion[0]["content"] for completion in completions], answer=answer)

    ends: list[float] = []
    cpu: list[float] = []
    scores: list[float] = []

    class Steps(TrainerCallback):
        """Notes when each step ended and what its answers scored."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % UPDATES:
                return
            ends.append(time.perf_counter() - self.began)
            cpu.append(time.process_time())
            report("TRL", ends, cpu, scores)
            control.should_training_stop = ends[-1] > 60 * minutes or (until and reached(scores))

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if logs and "reward" in logs:  # in the first step after each generation
                scores.append(logs["reward"])

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=MINIBATCH,
            steps_per_generation=EPISODES // MINIBATCH,
            num_iterations=PASSES,
            num_generations=GROUP,
            max_completion_length=two_digit_sums.ENV["max_new_tokens"],
            temperature=two_digit_sums.ENV["temperature"],
            learning_rate=GRPO_SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            beta=0.0,
            max_steps=10_000,
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(model),
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_list(two_digit_sums.problems()[0]),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Steps()],
        )
        trainer.train()
    return {"ends": ends, "cpu": cpu, "scores": scores[: len(ends)]}


SIDES = {"ours": ours, "TRL 1.16": trl}


def seconds_until(ends: list[float], scores: list[float], target: float) -> float | None:
    """When five steps in a row first averaged ``target``; None if they never did."""
    for i in range(5, len(scores) + 1):
        if statistics.mean(scores[i - 5 : i]) >= target:
            return ends[i - 1]
    return None


def main() -> None:
    """Run every side in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="build/smollm2")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, for each side and seed")
    parser.add_argument(
        "--until", action="store_true", help=f"stop a side once five steps averaged {TARGET:.0%}"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--side", choices=SIDES, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        result = SIDES[arguments.side](
            arguments.model, arguments.minutes, arguments.seeds[0], arguments.bf16, arguments.until
        )
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return
    from smollm2 import make_folder

    model = str(make_folder(Path(arguments.model)).resolve())
    rows = []
    for seed in arguments.seeds:
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--model", model, "--seeds", str(seed)]
            command += ["--minutes", str(arguments.minutes), *(["--bf16"] if arguments.bf16 else [])]
            command += ["--until"] if arguments.until else []
            print(f"{side}, seed {seed}: {arguments.minutes:g} minutes", flush=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"{side} ended with {done.returncode}")
            result = json.loads(done.stdout.strip().splitlines()[-1])
            rows.append({"side": side, "seed": seed, "bf16": arguments.bf16, **result})
    (HERE / "real_model.json").write_text(json.dumps(rows, indent=1) + "\n")
    headings = ["side", "seed", "steps", "seconds a step", "core seconds a step", "peak memory"]
    headings += ["right, first 5 steps", "right, last 5 steps"]
    headings += [f"minutes to {TARGET:.0%}", f"core minutes to {TARGET:.0%}"]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings))))
    for row in rows:
        ends, scores = row["ends"], row["scores"]
        seconds, cores = (
            statistics.median(b - a for a, b in itertools.pairwise(x)) for x in (ends, row["cpu"])
        )
        until = [seconds_until(times, scores, TARGET) for times in (ends, row["cpu"])]
        shown = ["not reached" if seconds is None else f"{seconds / 60:.1f}" for seconds in until]
        print(
            f"| {row['side']} | {row['seed']} | {len(ends)} | {seconds:.1f} | {cores:.1f} | {row['peak_mb']:,.0f} MB "
            f"| {statistics.mean(scores[:5]):.2f} | {statistics.mean(scores[-5:]):.2f} "
            f"| {' | '.join(shown)} |"
        )


if __name__ == "__main__":
    main()
