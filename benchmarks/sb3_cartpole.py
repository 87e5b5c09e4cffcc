"""PPO on CartPole-v1, ours and stable-baselines3's with the same hyper-parameters: do the learning curves agree?

    python benchmarks/sb3_cartpole.py [--seeds 30] [--first 0] [--sides textrl-env stable-baselines3]

Those tuned in rl-zoo, 100,000 steps, with the same autoreset and the same initial gain of the value head on both sides.
What is compared is the mean return of the last 100 training episodes, which both log under the same name, every 1,000
steps, and 20 greedy episodes at the end. The bands are 95 % bootstrap confidence intervals of the mean over seeds.
Some seeds collapse half-way, in either library, so thirty of them say more than ten. Every run goes to
benchmarks/sb3_cartpole.json as soon as it is there, and from there to docs/sb3_cartpole.md and docs/sb3_cartpole.png;
``--seeds 0`` only writes these again. ``--together`` takes luck out: both by the same random numbers, update by update.
Time is not compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from agents.algorithms.ppo import PPO

STEPS, EVERY, N_ENVS = 100_000, 1_000, 8
TUNED = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0}
SIDES = {"textrl-env": "#1f6fb4", "stable-baselines3": "#b03a48"}
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_suffix(".json")
PAGE, PICTURE = ROOT / "docs" / "sb3_cartpole.md", ROOT / "docs" / "sb3_cartpole.png"
#: Timesteps at which the curves are read.
GRID = np.arange(EVERY, STEPS + 1, EVERY)


class Curve(BaseCallback):
    """Notes ``(timesteps, mean return of the last 100 episodes)`` after each rollout, of either library's agent."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if hasattr(self.model, "ep_info_buffer"):
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
        else:
            returns = list(self.model.episodes.returns)[-100:]
        if returns:
            self.points.append((self.model.num_timesteps, float(np.mean(returns))))


def make_ours(seed: int) -> Any:
    """Our PPO, in environments that reset in the step that ends an episode and with a value head that starts as theirs.

    Our own choices, the native vector env and a value head that starts at zero, change the curve by less than the
    seeds do.
    """
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.make_vec("CartPole-v1", num_envs=N_ENVS, vectorization_mode="sync", vector_kwargs=same_step)
    schedules = {"learning_rate": "linear:1e-3", "clip_range": "linear:0.2"}
    agent = PPO("MlpPolicy", envs, seed=seed, **TUNED, **schedules)
    torch.nn.init.orthogonal_(agent.policy.value_head.weight, gain=1.0)
    return agent


def make_theirs(seed: int) -> Any:
    """stable-baselines3's PPO, its optimiser and networks being its defaults."""
    envs = make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=seed)
    schedules = {"learning_rate": lambda left: 1e-3 * left, "clip_range": lambda left: 0.2 * left}
    return stable_baselines3.PPO("MlpPolicy", envs, seed=seed, device="cpu", **TUNED, **schedules)


