"""Estimators of the advantage and what a critic is for, each against its paper's formula in plain Python, and TRL's."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import textwrap
import types

import numpy as np
import pytest
import torch

from agents import GDPO, GRPO, OPO, OTB, PPO, RLOO, VAPO, VCPPO, MaxRL, PassAtK, TabularPolicy
from agents.algorithms import maths
from agents.policies.factory import Evaluation
from tests.test_variants import GROUP, LENGTHS, group_of, make, make_rollout
from tests.tiny import count_a, make_env
from textrl_env.errors import ArgumentError

SCORES = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def rollout_with(scores=SCORES, penalties: bool = True):
    rollout, new = make_rollout()
    if not penalties:
        rollout.penalties = torch.zeros_like(rollout.penalties)
    rollout.penalties = rollout.penalties.double()
    rollout.rewards = torch.tensor(scores, dtype=torch.float64)[:, None] * rollout.done - rollout.penalties
    return rollout, new


def kl_of(rollout) -> list[float]:
    return (rollout.penalties * rollout.mask).sum(1).tolist()


def mean_of(values, i: int) -> float:
    return sum(values[j] for j in group_of(i)) / GROUP


def assert_on_every_step(advantages, expected, mask):
    assert advantages.shape == mask.shape
    for i, n in enumerate(LENGTHS):
        assert advantages[i, :n].tolist() == pytest.approx([expected[i]] * n, rel=1e-5, abs=1e-6), i
    assert (advantages[~mask] == 0).all()


# -- MaxRL ----------------------------------------------------------------------------------------------------


def test_maxrl_divides_by_the_mean_score_of_the_group_and_leaves_the_kl_its_size():
    rollout, _ = rollout_with()
    kl = kl_of(rollout)
    expected = [
        (r - mean_of(SCORES, i)) / mean_of(SCORES, i) - (kl[i] - mean_of(kl, i)) for i, r in enumerate(SCORES)
    ]
    assert_on_every_step(make(MaxRL).advantages(rollout), expected, rollout.mask)


def test_maxrl_learns_nothing_from_a_prompt_that_nobody_solved():
    rollout, _ = rollout_with([0.0] * 4 + SCORES[4:], penalties=False)
    advantages = make(MaxRL).advantages(rollout)
    assert (advantages[:4] == 0).all() and advantages[7, 0] == pytest.approx(3.0)


def test_maxrl_refuses_scores_whose_mean_is_no_pass_rate():
    rollout, _ = rollout_with([-1.0, *SCORES[1:]])
    with pytest.raises(ValueError, match=r"at least 0.*rollout is -1"):
        make(MaxRL).advantages(rollout)


# -- pass@k ---------------------------------------------------------------------------------------------------


def gains_by_counting(scores: list[float], k: int) -> list[float]:
    """What each score adds to the best of k, over all sets of k, as the paper's equation has it."""
    found = []
    for i in range(len(scores)):
        sets = [s for s in itertools.combinations(range(len(scores)), k) if i in s]
        added = [
            max(scores[j] for j in s) - max((scores[j] for j in s if j != i), default=-math.inf) for s in sets
        ]
        found.append(sum(added) / math.comb(len(scores), k))
    return found


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("scores", [SCORES, [0.3, -1.2, 2.0, 0.3, 1.0, 1.0, 1.0, -4.0]], ids=["0/1", "real"])
def test_an_answer_is_credited_with_what_it_adds_to_the_best_of_k(scores, k):
    rollout, _ = rollout_with(scores)
    kl = kl_of(rollout)
    gains = gains_by_counting(scores[:4], k) + gains_by_counting(scores[4:], k)
    others = [(kl[i] - mean_of(kl, i)) * GROUP / (GROUP - 1) for i in range(len(kl))]
    expected = [GROUP * gain - more for gain, more in zip(gains, others, strict=True)]
    assert_on_every_step(make(PassAtK, k=k).advantages(rollout), expected, rollout.mask)


def test_pass_at_one_is_rloo():
    rollout, _ = rollout_with()
    ours, rloo = (make(*args).advantages(rollout) for args in ((PassAtK,), (RLOO,)))
    one = make(PassAtK, k=1).advantages(rollout)
    torch.testing.assert_close(one, rloo)
    assert not torch.allclose(ours, rloo)


@pytest.mark.parametrize(
    ("k", "told"), [(0, "k must be at least 1, got 0"), (5, "between 1 and group_size=4, got 5")]
)
def test_k_is_at_least_one_and_at_most_the_group(k, told):
    with pytest.raises(ValueError, match=told):
        make(PassAtK, k=k)
    with pytest.raises(ValueError, match="between 2 and the 4 scores"):
        maths.best_of_k_gains(torch.zeros(1, 4), k)


