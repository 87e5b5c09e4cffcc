"""Every agent on every environment, several seeds: does it learn, and does it still learn as well as before?

What it does: trains REINFORCE, PPO and GRPO on the toys, TokenTree-v0, CartPole-v1 and TextRLHF-v0, prints a
table, and writes ``benchmarks/learning.md`` and ``benchmarks/learning.json``. With ``--check`` it writes nothing
and compares the medians with the stored ones instead.

How to run: ``make learning``, or ``python benchmarks/learning.py --seeds 3 --envs ToyBandit-v0 GridWorld-v0``.
Left out: timing against other libraries.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
AGENTS = ("REINFORCE", "PPO", "GRPO")

#: What counts as solved, and what is measured: mean return of 100 fresh episodes of the final policy, sampled.
GOALS = {
    "ToyBandit-v0": ("return", 1.25),
    "LineWorld-v0": ("return", 0.94),
    "GridWorld-v0": ("return", 0.92),
    "CartPole-v1": ("return", 475.0),
    "TokenTree-v0": ("share of the optimum", 0.9),
    "TextRLHF-v0": ("held-out gold", None),
}

#: Hyper-parameters of each pair; total_timesteps first.
SETTINGS: dict[str, dict[str, tuple[int, dict[str, Any]]]] = {
    "ToyBandit-v0": {
        "REINFORCE": (6_000, {"n_episodes": 32, "learning_rate": 1e-2}),
        "PPO": (6_000, {"n_envs": 32, "n_steps": 8, "learning_rate": 3e-3, "ent_coef": 0.01}),
        "GRPO": (6_000, {"n_episodes": 32, "learning_rate": 1e-2}),
    },
    "LineWorld-v0": {
        "REINFORCE": (20_000, {"learning_rate": 3e-3}),
        "PPO": (12_000, {"n_envs": 8, "n_steps": 64, "learning_rate": 1e-3}),
        "GRPO": (20_000, {"learning_rate": 3e-3, "ent_coef": 0.01}),
    },
    "GridWorld-v0": {
        "REINFORCE": (200_000, {"n_episodes": 32, "learning_rate": 3e-3, "ent_coef": 0.01}),
        "PPO": (
            60_000,
            {"n_envs": 32, "n_steps": 64, "batch_size": 512, "ent_coef": 0.05, "learning_rate": 1e-3},
        ),
        "GRPO": (100_000, {"ent_coef": 0.02}),
    },
    "CartPole-v1": {
        "REINFORCE": (100_000, {"n_episodes": 8, "learning_rate": 3e-3, "normalize_advantage": True}),
        "PPO": (
            100_000,
            {
                "n_envs": 8,
                "n_steps": 32,
                "batch_size": 256,
                "n_epochs": 20,
                "gamma": 0.98,
                "gae_lambda": 0.8,
                "learning_rate": "linear:1e-3",
                "clip_range": "linear:0.2",
            },
        ),
        "GRPO": (100_000, {"n_episodes": 8, "learning_rate": 3e-3}),
    },
    "TokenTree-v0": {
        "REINFORCE": (60_000, {"n_episodes": 64, "learning_rate": "linear:0.1", "gamma": 1.0}),
        "PPO": (
            60_000,
            {
                "n_envs": 64,
                "n_steps": 8,
                "batch_size": None,
                "n_epochs": 4,
                "learning_rate": "linear:0.1",
                "gamma": 1.0,
            },
        ),
        "GRPO": (60_000, {"n_episodes": 64, "group_size": 16, "learning_rate": "linear:0.1"}),
    },
    "TextRLHF-v0": {
        "REINFORCE": (50_000, {"learning_rate": 1e-3}),
        "PPO": (50_000, {"learning_rate": 5e-4, "n_epochs": 4}),
        "GRPO": (50_000, {"learning_rate": 1e-3}),
    },
}
#: Arguments of the environments, where the defaults are not taken.
ENV_KWARGS = {"TextRLHF-v0": {"kl_coef": 0.15}, "TokenTree-v0": {"kl_coef": 1.0}}


def run(job: tuple[str, str, int]) -> dict[str, Any]:
    """Train one agent on one environment with one seed and measure the final policy."""
    import torch

    import agents

    env_id, agent_name, seed = job
    torch.set_num_threads(1)
    steps, arguments = SETTINGS[env_id][agent_name]
    policy = agents.TabularPolicy if env_id == "TokenTree-v0" else "auto"
    agent = getattr(agents, agent_name)(
        policy, env_id, seed=seed, env_kwargs=ENV_KWARGS.get(env_id), **arguments
    )
    share_before = optimum_share(agent) if env_id == "TokenTree-v0" else math.nan
    started = time.perf_counter()
    agent.learn(steps)
    seconds = time.perf_counter() - started
    result = {"env": env_id, "agent": agent_name, "seed": seed, "steps": steps, "seconds": seconds}
    numbers = [v for v in agent.latest.values() if isinstance(v, float)]
    result["blew_up"] = any(math.isinf(v) for v in numbers) or not np.isfinite(_weights_norm(agent))
    if env_id == "TextRLHF-v0":
        result |= _text_result(agent, seed)
    elif env_id == "TokenTree-v0":
        result |= {"before": share_before, "value": optimum_share(agent)}
    else:
        result["before"] = evaluate_untrained(env_id, agent_name)
        result["value"] = mean_return(agent, env_id)
    return result


def _weights_norm(agent: Any) -> float:
    return float(sum(p.detach().norm() ** 2 for p in agent.policy.parameters()) ** 0.5)


def optimum_share(agent: Any) -> float:
    """``(J - J_ref) / (J* - J_ref)``, exact: 1 at the optimum, 0 at the reference, less for what is worse."""
    from agents.callbacks.exact_gap import policy_log_probs
    from textrl_env.exact.solver import evaluate, from_token_tree, solve

    mdp = from_token_tree(agent.envs)
    reference = evaluate(mdp, mdp.ref_log_probs).objective
    mine = evaluate(mdp, policy_log_probs(agent.policy, agent.envs)).objective
    return (mine - reference) / (solve(mdp).objective - reference)


def mean_return(agent: Any, env_id: str, episodes: int = 100) -> float:
    """Mean return of fresh episodes, actions sampled."""
    import gymnasium as gym

    import textrl_env  # noqa: F401

    env = gym.make(env_id)
    returns = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=10_000 + episode)
        total, done = 0.0, False
        while not done:
            action, _ = agent.predict(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def evaluate_untrained(env_id: str, agent_name: str) -> float:
    """The same for a policy that has learned nothing."""
    import agents

    return mean_return(getattr(agents, agent_name)("auto", env_id, seed=0, n_envs=1), env_id, 20)


def _text_result(agent: Any, seed: int) -> dict[str, Any]:
    """Gold score, KL and win rate over the initial policy on held-out prompts."""
    import torch

    from agents.evaluation.evaluation import win_rate
    from textrl_env import embedded
    from textrl_env.envs.text_rlhf import TextRLHFEnv
    from textrl_env.lm.decoding import generate

    env = TextRLHFEnv(
        prompts=embedded.path("prompts_heldout"),
        gold=embedded.gold_score,
        max_new_tokens=agent.text_env.max_new_tokens,
    )
    ids = np.arange(env.num_prompts)
    generator = torch.Generator().manual_seed(seed)
    runs = {}
    for name, lm in (("before", env.lm), ("after", agent.policy.lm)):
        runs[name] = env.run_episodes(lambda p, lm=lm: generate(lm, p, env.max_new_tokens, generator), ids)
    gold = {name: episodes.parts["gold"] for name, episodes in runs.items()}
    return {
        "before": float(gold["before"].mean()),
        "value": float(gold["after"].mean()),
        "win_rate": win_rate(gold["after"], gold["before"])[0],
        "kl": float(runs["after"].kl.sum(1).mean()),
        "proxy": float(runs["after"].score.mean()),
    }


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each environment and agent."""
    rows = []
    for env_id, (measure, goal) in GOALS.items():
        for agent in AGENTS:
            runs = [r for r in results if r["env"] == env_id and r["agent"] == agent]
            if not runs:
                continue
            values = np.array([r["value"] for r in runs])
            better = values > np.array([r["before"] for r in runs])
            row = {
                "env": env_id,
                "agent": agent,
                "measure": measure,
                "steps": runs[0]["steps"],
                "seeds": len(runs),
                "before": float(np.mean([r["before"] for r in runs])),
                "median": float(np.median(values)),
                "worst": float(values.min()),
                "best": float(values.max()),
                "solved": int((values >= goal).sum()) if goal is not None else int(better.sum()),
                "blew_up": sum(r["blew_up"] for r in runs),
                "seconds": float(np.median([r["seconds"] for r in runs])),
            }
            if "win_rate" in runs[0]:
                row["win_rate"] = float(np.median([r["win_rate"] for r in runs]))
                row["kl"] = float(np.median([r["kl"] for r in runs]))
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| environment | agent | steps | before | median | worst | best | solved | blew up | seconds |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['env']} | {r['agent']} | {r['steps']:,} | {r['before']:.2f} | {r['median']:.2f} | {r['worst']:.2f} "
            f"| {r['best']:.2f} | {r['solved']}/{r['seeds']} | {r['blew_up']} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines)


