"""Policy gradients against the exact gradient of the objective, by the agents' own losses."""

from __future__ import annotations

import numpy as np
import pytest

from agents import DAPO, GRPO, REINFORCE, RLOO, DrGRPO
from agents.evaluation.estimators import compare
from benchmarks.gradients import (
    TREE,
    averages,
    gae_error,
    make_agent,
    make_ppo,
    measure,
    measure_elsewhere,
    placements,
)

BATCHES = 60


@pytest.fixture(scope="module")
def five_arms():
    return placements()


def reinforce(tree=TREE, **kwargs):
    return make_agent(REINFORCE, tree, gamma=1.0, **kwargs)


UNBIASED = {
    "REINFORCE, no baseline": lambda: reinforce(baseline="none"),
    "REINFORCE, mean of the others": lambda: reinforce(),
    "REINFORCE, learned baseline": lambda: reinforce(baseline="learned"),
    "PPO, lambda 1, wrong critic": lambda: make_ppo(1.0, "wrong"),
    "PPO, lambda 0, exact critic": lambda: make_ppo(0.0, "exact"),
    "RLOO": lambda: make_agent(RLOO),
    "leave-one-out": lambda: make_agent(GRPO, scale="leave-one-out", average="token"),
}


@pytest.mark.parametrize("make", UNBIASED.values(), ids=UNBIASED)
def test_an_unbiased_estimator_averages_to_the_exact_gradient(make):
    found = measure(make(), BATCHES)
    assert found.z < 3
    assert found.cosine == pytest.approx(1, abs=0.02)


BIASED = {
    "k2 in the reward": lambda: reinforce(TREE | {"kl_estimator": "k2"}),
    "k3 in the reward": lambda: reinforce(TREE | {"kl_estimator": "k3"}),
    "PPO, lambda 0, wrong critic": lambda: make_ppo(0.0, "wrong"),
    "GRPO, std": lambda: make_agent(GRPO),
    "k2 as a loss on several tokens": lambda: make_agent(
        GRPO, scale="leave-one-out", kl_in="loss", kl_loss_estimator="k2"
    ),
    "k3 as a loss on several tokens": lambda: make_agent(
        GRPO, scale="leave-one-out", kl_in="loss", kl_loss_estimator="k3"
    ),
}


@pytest.mark.parametrize("make", BIASED.values(), ids=BIASED)
def test_a_known_bias_is_seen(make):
    assert measure(make(), BATCHES).z > 10


def test_normalising_changes_the_length_of_the_gradient_and_not_its_direction():
    found = measure(reinforce(normalize_advantage=True), BATCHES)
    assert found.cosine > 0.99
    assert found.z > 10


def test_a_group_mean_that_includes_the_answer_itself_shortens_the_gradient_by_one_over_g():
    found = measure(make_agent(DrGRPO, group_size=2), 150)
    assert found.cosine > 0.99
    assert found.bias == pytest.approx(1 / 2, abs=0.05)


def test_dapo_takes_grpos_first_step_where_every_group_is_informative():
    plain, dapo = (measure(make_agent(cls), 5) for cls in (GRPO, DAPO))
    assert dapo == pytest.approx(plain)


def test_only_the_constant_mean_over_steps_is_unbiased_when_lengths_differ():
    found = averages(BATCHES)
    assert found["constant"].z < 3
    assert found["sequence"].z > 10


def test_of_five_arms_k1_in_the_reward_and_k2_as_a_loss_have_the_gradient_of_the_kl(five_arms):
    found = five_arms
    for key in (("reward", "k1"), ("loss", "k2")):
        assert found[key] == pytest.approx((1.0, 1.0), abs=1e-3)


def test_of_five_arms_k3_is_biased_as_a_loss_and_nearly_unrelated_in_the_reward(five_arms):
    found = five_arms
    assert found["loss", "k3"][0] == pytest.approx(0.902, abs=0.01)
    assert found["reward", "k3"][0] == pytest.approx(0.040, abs=0.01)


def test_k1_as_a_loss_has_no_gradient(five_arms):
    cosine, length = five_arms["loss", "k1"]
    assert length < 1e-4
    assert np.isnan(cosine)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_with_exact_values_averages_to_the_exact_advantage(gae_lambda):
    assert gae_error(gae_lambda) < 1e-4


def test_what_a_generator_that_lags_behind_has_written_is_corrected_without_a_bias_by_the_ratio_of_whole_responses():
    found = measure_elsewhere("16 updates behind", BATCHES)
    assert found["none"].z > 10
    assert found["sequence_truncate, no cap"].z < 3
    assert found["sequence_truncate, no cap"].cosine == pytest.approx(1, abs=0.03)
    # A cap costs a bias, and less of it than no correction.
    assert 3 < found["sequence_truncate, 3"].z < found["none"].z
    assert found["sequence_truncate, 3"].bias < found["token_truncate, 3"].bias


def test_a_generator_in_bfloat16_needs_no_correction_and_loses_nothing_by_one():
    found = measure_elsewhere("in bfloat16", 20)
    for comparison in found.values():
        assert comparison.z < 3
        assert comparison.cosine == pytest.approx(1, abs=0.06)


def test_the_comparison_itself_tells_noise_from_bias():
    rng = np.random.default_rng(0)
    target = rng.normal(size=20)
    noise = rng.normal(size=(200, 20))
    assert abs(compare(target + noise, target).z) < 3
    shifted = compare(target + 0.5 + noise, target)
    assert shifted.z > 10
    assert shifted.bias == pytest.approx(0.5 * np.sqrt(20) / np.linalg.norm(target), rel=0.1)
