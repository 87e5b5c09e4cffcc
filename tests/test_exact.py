"""The exact solver against brute force: every response of a tiny language, in plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest

import textrl_env  # noqa: F401 (registers the ids)
from textrl_env.exact.solver import (
    TokenMDP,
    best_of_n,
    evaluate,
    expected_kl,
    from_functions,
    from_text_env,
    from_token_tree,
    kl_divergence,
    log_softmax,
    sequence_distribution,
    solve,
    value_iteration,
)
from textrl_env.kl import estimate_kl

TREES = [
    {"vocab_size": 3, "horizon": 3, "num_prompts": 2},
    {"vocab_size": 3, "horizon": 3, "num_prompts": 2, "eos": False},
    {"vocab_size": 4, "horizon": 1, "num_prompts": 1, "kl_coef": 0.7},
    {"vocab_size": 2, "horizon": 4, "num_prompts": 3, "kl_coef": 1.3, "ref_seed": 5, "reward_seed": 6},
]
every_tree = pytest.mark.parametrize(
    "kwargs", TREES, ids=lambda k: " ".join(f"{n}={v}" for n, v in k.items())
)


def tree(**kwargs) -> TokenMDP:
    return from_token_tree(gym.make("TokenTree-v0", **kwargs))


def random_policy(mdp: TokenMDP, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [log_softmax(rng.normal(size=level.shape)) for level in mdp.ref_log_probs]


def responses(mdp: TokenMDP, prompt: int, row_of_prefix: tuple[int, ...] = ()):
    """Every response to a prompt as (tokens, [(level, row) of each token]), depth first, in plain Python."""

    def grow(tokens, places, t, row):
        for token in range(mdp.vocab_size):
            here = (*tokens, token), [*places, (t, row)]
            if token in mdp.eos or t == mdp.horizon - 1:
                yield here
            else:
                on = [a for a in range(mdp.vocab_size) if a not in mdp.eos]
                yield from grow(*here, t + 1, row * len(on) + on.index(token))

    yield from grow((), [], 0, prompt)


def log_prob_of(policy, tokens, places) -> float:
    return sum(float(policy[t][row, token]) for token, (t, row) in zip(tokens, places, strict=True))


def score_of(mdp, tokens, places) -> float:
    t, row = places[-1]
    return float(mdp.scores[t][row, tokens[-1]])


def brute_force(mdp: TokenMDP, policy) -> dict[str, float]:
    """Expectations under a policy as sums over responses, averaged over prompts."""
    total = dict.fromkeys(("score", "kl", "entropy", "mass"), 0.0)
    for prompt in range(mdp.num_prompts):
        for tokens, places in responses(mdp, prompt):
            log_p = log_prob_of(policy, tokens, places)
            p = math.exp(log_p) / mdp.num_prompts
            total["mass"] += p
            total["score"] += p * score_of(mdp, tokens, places)
            total["kl"] += p * (log_p - log_prob_of(mdp.ref_log_probs, tokens, places))
            total["entropy"] -= p * log_p
    return total | {"objective": total["score"] - mdp.kl_coef * total["kl"]}


def partition_function(mdp: TokenMDP, prompt: int) -> float:
    return sum(
        math.exp(log_prob_of(mdp.ref_log_probs, *r) + score_of(mdp, *r) / mdp.kl_coef)
        for r in responses(mdp, prompt)
    )


# The optimum


@every_tree
def test_z_is_the_sum_over_all_responses_and_the_optimum_is_beta_log_z(kwargs):
    mdp = tree(**kwargs)
    solution = solve(mdp)
    log_z = [math.log(partition_function(mdp, prompt)) for prompt in range(mdp.num_prompts)]
    assert solution.log_z[0] == pytest.approx(log_z)
    assert solution.objective == pytest.approx(mdp.kl_coef * np.mean(log_z))
    assert evaluate(mdp, solution.policy).objective == pytest.approx(solution.objective)


@every_tree
def test_the_optimal_policy_is_the_reference_tilted_by_the_score(kwargs):
    mdp = tree(**kwargs)
    policy = solve(mdp).policy
    for prompt in range(mdp.num_prompts):
        z = partition_function(mdp, prompt)
        for r in responses(mdp, prompt):
            tilted = math.exp(log_prob_of(mdp.ref_log_probs, *r) + score_of(mdp, *r) / mdp.kl_coef) / z
            assert math.exp(log_prob_of(policy, *r)) == pytest.approx(tilted)


@every_tree
def test_soft_bellman_identities_hold_in_every_row(kwargs):
    mdp = tree(**kwargs)
    s = solve(mdp)
    for t in range(mdp.horizon):
        weights = np.exp(mdp.ref_log_probs[t]) * np.exp(s.q[t] / mdp.kl_coef)
        assert np.exp(s.value[t] / mdp.kl_coef) == pytest.approx(weights.sum(axis=1))
        assert np.exp(s.policy[t]).sum(axis=1) == pytest.approx(np.ones(len(s.policy[t])))
        tilt = mdp.ref_log_probs[t] + (s.q[t] - s.value[t][:, None]) / mdp.kl_coef
        assert s.policy[t] == pytest.approx(tilt)
        ends = mdp.ends(t)
        assert (s.q[t][:, ends] == mdp.scores[t][:, ends]).all()
        if not ends.all():
            assert (s.q[t][:, ~ends].ravel() == s.value[t + 1]).all()


@every_tree
def test_the_optimum_has_no_advantage_no_gradient_and_no_better_neighbour(kwargs):
    mdp = tree(**kwargs)
    policy = solve(mdp).policy
    best = evaluate(mdp, policy)
    for t in range(mdp.horizon):
        assert best.advantages[t] == pytest.approx(np.zeros_like(policy[t]), abs=1e-9)
        assert best.gradient[t] == pytest.approx(np.zeros_like(policy[t]), abs=1e-9)
    for seed in range(5):
        noise = random_policy(mdp, seed)
        near = [log_softmax(a + 0.1 * b) for a, b in zip(policy, noise, strict=True)]
        assert evaluate(mdp, near).objective < best.objective


def test_beta_to_infinity_is_the_reference_and_beta_to_zero_the_best_response():
    mdp = tree(vocab_size=3, horizon=3, num_prompts=2)
    loose, tight = (dataclasses.replace(mdp, kl_coef=beta) for beta in (1e-5, 1e9))
    assert evaluate(mdp, solve(tight).policy).kl == pytest.approx(0.0, abs=1e-12)
    for got, expected in zip(solve(tight).policy, mdp.ref_log_probs, strict=True):
        assert got == pytest.approx(expected, abs=1e-6)
    best = np.mean([max(score_of(mdp, *r) for r in responses(mdp, k)) for k in range(2)])
    assert solve(loose).objective == pytest.approx(best, abs=1e-3)
    assert evaluate(mdp, solve(loose).policy).score == pytest.approx(best)
    zero = solve(dataclasses.replace(mdp, kl_coef=0.0))
    assert zero.objective == pytest.approx(best)
    for got, expected in zip(zero.policy, solve(loose).policy, strict=True):
        certain = expected > -1
        assert np.exp(got)[certain] == pytest.approx(np.exp(expected)[certain])


def test_at_beta_zero_equally_good_responses_are_shared_as_the_reference_does():
    ref = log_softmax(np.array([[0.0, 1.0, 2.0]]))
    zero = solve(TokenMDP([ref], [np.array([[1.0, 1.0, 0.0]])], kl_coef=0.0))
    shares = np.exp(ref[0, :2])
    assert np.exp(zero.policy[0]) == pytest.approx(np.array([[*(shares / shares.sum()), 0.0]]))
    evaluation = evaluate(TokenMDP([ref], [np.array([[1.0, 1.0, 0.0]])], kl_coef=0.0), zero.policy)
    assert (evaluation.objective, evaluation.score) == pytest.approx((1.0, 1.0))


def test_tokens_the_reference_excludes_stay_excluded_and_cost_nothing():
    ref = np.log(np.array([[0.5, 0.5, 1e-300]]))
    ref[0, 2] = -np.inf
    mdp = TokenMDP([ref], [np.array([[0.0, 1.0, 99.0]])], kl_coef=0.5)
    solution = solve(mdp)
    evaluation = evaluate(mdp, solution.policy)
    assert solution.policy[0][0, 2] == -np.inf
    assert (
        evaluation.objective
        == pytest.approx(solution.objective)
        == pytest.approx(0.5 * math.log(0.5 + 0.5 * math.e**2))
    )
    assert np.isfinite(evaluation.gradient[0]).all()


# Any policy


@every_tree
def test_evaluation_equals_sums_over_all_responses(kwargs):
    mdp = tree(**kwargs)
    policy = random_policy(mdp)
    evaluation, expected = evaluate(mdp, policy), brute_force(mdp, policy)
    assert expected["mass"] == pytest.approx(1.0)
    for name in ("objective", "score", "kl", "entropy"):
        assert getattr(evaluation, name) == pytest.approx(expected[name])
    assert kl_divergence(mdp, policy) == pytest.approx(expected["kl"])


@every_tree
def test_what_a_policy_falls_short_of_is_beta_times_its_kl_to_the_optimum(kwargs):
    mdp = tree(**kwargs)
    solution, policy = solve(mdp), random_policy(mdp)
    shortfall = solution.objective - evaluate(mdp, policy).objective
    assert shortfall == pytest.approx(mdp.kl_coef * kl_divergence(mdp, policy, solution.policy))


@every_tree
def test_gradient_equals_finite_differences(kwargs):
    mdp = tree(**kwargs)
    logits = [np.random.default_rng(1).normal(size=level.shape) for level in mdp.ref_log_probs]
    gradient = evaluate(mdp, [log_softmax(x) for x in logits]).gradient

    def objective() -> float:
        return evaluate(mdp, [log_softmax(x) for x in logits]).objective

    for t, level in enumerate(logits):
        for place in itertools.islice(np.ndindex(level.shape), 0, None, 3):
            level[place] += 1e-5
            up = objective()
            level[place] -= 2e-5
            down = objective()
            level[place] += 1e-5
            assert gradient[t][place] == pytest.approx((up - down) / 2e-5, abs=1e-8)


@every_tree
def test_advantages_average_to_zero_and_visits_to_the_chance_of_getting_there(kwargs):
    mdp = tree(**kwargs)
    policy = random_policy(mdp)
    evaluation = evaluate(mdp, policy)
    ended = 0.0
    for t in range(mdp.horizon):
        probs = np.exp(policy[t])
        assert (probs * evaluation.advantages[t]).sum(axis=1) == pytest.approx(np.zeros(len(probs)))
        assert evaluation.visits[t].sum() == pytest.approx(1.0 - ended)
        ended += (evaluation.visits[t][:, None] * probs)[:, mdp.ends(t)].sum()
    assert ended == pytest.approx(1.0)


def test_mean_return_of_the_environment_is_the_objective():
    envs = gym.make_vec("TokenTree-v0", num_envs=20_000, kl_coef=0.4, autoreset_mode="Disabled")
    mdp = from_token_tree(envs)
    policy = random_policy(mdp)
    tree_dynamics = envs.unwrapped.dynamics
    rows = np.concatenate(policy)

    def acting(observations=None):
        return rows[tree_dynamics.level_start[np.minimum(tree_dynamics.length, 3)] + tree_dynamics.node]

    envs.unwrapped.bind_policy(lambda obs, actions: acting()[np.arange(len(actions)), actions])
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    returns, alive = np.zeros(20_000), np.ones(20_000, dtype=bool)
    for _ in range(mdp.horizon):
        # All slots step; those that are done are reset first, and what they earn then is not counted.
        actions = (np.log(-1 / np.log(rng.random((20_000, 5)))) + acting()).argmax(axis=1)
        _, rewards, terminated, _, _ = envs.step(actions)
        returns += np.where(alive, rewards, 0.0)
        alive &= ~terminated
        if terminated.any():
            envs.reset(options={"reset_mask": terminated})
    assert not alive.any()
    error = returns.std() / math.sqrt(len(returns))
    assert returns.mean() == pytest.approx(evaluate(mdp, policy).objective, abs=4 * error)


def test_every_response_of_the_environment_has_the_reward_of_the_arrays():
    env = gym.make("TokenTree-v0", vocab_size=3, horizon=3, num_prompts=2)
    env.unwrapped.bind_policy(lambda obs, action: -1.0)
    mdp = from_token_tree(env)
    for prompt in range(2):
        for tokens, places in responses(mdp, prompt):
            env.reset(seed=0, options={"prompt_id": prompt})
            infos = [env.step(token)[4] for token in tokens]
            assert infos[-1]["score"] == score_of(mdp, tokens, places)
            total = sum(info["ref_logprob"] for info in infos)
            assert total == pytest.approx(log_prob_of(mdp.ref_log_probs, tokens, places))


def test_a_policy_of_the_wrong_shape_is_refused():
    mdp = tree(**TREES[0])
    with pytest.raises(ValueError, match="one array of log-probs for each level"):
        evaluate(mdp, random_policy(mdp)[:-1])


# The KL and its estimators


def one_step(reference, policy) -> tuple[TokenMDP, list[np.ndarray]]:
    zeros = np.zeros((1, len(reference)))
    return TokenMDP([np.log([reference])], [zeros], kl_coef=0.02), [np.log([policy])]


def test_kl_of_the_lecture_comes_out():
    mdp, policy = one_step((0.6, 0.2, 0.1, 0.1), (0.7, 0.1, 0.1, 0.1))
    assert kl_divergence(mdp, policy) == pytest.approx(0.0385908, abs=5e-8)
    assert -evaluate(mdp, policy).objective == pytest.approx(0.000772, abs=5e-7)


@every_tree
def test_k1_and_k3_are_unbiased_and_k2_is_half_the_mean_square(kwargs):
    mdp = tree(**kwargs)
    policy = random_policy(mdp)
    sums = dict.fromkeys(("k1", "k2", "k3"), 0.0)
    for prompt in range(mdp.num_prompts):
        for tokens, places in responses(mdp, prompt):
            p = math.exp(log_prob_of(policy, tokens, places)) / mdp.num_prompts
            ratios = [
                policy[t][row, token] - mdp.ref_log_probs[t][row, token]
                for token, (t, row) in zip(tokens, places, strict=True)
            ]
            for name in sums:
                sums[name] += p * float(estimate_kl(np.array(ratios), name).sum())
    for name, expected in sums.items():
        assert expected_kl(mdp, policy, name) == pytest.approx(expected)
    assert sums["k1"] == pytest.approx(sums["k3"]) == pytest.approx(evaluate(mdp, policy).kl)
    assert abs(sums["k2"] - sums["k1"]) > 1e-3


def test_an_unknown_estimator_is_refused():
    mdp, policy = one_step((0.5, 0.5), (0.4, 0.6))
    with pytest.raises(ValueError, match="k4"):
        expected_kl(mdp, policy, "k4")


# Best-of-n


def best_of_n_by_enumeration(probs, scores, n) -> np.ndarray:
    """The chance of keeping each response, over all n-tuples; ties go to each in equal parts."""
    kept = np.zeros(len(probs))
    for draw in itertools.product(range(len(probs)), repeat=n):
        p = math.prod(probs[i] for i in draw)
        best = [i for i in draw if scores[i] == max(scores[j] for j in draw)]
        for i in best:
            kept[i] += p / len(best)
    return kept


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_equals_enumeration_ties_included(scores, n):
    probs = np.array([0.5, 0.2, 0.2, 0.1])
    result = best_of_n(TokenMDP([np.log(probs)[None]], [np.array([scores])], kl_coef=0.1), n)
    kept = best_of_n_by_enumeration(probs, scores, n)
    assert np.exp(result.log_probs[0]) == pytest.approx(kept)
    assert result.score == pytest.approx(kept @ scores)
    assert result.kl == pytest.approx((kept * np.log(kept / probs)).sum(), abs=1e-12)
    beats = np.sign(np.subtract.outer(scores, scores)) / 2 + 0.5
    assert result.win_rate == pytest.approx(kept @ beats @ probs)


@every_tree
@pytest.mark.parametrize("n", [1, 2, 4, 64, 10_000])
def test_best_of_n_wins_at_most_n_of_n_plus_one_and_its_kl_is_below_the_formula(kwargs, n):
    result = best_of_n(tree(**kwargs), n)
    assert np.exp(result.log_probs).sum(axis=1) == pytest.approx(np.ones(len(result.log_probs)))
    assert result.win_rate <= n / (n + 1) + 1e-12
    assert -1e-12 <= result.kl <= result.kl_bound + 1e-12
    assert result.kl_bound == pytest.approx(math.log(n) - (n - 1) / n)


def test_best_of_n_bounds_are_nearly_reached_by_a_large_language():
    result = best_of_n(tree(vocab_size=8, horizon=4, num_prompts=1, eos=False), 4)
    assert result.win_rate == pytest.approx(4 / 5, abs=1e-3)
    assert result.kl == pytest.approx(math.log(4) - 3 / 4, abs=1e-3)


def test_best_of_n_is_less_than_the_optimum_at_the_same_kl():
    mdp = tree(vocab_size=6, horizon=3, num_prompts=1)
    chosen = best_of_n(mdp, 8)
    low, high = 1e-3, 1e3
    for _ in range(60):  # bisection for the beta whose optimum has this KL
        beta = math.sqrt(low * high)
        optimum = evaluate(mdp, solve(dataclasses.replace(mdp, kl_coef=beta)).policy)
        low, high = (beta, high) if optimum.kl > chosen.kl else (low, beta)
    assert optimum.kl == pytest.approx(chosen.kl)
    assert chosen.score < optimum.score


def test_best_of_one_is_the_policy_it_samples():
    mdp = tree(**TREES[0])
    policy = random_policy(mdp)
    result = best_of_n(mdp, 1, policy)
    assert result.log_probs == pytest.approx(sequence_distribution(mdp, policy)[0])
    assert (result.kl, result.win_rate) == pytest.approx((0.0, 0.5))
    with pytest.raises(ValueError, match="n must be at least 1"):
        best_of_n(mdp, 0)


# Sizes and other languages


def test_a_million_responses_are_solved_exactly():
    mdp = tree(vocab_size=10, horizon=6, num_prompts=1, eos=False)
    log_probs, scores = sequence_distribution(mdp, mdp.ref_log_probs)
    assert log_probs.shape == (1, 1_000_000)
    solution = solve(mdp)
    direct = np.log(np.exp(log_probs + scores / mdp.kl_coef).sum())
    assert solution.log_z[0][0] == pytest.approx(direct)
    assert evaluate(mdp, solution.policy).objective == pytest.approx(solution.objective)


@pytest.mark.parametrize("eos", [(), (0,), (1, 3)])
def test_a_language_given_by_functions_is_enumerated_in_the_same_order(eos):
    def log_probs(prompt_ids, tokens):
        logits = np.sin(prompt_ids[:, None] + np.arange(4) * (1 + tokens.sum(axis=1, keepdims=True)))
        return log_softmax(logits)

    def score(prompt_ids, tokens):
        assert ((tokens[:, :-1, None] == np.array(eos)).sum() == 0) and len(tokens) <= 7
        return prompt_ids + (tokens * 10.0 ** np.arange(tokens.shape[1])).sum(axis=1)

    mdp = from_functions(log_probs, score, 4, 3, num_prompts=2, eos=eos, batch_size=7)
    assert mdp.eos == eos
    for prompt in range(2):
        for tokens, places in responses(mdp, prompt):
            assert score_of(mdp, tokens, places) == prompt + sum(a * 10**i for i, a in enumerate(tokens))
            for i, (t, row) in enumerate(places):
                expected = log_probs(np.array([prompt]), np.array([tokens[:i]], dtype=int).reshape(1, -1))
                assert mdp.ref_log_probs[t][row] == pytest.approx(expected[0])


@pytest.fixture(scope="module")
def tiny_text_env():
    """TextRLHF-v0 on a two-layer GPT-2 whose whole vocabulary is an end token and three words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from textrl_env.envs.text_rlhf import TextRLHFEnv

    words = Tokenizer(models.WordLevel({"</s>": 0, "red": 1, "green": 2, "blue": 3}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4, n_positions=8, n_embd=16, n_layer=2, n_head=2, initializer_range=0.6, eos_token_id=0
    )
    return TextRLHFEnv(
        model=GPT2LMHeadModel(config),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"),
        reward=lambda prompts, completions, **_: [
            p.count("blue") + c.count("red") - c.count("green")
            for p, c in zip(prompts, completions, strict=True)
        ],
        prompts=["red", "green blue red"],
        max_new_tokens=3,
        missing_eos_penalty=0.5,
        device="cpu",
    )


def test_a_tiny_text_env_is_enumerated_as_it_steps(tiny_text_env):
    mdp = from_text_env(tiny_text_env)
    assert mdp.eos == (0,) and mdp.num_prompts == 2
    tiny_text_env.bind_policy(lambda observation, action: -1.0)
    for prompt in range(2):
        for tokens, places in responses(mdp, prompt):
            tiny_text_env.reset(seed=0, options={"prompt_id": prompt})
            infos = [tiny_text_env.step(token)[4] for token in tokens]
            assert infos[-1]["score"] == pytest.approx(score_of(mdp, tokens, places))
            for info, token, (t, row) in zip(infos, tokens, places, strict=True):
                assert info["ref_logprob"] == pytest.approx(mdp.ref_log_probs[t][row, token], abs=1e-5)
    solution = solve(mdp)
    assert evaluate(mdp, solution.policy).objective == pytest.approx(solution.objective)
    assert solution.objective > evaluate(mdp, mdp.ref_log_probs).objective


# Value iteration


def test_value_iteration_solves_line_world_in_closed_form():
    dynamics = gym.make("LineWorld-v0", length=5).unwrapped.dynamics
    values, q, greedy = value_iteration(*dynamics.transition_model(), gamma=0.9)
    steps = np.array([4, 3, 2, 1])
    closed = 0.9 ** (steps - 1) - 0.01 * (1 - 0.9 ** (steps - 1)) / 0.1
    assert values == pytest.approx([*closed, 0.0])
    assert (greedy[:-1] == 2).all() and q.shape == (5, 3)


def test_value_iteration_of_the_bandit_is_its_best_arm():
    dynamics = gym.make("ToyBandit-v0", contexts=3).unwrapped.dynamics
    values, _, greedy = value_iteration(*dynamics.transition_model())
    assert values[:-1] == pytest.approx(dynamics.means.max(axis=1))
    assert (greedy[:-1] == dynamics.means.argmax(axis=1)).all()


@pytest.mark.parametrize("slippery", [False, 0.2, True])
def test_value_iteration_satisfies_bellman_on_the_grid(slippery):
    transitions, rewards, terminal = gym.make(
        "GridWorld-v0", slippery=slippery
    ).unwrapped.dynamics.transition_model()
    values, q, greedy = value_iteration(transitions, rewards, terminal, gamma=0.95)
    backed_up = np.where(terminal[:, None], 0.0, rewards + 0.95 * transitions @ values)
    assert q == pytest.approx(backed_up, abs=1e-8)
    assert values == pytest.approx(q.max(axis=1), abs=1e-8)
    assert (values[terminal] == 0).all()
    # The greedy policy's own value, by a linear solve.
    states = np.arange(len(values))
    p, r = transitions[states, greedy] * ~terminal[:, None], rewards[states, greedy]
    assert np.linalg.solve(np.eye(len(values)) - 0.95 * p, r) == pytest.approx(values, abs=1e-7)


def test_the_greedy_policy_walks_the_shortest_way_on_the_default_grid():
    env = gym.make("GridWorld-v0")
    greedy = value_iteration(*env.unwrapped.dynamics.transition_model())[2]
    cell, _ = env.reset(seed=0)
    total, steps, done = 0.0, 0, False
    while not done:
        cell, reward, done, _, info = env.step(int(greedy[cell]))
        total, steps = total + reward, steps + 1
    assert info["is_success"] and steps == 7
    assert total == pytest.approx(1.0 - 6 * 0.01)


def test_the_greedy_policy_earns_its_value_on_a_slippery_grid():
    envs = gym.make_vec("GridWorld-v0", num_envs=20_000, slippery=0.4, autoreset_mode="Disabled")
    values, _, greedy = value_iteration(*envs.unwrapped.dynamics.transition_model(), gamma=0.9)
    cells, _ = envs.reset(seed=0)
    start, returns, alive = cells[0], np.zeros(20_000), np.ones(20_000, dtype=bool)
    for t in range(100):
        cells, rewards, terminated, truncated, _ = envs.step(greedy[cells])
        returns += 0.9**t * rewards * alive
        alive &= ~(terminated | truncated)
        if (terminated | truncated).any():
            cells, _ = envs.reset(options={"reset_mask": terminated | truncated})
    error = returns.std() / math.sqrt(len(returns))
    assert returns.mean() == pytest.approx(values[start], abs=4 * error + 0.9**100)


def test_value_iteration_that_cannot_settle_says_so():
    transitions, rewards = np.ones((1, 1, 1)), np.ones((1, 1))
    with pytest.raises(RuntimeError, match="gamma < 1"):
        value_iteration(transitions, rewards, np.array([False]), gamma=1.0, max_iterations=50)
    with pytest.raises(ValueError, match="gamma"):
        value_iteration(transitions, rewards, np.array([False]), gamma=1.5)
