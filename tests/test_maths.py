"""The equations against literal numbers, identities, brute force and stable-baselines3's own."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer

from agents.algorithms import maths
from textrl_env.kl import estimate_kl


def brute_force_gae(rewards, values, next_values, mask, done, gamma, lam):
    """``A_t = sum_l (gamma lambda)^l delta_{t+l}``, written out; ``l`` counts real steps of one episode only."""
    advantages = np.zeros_like(rewards)
    for b, row in enumerate(mask):
        steps = np.flatnonzero(row)
        for i, t in enumerate(steps):
            total = 0.0
            for power, u in enumerate(steps[i:]):
                delta = rewards[b, u] + gamma * next_values[b, u] - values[b, u]
                total += (gamma * lam) ** power * delta
                if done[b, u]:
                    break
            advantages[b, t] = total
    return advantages


def random_rollout(seed: int, batch: int = 3, steps: int = 7, masked: bool = True):
    rng = np.random.default_rng(seed)
    shape = (batch, steps)
    mask = rng.random(shape) < 0.7 if masked else np.ones(shape, dtype=bool)
    rewards, values = rng.normal(size=shape), rng.normal(size=shape)
    terminated = rng.random(shape) < 0.25
    truncated = (rng.random(shape) < 0.2) & ~terminated
    bootstrap = rng.normal(size=shape) * truncated
    last = rng.normal(size=batch)
    done = terminated | truncated
    next_values = maths.shift_values(values, last, mask, done) + bootstrap
    return rewards, values, next_values, mask, done, terminated, bootstrap, last


# Returns and advantages


def test_reward_to_go_is_the_discounted_sum_of_what_follows():
    rewards = np.array([[1.0, 2.0, 3.0]])
    mask, done = np.ones((1, 3), bool), np.array([[False, False, True]])
    expected = [[1 + 0.5 * 2 + 0.25 * 3, 2 + 0.5 * 3, 3.0]]
    assert maths.reward_to_go(rewards, mask, done, 0.5) == pytest.approx(np.array(expected))


def test_returns_do_not_flow_from_one_episode_into_the_one_before():
    rewards = np.array([[1.0, 10.0, 100.0]])
    done = np.array([[True, False, True]])
    assert maths.reward_to_go(rewards, np.ones((1, 3), bool), done, 1.0).tolist() == [[1.0, 110.0, 100.0]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    masked=st.booleans(),
)
def test_gae_is_the_sum_of_discounted_deltas(seed, gamma, lam, masked):
    rewards, values, next_values, mask, done, *_ = random_rollout(seed, masked=masked)
    arguments = rewards, values, next_values, mask, done, gamma, lam
    assert maths.gae(*arguments) == pytest.approx(brute_force_gae(*arguments))


def test_gae_with_lambda_zero_is_the_td_error():
    rewards, values, next_values, mask, done, *_ = random_rollout(1)
    delta = (rewards + 0.9 * next_values - values) * mask
    assert maths.gae(rewards, values, next_values, mask, done, 0.9, 0.0) == pytest.approx(delta)


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6)), rng.normal(size=(2, 6))
    mask = np.ones((2, 6), bool)
    done = np.zeros((2, 6), bool)
    done[:, -1] = True
    next_values = maths.shift_values(values, np.zeros(2), mask, done)
    returns = maths.reward_to_go(rewards, mask, done, 0.9)
    assert maths.gae(rewards, values, next_values, mask, done, 0.9, 1.0) == pytest.approx(returns - values)


def test_gae_skips_masked_steps_as_if_they_were_not_there():
    rewards, values, _, mask, done, *_ = random_rollout(4, batch=1, steps=12)
    last = np.array([0.7])
    holes = maths.gae(rewards, values, maths.shift_values(values, last, mask, done), mask, done, 0.9, 0.95)
    dense_rewards, dense_values, dense_done = (x[mask][None] for x in (rewards, values, done))
    full = np.ones_like(dense_done)
    following = maths.shift_values(dense_values, last, full, dense_done)
    dense = maths.gae(dense_rewards, dense_values, following, full, dense_done, 0.9, 0.95)
    assert holes[mask] == pytest.approx(dense[0])
    assert (holes[~mask] == 0).all()


def test_truncation_bootstraps_and_termination_does_not():
    values, last = np.array([[1.0, 2.0]]), np.array([5.0])
    mask = np.ones((1, 2), bool)
    rewards = np.array([[0.0, 1.0]])
    ended = np.array([[False, True]])
    cut = maths.shift_values(values, last, mask, np.zeros((1, 2), bool))
    assert maths.gae(rewards, values, cut, mask, ended, 0.5, 0.0)[0, 1] == 1.0 + 0.5 * 5.0 - 2.0
    over = maths.shift_values(values, last, mask, ended)
    assert maths.gae(rewards, values, over, mask, ended, 0.5, 0.0)[0, 1] == 1.0 - 2.0


@pytest.mark.parametrize("seed", range(3))
def test_gae_equals_stable_baselines3s_rollout_buffer(seed):
    rewards, values, next_values, mask, done, _, bootstrap, last = random_rollout(
        seed, batch=3, steps=9, masked=False
    )
    gamma, lam = 0.97, 0.9
    spaces = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    buffer = RolloutBuffer(9, *spaces, device="cpu", gae_lambda=lam, gamma=gamma, n_envs=3)
    starts = np.ones(3)
    for t in range(9):
        # stable-baselines3 adds the value of a truncated episode's last state to its last reward.
        paid = rewards[:, t] + gamma * bootstrap[:, t]
        value, zeros = torch.tensor(values[:, t]), torch.zeros(3)
        buffer.add(np.zeros((3, 1)), np.zeros((3, 1)), paid, starts, value, zeros)
        starts = done[:, t]
    buffer.compute_returns_and_advantage(torch.tensor(last), starts)
    ours = maths.gae(rewards, values, next_values, mask, done, gamma, lam)
    assert ours == pytest.approx(buffer.advantages.T, abs=1e-5)
    assert ours + values == pytest.approx(buffer.returns.T, abs=1e-5)


# Means over real steps


def test_masked_mean_ignores_what_is_masked_and_is_zero_over_nothing():
    x, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]])
    assert maths.masked_mean(x, mask) == 2.0
    assert maths.masked_mean(x, torch.zeros_like(mask)) == 0.0


def test_whitening_masks_both_the_mean_and_the_variance():
    x = torch.tensor([[1.0, 2.0, 1e6], [3.0, -1e6, 4.0]])
    mask = x.abs() < 1e5
    white = maths.masked_whiten(x, mask)
    assert white[mask].mean() == pytest.approx(0.0, abs=1e-6)
    assert white[mask].std() == pytest.approx(1.0, abs=1e-6)
    assert (white[~mask] == 0).all()


def test_whitening_without_a_shift_keeps_the_mean():
    x = torch.tensor([[1.0, 2.0, 6.0]])
    mask = torch.ones_like(x, dtype=torch.bool)
    white = maths.masked_whiten(x, mask, shift_mean=False)
    assert white.mean() == pytest.approx(3.0)
    assert white.std() == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e4 / 3])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_whitening_equal_entries_gives_zero_not_nan_and_not_rounding_noise(value, count):
    x = torch.full((1, count), value)
    white = maths.masked_whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert (white == 0).all()


# Groups


def test_group_advantages_are_relative_to_the_neighbours_of_one_prompt():
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])
    advantages = maths.group_advantages(scores, 3)
    assert advantages.tolist() == pytest.approx([-1, 0, 1, -1, 0, 1], abs=1e-3)
    assert maths.group_advantages(scores, 3, "none").tolist() == [-1, 0, 1, -10, 0, 10]


@pytest.mark.parametrize("scale", ["std", "none", "leave-one-out"])
def test_answers_without_a_score_have_no_advantage_and_are_in_no_mean(scale):
    counted = torch.tensor([True, True, False, True, False, True, False, False])
    scores = torch.tensor([1.0, 3.0, 99.0, 2.0, -7.0, 5.0, 4.0, 4.0])
    got = maths.group_advantages(scores, 4, scale, counted)
    alone = maths.group_advantages(scores[counted][:3], 3, scale)
    assert got[:2].tolist() == pytest.approx(alone[:2].tolist()) and got[3] == pytest.approx(alone[2].item())
    assert got[2] == 0 and got[4:].tolist() == [0.0] * 4  # one with a score has nothing to be better than


@pytest.mark.parametrize("scale", ["std", "none", "leave-one-out"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.7])
def test_equal_rewards_give_zero_advantage_not_nan(scale, value):
    advantages = maths.group_advantages(torch.full((14,), value), 7, scale)
    assert advantages.abs().max() <= 1e-6
    assert advantages.isfinite().all()


@pytest.mark.parametrize("scale", ["std", "none", "leave-one-out"])
def test_a_group_of_one_gives_zero_advantage_not_nan(scale):
    assert maths.group_advantages(torch.tensor([1.0, -2.0]), 1, scale).tolist() == [0.0, 0.0]


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    expected = [
        (scores[i] - (scores[g : g + 4].sum() - scores[i]) / 3).item()
        for g in (0, 4, 8)
        for i in range(g, g + 4)
    ]
    assert maths.group_advantages(scores, 4, "leave-one-out").tolist() == pytest.approx(expected, abs=1e-6)


def test_scores_that_do_not_fill_their_groups_are_refused():
    with pytest.raises(ValueError, match="5 episodes cannot be split into groups of 2"):
        maths.group_advantages(torch.zeros(5), 2)


# PPO


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (1.5, 1.0, -1.2, False),  # better and already likelier: no more than the clip
        (0.5, 1.0, -0.5, True),  # better but less likely: the full way back
        (1.5, -1.0, 1.5, True),  # worse but likelier: the full way back
        (0.5, -1.0, 0.8, False),  # worse and already less likely: no more than the clip
        (1.1, 1.0, -1.1, True),  # inside the clip, both ways
        (0.9, -1.0, 0.9, True),
    ],
)
def test_ppo_clips_only_what_goes_too_far_in_the_right_direction(ratio, advantage, loss, has_gradient):
    ratio = torch.tensor(ratio, requires_grad=True)
    result = maths.ppo_clip_loss(ratio, torch.tensor(advantage), 0.2)
    assert result.item() == pytest.approx(loss)
    result.backward()
    assert (ratio.grad != 0) == has_gradient


def test_clip_higher_moves_the_upper_side_only():
    ratio = torch.tensor([1.25, 1.5, 0.7])
    loss = maths.ppo_clip_loss(ratio, torch.tensor([1.0, 1.0, -1.0]), 0.2, 0.28)
    assert loss.tolist() == pytest.approx([-1.25, -1.28, 0.8])
    assert maths.clip_fraction(ratio, 0.2, 0.28).tolist() == [0, 1, 1]
    assert maths.clip_fraction(ratio, 0.2).tolist() == [1, 1, 1]


def test_the_value_loss_is_the_square_and_its_clip_the_pessimistic_one():
    values, returns, old = torch.tensor([2.0, 0.0]), torch.tensor([3.0, 0.05]), torch.tensor([1.0, 0.0])
    assert maths.value_loss(values, returns).tolist() == pytest.approx([1.0, 0.0025])
    # The first has moved by 1, may move by 0.2: judged at 1.2, which is worse.
    assert maths.value_loss(values, returns, old, 0.2).tolist() == pytest.approx([1.8**2, 0.0025])


def test_approx_kl_is_never_negative_and_zero_at_one():
    ratio = torch.tensor([0.5, 1.0, 2.0])
    kl = maths.approx_kl(ratio)
    assert kl[1] == 0 and (kl >= 0).all()
    assert kl[2] == pytest.approx(1 - math.log(2))


# KL


P = np.array([0.7, 0.1, 0.1, 0.1])
Q = np.array([0.6, 0.2, 0.1, 0.1])


def test_the_expectations_of_k1_and_k3_are_the_kl_of_two_distributions():
    log_ratio = np.log(P / Q)
    exact = float((P * log_ratio).sum())
    assert exact == pytest.approx(0.0385908, abs=1e-7)
    assert 0.02 * exact == pytest.approx(0.000772, abs=1e-6)
    assert (P * estimate_kl(log_ratio, "k1")).sum() == pytest.approx(exact)
    assert (P * estimate_kl(log_ratio, "k3")).sum() == pytest.approx(exact)
    assert (P * estimate_kl(log_ratio, "k2")).sum() == pytest.approx((P * log_ratio**2).sum() / 2)


def test_the_estimators_are_their_formulas():
    k1 = np.array([-1.0, 0.0, 0.5])
    assert estimate_kl(k1, "k1").tolist() == k1.tolist()
    assert estimate_kl(k1, "k2") == pytest.approx(k1**2 / 2)
    assert estimate_kl(k1, "k3") == pytest.approx(np.exp(-k1) - 1 + k1)
    assert (estimate_kl(k1, "k3") >= 0).all()


def softmax_bandit():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)


def test_k2_as_a_loss_has_the_gradient_of_the_kl_and_k3_has_not():
    logits, reference = softmax_bandit()

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    log_probs = logits.log_softmax(0)
    probs = log_probs.exp()
    exact = gradient((probs * (log_probs - reference)).sum())
    on_policy = logits.log_softmax(0).exp().detach()
    k2 = gradient((on_policy * maths.kl_loss(logits.log_softmax(0), reference, "k2")).sum())
    k3 = gradient((on_policy * maths.kl_loss(logits.log_softmax(0), reference, "k3")).sum())
    assert k2 == pytest.approx(exact)
    assert torch.cosine_similarity(k3, exact, dim=0) < 0.999
    # What k1 would be as a loss: nothing at all, which is why it is refused.
    k1 = gradient((on_policy * (logits.log_softmax(0) - reference)).sum())
    assert k1.abs().max() < 1e-12
    with pytest.raises(ValueError, match="k1"):
        maths.kl_loss(logits, reference, "k1")


# Averages


MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()


def test_loss_weights_are_the_token_sequence_and_constant_means():
    token = maths.loss_weights(MASK, "token")
    assert token[MASK].tolist() == pytest.approx([0.2] * 5)
    sequence = maths.loss_weights(MASK, "sequence")
    assert sequence[0].tolist() == pytest.approx([0.125] * 4) and sequence[1, 0] == 0.5
    constant = maths.loss_weights(MASK, "constant", max_length=10)
    assert constant[MASK].tolist() == pytest.approx([1 / 20] * 5)
    for weights in (token, sequence, constant):
        assert (weights[~MASK] == 0).all()
    assert token.sum() == pytest.approx(1) and sequence.sum() == pytest.approx(1)


def test_loss_weights_of_an_empty_mask_are_zero_not_nan():
    for average in ("token", "sequence", "constant"):
        assert (maths.loss_weights(torch.zeros(2, 3, dtype=torch.bool), average) == 0).all()


def test_explained_variance_is_one_for_a_perfect_critic_and_nan_for_a_constant_target():
    target, mask = torch.tensor([[1.0, 2.0, 4.0, 99.0]]), torch.tensor([[True, True, True, False]])
    assert maths.explained_variance(target, target, mask) == 1.0
    assert maths.explained_variance(torch.zeros_like(target), target, mask) == 0.0
    assert maths.explained_variance(-target, target, mask) < 0
    assert math.isnan(maths.explained_variance(target, torch.ones_like(target), mask))
