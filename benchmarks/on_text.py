"""Does the order of methods on exact worlds hold on text? And what LoRA is said to need, in one table.

    python benchmarks/on_text.py order                    # methods in the embedded world, three seeds
    python benchmarks/on_text.py lora                     # every weight, adapters everywhere or on attention, rank 1
    python benchmarks/on_text.py real --model build/smollm2    # two-digit sums on SmolLM2-135M

Every run is a job whose result is kept, so what was stopped goes on; ``--minutes`` begins no job that would end later,
``--table`` only writes what there is. Numbers go to benchmarks/on_text.json, the tables to docs/gradients.md ("On
text", by ``python benchmarks/gradients.py --pages``) and docs/training.md. Left out: a search for the best rate of each
method; the rates of LoRA are searched, as that is the question.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, the root is not on the path

from agents.algorithms import methods
from benchmarks.studies.frame import Job, do, markdown, put_into, read

ROOT = Path(__file__).resolve().parents[1]
RUNS, STORED = ROOT / "runs" / "on_text", Path(__file__).with_suffix(".json")
LORA_PAGE = ROOT / "docs" / "training.md"
#: Beside the leaders of the exact worlds, those that differ from them in one thing each.
METHODS = ("ppo", "opo", "otb", "dr-grpo", "grpo", "gspo", "cispo", "sapo", "reinforce", "raft")
#: Those that are tried on a real model.
BEST = ("ppo", "opo", "dr-grpo", "grpo", "cispo")
SEEDS, TOKENS, KL_COEF = 3, 30_000, 0.05
ANSWERS = 8
#: What is trained, by name: every weight, or adapters.
TRAINED: dict[str, dict[str, Any]] = {
    "every weight": {},
    "LoRA, rank 16, all layers": {"lora_rank": 16},
    "LoRA, rank 16, attention": {"lora_rank": 16, "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "LoRA, rank 1, all layers": {"lora_rank": 1},
    "LoRA, rank 1, attention": {"lora_rank": 1, "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
#: Tokens that a run learns from, by what its jobs are called: does what has few weights need more, or never get there?
LORA_SEEDS, LORA_TOKENS = 2, {"lora": 12_000, "lora-long": 36_000}


def embedded(
    name: str, seed: int, policy: dict[str, Any], tokens: int = TOKENS, **settings: Any
) -> dict[str, Any]:
    """A method learns in the embedded world and is measured on its held-out prompts."""
    import torch

    import agents
    from agents.evaluation.evaluation import evaluate_policy, heldout_env

    torch.set_num_threads(1)
    method = methods.find_method(name)
    settings = {k: v for k, v in method.settings.items() if k not in ("batch_size", "gamma")} | settings
    started = time.process_time()
    agent = getattr(agents, method.class_name)(
        "auto",
        "TextRLHF-v0",
        seed=seed,
        n_episodes=64,
        env_kwargs={"kl_coef": KL_COEF},
        policy_kwargs=policy,
        **settings,
    )
    try:
        agent.learn(tokens, log_interval=None)
    except FloatingPointError:  # a rate that is far too high
        return {"diverged": agent.num_timesteps}
    seconds = time.process_time() - started
    found = evaluate_policy(agent, heldout_env(), ANSWERS, 1000 + seed).summary()
    weights = sum(p.numel() for p in agent.policy.parameters() if p.requires_grad)
    return found | {
        "objective": found["score"] - KL_COEF * found["kl"],
        "seconds": seconds,
        "weights": weights,
    }


def sums(name: str, seed: int, folder: str, tokens: int) -> dict[str, Any]:
    """A method learns two-digit sums on a real model from so many tokens; the share of held-out sums it gets right."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    sys.path.insert(0, str(ROOT / "examples"))
    from two_digit_sums import AGENTS, ENV, POLICY, REWARD, problems, write

    import agents
    from reward_models import numeric_answer
    from textrl_env.envs.text_rlhf import TextRLHFEnv

    class Curve(BaseCallback):
        """The mean score of each rollout, and the KL of its episodes."""

        def __init__(self) -> None:
            super().__init__()
            self.scores: list[float] = []
            self.kl: list[float] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.note()

        def _on_training_end(self) -> None:
            self.note()

        def note(self) -> None:
            if "objective/scores" in self.model.latest:
                self.scores.append(round(float(self.model.latest["objective/scores"]), 4))
                self.kl.append(round(float(self.model.latest["objective/kl"]), 3))

    torch.set_num_threads(1)
    method = methods.find_method(name)
    train, held_out = problems()
    env = TextRLHFEnv(model=folder, reward=REWARD, prompts=train, **ENV)
    settings = dict(AGENTS["ppo" if name == "ppo" else "grpo"])
    agent = getattr(agents, method.class_name)("auto", env, seed=seed, policy_kwargs=dict(POLICY), **settings)
    test = TextRLHFEnv(model=env.lm, reward=REWARD, prompts=held_out, max_new_tokens=ENV["max_new_tokens"])
    started, curve = time.process_time(), Curve()
    agent.learn(tokens, curve)
    seconds = time.process_time() - started
    texts, _ = write(agent.policy.lm, test, deterministic=True)
    right = numeric_answer(column="answer")(None, texts, answer=[row["answer"] for row in held_out])
    return {
        "after": float(np.mean(right)),
        "scores": curve.scores,
        "kl": curve.kl,
        "tokens": agent.num_timesteps,
        "seconds": seconds,
    }