# -- optimal baselines ----------------------------------------------------------------------------------------


def test_opos_baseline_is_the_mean_return_weighted_by_length():
    rollout, _ = rollout_with()
    returns = (rollout.rewards * rollout.mask).sum(1).tolist()
    expected = []
    for i, r in enumerate(returns):
        lengths = [LENGTHS[j] for j in group_of(i)]
        weighted = sum(LENGTHS[j] * returns[j] for j in group_of(i)) / sum(lengths)
        expected.append(r - weighted)
    assert_on_every_step(make(OPO).advantages(rollout), expected, rollout.mask)


def test_otbs_baseline_of_a_token_weighs_returns_by_the_gradient_that_came_before():
    rollout, _ = rollout_with()
    agent = make(OTB)
    torch.manual_seed(0)
    squares = torch.rand(rollout.mask.shape) * 0.5
    agent.policy.squared_probabilities = lambda rollout: squares
    advantages = agent.advantages(rollout)
    p = rollout.log_probs.exp().tolist()
    to_go = [[sum(rollout.rewards[i, t:n].tolist()) for t in range(n)] for i, n in enumerate(LENGTHS)]
    energy = [
        [sum(1 - 2 * p[i][j] + float(squares[i, j]) for j in range(t + 1)) for t in range(n)]
        for i, n in enumerate(LENGTHS)
    ]
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            there = [j for j in group_of(i) if LENGTHS[j] > t]
            total = sum(energy[j][t] for j in there)
            baseline = sum(energy[j][t] * to_go[j][t] for j in there) / total
            assert float(advantages[i, t]) == pytest.approx(to_go[i][t] - baseline, abs=1e-5), (i, t)
    assert (advantages[~rollout.mask] == 0).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "padded", "table", "network"])
def test_the_norm_of_the_logits_gradient_is_what_otb_takes_it_for(kind):
    """``1 - 2 pi(a) + sum pi^2`` is the squared norm of the gradient of ``log pi(a)`` by the logits."""
    if kind == "table":
        agent = make(OTB)
    elif kind == "network":
        agent = OTB("MlpPolicy", "CartPole-v1", group_size=2, n_episodes=4, seed=0)
    else:
        from tests.tiny import make_lm

        lm = make_lm("gpt2" if kind == "gpt2" else "llama", temperature=0.7, extra_vocab=3)
        if kind == "padded":
            lm.disable = frozenset(["packing"])
        agent = OTB("auto", make_env(2, lm=lm), group_size=2, n_episodes=4, seed=0)
    rollout = agent.learn(1).collect()
    squares = agent.policy.squared_probabilities(rollout)[rollout.mask]
    assert squares.shape == (int(rollout.mask.sum()),) and not squares.requires_grad
    if kind == "table":
        expected = agent.policy.logits.softmax(-1).square().sum(-1)[rollout.inputs["rows"]][rollout.mask]
    elif kind == "network":
        p = agent.policy.evaluate(rollout).log_probs.exp()[rollout.mask]
        expected = p**2 + (1 - p) ** 2  # CartPole has two actions
    else:
        logits, sequences = [], rollout.inputs["sequences"]
        for tokens, start in zip(sequences.split(sequences.tokens), sequences.first, strict=True):
            out = agent.policy.lm.model(torch.tensor(tokens)[None]).logits[0, start - 1 : -1]
            logits.append(agent.policy.lm.action_logits(out))
        expected = torch.cat(logits).softmax(-1).square().sum(-1)
    torch.testing.assert_close(squares, expected.detach(), atol=1e-5, rtol=1e-4)


def test_a_policy_with_continuous_actions_says_that_otb_is_not_for_it():
    agent = OTB("MlpPolicy", "Pendulum-v1", group_size=2, n_episodes=2, seed=0)
    with pytest.raises(NotImplementedError, match=r"MlpPolicy on Box.*probabilities of all actions"):
        agent.learn(1)


# -- several rewards ------------------------------------------------------------------------------------------

WEIGHTS = (1.0, 0.25)


