"""Which policy gradients are the gradient of the objective? Every method and every part against the exact answer.

    python benchmarks/gradients.py                  # what has not been measured yet; goes on where it was stopped
    python benchmarks/gradients.py --only grpo rloo # these methods alone
    python benchmarks/gradients.py --pages          # only the pages, from what has been measured

Every method of :mod:`agents.algorithms.methods` is measured by :mod:`agents.evaluation.estimators`, which
``textrl gradients`` uses too; its numbers go to agents/evaluation/estimators.json, part by part. What a bias comes from
(baselines, critics, where the KL is charged, means over steps) is taken apart by the functions here, with numbers in
benchmarks/gradients.json. ``--methods`` writes docs/methods.md alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, the root is not on the path

import agents
from agents import CISPO, DAPO, GRPO, GSPO, PPO, REINFORCE, RLOO, DrGRPO, REINFORCEPlusPlus
from agents.algorithms import methods
from agents.base import Agent
from agents.evaluation import estimators as est
from agents.evaluation.estimators import GENERATORS, Comparison, compare
from agents.policies.factory import Evaluation
from agents.policies.tabular import TabularPolicy
from agents.rollouts.rollout import Rollout
from benchmarks.gradients_page import METHODS_DOCUMENT, methods_page, write_pages
from textrl_env.exact import solver as exact
from textrl_env.lm.next_tokens import sample_actions

#: All responses equally long, so that every mean over steps is the same up to a constant.
TREE = {"vocab_size": 3, "horizon": 3, "num_prompts": 2, "eos": False, "kl_coef": 0.5}
#: Responses of different lengths, for the means.
EOS_TREE = TREE | {"horizon": 4, "eos": True}
BANDIT = {"vocab_size": 5, "horizon": 1, "num_prompts": 1, "eos": False, "kl_coef": 1.0, "ref_seed": 35}
BANDIT_SEED = 36
EPISODES = est.EPISODES
#: What the parts of a bias were measured as.
ANATOMY = Path(__file__).with_suffix(".json")
#: The distance from the optimum: coefficients and seeds, and passes over a rollout of methods that have a ratio.
BETAS, SEEDS, UPDATES, EPOCHS = (0.03, 0.1, 0.3), 10, 100, 2
#: Where it is measured, by the name that it has in a row.
ENDS = {"gaps": est.RIGHT_OR_WRONG, "turn gaps": est.TWO_TURNS}
#: A part of a row -> the part of :func:`est.measure` that gives it.
PARTS = {part: part for part in ("plain", "real", "turns")} | {"old 4": "old", "old 16": "old"}
PARTS |= {prefix + label: "elsewhere" for prefix in est.ELSEWHERE.values() for label in est.CORRECTIONS}
#: Methods whose loss has no importance ratio take one pass.
ONE_PASS = ("reinforce", "gpg")


class GRPOWithK1Loss(GRPO):
    """The KL's k1 as a term of the loss, which the agents refuse: its gradient is zero on average."""

    def loss(self, batch: Rollout, new: Evaluation):
        policy_loss = self.policy_loss(batch, new, self.importance_ratio(batch, new))
        return policy_loss + self.kl_coef * (new.log_probs - batch.ref_log_probs), {}


def make_agent(
    cls: type[Agent],
    tree: dict[str, Any] = TREE,
    policy_seed: int = 1,
    policy: type[TabularPolicy] = TabularPolicy,
    **kwargs: Any,
) -> Agent:
    """An agent with a random table as its policy, ``EPISODES`` (or ``n_episodes``) to a rollout."""
    kwargs = {"n_episodes": EPISODES} | kwargs
    env = gym.make_vec("textrl_env:TokenTree-v0", num_envs=kwargs["n_episodes"], **tree)
    shape = env.unwrapped.dynamics.ref_table.shape
    logits = np.random.default_rng(policy_seed).standard_normal(shape)
    return cls(policy, env, policy_kwargs={"logits": logits, "eos": tree["eos"]}, seed=0, **kwargs)


