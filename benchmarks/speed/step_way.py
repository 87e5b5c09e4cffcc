"""``policy.act`` and ``envs.step`` on 64 slots, against a bare decode loop of one model; prints one line of JSON.

    python benchmarks/speed/step_way.py FOLDER [--repeats 5]

A step asks two models for each token, the acting policy and the reference, each with its own cache, so one half
of the bare loop is what could be had if everything else were free.
"""

from __future__ import annotations

import argparse
import json
import time

import gymnasium as gym
import numpy as np
import torch
import workloads
from floor import decode, median_seconds
from transformers import AutoModelForCausalLM, AutoTokenizer

import textrl_env  # noqa: F401  (registers the environments)
from agents import PPO

SLOTS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    work = workloads.PPO_WORKLOAD
    texts = workloads.prompts(work, SLOTS)
    envs = gym.make_vec(
        "TextRLHF-v0",
        num_envs=SLOTS,
        model=arguments.folder,
        reward=workloads.reward,
        prompts=texts,
        max_new_tokens=work.max_new_tokens,
        device="cpu",
    )
    policy = PPO("CausalLMPolicy", envs, seed=0).policy
    observation, _ = envs.reset(seed=0)

    def episode() -> None:
        nonlocal observation
        for _ in range(work.max_new_tokens):
            actions, _, _ = policy.act(observation)
            observation, *_ = envs.step(actions)

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder)
    prompts = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    lengths = np.full(SLOTS, work.max_new_tokens)
    tokens = SLOTS * work.max_new_tokens
    ratios, bare, step = [], [], []
    for _ in range(arguments.repeats):
        bare.append(tokens / median_seconds(lambda: decode(model, prompts, lengths), 1))
        started = time.perf_counter()
        episode()
        step.append(tokens / (time.perf_counter() - started))
        ratios.append(step[-1] / bare[-1])
    print(
        json.dumps(
            {
                "bare_tokens_per_second": float(np.median(bare)),
                "step_tokens_per_second": float(np.median(step)),
                "ratio": float(np.median(ratios)),
            }
        )
    )


if __name__ == "__main__":
    main()
