"""Worlds so small that the policy gradient is known exactly: a tree of tokens, and two turns with answers in between.

Both are read in the same way by :mod:`agents.evaluation.estimators`: an environment (``make_env``), a policy in it that
is a table of logits (``logits``), what any such policy is worth and its gradient (``truth``), and rollouts of it
(``draw``), all slots of a step at once. Left out: languages of more than a few hundred prefixes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from agents.policies.base import Policy
from agents.policies.tabular import TabularPolicy
from agents.rollouts.rollout import Rollout
from textrl_env.envs.token_tree import EOS
from textrl_env.exact import solver as exact
from textrl_env.exact.token_mdp import TokenMDP
from textrl_env.exact.turns import TurnMDP, count_endings, evaluate_turns, solve_turns
from textrl_env.kl import estimate_kl

#: Episodes in a rollout, and of them with one prompt.
EPISODES, GROUP = 64, 8


class Truth(NamedTuple):
    """What a table of logits is worth: the objective, its gradient by the logits, and the value of each row."""

    objective: float
    gradient: np.ndarray
    values: np.ndarray


class SmallWorld(Protocol):
    """What :mod:`agents.evaluation.estimators` asks of a world.

    Attributes:
        name: For tables.
        kl_coef: Weight of the KL.
        eos: Whether token 0 ends a response.
        policy: Class of policies that are a table in it.
    """

    name: str
    kl_coef: float
    eos: bool
    policy: type[TabularPolicy]

    def make_env(self) -> gym.vector.VectorEnv:
        """An environment with the world's KL and budget; rollouts do not come from it."""
        ...

    def logits(self, env: gym.vector.VectorEnv) -> np.ndarray:
        """Of the policy that is looked at, float64 ``[rows, V]``."""
        ...

    def reference(self, env: gym.vector.VectorEnv) -> np.ndarray:
        """Of the reference, ``[rows, V]``."""
        ...

    def value_of(self, env: gym.vector.VectorEnv, logits: np.ndarray) -> Truth:
        """Everything about a policy, exactly."""
        ...

    def best(self, env: gym.vector.VectorEnv) -> float:
        """The objective of the best policy there is."""
        ...

    def draw(
        self,
        env: gym.vector.VectorEnv,
        behaviour: np.ndarray,
        rng: np.random.Generator,
        policy: np.ndarray | None = None,
    ) -> Rollout:
        """A rollout of :data:`EPISODES` episodes, see :func:`draw`."""
        ...


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
    policy = TabularPolicy

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

    def reference(self, env: gym.vector.VectorEnv) -> np.ndarray:
        """The reference's, ``[rows, V]``."""
        return env.unwrapped.dynamics.ref_table

    def value_of(self, env: gym.vector.VectorEnv, logits: np.ndarray) -> Truth:
        """Everything about a policy, exactly."""
        found = truth(env, logits)
        return Truth(found.objective, np.concatenate(found.gradient), np.concatenate(found.value))

    def best(self, env: gym.vector.VectorEnv) -> float:
        """The objective of the best policy."""
        return exact.solve(exact.from_token_tree(env)).objective

    def draw(
        self,
        env: gym.vector.VectorEnv,
        behaviour: np.ndarray,
        rng: np.random.Generator,
        policy: np.ndarray | None = None,
    ) -> Rollout:
        """A rollout, see :func:`draw`."""
        return draw(env, behaviour, rng, policy=policy)


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
    ended = rows, actions, mask, done, done
    tables = tree.ref_table, tree.score_table
    return _as_rollout(
        tree.kl_coef, tree.kl_estimator, tables, ended, said, None if policy is None else acting
    )