def make_ppo(gae_lambda: float, critic: str, normalize_advantage: bool = False, **kwargs: Any) -> Agent:
    """PPO with one minibatch; its critic is "exact" or "wrong" (values drawn from N(0, 1))."""
    agent = make_agent(
        PPO,
        gamma=1.0,
        gae_lambda=gae_lambda,
        batch_size=None,
        normalize_advantage=normalize_advantage,
        **kwargs,
    )
    values = np.concatenate(truth(agent).value)
    if critic == "wrong":
        values = np.random.default_rng(2).standard_normal(len(values))
    agent.policy.values.data = torch.from_numpy(values).float()
    return agent


def truth(agent: Agent) -> exact.PolicyValue:
    """Everything about the agent's policy, exactly."""
    mdp = exact.from_token_tree(agent.envs)
    table = agent.policy.logits.detach().double().log_softmax(-1).numpy()
    tree = agent.envs.unwrapped.dynamics
    return exact.evaluate(mdp, [table[tree.level(t)] for t in range(tree.horizon)])


def collect(agent: Agent, batches: int) -> list[Rollout]:
    """Rollouts as the agent collects them when it learns; it does not learn."""
    rollouts: list[Rollout] = []
    agent.train = rollouts.append
    while len(rollouts) < batches:
        agent.learn(1, log_interval=None, reset_num_timesteps=not rollouts)
    return rollouts


def step_gradient(agent: Agent, rollout: Rollout, weights: torch.Tensor | None = None) -> np.ndarray:
    """The direction of the agent's first gradient step after a rollout, by the table's logits, flat.

    Args:
        agent: Whose loss it is.
        rollout: As collected.
        weights: ``[B]`` weights of the episodes in place of the agent's own average.
    """
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    losses, _ = agent.loss(batch, agent.policy.evaluate(batch))
    weights = agent.step_weights(batch) if weights is None else weights[:, None] * batch.mask
    (gradient,) = torch.autograd.grad((losses * weights).sum(), agent.policy.logits)
    return -gradient.double().numpy().ravel()


class ElsewherePolicy(TabularPolicy):
    """Acts by another table than its own, as a generator does that is a model of its own."""

    table: torch.Tensor

    @torch.no_grad()
    def act(self, observation: Any, deterministic: bool = False):
        rows = self.rows(observation)
        actions = sample_actions(self.table[torch.from_numpy(rows)], self.generator).numpy()
        log_probs = self._log_prob(observation, actions)  # the KL is charged by the policy's own
        self._last = (observation, actions, log_probs)
        return actions, log_probs, self._values_of(rows)


#: Mode and upper bound of each correction.
CORRECTIONS: dict[str, tuple[str | None, float | None]] = {
    "none": (None, 3.0),
    "token_truncate, 3": ("token_truncate", 3.0),
    "token_mask, 1/3 to 3": ("token_mask", 3.0),
    "sequence_truncate, 3": ("sequence_truncate", 3.0),
    "sequence_mask, 1/3 to 3": ("sequence_mask", 3.0),
    "sequence_truncate, no cap": ("sequence_truncate", None),
}


def measure_elsewhere(generator: str, batches: int) -> dict[str, Comparison]:
    """REINFORCE's gradient from what another table has written, against that of ``J``, by correction.

    Args:
        generator: One of :data:`GENERATORS`.
        batches: Independent rollouts; every correction gets the same.
    """
    agent = make_agent(REINFORCE, policy=ElsewherePolicy, gamma=1.0)
    gradient = np.concatenate(truth(agent).gradient)
    logits = agent.policy.logits.detach().double().numpy()
    agent.policy.table = torch.from_numpy(GENERATORS[generator](logits, gradient)).log_softmax(-1)
    rollouts = collect(agent, batches)
    table, horizon = agent.policy.table.float(), agent.envs.unwrapped.dynamics.horizon
    found = {}
    for name, (mode, clip_max) in CORRECTIONS.items():
        agent.importance_sampling_mode, agent.importance_sampling_clip_max = mode, clip_max
        gradients = []
        for rollout in rollouts:
            reported = table[rollout.inputs["rows"]].gather(-1, rollout.actions[..., None]).squeeze(-1)
            rollout.sampling_log_probs = reported * rollout.mask
            gradients.append(step_gradient(agent, agent.look_at_sampling(rollout)))
        found[name] = compare(horizon * np.stack(gradients), gradient.ravel())
    return found