def greedy_return(agent: Any, episodes: int = 20) -> float:
    """Mean return of fresh episodes, the likeliest action at every step."""
    env, returns = gym.make("CartPole-v1"), []
    for seed in range(episodes):
        observation, done, total = env.reset(seed=10_000 + seed)[0], False, 0.0
        while not done:
            action, _ = agent.predict(observation, deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(int(action))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def run(side: str, seed: int) -> dict[str, Any]:
    """One run: the curve on :data:`GRID`, its mean over the training, and the greedy return at the end."""
    agent, curve = make_ours(seed) if side == "textrl-env" else make_theirs(seed), Curve()
    agent.learn(STEPS, callback=curve, log_interval=None)
    steps, means = np.array(curve.points).T
    # The last reading at or before each point of the grid.
    values = means[np.maximum(np.searchsorted(steps, GRID, side="right") - 1, 0)]
    return {
        "side": side,
        "seed": seed,
        "mean": round(float(values.mean()), 2),
        "greedy": greedy_return(agent),
        "curve": values.round(2).tolist(),
    }


def layers_of(theirs: Any, ours: Any) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Pairs of layers that have the same place: ours, theirs."""
    body, policy = theirs.policy.mlp_extractor, ours.policy
    return [
        (policy.trunk, body.policy_net),
        (policy.value_trunk, body.value_net),
        (policy.action_head, theirs.policy.action_net),
        (policy.value_head, theirs.policy.value_net),
    ]


def copy_weights(theirs: Any, ours: Any) -> None:
    """Give ours their weights."""
    for mine, layer in layers_of(theirs, ours):
        mine.load_state_dict(layer.state_dict())
    if ours.policy.log_std is not None:
        ours.policy.log_std.data.copy_(theirs.policy.log_std.data)
    ours.policy.weights_changed()


def share_luck(theirs: Any, ours: Any, seed: int) -> dict[str, list[np.ndarray]]:
    """The same first weights and states for both, and one stream of uniform numbers to choose between two actions.

    Returns:
        What each will have done, ``theirs`` and ``ours``: actions ``[N]`` of every step.
    """
    walked: dict[str, list[np.ndarray]] = {"theirs": [], "ours": []}

    def drawn(side: str, probability_of_one: np.ndarray) -> np.ndarray:
        uniform = np.random.default_rng([seed, len(walked[side])]).random(len(probability_of_one))
        walked[side].append((uniform < probability_of_one).astype(np.int64))
        return walked[side][-1]

    def forward(observation: torch.Tensor, deterministic: bool = False) -> tuple[torch.Tensor, ...]:
        policy = theirs.policy
        actor, critic = policy.mlp_extractor(policy.extract_features(observation))
        distribution = policy._get_action_dist_from_latent(actor)
        actions = torch.from_numpy(drawn("theirs", distribution.distribution.probs[:, 1].numpy()))
        return actions, policy.value_net(critic), distribution.log_prob(actions)

    copy_weights(theirs, ours)
    theirs.policy.forward = forward
    ours.policy.distribution.draw = lambda out, _: drawn("ours", 1 / (1 + np.exp(out[:, 0] - out[:, 1])))
    first_reset = ours.envs.reset
    ours.envs.reset = lambda **_: first_reset(seed=seed)
    return walked


def together(seed: int) -> dict[str, Any]:
    """One run of both, in which nothing but the libraries differs: do they do the same?

    Both by :func:`share_luck`. Ours begins every update with their weights and Adam's moments, so that the last bits of
    one update do not grow over the next: what each update changes is compared by itself, and every action.
    """
    theirs, ours = make_theirs(seed), make_ours(seed)
    walked = share_luck(theirs, ours, seed)
    weights, their_weights = (
        [p for layer in side for p in layer.parameters()]
        for side in zip(*layers_of(theirs, ours), strict=True)
    )
    moments = ("exp_avg", "exp_avg_sq")
    states: list[list[dict[str, torch.Tensor]]] = []
    apart: list[float] = []

    def their_update() -> None:
        type(theirs).train(theirs)
        state = theirs.policy.optimizer.state
        found = [{m: state[p][m].clone() for m in moments} for p in their_weights]
        states.append([{"weight": p.detach().clone()} | f for p, f in zip(their_weights, found, strict=True)])

    def our_update(rollout: Any) -> None:
        type(ours).train(ours, rollout)
        optimizer, known = ours.optimizer, states[len(apart)]
        state, places = optimizer.state[optimizer.vector], [id(p) for p in optimizer.parameters]
        views = {m: dict(zip(places, optimizer.views(state[m]), strict=True)) for m in moments}
        pairs = list(zip(weights, known, strict=True))
        with torch.no_grad():
            apart.append(max(float((p - k["weight"]).abs().max()) for p, k in pairs))
            for p, k in pairs:
                p.copy_(k["weight"])
                for m in moments:
                    views[m][id(p)].copy_(k[m])
        ours.policy.weights_changed()

    theirs.train, ours.train = their_update, our_update
    for agent in (theirs, ours):
        agent.learn(STEPS, log_interval=None)
    return {
        "side": "together",
        "seed": seed,
        "actions": N_ENVS * len(walked["ours"]),
        "differ": int((np.array(walked["theirs"]) != np.array(walked["ours"])).sum()),
        "median": float(f"{np.median(apart):.1e}"),
        "worst": float(f"{max(apart):.1e}"),
    }


def band(values: np.ndarray, samples: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap confidence interval of the mean over the first axis, the seeds."""
    rows = np.random.default_rng(0).integers(0, len(values), (samples, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5], axis=0)
    return low, high


def overlap(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Where two bands overlap, bool."""
    return (a[0] <= b[1]) & (b[0] <= a[1])


def stored() -> list[dict[str, Any]]:
    """The runs measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def store(result: dict[str, Any]) -> None:
    """Put a run in the place of the same one of an earlier pass."""
    runs = {(r["side"], r["seed"]): r for r in [*stored(), result]}
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(r) for r in runs.values()) + "\n]\n")


def told_together() -> str:
    """What :func:`together` found, in words."""
    runs = [r for r in stored() if r["side"] == "together"]
    if not runs:
        return "Not run yet: `python benchmarks/sb3_cartpole.py --together`."
    return TOGETHER.format(**runs[0])


def column(side: str, name: str) -> np.ndarray:
    """One quantity of all runs of a side, the seeds first."""
    return np.array([r[name] for r in stored() if r["side"] == side], dtype=float)


