"""TRL's GRPO on one workload, in TRL's own virtual environment; prints one line of JSON.

python benchmarks/speed/trl_grpo.py WORKLOAD FOLDER [--steps 6] [--bf16]
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time

import datasets
import trl
import workloads
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds of every training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.lengths: list[float] = []
        self.started = self.began = 0.0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.started, self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.processor.append(time.process_time() - self.began)

    def on_log(self, *args: object, logs: dict | None = None, **kwargs: object) -> None:
        if logs and "completions/mean_length" in logs:
            self.lengths.append(logs["completions/mean_length"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=workloads.WORKLOADS)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--micro-batch", type=int, default=None, help="rows of a forward pass")
    arguments = parser.parse_args()
    work = workloads.WORKLOADS[arguments.workload]
    rows = arguments.micro_batch or work.episodes
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=arguments.bf16,
            gradient_checkpointing=False,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=work.episodes // rows,
            num_generations=work.group_size,
            max_completion_length=work.max_new_tokens,
            max_steps=arguments.steps,
            learning_rate=workloads.LEARNING_RATE,
            beta=workloads.KL_COEF,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(arguments.folder, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(arguments.folder),
            reward_funcs=workloads.reward,
            args=config,
            train_dataset=datasets.Dataset.from_dict(
                {"prompt": workloads.prompts(work, work.prompts * arguments.steps)}
            ),
            callbacks=[clock],
        )
        trainer.train()
    print(
        json.dumps(
            {
                "peer": f"TRL {trl.__version__} GRPO",
                "seconds": clock.seconds[1:],
                "cpu_seconds": clock.processor[1:],
                "mean_length": sum(clock.lengths) / len(clock.lengths),
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