def measure(agent: Agent, batches: int) -> Comparison:
    """The agent's gradient against that of ``J``.

    Args:
        agent: From :func:`make_agent`.
        batches: Independent rollouts.
    """
    # Losses are means over steps and J is a sum; RLOO's action is the whole response, a sum already.
    scale = 1 if isinstance(agent, RLOO) else agent.envs.unwrapped.dynamics.horizon
    gradients = np.stack([step_gradient(agent, rollout) for rollout in collect(agent, batches)])
    return compare(scale * gradients, np.concatenate(truth(agent).gradient).ravel())


def estimators() -> dict[str, tuple[Agent, str]]:
    """Every estimator by name, with what theory expects."""
    reinforce = {"gamma": 1.0}
    loss = {"scale": "leave-one-out", "kl_in": "loss"}
    k2, k3 = (TREE | {"kl_estimator": name} for name in ("k2", "k3"))
    return {
        "REINFORCE, no baseline": (make_agent(REINFORCE, baseline="none", **reinforce), "unbiased"),
        "REINFORCE, mean of the others": (make_agent(REINFORCE, **reinforce), "unbiased"),
        "REINFORCE, learned baseline": (make_agent(REINFORCE, baseline="learned", **reinforce), "unbiased"),
        "REINFORCE, mean, k2 in the reward": (make_agent(REINFORCE, k2, **reinforce), "biased"),
        "REINFORCE, mean, k3 in the reward": (make_agent(REINFORCE, k3, **reinforce), "biased"),
        "REINFORCE, mean, normalised": (
            make_agent(REINFORCE, normalize_advantage=True, **reinforce),
            "rescaled",
        ),
        "PPO, lambda 1, wrong critic": (make_ppo(1.0, "wrong"), "unbiased"),
        "PPO, lambda 0.95, wrong critic": (make_ppo(0.95, "wrong"), "biased"),
        "PPO, lambda 0, wrong critic": (make_ppo(0.0, "wrong"), "biased"),
        "PPO, lambda 0.95, exact critic": (make_ppo(0.95, "exact"), "unbiased"),
        "PPO, lambda 0, exact critic": (make_ppo(0.0, "exact"), "unbiased"),
        "PPO, lambda 0.95, exact critic, normalised": (make_ppo(0.95, "exact", True), "rescaled"),
        "RLOO (G = 8)": (make_agent(RLOO), "unbiased"),
        "Dr. GRPO (G = 8)": (make_agent(DrGRPO), "rescaled by 1 - 1/G"),
        "GRPO, std (G = 8)": (make_agent(GRPO), "biased"),
        "DAPO (G = 8)": (make_agent(DAPO), "as GRPO, std"),
        "GSPO (G = 8)": (make_agent(GSPO), "as GRPO, std"),
        "CISPO (G = 8)": (make_agent(CISPO), "as GRPO, std"),
        "GRPO, standard deviation of the batch (G = 8)": (make_agent(GRPO, scale="batch"), "rescaled"),
        "REINFORCE++": (make_agent(REINFORCEPlusPlus), "rescaled"),
        "leave-one-out, k1 as a loss": (make_agent(GRPOWithK1Loss, **loss), "biased"),
        "leave-one-out, k2 as a loss": (make_agent(GRPO, kl_loss_estimator="k2", **loss), "biased"),
        "leave-one-out, k3 as a loss": (make_agent(GRPO, kl_loss_estimator="k3", **loss), "biased"),
    }


