"""Do the agents reach the optimum? The gap to the exact one, in a token tree and with a tiny transformer.

    python benchmarks/optimality.py [--seeds 10] [--variant-seeds 3]

The gap is ``(J* - J) / (J* - J_ref)``, exact, of the final policy: 1 where learning starts (the reference), 0 at
``pi_ref exp(score / kl_coef) / Z``. Prints the tables and writes them to docs/optimality.md. How long
learning takes is not compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agents.base import Agent
from agents.exact_gap import ExactGapCallback
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.reinforce import REINFORCE
from agents.tabular import TabularPolicy
from agents.variants import CISPO, DAPO, GSPO, RLOO, DrGRPO, REINFORCEPlusPlus
from textrl_env.language_model import CausalLM

BETAS = (0.1, 0.3, 1.0)
EPISODES = 256
TREE_STEPS, TEXT_STEPS, TEXT_BETA = 500_000, 100_000, 0.3
MAIN = ("REINFORCE", "PPO", "GRPO")
#: What differs from the defaults, beside large batches and the schedules.
AGENTS: dict[str, tuple[type[Agent], dict[str, Any]]] = {
    "REINFORCE": (REINFORCE, {"gamma": 1.0}),
    "PPO": (
        PPO,
        {"gamma": 1.0, "batch_size": None, "n_epochs": 2, "normalize_advantage": False, "vf_coef": 1.0},
    ),
    "GRPO": (GRPO, {"group_size": 32}),
    "RLOO": (RLOO, {"group_size": 32}),
    "REINFORCE++": (REINFORCEPlusPlus, {}),
    "Dr. GRPO": (DrGRPO, {"group_size": 32}),
    "DAPO": (DAPO, {"group_size": 32}),
    "GSPO": (GSPO, {"group_size": 32}),
    "CISPO": (CISPO, {"group_size": 32}),
}
#: Share of the steps in which the KL coefficient falls; the learning rate falls in the rest.
ANNEALING = 0.7
WORDS = ["<eos>", "a", "b", "c", "d", "e"]
BUDGET = 3
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "optimality.md"


class AnnealKL(BaseCallback):
    """Lets the KL coefficient fall from ``start`` to ``target``, a straight line in its logarithm.

    The optimum of a large coefficient is near the reference and easy; followed slowly it leads to the optimum
    of a small one, past the local optima that a policy gradient falls into when it starts there.

    Args:
        start: The first coefficient.
        target: The last one.
        share: Share of the steps after which the target is reached.
    """

    def __init__(self, start: float, target: float, share: float = ANNEALING) -> None:
        super().__init__()
        self.start, self.target, self.share = start, target, share

    def _on_training_start(self) -> None:
        self._total = self.locals["total_timesteps"]

    def _on_rollout_start(self) -> None:
        progress = min(self.num_timesteps / (self.share * self._total), 1.0)
        self.model.kl_coef = self.start * (self.target / self.start) ** progress

    def _on_step(self) -> bool:
        return True


def hold_then_fall(rate: float) -> Callable[[float], float]:
    """A learning rate that stays while the KL coefficient falls, and then falls itself, by squares, to 0."""
    return lambda progress_remaining: rate * min(1.0, progress_remaining / (1 - ANNEALING)) ** 2


def final_gap(agent: Agent, steps: int, start: float, target: float) -> float:
    """Learn, and say exactly how far from the optimum the policy is then."""
    gap = ExactGapCallback(every=1_000_000)
    agent.learn(steps, callback=[AnnealKL(start, target), gap], log_interval=None)
    return gap.latest["gap"]


def learn_tree(
    name: str, beta: float, seed: int, anneal: bool = True, steps: int = TREE_STEPS, **tree: Any
) -> float:
    """The final gap of one run in ``TokenTree-v0``, from the reference."""
    env = gym.make_vec("textrl_env:TokenTree-v0", num_envs=EPISODES, kl_coef=beta, **tree)
    dynamics = env.unwrapped.dynamics
    cls, kwargs = AGENTS[name]
    agent = cls(
        TabularPolicy,
        env,
        # The nearer the optimum is to the reference, the more the noise of a step weighs.
        learning_rate=hold_then_fall(0.1 * min(1.0, 0.3 / beta)),
        n_episodes=EPISODES,
        policy_kwargs={"logits": dynamics.ref_table, "eos": dynamics.eos},
        seed=seed,
        **kwargs,
    )
    return final_gap(agent, steps, max(2.0, beta) if anneal else beta, beta)


def tiny_transformer(seed: int = 0) -> CausalLM:
    """A random Llama of two layers over six tokens."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.2,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CausalLM(LlamaForCausalLM(config).eval(), tokenizer)


