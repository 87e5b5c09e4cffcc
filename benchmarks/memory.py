"""What the models of a run cost in memory: GRPO, PPO with and without a critic of its own, and all that with LoRA.

What it does: two updates of each on a random Llama of about 20 million parameters, each in a process of its own, and
prints the peak memory above that of a process that has loaded the reference alone.
How to run: ``python benchmarks/memory.py``. Left out: reward models (the reward here is a function) and GPUs.
"""

from __future__ import annotations

import multiprocessing
import resource
from typing import Any

LORA = {"lora_rank": 16}
RUNS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "reference alone": None,
    "GRPO": ("GRPO", {}),
    'PPO, critic="head"': ("PPO", {"critic": "head", "n_epochs": 1}),
    'PPO, critic="separate"': ("PPO", {"critic": "separate", "n_epochs": 1}),
    "GRPO, LoRA": ("GRPO", {"policy_kwargs": LORA}),
    'PPO, critic="head", LoRA': ("PPO", {"critic": "head", "n_epochs": 1, "policy_kwargs": LORA}),
    'PPO, critic="separate", LoRA': ("PPO", {"critic": "separate", "n_epochs": 1, "policy_kwargs": LORA}),
}


def count_vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [sum(text.count(vowel) for vowel in "aeiou") / 10 for text in completions]


def peak_mb(run: tuple[str, dict[str, Any]] | None) -> tuple[float, int]:
    """Peak memory in MiB of this process after two updates, and the model's number of parameters."""
    import peft  # noqa: F401 -- in every process, so that what LoRA imports is not taken for what it costs
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import agents
    from textrl_env import embedded
    from textrl_env.envs.text_rlhf import TextRLHFEnv

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("sft"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    env = TextRLHFEnv(
        model=model,
        tokenizer=tokenizer,
        reward=count_vowels,
        prompts=["how are you?", "who is it?"],
        device="cpu",
    )
    if run is not None:
        name, arguments = run
        agent = getattr(agents, name)("auto", env, n_episodes=16, micro_batch_size=4, seed=0, **arguments)
        agent.learn(600)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return peak, sum(p.numel() for p in model.parameters())


def main() -> None:
    context = multiprocessing.get_context("spawn")
    base = None
    for name, run in RUNS.items():
        with context.Pool(1) as pool:  # a fresh process for each: its peak is its own
            peak, parameters = pool.apply(peak_mb, (run,))
        base = peak if base is None else base
        weights = parameters * 4 / 2**20
        print(
            f"{name:28} peak {peak:6.0f} MB, {peak - base:5.0f} MB above the reference "
            f"({(peak - base) / weights:.1f} times the {weights:.0f} MB of weights)",
            flush=True,
        )


if __name__ == "__main__":
    main()