def _as_rollout(
    kl_coef: float,
    kl_estimator: str,
    tables: tuple[np.ndarray, np.ndarray],
    steps: tuple[np.ndarray, ...],
    said: np.ndarray,
    acting: np.ndarray | None,
    **more: Any,
) -> Rollout:
    """Steps as a rollout.

    Args:
        kl_coef: Weight of the KL.
        kl_estimator: What the reward is charged.
        tables: Of the reference's log-probabilities and of the scores, ``[rows, V]``.
        steps: Rows, actions, who acted, where an episode ends and where a score is given, each ``[B, T]``.
        said: The policy's log-probabilities, ``[rows, V]``.
        acting: Those of a generator of its own; None is the policy.
        **more: Fields of the rollout.
    """
    rows, actions, mask, done, scored = steps
    ref_table, score_table = tables
    log_probs, ref = said[rows, actions] * mask, ref_table[rows, actions] * mask
    penalties = kl_coef * estimate_kl(log_probs - ref, kl_estimator) * mask
    scores = np.where(scored, score_table[rows, actions], 0.0)
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
        **{name: torch.from_numpy(value) for name, value in more.items()},
    )
    if acting is not None:
        rollout.sampling_log_probs = torch.from_numpy(acting[rows, actions] * mask).float()
    return rollout


# -- two turns ----------------------------------------------------------------------------------------------


class ConversationTable(TabularPolicy):
    """A table with a row for each prefix of a conversation; it is given rows and acts in no environment."""

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        critic: str | None = "separate",
        logits: Any = None,
        eos: bool = True,
    ) -> None:
        Policy.__init__(self, observation_space, action_space, critic)
        self.eos = eos
        self.logits = nn.Parameter(torch.tensor(np.asarray(logits, dtype=np.float32)))
        self.values = None if critic is None else nn.Parameter(torch.zeros(len(self.logits)))


