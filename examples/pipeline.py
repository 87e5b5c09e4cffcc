"""The whole of post-training in the embedded world: base -> SFT -> preferences -> reward model -> PPO, GRPO, DPO.

Everything is learned here, from a base model that only completes text; the one thing given is the gold rubric, which
nothing but the simulated raters sees. At the end a table says what each step is worth on questions that were never
trained on. About ten minutes on two CPU cores. Run it::

    python examples/pipeline.py
    python examples/pipeline.py --tokens 20000      # a quick look

Every stage runs in a process of its own, so that its peak memory is its own (an idle process with torch loaded is
about 400 MB of it). Left out: tuning; each method has the settings that the command line starts from.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_embedded_world  # beside this file: how people answer in that world

from textrl_env import embedded
from textrl_env.data.prompts import load_prompts

#: Weight of the KL in the reward of PPO and GRPO; DPO has its own, beta.
KL_COEF = 0.15
PPO = {"learning_rate": "linear:5e-4", "n_episodes": 256, "batch_size": 128, "n_epochs": 4}
GRPO = {"learning_rate": "linear:1e-3", "n_episodes": 256, "batch_size": 128, "n_epochs": 2, "group_size": 8}
DPO = {"beta": 0.1, "learning_rate": 3e-4, "batch_size": 64}
#: Answers to each held-out prompt in the table.
SAMPLES = 8


def fine_tune(folder: Path, seed: int) -> str:
    """base -> SFT: imitate 6 demonstrations of each training prompt, written by imperfect people."""
    from agents.offline.sft import sft
    from textrl_env.embedded import world

    rng = random.Random(seed)
    prompts = load_prompts(embedded.path("prompts_train")).texts
    shown = [world.question_of(prompt) for prompt in prompts for _ in range(6)]
    demos = [{"prompt": q.prompt, "completion": make_embedded_world.demonstration(q, rng)} for q in shown]
    settings = {"epochs": 2, "learning_rate": 1.5e-3, "seed": seed, "device": "cpu"}
    result = sft(embedded.path("base"), demos, folder / "sft", **settings)
    return f"{len(demos)} demonstrations, loss {result['loss']:.2f} per token"


def compare(folder: Path, seed: int) -> str:
    """SFT -> preferences: simulated raters choose between pairs of its answers."""
    from agents.preferences.collection import collect_preferences

    output = folder / "preferences.jsonl"
    options = {"answers_per_prompt": 6, "seed": seed, "device": "cpu"}
    _, found = collect_preferences(folder / "sft", embedded.path("prompts_train"), "gold", output, **options)
    return (
        f"{found['records']:.0f} comparisons; two raters agree on {found['expected_agreement']:.0%}, "
        f"one is right on {found['rater_accuracy']:.0%}"
    )


def learn_reward(folder: Path, seed: int) -> str:
    """Preferences -> reward model: Bradley-Terry on the comparisons."""
    from agents.offline.reward_model import train_reward_model

    settings = {"epochs": 3, "learning_rate": 1e-3, "batch_size": 128, "seed": seed, "device": "cpu"}
    pairs = folder / "preferences.jsonl"
    result = train_reward_model(folder / "sft", pairs, folder / "reward", **settings)
    return f"says what the raters said of {result['accuracy']:.0%} of the pairs"


def reinforce(folder: Path, seed: int, name: str, tokens: int) -> str:
    """SFT and reward model -> policy: PPO or GRPO, for so many tokens."""
    import gymnasium as gym

    import agents

    env = gym.make(
        "TextRLHF-v0",
        model=str(folder / "sft"),
        reward=str(folder / "reward"),
        prompts=str(embedded.path("prompts_train")),
        kl_coef=KL_COEF,
        device="cpu",
    )
    settings = {"PPO": PPO, "GRPO": GRPO}[name]
    agent = getattr(agents, name)("auto", env, seed=seed, **settings).learn(tokens, log_interval=1)
    agent.save(folder / name.lower())
    return f"{agent.num_timesteps} tokens, reward-model score {agent.latest['objective/scores']:.2f}"


def prefer_directly(folder: Path, seed: int) -> str:
    """SFT and preferences -> policy: DPO, without the reward model."""
    from agents.offline.dpo import dpo

    pairs = folder / "preferences.jsonl"
    result = dpo(folder / "sft", pairs, folder / "dpo", seed=seed, device="cpu", **DPO)
    return f"{result['steps']:.0f} steps, chosen above rejected on {result['accuracy']:.0%} of the pairs"


def evaluate(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """Every model on the held-out prompts: gold score, win rate over SFT, KL from SFT, distinct-2 of a prompt."""
    import numpy as np

    from agents.evaluation.diversity import distinct_n
    from agents.evaluation.evaluation import evaluate_policy, heldout_env, win_rate

    models = {"base": embedded.path("base")} | {
        name: folder / name.lower() for name in ("SFT", "PPO", "GRPO", "DPO")
    }
    env = heldout_env(model=str(folder / "sft"), reward=str(folder / "reward"), device="cpu")
    found = {
        name: evaluate_policy(path, env, SAMPLES, seed=seed + k)
        for k, (name, path) in enumerate(models.items())
    }
    return {
        name: {
            "gold": float(result.gold.mean()),
            "proxy": float(result.score.mean()),
            "win": win_rate(result.gold, found["SFT"].gold)[0],
            "kl": float(result.kl.mean()),
            "distinct": float(np.mean([distinct_n(texts, 2) for texts in result.responses])),
            "length": float(result.length.mean()),
        }
        for name, result in found.items()
    }


# -- running the stages -------------------------------------------------------------------------------------


def run(stage: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """A stage in a process of its own: what it returns, its seconds, and its peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, stage, arguments))
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = None
    process.join()
    if answer is None:
        sys.exit(f"{stage.__name__} failed; what went wrong stands above")
    return answer


