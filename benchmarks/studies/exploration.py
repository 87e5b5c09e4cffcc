"""Does PPO explore where DPO cannot? What becomes of answers that no comparison has shown.

A ``TokenTree-v0`` whose optimum under the KL penalty is known exactly, of 1,024 answers, which the pairs can cover, or
of 46,656, which they can't. The score of an answer is the sum of what its tokens are worth, so better answers lie near
good ones, and the reference seldom writes the best. DPO learns from pairs that the reference wrote, each with the exact
probability that a rater prefers the one to the other by Bradley-Terry. Online DPO learns from as many, but asks for new
pairs of its own answers in eight rounds (Guo et al. 2024, "Direct Language Model Alignment from Online AI Feedback").
PPO asks for the score of what it writes, as many answers as the pairs have (Xu et al. 2024, "Is DPO Superior to PPO for
LLM Alignment?"). Given is the share of the way from the reference to the optimum, ``(J - J_ref) / (J* - J_ref)``.

Left out: a reward model between comparisons and PPO; here the score itself is asked, so nothing can be fooled.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.studies.frame import Job, markdown, mean_and_error
from textrl_env.exact.solver import log_softmax

SEEDS = 10
TREE = {"num_prompts": 1, "eos": False, "kl_coef": 0.2}
#: Tokens to choose from, and tokens of an answer, by what the jobs of each are called.
SIZES = {"": (4, 5), "wide-": (6, 6)}
#: The reference's logits are those of the tree times this: how sure it is of what it writes.
SURE = (2.0, 4.0)
#: Pairs, each of two answers.
PAIRS = (64, 256, 1024, 4096)
#: Rounds of online DPO, gradient steps in all, and learning rate of the table.
ROUNDS, STEPS, RATE = 8, 800, 0.1
METHODS = ("DPO", "online DPO", "PPO")


def jobs(seeds: int) -> list[Job]:
    """One for each size, reference, method, number of pairs and tree."""
    return [
        Job(_name(size, sure, method, pairs, seed), partial(_run, size, sure, method, pairs, seed), seed)
        for seed in range(seeds)
        for size in SIZES
        for sure in SURE
        for pairs in PAIRS
        for method in METHODS
    ]


def _name(size: str, sure: float, method: str, pairs: int, seed: int) -> str:
    return f"explore-{size}{sure:g}-{method.lower().replace(' ', '-')}-{pairs}-{seed}"


def _run(size: str, sure: float, method: str, pairs: int, seed: int, arrays: Path) -> dict[str, Any]:
    import gymnasium as gym
    import torch

    from textrl_env.exact import solver

    torch.set_num_threads(1)
    vocab_size, horizon = SIZES[size]
    tree = TREE | {"vocab_size": vocab_size, "horizon": horizon, "ref_seed": seed, "reward_seed": seed}
    env = gym.make_vec("textrl_env:TokenTree-v0", num_envs=32, **tree)
    shape(env.unwrapped.dynamics, sure, seed)
    mdp = solver.from_token_tree(env)
    if method == "PPO":
        table = ppo(env, 2 * pairs, seed)
    else:
        table = dpo(mdp, pairs, ROUNDS if method == "online DPO" else 1, seed)
    starts = env.unwrapped.dynamics.level_start
    policy = [table[starts[t] : starts[t + 1]] for t in range(horizon)]
    reference = solver.evaluate(mdp, mdp.ref_log_probs).objective
    best = solver.solve(mdp)
    found = solver.evaluate(mdp, policy)
    share = (found.objective - reference) / (best.objective - reference)
    return {"share": share, "score": found.score, "kl": found.kl}


def shape(tree: Any, sure: float, seed: int) -> None:
    """Make the reference sure, and the score the sum of what tokens are worth at their places."""
    tree.ref_table = log_softmax(sure * tree.ref_table)
    size, horizon = tree.vocab_size, tree.horizon
    worth = np.random.default_rng([seed, 4]).standard_normal((horizon, size))
    total = np.zeros(1)
    for level in worth:
        total = (total[:, None] + level).reshape(-1)
    tree.score_table[tree.level_start[-2] :] = total.reshape(-1, size)


def ppo(env: Any, answers: int, seed: int) -> np.ndarray:
    """PPO from the reference's table, for so many answers; returns log-probabilities ``[rows, V]``."""
    from agents import PPO, TabularPolicy

    kwargs = {"logits": env.unwrapped.dynamics.ref_table, "eos": TREE["eos"]}
    # As many updates as there is data for, at least two.
    episodes = int(np.clip(answers // 32, 32, 128))
    agent = PPO(
        TabularPolicy, env, policy_kwargs=kwargs, seed=seed, n_episodes=episodes, batch_size=None, n_epochs=8,
        learning_rate=RATE, gamma=1.0, gae_lambda=1.0,
    )  # fmt: skip
    agent.learn(answers * env.unwrapped.dynamics.horizon, log_interval=None)
    return agent.policy.logits.detach().double().log_softmax(-1).numpy()


def dpo(mdp: Any, pairs: int, rounds: int, seed: int) -> np.ndarray:
    """DPO on a table, in rounds of new pairs that the policy of the moment writes; returns log-probabilities."""
    import torch

    from agents.offline.preference_losses import dpo_loss

    rng = np.random.default_rng(seed)
    reference = torch.from_numpy(np.concatenate(mdp.ref_log_probs))
    logits = reference.clone().requires_grad_(True)
    scores = torch.from_numpy(_scores(mdp))
    optimizer = torch.optim.Adam([logits], lr=RATE)
    horizon, size = len(mdp.ref_log_probs), mdp.ref_log_probs[0].shape[1]
    beta, seen = TREE["kl_coef"], []
    for _ in range(rounds):
        whole = _answer_log_probs(logits.log_softmax(-1), size, horizon).detach().exp().numpy()
        drawn = rng.choice(len(whole), (pairs // rounds, 2), p=whole / whole.sum())
        seen.append(drawn)
        one, other = torch.from_numpy(np.concatenate(seen)).unbind(1)
        prefers = torch.sigmoid(scores[one] - scores[other])
        known = _answer_log_probs(reference, size, horizon)
        for _ in range(STEPS // rounds):
            log_probs = _answer_log_probs(logits.log_softmax(-1), size, horizon)
            pair = log_probs[one], log_probs[other], known[one], known[other]
            there, back = dpo_loss(*pair, beta=beta), dpo_loss(pair[1], pair[0], pair[3], pair[2], beta=beta)
            loss = (prefers * there + (1 - prefers) * back).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits.detach().log_softmax(-1).numpy()


def _answer_log_probs(table: Any, size: int, horizon: int) -> Any:
    """``log p`` of every answer, ``[size ** horizon]``, from a table of log-probabilities ``[rows, size]``."""
    import torch

    whole, start = torch.zeros(1, dtype=table.dtype), 0
    for t in range(horizon):
        level = table[start : start + size**t]
        whole, start = (whole[:, None] + level).reshape(-1), start + size**t
    return whole


def _scores(mdp: Any) -> np.ndarray:
    """The score of every answer, in the order of :func:`_answer_log_probs`."""
    return mdp.scores[-1].reshape(-1)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The share of the optimum by size, reference, method and number of pairs."""
    rows = []
    for size, (vocab_size, horizon) in SIZES.items():
        for sure in SURE:
            for method in METHODS:
                found = [_of(results, size, sure, method, pairs) for pairs in PAIRS]
                if any(found):
                    cells = [mean_and_error([r["share"] for r in each]) for each in found]
                    rows.append([f"{vocab_size**horizon:,}", f"{sure:g}", method, len(found[0]), *cells])
    heads = ["answers there are", "reference, times", "method", "#trees"]
    return markdown([*heads, *(f"#{2 * pairs:,} judged" for pairs in PAIRS)], rows)


def _of(
    results: dict[str, dict[str, Any]], size: str, sure: float, method: str, pairs: int
) -> list[dict[str, Any]]:
    prefix = _name(size, sure, method, pairs, 0).removesuffix("0")
    return [r for name, r in results.items() if name.startswith(prefix)]


def figure(results: dict[str, dict[str, Any]], file: Path) -> None:
    """The share of the optimum over the answers that were judged, one picture for each size and reference."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import style_axes

    canvas = Figure(figsize=(9.6, 6.4), dpi=130, layout="constrained")
    grid = canvas.subplots(len(SIZES), len(SURE), sharex=True, sharey=True)
    for row, (size, (vocab_size, horizon)) in zip(grid, SIZES.items(), strict=True):
        for axes, sure in zip(row, SURE, strict=True):
            for method, colour in zip(METHODS, ("#b8860b", "#2e7d4f", "#1f6fb4"), strict=True):
                shown = [(2 * n, [r["share"] for r in _of(results, size, sure, method, n)]) for n in PAIRS]
                shown = [(n, values) for n, values in shown if values]
                means = [np.mean(values) for _, values in shown]
                axes.plot([n for n, _ in shown], means, color=colour, linewidth=2, label=method)
                for n, values in shown:
                    axes.plot([n] * len(values), values, "o", color=colour, markersize=4, alpha=0.4)
            style_axes(axes)
            axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
            axes.axhline(0, color="#cccccc", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks([2 * n for n in PAIRS], [f"{2 * n:,}" for n in PAIRS])
            title = f"{vocab_size**horizon:,} answers, logits of the reference times {sure:g}"
            axes.set_title(title, fontsize=10, loc="left")
        row[0].set_ylabel("share of the optimum", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("answers that were judged", fontsize=9)
    grid[0, 0].legend(frameon=False, fontsize=9)
    canvas.savefig(file)
