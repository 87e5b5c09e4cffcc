"""Which policy gradients are the gradient of the objective? Every estimator against the exact answer.

    python benchmarks/gradients.py [--batches 400]
    python benchmarks/gradients.py --methods   # only docs/methods.md, from the table of methods

Agents collect in a small ``TokenTree-v0`` with a policy that is a table, so that
:func:`textrl_env.exact.solver.evaluate` knows the gradient of ``J = E[score] - kl_coef * KL``. Their own collecting,
advantages, normalisation and losses are used; nothing is re-implemented here. Prints the tables and writes
them to docs/gradients.md. What learning does with a biased gradient is left to benchmarks/optimality.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from agents import CISPO, DAPO, GRPO, GSPO, PPO, REINFORCE, RLOO, DrGRPO, REINFORCEPlusPlus
from agents.algorithms import methods
from agents.base import Agent
from agents.policies.factory import Evaluation
from agents.policies.tabular import TabularPolicy
from agents.rollouts.rollout import Rollout
from textrl_env.exact import solver as exact
from textrl_env.lm.next_tokens import sample_actions

#: All responses equally long, so that every mean over steps is the same up to a constant.
TREE = {"vocab_size": 3, "horizon": 3, "num_prompts": 2, "eos": False, "kl_coef": 0.5}
#: Responses of different lengths, for the means.
EOS_TREE = TREE | {"horizon": 4, "eos": True}
BANDIT = {"vocab_size": 5, "horizon": 1, "num_prompts": 1, "eos": False, "kl_coef": 1.0, "ref_seed": 35}
BANDIT_SEED = 36
EPISODES = 64
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "gradients.md"
METHODS_DOCUMENT = DOCUMENT.with_name("methods.md")


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


#: What a generator's table is, made from the policy's and the exact gradient of the objective.
GENERATORS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "in bfloat16": lambda logits, gradient: torch.from_numpy(logits).bfloat16().double().numpy(),
    "temperature 0.8": lambda logits, gradient: logits / 0.8,
    "2 updates behind": lambda logits, gradient: logits - 2 * STEP * gradient,
    "16 updates behind": lambda logits, gradient: logits - 16 * STEP * gradient,
}
#: How far an update moves the logits along the gradient.
STEP = 0.5
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


class Comparison(NamedTuple):
    """A Monte-Carlo gradient against the true one: cosine, relative bias (noise taken out), z of the bias."""

    cosine: float
    bias: float
    z: float


def compare(gradients: np.ndarray, target: np.ndarray) -> Comparison:
    """Is the mean of independent gradients ``[K, P]`` the target ``[P]``?

    The squared bias is estimated without bias by the mean of ``<g_i - g, g_j - g>`` over pairs ``i != j``; z
    is that in units of its standard deviation if there were none.
    """
    difference = gradients - target
    squared_bias = _mean_over_pairs(difference @ difference.T)
    centred = difference - difference.mean(0)
    pairs = len(gradients) * (len(gradients) - 1)
    deviation = np.sqrt(2 * _mean_over_pairs((centred @ centred.T) ** 2) / pairs)
    norm = np.linalg.norm(target)
    length = np.sqrt(max(_mean_over_pairs(gradients @ gradients.T), 1e-12))
    cosine = float(gradients.mean(0) @ target / norm / length)
    return Comparison(cosine, float(np.sqrt(max(squared_bias, 0.0)) / norm), float(squared_bias / deviation))


def _mean_over_pairs(gram: np.ndarray) -> float:
    count = len(gram)
    return float((gram.sum() - np.trace(gram)) / (count * (count - 1)))


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


# -- the page -----------------------------------------------------------------------------------------------


def verdict(found: Comparison) -> str:
    if found.z < 3:
        return "unbiased"
    return "right direction, another length" if found.cosine > 0.999 else "biased"


def estimator_table(batches: int) -> list[str]:
    lines = ["| estimator | expected | cosine | relative bias | z | verdict |", "|---|---|---|---|---|---|"]
    for name, (agent, expected) in estimators().items():
        found = measure(agent, batches)
        cells = f"{found.cosine:.3f} | {found.bias:.3f} | {found.z:.1f} | {verdict(found)} |"
        lines.append(f"| {name} | {expected} | {cells}")
        print(lines[-1], flush=True)
    return lines


def correction_table(batches: int) -> list[str]:
    lines = ["| generator | correction | cosine | relative bias | z | verdict |", "|---|---|---|---|---|---|"]
    gym.logger.min_level = gym.logger.ERROR  # that the generator is off is the point
    for generator in GENERATORS:
        for correction, found in measure_elsewhere(generator, batches).items():
            cells = f"{found.cosine:.3f} | {found.bias:.3f} | {found.z:.1f} | {verdict(found)} |"
            lines.append(f"| {generator} | {correction} | {cells}")
            print(lines[-1], flush=True)
    return lines


def average_table(batches: int) -> list[str]:
    lines = ["| mean over steps | cosine | relative bias | z | verdict |", "|---|---|---|---|---|"]
    for name, found in averages(batches).items():
        lines.append(f"| {name} | {found.cosine:.4f} | {found.bias:.3f} | {found.z:.1f} | {verdict(found)} |")
    return lines


def placement_table(count: int = 30) -> list[str]:
    here = placements()
    many = [placements(BANDIT | {"ref_seed": i}, i + 100) for i in range(count)]
    tree = placements(TREE, 1)
    lines = [
        f"| estimator | cosine, one instance | median of {count} | length | cosine, three tokens |",
        "|---|---|---|---|---|",
    ]
    for key in PLACEMENTS:
        placement, estimator = key
        cosine, length = here[key]
        median = np.median([each[key][0] for each in many])
        cells = [f"{cosine:.3f}", f"{median:.3f}", f"{length:.3f}", f"{tree[key][0]:.3f}"]
        cells = ["zero gradient" if cell == "nan" else cell for cell in cells]
        lines.append(f"| {estimator} in the {placement} | {' | '.join(cells)} |")
    return lines


PAGE = """# Which gradients are the gradient