def _child(sender: Any, stage: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    started = time.perf_counter()
    value = stage(*arguments)
    seconds = time.perf_counter() - started
    # Kilobytes on Linux, bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    sender.send((value, seconds, peak))


def main(output: Path, seed: int = 0, tokens: int = 80_000) -> None:
    """Run every stage and print the table."""
    stages = [
        ("SFT", fine_tune, ()),
        ("preferences", compare, ()),
        ("reward model", learn_reward, ()),
        ("PPO", reinforce, ("PPO", tokens)),
        ("GRPO", reinforce, ("GRPO", tokens)),
        ("DPO", prefer_directly, ()),
    ]
    output.mkdir(parents=True, exist_ok=True)
    spent: dict[str, tuple[float, float]] = {}
    for name, stage, extra in stages:
        summary, *spent[name] = run(stage, output, seed, *extra)
        print(f"{name:<13} {spent[name][0]:5.0f} s  {summary}", flush=True)
    figures, seconds, _ = run(evaluate, output, seed)
    print(f"{'evaluation':<13} {seconds:5.0f} s  {SAMPLES} answers to each held-out question\n")
    columns = "gold  win over SFT     KL  distinct-2  proxy  tokens  seconds  peak MB"
    print(f"{'':<13} {columns}")
    for name, f in figures.items():
        cost = "{:7.0f}  {:7.0f}".format(*spent[name]) if name in spent else f"{'-':>7}  {'-':>7}"
        print(
            f"{name:<13} {f['gold']:4.2f}  {f['win']:12.1%}  {round(f['kl'], 2) + 0.0:5.2f}  {f['distinct']:10.2f}  "
            f"{f['proxy']:5.2f}  {f['length']:6.1f}  {cost}"
        )
    for name in ("preferences", "reward model"):
        print(f"{name:<58} {spent[name][0]:7.0f}  {spent[name][1]:7.0f}")
    print(
        "\nKL: nats from SFT, per answer. distinct-2: over the answers to one question. proxy: the reward model."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/pipeline"), help="folder for all models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=80_000, help="that PPO and GRPO each learn for")
    main(**vars(parser.parse_args()))