def averages(batches: int) -> dict[str, Comparison]:
    """The three means over steps where responses differ in length, each scaled as well as one number can."""
    found = {}
    for average in ("constant", "token", "sequence"):
        agent = make_agent(GRPO, EOS_TREE, scale="leave-one-out", average=average)
        gradients = np.stack([step_gradient(agent, rollout) for rollout in collect(agent, batches)])
        target = np.concatenate(truth(agent).gradient).ravel()
        mean = gradients.mean(0)
        best = (
            agent.envs.unwrapped.dynamics.horizon if average == "constant" else target @ mean / (mean @ mean)
        )
        found[average] = compare(best * gradients, target)
    return found


# -- exact expectations -------------------------------------------------------------------------------------


def every_response(agent: Agent) -> tuple[Rollout, torch.Tensor]:
    """A rollout with each response of the tree once, and how likely each is, ``[B]``; no sampling error."""
    (rollout,) = collect(agent, 1)
    names = torch.cat([rollout.inputs["rows"][:, :1], rollout.actions], 1).numpy()
    _, first = np.unique(names, axis=0, return_index=True)
    rollout = rollout[torch.from_numpy(first)]
    probs = (rollout.log_probs * rollout.mask).sum(
        1
    ).double().exp() / agent.envs.unwrapped.dynamics.num_prompts
    if abs(float(probs.sum()) - 1) > 1e-4:
        raise RuntimeError(f"only {float(probs.sum()):.4f} of the responses turned up; raise n_episodes")
    return rollout, probs.float()


def kl_gradient(placement: str, estimator: str, tree: dict[str, Any], policy_seed: int) -> np.ndarray:
    """The expected gradient step against the KL alone, with the KL in the "reward" or in the "loss"."""
    kwargs: dict[str, Any] = {"n_episodes": 4096 * tree["horizon"] ** 2, "policy_seed": policy_seed}
    if placement == "reward":
        tree = tree | {"kl_estimator": estimator}
        agent = make_agent(REINFORCE, tree, baseline="none", gamma=1.0, **kwargs)
    elif estimator == "k1":
        agent = make_agent(GRPOWithK1Loss, tree, kl_in="loss", **kwargs)
    else:
        agent = make_agent(GRPO, tree, kl_in="loss", kl_loss_estimator=estimator, **kwargs)
    rollout, probs = every_response(agent)
    if placement == "reward":
        rollout.rewards = -rollout.penalties
    else:
        agent.advantages = lambda rollout: torch.zeros_like(rollout.rewards)
    return step_gradient(agent, rollout, probs)


def true_kl_gradient(tree: dict[str, Any], policy_seed: int) -> np.ndarray:
    """``-kl_coef`` times the gradient of the KL: what is left of the objective's without the scores."""
    with_kl = make_agent(GRPO, tree, policy_seed)
    without = make_agent(GRPO, tree | {"kl_coef": 0.0}, policy_seed)
    return np.concatenate(truth(with_kl).gradient).ravel() - np.concatenate(truth(without).gradient).ravel()


PLACEMENTS = (
    ("reward", "k1"),
    ("loss", "k2"),
    ("loss", "k3"),
    ("reward", "k3"),
    ("reward", "k2"),
    ("loss", "k1"),
)


def placements(
    tree: dict[str, Any] = BANDIT, policy_seed: int = BANDIT_SEED
) -> dict[tuple[str, str], tuple[float, float]]:
    """For each placement of each estimator: cosine with the KL's gradient (NaN for none) and relative length."""
    target = true_kl_gradient(tree, policy_seed)
    found = {}
    for placement, estimator in PLACEMENTS:
        gradient = kl_gradient(placement, estimator, tree, policy_seed)
        length = np.linalg.norm(gradient) / np.linalg.norm(target)
        cosine = gradient @ target / np.linalg.norm(gradient) / np.linalg.norm(target)
        found[placement, estimator] = (float(cosine) if length > 1e-4 else float("nan"), float(length))
    return found