def jobs(what: str, seeds: int, folder: str = "", tokens: int = 0) -> list[Job]:
    """All runs of a question."""
    if what == "order":
        return [
            Job(f"order-{name}-{seed}", lambda _, n=name, s=seed: embedded(n, s, {}), seed)
            for seed in range(seeds)
            for name in METHODS
        ]
    if what == "real":
        return [
            Job(f"real-{name}-{seed}", lambda _, n=name, s=seed: sums(n, s, folder, tokens), seed)
            for seed in range(seeds)
            for name in BEST
        ]
    return [
        Job(
            f"{called}-{i}-{rate:g}-{seed}",
            lambda _, p=policy, r=rate, s=seed, n=n: embedded("dr-grpo", s, dict(p), n, learning_rate=r),
            seed,
        )
        for seed in range(seeds)
        for called, n in LORA_TOKENS.items()
        for i, policy in enumerate(TRAINED.values())
        for rate in RATES
    ]


def stored() -> dict[str, dict[str, Any]]:
    """What has been measured, by the name of the job."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else {}


def keep(results: dict[str, dict[str, Any]]) -> None:
    """Add results to those that are stored, one line each."""
    found = stored() | {
        name: {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}
        for name, result in results.items()
    }
    lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def of(found: dict[str, dict[str, Any]], prefix: str, what: str) -> list[float]:
    """A number of the jobs of one name, a seed each."""
    rows = (row for name, row in found.items() if name.rpartition("-")[0] == prefix)
    return [row[what] for row in rows if what in row]


def exact_figures(names: Sequence[str], exact: dict[str, dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Of each method in the exact worlds: *progress*, and the gap at ``kl_coef`` 0.1, negative, as more is better."""
    from agents.evaluation.estimators import progress

    steps = [progress(exact[name]["plain"]) for name in names]
    return steps, [-float(np.median(exact[name]["gaps"]["0.1"])) for name in names]


def order_table(found: dict[str, dict[str, Any]], exact: dict[str, dict[str, Any]]) -> str:
    """Methods on text beside where they end in the exact worlds, and how well the one ranks as the other does."""
    from benchmarks.gradients_page import rank_correlation

    done = [name for name in METHODS if of(found, f"order-{name}", "objective")]
    if len(done) < 3:
        return "*Not measured yet: `python benchmarks/on_text.py order`.*"
    steps, gaps = exact_figures(done, exact)
    lines, ends = [], []
    for name, step, gap in zip(done, steps, gaps, strict=True):
        values = of(found, f"order-{name}", "objective")
        gold, kl = (float(np.mean(of(found, f"order-{name}", what))) for what in ("gold", "kl"))
        ends.append(float(np.mean(values)))
        lines.append(
            [
                f"`{name}`",
                f"{step:.3f}",
                f"{-100 * gap:.2f}",
                f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"
                if len(values) > 1
                else f"{values[0]:.2f}",
                f"{gold:.2f}",
                f"{kl:.2f}",
            ]
        )
    lines.sort(key=lambda cells: -float(cells[3].split(" ")[0]))
    heads = ["method", "#progress", "#exact gap, %", "#J on text", "#gold", "#KL"]
    seeds = len(of(found, f"order-{done[0]}", "objective"))
    text = markdown(heads, lines)
    ranked = rank_correlation(steps, ends), rank_correlation(gaps, ends)
    text += (
        f"\n\nRank correlation of *J on text* over these {len(done)} methods, {seeds} seed{'s' * (seeds > 1)} each, "
        f"with *progress*: {ranked[0]:+.2f}; with a small exact gap: {ranked[1]:+.2f}."
    )
    return text


