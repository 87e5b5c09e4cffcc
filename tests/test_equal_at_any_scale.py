"""Advantages do not depend on a constant in the rewards; options of a method do what they say or are refused."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE, RLOO, DrGRPO, Rollout
from agents.algorithms import maths
from agents.rollouts.vector_envs import longest_episode
from tests.tiny import make_env


class Pick(gym.Env):
    """One or two steps; pays the number of the action and a constant at the end."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(3)

    def __init__(self, constant=0.0, steps=1):
        self.constant, self.steps = constant, steps

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(2, np.float32), self.constant + float(action), self.t == self.steps, False, {}


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize("constant", [1e6, -1e9, 1e12])
@pytest.mark.parametrize("cls", [GRPO, RLOO, REINFORCE])
def test_a_constant_in_all_rewards_changes_no_update(cls, constant):
    settings = {} if cls is REINFORCE else {"group_size": 8}

    def train(shift):
        agent = cls("MlpPolicy", Pick(shift), n_episodes=16, learning_rate=1e-2, seed=0, **settings)
        start = weights(agent).clone()
        return start, weights(agent.learn(16))

    start, plain = train(0.0)
    _, shifted = train(constant)
    assert (plain - start).abs().max() > 1e-3
    assert shifted.numpy() == pytest.approx(plain.numpy(), abs=1e-4)


def test_advantages_of_a_group_are_the_formula_whatever_the_offset():
    rewards = torch.tensor([0.0, 1.0, 2.0])
    expected = (rewards - 1) / (rewards.std() + 1e-4)
    for dtype, offset in (
        (torch.float32, 1e6),
        (torch.float64, 1e6),
        (torch.float64, 1e12),
        (torch.float32, 0.0),
    ):
        got = maths.group_advantages(rewards.to(dtype) + offset, 3)
        assert got.tolist() == pytest.approx(expected.tolist(), abs=1e-4), (dtype, offset)
    whitened = maths.masked_whiten(rewards[None] + 1e6, torch.ones(1, 3, dtype=torch.bool))
    assert whitened[0].tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-4)


def test_equal_numbers_in_another_order_of_summation_stay_equal():
    parts = torch.rand(8, 50, generator=torch.Generator().manual_seed(0))
    one = parts[:1].expand(8, -1)
    sums = torch.stack([row[torch.randperm(50)].sum() for row in one])
    assert maths.all_equal(sums) and not maths.all_equal(torch.tensor([1e6, 1e6 + 1]))
    assert maths.group_advantages(sums, 8).tolist() == [0.0] * 8


def test_a_discount_reaches_the_scores_of_a_group():
    agent = GRPO("MlpPolicy", Pick(steps=2), n_episodes=4, group_size=2, gamma=0.5, seed=0)
    plain = GRPO("MlpPolicy", Pick(steps=2), n_episodes=4, group_size=2, seed=0)
    rollout = _rollout()
    first, second = rollout.rewards[:, 0], rollout.rewards[:, 1]
    assert torch.allclose(agent.episode_scores(rollout), first + 0.5 * second)
    assert torch.allclose(plain.episode_scores(rollout), first + second)


def _rollout():
    mask = torch.ones(4, 2, dtype=torch.bool)
    rewards = torch.arange(8.0, dtype=torch.float64).view(4, 2)
    zeros = torch.zeros(4, 2)
    return Rollout({}, zeros, rewards, zeros, zeros, zeros, mask, mask)


@pytest.mark.parametrize(
    "cls, name, value, why",
    [
        (GRPO, "critic", "shared", "baseline"),
        (GRPO, "n_steps", 5, "n_episodes"),
        (GRPO, "gae_lambda", 0.9, "no critic"),
        (RLOO, "vf_coef", 0.1, "no critic"),
        (REINFORCE, "n_steps", 5, "n_episodes"),
    ],
)
def test_what_a_method_has_no_use_for_is_refused_with_the_reason(cls, name, value, why):
    with pytest.raises(TypeError, match=f"takes no {name}: .*{why}"):
        cls("MlpPolicy", Pick(), **{name: value})


def test_ppo_learns_without_a_critic():
    agent = PPO("MlpPolicy", Pick(), critic=None, n_steps=32, batch_size=16, learning_rate=1e-2, seed=0)
    before = weights(agent).clone()
    agent.learn(32)
    assert not torch.equal(before, weights(agent)) and "train/value_loss" not in agent.latest


@pytest.mark.parametrize("name, value", [("n_envs", 8), ("env_kwargs", {"steps": 2})])
def test_arguments_that_make_an_env_are_warned_of_beside_one_that_is_made(name, value, tmp_path):
    with pytest.warns(UserWarning, match=f"{name}=.*is there already"):
        assert PPO("MlpPolicy", Pick(), **{name: value}).num_envs == 1
    agent = PPO("MlpPolicy", "LineWorld-v0", n_steps=4, n_envs=2, env_kwargs={"length": 5}, seed=0)
    agent.save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PPO.load(tmp_path, gym.make_vec("LineWorld-v0", num_envs=4, length=5)).num_envs == 4


