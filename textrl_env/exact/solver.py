"""Exact answers for problems small enough to enumerate.

For token environments, :class:`TokenMDP` holds a whole language as arrays, one row for each prefix, and the
functions here return what sampling can only estimate: the optimal policy ``pi_ref exp(score / beta) / Z`` and
its value ``beta log Z`` (:func:`solve`); for any policy its objective, KL, entropy, advantages and gradient
(:func:`evaluate`); the distribution of best-of-n (:func:`best_of_n`). For the bandit and the grids,
:func:`value_iteration` does the same with their ``transition_model()``::

    env = gym.make("TokenTree-v0")
    mdp = from_token_tree(env)
    best = solve(mdp)
    evaluate(mdp, best.policy).objective == best.objective

Every average over prompts is uniform. All KLs and entropies are in nats and of whole responses. Numpy only,
float64, no sampling, no discounting of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from textrl_env.errors import check_choice, check_range
from textrl_env.exact.token_mdp import Levels, TokenMDP, from_functions, from_text_env, from_token_tree
from textrl_env.kl import KL_ESTIMATORS

__all__ = [
    "BestOfN",
    "Levels",
    "PolicyValue",
    "Solution",
    "TokenMDP",
    "best_of_n",
    "evaluate",
    "expected_kl",
    "from_functions",
    "from_text_env",
    "from_token_tree",
    "kl_divergence",
    "log_softmax",
    "sequence_distribution",
    "solve",
    "value_iteration",
]


@dataclass(frozen=True)
class Solution:
    """The optimum of ``E[score] - kl_coef * KL(pi || pi_ref)``.

    Attributes:
        objective: ``J* = beta log Z``, averaged over prompts.
        policy: ``log pi*``, ``[n_t, V]``.
        log_z: ``log Z`` of each row, ``[n_t]``; infinite where ``kl_coef`` is 0.
        value: ``V* = beta log Z``, ``[n_t]``: the best that can still be had from here.
        q: ``Q*``, ``[n_t, V]``: the score, or ``V*`` of the next row. The cost of the token itself is left
            out, so ``log pi* = log pi_ref + (Q* - V*) / beta``.
    """

    objective: float
    policy: Levels
    log_z: Levels
    value: Levels
    q: Levels


@dataclass(frozen=True)
class PolicyValue:
    """What one policy is worth; scalars are averages over prompts.

    Attributes:
        objective: ``E[score] - kl_coef * kl``.
        score: ``E[score]``.
        kl: ``KL(pi || pi_ref)`` of responses.
        entropy: Entropy of responses.
        value: Expected return from each row, ``[n_t]``.
        advantages: ``Q - V``, ``[n_t, V]``, with the token's own KL cost inside ``Q``. ``-inf`` or ``inf``
            where the policy or the reference gives a token no probability.
        gradient: Gradient of ``objective`` by the logits of a tabular softmax policy, ``[n_t, V]``.
        visits: Probability of passing through each row, ``[n_t]``.
    """

    objective: float
    score: float
    kl: float
    entropy: float
    value: Levels
    advantages: Levels
    gradient: Levels
    visits: Levels


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis."""
    return logits - _log_sum_exp(logits)[..., None]


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    """Over the last axis, stable; ``-inf`` entries carry no weight."""
    top = x.max(axis=-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True)))[..., 0]