def page() -> str:
    """docs/sb3_cartpole.md, from the stored runs."""
    lines = []
    for name, heading in (("mean", "return, mean over the training"), ("greedy", "greedy return at the end")):
        cells = []
        for side in SIDES:
            values = column(side, name)
            low, high = band(values)
            cells.append(f"{values.mean():.1f} ({low:.1f} to {high:.1f})")
        both = "yes" if overlap(*(band(column(side, name)) for side in SIDES)) else "no"
        lines.append(f"| {heading} | {' | '.join(cells)} | {both} |")
    solved = [f"{(column(side, 'greedy') >= 475).sum()} of {len(column(side, 'greedy'))}" for side in SIDES]
    lines.append(f"| seeds with a greedy return of 475 or more | {' | '.join(solved)} | |")
    shared = overlap(*(band(column(side, "curve")) for side in SIDES))
    ours, theirs = (column(side, "mean") for side in SIDES)
    return TEXT.format(
        difference=ours.mean() - theirs.mean(),
        error=float(np.sqrt(ours.var(ddof=1) / len(ours) + theirs.var(ddof=1) / len(theirs))),
        head=" | ".join(SIDES),
        table="\n".join(lines),
        share=f"{100 * shared.mean():.0f}",
        points=len(GRID),
        apart=_spans(GRID[~shared]),
        together=told_together(),
        seeds=" and ".join(str(len(column(side, "mean"))) for side in SIDES),
    )


def _spans(steps: np.ndarray) -> str:
    """Grid points in words: neighbours as "from to"."""
    if not len(steps):
        return "nowhere"
    groups = np.split(steps, np.flatnonzero(np.diff(steps) > EVERY) + 1)
    return ", ".join(f"{g[0]:,}" if len(g) == 1 else f"{g[0]:,} to {g[-1]:,}" for g in groups)


TOGETHER = """`python benchmarks/sb3_cartpole.py --together` lets both draw their actions from one stream of uniform
numbers and hands ours their weights and moments after every update: of {actions:,} actions {differ:,} differ, and what
an update makes of the weights is apart by {median:.0e} in the median, by {worst:.0e} at worst (an update is 20 steps of
up to 1e-3, and a ratio at the edge of the clip falls on either side of it by its last bit). So both curves have one
law, and what is between their means is luck, of a size that comes once in fifty times."""

TEXT = """# CartPole-v1 beside stable-baselines3

Written by `python benchmarks/sb3_cartpole.py`: PPO with the hyper-parameters tuned in rl-zoo (8 environments, 32
steps, batches of 256, 20 epochs, lambda 0.8, discount 0.98, learning rate from 1e-3 and clip range from 0.2 down to 0),
100,000 steps, {seeds} seeds. In brackets 95 % bootstrap confidence intervals of the mean over seeds. Autoreset and the
initial gain of the value head are stable-baselines3's on both sides; our defaults are a native vector env that
resets one step later and a value head that starts at zero.

| | {head} | intervals overlap |
|---|---|---|---|
{table}

![Mean return of the last 100 episodes against environment steps, with bands](sb3_cartpole.png)

The bands overlap at {share} % of the {points} points of the curve. They are apart at: {apart}. Ours minus theirs, mean
over the training: {difference:.1f}, standard error {error:.1f}. Overlapping bands show no difference; they do not show
that there is none.

## Seed by seed

{together}

Nine seeds of ours with our defaults, measured before this, overlapped with theirs at 80 % of the points.
"""


def draw() -> None:
    """docs/sb3_cartpole.png: both curves with their bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for side, colour in SIDES.items():
        curves = column(side, "curve")
        low, high = band(curves)
        axes.fill_between(GRID, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(GRID, curves.mean(0), color=colour, linewidth=2, label=f"{side}, {len(curves)} seeds")
    axes.set_title(
        "PPO on CartPole-v1: the same hyper-parameters in both libraries", loc="left", fontweight="bold"
    )
    axes.set_xlabel("environment steps")
    axes.set_ylabel("mean return of the last 100 episodes")
    axes.set_xlim(0, STEPS)
    axes.set_ylim(0, 510)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(frameon=False, loc="lower right", title="mean and 95 % band")
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument(
        "--first", type=int, default=0, help="the seed to begin with, to add to those that are stored"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--together", action="store_true", help="one run of both by the same random numbers, no other"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.together:
        store(together(0))
        arguments.seeds = 0
    for seed in range(arguments.first, arguments.seeds):
        for side in arguments.sides:
            result = run(side, seed)
            store(result)
            print(side, seed, result["mean"], result["greedy"], flush=True)
    PAGE.write_text(page())
    draw()


if __name__ == "__main__":
    main()
