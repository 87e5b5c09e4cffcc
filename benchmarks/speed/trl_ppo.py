"""The PPO of the last TRL that had one, in that TRL's own virtual environment; prints one line of JSON.

    python benchmarks/speed/trl_ppo.py SCRATCH [--steps 6] [--bf16]

Four epochs on 64 episodes; its critic is always a model of its own. Its transformers is older and cannot read the
folders of the others, so it makes the same models from the same seed under SCRATCH.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import datasets
import trl
import workloads
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)


class Clock(TrainerCallback):
    """When every update ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    work = workloads.PPO_WORKLOAD
    clock = Clock()
    folder = workloads.model_folder(work, arguments.scratch)
    classifier = workloads.reward_folder(work, arguments.scratch)
    tokenizer = workloads.tokenizer(work.vocab_size)
    texts = workloads.prompts(work, work.episodes * (arguments.steps + 1))
    with tempfile.TemporaryDirectory() as out:
        config = trl.PPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=arguments.bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=work.episodes,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=4,
            local_rollout_forward_batch_size=work.episodes,
            response_length=work.max_new_tokens,
            total_episodes=work.episodes * (arguments.steps + 1),
            num_sample_generations=0,
            learning_rate=workloads.LEARNING_RATE,
            kl_coef=workloads.KL_COEF,
            temperature=1.0,
            save_strategy="no",
            report_to=[],
        )
        trainer = trl.PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=AutoModelForCausalLM.from_pretrained(folder),
            ref_model=AutoModelForCausalLM.from_pretrained(folder),
            reward_model=AutoModelForSequenceClassification.from_pretrained(classifier),
            value_model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
            train_dataset=datasets.Dataset.from_dict(
                {"input_ids": [tokenizer(t)["input_ids"] for t in texts]}
            ),
            eval_dataset=datasets.Dataset.from_dict({"input_ids": [tokenizer(texts[0])["input_ids"]]}),
            callbacks=[clock],
        )
        trainer.train()
    print(
        json.dumps(
            {
                "peer": f"TRL {trl.__version__} PPO",
                "seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