Written by `python benchmarks/gradients.py`. The objective is `J = E[score] - kl_coef * KL(pi || pi_ref)`, the
KL that of whole responses; its gradient is known exactly, because the environment is a `TokenTree-v0` and the
policy a table. The estimators are the agents' own first gradient step after a rollout.

*Relative bias* is `|E g - grad J| / |grad J|` with the sampling noise taken out, *z* its significance
(unbiased: below 3).

## Estimators

{tree}, {batches} rollouts of {episodes} episodes each; k1 in the reward unless the name says otherwise.

{estimators}

- A baseline that knows nothing of the own episode leaves the gradient alone. GRPO's mean includes it, which
  shortens the gradient by `1/G`; the division by the group's standard deviation weighs prompts differently.
- GAE is exact with an exact critic at any lambda, and with a wrong critic only at lambda = 1.
- Normalising advantages changes the length of the gradient and, because the standard deviation is of the same
  batch, hardly its direction.
- **k2 as a loss is not unbiased here**: a loss on each token's KL does not know that a token also decides
  which prefixes, and which KL, come later. In the reward, k1 does. For one token it is exact, see below.

## Means over steps

{eos_tree}, RLOO's advantages; "token" and "sequence" multiplied by the best single number.

{averages}

Only a constant divides every episode alike. The token mean divides by the batch's own length, which fades as
batches grow; the sequence mean favours short responses, which does not (Liu et al. 2025, Dr. GRPO).

## Where the KL is charged

The KL alone, exact expectations, no sampling. *One instance* is a softmax over five arms, logits of the
reference and of the policy drawn from N(0, 1) (`ref_seed={ref_seed}`, policy seed {policy_seed}); *median*
is over other draws of both; *length* is relative to the true gradient; *three tokens* is the tree above.