# Starts and limits


def test_a_prompt_id_that_is_text_and_a_prompt_that_is_a_number_are_refused():
    env, envs = make_env(), make_env(2)
    with pytest.raises(ValueError, match=r"options\['prompt_id'\] must be an integer, got '3'.*'prompt'"):
        env.reset(options={"prompt_id": "3"})
    with pytest.raises(ValueError, match=r"options\['prompt'\] must be a text, got 3"):
        env.reset(options={"prompt": 3})
    with pytest.raises(ValueError, match="must be an integer, got '1'"):
        envs.reset(options={"prompt_id": [0, "1"]})
    with pytest.raises(ValueError, match=r"must be an integer, got 1\.5"):
        gym.make("LineWorld-v0").reset(options={"state": 1.5})
    assert envs.reset(options={"prompt": ["a b", None]})[1]["prompt"][0] == "a b"


def test_a_time_limit_below_the_budget_is_refused_wherever_it_comes_from():
    with pytest.raises(ValueError, match=r"max_episode_steps=2 would cut responses off.*horizon=4"):
        gym.make_vec("TokenTree-v0", num_envs=2, max_episode_steps=2)
    with pytest.raises(ValueError, match=r"TimeLimit of 2 steps.*horizon=4"):
        PPO("MlpPolicy", gym.make("TokenTree-v0", max_episode_steps=2))
    with pytest.raises(ValueError, match=r"TimeLimit of 2 steps.*max_new_tokens=6"):
        REINFORCE("auto", gym.wrappers.TimeLimit(make_env(), 2))
    assert PPO("MlpPolicy", gym.make("TokenTree-v0", max_episode_steps=4)).num_envs == 1


# Dr. GRPO's constant, entropy and KL


def test_dr_grpo_divides_by_the_budget_however_the_episodes_are_run():
    for env in (
        make_env(4, max_new_tokens=9),
        gym.wrappers.vector.TransformReward(make_env(4, max_new_tokens=9), lambda reward: reward),
    ):
        agent = DrGRPO("auto", env, n_episodes=4, group_size=4, seed=0)
        agent.learn(1)
        mask = torch.ones(4, 3, dtype=torch.bool)
        batch = _rollout()
        batch.mask = mask
        assert agent.loss_weights(batch).max() == pytest.approx(1 / (4 * 9))


@pytest.mark.parametrize(
    "env, expected",
    [("LineWorld-v0", 50), ("TokenTree-v0", 4), ("ToyBandit-v0", 1), ("CartPole-v1", 500)],
)
def test_the_longest_episode_is_known_by_the_task_or_by_a_time_limit(env, expected):
    assert longest_episode(gym.vector.SyncVectorEnv([lambda: gym.make(env)])) == expected
    if env != "CartPole-v1":
        assert longest_episode(gym.make_vec(env, num_envs=2)) == expected
    assert longest_episode(gym.vector.SyncVectorEnv([Pick])) is None


@pytest.mark.parametrize("average", ["sequence", "constant", "token"])
def test_the_entropy_bonus_can_be_averaged_over_tokens_whatever_the_loss(average):
    agent = GRPO(
        "MlpPolicy",
        "LineWorld-v0",
        n_episodes=4,
        group_size=2,
        average=average,
        ent_coef=0.5,
        entropy_average="token",
    )
    batch = _rollout()
    batch.mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 0]], dtype=torch.bool)
    entropy = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0], [7.0, 0.0]])
    share = agent.loss_weights(batch) * agent._entropy_bonus(batch, entropy)
    assert float(share.sum()) == pytest.approx(0.5 * 24 / 6)


def test_the_corrected_k3_has_the_gradient_of_the_kl_itself():
    torch.manual_seed(0)
    logits, reference = (
        torch.randn(5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64),
    )
    log_probs, ref = logits.log_softmax(-1), reference.log_softmax(-1)
    exact = torch.autograd.grad((log_probs.exp() * (log_probs - ref)).sum(), logits, retain_graph=True)[0]
    old = log_probs.detach()

    def expected_gradient(ratio):
        loss = (
            old.exp() * maths.kl_loss(log_probs, ref, "k3", ratio)
        ).sum()  # every token, as often as it is drawn
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    assert expected_gradient((log_probs - old).exp()).numpy() == pytest.approx(exact.numpy(), abs=1e-12)
    assert (expected_gradient(None) - exact).abs().max() > 0.01
    agent = GRPO(
        "auto",
        make_env(2),
        n_episodes=4,
        group_size=2,
        kl_in="loss",
        kl_loss_estimator="k3-corrected",
        seed=0,
    ).learn(1)
    assert agent.latest["train/kl_loss"] == pytest.approx(0.0, abs=1e-6)
