"""A two-turn game with a stochastic table of answers, against its enumeration: values, optimum, gradients, learning."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE
from tests.games import FEW_WORDS, Table, table_outcomes
from tests.tiny import make_small_lm
from textrl_env.envs.text_game import TextGameEnv
from textrl_env.exact.solver import TokenMDP, log_softmax
from textrl_env.exact.turns import TurnMDP, count_endings, evaluate_turns, from_text_game, solve_turns
from textrl_env.lm.sequences import ENVIRONMENT, POLICY, PROMPT, Sequences

KL_COEF, BUDGET = 0.3, 2


def make_table_game(**kwargs):
    return TextGameEnv(
        game=Table, model=make_small_lm(0), kl_coef=KL_COEF, max_turns=2, max_new_tokens=BUDGET, **kwargs
    )


def random_stage(rng, prompts, vocab=3, horizon=2):
    sizes = [prompts * (vocab - 1) ** t for t in range(horizon)]
    ref = [log_softmax(rng.normal(size=(n, vocab))) for n in sizes]
    return TokenMDP(ref, [rng.normal(size=(n, vocab)) for n in sizes], 0.4, (0,))


@pytest.fixture(scope="module")
def random_conversation():
    rng = np.random.default_rng(0)
    first = random_stage(rng, 2)
    endings = count_endings(first)
    table = rng.random((endings, 2))
    table *= 0.9 / table.sum(1, keepdims=True)  # one time in ten nothing is answered
    mdp = TurnMDP([first, random_stage(rng, 2 * endings)], [table])
    policies = [[log_softmax(rng.normal(size=level.shape)) for level in s.ref_log_probs] for s in mdp.stages]
    return mdp, policies


def objective_by_paths(mdp, policies):
    """``J`` by going through every conversation, one after another."""

    def turn(k, row, t, chance, earned):
        stage = mdp.stages[k]
        total = 0.0
        goes_on = [token for token in range(stage.vocab_size) if not stage.ends(t)[token]]
        for token in range(stage.vocab_size):
            p = chance * np.exp(policies[k][t][row, token])
            got = earned - stage.kl_coef * (policies[k][t][row, token] - stage.ref_log_probs[t][row, token])
            if token in goes_on:
                total += turn(k, row * len(goes_on) + goes_on.index(token), t + 1, p, got)
                continue
            got += stage.scores[t][row, token]
            if k + 1 == len(mdp.stages):
                total += p * got
                continue
            before = sum(len(s) * int(stage.ends(u).sum()) for u, s in enumerate(stage.scores[:t]))
            ending = (
                before + row * int(stage.ends(t).sum()) + list(np.flatnonzero(stage.ends(t))).index(token)
            )
            answers = mdp.answers[k][ending]
            total += p * (1 - answers.sum()) * got
            for m, chance_of_m in enumerate(answers):
                total += turn(k + 1, ending * len(answers) + m, 0, p * chance_of_m, got)
        return total

    prompts = mdp.stages[0].num_prompts
    return sum(turn(0, i, 0, 1 / prompts, 0.0) for i in range(prompts))


def test_the_value_of_a_policy_is_the_sum_over_all_conversations(random_conversation):
    mdp, policies = random_conversation
    found = evaluate_turns(mdp, policies)
    assert found.objective == pytest.approx(objective_by_paths(mdp, policies), abs=1e-12)
    assert found.objective == pytest.approx(found.score - 0.4 * found.kl, abs=1e-12)


def test_the_gradient_is_that_of_small_differences(random_conversation):
    mdp, policies = random_conversation
    found = evaluate_turns(mdp, policies)
    rng = np.random.default_rng(1)
    for k, t in itertools.product(range(2), range(2)):
        row, token = (int(rng.integers(n)) for n in policies[k][t].shape)
        moved = []
        for step in (1e-5, -1e-5):
            logits = [[level.copy() for level in stage] for stage in policies]
            logits[k][t][row, token] += step
            logits[k][t] = log_softmax(logits[k][t])
            moved.append(evaluate_turns(mdp, logits).objective)
        assert found.gradient[k][t][row, token] == pytest.approx((moved[0] - moved[1]) / 2e-5, abs=1e-8)


def test_nothing_is_better_than_the_optimum(random_conversation):
    mdp, _ = random_conversation
    best, solutions = solve_turns(mdp)
    optimal = [solution.policy for solution in solutions]
    found = evaluate_turns(mdp, optimal)
    assert found.objective == pytest.approx(best, abs=1e-12)
    assert max(np.abs(level).max() for stage in found.gradient for level in stage) < 1e-12
    rng = np.random.default_rng(2)
    for _ in range(5):
        near = [[log_softmax(x + 0.1 * rng.normal(size=x.shape)) for x in stage] for stage in optimal]
        assert evaluate_turns(mdp, near).objective < best


def test_answers_that_do_not_fit_are_refused(random_conversation):
    mdp, _ = random_conversation
    with pytest.raises(ValueError, match=r"answers\[0\] has the shape \(9, 2\); stage 0 ends in 14 ways"):
        TurnMDP(mdp.stages, [mdp.answers[0][:9]])
    with pytest.raises(ValueError, match="2 stages have 1 answers"):
        TurnMDP(mdp.stages, [])


# -- the environment --------------------------------------------------------------------------------------------


def turns_of(lm):
    """Every turn that can be written, as token ids."""
    goes_on = [i for i in range(len(FEW_WORDS)) if i not in lm.eos_ids]
    short = [[int(end)] for end in lm.eos_ids]
    return [np.array(x) for x in [*short, *([a, b] for a in goes_on for b in range(len(FEW_WORDS)))]]


def all_paths(env):
    """Every conversation: its spans, the probability of its answers, and what it earns on average."""
    game = env.dynamics
    opening = game.opening_of(0).ids
    words = env.lm.tokenizer.convert_tokens_to_ids
    paths = []
    for first in turns_of(env.lm):
        said = (game.turn_text(first),)
        for chance, answer, reward, over in table_outcomes(said):
            spans = [(PROMPT, opening), (POLICY, first)]
            if over:
                paths.append((spans, chance, reward))
                continue
            spans = [*spans, (ENVIRONMENT, np.array(words(answer.split())))]
            for second in turns_of(env.lm):
                then = table_outcomes((*said, game.turn_text(second)))
                later = sum(p * r for p, _, r, _ in then)
                paths.append(([*spans, (POLICY, second)], chance, reward + later))
    return paths


def exact_objective(env, lm):
    """``J`` with gradient, from one pass over every conversation."""
    paths = all_paths(env)
    sequences = Sequences.from_spans([spans for spans, _, _ in paths])
    rows = torch.from_numpy(sequences.rows)
    log_probs = lm.evaluate(sequences)[0].double()
    ref = torch.from_numpy(env.lm.log_probs(sequences))
    blank = torch.zeros(len(paths), dtype=torch.float64)
    chance = torch.tensor([c for _, c, _ in paths]) * blank.index_add(0, rows, log_probs).exp()
    earned = torch.tensor([r for _, _, r in paths]) - KL_COEF * blank.index_add(0, rows, log_probs - ref)
    assert float(chance.detach().sum()) == pytest.approx(1.0, abs=1e-5)
    return (chance * earned).sum()


@pytest.fixture(scope="module")
def played():
    """An agent that stands still, and 16 rollouts of 64 groups of 4 conversations that it has had."""
    return play(GRPO, group_size=4)


def play(cls, rollouts=16, **kwargs):
    policy = {"model": make_small_lm(1)}
    kwargs = {"gamma": 1.0, "n_episodes": 256, "batch_size": None, "policy_kwargs": policy} | kwargs
    agent = cls("auto", make_table_game(), seed=0, learning_rate=0.0, **kwargs)
    agent.learn(1, log_interval=None)
    if agent.policy.has_critic:
        torch.nn.init.normal_(agent.policy.value_head.out.weight, std=0.5)
    return agent, [agent.collect() for _ in range(rollouts)]


def test_the_enumerated_game_is_the_environment(played):
    env, lm = make_table_game(), make_small_lm(1)
    mdp, policies = from_text_game(env, table_outcomes, lm)
    assert evaluate_turns(mdp, policies).objective == pytest.approx(exact_objective(env, lm).item(), abs=1e-5)
    own = evaluate_turns(mdp, from_text_game(env, table_outcomes)[1])
    assert own.kl == pytest.approx(0.0, abs=1e-9)
    agent, rollouts = played
    returns = np.concatenate([rollout.rewards.sum(1).numpy().reshape(-1, 4).mean(1) for rollout in rollouts])
    error = returns.std() / np.sqrt(len(returns))  # of groups, whose members share their prompt
    assert abs(returns.mean() - exact_objective(env, agent.policy.lm).item()) < 3 * error


ESTIMATORS = {
    "REINFORCE, no baseline": (REINFORCE, {"baseline": "none"}),
    "REINFORCE, mean of the others": (REINFORCE, {}),
    "PPO, no critic": (PPO, {"critic": None, "normalize_advantage": False}),
    "PPO, lambda 1, wrong critic": (PPO, {"gae_lambda": 1.0, "normalize_advantage": False}),
    "GRPO, leave one out": (GRPO, {"scale": "leave-one-out", "group_size": 4}),
}


@pytest.mark.parametrize(("cls", "kwargs"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_gradient_of_every_estimator_averages_to_the_exact_one(cls, kwargs, played):
    # What was played is the same for all but a critic, which says its values while it plays.
    own = kwargs.get("critic", "") is not None and cls is PPO
    agent, rollouts = play(cls, **kwargs, rollouts=16 if own else 0)
    rollouts = rollouts or played[1]
    weights = [p for p in agent.policy.lm.model.parameters() if p.requires_grad]

    def flat(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).double().numpy()

    exact = flat(exact_objective(make_table_game(), agent.policy.lm).float())
    rng = np.random.default_rng(0)
    directions = np.stack(
        [exact / np.linalg.norm(exact), *rng.normal(size=(4, len(exact))) / np.sqrt(len(exact))]
    )
    seen = []
    for rollout in rollouts:
        batch = agent.prepare_rollout(copy.copy(rollout))
        batch = agent.prepare_batch(batch)
        new = agent.policy.evaluate(batch)
        losses, _ = agent.loss(
            batch, new._replace(values=None if new.values is None else new.values.detach())
        )
        seen.append(-directions @ flat((losses * batch.mask).sum() / len(batch)))
    mean, error = np.mean(seen, axis=0), np.std(seen, axis=0, ddof=1) / np.sqrt(len(seen))
    assert (np.abs(mean - directions @ exact) < 3 * error).all()
    assert mean[0] == pytest.approx(np.linalg.norm(exact), rel=0.15)
