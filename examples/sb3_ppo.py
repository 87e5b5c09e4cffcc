"""stable-baselines3's own PPO trains a language model on the embedded world, one token to a step.

    python examples/sb3_ppo.py
    python examples/sb3_ppo.py --algorithm a2c --total-timesteps 100000 --output my-model

The environment is ordinary Gymnasium and the algorithm comes from stable-baselines3 untouched. Two things are
ours: a policy class whose actor is the environment's language model, and a bridge that hands 64 slots to
stable-baselines3 as one batched step. Held-out prompts are answered before and after training, and scored by the
reward model that was trained against and by the gold rubric that it never saw. About a minute on two cores.

Left out: rollouts in whole sequences, micro-batches, an adaptive KL, LoRA. ``agents.PPO`` has the fused way and is
faster; this is the road for everything that already speaks stable-baselines3.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from textrl_env import embedded  # importing the package registers the environments
from textrl_env.sb3 import (
    CausalLMActorCriticPolicy,
    GymVecEnv,
    SlotRolloutBuffer,
    TextRLHFCallback,
    bind_policy,
)


def answer_heldout(model: BaseAlgorithm, num_prompts: int, seed: int) -> dict[str, float]:
    """Sample one answer to each held-out prompt; mean score, gold score, KL and length."""
    width = model.observation_space["input_ids"].shape[0]  # held-out prompts may be shorter
    envs = GymVecEnv(
        gym.make_vec(
            "TextRLHF-v0",
            num_envs=num_prompts,
            max_prompt_length=width - embedded.MAX_NEW_TOKENS,
            prompts=embedded.path("prompts_heldout"),
            gold=embedded.gold_score,
        )
    )
    bind_policy(model, envs)
    envs.set_options({"prompt_id": np.arange(num_prompts)})
    torch.manual_seed(seed)
    observations = envs.reset()
    first: dict[int, dict] = {}  # each slot's first episode; later ones would favour short answers
    while len(first) < num_prompts:
        actions, _ = model.predict(observations, deterministic=False)
        observations, _, dones, infos = envs.step(actions)
        for slot in np.flatnonzero(dones):
            first.setdefault(int(slot), infos[slot])
    names = {"score": "score", "gold": "score/gold", "KL": "kl_sum", "tokens": "response_length"}
    return {name: float(np.mean([info[key] for info in first.values()])) for name, key in names.items()}


def show(when: str, figures: dict[str, float]) -> None:
    print(f"{when:7s}", "  ".join(f"{name} {value:6.3f}" for name, value in figures.items()), flush=True)


def main(
    algorithm: str = "ppo",
    total_timesteps: int = 24_576,
    num_envs: int = 64,
    seed: int = 0,
    output: Path | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Train, and return the figures on held-out prompts before and after."""
    envs = GymVecEnv(gym.make_vec("TextRLHF-v0", num_envs=num_envs))
    lm = envs.get_attr("lm")[0]
    shared = {"policy_kwargs": {"lm": lm}, "gamma": 1.0, "gae_lambda": 0.95, "vf_coef": 0.1, "seed": seed}
    if algorithm == "ppo":
        model = PPO(
            CausalLMActorCriticPolicy,
            envs,
            learning_rate=1e-3,
            n_steps=24,
            batch_size=24 * num_envs // 4,
            n_epochs=4,
            rollout_buffer_class=SlotRolloutBuffer,
            max_grad_norm=1.0,
            **shared,
        )
    else:
        model = A2C(
            CausalLMActorCriticPolicy,
            envs,
            learning_rate=1e-3,
            n_steps=24,
            normalize_advantage=True,
            use_rms_prop=False,
            max_grad_norm=1.0,
            **shared,
        )
    heldout = sum(1 for _ in embedded.path("prompts_heldout").open(encoding="utf-8"))
    before = answer_heldout(model, heldout, seed)
    show("before", before)
    started = time.perf_counter()
    model.learn(total_timesteps, callback=TextRLHFCallback(), log_interval=None)
    seconds = time.perf_counter() - started
    after = answer_heldout(model, heldout, seed)
    show("after", after)
    print(
        f"{model.num_timesteps} tokens in {seconds:.1f} s: {model.num_timesteps / seconds:.0f} tokens a second"
    )
    if output is not None:
        model.policy.save_pretrained(output)
        print(f"{output} is a Hugging Face folder: AutoModelForCausalLM.from_pretrained({str(output)!r})")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=("ppo", "a2c"), default="ppo")
    # Longer runs go on raising the reward model's score, and the gold score falls again: over-optimisation.
    parser.add_argument("--total-timesteps", type=int, default=24_576, help="tokens to train on")
    parser.add_argument("--num-envs", type=int, default=64, help="responses written at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder to save the trained language model to")
    main(**vars(parser.parse_args()))