def page(rows: list[dict[str, Any]]) -> str:
    """``benchmarks/learning.md``."""
    goals = ", ".join(f"{env} {goal:g}" for env, (_, goal) in GOALS.items() if goal is not None)
    text = [
        "# Learning",
        "",
        "Made by `make learning` (`python benchmarks/learning.py`); the hyper-parameters are in the script, and were",
        "chosen on a few of the same seeds. Values are the mean return of 100 fresh episodes of the final policy with",
        "sampled actions; on TextRLHF-v0 the mean gold score on held-out prompts, trained with",
        f"`kl_coef={ENV_KWARGS['TextRLHF-v0']['kl_coef']}`; on TokenTree-v0, a table being the policy and",
        f"`kl_coef={ENV_KWARGS['TokenTree-v0']['kl_coef']:g}`, the exact share of the way from the reference (0)",
        "to the optimum (1). Solved means a value of at least",
        f"{goals}; on TextRLHF-v0 a higher gold score than before.",
        "Seconds are the median wall time of one run on one core of a busy machine, a rough guide only.",
        "",
        table(rows),
        "",
    ]
    for r in rows:
        if "win_rate" in r:
            text.append(
                f"{r['agent']} on {r['env']}: gold win rate over the SFT model {r['win_rate']:.0%}, "
                f"KL {r['kl']:.1f} nats (medians)."
            )
    return "\n".join(text) + "\n"


