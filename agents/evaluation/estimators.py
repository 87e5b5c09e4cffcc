"""What an estimator of the policy gradient is worth, against the exact gradient.

    textrl gradients --agent my_module:MyAgent

A language of three tokens is small enough to know the gradient of ``J = E[score] - kl_coef * KL`` exactly
(:mod:`textrl_env.exact.solver`). Many small rollouts are drawn from it; from each an agent takes its own first
gradient step, through its own ``train``: advantages, normalisation, masks, loss and averaging are the agent's, nothing
is written again here. The mean of these steps has a direction, and their scatter a size:

- *cosine* of the mean step and the gradient, sampling noise taken out; *bias* is what is left of it at the best length,
  relative to the gradient, and *z* its significance (none: below 3);
- *noise* is the number of tokens after which the scatter of the mean is as long as the mean itself.

Left out: what becomes of a biased step in the course of learning, which :func:`final_gap` tells of one world, and
methods that need a language model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from agents.algorithms import maths
from agents.base import Agent
from agents.policies.tabular import TabularPolicy
from agents.rollouts.rollout import Rollout
from textrl_env.envs.token_tree import EOS
from textrl_env.exact import solver as exact
from textrl_env.kl import estimate_kl

#: Episodes in a rollout, and of them with one prompt.
EPISODES, GROUP = 64, 8
#: How far an update moves the logits along the exact gradient, where samples are some updates old.
STEP = 0.5
#: Ours, measured by benchmarks/gradients.py: name of the method -> what :func:`measure` gives.
STORED = Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class World:
    """A token tree and a policy in it.

    Attributes:
        name: For tables.
        vocab_size: Tokens.
        horizon: The most tokens of a response.
        eos: Whether token 0 ends a response, so that lengths differ.
        kl_coef: Weight of the KL.
        kl_estimator: What the reward is charged.
        pass_rates: Scores are 1 and 0, right and wrong, so that the policy is right with about these probabilities, one
            for each prompt; None leaves scores drawn from N(0, 1).
        policy_seed: Of the policy's logits.
    """

    name: str
    vocab_size: int = 3
    horizon: int = 4
    eos: bool = True
    kl_coef: float = 0.1
    kl_estimator: str = "k1"
    pass_rates: tuple[float, ...] | None = (0.6, 0.1)
    policy_seed: int = 1

    def make_env(self, num_envs: int = EPISODES) -> gym.vector.VectorEnv:
        """The tree as a vector env."""
        env = gym.make_vec(
            "textrl_env:TokenTree-v0",
            num_envs=num_envs,
            vocab_size=self.vocab_size,
            horizon=self.horizon,
            num_prompts=2,
            eos=self.eos,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
        )
        if self.pass_rates is not None:
            tree = env.unwrapped.dynamics
            tree.score_table = _right_or_wrong(env, self.logits(env), self.pass_rates)
        return env

    def logits(self, env: gym.vector.VectorEnv) -> np.ndarray:
        """The policy's, float64 ``[rows, V]``."""
        shape = env.unwrapped.dynamics.ref_table.shape
        return np.random.default_rng(self.policy_seed).standard_normal(shape)


#: Lengths differ, scores are right or wrong, and one prompt is much harder than the other.
RIGHT_OR_WRONG = World("right or wrong")
#: All responses equally long, every one with a score of its own.
REAL_SCORES = World("real scores", horizon=3, eos=False, kl_coef=0.5, pass_rates=None)


def _right_or_wrong(env: gym.vector.VectorEnv, logits: np.ndarray, rates: tuple[float, ...]) -> np.ndarray:
    """The scores made 1 for the responses that score best, up to a share of the policy's probability, 0 for others."""
    tree, mdp = env.unwrapped.dynamics, exact.from_token_tree(env)
    policy = _levels(tree, exact.log_softmax(logits))
    found = np.zeros_like(tree.score_table)
    for prompt, rate in enumerate(rates):
        endings = []  # (score, probability, row, token) of every response to the prompt
        for t, reached in enumerate(mdp.visits(policy)):
            size = len(reached) // tree.num_prompts
            for row in range(prompt * size, (prompt + 1) * size):
                for token in np.flatnonzero(mdp.ends(t)):
                    at = int(tree.level_start[t]) + row, int(token)
                    mass = reached[row] * np.exp(policy[t][row, token]) * tree.num_prompts
                    endings.append((tree.score_table[at], mass, at))
        total = 0.0
        for _, mass, at in sorted(endings, reverse=True):
            if total + mass / 2 < rate:
                found[at], total = 1.0, total + mass
    return found