@dataclasses.dataclass(frozen=True)
class TwoTurns:
    """Two turns of the policy with an answer drawn in between, as :mod:`textrl_env.exact.turns` enumerates them.

    A turn ends with token 0 or after ``turn_length`` tokens. Any first turn may be answered in ``answers`` ways, with
    probabilities of its own; it earns 0.5 or nothing, the second 1 or nothing, about one turn in ``1 / share``.

    Attributes:
        name: For tables.
        vocab_size: Tokens.
        turn_length: The most tokens of a turn.
        num_prompts: Starts.
        answers: To each first turn.
        kl_coef: Weight of the KL.
        share: Of turns that earn something.
        seed: Of the world and the policy in it.
    """

    name: str = "two turns"
    vocab_size: int = 3
    turn_length: int = 2
    num_prompts: int = 2
    answers: int = 2
    kl_coef: float = 0.1
    share: float = 0.3
    seed: int = 0
    eos = True
    policy = ConversationTable

    def mdp(self) -> TurnMDP:
        """All conversations, as arrays."""
        return _conversation(self)

    def make_env(self) -> gym.vector.VectorEnv:
        """A tree with as many tokens to an episode."""
        return gym.make_vec(
            "textrl_env:TokenTree-v0",
            num_envs=EPISODES,
            vocab_size=self.vocab_size,
            horizon=2 * self.turn_length,
            num_prompts=self.num_prompts,
            eos=True,
            kl_coef=self.kl_coef,
        )

    def logits(self, env: Any = None) -> np.ndarray:
        """The policy's, float64 ``[rows, V]``."""
        return np.random.default_rng([self.seed, 1]).standard_normal(self.reference().shape)

    def reference(self, env: Any = None) -> np.ndarray:
        """The reference's, ``[rows, V]``: a stage after the other, in each a level after the other."""
        return np.concatenate([level for stage in self.mdp().stages for level in stage.ref_log_probs])

    def levels(self, table: np.ndarray) -> list[list[np.ndarray]]:
        """A table ``[rows, V]`` as the solver wants it, stage by stage and level by level."""
        sizes = [len(level) for stage in self.mdp().stages for level in stage.ref_log_probs]
        levels = np.split(table, np.cumsum(sizes)[:-1])
        return [levels[: self.turn_length], levels[self.turn_length :]]

    def value_of(self, env: Any, logits: np.ndarray) -> Truth:
        """Everything about a policy, exactly."""
        table = exact.log_softmax(np.asarray(logits, dtype=np.float64))
        found = evaluate_turns(self.mdp(), self.levels(table))
        gradient, values = (
            np.concatenate([level for stage in stages for level in stage])
            for stages in (found.gradient, found.value)
        )
        return Truth(found.objective, gradient, values)

    def best(self, env: Any = None) -> float:
        """The objective of the best policy."""
        return solve_turns(self.mdp())[0]

    def draw(
        self, env: Any, behaviour: np.ndarray, rng: np.random.Generator, policy: np.ndarray | None = None
    ) -> Rollout:
        """A rollout, see :func:`draw`."""
        world = self.mdp()
        acting = exact.log_softmax(behaviour)
        said = acting if policy is None else exact.log_softmax(policy)
        steps = 2 * self.turn_length
        rows, actions, turn, state = (np.zeros((EPISODES, steps), dtype=np.int64) for _ in range(4))
        mask, done, scored = (np.zeros((EPISODES, steps), dtype=bool) for _ in range(3))
        start = rng.integers(self.num_prompts, size=EPISODES // GROUP).repeat(GROUP)
        row_offset = 0
        for k, stage in enumerate(world.stages):
            node, alive, ending = (
                start.copy(),
                np.ones(EPISODES, dtype=bool),
                np.zeros(EPISODES, dtype=np.int64),
            )
            endings = 0
            for t, level in enumerate(stage.ref_log_probs):
                at = k * self.turn_length + t
                row = row_offset + np.where(alive, node, 0)
                cumulative = np.exp(acting[row]).cumsum(1)
                token = (rng.random(EPISODES)[:, None] * cumulative[:, -1:] > cumulative).sum(1)
                can_end = stage.ends(t)
                ends = alive & can_end[token]
                number = endings + node * int(can_end.sum()) + (np.cumsum(can_end) - 1)[token]
                ending = np.where(ends, number, ending)
                rows[:, at], actions[:, at], mask[:, at] = row, np.where(alive, token, 0), alive
                turn[:, at], state[:, at], scored[:, at] = k, start + k * self.num_prompts, ends
                done[:, at] = ends & (k == 1)
                alive = alive & ~ends
                node = node * int((~can_end).sum()) + token - 1
                endings += len(level) * int(can_end.sum())
                row_offset += len(level)
            if k == 0:
                cumulative = world.answers[0][ending].cumsum(1)
                answer = (rng.random(EPISODES)[:, None] * cumulative[:, -1:] > cumulative).sum(1)
                start = ending * self.answers + answer
        order = np.argsort(~mask, axis=1, kind="stable")  # a turn that ended early leaves no hole
        packed = [np.take_along_axis(x, order, 1) for x in (rows, actions, mask, done, scored, turn, state)]
        scores = np.concatenate([level for stage in world.stages for level in stage.scores])
        return _as_rollout(
            self.kl_coef,
            "k1",
            (self.reference(), scores),
            tuple(packed[:5]),
            said,
            None if policy is None else acting,
            turn=packed[5],
            state=packed[6],
        )


@functools.lru_cache(maxsize=8)
def _conversation(world: TwoTurns) -> TurnMDP:
    rng = np.random.default_rng([world.seed, 0])

    def stage(prompts: int, earned: float) -> TokenMDP:
        shapes = [(prompts * (world.vocab_size - 1) ** t, world.vocab_size) for t in range(world.turn_length)]
        reference = [exact.log_softmax(rng.standard_normal(shape)) for shape in shapes]
        scores = [earned * (rng.random(shape) < world.share) for shape in shapes]
        return TokenMDP(reference, scores, world.kl_coef, (EOS,))

    first = stage(world.num_prompts, 0.5)
    answers = rng.random((count_endings(first), world.answers))
    answers /= answers.sum(1, keepdims=True)
    return TurnMDP([first, stage(answers.size, 1.0)], [answers])


TWO_TURNS = TwoTurns()