def _mean(probs: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Expectation over the last axis; what has no probability counts for nothing, infinite or not."""
    return np.where(probs > 0, probs * np.where(probs > 0, x, 0.0), 0.0).sum(axis=-1)


def _log_ratio(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """``log p - log q``, 0 where both are impossible."""
    with np.errstate(invalid="ignore"):
        ratio = log_p - log_q
    return np.where(np.isneginf(log_p) & np.isneginf(log_q), 0.0, ratio)


def solve(mdp: TokenMDP) -> Solution:
    """The optimal policy by the soft Bellman equation, backwards from the last token.

    ``Z(s) = sum_a pi_ref(a|s) exp(Q*(s, a) / beta)`` and ``pi*(a|s) = pi_ref(a|s) exp((Q* - V*) / beta)``
    (Ziebart, 2010; Rafailov et al., 2023, equation 4). With ``kl_coef`` 0 it is the limit: the best
    responses, shared out among ties as the reference does.
    """
    beta, values, reach = mdp.kl_coef, None, None
    policy, value, q = [], [], []
    for t in reversed(range(mdp.horizon)):
        q.insert(0, mdp.outcome(t, values))
        weight = mdp.ref_log_probs[t]
        if beta > 0:
            log_z = _log_sum_exp(weight + q[0] / beta)
            values = beta * log_z
            policy.insert(0, weight + q[0] / beta - log_z[:, None])
        else:
            possible = np.where(np.isneginf(weight), -np.inf, q[0])
            values = possible.max(axis=1)
            weight = weight + mdp.outcome(t, reach, np.zeros_like(weight))
            weight = np.where(possible == values[:, None], weight, -np.inf)
            reach = _log_sum_exp(weight)
            policy.insert(0, weight - reach[:, None])
        value.insert(0, values)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_z_levels = [v / np.float64(beta) for v in value]
    return Solution(float(value[0].mean()), policy, log_z_levels, value, q)


def evaluate(mdp: TokenMDP, policy: Levels) -> PolicyValue:
    """Everything about one policy, exactly.

    The gradient is that of a softmax with one logit for each row and token:
    ``dJ / d logit(s, a) = P(s) pi(a|s) A(s, a)`` (Sutton and Barto, section 13.2, undiscounted). The KL is
    the true one; an environment that charges "k1" or "k3" has this objective on average, "k2" does not.

    Args:
        mdp: The language.
        policy: Log-probabilities, ``[n_t, V]`` for each level.
    """
    _check_levels(mdp, policy)
    visits, values = mdp.visits(policy), None
    score = kl = entropy = 0.0
    value, advantages, gradient = [], [], []
    for t in reversed(range(mdp.horizon)):
        probs, ratio = np.exp(policy[t]), _log_ratio(policy[t], mdp.ref_log_probs[t])
        cost = mdp.kl_coef * ratio if mdp.kl_coef > 0 else 0.0
        q = mdp.outcome(t, values) - cost
        values = _mean(probs, q)
        ending = np.where(mdp.ends(t), mdp.scores[t], 0.0)
        score += float(visits[t] @ _mean(probs, ending))
        kl += float(_mean(visits[t], _mean(probs, ratio)))
        entropy -= float(visits[t] @ _mean(probs, policy[t]))
        value.insert(0, values)
        advantages.insert(0, q - values[:, None])
        weight = visits[t][:, None] * probs
        gradient.insert(0, weight * np.where(weight > 0, advantages[0], 0.0))
    return PolicyValue(float(values.mean()), score, kl, entropy, value, advantages, gradient, visits)


def kl_divergence(mdp: TokenMDP, policy: Levels, other: Levels | None = None) -> float:
    """``KL(policy || other)`` of responses, averaged over prompts; ``other`` is the reference if None.

    For the optimal policy as ``other``, ``kl_coef`` times it is how far the objective falls short of ``J*``.
    """
    return expected_kl(mdp, policy, "k1", other)


def expected_kl(mdp: TokenMDP, policy: Levels, estimator: str = "k1", other: Levels | None = None) -> float:
    """What an estimator of the KL, summed over a response's tokens, averages to under the policy itself.

    Args:
        mdp: The language.
        policy: Who acts, log-probabilities ``[n_t, V]`` for each level.
        estimator: "k1" and "k3" are unbiased; "k2" is not.
        other: Measured from here; the reference if None.
    """
    check_choice("kl_estimator", estimator, KL_ESTIMATORS)
    other = mdp.ref_log_probs if other is None else other
    _check_levels(mdp, policy)
    _check_levels(mdp, other)
    total = 0.0
    for log_p, log_q, visits in zip(policy, other, mdp.visits(policy), strict=True):
        probs = np.exp(log_p)
        ratio = np.where(probs > 0, _log_ratio(log_p, log_q), 0.0)
        total += float(_mean(visits, _mean(probs, KL_ESTIMATORS[estimator](ratio))))
    return total


def _check_levels(mdp: TokenMDP, policy: Levels) -> None:
    expected = [level.shape for level in mdp.ref_log_probs]
    given = [np.shape(level) for level in policy]
    if given != expected:
        raise ValueError(f"a policy is one array of log-probs for each level, {expected}, got {given}")


def sequence_distribution(mdp: TokenMDP, policy: Levels) -> tuple[np.ndarray, np.ndarray]:
    """All complete responses: log-probabilities and scores, both ``[prompts, sequences]``.

    Short responses come first, and those of one length in the order of their tokens.
    """
    log_probs, scores = [], []
    reached = np.zeros(mdp.num_prompts)
    for t in range(mdp.horizon):
        step, ends = reached[:, None] + policy[t], mdp.ends(t)
        log_probs.append(step[:, ends].reshape(mdp.num_prompts, -1))
        scores.append(mdp.scores[t][:, ends].reshape(mdp.num_prompts, -1))
        reached = step[:, ~ends].ravel()
    return np.concatenate(log_probs, axis=1), np.concatenate(scores, axis=1)


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n sampling, exactly; scalars are averages over prompts.

    Attributes:
        log_probs: Of every complete response, ``[prompts, sequences]``, ordered as
            :func:`sequence_distribution` does.
        score: Expected score.
        kl: True KL from the policy that was sampled.
        kl_bound: ``log n - (n - 1) / n``, the formula often quoted as the KL; it is an upper bound, nearly
            reached if no two responses share a score and none has a noticeable probability.
        win_rate: Probability of beating one fresh sample, ties counted half; at most ``n / (n + 1)``.
    """

    log_probs: np.ndarray
    score: float
    kl: float
    kl_bound: float
    win_rate: float


def best_of_n(mdp: TokenMDP, n: int, policy: Levels | None = None) -> BestOfN:
    """Draw ``n`` responses, keep the one of highest score (any of them when they tie).

    With ``F`` the probability of scoring at most ``r``, and ``G`` that of scoring exactly ``r``, a response
    of score ``r`` and probability ``p`` is kept with probability ``p / G * (F^n - (F - G)^n)`` (Beirami et
    al., Theoretical guarantees on the best-of-n alignment policy, 2024).

    Args:
        mdp: The language.
        n: Samples to choose from, at least 1.
        policy: Who is sampled, log-probabilities ``[n_t, V]`` for each level; the reference if None.
    """
    check_range(1, n=n)
    base, scores = sequence_distribution(mdp, mdp.ref_log_probs if policy is None else policy)
    gains, below, ties = (np.empty_like(base) for _ in range(3))
    for k in range(mdp.num_prompts):
        gains[k], below[k], ties[k] = _best_of_n_gain(np.exp(base[k]), scores[k], n)
    log_probs = base + gains
    probs = np.exp(log_probs)
    return BestOfN(
        log_probs,
        score=float(_mean(probs, scores).mean()),
        kl=float(_mean(probs, gains).mean()),
        kl_bound=math.log(n) - (n - 1) / n,
        win_rate=float(_mean(probs, below + ties / 2).mean()),
    )


def _best_of_n_gain(
    probs: np.ndarray, scores: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each response: log-ratio of best-of-n to the base; the mass that scores below it; and the same."""
    _, group = np.unique(scores, return_inverse=True)
    mass = np.bincount(group, weights=probs)  # groups in ascending order of score
    cumulative = np.cumsum(mass)
    cumulative /= cumulative[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        # F^n - (F - G)^n = F^n (1 - (1 - G / F)^n), without cancellation for tiny G.
        share = np.minimum(mass / cumulative, 1.0)
        gain = n * np.log(cumulative) + np.log(-np.expm1(n * np.log1p(-share))) - np.log(mass)
    gain[mass == 0] = 0.0
    return gain[group], (cumulative - mass)[group], mass[group]


def value_iteration(
    transitions: np.ndarray,
    rewards: np.ndarray,
    terminal: np.ndarray,
    gamma: float = 0.99,
    tolerance: float = 1e-10,
    max_iterations: int = 100_000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Optimal values of a small MDP, as ``env.unwrapped.dynamics.transition_model()`` gives it.

    Sutton and Barto, section 4.4. The time limit of ``gym.make`` is no part of the model.

    Args:
        transitions: Probabilities ``[S, A, S]``.
        rewards: Expected rewards ``[S, A]``.
        terminal: bool ``[S]``; nothing follows these states.
        gamma: Discount, in [0, 1].
        tolerance: Stop when no value changes by more.
        max_iterations: Give up after so many sweeps.

    Returns:
        V* ``[S]``; Q* ``[S, A]``; a greedy policy, int ``[S]`` (the first of equally good actions).

    Raises:
        RuntimeError: The values do not settle, as with ``gamma=1`` and a reward for never arriving.
    """
    check_range(0, 1, gamma=gamma)
    alive = ~np.asarray(terminal, dtype=bool)
    values = np.zeros(len(rewards))
    for _ in range(max_iterations):
        q = alive[:, None] * (rewards + gamma * (transitions @ values))
        change = np.abs(q.max(axis=1) - values).max()
        values = q.max(axis=1)
        if change <= tolerance:
            return values, q, q.argmax(axis=1)
    raise RuntimeError(
        f"value iteration still changes by {change:.3g} after {max_iterations} sweeps; "
        f"with gamma={gamma} the values may be infinite, try gamma < 1"
    )
