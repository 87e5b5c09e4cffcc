"""Where an environment answers in between: how near the optimum agents come, and what a conversation costs.

    python benchmarks/turns.py [--seeds 3] [--only optimality speed]

The optimum. A random GPT-2 of two layers over four tokens plays ``TextGame-v0``: two turns of two tokens, each
answered in one of two ways by a table of random probabilities, with a random reward for each turn.
:mod:`textrl_env.exact.turns` knows the optimum and every policy's distance from it; prints the gap
``(J* - J) / (J* - J_ref)`` of the final policies, in per cent.

The cost. 64 conversations of four turns of 32 tokens, two tokens answered to each, against 64 responses of 128
tokens by the same model: with the cache kept across turns, and without. The three alternate; prints the medians of
their processor time and the ratios to one response, and a line of JSON.
Left out: other sizes, and the token tree (benchmarks/optimality.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, the root is not on the path

from agents.callbacks.kl_control import AnnealKL
from benchmarks.optimality import AGENTS, MAIN, TEXT_AGENTS, TEXT_ANNEALING, hold_then_fall, tiny_transformer
from textrl_env.exact.turns import Outcome, evaluate_turns, from_text_game, solve_turns
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import DecodedSequences, generate

SLOTS, TURNS, TOKENS, ANSWER, OPENING = 64, 4, 32, 2, 16
BETA, EPISODES, STEPS = 0.3, 256, 480_000
#: After 480,000 it was 1.1 % away.
LONGER = {"REINFORCE": 800_000}


def outcomes(said: tuple[str, ...]) -> list[Outcome]:
    """What may be answered to a conversation: probability, text, reward, and whether that is the end."""
    rng = np.random.default_rng(zlib.crc32(repr(said).encode()))
    first = 0.2 + 0.6 * rng.random()
    reward = rng.normal()
    return [(first, "a", reward, False), (1 - first, "b c", reward, False)]


class Table:
    """Answers by :func:`outcomes`, drawn from the seed."""

    def reset(self, seed: int | None = None, **row):
        """Begin anew; the opening is always the same."""
        self.seed, self.said = seed, ()
        return "b a", {}

    def step(self, text: str):
        """Draw an answer."""
        self.said = (*self.said, text)
        (first, *one), (_, *two) = outcomes(self.said)
        drawn = np.random.default_rng([self.seed, len(self.said)]).random()
        answer, reward, over = one if drawn < first else two
        return answer, reward, over, False, {}


def table_game() -> gym.Env:
    """The environment, around the tiny transformer."""
    budget = {"max_turns": 2, "max_new_tokens": 2, "num_seeds": 1_000_000}
    return gym.make(
        "textrl_env:TextGame-v0", game=Table, model=tiny_transformer(), kl_coef=BETA, device="cpu", **budget
    )


def final_gap(name: str, seed: int, steps: int) -> float:
    """Learn, and say exactly how far from the optimum the policy is then."""
    env = table_game()
    mdp, reference = from_text_game(env, outcomes)
    best, start = solve_turns(mdp)[0], evaluate_turns(mdp, reference).objective
    cls, kwargs = AGENTS[name]
    rate = hold_then_fall(0.003, TEXT_ANNEALING)
    kwargs = kwargs | TEXT_AGENTS[name]
    if name == "GRPO":
        # A group shares the seed and so its luck; divided by its deviation, seeds would weigh by how they turn out.
        kwargs = kwargs | {"scale": "none"}
    agent = cls("auto", env, learning_rate=rate, n_episodes=EPISODES, seed=seed, **kwargs)
    agent.learn(steps, callback=AnnealKL(1.0, BETA, TEXT_ANNEALING), log_interval=None)
    found = evaluate_turns(mdp, from_text_game(env, outcomes, agent.policy.lm)[1])
    return (best - found.objective) / (best - start)


def medium_llama() -> CausalLM:
    """A random Llama of four layers that never ends a turn by itself."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    lm = CausalLM(LlamaForCausalLM(config).eval(), tiny_transformer().tokenizer)
    lm.vocab_size, lm.eos_ids = config.vocab_size, np.array([config.vocab_size])
    lm.check()
    return lm


def conversation_seconds(lm: CausalLM, turns: int, keeps: bool = True) -> float:
    """Processor time of ``TURNS * TOKENS`` tokens in so many turns."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    contexts = [rng.integers(0, 500, size=OPENING) for _ in range(SLOTS)]
    memory = DecodedSequences(OPENING + TURNS * (TOKENS + ANSWER)) if keeps and turns > 1 else None
    began = time.process_time()
    for _ in range(turns):
        written, _ = generate(lm, contexts, TURNS * TOKENS // turns, generator, memory=memory)
        answer = np.full(ANSWER, 5)
        contexts = [np.concatenate([c, x, answer]) for c, x in zip(contexts, written, strict=True)]
    return time.process_time() - began


def speed(repeats: int = 5) -> None:
    """Print what a conversation costs, as a share of one response with as many tokens."""
    lm = medium_llama()
    ways = {"one response": (1, True), "cache kept": (TURNS, True), "read again": (TURNS, False)}
    rounds = [{name: conversation_seconds(lm, *way) for name, way in ways.items()} for _ in range(repeats)]
    seconds = {name: statistics.median(each[name] for each in rounds) for name in ways}
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} s | {value / seconds['one response']:.2f} |", flush=True)
    print(json.dumps(seconds | {"rounds": rounds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--agents", nargs="+", default=list(MAIN), choices=MAIN)
    parser.add_argument("--steps", type=int, help=f"tokens; by default {STEPS:,}, of REINFORCE more")
    parser.add_argument("--only", nargs="+", default=["optimality", "speed"], choices=["optimality", "speed"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "speed" in arguments.only:
        speed()
    if "optimality" not in arguments.only:
        return
    for name in arguments.agents:
        steps = arguments.steps or LONGER.get(name, STEPS)
        gaps = [100 * final_gap(name, seed, steps) for seed in range(arguments.seeds)]
        print(f"| {name} | {' | '.join(f'{gap:.2f}' for gap in gaps)} |", flush=True)


if __name__ == "__main__":
    main()
