"""What an estimator of the policy gradient is worth, against the exact gradient.

    textrl gradients --agent my_module:MyAgent

A language of three tokens is small enough to know the gradient of ``J = E[score] - kl_coef * KL`` exactly
(:mod:`textrl_env.exact.solver`). Many small rollouts are drawn from it; from each an agent takes its own first
gradient step, through its own ``train``: advantages, normalisation, masks, loss and averaging are the agent's, nothing
is written again here. The mean of these steps has a direction, and their scatter a size:

- *cosine* of the mean step and the gradient, sampling noise taken out; *bias* is what is left of it at the best length,
  relative to the gradient, and *z* its significance (none: below 3);
- *noise* is the number of tokens after which the scatter of the mean is as long as the mean itself;
- *progress* is the expected cosine of a single step with the gradient, and a bias *matters from* the number of tokens
  from which on a step of an unbiased method makes more of it.

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
from agents.evaluation.worlds import (
    EPISODES,
    GROUP,
    REAL_SCORES,
    RIGHT_OR_WRONG,
    TWO_TURNS,
    SmallWorld,
    World,
    truth,
)
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice

#: How far an update moves the logits along the exact gradient, where samples are some updates old.
STEP = 0.5
#: Ours, measured by benchmarks/gradients.py: name of the method -> what :func:`measure` gives.
STORED = Path(__file__).with_suffix(".json")


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
    cls: type[Agent],
    world: SmallWorld,
    critic: str = "old",
    logits: np.ndarray | None = None,
    **settings: Any,
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
    check_choice("critic", critic, ("old", "exact", "wrong"))
    fed = type(cls.__name__, (cls, _Supplied), {"__module__": cls.__module__})
    settings = {"n_episodes": EPISODES, "learning_rate": 0.0, "seed": 0} | settings
    agent = fed(world.policy, env, policy_kwargs={"logits": logits, "eos": world.eos}, **settings)
    agent.tokens = 0
    agent.weight_norm = 0.0
    agent.supply = iter(())
    if agent.policy.has_critic:
        table = {"old": world.reference(env), "exact": logits, "wrong": None}[critic]
        if table is None:
            values = np.random.default_rng(2).standard_normal(len(logits))
        else:
            values = world.value_of(env, table).values
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
        ValueError: It is NaN or infinite.
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
    if not logits.grad.isfinite().all():
        raise ValueError(f"a step of {kind.__name__} is not finite")
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
def supply(
    world: SmallWorld, batches: int, behind: int = 0, generator: str | None = None
) -> tuple[Rollout, ...]:
    """Rollouts for every agent alike, drawn once.

    Args:
        world: Where.
        batches: How many.
        behind: So many updates ago the policy wrote them.
        generator: One of :data:`GENERATORS` wrote them, and the policy says the log-probabilities.
    """
    env = world.make_env()
    logits = world.logits(env)
    gradient = world.value_of(env, logits).gradient
    rng = np.random.default_rng(0)
    if generator is not None:
        table = GENERATORS[generator](logits, gradient)
        return tuple(world.draw(env, table, rng, policy=logits) for _ in range(batches))
    return tuple(world.draw(env, logits - behind * STEP * gradient, rng) for _ in range(batches))


def steps_of(agent: Agent, rollouts: tuple[Rollout, ...], fresh: bool = True) -> tuple[np.ndarray, float]:
    """An agent's steps from rollouts, ``[K, P]``, and how many tokens each took; one may need several rollouts.

    Raises:
        ValueError: All of them are 0, or one is NaN or infinite.
    """
    agent.supply, agent.tokens = iter(rollouts), 0
    steps = []
    while True:
        try:
            steps.append(first_step(agent, fresh))
        except StopIteration:
            break
    if not np.any(steps):
        raise ValueError(
            f"every step of {type(agent).__name__} is 0: its advantages, its loss or its weights are"
        )
    return np.stack(steps), agent.tokens / len(steps)


# -- a row of the table -------------------------------------------------------------------------------------


#: Corrections of what another table has written: none, truncated and masked importance weights.
CORRECTIONS: dict[str, str | None] = {"none": None, "TIS": "sequence_truncate", "MIS": "sequence_mask"}
#: The generators that are corrected for, and what their parts of a row are called before the correction.
ELSEWHERE = {"32 updates behind": "", "temperature 0.8": "temperature ", "in bfloat16": "bf16 "}
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
    parts: tuple[str, ...] = ("plain", "real", "turns", "own", "old", "elsewhere"),
) -> Iterator[tuple[str, dict[str, float]]]:
    """The row of a method, part by part.

    Args:
        cls: Its class.
        settings: Arguments of the class.
        batches: Rollouts of :data:`EPISODES` episodes for the first parts; the last two take half.
        name: Of a method of ours, for its own objective.
        parts: Which: "plain" (right or wrong), "real" (real scores), "turns" (two turns), "own" (its own objective),
            "old" (samples 4 and 16 updates old), "elsewhere" (another generator, one of :data:`ELSEWHERE`, with each of
            :data:`CORRECTIONS`).

    Yields:
        The name of what was measured and a :class:`Direction` as a dict; {"refused": why} where the method refuses.
    """
    settings = dict(settings or {})

    def step(
        world: SmallWorld, target: np.ndarray, rollouts: tuple[Rollout, ...], fresh: bool = True, **more: Any
    ):
        try:
            with _quiet():
                agent = make_agent(cls, world, **(settings | more))
                found = direction(*steps_of(agent, rollouts, fresh), target)
                return dict(zip(found._fields, found, strict=True))
        except ValueError as error:
            return {"refused": str(error)}

    def exact_gradient(world: SmallWorld) -> np.ndarray:
        env = world.make_env()
        return world.value_of(env, world.logits(env)).gradient.ravel()

    half = max(batches // 2, 2)
    if "plain" in parts:
        yield "plain", step(RIGHT_OR_WRONG, exact_gradient(RIGHT_OR_WRONG), supply(RIGHT_OR_WRONG, batches))
    if "real" in parts:
        yield "real", step(REAL_SCORES, exact_gradient(REAL_SCORES), supply(REAL_SCORES, batches))
    if "turns" in parts:
        yield "turns", step(TWO_TURNS, exact_gradient(TWO_TURNS), supply(TWO_TURNS, batches))
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
        for generator, prefix in ELSEWHERE.items():
            rollouts = supply(RIGHT_OR_WRONG, half, generator=generator)
            for label, mode in CORRECTIONS.items():
                yield prefix + label, step(RIGHT_OR_WRONG, target, rollouts, importance_sampling_mode=mode)


#: Tokens of a step whose progress is shown.
STEP_TOKENS = 256


def progress(found: dict[str, float], tokens: float = STEP_TOKENS) -> float:
    """The expected cosine of one step from so many tokens with the exact gradient, of a :class:`Direction`."""
    return found["cosine"] / math.sqrt(1 + found["noise"] / tokens)


def matters_from(found: dict[str, float], unbiased: dict[str, float]) -> float | None:
    """From how many tokens in a step on an unbiased method makes more progress; before, less noise makes up for a bias.

    Args:
        found: Of a method, a :class:`Direction` as a dict.
        unbiased: Of one with the right direction.

    Returns:
        0 where the unbiased method is always ahead, None where no significant bias was found.
    """
    squared = found["cosine"] * abs(found["cosine"])
    if found["z"] < 3 or squared >= 1:
        return None
    # Equal progress: c^2 / (1 + n / tokens) = 1 / (1 + n' / tokens).
    return max((squared * unbiased["noise"] - found["noise"]) / (1 - squared), 0.0)


#: Verdicts, and what the cosine is above for each; a bias that is not significant (z below 3) is none.
VERDICTS = {"right direction": 0.999, "nearly": 0.99, "biased": -math.inf}


def verdict(row: dict[str, Any]) -> str:
    """One of :data:`VERDICTS`, the worst of the worlds of "plain", "real" and "turns"."""
    found = [row[part] for part in ("plain", "real", "turns") if "cosine" in row.get(part, {})]
    least = min((f["cosine"] for f in found if f["z"] >= 3), default=1.0)
    return next(name for name, bound in VERDICTS.items() if least > bound)


def final_gap(
    cls: type[Agent],
    kl_coef: float,
    seed: int,
    updates: int = 300,
    rate: float = 0.05,
    world: SmallWorld = RIGHT_OR_WRONG,
    **settings: Any,
) -> float:
    """How far from the exact optimum a method ends, ``(J* - J) / (J* - J_ref)``, from the reference.

    Adam at a rate that falls to 0, over the same number of rollouts of :data:`EPISODES` episodes for every method.

    Args:
        cls: The method.
        kl_coef: Weight of the KL.
        seed: Of the samples.
        updates: Rollouts.
        rate: The first learning rate.
        world: Where, but for the coefficient.
        **settings: Arguments of the class.
    """
    world = dataclasses.replace(world, kl_coef=kl_coef)
    env = world.make_env()
    start = world.reference(env)
    agent = make_agent(cls, world, logits=start, **({"learning_rate": rate, "seed": seed} | settings))
    rng = np.random.default_rng([seed, 7])

    def rollouts() -> Iterator[Rollout]:
        for _ in range(updates):
            yield world.draw(env, agent.policy.logits.detach().double().numpy(), rng)

    agent.supply = rollouts()
    for step in range(updates):
        agent.learning_rate = rate * (1 - step / updates)
        try:
            agent.train(agent.collect())
        except StopIteration:  # it takes several rollouts for an update, and those are spent
            break
    best, first = world.best(env), world.value_of(env, start).objective
    end = world.value_of(env, agent.policy.logits.detach().double().numpy()).objective
    return float((best - end) / (best - first))


def stored() -> dict[str, dict[str, Any]]:
    """What has been measured of our methods, by name."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else {}
