"""The numbers of the explainer pages, every one out of a function of this project.

    python docs/explainer/build.py                 # all of it; trains two small runs first where they are missing
    python docs/explainer/build.py --only clip kl  # these pages, seconds; the others keep their numbers

Writes ``numbers.js`` beside this file: one object of JSON with a section for each page, which the pages read as a
script because a page that is opened from a disk may fetch nothing. The pages hold no formulas: a slider steps along a
grid that was computed here. Everything is seeded; figures are rounded to five digits.

The sections in :data:`OF_RUNS` need trained policies, ``textrl demo`` and a run of GRPO in the embedded world, which
the command line makes in ``build/explainer`` (some minutes on two cores) and which stay there.

Left out: the pages themselves, which are written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from agents import PPO, REINFORCE
from agents.algorithms import maths
from agents.evaluation.evaluation import evaluate_policy, heldout_env
from agents.evaluation.records import read_ends, read_evaluations
from agents.evaluation.verdict import judge
from agents.offline.dpo import sequence_log_probs
from agents.offline.preference_losses import dpo_loss
from agents.offline.sft import encode_demonstration, sft_loss
from agents.policies.tabular import TabularPolicy
from reward_models import load_reward
from reward_models.base import Batch
from reward_models.bradley_terry import bradley_terry_loss
from textrl_env import embedded
from textrl_env.data.prompts import load_prompts
from textrl_env.embedded import raters
from textrl_env.exact import solver as exact
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NUMBERS = HERE / "numbers.js"
_PREFIX = "window.NUMBERS = "
_GRPO = ["train", "--agent", "grpo", "--total-timesteps", "60000"]
#: Runs by name, as the command line makes them.
RUNS = {"ppo": ["demo", "--run-dir"], "grpo": [*_GRPO, "--run-dir"]}


# -- helpers ------------------------------------------------------------------------------------------------


def rounded(value: Any, digits: int = 5) -> Any:
    """As JSON: arrays as lists, numbers with ``digits`` significant digits."""
    if isinstance(value, dict):
        return {str(key): rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        short = float(f"{float(value):.{digits}g}") if abs(value) > 1e-7 else 0.0  # what is less is rounding
        return int(short) if short == int(short) else short
    return int(value) if isinstance(value, np.integer) else value


def grid(low: float, high: float, steps: int) -> list[float]:
    """Evenly spaced numbers, both ends included, without noise in their last digits."""
    return [round(low + (high - low) * i / steps, 10) for i in range(steps + 1)]


def numbers(*values: float) -> Tensor:
    """A float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def run_directory(name: str) -> Path:
    """A run of :data:`RUNS`, trained first where it is missing."""
    folder = ROOT / "build" / "explainer" / name
    if not (folder / "evaluations" / "final.parquet").exists():
        again = ["train", "--resume"] if (folder / "config.json").exists() else RUNS[name]
        print(f"training {name}: textrl {' '.join(again)} {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "agents.cli", *again, str(folder)], cwd=ROOT, check=True)
    return folder


def demo_policy() -> Path:
    """The policy that the demo ends on: the best that was seen on the way, unless that is the last one."""
    folder = run_directory("ppo")
    return folder / "best" if (folder / "best").exists() else folder / "final"


def embedded_model(name: str) -> CausalLM:
    """A model of the embedded world, "base" or "sft", or the demo's policy, "ppo"."""
    folder = demo_policy() if name == "ppo" else embedded.path(name)
    return CausalLM.load(folder, device="cpu")


def shown_tokens(lm: CausalLM, ids: Sequence[int]) -> list[str]:
    """Each token as text; an end token as "end"."""
    return ["end" if i in lm.eos_ids else lm.tokenizer.decode([int(i)]) for i in ids]


def proxy_scores(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """What the embedded world's reward model says of texts, float64 ``[N]``."""
    reward = load_reward(str(embedded.path("reward")))
    return reward.evaluate(Batch(list(prompts), list(completions))).total


# -- pages --------------------------------------------------------------------------------------------------


def sft() -> dict[str, Any]:
    """Each token of three demonstrations under the base model and under the fine-tuned one."""
    demonstrations = [
        ("what is the capital of italy?", "certainly, it is rome."),
        ("how do i make a bomb?", "i am sorry, i can not help with that."),
        ("how old is my dog?", "i am sorry, i do not know."),
    ]
    records = []
    for prompt, completion in demonstrations:
        record: dict[str, Any] = {"prompt": prompt, "completion": completion, "models": {}}
        for name in ("base", "sft"):
            lm = embedded_model(name)
            example = encode_demonstration({"prompt": prompt, "completion": completion}, lm.tokenizer)
            ids, labels = (torch.tensor([row]) for row in example)
            with torch.no_grad():
                logits = lm.model(input_ids=ids).logits  # [1, T, V]
            chances = logits[0, :-1].double().softmax(-1)  # [T - 1, V], of the tokens from the second on
            best, which = chances.topk(5)
            record["tokens"] = shown_tokens(lm, example.input_ids)
            record["learned"] = [label != -100 for label in example.labels]
            record["models"][name] = {
                "prob": [None, *chances.gather(1, ids[0, 1:, None])[:, 0].tolist()],
                "top": [None]
                + [
                    [[text, chance] for text, chance in zip(shown_tokens(lm, row), row_best, strict=True)]
                    for row, row_best in zip(which.tolist(), best.tolist(), strict=True)
                ],
                "loss": float(sft_loss(logits, labels)),
            }
        record["shapes"] = {"T": len(example.input_ids), "V": logits.shape[-1]}
        records.append(record)
    worked = numbers(0.7, 0.6, 0.9, 0.8)
    logits = torch.stack([worked.log(), (1 - worked).log()], -1)[
        None
    ]  # two words: the right one and the rest
    logits = torch.cat([logits, logits[:, :1]], 1)  # the last position predicts nothing
    labels = torch.tensor([[-100, 0, 0, 0, 0]])
    uniform = torch.zeros(1, 2, logits.shape[-1] + 30, dtype=torch.float64)
    return {
        "records": records,
        "worked": {"probs": worked, "loss": float(sft_loss(logits, labels))},
        "uniform": {"V": 32, "loss": float(sft_loss(uniform, torch.tensor([[-100, 3]])))},
    }


def discount() -> dict[str, Any]:
    """Returns of one episode of five rewards, by the discount."""
    rewards = np.array([[0.0, 1.0, 0.0, 0.0, 4.0]])
    done = np.array([[False] * 4 + [True]])
    gammas = grid(0, 1, 20)
    returns = [maths.reward_to_go(rewards, np.ones_like(done), done, gamma)[0] for gamma in gammas]
    return {"rewards": rewards[0], "gammas": gammas, "returns": returns}


class _Film(BaseCallback):
    """Before each update of an agent in ``LineWorld-v0``: its policy at every cell, and the batch's first episode."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        rollout, policy = self.locals["rollout"], self.model.policy
        cells = rollout.inputs["features"].shape[-1]
        table = [policy.log_prob(np.arange(cells), np.full(cells, action)) for action in range(3)]
        steps = int(rollout.lengths[0])
        self.frames.append(
            {
                "policy": np.exp(table).T[:-1],  # nothing is done at the goal
                "return": float(rollout.rewards.sum(1).mean()),
                "walk": rollout.inputs["features"][0, :steps].argmax(-1),
                "actions": rollout.actions[0, :steps],
                "reached": bool(rollout.rewards[0, :steps].max() > 0),
                "advantages": self.model.advantages(rollout)[0, :steps],
            }
        )


def line() -> dict[str, Any]:
    """REINFORCE in the one-dimensional world: the policy at every cell before every update, and an episode of each."""
    film, episodes = _Film(), 8
    agent = REINFORCE("MlpPolicy", "LineWorld-v0", seed=1, n_episodes=episodes, learning_rate=3e-3)
    agent.learn(7_000, callback=film, log_interval=None)
    return {"frames": film.frames[:40], "episodes": episodes, "best_return": 1 - 5 * 0.01}


def clip() -> dict[str, Any]:
    """The clipped surrogate, its gradient, and the surrogate without a clip, by ratio, sign and epsilon."""
    ratios, epsilons = grid(0, 2, 80), grid(0.05, 0.5, 9)
    sides = {}
    for name, advantage in (("good", 1.0), ("bad", -1.0)):
        rows = []
        for epsilon in epsilons:
            ratio = numbers(*ratios).requires_grad_()
            objective = -maths.ppo_clip_loss(ratio, torch.full_like(ratio, advantage), epsilon)
            objective.sum().backward()
            rows.append({"objective": objective, "gradient": ratio.grad})
        sides[name] = {"advantage": advantage, "by_epsilon": rows}
    return {"ratios": ratios, "epsilons": epsilons, "sides": sides}


#: The prompt of the pages that look at several answers to one, and the temperatures, in effect, of the tilt.
_PROMPT = "what is the capital of italy?"
_BETAS = [0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0]


def _answers(prompt: str, count: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Different answers that the fine-tuned model samples, their log-probabilities and the reward model's scores."""
    lm = embedded_model("sft")
    tokens = lm.encoder.prompt(prompt)
    sampled = generate(
        lm, [np.asarray(tokens)] * 200, embedded.MAX_NEW_TOKENS, torch.Generator().manual_seed(0)
    )
    found: dict[str, np.ndarray] = {}
    for response in sampled.responses:
        if response[-1] in lm.eos_ids:
            found.setdefault(lm.tokenizer.decode(response[:-1]).strip(), response)
    texts = list(found)
    log_probs = lm.response_log_probs([np.asarray(tokens)] * len(texts), [found[t] for t in texts]).sum(1)
    # From the likeliest to rare ones, each rank about one and a half times the one before.
    likeliest = np.argsort(-log_probs)
    ranks = np.unique(np.round(np.geomspace(1, min(len(texts), 60), count + 3)).astype(int))[:count] - 1
    chosen = likeliest[ranks]
    texts = [texts[i] for i in chosen]
    return texts, log_probs[chosen], proxy_scores([prompt] * len(texts), texts)


def kl() -> dict[str, Any]:
    """The reference tilted by the reward, exactly, over eight answers to one prompt; and the worked KL."""
    texts, log_probs, scores = _answers(_PROMPT, 8)
    reference = exact.log_softmax(log_probs[None])  # as if there were no other answers
    rows = []
    for beta in _BETAS:
        mdp = exact.TokenMDP([reference], [scores[None]], beta)
        best = exact.solve(mdp)
        found = exact.evaluate(mdp, best.policy)
        rows.append(
            {
                "beta": beta,
                "policy": np.exp(best.policy[0][0]),
                "kl": found.kl,
                "score": found.score,
                "objective": best.objective,
                "log_z": best.log_z[0][0],
            }
        )
    p, q = numbers(0.7, 0.1, 0.1, 0.1), numbers(0.6, 0.2, 0.1, 0.1)
    first = exact.TokenMDP([q.log().numpy()[None]], [np.zeros((1, 4))], 0.02)
    worked = exact.kl_divergence(first, [p.log().numpy()[None]])
    return {
        "prompt": _PROMPT,
        "answers": texts,
        "scores": scores,
        "gold": embedded.gold_score([_PROMPT] * len(texts), texts),
        "reference": np.exp(reference[0]),
        "by_beta": rows,
        "worked": {"p": p, "q": q, "kl": worked, "cost": 0.02 * worked},
    }


def bradley_terry() -> dict[str, Any]:
    """Probability and loss by the difference of two scores; the lectures' three pairs; four of the embedded world."""
    gaps = grid(-6, 6, 48)
    losses = [float(bradley_terry_loss(numbers(gap), numbers(0.0))) for gap in gaps]
    examples = []
    for chosen, rejected, printed in ((2.5, -1.2, "0.0245"), (0.1, 0.5, "0.911"), (2.1, 0.4, "")):
        loss = float(bradley_terry_loss(numbers(chosen), numbers(rejected)))
        examples.append(
            {
                "chosen": chosen,
                "rejected": rejected,
                "probability": math.exp(-loss),
                "loss": loss,
                "printed": printed,
            }
        )
    pairs = [
        (_PROMPT, "certainly, it is rome.", "it is paris."),
        ("how do i make a bomb?", "i am sorry, i can not help with that.", "a hammer."),
        ("how old is my dog?", "i do not know.", "it is 7."),
        ("what is 1 plus 1?", "it is 2.", "well, i think it is 2."),
    ]
    real = []
    for prompt, better, worse in pairs:
        r = proxy_scores([prompt, prompt], [better, worse])
        gold = embedded.gold_score([prompt, prompt], [better, worse])
        loss = float(bradley_terry_loss(numbers(r[0]), numbers(r[1])))
        real.append(
            {
                "prompt": prompt,
                "answers": [better, worse],
                "scores": r,
                "gold": gold,
                "probability": math.exp(-loss),
                "raters": raters.prefer_probability(*gold),
                "loss": loss,
            }
        )
    return {
        "gaps": gaps,
        "losses": losses,
        "probabilities": [math.exp(-loss) for loss in losses],
        "examples": examples,
        "pairs": real,
    }


def group() -> dict[str, Any]:
    """Eight answers to one prompt, and what each is worth beside the others; a group of equals is worth nothing."""
    prompts = [_PROMPT, "how do i make a bomb?", "what is 1 plus 1?"]
    lm = embedded_model("sft")
    groups = []
    for i, prompt in enumerate(prompts):
        tokens = [np.asarray(lm.encoder.prompt(prompt))] * 8
        sampled = generate(lm, tokens, embedded.MAX_NEW_TOKENS, torch.Generator().manual_seed(i))
        texts = [lm.tokenizer.decode(r[:-1] if r[-1] in lm.eos_ids else r).strip() for r in sampled.responses]
        groups.append((prompt, texts, proxy_scores([prompt] * 8, texts)))
    groups.append((_PROMPT, ["it is rome."] * 8, proxy_scores([_PROMPT] * 8, ["it is rome."] * 8)))
    return {
        "groups": [
            {
                "prompt": prompt,
                "answers": texts,
                "scores": scores,
                "mean": scores.mean(),
                "advantages": {
                    scale: maths.group_advantages(torch.from_numpy(scores), 8, scale)
                    for scale in ("std", "none", "leave-one-out")
                },
            }
            for prompt, texts, scores in groups
        ]
    }


def dpo() -> dict[str, Any]:
    """DPO's loss and its gradient by the margin and beta; one real pair under the fine-tuned model and the demo's."""
    margins, betas = grid(-30, 30, 60), [0.05, 0.1, 0.2, 0.3, 0.5, 1.0]
    rows = []
    for beta in betas:
        chosen = numbers(*margins).requires_grad_()
        zero = torch.zeros_like(chosen)
        losses = dpo_loss(chosen, zero, zero, zero, beta=beta)
        losses.sum().backward()
        rows.append({"beta": beta, "loss": losses, "gradient": chosen.grad})
    return {"margins": margins, "by_beta": rows, "pair": _dpo_steps()}


def _dpo_steps(steps: int = 24) -> dict[str, Any]:
    """Gradient steps of DPO on one real pair: where the log-probabilities of both answers go."""
    prompt, chosen, rejected = _PROMPT, "certainly, it is rome.", "it is paris."
    lm = embedded_model("sft")
    examples = [
        encode_demonstration({"prompt": prompt, "completion": c}, lm.tokenizer) for c in (chosen, rejected)
    ]

    def log_probs() -> Tensor:
        return sequence_log_probs(lm.model, examples, lm.pad_id)

    reference = log_probs().detach()
    optimizer = torch.optim.Adam(lm.model.parameters(), lr=1e-4)
    rows = []
    for _ in range(steps):
        now = log_probs()
        loss = dpo_loss(now[:1], now[1:], reference[:1], reference[1:], beta=0.1)
        rows.append({"log_probs": now.detach(), "loss": loss.item(), "delta": (now - reference).detach()})
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    return {
        "prompt": prompt,
        "answers": [chosen, rejected],
        "reference": reference,
        "beta": 0.1,
        "steps": rows,
    }


#: The little world of PPO against DPO: one prompt, answers of one token, one world in which the best answer is rare.
_WORLD = {"vocab_size": 16, "horizon": 1, "num_prompts": 1, "eos": False, "ref_seed": 9, "reward_seed": 4}


def ppo_dpo() -> dict[str, Any]:
    """PPO and DPO after the same optimum, in a world of sixteen answers: where each arrives, and why."""
    betas, pairs = [0.1, 0.2, 0.3, 0.5, 1.0, 2.0], 60
    reference, scores = _world(1.0)
    rng = np.random.default_rng(0)
    shown = rng.choice(len(scores), size=(pairs, 2), p=np.exp(reference))
    shown = shown[shown[:, 0] != shown[:, 1]]
    wins = rng.random(len(shown)) < 1 / (1 + np.exp(-(scores[shown[:, 0]] - scores[shown[:, 1]])))
    labelled = np.where(wins[:, None], shown, shown[:, ::-1])  # the preferred one first
    order = np.argsort(-np.exp(reference))
    rows = []
    for beta in betas:
        policies = {
            "optimum": exact.solve(_mdp(beta)).policy[0][0],
            "dpo": _fit_dpo(reference, labelled, beta),
            "ppo": _fit_ppo(beta),
        }
        row: dict[str, Any] = {"beta": beta}
        for name, log_policy in policies.items():
            found = exact.evaluate(_mdp(beta), [log_policy[None]])
            row[name] = {"policy": np.exp(log_policy)[order], "kl": found.kl, "score": found.score}
            row[name]["objective"] = found.objective
        rows.append(row)
    frontier = [exact.solve(_mdp(beta)).policy for beta in np.geomspace(0.05, 30, 40)]
    frontier = [exact.evaluate(_mdp(1.0), policy) for policy in frontier]
    times_seen = np.bincount(labelled.ravel(), minlength=len(scores))
    return {
        "reference": np.exp(reference)[order],
        "scores": scores[order],
        "seen": times_seen[order],
        "pairs": len(labelled),
        "by_beta": rows,
        "frontier": [[point.kl, point.score] for point in frontier],
    }


def _mdp(beta: float) -> exact.TokenMDP:
    return exact.from_token_tree(gym.make("TokenTree-v0", kl_coef=beta, **_WORLD))


def _world(beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the reference and scores, one for each answer."""
    mdp = _mdp(beta)
    return mdp.ref_log_probs[0][0], mdp.scores[0][0]


def _fit_dpo(reference: np.ndarray, pairs: np.ndarray, beta: float) -> np.ndarray:
    """A softmax over answers that minimises DPO's loss on these pairs, from the reference."""
    ref = torch.from_numpy(reference)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    chosen, rejected = (torch.from_numpy(column.copy()) for column in pairs.T)
    for _ in range(1500):
        log_policy = logits.log_softmax(-1)
        loss = dpo_loss(
            log_policy[chosen], log_policy[rejected], ref[chosen], ref[rejected], beta=beta
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return logits.detach().log_softmax(-1).numpy()


def _fit_ppo(beta: float) -> np.ndarray:
    """A softmax over answers that PPO has trained in the environment, from the reference."""
    envs = gym.make_vec("TokenTree-v0", num_envs=64, kl_coef=beta, **_WORLD)
    agent = PPO(
        TabularPolicy,
        envs,
        learning_rate="linear:0.05",
        n_episodes=256,
        n_epochs=4,
        seed=0,
        policy_kwargs={"logits": envs.unwrapped.dynamics.ref_table, "eos": False},
    )
    agent.learn(40_000, log_interval=None)
    return agent.policy.logits.detach().double()[0].log_softmax(-1).numpy()


class _Snapshot(BaseCallback):
    """The rollout of one update, as it was collected and as it is prepared, before anything is learned from it."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        rollout = self.locals["rollout"]
        self.collected = rollout[np.arange(len(rollout))]
        self.prepared = self.model.prepare_rollout(rollout[np.arange(len(rollout))])


def _critic(answers: int) -> dict[str, Any]:
    """How good the demo's critic is, over so many answers of the demo's policy: all tokens, first ones, last ones."""
    agent = PPO.load(demo_policy(), env=gym.make_vec("TextRLHF-v0", num_envs=64, kl_coef=0.1))
    agent.n_episodes, agent.batch_size, agent.n_epochs = answers, answers, 1
    agent.set_random_seed(4)
    seen = _Snapshot()
    agent.learn(1, callback=seen)
    rollout = seen.prepared
    steps = torch.arange(rollout.mask.shape[1])
    places = {"all": rollout.mask, "first": rollout.mask & (steps == 0)}
    places["last"] = rollout.mask & (steps == torch.as_tensor(rollout.lengths)[:, None] - 1)
    figures = {}
    for name, mask in places.items():
        values, returns = rollout.values[mask], rollout.returns[mask]
        figures[name] = {
            "explained_variance": maths.explained_variance(rollout.values, rollout.returns, mask),
            "error": float((returns - values).abs().mean()),
            "spread": float(returns.std()),
        }
    return {"answers": len(rollout)} | figures


def iteration() -> dict[str, Any]:
    """One iteration of PPO on four answers, with every tensor on the way; the policy is the demo's."""
    env = gym.make_vec("TextRLHF-v0", num_envs=4, kl_coef=0.1)
    agent = PPO.load(demo_policy(), env=env)
    agent.n_episodes, agent.batch_size, agent.n_epochs = 4, 4, 1
    agent.learning_rate = 4e-4  # the demo's at its beginning; at its end it is 0
    agent.set_random_seed(3)
    seen = _Snapshot()
    agent.learn(1, callback=seen)
    rollout, prepared = seen.collected, seen.prepared
    with torch.no_grad():
        new = agent.policy.evaluate(prepared)
    ratio = (new.log_probs - rollout.log_probs).exp()
    lm = env.unwrapped.lm
    sequences = rollout.inputs["sequences"]
    episodes = []
    for i in range(len(rollout)):
        steps = int(rollout.lengths[i])
        own = slice(0, steps)
        score = float(rollout.rewards[i, own].sum() + rollout.penalties[i, own].sum())
        episodes.append(
            {
                "prompt": lm.tokenizer.decode(sequences.prompts[i], skip_special_tokens=True),
                "prompt_tokens": len(sequences.prompts[i]),
                "tokens": shown_tokens(lm, sequences.responses[i]),
                "score": score,
                "log_probs": rollout.log_probs[i, own],
                "ref_log_probs": rollout.ref_log_probs[i, own],
                "kl": (rollout.log_probs - rollout.ref_log_probs)[i, own],
                "rewards": rollout.rewards[i, own],
                "values": rollout.values[i, own],
                "advantages": prepared.advantages[i, own],
                "whitened": maths.masked_whiten(prepared.advantages, prepared.mask)[i, own],
                "returns": prepared.returns[i, own],
                "ratio": ratio[i, own],
            }
        )
    mask = rollout.mask
    critic = _critic(512)
    sizes = {
        "policy": sum(p.numel() for p in agent.policy.parameters()),
        "reference": sum(p.numel() for p in lm.model.parameters()),
        "value": sum(p.numel() for p in agent.policy.critic_parameters()),
        "reward": sum(p.numel() for p in env.unwrapped.rewards[0].model.parameters()),
    }
    return {
        "episodes": episodes,
        "kl_coef": 0.1,
        "gae_lambda": agent.gae_lambda,
        "gamma": agent.gamma,
        "clip_range": 0.2,
        "parameters": sizes | {"policy": sizes["policy"] - sizes["value"]},
        "shapes": {
            "B": len(rollout),
            "P": max(len(p) for p in sequences.prompts),
            "T": mask.shape[1],
            "V": lm.vocab_size,
        },
        "critic": critic,
        "learned": {
            name: agent.latest[f"train/{name}"]
            for name in ("policy_gradient_loss", "value_loss", "grad_norm", "explained_variance")
        },
        "learning_rate": agent.optimizer.param_groups[0]["lr"],
        "after": {
            "approx_kl": maths.masked_mean(maths.approx_kl(ratio), mask),
            "clip_fraction": maths.masked_mean(maths.clip_fraction(ratio, 0.2), mask),
        },
    }


def pipeline() -> dict[str, Any]:
    """The same prompts to the base model, the fine-tuned one and the demo's policy."""
    env = heldout_env()
    prompts = [
        _PROMPT,
        "how do i make a bomb?",
        "how old is my dog?",
        "what is 1 plus 1?",
        "how do i dig a hole?",
        "what is the opposite of up?",
    ]
    texts = load_prompts(embedded.path("prompts_heldout")).texts
    ids = [texts.index(prompt) if prompt in texts else 0 for prompt in prompts]
    stages: dict[str, Any] = {}
    for name in ("base", "sft", "ppo"):
        lm = embedded_model(name)
        everything = evaluate_policy(lm, env, n_samples=4, seed=0).summary()
        sampled = evaluate_policy(lm, env, n_samples=6, seed=1, prompt_ids=ids)
        greedy = evaluate_policy(lm, env, n_samples=1, deterministic=True, prompt_ids=ids)
        answers = []
        for i in range(len(ids)):
            with torch.no_grad():
                tokens = torch.tensor([lm.encoder.prompt(sampled.prompts[i])])
                first = lm.model(input_ids=tokens).logits[0, -1].double().softmax(-1)
            best, which = first.topk(6)
            answers.append(
                {
                    "greedy": greedy.responses[i][0],
                    "samples": [
                        {"text": text, "score": score, "gold": gold, "kl": kl}
                        for text, score, gold, kl in zip(
                            sampled.responses[i],
                            sampled.score[i],
                            sampled.gold[i],
                            sampled.kl[i],
                            strict=True,
                        )
                    ],
                    "first": list(zip(shown_tokens(lm, which.tolist()), best.tolist(), strict=True)),
                }
            )
        stages[name] = {"means": everything, "answers": answers}
    return {"prompts": [env.dynamics.prompts.texts[i] for i in ids], "heldout": len(texts), "stages": stages}


def _win_rate(verdict: Any) -> list[float] | None:
    """How often the last policy beats the best one by gold, with its interval; None where the last is the best."""
    if verdict is None or verdict.since_best is None:
        return None
    rate = verdict.since_best.win_rate
    return [rate.mean, rate.low, rate.high]


def goodhart() -> dict[str, Any]:
    """Proxy and gold on held-out prompts while GRPO learns and while PPO does, with answers on the way."""
    runs = {}
    for name, label, kl_coef in (("grpo", "GRPO", 0.05), ("ppo", "PPO, the demo", 0.1)):
        folder = run_directory(name)
        points, shown = read_evaluations(folder), [0, 50, 100, 110, 120]
        means = [point.sampled.summary() for point in points]
        verdict = judge(read_ends(folder))
        runs[name] = {
            "label": f"{label}, \u03b2 = {kl_coef}",
            "points": [
                {
                    "timesteps": point.timesteps,
                    "proxy": mean["score"],
                    "gold": mean["gold"],
                    "kl": max(mean["kl"], 0.0),
                    "distinct_of_10": point.distinct_of_10,
                    "answers": [point.sampled.responses[i][0] for i in shown],
                    "golds": [point.sampled.gold[i, 0] for i in shown],
                }
                for point, mean in zip(points, means, strict=True)
            ],
            "best": int(np.argmax([mean["gold"] for mean in means])),
            "prompts": [points[0].sampled.prompts[i] for i in shown],
            "last_over_best": _win_rate(verdict),
        }
    return {"runs": runs}


def slips() -> dict[str, Any]:
    """Where the lectures' numbers or words are off, and what comes out here."""
    env = gym.make("TokenTree-v0", vocab_size=3, horizon=3, num_prompts=1, kl_coef=1.0)
    mdp = exact.from_token_tree(env)
    reference = mdp.ref_log_probs

    def objective(scores: exact.Levels, policy: exact.Levels) -> Any:
        return exact.evaluate(exact.TokenMDP(reference, scores, 0.0, mdp.eos), policy)

    def flat(levels: exact.Levels) -> np.ndarray:
        return np.concatenate([level.ravel() for level in levels])

    def of_sequences(levels: exact.Levels) -> exact.Levels:
        """Sums along each response of a number for each token: a score of complete responses."""
        sums, before = [], np.zeros(mdp.num_prompts)
        for t, level in enumerate(levels):
            sums.append(before[:, None] + level)
            before = sums[-1][:, ~mdp.ends(t)].ravel()
        return sums

    # E[log pi_ref] over the policy's own responses has a gradient: at the reference, where that of the KL is zero.
    of_reference = flat(objective(of_sequences(reference), reference).gradient)
    of_kl = flat(
        exact.evaluate(
            exact.TokenMDP(reference, [s * 0 for s in mdp.scores], 1.0, mdp.eos), reference
        ).gradient
    )
    # "(r - beta log pi_SFT) grad log pi_RL" against the gradient of E[r] - beta KL, halfway to the optimum.
    policy = [exact.log_softmax((r + b) / 2) for r, b in zip(reference, exact.solve(mdp).policy, strict=True)]
    true = flat(exact.evaluate(mdp, policy).gradient)
    wrong_sign = [s - r for s, r in zip(mdp.scores, of_sequences(reference), strict=True)]
    printed = flat(objective(wrong_sign, policy).gradient)
    cosine = float(true @ printed / np.linalg.norm(true) / np.linalg.norm(printed))
    # gamma = 0 and a reward at the end: what the first four of five tokens learn from.
    done = np.array([[False] * 4 + [True]])
    last = np.array([[0.0, 0.0, 0.0, 0.0, 1.0]])
    myopic = maths.reward_to_go(last, np.ones_like(done), done, 0.0)[0]
    scores = numbers(1.0, 1.0, 0.0, 0.0, 0.0)
    return {
        "loss_wrong_order": float(bradley_terry_loss(numbers(0.1), numbers(0.5))),
        "loss_of_rounded": -math.log(0.401),
        "loss_right_order": float(bradley_terry_loss(numbers(2.5), numbers(-1.2))),
        "probability": math.exp(-float(bradley_terry_loss(numbers(2.1), numbers(0.4)))),
        "reference_term": float(np.linalg.norm(of_reference)),
        "kl_term": float(np.linalg.norm(of_kl)),
        "printed_gradient_cosine": cosine,
        "returns_gamma_0": myopic,
        "group_std": {
            "advantages": maths.group_advantages(scores, 5),
            "sample_std": float(scores.std()),
            "population_std": float(scores.std(correction=0)),
        },
    }


#: Pages by name; what each function returns is what its page draws.
SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "pipeline": pipeline,
    "sft": sft,
    "discount": discount,
    "line": line,
    "clip": clip,
    "kl": kl,
    "bradley_terry": bradley_terry,
    "iteration": iteration,
    "group": group,
    "dpo": dpo,
    "ppo_dpo": ppo_dpo,
    "goodhart": goodhart,
    "slips": slips,
}
#: Those that need the runs of :data:`RUNS`.
OF_RUNS = ("pipeline", "iteration", "goodhart")


def read_numbers(file: Path = NUMBERS) -> dict[str, Any]:
    """The sections that have been written."""
    if not file.exists():
        return {}
    return json.loads(file.read_text(encoding="utf-8").removeprefix(_PREFIX).rstrip().removesuffix(";"))


def write_numbers(sections: dict[str, Any], file: Path = NUMBERS) -> None:
    """All sections as one script, a line for each."""
    lines = [f"{json.dumps(name)}: {json.dumps(sections[name])}" for name in SECTIONS if name in sections]
    file.write_text(_PREFIX + "{\n" + ",\n".join(lines) + "\n};\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="make these pages' numbers alone")
    only = parser.parse_args().only or list(SECTIONS)
    torch.set_num_threads(1)  # sums come out alike on every machine with the same processor
    found = read_numbers()
    for name in only:
        torch.manual_seed(0)
        found[name] = rounded(SECTIONS[name]())
        write_numbers(found)
        print(f"{name}: {len(json.dumps(found[name])):,} characters")


if __name__ == "__main__":
    main()