def check(rows: list[dict[str, Any]], stored: list[dict[str, Any]]) -> int:
    """Compare with the stored band; returns the number of pairs that got worse."""
    bands = {(r["env"], r["agent"]): r for r in stored}
    worse = 0
    for row in rows:
        band = bands.get((row["env"], row["agent"]))
        if band is None:
            print(f"new    {row['env']} {row['agent']}: {row['median']:.3f}")
            continue
        low = band["worst"] - 0.05 * abs(band["median"])
        verdict = "worse " if row["median"] < low else "ok    "
        worse += row["median"] < low
        print(
            f"{verdict} {row['env']} {row['agent']}: {row['median']:.3f}, band {low:.3f} to {band['best']:.3f}"
        )
    return worse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--envs", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=AGENTS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--check", action="store_true", help="compare with the stored band and write nothing")
    args = parser.parse_args()
    jobs = [(e, a, s) for e in args.envs for a in args.agents for s in range(args.seeds)]
    results = []
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for result in pool.imap_unordered(run, jobs):
            results.append(result)
            print(
                f"[{len(results)}/{len(jobs)}] {result['env']} {result['agent']} seed {result['seed']}: "
                f"{result['before']:.2f} -> {result['value']:.2f} in {result['seconds']:.0f} s",
                flush=True,
            )
    rows = summarise(results)
    print("\n" + table(rows))
    path = HERE / "learning.json"
    stored = json.loads(path.read_text()) if path.is_file() else []
    if args.check:
        raise SystemExit(1 if check(rows, stored) else 0)
    # A partial run refreshes its own rows and leaves the others.
    fresh = {(r["env"], r["agent"]) for r in rows}
    kept = [r for r in stored if (r["env"], r["agent"]) not in fresh] + rows
    kept.sort(key=lambda r: (list(GOALS).index(r["env"]), AGENTS.index(r["agent"])))
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (HERE / "learning.md").write_text(page(kept))


if __name__ == "__main__":
    main()
