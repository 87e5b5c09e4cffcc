"""Policies of the embedded world, trained and measured: what most studies are made of.

Every policy starts from the world's SFT model and is measured on its 128 held-out prompts, which are never trained on,
by the reward that it was trained on (proxy), by the gold rubric, and by its KL to the SFT model.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.frame import RUNS, Job, result_of
from textrl_env.embedded import raters

#: Answers to each held-out prompt that the best and the last policy are measured by, and the first one.
ANSWERS, FIRST = 24, 8
#: What every policy learns for, and how fast. The command line's default is 3e-4; at 1e-3 a run goes as far from the
#: SFT model (4 to 7 nats) in a quarter of the tokens, so that thirty runs take less than half an hour.
TOKENS, RATE = 24_000, 1e-3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a policy is trained.

    Attributes:
        agent: A class of :mod:`agents`, with its defaults but for the learning rate.
        kl_coef: Weight of the KL in the reward.
        seed: Of everything.
        reward: What is trained on; None is the embedded reward model.
        tokens: To learn for.
        learning_rate: Of the policy.
        eval_every: Tokens between evaluations.
    """

    agent: str
    kl_coef: float
    seed: int
    reward: Any = None
    tokens: int = TOKENS
    learning_rate: float = RATE
    eval_every: int = 4_000


def train(recipe: Recipe, arrays: Path) -> dict[str, Any]:
    """Train a policy with evaluations on the way, and measure the first, the best and the last one.

    Args:
        recipe: How.
        arrays: Scores of every answer go to this path with ``.npz``: of the evaluations at the ends
            (``start_score [P, 4]``, ...), and of many more answers of the same policies (``pool_start_score [P, n]``).

    Returns:
        ``points`` on the way, ``ends`` by name, the ``verdict`` and the ``seconds``.
    """
    import torch

    import agents
    from agents import EvalCallback
    from agents.evaluation.evaluation import evaluate_policy
    from agents.evaluation.verdict import judge
    from textrl_env.lm.causal_lm import CausalLM

    torch.set_num_threads(1)
    started = time.perf_counter()
    env_kwargs = {"kl_coef": recipe.kl_coef} | ({} if recipe.reward is None else {"reward": recipe.reward})
    env_kwargs |= {} if recipe.reward is None else {"gold": "textrl_env.embedded:gold_score"}
    agent = getattr(agents, recipe.agent)(
        "auto", "TextRLHF-v0", seed=recipe.seed, env_kwargs=env_kwargs, learning_rate=recipe.learning_rate
    )
    with tempfile.TemporaryDirectory() as folder:
        best = Path(folder) / "best"
        watch = EvalCallback(eval_freq=recipe.eval_every, best_model_save_path=best, verbose=0)
        agent.learn(recipe.tokens, watch)
        policies: dict[str, Any] = {"start": watch.eval_env.lm, "final": agent}
        if "best" in watch.ends:
            policies["best"] = CausalLM.load(best)
        pools = {
            name: evaluate_policy(
                policy, watch.eval_env, FIRST if name == "start" else ANSWERS, 1000 + 10 * recipe.seed + i
            )
            for i, (name, policy) in enumerate(policies.items())
        }
    found: dict[str, np.ndarray] = {}
    for name, pool in pools.items():
        short = watch.ends[name].sampled
        found |= {f"{name}_score": short.score, f"{name}_gold": short.gold}
        found |= {f"pool_{name}_score": pool.score, f"pool_{name}_gold": pool.gold}
    write_arrays(arrays, found)
    return {
        "recipe": {k: v for k, v in dataclasses.asdict(recipe).items() if k != "reward"},
        "points": [{"timesteps": e.timesteps} | e.means() for e in watch.points],
        "ends": {name: {"timesteps": watch.ends[name].timesteps} | pools[name].summary() for name in pools},
        "verdict": verdict_of(judge(watch.ends)),
        "seconds": time.perf_counter() - started,
    }


def measure(model: Any, answers: int = ANSWERS, seed: int = 0) -> dict[str, float]:
    """A model's means over held-out answers, and how often they beat those of the SFT model.

    Args:
        model: What :func:`agents.evaluation.evaluation.evaluate_policy` takes, a folder for example.
        answers: To each of the 128 prompts.
        seed: Of the sampling.
    """
    from agents.evaluation.diversity import distinct_of
    from agents.evaluation.evaluation import evaluate_policy, heldout_env, win_rate

    env = heldout_env()
    found = evaluate_policy(model, env, answers, 100 + seed)
    first = evaluate_policy(env.lm, env, FIRST, 200 + seed)
    rate, _, _ = win_rate(found.gold, first.gold)
    return found.summary() | {"win_rate": rate, "distinct_of_10": distinct_of(found.responses, 10)}