def gae_error(gae_lambda: float) -> float:
    """Largest error of the mean advantage after any prefix and token, with exact values."""
    agent = make_ppo(gae_lambda, "exact", n_episodes=32768)
    rollout, probs = every_response(agent)
    estimate = agent.advantages(rollout).double().numpy()
    weight = np.broadcast_to(probs[:, None], estimate.shape)
    where = (rollout.inputs["rows"].numpy(), rollout.actions.numpy())
    total, mass = np.zeros(agent.policy.logits.shape), np.zeros(agent.policy.logits.shape)
    np.add.at(total, where, weight * estimate)
    np.add.at(mass, where, weight)
    return float(np.abs(total / mass - np.concatenate(truth(agent).advantages)).max())


# -- what is stored -----------------------------------------------------------------------------------------


def store(path: Path, found: dict[str, Any]) -> None:
    """Write what has been measured, one line for each name."""
    lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.items()]
    whole = path.with_suffix(".tmp")  # who is stopped while writing leaves what was there
    whole.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    whole.replace(path)


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in numbers.items()}


def measure_methods(names: list[str], batches: int) -> None:
    """The rows of methods, part by part; what is there is not measured again."""
    for method in methods.METHODS:
        if method.text_only or (names and method.name not in names):
            continue
        cls = getattr(agents, method.class_name)
        settings = dict(method.settings)
        found = est.stored()
        row = found.get(method.name, {})
        if row.get("settings") != settings:
            row = {}
        if row.get("batches") != batches:
            ends = {name: row[name] for name in (*ENDS, "cost") if name in row}
            row = {"settings": settings, "batches": batches} | ends
        wanted = PARTS | ({"own": "own"} if method.name in est.OWN else {})
        parts = tuple({measured: None for part, measured in wanted.items() if part not in row})
        for part, numbers in est.measure(cls, settings, batches, method.name, parts):
            row[part] = rounded(numbers)
            keep(method.name, row)
            print(method.name, part, row[part], flush=True)


def measure_ends(names: list[str]) -> None:
    """Where methods end, for each coefficient and seed; a few seeds of all of them first."""
    for seeds in (1, 3, 5, SEEDS):
        for method in methods.METHODS:
            row = est.stored().get(method.name)
            if row is not None and (not names or method.name in names):
                for where in ENDS:
                    measure_gaps(method.name, getattr(agents, method.class_name), row, where, seeds)


def keep(name: str, row: dict[str, Any]) -> None:
    order = [method.name for method in methods.METHODS]
    found = est.stored() | {name: row}
    store(est.STORED, {n: found[n] for n in sorted(found, key=order.index)})


def measure_gaps(name: str, cls: type[Agent], row: dict[str, Any], where: str, seeds: int) -> None:
    """How far from the optimum a method ends, for each coefficient and seed, in a world of :data:`ENDS`."""
    passes, settings, world = 1 if name in ONE_PASS else EPOCHS, row["settings"], ENDS[where]
    gaps = row.setdefault(where, {f"{beta:g}": [] for beta in BETAS})
    for seed in range(seeds):
        for beta in BETAS:
            if len(gaps[f"{beta:g}"]) > seed:
                continue
            try:
                gap = est.final_gap(
                    cls, beta, seed, UPDATES, world=world, **(settings | {"n_epochs": passes})
                )
            except TypeError:  # a method of a single pass has no number of them
                gap = est.final_gap(cls, beta, seed, UPDATES, world=world, **settings)
            gaps[f"{beta:g}"].append(float(f"{gap:.4g}"))
            keep(name, row)
    print(name, where, seeds, {beta: values[-1] for beta, values in gaps.items()}, flush=True)


