"""What makes a policy gradient noisy, what makes it wrong, and what the clip is for.

Three questions in small ``TokenTree-v0`` worlds, whose gradient, values and optimum are known exactly. How noisy is the
gradient of one rollout of 64 episodes under each baseline? How far is an advantage by GAE or n-step returns from the
true one, where the critic errs? And what becomes of PPO without its clip, the more epochs it makes of a rollout?

Left out: language models, where none of the three is known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.frame import ROOT, Job, markdown, mean_and_error

SEEDS = 5
#: Rollouts that the noise of a gradient is measured over.
BATCHES = 150
#: The tree in which advantages are compared, and the standard deviation of the critic's error.
ADVANTAGES = {"vocab_size": 3, "horizon": 6, "num_prompts": 2, "eos": False, "kl_coef": 0.1}
ERROR = 0.5
LAMBDAS, STEPS = (0.0, 0.5, 0.8, 0.9, 0.95, 1.0), (1, 2, 3, 4, 6)
#: The tree in which PPO learns, for how long, its epochs, and clips; the last is none.
LEARNING = {"vocab_size": 5, "horizon": 4, "num_prompts": 2, "eos": True, "kl_coef": 0.1}
TOKENS, EPOCHS, CLIPS = 12_000, (1, 4, 16), (0.2, 1e9)


def jobs(seeds: int) -> list[Job]:
    """The gradient's noise once, the others for each tree."""
    found = [Job("variance-baselines", _baselines)]
    for seed in range(seeds):
        found.append(Job(f"variance-advantages-{seed}", partial(advantages, seed), seed))
        for epochs in EPOCHS:
            found += [
                Job(_clip_name(epochs, clip, seed), partial(_clip, epochs, clip, seed), seed)
                for clip in CLIPS
            ]
    return found


# -- baselines --------------------------------------------------------------------------------------------------