def _levels(tree: Any, table: np.ndarray) -> list[np.ndarray]:
    return [table[tree.level(t)] for t in range(tree.horizon)]


def truth(env: gym.vector.VectorEnv, logits: np.ndarray) -> exact.PolicyValue:
    """Everything about a policy that is a table of logits ``[rows, V]``, exactly."""
    table = exact.log_softmax(np.asarray(logits, dtype=np.float64))
    return exact.evaluate(exact.from_token_tree(env), _levels(env.unwrapped.dynamics, table))


def gradient_of(env: gym.vector.VectorEnv, logits: np.ndarray) -> np.ndarray:
    """The exact gradient of the objective by the logits, flat."""
    return np.concatenate(truth(env, logits).gradient).ravel()


# -- rollouts -----------------------------------------------------------------------------------------------


def draw(
    env: gym.vector.VectorEnv,
    behaviour: np.ndarray,
    rng: np.random.Generator,
    episodes: int = EPISODES,
    policy: np.ndarray | None = None,
) -> Rollout:
    """Episodes in groups, as stepping the environment gives them, all slots of a level at once.

    Args:
        env: A token tree.
        behaviour: Logits of the table that acts, ``[rows, V]``.
        rng: Source of randomness.
        episodes: How many, a multiple of :data:`GROUP`.
        policy: Logits of the policy that log-probabilities and the KL are said by, where another table acts, as a
            generator of its own does; None is ``behaviour``.
    """
    tree = env.unwrapped.dynamics
    acting = exact.log_softmax(behaviour)
    said = acting if policy is None else exact.log_softmax(policy)
    prompts = rng.integers(tree.num_prompts, size=episodes // GROUP).repeat(GROUP)
    shape = episodes, tree.horizon
    rows, actions = (np.zeros(shape, dtype=np.int64) for _ in range(2))
    mask, done = (np.zeros(shape, dtype=bool) for _ in range(2))
    node, alive = prompts, np.ones(episodes, dtype=bool)
    for t in range(tree.horizon):
        row = np.where(alive, tree.level_start[t] + node, 0)
        cumulative = np.exp(acting[row]).cumsum(1)
        token = (rng.random(episodes)[:, None] * cumulative[:, -1:] > cumulative).sum(1)
        ended = alive & ((t == tree.horizon - 1) | (tree.eos & (token == EOS)))
        rows[:, t], actions[:, t], mask[:, t], done[:, t] = row, np.where(alive, token, 0), alive, ended
        alive = alive & ~ended
        node = np.where(alive, node * tree.branching + token - int(tree.eos), 0)
    return _as_rollout(tree, rows, actions, mask, done, said, None if policy is None else acting)


def _as_rollout(
    tree: Any,
    rows: np.ndarray,
    actions: np.ndarray,
    mask: np.ndarray,
    done: np.ndarray,
    said: np.ndarray,
    acting: np.ndarray | None,
) -> Rollout:
    log_probs, ref = said[rows, actions] * mask, tree.ref_table[rows, actions] * mask
    penalties = tree.kl_coef * estimate_kl(log_probs - ref, tree.kl_estimator) * mask
    scores = np.where(done, tree.score_table[rows, actions], 0.0)
    zeros = torch.zeros(mask.shape)
    rollout = Rollout(
        inputs={"rows": torch.from_numpy(rows * mask)},
        actions=torch.from_numpy(actions),
        rewards=torch.from_numpy(scores - penalties),
        log_probs=torch.from_numpy(log_probs).float(),
        values=zeros,
        next_values=zeros,
        mask=torch.from_numpy(mask),
        done=torch.from_numpy(done),
        ref_log_probs=torch.from_numpy(ref).float(),
        penalties=torch.from_numpy(penalties),
        group=torch.arange(len(mask)) // GROUP,
    )
    if acting is not None:
        rollout.sampling_log_probs = torch.from_numpy(acting[rows, actions] * mask).float()
    return rollout


class _Supplied(Agent):
    """Stands below a method's class and above :class:`Agent`: rollouts come from ``supply``, not from the env."""

    def collect(self) -> Rollout:
        """The next rollout, with the critic's values where there is one."""
        rollout = dataclasses.replace(next(self.supply))
        self.tokens += int(rollout.mask.sum())
        if self.policy.has_critic:
            values = self.policy.values.detach()[rollout.inputs["rows"]] * rollout.mask
            arrays = (x.numpy() for x in (values, rollout.mask, rollout.done))
            array, mask, done = arrays
            shifted = maths.shift_values(array, np.zeros(len(array), array.dtype), mask, done)
            rollout.values, rollout.next_values = values, torch.from_numpy(shifted) * rollout.mask
        return self.look_at_sampling(rollout)


def make_agent(
    cls: type[Agent], world: World, critic: str = "old", logits: np.ndarray | None = None, **settings: Any
) -> Agent:
    """An agent of a class in a world, with a table as its policy, that is to be given its rollouts.

    Args:
        cls: The method.
        world: Where.
        critic: Of methods that have one: "old" holds the exact values of the reference, as a critic that lags behind
            its policy does; "exact" those of the policy; "wrong" numbers drawn from N(0, 1).
        logits: Of the policy; None is the world's.
        **settings: Arguments of the class.
    """
    env = world.make_env()
    logits = world.logits(env) if logits is None else logits
    fed = type(cls.__name__, (cls, _Supplied), {"__module__": cls.__module__})
    settings = {"n_episodes": EPISODES, "learning_rate": 0.0, "seed": 0} | settings
    agent = fed(TabularPolicy, env, policy_kwargs={"logits": logits, "eos": world.eos}, **settings)
    agent.tokens = 0
    agent.weight_norm = 0.0
    agent.supply = iter(())
    if agent.policy.has_critic:
        table = {"old": env.unwrapped.dynamics.ref_table, "exact": logits, "wrong": None}[critic]
        if table is None:
            values = np.random.default_rng(2).standard_normal(len(logits))
        else:
            values = np.concatenate(truth(env, table).value)
        agent.policy.values.data = torch.from_numpy(values).float()
    return agent


class _StepTaken(Exception):
    """The gradient of the first step is there; what a method does after it does not matter."""


def first_step(agent: Agent, fresh: bool = True) -> np.ndarray:
    """The direction of the first gradient step that an agent takes from its next rollout, by the logits, flat.

    Args:
        agent: From :func:`make_agent`. The step is not taken, so that it stays where it is.
        fresh: Whether its policy wrote the rollout. An older one's keeps the old log-probabilities.

    Raises:
        RuntimeError: No gradient reached the policy.
    """
    kind, logits = type(agent), agent.policy.logits

    def stop() -> None:
        kind.before_step(agent)
        raise _StepTaken

    agent.before_step = stop
    agent.update = lambda batch, new=False: kind.update(agent, batch, new and fresh)
    logits.grad = None
    rollout = agent.collect()
    # A train() of its own, without update(), ends without the exception; at a learning rate of 0 nothing has moved.
    with contextlib.suppress(_StepTaken):
        agent.train(rollout if agent.keeps_unscored else rollout.without_unscored())
    if logits.grad is None:
        raise RuntimeError(f"{kind.__name__} took no gradient step from a rollout")
    return -logits.grad.double().numpy().ravel()


# -- comparing ----------------------------------------------------------------------------------------------


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


class Direction(NamedTuple):
    """Mean and scatter of an agent's steps: cosine, bias at the best length and its z, noise in tokens."""

    cosine: float
    bias: float
    z: float
    noise: float


def direction(steps: np.ndarray, tokens: float, target: np.ndarray) -> Direction:
    """How steps ``[K, P]`` of ``tokens`` each lie to the exact gradient ``[P]``, whatever their length.

    The squared length of the mean step is estimated by products of different steps, so that noise does not count.
    """
    mean = steps.mean(0)
    squared = max(_mean_over_pairs(steps @ steps.T), 1e-12)
    # The length at which the mean step, or one that goes the wrong way turned round, is nearest to the gradient.
    best = abs(float(target @ mean)) / squared
    found = compare(best * steps, target)
    scatter = float(((steps - mean) ** 2).sum() / (len(steps) - 1))
    return Direction(min(found.cosine, 1.0), found.bias, found.z, tokens * scatter / squared)


#: What a generator's table is, made from the policy's and the exact gradient of the objective.
GENERATORS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "in bfloat16": lambda logits, gradient: torch.from_numpy(logits).bfloat16().double().numpy(),
    "temperature 0.8": lambda logits, gradient: logits / 0.8,
    "2 updates behind": lambda logits, gradient: logits - 2 * STEP * gradient,
    "16 updates behind": lambda logits, gradient: logits - 16 * STEP * gradient,
    "32 updates behind": lambda logits, gradient: logits - 32 * STEP * gradient,
}


