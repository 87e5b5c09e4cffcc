"""GRPO on a language model, from prompts to weights, in one file: plain torch and transformers on one environment.

What it does: asks the embedded world's small assistant 16 questions at a time, samples 8 answers to each, has a reward
model score them, and makes answers that beat the others of their group likelier (Shao et al. 2024, DeepSeekMath:
https://arxiv.org/abs/2402.03300). A gold rubric that is never trained on shows whether the answers really get better.

How to run: ``python examples/grpo_from_scratch.py``, offline, about a minute on two CPU cores. For a model, a reward
and prompts of your own, change the two lines that make the environment and the model.

Left out, and why:
- a critic: the mean of a group takes its place, that is the idea of the paper;
- several minibatches for each batch of answers: every step reads all answers, there are few and they are short;
- micro-batches, bfloat16, shared prompts, LoRA, checkpoints, schedules, resuming: they change cost, not mathematics;
- iterated GRPO (a new reward model and reference now and then): one reference is enough here;
- top-k and top-p: log-probabilities must be those of what was sampled.
``agents.GRPO`` has what is missing here; its first update equals this one's (``tests/test_grpo_from_scratch.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from textrl_env import embedded  # importing the package registers the environment


def left_padded(prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts ``[B, P]`` that all end in the last column, and which of that is theirs, bool ``[B, P]``."""
    width = max(len(prompt) for prompt in prompts)
    real = np.arange(width) >= width - np.array([len(prompt) for prompt in prompts])[:, None]
    return np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]), real


def log_probs_of(
    model: PreTrainedModel, prompts: Sequence[np.ndarray], tokens: np.ndarray, mask: np.ndarray
) -> Tensor:
    """``log pi(a_t | s_t)`` of response tokens ``[B, T]``, with gradient; what lies outside ``mask`` means nothing."""
    padded, real = left_padded(prompts)  # [B, P]
    ids = torch.from_numpy(np.concatenate([padded, tokens], axis=1))  # [B, P + T]
    attention = torch.from_numpy(np.concatenate([real, mask], axis=1)).long()  # [B, P + T]
    # Positions count real tokens: padding on the left must not move a prompt.
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False).logits
    start = padded.shape[1]
    logits = logits[:, start - 1 : -1]  # [B, T, V]: the logits at one position predict the token at the next
    return logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)  # [B, T]


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Sequence[np.ndarray], budget: int, end: int):
    """One answer to each prompt, as token ids, and the log-probabilities of its tokens: two lists of B arrays."""
    ids, real = map(torch.from_numpy, left_padded(prompts))  # [B, P]
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the policy as it is
    written = model.generate(
        ids, attention_mask=real.long(), max_new_tokens=budget, eos_token_id=end, pad_token_id=end, **plain
    )[:, ids.shape[1] :].numpy()  # [B, T]
    # An answer goes up to its first end token, which is an action too; the rest is padding.
    lengths = [int(np.argmax(row == end)) + 1 if end in row else len(row) for row in written]
    mask = np.arange(written.shape[1]) < np.array(lengths)[:, None]  # [B, T]
    log_probs = log_probs_of(model, prompts, written, mask).numpy()
    return [[row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (written, log_probs)]


def group_advantages(scores: Tensor, group_size: int) -> Tensor:
    """``A_i = (r_i - mean(r)) / std(r)`` among the answers to one prompt, which are neighbours; ``[B]`` to ``[B]``."""
    groups = scores.view(-1, group_size)  # [B / G, G]
    centred = groups - groups.mean(1, keepdim=True)
    # The small number keeps a group of equal scores at zero; it has nothing to teach.
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def update(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    episodes: Any,
    group_size: int,
    kl_coef: float,
    clip_range: float = 0.2,
    epochs: int = 1,
) -> dict[str, float]:
    """Learn from one batch of answers, ``epochs`` gradient steps; returns what was measured at the last one."""
    mask = torch.from_numpy(episodes.mask)  # [B, T], true on what the policy wrote
    old = torch.from_numpy(episodes.log_prob).float()  # [B, T]
    reference = torch.from_numpy(episodes.ref_logprob).float()  # [B, T]
    advantages = group_advantages(torch.from_numpy(episodes.score).float(), group_size)[:, None]  # [B, 1]
    for _ in range(epochs):
        new = log_probs_of(model, episodes.prompt_tokens, episodes.tokens, episodes.mask)  # [B, T]
        new = torch.where(mask, new, 0.0)
        # Equation 3 of the paper: every token of an answer has the answer's advantage, PPO's clip holds the policy
        # near the one that sampled, and k3 (equation 4) holds it near the reference.
        #   J = E[ 1/G sum_i 1/|o_i| sum_t min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL(pi || pi_ref) ]
        ratio = (new - old).exp()  # rho, 1 in the first epoch
        clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
        surrogate = torch.minimum(ratio * advantages, clipped * advantages)  # [B, T]
        kl = (reference - new).exp() - (reference - new) - 1  # k3, never negative
        objective = surrogate - kl_coef * kl
        # The mean over an answer's own tokens, then over answers: 1/|o_i|, which Dr. GRPO takes out again.
        loss = -((objective * mask).sum(1) / mask.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    # The loss itself is about zero by construction and shows nothing.
    return {"kl": float((kl * mask).detach().sum(1).mean()), "gradient norm": float(norm)}


def main(
    iterations: int = 30, prompts: int = 16, group_size: int = 8, epochs: int = 1, seed: int = 0
) -> list[dict[str, float]]:
    """Train; returns the figures of every iteration, scores before its update."""
    torch.manual_seed(seed)
    env = gym.make("TextRLHF-v0").unwrapped  # model=, reward=, prompts= for your own
    env.reset(seed=seed)
    # The policy starts as the reference, which the environment keeps frozen. eval(): no dropout, ratios stay honest.
    model = AutoModelForCausalLM.from_pretrained(embedded.path("sft"), dtype=torch.float32).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-5)
    end = int(env.lm.eos_ids[0])
    history = []
    for iteration in range(iterations):
        # Groups are neighbours: a a a b b b.
        prompt_ids = np.repeat(env.draw_prompts(prompts), group_size)  # [B]
        # The environment asks for answers, then scores them with its reward model and its reference.
        episodes = env.run_episodes(lambda asked: sample(model, asked, env.max_new_tokens, end), prompt_ids)
        measured = update(model, optimizer, episodes, group_size, env.kl_coef, epochs=epochs)
        score, gold = float(episodes.score.mean()), float(episodes.parts["gold"].mean())
        history.append(
            {"reward": score, "gold": gold, "tokens": float(episodes.mask.sum(1).mean())} | measured
        )
        if iteration % 5 == 0 or iteration == iterations - 1:
            print(f"{iteration:4d} ", "  ".join(f"{n} {x:6.3f}" for n, x in history[-1].items()), flush=True)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30, help="batches of answers to learn from")
    parser.add_argument("--prompts", type=int, default=16, help="questions in a batch")
    parser.add_argument("--group-size", type=int, default=8, help="answers to each question")
    parser.add_argument(
        "--epochs", type=int, default=1, help="gradient steps on a batch; the clip works from two on"
    )
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