def _baselines(arrays: Path) -> dict[str, Any]:
    """Relative bias and relative noise of the first gradient step after a rollout."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gradients

    from agents import REINFORCE, RLOO

    torch.set_num_threads(1)
    made: dict[str, Callable[[], Any]] = {
        "none": lambda: gradients.make_agent(REINFORCE, baseline="none", gamma=1.0),
        "mean of the other episodes": lambda: gradients.make_agent(REINFORCE, gamma=1.0),
        "mean of the others of a group of 8 (RLOO)": lambda: gradients.make_agent(RLOO),
        "exact critic, lambda 1": lambda: gradients.make_ppo(1.0, "exact"),
        "exact critic, lambda 0.95": lambda: gradients.make_ppo(0.95, "exact"),
        "exact critic, lambda 0": lambda: gradients.make_ppo(0.0, "exact"),
        "wrong critic, lambda 1": lambda: gradients.make_ppo(1.0, "wrong"),
        "wrong critic, lambda 0.95": lambda: gradients.make_ppo(0.95, "wrong"),
        "wrong critic, lambda 0": lambda: gradients.make_ppo(0.0, "wrong"),
    }
    found = {}
    for name, make in made.items():
        agent = make()
        scale = 1 if isinstance(agent, RLOO) else agent.envs.unwrapped.dynamics.horizon
        each = scale * np.stack(
            [gradients.step_gradient(agent, r) for r in gradients.collect(agent, BATCHES)]
        )
        target = np.concatenate(gradients.truth(agent).gradient).ravel()
        noise = np.sqrt(each.var(0, ddof=1).sum()) / np.linalg.norm(target)
        compared = gradients.compare(each, target)
        found[name] = {"noise": float(noise), "bias": compared.bias, "z": compared.z}
    return found


# -- advantages -------------------------------------------------------------------------------------------------


def advantages(seed: int, arrays: Path) -> dict[str, Any]:
    """Bias and standard deviation of advantage estimates over every response of a tree, without any sampling."""
    import gymnasium as gym

    from agents.algorithms.maths import gae
    from textrl_env.exact import solver

    env = gym.make_vec("textrl_env:TokenTree-v0", num_envs=1, **ADVANTAGES, ref_seed=seed, reward_seed=seed)
    mdp = solver.from_token_tree(env)
    rng = np.random.default_rng([seed, 3])
    policy = [solver.log_softmax(rng.standard_normal(level.shape)) for level in mdp.ref_log_probs]
    exact = solver.evaluate(mdp, policy)
    noisy = [value + ERROR * rng.standard_normal(value.shape) for value in exact.value]
    rows, tokens, chance = every_response(policy)
    horizon = len(policy)
    cost = np.stack([(policy[t] - mdp.ref_log_probs[t])[rows[t], tokens[t]] for t in range(horizon)], 1)
    rewards = -mdp.kl_coef * cost
    rewards[:, -1] += mdp.scores[-1][rows[-1], tokens[-1]]
    values = np.stack([noisy[t][rows[t]] for t in range(horizon)], 1)
    following = np.concatenate([values[:, 1:], np.zeros((len(values), 1))], 1)
    mask = np.ones(values.shape, bool)
    done = np.zeros(values.shape, bool)
    done[:, -1] = True
    true = [exact.advantages[t][rows[t], tokens[t]] for t in range(horizon)]
    estimates = {f"lambda {x:g}": gae(rewards, values, following, mask, done, 1.0, x) for x in LAMBDAS}
    estimates |= {f"n = {n}": n_step(rewards, values, following, n) for n in STEPS}
    return {
        name: dict(zip(("bias", "std"), _errors(estimate, true, rows, tokens, chance, policy), strict=True))
        for name, estimate in estimates.items()
    }


def every_response(policy: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Every response of a tree without an end token: rows and tokens ``[B]`` of each step, and chances ``[B]``."""
    prompts, size = policy[0].shape
    horizon = len(policy)
    response = np.arange(prompts * size**horizon)
    tokens = [response // size ** (horizon - 1 - t) % size for t in range(horizon)]
    rows = [response // size ** (horizon - t) for t in range(horizon)]
    log_probs = sum(policy[t][rows[t], tokens[t]] for t in range(horizon))
    return rows, tokens, np.exp(log_probs) / prompts


def n_step(rewards: np.ndarray, values: np.ndarray, following: np.ndarray, n: int) -> np.ndarray:
    """``r_t + ... + r_{t+n-1} + V(s_{t+n}) - V(s_t)``, the sum of n errors of one step, ``[B, T]``."""
    delta = rewards + following - values
    padded = np.concatenate([delta, np.zeros((len(delta), n))], 1)
    return sum(padded[:, k : k + delta.shape[1]] for k in range(n))


def _errors(
    estimate: np.ndarray,
    true: list[np.ndarray],
    rows: list[np.ndarray],
    tokens: list[np.ndarray],
    chance: np.ndarray,
    policy: list[np.ndarray],
) -> tuple[float, float]:
    """Root mean square of the bias and of the noise, over visited states and actions.

    What is the same for all actions of a state is no bias: it leaves the gradient alone.
    """
    bias = noise = 0.0
    for t, level in enumerate(policy):
        flat = rows[t] * level.shape[1] + tokens[t]
        mass = np.bincount(flat, chance, level.size)
        error = estimate[:, t] - true[t]
        mean = np.bincount(flat, chance * error, level.size) / mass
        square = np.bincount(flat, chance * error**2, level.size) / mass
        noise += float((mass * (square - mean**2)).sum())
        mean = mean.reshape(level.shape)
        centred = mean - (np.exp(level) * mean).sum(1, keepdims=True)
        bias += float((mass.reshape(level.shape) * centred**2).sum())
    return float(np.sqrt(bias / len(policy))), float(np.sqrt(max(noise, 0.0) / len(policy)))


# -- clipping ---------------------------------------------------------------------------------------------------


def _clip_name(epochs: int, clip: float, seed: int) -> str:
    return f"variance-clip-{'on' if clip < 1 else 'off'}-{epochs}-{seed}"


def _clip(epochs: int, clip: float, seed: int, arrays: Path) -> dict[str, Any]:
    """The share of the optimum that PPO reaches, and how far an update moved it."""
    import gymnasium as gym
    import torch

    from agents import PPO, TabularPolicy
    from agents.callbacks.exact_gap import policy_log_probs
    from textrl_env.exact import solver

    torch.set_num_threads(1)
    env = gym.make_vec("textrl_env:TokenTree-v0", num_envs=32, **LEARNING, ref_seed=seed, reward_seed=seed)
    kwargs = {"logits": env.unwrapped.dynamics.ref_table, "eos": LEARNING["eos"]}
    agent = PPO(
        TabularPolicy, env, policy_kwargs=kwargs, seed=seed, n_episodes=64, batch_size=None, n_epochs=epochs,
        learning_rate=0.1, gamma=1.0, clip_range=clip,
    )  # fmt: skip
    mdp = solver.from_token_tree(agent.envs)
    reference, best = solver.evaluate(mdp, mdp.ref_log_probs).objective, solver.solve(mdp).objective
    shares, moved = [], []
    train = agent.train

    def watched(rollout: Any) -> None:
        train(rollout)
        mine = solver.evaluate(mdp, policy_log_probs(agent.policy, agent.envs)).objective
        shares.append((mine - reference) / (best - reference))
        moved.append(float(agent.logger.name_to_value.get("train/approx_kl", np.nan)))

    agent.train = watched
    agent.learn(TOKENS, log_interval=None)
    return {"shares": shares, "approx_kl": float(np.nanmean(moved))}


# -- the page ---------------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """The three questions, each a table."""
    parts = []
    if "variance-baselines" in results:
        rows = [
            [name, f"{each['noise']:.2f}", f"{each['bias']:.2f}" if each["z"] > 3 else "none"]
            for name, each in results["variance-baselines"].items()
        ]
        parts.append(markdown(["baseline", "#noise of a gradient", "#bias"], rows))
    trees = [r for name, r in results.items() if name.startswith("variance-advantages-")]
    if trees:
        rows = [
            [name, *(mean_and_error([tree[name][figure] for tree in trees]) for figure in ("bias", "std"))]
            for name in trees[0]
        ]
        parts.append(markdown([f"advantage, {len(trees)} trees", "#bias", "#standard deviation"], rows))
    rows = []
    for epochs in EPOCHS:
        for clip in CLIPS:
            found = _clipped(results, epochs, clip)
            if found:
                finals = mean_and_error([r["shares"][-1] for r in found])
                worst = mean_and_error([_largest_drop(r["shares"]) for r in found])
                moved = mean_and_error([r["approx_kl"] for r in found])
                rows.append([epochs, "0.2" if clip < 1 else "off", len(found), finals, worst, moved])
    heads = ["epochs", "clip", "#trees", "#share of the optimum", "#largest drop on the way"]
    parts += [markdown([*heads, "#KL of an update"], rows)] if rows else []
    return "\n\n".join(parts)


def _clipped(results: dict[str, dict[str, Any]], epochs: int, clip: float) -> list[dict[str, Any]]:
    prefix = _clip_name(epochs, clip, 0).removesuffix("0")
    return [r for name, r in results.items() if name.startswith(prefix)]


def _largest_drop(shares: list[float]) -> float:
    """How far a share fell below what it had been."""
    return float(np.max(np.maximum.accumulate(shares) - np.array(shares)))


def figure(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Noise of the baselines, bias against standard deviation of advantages, and learning with and without the clip."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import style_axes

    canvas = Figure(figsize=(12.0, 3.7), dpi=130, layout="constrained")
    left, middle, right = canvas.subplots(1, 3)
    found = results.get("variance-baselines", {})
    left.barh(list(found)[::-1], [each["noise"] for each in found.values()][::-1], color="#1f6fb4", alpha=0.6)
    left.set_title("noise of a gradient, in lengths of the true one", fontsize=10, loc="left")
    trees = [r for name, r in results.items() if name.startswith("variance-advantages-")]
    for word, colour in (("lambda", "#1f6fb4"), ("n = ", "#b8860b")):
        shown = [name for name in (trees[0] if trees else ()) if name.startswith(word)]
        bias, std = ([np.mean([tree[name][f] for tree in trees]) for name in shown] for f in ("bias", "std"))
        middle.plot(bias, std, "o-", color=colour, label="GAE" if word == "lambda" else "n-step")
        for x, y, name in zip(bias, std, shown, strict=True):
            text = name.split()[-1]
            where = {"xytext": (-6, -3), "ha": "right"} if word == "lambda" else {"xytext": (6, 3)}
            middle.annotate(text, (x, y), **where, textcoords="offset points", fontsize=8, color=colour)
    middle.set_xlabel("bias", fontsize=9)
    middle.set_ylabel("standard deviation", fontsize=9)
    middle.set_title("advantages by a critic that errs", fontsize=10, loc="left")
    for epochs, colour in zip(EPOCHS, ("#888888", "#1f6fb4", "#c0504d"), strict=True):
        for clip, line in zip(CLIPS, ("-", ":"), strict=True):
            runs = [r["shares"] for r in _clipped(results, epochs, clip)]
            if runs:
                label = f"{epochs} epoch{'s' * (epochs > 1)}, {'clip 0.2' if clip < 1 else 'no clip'}"
                updates = min(map(len, runs))  # trees with shorter answers take more of them
                right.plot(
                    np.mean([shares[:updates] for shares in runs], 0),
                    line,
                    color=colour,
                    linewidth=1.8,
                    label=label,
                )
    right.set_xlabel("updates", fontsize=9)
    right.set_title("PPO's share of the optimum", fontsize=10, loc="left")
    for axes in (left, middle, right):
        style_axes(axes)
        axes.xaxis.set_major_formatter("{x:g}")
        if axes is not left and axes.lines:
            axes.legend(frameon=False, fontsize=8)
    left.tick_params(labelsize=8)
    left.grid(False)
    middle.margins(x=0.12)
    canvas.savefig(file)