@functools.lru_cache(maxsize=16)
def supply(world: World, batches: int, behind: int = 0, generator: str | None = None) -> tuple[Rollout, ...]:
    """Rollouts for every agent alike, drawn once.

    Args:
        world: Where.
        batches: How many.
        behind: So many updates ago the policy wrote them.
        generator: One of :data:`GENERATORS` wrote them, and the policy says the log-probabilities.
    """
    env = world.make_env()
    logits = world.logits(env)
    gradient = gradient_of(env, logits).reshape(logits.shape)
    rng = np.random.default_rng(0)
    if generator is not None:
        table = GENERATORS[generator](logits, gradient)
        return tuple(draw(env, table, rng, policy=logits) for _ in range(batches))
    return tuple(draw(env, logits - behind * STEP * gradient, rng) for _ in range(batches))


def steps_of(agent: Agent, rollouts: tuple[Rollout, ...], fresh: bool = True) -> tuple[np.ndarray, float]:
    """An agent's steps from rollouts, ``[K, P]``, and how many tokens each took; one may need several rollouts."""
    agent.supply, agent.tokens = iter(rollouts), 0
    steps = []
    while True:
        try:
            steps.append(first_step(agent, fresh))
        except StopIteration:
            break
    return np.stack(steps), agent.tokens / len(steps)