{placements}

The published figures for such a policy are 1.000, 1.000, 0.902, 0.040 and zero for the last
(arXiv 2510.01555, 2512.21852); their decimals depend on the draw, and this instance was chosen among some
thousand to resemble them. k2 in the reward is there for completeness.

## Responses that another distribution wrote

The same tree; REINFORCE with the mean of the others, its responses written by a table that is not the policy's:
rounded to bfloat16, at another temperature, or as many updates behind (each moves the logits by {step:g} times the
exact gradient). The corrections are `importance_sampling_mode` with its bounds; "mask" leaves out what is beyond them.

{corrections}

Only the ratio of whole responses is unbiased, and only without a cap. A cap of 3 does not bind where the two
distributions are near each other, so that nothing is lost; far apart, it keeps the variance down at the price of a
bias. A token's own ratio leaves out how likely the response was before and after it, and may do worse than nothing.
The ratio of a long response varies more than that of three tokens: its range is in the log
(`sampling/importance_sampling_ratio/*`).

## GAE with exact values

Largest difference between the mean estimate after any prefix and token, and the exact advantage (the KL
included): {gae}.
"""


METHODS_PAGE = """# Methods

Written by `python benchmarks/gradients.py --methods` from the table in
[`agents/algorithms/methods/__init__.py`](../agents/algorithms/methods/__init__.py). Each is a class of `agents` and a
name for `textrl train --agent`; its file has the equations. *First step* is what theory expects of it against the
gradient of `E[score] - kl_coef * KL`: {expectations}. What was measured is in [gradients.md](gradients.md).

{families}
A method of one's own needs no entry: `--agent my_module:MyAgent`. To add one here, write a class in a file of
`agents/algorithms/methods/` and its entry in the table, then this page again.
"""


def methods_page() -> str:
    """docs/methods.md, from the table of methods."""
    families = ""
    for family, what in methods.FAMILIES.items():
        rows = [m for m in methods.METHODS if m.family == family]
        if rows:
            families += f"## {family.capitalize()}: {what}\n\n"
            families += (
                "| `--agent` | class | paper | what it changes | first step |\n|---|---|---|---|---|\n"
            )
            families += "".join(map(_method_line, rows)) + "\n"
    expectations = ", ".join(f"*{name}* has {what}" for name, what in methods.EXPECTATIONS.items())
    return METHODS_PAGE.format(families=families, expectations=expectations)


def _method_line(method: methods.Method) -> str:
    paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""
    expects = method.expects + (f"; that of {method.climbs}" if method.climbs else "")
    return f"| `{method.name}` | `{method.class_name}` | {paper} | {method.changes} | {expects} |\n"


def describe(tree: dict[str, Any]) -> str:
    return "`" + ", ".join(f"{name}={value}" for name, value in tree.items()) + "`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=400, help="rollouts for each estimator")
    parser.add_argument("--methods", action="store_true", help="only write docs/methods.md")
    arguments = parser.parse_args()
    batches = arguments.batches
    METHODS_DOCUMENT.write_text(methods_page(), encoding="utf-8")
    if arguments.methods:
        return
    torch.set_num_threads(1)
    page = PAGE.format(
        tree=describe(TREE),
        eos_tree=describe(EOS_TREE),
        batches=batches,
        episodes=EPISODES,
        estimators="\n".join(estimator_table(batches)),
        averages="\n".join(average_table(batches)),
        corrections="\n".join(correction_table(batches)),
        step=STEP,
        placements="\n".join(placement_table()),
        ref_seed=BANDIT["ref_seed"],
        policy_seed=BANDIT_SEED,
        gae=", ".join(f"{gae_error(x):.1e} at lambda = {x:g}" for x in (0.0, 0.95, 1.0)),
    )
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
