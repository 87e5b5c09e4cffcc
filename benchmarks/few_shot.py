"""Generation after prompts that begin alike, with the beginning read once and without: docs/generators.md.

    python benchmarks/few_shot.py [--repeats 5]

32 prompts of 272 tokens of which the first 256 are the same (worked examples, say), one answer each and two each,
written by a random Llama of width 256; the two ways take turns. Seconds of the processor, medians. About half a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "speed")]  # as a script, the root is not on the path

import workloads  # noqa: E402

from textrl_env.lm import decoding  # noqa: E402
from textrl_env.lm.causal_lm import CausalLM  # noqa: E402

WORK = workloads.WORKLOADS["few-shot"]
#: From how many common tokens on a beginning is read once.
WAYS = {"once": decoding.SHARED_TOKENS, "for every prompt": sys.maxsize}


def seconds(lm: CausalLM, prompts: list[np.ndarray], budget: int) -> tuple[float, decoding.Sequences]:
    """Processor time of a call, and what it wrote."""
    began = time.process_time()
    written = decoding.generate(lm, prompts, budget, torch.Generator().manual_seed(0))
    return time.process_time() - began, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    lm = CausalLM(workloads.make_model(WORK), workloads.tokenizer(WORK.vocab_size))
    lm.check()
    texts = [np.array(lm.tokenizer(text)["input_ids"]) for text in workloads.prompts(WORK)]
    print(
        "| answers to a prompt | tokens of an answer | for every prompt, s | once, s | times as fast | difference |"
    )
    print("| --: | --: | --: | --: | --: | --: |")
    for answers in (1, 2):
        prompts = [text for text in texts for _ in range(answers)]
        for budget in (1, WORK.max_new_tokens):
            taken: dict[str, list[float]] = {way: [] for way in WAYS}
            said = {}
            for _ in range(repeats + 1):
                for way, decoding.SHARED_TOKENS in WAYS.items():
                    spent, said[way] = seconds(lm, prompts, budget)
                    taken[way].append(spent)
            once, apart = (statistics.median(taken[way][1:]) for way in WAYS)
            one, other = said.values()
            assert np.array_equal(one.tokens, other.tokens), "other tokens were written"
            difference = np.nanmax(np.abs(one.log_probs - other.log_probs)[one.policy])
            print(
                f"| {answers} | {budget} | {apart:.2f} | {once:.2f} | {apart / once:.2f} | {difference:.0e} |"
            )


if __name__ == "__main__":
    main()