# -- a row of the table -------------------------------------------------------------------------------------


#: Corrections of what another table has written: none, truncated and masked importance weights.
CORRECTIONS: dict[str, str | None] = {"none": None, "TIS": "sequence_truncate", "MIS": "sequence_mask"}
#: What else an estimator's own objective is, in :func:`own_weight`.
OWN = ("reinforce", "rloo", "dr-grpo", "maxrl", "pass-at-k")


def own_weight(name: str, rate: float, group: int = GROUP, k: int = 4) -> float:
    """How much a prompt counts that is solved at a rate, where scores are right and wrong and there is no KL.

    A method whose advantages depend on a group's scores alone climbs ``sum over prompts of F(rate)`` for some ``F``;
    this is ``F'``, exactly, at a finite group.

    Args:
        name: Of the method, one of :data:`OWN`, or "grpo" without its mean over each response.
        rate: Probability of a right answer.
        group: Answers to a prompt, ``G``.
        k: Of pass@k.
    """
    if name == "maxrl":
        return sum((1 - rate) ** j for j in range(group - 1))
    if name == "pass-at-k":
        return k * (1 - rate) ** (k - 1)
    if name == "grpo":
        # E over the number of right answers of (K (G - K) / G^2) / std, over p (1 - p).
        counts = np.arange(1, group)
        ways = np.array([float(math.comb(group, int(c))) for c in counts])
        chance = ways * rate**counts * (1 - rate) ** (group - counts)
        spread = counts * (group - counts) / group**2
        std = np.sqrt(spread * group / (group - 1)) + 1e-4
        return float((chance * spread / std).sum() / (rate * (1 - rate)))
    return {"dr-grpo": 1 - 1 / group}.get(name, 1.0)


