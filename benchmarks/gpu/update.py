"""One GRPO step of the real agent: seconds of its parts, tokens per second, share of the peak in the update.

Left out: PPO, whose update is this one with another loss, and learning rates that would teach anything.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from agents import GRPO
from benchmarks.gpu.machine import attempt, median_seconds, peak_memory, synchronize
from benchmarks.llama_costs import Shape, forward_flops
from benchmarks.random_llama import count_even, make_prompts
from textrl_env.envs.text_rlhf import TextRLHFEnv
from textrl_env.lm.causal_lm import CausalLM


def make_agent(lm: CausalLM, episodes: int, group: int, prompt: int, tokens: int, micro: int) -> GRPO:
    """GRPO on a text env around ``lm``; the reward is a function that costs nothing.

    The reference is ``lm`` as it is, bfloat16; the policy a float32 copy whose products are bfloat16.
    """
    env = TextRLHFEnv(
        model=lm,
        reward=count_even,
        prompts=make_prompts(8 * episodes, prompt, lm.vocab_size),
        max_new_tokens=tokens,
    )
    return GRPO(
        "CausalLMPolicy",
        env,
        learning_rate=1e-6,
        group_size=group,
        n_episodes=episodes,
        micro_batch_size=micro,
        device=lm.device,
        seed=0,
    )


def update_flops(shape: Shape, episodes: int, group: int, micro: int, prompt: int, tokens: int) -> float:
    """Model FLOPs of an update: three forward passes' worth, what is computed again not counted.

    6 N for every token that passes and attention beside; a prompt passes once in a micro-batch for its group.
    """
    prompts = episodes / micro * math.ceil(micro / group) * prompt
    forward = forward_flops(shape, prompts, prompt)
    forward += forward_flops(shape, episodes * tokens, prompt + tokens, episodes * tokens)
    return 3 * forward


def measure(
    lm: CausalLM,
    shape: Shape,
    episodes: int,
    group: int,
    prompt: int,
    tokens: int,
    micro: int,
    peak: float,
    repeats: int,
) -> dict[str, Any]:
    """Whole steps through ``learn``, then the update alone on one rollout."""
    device = lm.device
    agent = make_agent(lm, episodes, group, prompt, tokens, micro)
    seconds, losses = [], []

    def step() -> None:
        agent.learn(episodes * tokens, log_interval=None)
        seconds.append(agent.logger.name_to_value["time/rollout_seconds"])
        losses.append(agent.logger.name_to_value["train/loss"])

    peak_memory(device, start=True)
    whole = median_seconds(step, device, repeats)
    rollout = agent.collect()
    synchronize(device)
    update = median_seconds(lambda: agent.train(rollout), device, repeats)
    flops = update_flops(shape, episodes, group, micro, prompt, tokens)
    if not all(map(math.isfinite, losses)):
        raise AssertionError(f"the loss is not finite: {losses}")
    return {
        "seconds": whole,
        "rollout_seconds": statistics.median(seconds[-repeats:]),
        "update_seconds": update,
        "tokens_per_second": episodes * tokens / whole,
        "update_model_flops": flops,
        "flops_share": flops / update / peak,
        "peak_memory_bytes": peak_memory(device),
        "loss": float(losses[-1]),
    }


def rows(
    name: str,
    make: Callable[[], CausalLM],
    shape: Shape,
    episodes: int,
    group: int,
    prompt: int,
    tokens: int,
    micro: int,
    peak: float,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """One row; memory that runs out is one too."""
    sizes = {"episodes": episodes, "group": group, "prompt": prompt, "tokens": tokens, "micro": micro}
    yield attempt(
        lambda: measure(make(), shape, **sizes, peak=peak, repeats=repeats), part="grpo", model=name, **sizes
    )