def real_table(found: dict[str, dict[str, Any]], exact: dict[str, dict[str, Any]]) -> str:
    """What methods learn on a real model, and how well the exact worlds and the embedded one rank them."""
    from benchmarks.gradients_page import rank_correlation

    done = [name for name in BEST if of(found, f"real-{name}", "after")]
    if len(done) < 3:
        return "*Not measured yet: `python benchmarks/on_text.py real`.*"
    steps, gaps = exact_figures(done, exact)
    right, learned, lines = [], [], []
    for name, step in zip(done, steps, strict=True):
        values = of(found, f"real-{name}", "after")
        right.append(float(np.mean(values)))
        learned.append(
            float(np.mean([s for scores in of(found, f"real-{name}", "scores") for s in scores[1:]]))
        )
        kl = np.mean([kl[-1] for kl in of(found, f"real-{name}", "kl")])
        seeds = ", ".join(f"{100 * x:.0f}" for x in values)
        cells = [f"`{name}`", f"{100 * right[-1]:.0f}", seeds, f"{100 * learned[-1]:.0f}", f"{kl:.1f}"]
        lines.append([*cells, f"{step:.3f}"])
    lines.sort(key=lambda cells: -float(cells[1]))
    heads = ["method", "#right at the end, %", "#of each seed", "#while learning, %", "#KL", "#progress"]
    by = {
        "*progress*": steps,
        "a small exact gap": gaps,
        "*J on text*": [float(np.mean(of(found, f"order-{name}", "objective"))) for name in done],
    }
    told = "; ".join(
        f"{what} {rank_correlation(values, right):+.2f} and {rank_correlation(values, learned):+.2f}"
        for what, values in by.items()
    )
    return (
        f"{markdown(heads, lines)}\n\nRank correlations over these {len(done)} methods with what was right at the end, "
        f"and while learning: {told}."
    )


def lora_table(found: dict[str, dict[str, Any]]) -> str:
    """What each way of training reaches at each rate, the best rate in bold."""
    lines, seeds = [], []
    for called, tokens in LORA_TOKENS.items():
        for i, name in enumerate(TRAINED):
            jobs = [f"{called}-{i}-{rate:g}" for rate in RATES]
            values = [of(found, job, "objective") for job in jobs]
            if not any(values):
                continue
            weights = next(iter(w for job in jobs for w in of(found, job, "weights")))
            means = [np.mean(v) if v else -np.inf for v in values]
            cells = [f"{m:.2f}" if v else "–" for m, v in zip(means, values, strict=True)]
            best = int(np.argmax(means))
            cells[best] = f"**{cells[best]}**"
            # A rate at which one seed has diverged is none to train at, whatever the other has reached.
            cells = [
                "diverged" if of(found, job, "diverged") else c for job, c in zip(jobs, cells, strict=True)
            ]
            seeds.append(max(map(len, values)))
            lines.append([f"{tokens:,}", name, f"{weights:,}", *cells])
    heads = ["#tokens", "trained", "#weights", *(f"#{rate:g}" for rate in RATES)]
    told = f"{min(seeds)} to {max(seeds)} seeds" if min(seeds) != max(seeds) else f"{seeds[0]} seeds"
    return f"{markdown(heads, lines)}\n\nMeans of {told}; the best rate in bold."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("order", "lora", "real"))
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--minutes", type=float, help="begin no job that would end later")
    parser.add_argument("--model", default="build/smollm2", help="of real: a folder")
    parser.add_argument("--tokens", type=int, default=4000, help="of real: that a run learns from")
    parser.add_argument("--table", action="store_true", help="only write what there is")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    seeds = arguments.seeds or (LORA_SEEDS if arguments.what == "lora" else SEEDS)
    todo = jobs(arguments.what, seeds, arguments.model, arguments.tokens)
    keep(read(todo, RUNS) if arguments.table else do(todo, arguments.minutes, RUNS))
    if arguments.what == "lora":
        put_into(LORA_PAGE, "lora", lora_table(stored()))
    print(lora_table(stored()) if arguments.what == "lora" else json.dumps(stored(), indent=1)[-1500:])


if __name__ == "__main__":
    main()