def own_gradient(name: str, world: World) -> np.ndarray:
    """The exact gradient of what a method climbs where scores are right and wrong and there is no KL, flat."""
    env = world.make_env()
    logits = world.logits(env)
    tree = env.unwrapped.dynamics
    total = np.zeros(logits.shape)
    for prompt in range(tree.num_prompts):
        only = dataclasses.replace(world, kl_coef=0.0).make_env()
        scores = only.unwrapped.dynamics.score_table
        for t in range(tree.horizon):
            size = tree.branching**t
            rows = np.arange(tree.level_start[t], tree.level_start[t + 1])
            scores[rows[(rows - tree.level_start[t]) // size != prompt]] = 0.0
        value = truth(only, logits)
        rate = value.score * tree.num_prompts
        total += own_weight(name, rate) * np.concatenate(value.gradient)
    return total.ravel()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """That a generator is off is the point, and said by the table."""
    level, gym.logger.min_level = gym.logger.min_level, gym.logger.ERROR
    try:
        yield
    finally:
        gym.logger.min_level = level


def measure(
    cls: type[Agent],
    settings: dict[str, Any] | None = None,
    batches: int = 200,
    name: str = "",
    parts: tuple[str, ...] = ("plain", "real", "own", "old", "elsewhere"),
) -> Iterator[tuple[str, dict[str, float]]]:
    """The row of a method, part by part.

    Args:
        cls: Its class.
        settings: Arguments of the class.
        batches: Rollouts of :data:`EPISODES` episodes for the first two parts; the others take half.
        name: Of a method of ours, for its own objective.
        parts: Which: "plain" (right or wrong), "real" (real scores), "own" (its own objective), "old" (samples 4 and 16
            updates old), "elsewhere" (a generator 32 updates behind, with each of :data:`CORRECTIONS`).

    Yields:
        The name of what was measured and a :class:`Direction` as a dict; {"refused": why} where the method refuses.
    """
    settings = dict(settings or {})

    def step(
        world: World, target: np.ndarray, rollouts: tuple[Rollout, ...], fresh: bool = True, **more: Any
    ):
        try:
            with _quiet():
                agent = make_agent(cls, world, **(settings | more))
                found = direction(*steps_of(agent, rollouts, fresh), target)
                return dict(zip(found._fields, found, strict=True))
        except ValueError as error:
            return {"refused": str(error)}

    def exact_gradient(world: World) -> np.ndarray:
        env = world.make_env()
        return gradient_of(env, world.logits(env))

    half = max(batches // 2, 2)
    if "plain" in parts:
        yield "plain", step(RIGHT_OR_WRONG, exact_gradient(RIGHT_OR_WRONG), supply(RIGHT_OR_WRONG, batches))
    if "real" in parts:
        yield "real", step(REAL_SCORES, exact_gradient(REAL_SCORES), supply(REAL_SCORES, batches))
    if "own" in parts and name in OWN:
        free = dataclasses.replace(RIGHT_OR_WRONG, kl_coef=0.0)
        yield "own", step(free, own_gradient(name, free), supply(free, batches))
    if "old" in parts:
        target = exact_gradient(RIGHT_OR_WRONG)
        for behind in (4, 16):
            rollouts = supply(RIGHT_OR_WRONG, half, behind)
            yield f"old {behind}", step(RIGHT_OR_WRONG, target, rollouts, fresh=False)
    if "elsewhere" in parts:
        target = exact_gradient(RIGHT_OR_WRONG)
        rollouts = supply(RIGHT_OR_WRONG, half, generator="32 updates behind")
        for label, mode in CORRECTIONS.items():
            yield label, step(RIGHT_OR_WRONG, target, rollouts, importance_sampling_mode=mode)


def verdict(row: dict[str, Any]) -> str:
    """In words, from the worlds of "plain" and "real": "right direction", or "biased" if it is in one of them."""
    found = [row[part] for part in ("plain", "real") if "cosine" in row.get(part, {})]
    return "right direction" if all(f["z"] < 3 or f["cosine"] > 0.999 for f in found) else "biased"


def final_gap(
    cls: type[Agent], kl_coef: float, seed: int, updates: int = 300, rate: float = 0.05, **settings: Any
) -> float:
    """How far from the exact optimum a method ends, ``(J* - J) / (J* - J_ref)``, from the reference.

    Adam at a rate that falls to 0, over the same number of rollouts of :data:`EPISODES` episodes for every method.

    Args:
        cls: The method.
        kl_coef: Weight of the KL.
        seed: Of the samples.
        updates: Rollouts.
        rate: The first learning rate.
        **settings: Arguments of the class.
    """
    world = dataclasses.replace(RIGHT_OR_WRONG, kl_coef=kl_coef)
    env = world.make_env()
    start = env.unwrapped.dynamics.ref_table
    agent = make_agent(cls, world, logits=start, **({"learning_rate": rate, "seed": seed} | settings))
    rng = np.random.default_rng([seed, 7])

    def rollouts() -> Iterator[Rollout]:
        for _ in range(updates):
            yield draw(env, agent.policy.logits.detach().double().numpy(), rng)

    agent.supply = rollouts()
    for step in range(updates):
        agent.learning_rate = rate * (1 - step / updates)
        try:
            agent.train(agent.collect())
        except StopIteration:  # it takes several rollouts for an update, and those are spent
            break
    best = exact.solve(exact.from_token_tree(env)).objective
    end = truth(env, agent.policy.logits.detach().double().numpy()).objective
    return float((best - end) / (best - truth(env, start).objective))


def stored() -> dict[str, dict[str, Any]]:
    """What has been measured of our methods, by name."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else {}