def measure_costs(names: list[str], repeats: int = 9) -> None:
    """Processor time of an update on the embedded world, of one pass over 32 answers, relative to GRPO's beside it."""
    env = gym.make("textrl_env:TextRLHF-v0")
    whole = {"n_episodes": 32, "seed": 0, "batch_size": None, "n_epochs": 1, "learning_rate": 0.0}
    base = GRPO("auto", env, **whole)
    rollout = base.learn(1, log_interval=None).collect()
    for method in methods.METHODS:
        found = est.stored().get(method.name)
        if found is None or "cost" in found or (names and method.name not in names):
            continue
        cls = getattr(agents, method.class_name)
        with contextlib.suppress(TypeError):
            agent = cls("auto", env, **(dict(method.settings) | whole))
            own = agent.learn(1, log_interval=None).collect() if agent.policy.has_critic else rollout
            ratios = [_seconds(agent, own) / _seconds(base, rollout) for _ in range(repeats)]
            keep(method.name, found | {"cost": float(f"{np.median(ratios):.3g}")})
            print(method.name, "cost", np.median(ratios), flush=True)


def _seconds(agent: Agent, rollout: Rollout) -> float:
    # Scores above 0, as MaxRL wants them; how long a step takes does not depend on them.
    rollout = dataclasses.replace(rollout, rewards=rollout.rewards + 10.0 * rollout.done)
    started = time.process_time()
    agent.train(rollout)
    return time.process_time() - started


def measure_anatomy(batches: int) -> None:
    """What the bias comes from; tables that are there are not measured again."""
    found = json.loads(ANATOMY.read_text(encoding="utf-8")) if ANATOMY.is_file() else {}
    rows = found.setdefault("estimators", {})
    made = {name: pair for name, pair in estimators().items() if name not in rows}
    for name, (agent, expected) in made.items():
        rows[name] = [expected, *measure(agent, batches)]
        store(ANATOMY, found)
    if "averages" not in found:
        found["averages"] = {name: list(each) for name, each in averages(batches).items()}
    if "corrections" not in found:
        gym.logger.min_level = gym.logger.ERROR  # that the generator is off is the point
        found["corrections"] = {
            name: {mode: list(each) for mode, each in measure_elsewhere(name, batches).items()}
            for name in list(GENERATORS)[:4]
        }
    if "placements" not in found:
        here, tree = placements(), placements(TREE, 1)
        many = [placements(BANDIT | {"ref_seed": i}, i + 100) for i in range(30)]
        found["placements"] = {
            f"{estimator} in the {placement}": [
                here[placement, estimator][0],
                float(np.median([each[placement, estimator][0] for each in many])),
                here[placement, estimator][1],
                tree[placement, estimator][0],
            ]
            for placement, estimator in PLACEMENTS
        }
        for name, numbers in found["placements"].items():  # JSON has no NaN
            found["placements"][name] = [None if np.isnan(x) else x for x in numbers]
    if "gae" not in found:
        found["gae"] = {f"{x:g}": gae_error(x) for x in (0.0, 0.95, 1.0)}
    store(ANATOMY, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=400, help="rollouts for each method")
    parser.add_argument("--only", nargs="*", default=[], help="methods by their names on the command line")
    parser.add_argument("--pages", action="store_true", help="only write the pages")
    parser.add_argument("--methods", action="store_true", help="only write docs/methods.md")
    arguments = parser.parse_args()
    METHODS_DOCUMENT.write_text(methods_page(), encoding="utf-8")
    if arguments.methods:
        return
    if not arguments.pages:
        torch.set_num_threads(1)
        measure_methods(arguments.only, arguments.batches)
        measure_costs(arguments.only)
        measure_ends(arguments.only)
        if not arguments.only:
            measure_anatomy(arguments.batches)
    write_pages(json.loads(ANATOMY.read_text(encoding="utf-8")), est.stored())


if __name__ == "__main__":
    main()