def trl_advantages(parts: torch.Tensor, **settings) -> torch.Tensor:
    """What TRL's GRPO trainer makes of rewards ``[B, K]``: its own statements, out of the method that has them."""
    trl = pytest.importorskip("trl")
    from trl.trainer import grpo_trainer

    method = trl.GRPOTrainer._generate_and_score_completions
    tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    (block,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.multi_objective_aggregation == 'sum_then_normalize'"
    )
    settings = {"multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group"} | settings
    trainer = types.SimpleNamespace(
        reward_weights=torch.tensor(WEIGHTS[: parts.shape[1]]), reward_funcs=range(parts.shape[1]), **settings
    )
    space = vars(grpo_trainer) | {"self": trainer, "rewards_per_func": parts, "num_generations": GROUP}
    space |= {"device": "cpu", "unscorable_mask": parts.isnan().all(1)}
    exec(compile(ast.Module([block], []), "<trl>", "exec"), space)
    return space["advantages"].nan_to_num(nan=0.0)


def test_scale_batch_divides_by_the_deviation_of_all_scores_as_trl_does():
    rollout, _ = rollout_with([0.3, -1.2, 2.0, 0.3, 1.0, 1.5, 1.0, -4.0])
    returns = (rollout.rewards * rollout.mask).sum(1)
    expected = trl_advantages(returns[:, None], scale_rewards="batch")
    advantages = make(GRPO, scale="batch").advantages(rollout)
    torch.testing.assert_close(advantages[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(advantages, make(GRPO).advantages(rollout), atol=1e-2)


def test_a_batch_of_equal_scores_is_not_divided_by_the_deviation_of_its_kl():
    rollout, _ = rollout_with([1.0] * 8)
    undivided = make(GRPO, scale="none").advantages(rollout)
    torch.testing.assert_close(make(GRPO, scale="batch").advantages(rollout), undivided)


@pytest.mark.parametrize("missing", [False, True], ids=["all", "some not scored"])
def test_gdpo_normalises_each_reward_before_it_adds_them_as_trl_does(missing):
    agent, rollout = gdpo_with_parts(missing)
    parts = rollout.parts[rollout.done]
    expected = trl_advantages(parts, multi_objective_aggregation="normalize_then_sum")
    advantages = agent.advantages(rollout)
    torch.testing.assert_close(advantages[rollout.done], expected, atol=1e-5, rtol=1e-5)
    added = trl_advantages(parts)
    assert not torch.allclose(expected, added, atol=0.1)


def gdpo_with_parts(missing: bool = False):
    """GDPO on text with two rewards, and a rollout of its with other scores."""
    env = make_env(2, reward=[(count_a, WEIGHTS[0]), (longest, WEIGHTS[1])], kl_coef=0.0, gold=first_letter)
    agent = GDPO("auto", env, group_size=GROUP, n_episodes=8, seed=0)
    rollout = agent.learn(1).collect()
    parts = torch.tensor(
        [[1.0, 30.0], [0, 10], [0, 10], [1, 10], [0, 20], [0, 20], [0, 30], [0, 50]]
    ).double()
    if missing:
        parts[1, 0] = parts[4, 1] = math.nan
    rollout.parts = torch.where(rollout.done[..., None], parts[:, None], 0.0)
    return agent, rollout


def longest(prompts, completions):
    return [float(len(c.split())) for c in completions]


def first_letter(prompts, completions):
    return [float(c[:1] == "a") for c in completions]


def test_a_rollout_on_text_holds_what_each_reward_gave_and_no_gold():
    env = make_env(2, reward=[count_a, longest], kl_coef=0.0, gold=first_letter)
    rollout = GDPO("auto", env, group_size=GROUP, n_episodes=8, seed=0).learn(1).collect()
    assert rollout.parts.shape == (*rollout.mask.shape, 2)
    torch.testing.assert_close(rollout.parts.sum(-1), rollout.rewards + rollout.penalties)
    moved = rollout[torch.tensor([2, 1])]
    torch.testing.assert_close(moved.parts, rollout.parts[[2, 1]])


def test_with_one_reward_gdpo_is_grpo_whitened():
    rollout, _ = rollout_with(penalties=False)
    grpo = make(GRPO).advantages(rollout)[:, 0]
    expected = (grpo - grpo.mean()) / (grpo.std() + 1e-4)
    torch.testing.assert_close(make(GDPO).advantages(rollout)[:, 0], expected, atol=1e-5, rtol=1e-5)


def test_gdpo_says_what_it_cannot_take_apart():
    agent, rollout = gdpo_with_parts()
    rollout.parts = None
    with pytest.raises(ArgumentError, match=r"count_a, longest one by one.*stepped token by token"):
        agent.advantages(rollout)
    from reward_models import Ensemble

    agent, rollout = gdpo_with_parts()
    agent.text_env.unwrapped.dynamics.reward = Ensemble([count_a, longest])
    with pytest.raises(ArgumentError, match=r"list of rewards with a weight for each, got 'ensemble'"):
        agent.advantages(rollout)


# -- PPO for long answers -------------------------------------------------------------------------------------


def critics_rollout():
    rollout, new = rollout_with()
    rng = np.random.default_rng(3)
    values = torch.from_numpy(rng.normal(size=rollout.mask.shape)) * rollout.mask
    array, mask, done = values.numpy(), rollout.mask.numpy(), rollout.done.numpy()
    rollout.values = values
    rollout.next_values = torch.from_numpy(maths.shift_values(array, np.zeros(len(array)), mask, done))
    return rollout, Evaluation(new.log_probs, values.clone().requires_grad_(), new.entropy)


def ppo(cls, **kwargs):
    settings = {"n_episodes": 8, "n_envs": 8, "seed": 0, "gamma": 1.0, "batch_size": None}
    env = {"vocab_size": 4, "horizon": 4, "kl_coef": 0.3}
    return cls(TabularPolicy, "TokenTree-v0", env_kwargs=env, **(settings | kwargs))


def gae_by_hand(rollout, i: int, lam: float) -> list[float]:
    n = LENGTHS[i]
    rewards, values = rollout.rewards[i].tolist(), [*rollout.values[i, :n].tolist(), 0.0]
    estimate, found = 0.0, []
    for t in reversed(range(n)):
        estimate = rewards[t] + values[t + 1] - values[t] + lam * estimate
        found.insert(0, estimate)
    return found


def test_vapos_lambda_grows_with_the_length_of_the_answer():
    rollout, _ = critics_rollout()
    advantages = ppo(VAPO, group_size=4, alpha=0.6).advantages(rollout)
    for i, n in enumerate(LENGTHS):
        lam = max(0.0, 1 - 1 / (0.6 * n))
        assert advantages[i, :n].tolist() == pytest.approx(gae_by_hand(rollout, i, lam), abs=1e-6)


@pytest.mark.parametrize("cls", [VAPO, VCPPO])
def test_the_critic_learns_the_return_itself_whatever_the_advantages_lambda(cls):
    rollout, _ = critics_rollout()
    agent = ppo(cls, **({"group_size": 4} if cls is VAPO else {}))
    targets = agent.value_targets(rollout, agent.advantages(rollout))
    to_go = [[sum(rollout.rewards[i, t:n].tolist()) for t in range(n)] for i, n in enumerate(LENGTHS)]
    for i, n in enumerate(LENGTHS):
        assert targets[i, :n].tolist() == pytest.approx(to_go[i], abs=1e-6)


def test_vapo_adds_the_likelihood_of_right_answers_and_clips_higher():
    rollout, new = critics_rollout()
    agent = ppo(VAPO, group_size=4, lm_coef=0.7, normalize_advantage=False, vf_coef=0.0, right_above=0.5)
    batch = agent.prepare_batch(agent.prepare_rollout(rollout))
    weights = agent.loss_weights(batch)
    loss = float((agent.loss(batch, new)[0] * weights)[batch.mask].sum().detach())
    surrogate, likelihood = [], []
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            ratio = math.exp(float(new.log_probs[i, t].detach() - rollout.log_probs[i, t]))
            a = float(batch.advantages[i, t])
            surrogate.append(-min(ratio * a, min(max(ratio, 0.8), 1.28) * a))
            if SCORES[i] > 0.5:
                likelihood.append(-float(new.log_probs[i, t].detach()))
    expected = sum(surrogate) / len(surrogate) + 0.7 * sum(likelihood) / len(likelihood)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_vc_ppo_is_ppo_with_a_critic_that_learns_first():
    agent = ppo(VCPPO)
    assert (agent.gae_lambda, agent.critic_gae_lambda, agent.critic_warmup) == (0.95, 1.0, 50)
    assert agent.warming_up and not ppo(PPO).warming_up
    rollout, _ = critics_rollout()
    advantages = agent.advantages(rollout)
    for i, n in enumerate(LENGTHS):
        assert advantages[i, :n].tolist() == pytest.approx(gae_by_hand(rollout, i, 0.95), abs=1e-6)


def test_what_vapo_derives_is_no_argument_of_it():
    with pytest.raises(TypeError, match=r"VAPO takes no gae_lambda: it follows from alpha"):
        ppo(VAPO, gae_lambda=0.9)
    with pytest.raises(ValueError, match=r"alpha must be a finite number > 0"):
        ppo(VAPO, alpha=0.0)