def answers_of_sft(prompts: str, per_prompt: int) -> Job:
    """A job: answers of the SFT model.

    Args:
        prompts: "heldout" or "train".
        per_prompt: How many to each.
    """

    def sample(arrays: Path) -> dict[str, Any]:
        import torch

        from agents.evaluation.evaluation import evaluate_policy, heldout_env
        from textrl_env import embedded

        torch.set_num_threads(1)
        env = heldout_env(prompts=embedded.path(f"prompts_{prompts}"))
        found = evaluate_policy(env.lm, env, per_prompt, {"heldout": 31, "train": 32}[prompts])
        write_arrays(arrays, {"score": found.score, "gold": found.gold, "ended": found.ended})
        return {"prompts": found.prompts, "responses": found.responses, "kinds": found.columns["kind"]}

    return Job(f"answers-{prompts}-{per_prompt}", sample, -1)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers of the SFT model with what they are worth, ``[P, n]``."""

    prompts: list[str]
    responses: list[list[str]]
    ended: np.ndarray
    gold: np.ndarray
    score: np.ndarray

    @classmethod
    def of(cls, prompts: str, per_prompt: int) -> Answers:
        """Those of :func:`answers_of_sft`, which are sampled if they are not there."""
        job = answers_of_sft(prompts, per_prompt)
        texts = result_of(job)
        arrays = read_arrays(RUNS / job.name)
        ended = arrays["ended"] > 0
        return cls(texts["prompts"], texts["responses"], ended, arrays["gold"], arrays["score"])

    def pairs(self, count: int, seed: int) -> list[tuple[int, int, int]]:
        """Random pairs of answers that differ: ``(prompt, one, other)``; those of fewer are a part of those of more."""
        rng = np.random.default_rng(seed)
        found: list[tuple[int, int, int]] = []
        while len(found) < count:
            prompt = int(rng.integers(len(self.prompts)))
            one, other = (int(i) for i in rng.choice(len(self.responses[prompt]), 2, replace=False))
            if self.responses[prompt][one] != self.responses[prompt][other]:
                found.append((prompt, one, other))
        return found

    def compared(self, count: int, seed: int, scale: float = raters.SCALE) -> list[tuple[int, int, int]]:
        """Comparisons by the embedded world's raters: ``(prompt, chosen, rejected)``."""
        rng = np.random.default_rng([seed, 1])
        choices = []
        for prompt, one, other in self.pairs(count, seed):
            chance = raters.prefer_probability(self.gold[prompt, one], self.gold[prompt, other], scale)
            choices.append((prompt, one, other) if rng.random() < chance else (prompt, other, one))
        return choices

    def records(self, choices: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
        """Comparisons as :func:`agents.offline.reward_model.train_reward_model` and ``dpo`` read them."""
        return [
            {
                "prompt": self.prompts[prompt],
                "chosen": self.responses[prompt][chosen],
                "rejected": self.responses[prompt][rejected],
                "chosen_ended": bool(self.ended[prompt, chosen]),
                "rejected_ended": bool(self.ended[prompt, rejected]),
            }
            for prompt, chosen, rejected in choices
        ]

    def right(self, choices: list[tuple[int, int, int]]) -> float:
        """The share of comparisons that gold agrees with, equals counting half."""
        better = [
            np.sign(self.gold[prompt, chosen] - self.gold[prompt, other]) for prompt, chosen, other in choices
        ]
        return float(np.mean(better) / 2 + 0.5)


#: Answers to each prompt that comparisons are made of, and that best-of-n chooses among.
COMPARED, CHOSEN_FROM = 8, 64


def train_reward(records: list[dict[str, Any]], output: Path, seed: int) -> np.ndarray:
    """Train a reward model on comparisons.

    Returns:
        Its scores of the held-out answers, ``[P, CHOSEN_FROM]``.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from agents.offline.reward_model import train_reward_model
    from reward_models.calibration import score
    from textrl_env import embedded

    torch.set_num_threads(1)
    settings = {"epochs": 3, "learning_rate": 1e-3, "batch_size": 64, "weight_decay": 0.1, "device": "cpu"}
    train_reward_model(embedded.path("sft"), records, output, seed=seed, **settings)
    heldout = Answers.of("heldout", CHOSEN_FROM)
    scorer = AutoModelForSequenceClassification.from_pretrained(output).eval()
    prompts = [prompt for prompt in heldout.prompts for _ in range(CHOSEN_FROM)]
    texts = [text for texts in heldout.responses for text in texts]
    found = score(
        scorer,
        AutoTokenizer.from_pretrained(output),
        prompts,
        texts,
        heldout.ended.ravel().tolist(),
        batch_size=512,
    )
    return np.array(found).reshape(len(heldout.prompts), CHOSEN_FROM)


def accuracy(score: np.ndarray, gold: np.ndarray) -> float:
    """How often a score orders two answers to one prompt as gold does, over all pairs that gold tells apart."""
    right = told = 0.0
    for s, g in zip(score, gold, strict=True):
        by_score, by_gold = (np.sign(x[:, None] - x[None, :]) for x in (s, g))
        told += (by_gold != 0).sum()
        right += ((by_score == by_gold) & (by_gold != 0)).sum() + 0.5 * (
            (by_score == 0) & (by_gold != 0)
        ).sum()
    return float(right / told)


def write_arrays(arrays: Path, found: dict[str, np.ndarray]) -> None:
    """Scores of single answers, in float32; read by :func:`read_arrays`."""
    arrays.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arrays.with_suffix(".npz"), **{k: v.astype(np.float32) for k, v in found.items()})


def read_arrays(arrays: Path) -> dict[str, np.ndarray]:
    """What :func:`write_arrays` wrote."""
    with np.load(arrays.with_suffix(".npz"), allow_pickle=False) as found:
        return {name: found[name].astype(np.float64) for name in found.files}


def verdict_of(verdict: Any) -> dict[str, Any]:
    """A verdict as JSON."""
    return dataclasses.asdict(verdict)