_SCORES = np.random.default_rng(0).standard_normal((len(WORDS),) * BUDGET)


def random_score(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """A number of its own for every response, drawn once from N(0, 1)."""
    padded = [tuple(ids) + (0,) * (BUDGET - len(ids)) for ids in completion_ids]
    return [float(_SCORES[ids]) for ids in padded]


def learn_text(name: str, seed: int, beta: float = TEXT_BETA, steps: int = TEXT_STEPS) -> float:
    """The final gap of one run in ``TextRLHF-v0`` with the tiny transformer, from itself."""
    env = gym.make(
        "textrl_env:TextRLHF-v0",
        model=tiny_transformer(),
        reward=random_score,
        prompts=["a", "b c"],
        kl_coef=beta,
        max_new_tokens=BUDGET,
        device="cpu",
    )
    cls, kwargs = AGENTS[name]
    if name == "REINFORCE":
        kwargs = kwargs | {"baseline": "learned"}  # the mean over both prompts and all prefixes is noisy
    agent = cls("auto", env, learning_rate=hold_then_fall(0.003), n_episodes=EPISODES, seed=seed, **kwargs)
    return final_gap(agent, steps, max(1.0, beta), beta)


def show(gaps: list[float]) -> str:
    """Median and worst, in per cent."""
    return f"{100 * np.median(gaps):.2f} ({100 * max(gaps):.2f})"


def tree_table(seeds: int, variant_seeds: int) -> list[str]:
    lines = ["| agent | seeds | " + " | ".join(f"kl_coef {beta:g}" for beta in BETAS) + " |"]
    lines.append("|---" * (2 + len(BETAS)) + "|")
    rows = [(name, seeds if name in MAIN else variant_seeds, True) for name in AGENTS]
    rows += [(name, variant_seeds, False) for name in MAIN]
    for name, count, anneal in rows:
        cells = [show([learn_tree(name, beta, seed, anneal) for seed in range(count)]) for beta in BETAS]
        label = name if anneal else f"{name}, kl_coef not annealed"
        lines.append(f"| {label} | {count} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def text_table(seeds: int) -> list[str]:
    lines = ["| agent | seeds | gap |", "|---|---|---|"]
    for name in MAIN:
        lines.append(f"| {name} | {seeds} | {show([learn_text(name, seed) for seed in range(seeds)])} |")
        print(lines[-1], flush=True)
    return lines


PAGE = """# How near the optimum

Written by `python benchmarks/optimality.py {arguments}`.

The optimum of `E[score] - kl_coef * KL` is known exactly wherever the
language can be enumerated, and so is every policy's distance from it. The gap is
`(J* - J) / (J* - J_ref)` of the final policy, in per cent: 100 for the reference, where learning starts, 0 at
the optimum. Median over seeds, the worst seed in brackets.

## TokenTree-v0

The tree of the defaults (5 tokens, 4 steps, 2 prompts, {responses} responses), a table as the policy,
{tree_steps:,} tokens.

{tree}

All of them use batches of {episodes} episodes; a `kl_coef` that falls from 2 to its target over the first 70 %
of the steps, at a learning rate of 0.1 (0.03 for `kl_coef` 1); then a learning rate that falls to zero. The last
rows show why: with a small coefficient from the start, a policy gradient commits to a good response before it
has seen the best one, and leaves it too slowly. Nothing else differs from the agents' defaults but what `AGENTS`
in the script lists.

## A tiny transformer in TextRLHF-v0

A random Llama (2 layers, 6 tokens), budget {budget}, two prompts, a random score for every response, `kl_coef`
{text_beta:g} (falling from 1), learning rate 0.003, REINFORCE with a learned baseline; {text_steps:,} tokens.
Here all prefixes share their weights.

{text}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="runs of REINFORCE, PPO and GRPO")
    parser.add_argument("--variant-seeds", type=int, default=3, help="runs of the variants")
    parser.add_argument("--text-seeds", type=int, default=3, help="runs of the transformer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page = PAGE.format(
        arguments=" ".join(f"--{name.replace('_', '-')} {n}" for name, n in vars(arguments).items()),
        responses=2 * (1 + 4 + 16 + 64 * 5),
        tree_steps=TREE_STEPS,
        episodes=EPISODES,
        tree="\n".join(tree_table(arguments.seeds, arguments.variant_seeds)),
        budget=BUDGET,
        text_beta=TEXT_BETA,
        text_steps=TEXT_STEPS,
        text="\n".join(text_table(arguments.text_seeds)),
    )
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
