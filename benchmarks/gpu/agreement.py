"""Do the CPU and the device agree? The same tokens through ``run_episodes`` on both, float32.

Left out: sampling on both, which draws different tokens from equal distributions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.machine import attempt
from benchmarks.llama_costs import Shape
from benchmarks.random_llama import count_even, make_lm, make_prompts
from reward_models.classifier import HFRewardModel
from textrl_env import embedded
from textrl_env.envs.text_rlhf import Episodes, TextRLHFEnv

#: Largest difference of a reward that counts as agreement.
TOLERANCE = 1e-3
FIELDS = ("rewards", "ref_logprob", "kl", "score")


def replay(
    env: TextRLHFEnv, tokens: list[np.ndarray], log_probs: list[np.ndarray], ids: np.ndarray
) -> Episodes:
    """Episodes of given responses with given acting log-probabilities."""
    return env.run_episodes(lambda prompts: (tokens, log_probs), ids)


def random_responses(count: int, vocab: int, longest: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Tokens and acting log-probabilities, lengths from 1 to ``longest``."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, count)
    tokens = [rng.integers(1, vocab, n) for n in lengths]
    return tokens, [-rng.exponential(3.0, n) for n in lengths]


def differences(here: TextRLHFEnv, there: TextRLHFEnv, count: int = 64) -> dict[str, Any]:
    """Largest absolute difference of every quantity over ``count`` random responses."""
    tokens, log_probs = random_responses(count, int(here.action_space.n), here.max_new_tokens)
    ids = np.arange(count) % len(here.dynamics.prompt_tokens)
    one, other = (replay(env, tokens, log_probs, ids) for env in (here, there))
    largest = {name: float(np.abs(getattr(one, name) - getattr(other, name)).max()) for name in FIELDS}
    return {
        "largest_difference": largest,
        "tolerance": TOLERANCE,
        "agrees": max(largest.values()) <= TOLERANCE,
    }


def embedded_env(device: str) -> TextRLHFEnv:
    """The embedded world, its reward model on the same device."""
    return TextRLHFEnv(
        model=embedded.path("sft"),
        reward=HFRewardModel(embedded.path("reward"), device=device),
        prompts=embedded.path("prompts_train"),
        device=device,
        autocast=False,
    )


def random_env(shape: Shape, prompt: int, device: str) -> TextRLHFEnv:
    """A random Llama, the same weights everywhere, and a reward that reads token ids."""
    lm = make_lm(shape)
    lm.model.to(device)
    prompts = make_prompts(16, prompt, shape.vocab)
    return TextRLHFEnv(model=lm, reward=count_even, prompts=prompts, max_new_tokens=32)


def rows(device: torch.device, shapes: dict[str, Shape], prompt: int) -> Iterator[dict[str, Any]]:
    """A row for the embedded world and one for every shape."""
    kind = str(device)
    yield attempt(
        lambda: differences(embedded_env("cpu"), embedded_env(kind)), part="agree", model="embedded world"
    )
    for name, shape in shapes.items():
        yield attempt(
            lambda s=shape: differences(random_env(s, prompt, "cpu"), random_env(s, prompt, kind)),
            part="agree",
            model=name,
        )
