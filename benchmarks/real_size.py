"""A model of a real size, with random weights: one step of GRPO and of PPO here, one of GRPO in TRL.

    python benchmarks/real_size.py [--only "GRPO, here" "GRPO, TRL" "PPO, here"] [--prompts 8] [--bf16] [--again]

The shape of Qwen3-0.6B (596 million weights, 151,936 tokens), LoRA 16 on every linear layer, 8 prompts of 64 tokens,
4 answers of 64 tokens to each; no answer ends early. The reward is a function that costs nothing. Everybody evaluates 8
rows at once in the update, which is TRL's default, with no gradient checkpointing. Each side is a process of its own;
what it took is added to benchmarks/real_size.json, and what is there is not run again without ``--again``, so that the
whole can be done in pieces. ``--prompts 2`` is a quarter of the step: one micro-batch, and so about the same peak. A
side that would leave less than 1.5 GB of the machine's memory is stopped and says so.

Prints seconds by the clock and of the processor (which a busy machine disturbs less), and the peak memory of the
process with all that it imports. ``--bf16`` is autocast, which pays only where the processor multiplies bfloat16. Left
out: PPO in TRL, whose version 1.16 has none.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS, FOLDER = HERE / "real_size.json", ROOT / "build" / "real_size"
PROMPTS, GROUP, LENGTH, BUDGET, ROWS, RANK = 8, 4, 64, 64, 8, 16
LEARNING_RATE, KL_COEF = 1e-6, 0.04
#: Gigabytes that are left to the rest of the machine.
SPARE = 1.5


def model_folder() -> Path:
    """The model as a folder in bfloat16, written where it does not exist yet."""
    if not (FOLDER / "config.json").exists():
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        sys.path.insert(0, str(HERE / "speed"))
        import workloads

        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
        )
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(str(FOLDER))
        workloads.tokenizer(config.vocab_size).save_pretrained(str(FOLDER))
    return FOLDER


def texts(count: int) -> list[str]:
    """Prompts of random words, all different."""
    import numpy as np

    ids = np.random.default_rng(1).integers(0, 151_934, (count, LENGTH))
    return [" ".join(f"w{i}" for i in row) for row in ids]


def reward(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Share of the words that end in an even digit."""
    words = [text.split() for text in completions]
    return [sum(w[-1] in "02468" for w in each) / max(len(each), 1) for each in words]


class Clock:
    """Seconds between two moments, by the clock and of all threads of the process."""

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def ours(method: str, prompts: int, bf16: bool) -> dict[str, Any]:
    """One step of an agent of this project: a rollout and the update after it."""
    import gymnasium as gym

    import agents
    import textrl_env  # noqa: F401  (registers the environments)
    from agents.process import tune_process

    tune_process()
    env = gym.make(
        "TextRLHF-v0",
        model=str(model_folder()),
        dtype="float32",
        reward=reward,
        prompts=texts(prompts * (1 if method == "GRPO" else GROUP)),
        kl_coef=KL_COEF,
        max_new_tokens=BUDGET,
        autocast=bf16,
        device="cpu",
    )
    special = {"group_size": GROUP} if method == "GRPO" else {"n_epochs": 1, "critic": "head"}
    agent = getattr(agents, method)(
        "auto",
        env,
        learning_rate=LEARNING_RATE,
        n_episodes=prompts * GROUP,
        batch_size=None,
        micro_batch_size=ROWS,
        policy_kwargs={"lora_rank": RANK},
        seed=0,
        **special,
    )
    clock = Clock()
    clock.start()
    agent.learn(1)
    tokens = agent.num_timesteps
    return clock.read() | {"tokens": tokens}


def trl_grpo(prompts: int, bf16: bool) -> dict[str, Any]:
    """One step of TRL's GRPO."""
    import datasets
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    clock, found = Clock(), {}

    class Step(TrainerCallback):
        """Seconds of the step, and what was written in it."""

        def on_step_begin(self, *args: object, **kwargs: object) -> None:
            clock.start()

        def on_step_end(self, *args: object, **kwargs: object) -> None:
            found.update(clock.read())

        def on_log(self, *args: object, logs: dict | None = None, **kwargs: object) -> None:
            if logs and "completions/mean_length" in logs:
                found["tokens"] = logs["completions/mean_length"] * prompts * GROUP

    folder = str(model_folder())
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=prompts * GROUP // ROWS,
            num_generations=GROUP,
            max_completion_length=BUDGET,
            max_steps=1,
            learning_rate=LEARNING_RATE,
            beta=KL_COEF,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            reward_funcs=reward,
            args=config,
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts(prompts)}),
            callbacks=[Step()],
        )
        trainer.train()
    return found | {"version": trl.__version__}


SIDES = {
    "GRPO, here": partial(ours, "GRPO"),
    "GRPO, TRL": trl_grpo,
    "PPO, here": partial(ours, "PPO"),
}


def available() -> float:
    """Gigabytes of memory that are free or can be had."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    return float("inf")


def measure(name: str, prompts: int, bf16: bool) -> dict[str, Any]:
    """One side in a process of its own, stopped where it takes too much memory."""
    command = [sys.executable, __file__, "--side", name, "--prompts", str(prompts)]
    command += ["--bf16"] if bf16 else []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, cwd=ROOT)
        while process.poll() is None:
            time.sleep(0.5)
            if available() < SPARE:
                process.kill()
                process.wait()
                return {"error": f"stopped: less than {SPARE} GB of memory were left"}
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            return {"error": errors.read().strip().splitlines()[-1][:300]}
        return json.loads(out.read().strip().splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """Everything that has been measured."""
    lines = ["| step | seconds | of the processor | peak, GB |", "| --- | --: | --: | --: |"]
    for name, row in results.items():
        numbers = (
            f"{row[x]:.{digits}f}" for x, digits in (("seconds", 0), ("cpu_seconds", 0), ("peak_gb", 1))
        )
        lines.append(
            f"| {name} | " + (row["error"] + " | | |" if "error" in row else " | ".join(numbers) + " |")
        )
    for name, one in results.items():
        other = results.get(name.replace("here", "TRL"), {})
        if "here" in name and "seconds" in one and "seconds" in other:
            lines.append(
                f"\n{name}: {other['seconds'] / one['seconds']:.2f} times as fast as TRL by the clock, "
                f"{other['cpu_seconds'] / one['cpu_seconds']:.2f} by processor time, with "
                f"{one['peak_gb'] / other['peak_gb']:.2f} of its memory."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--side", choices=SIDES, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        result = SIDES[arguments.side](arguments.prompts, arguments.bf16)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result | {"peak_gb": peak}))
        return
    model_folder()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for side in arguments.only:
        precision = "bfloat16" if arguments.bf16 else "float32"
        name = f"{side}, {arguments.prompts} prompts, {precision}"
        if arguments.again or "seconds" not in results.get(name, {}):
            results[name] = measure(side, arguments.prompts, arguments.bf16)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
