"""What the parts of a step cost by themselves, in plain transformers and torch; prints one line of JSON.

    python benchmarks/speed/floor.py WORKLOAD FOLDER [--bf16] [--repeats 5]

*decode*: transformers' model and its dynamic cache, one sampled token at a time, rows that have ended taken out.
*reference*: one forward pass over all real tokens, in full rows without padding. *update*: the same with the
log-probability of every token, backward, and a step of Adam. No episode, no reward, no agent.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
import workloads
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


@torch.no_grad()
def decode(model: torch.nn.Module, prompts: torch.Tensor, lengths: np.ndarray) -> None:
    """Sample ``lengths`` tokens after each prompt, ``[B, P]``; an episode that has ended leaves the batch."""
    cache = DynamicCache()
    logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    left = lengths
    for t in range(1, int(lengths.max()) + 1):
        tokens = torch.multinomial(logits.float().softmax(-1), 1)
        logits.float().log_softmax(-1).gather(-1, tokens)
        if t == lengths.max():
            return
        if (left == t).any():
            stay = torch.from_numpy(np.flatnonzero(left > t))
            cache.batch_select_indices(stay)
            tokens, left = tokens[stay], left[left > t]
        logits = model(tokens, past_key_values=cache).logits[:, -1]


def rows_of(total: int, width: int, vocab_size: int) -> torch.Tensor:
    """About ``total`` random tokens in full rows."""
    return torch.randint(2, vocab_size, (max(1, round(total / width)), width))


@torch.no_grad()
def reference(model: torch.nn.Module, rows: torch.Tensor) -> None:
    model(rows, use_cache=False).logits.float().log_softmax(-1).gather(-1, rows[..., None])


def update(model: torch.nn.Module, rows: torch.Tensor, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(rows, use_cache=False).logits
    log_probs = logits.float().log_softmax(-1).gather(-1, rows[..., None])
    (-log_probs.mean()).backward()
    optimizer.step()


def median_seconds(function: Callable[[], None], repeats: int) -> float:
    """Median over ``repeats`` runs, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=workloads.WORKLOADS)
    parser.add_argument("folder")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    work = workloads.WORKLOADS[arguments.workload]
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    low = torch.bfloat16 if arguments.bf16 else torch.float32
    frozen = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=low)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=workloads.LEARNING_RATE, fused=True)
    texts = [text for text in workloads.prompts(work) for _ in range(work.group_size)]
    prompts = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    generator = np.random.default_rng(0)
    lengths = np.full(work.episodes, work.max_new_tokens)
    if work.mean_length is not None:
        drawn = generator.geometric(1 / work.mean_length, size=work.episodes)
        lengths = np.minimum(drawn, work.max_new_tokens)
    total = int(work.episodes * work.prompt_length + lengths.sum())
    rows = rows_of(total, work.prompt_length + round(float(lengths.mean())), work.vocab_size)
    parts = {
        "decode": median_seconds(lambda: decode(frozen, prompts, lengths), arguments.repeats),
        "reference": median_seconds(lambda: reference(frozen, rows), arguments.repeats),
        "update": median_seconds(lambda: update(model, rows, optimizer, arguments.bf16), arguments.repeats),
    }
    print(json.dumps({"parts": parts, "seconds": [sum(parts.values())], "tokens": int(lengths.sum())}))


if __name__ == "__main__":
    main()
