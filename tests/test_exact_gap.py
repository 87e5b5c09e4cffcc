"""The exact gap, the tabular policy, and agents that reach the optimum."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import textrl_env  # noqa: F401 (registers the ids)
from agents import GRPO, PPO, REINFORCE, ExactGapCallback, TabularPolicy
from agents.callbacks.exact_gap import CHEAP_RESPONSES, cheap_gap_callback, policy_log_probs
from agents.cli import main
from agents.runs.logs import read_progress
from agents.runs.run_directory import new_config, train
from benchmarks.optimality import MAIN, learn_tree, tiny_transformer
from tests.tiny import make_env
from textrl_env.exact.solver import from_text_env, from_token_tree, sequence_distribution, solve

TREE = {"vocab_size": 3, "horizon": 3, "num_prompts": 2, "kl_coef": 0.5}


def vector_tree(num_envs=8, **kwargs):
    return gym.make_vec("TokenTree-v0", num_envs=num_envs, **(TREE | kwargs))


def tabular(cls, env, logits=None, **kwargs):
    policy_kwargs = {"logits": logits, "eos": env.unwrapped.dynamics.eos}
    return cls(TabularPolicy, env, policy_kwargs=policy_kwargs, seed=0, **kwargs)


def tiny_text(**kwargs):
    settings = {"prompts": ["a", "b c"], "max_new_tokens": 2, "lm": tiny_transformer(), "kl_coef": 0.4}
    return make_env(**(settings | kwargs))


# -- the tabular policy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [True, False])
def test_a_table_of_the_references_logits_is_the_reference_in_every_step(eos):
    env = vector_tree(eos=eos)
    agent = tabular(REINFORCE, env, env.unwrapped.dynamics.ref_table, n_episodes=64)
    caught = []
    agent.train = caught.append
    agent.learn(1, log_interval=None)
    (rollout,) = caught
    torch.testing.assert_close(rollout.log_probs, rollout.ref_log_probs, atol=1e-5, rtol=1e-5)
    again = agent.policy.evaluate(rollout).log_probs
    torch.testing.assert_close(again * rollout.mask, rollout.log_probs, atol=1e-5, rtol=1e-5)


def test_a_table_without_logits_starts_uniform():
    agent = tabular(REINFORCE, vector_tree())
    for level in policy_log_probs(agent.policy, agent.env):
        np.testing.assert_allclose(level, -np.log(3), rtol=1e-6)


def test_the_exact_critic_is_read_at_the_right_rows():
    env = vector_tree()
    agent = tabular(PPO, env, gamma=1.0, n_episodes=32)
    agent.policy.values.data = torch.arange(len(agent.policy.values)).float()
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(agent.policy.predict_values(observation), env.unwrapped.dynamics.node)


def test_a_table_refuses_other_environments_and_other_trees():
    with pytest.raises(ValueError, match="TokenTree"):
        REINFORCE(TabularPolicy, "CartPole-v1")
    with pytest.raises(ValueError, match=r"\(14, 3\)"):
        tabular(REINFORCE, vector_tree(), np.zeros((3, 3)))


# -- reading a policy -------------------------------------------------------------------------------------------


def test_the_levels_of_the_reference_are_the_solvers_own():
    env = vector_tree()
    agent = tabular(REINFORCE, env, env.unwrapped.dynamics.ref_table)
    levels = policy_log_probs(agent.policy, env)
    for level, expected in zip(levels, from_token_tree(env).ref_log_probs, strict=True):
        np.testing.assert_allclose(level, expected, atol=1e-6)


@pytest.mark.parametrize("num_envs", [None, 3])
def test_a_language_models_levels_are_the_solvers_own_when_it_is_the_reference(num_envs):
    env = tiny_text(num_envs=num_envs)
    agent = GRPO("auto", env, seed=0)
    levels = policy_log_probs(agent.policy, agent.env)
    for level, expected in zip(levels, from_text_env(env).ref_log_probs, strict=True):
        np.testing.assert_allclose(level, expected, atol=1e-5)


def test_reading_a_language_model_does_not_disturb_its_learning():
    def weights(callback):
        agent = GRPO("auto", tiny_text(num_envs=3), n_episodes=16, seed=0).learn(100, callback)
        return [p.detach() for p in agent.policy.parameters()]

    for a, b in zip(weights(None), weights(ExactGapCallback()), strict=True):
        assert torch.equal(a, b)


def test_an_mlps_levels_are_what_it_plays():
    env = vector_tree(num_envs=4)
    agent = REINFORCE("MlpPolicy", env, seed=0)
    levels = policy_log_probs(agent.policy, env)
    observation, _ = env.reset(seed=0)
    said = agent.policy.log_prob(observation, np.array([0, 1, 2, 1]))
    rows = env.unwrapped.dynamics.node
    np.testing.assert_allclose(said, levels[0][rows, [0, 1, 2, 1]], atol=1e-6)


# -- the callback -----------------------------------------------------------------------------------------------


def test_the_gap_is_one_for_the_reference_and_zero_for_the_optimum():
    env = vector_tree()
    best = solve(from_token_tree(env))
    for logits, gap in ((env.unwrapped.dynamics.ref_table, 1.0), (np.concatenate(best.policy), 0.0)):
        callback = ExactGapCallback()
        tabular(REINFORCE, env, logits, learning_rate=0.0, n_episodes=8).learn(1, callback)
        assert callback.latest["gap"] == pytest.approx(gap, abs=1e-5)
    assert callback.latest["kl_to_optimum"] == pytest.approx(0, abs=1e-6)
    assert callback.latest["J"] == pytest.approx(best.objective, abs=1e-6)


def test_the_kl_to_the_optimum_times_the_coefficient_is_what_is_missing():
    env = vector_tree()
    callback = ExactGapCallback()
    tabular(REINFORCE, env).learn(1, callback)
    missing = solve(from_token_tree(env)).objective - callback.latest["J"]
    assert TREE["kl_coef"] * callback.latest["kl_to_optimum"] == pytest.approx(missing, rel=1e-5)


def test_the_gap_is_logged_every_few_rollouts_and_once_more_at_the_end():
    env = vector_tree()
    callback = ExactGapCallback(every=2)
    agent = tabular(REINFORCE, env, n_episodes=8)
    rows = []
    agent.learn(1, callback)
    rows.append(agent.latest)
    assert {"exact/gap", "exact/kl_to_optimum", "exact/J"} <= set(rows[0])
    agent.learn(100, callback)
    steps = [step for step, _ in callback.history]
    assert steps[-1] == agent.num_timesteps
    assert 2 < len(steps) < 12


def test_a_coefficient_that_changes_changes_the_optimum():
    env = vector_tree()
    callback = ExactGapCallback()
    tabular(REINFORCE, env, learning_rate=0.0).learn(1, callback)
    before = callback.latest
    env.unwrapped.kl_coef = 2.0
    assert callback.measure()["J"] < before["J"]


@pytest.mark.parametrize("env", ["CartPole-v1", "ToyBandit-v0"])
def test_environments_without_tokens_are_refused_by_name(env):
    with pytest.raises(ValueError, match="TokenTree-v0"):
        REINFORCE("auto", env).learn(1, ExactGapCallback())


def test_a_language_too_large_is_refused_with_its_size():
    with pytest.raises(ValueError, match="39,062 prefixes"):
        env = gym.make_vec("TokenTree-v0", num_envs=2, vocab_size=6, horizon=7)
        REINFORCE("auto", env).learn(1, ExactGapCallback(max_rows=10_000))


# -- without being asked ----------------------------------------------------------------------------------------


def test_only_languages_of_few_responses_are_measured_without_being_asked():
    def responses(env):
        mdp = from_token_tree(env) if "Tree" in str(env) else from_text_env(env)
        return sequence_distribution(mdp, mdp.ref_log_probs)[0].size

    small, text = gym.make("TokenTree-v0"), tiny_text(num_envs=3)
    assert responses(small) == 682 and responses(text) == 2 * (1 + 3 * 4)
    edge = {"vocab_size": 10, "horizon": 3, "num_prompts": 2, "eos": False}
    assert responses(gym.make("TokenTree-v0", **edge)) == CHEAP_RESPONSES
    for env in (small, text, gym.make_vec("TokenTree-v0", num_envs=2, **edge)):
        assert isinstance(cheap_gap_callback(env), ExactGapCallback)
    for env in ("CartPole-v1", "ToyBandit-v0", "GridWorld-v0"):
        assert cheap_gap_callback(gym.make(env)) is None
    assert cheap_gap_callback(gym.make("TokenTree-v0", **(edge | {"num_prompts": 3}))) is None
    assert cheap_gap_callback(make_env(max_new_tokens=6)) is None
    assert cheap_gap_callback(gym.make("TextRLHF-v0")) is None  # more responses than an int64 counts


def columns(run) -> dict[str, list[float]]:
    return {name: values for name, values in read_progress(run).items() if name.startswith("exact/")}


def test_the_command_line_logs_the_gap_of_a_token_tree(tmp_path):
    steps = ["--total-timesteps", "1536", "--n-steps", "64", "--n-envs", "8", "--no-progress"]
    assert main(["train", "--env", "TokenTree-v0", *steps, "--run-dir", str(tmp_path / "run")]) == 0
    logged = columns(tmp_path / "run")
    assert set(logged) == {"exact/gap", "exact/kl_to_optimum", "exact/J"}
    assert all(len(values) == 3 and np.isfinite(values).all() for values in logged.values())
    assert logged["exact/kl_to_optimum"][-1] < logged["exact/kl_to_optimum"][0]


def test_a_run_on_a_tiny_language_logs_its_gap_and_one_on_a_large_language_does_not(tmp_path):
    for name, env in (("tiny", tiny_text()), ("large", make_env(max_new_tokens=6))):
        folder, agent = tmp_path / name, GRPO("auto", env, n_episodes=16, seed=0)
        folder.mkdir()
        config = new_config(agent="grpo", env="TextRLHF-v0", total_timesteps=100, seed=0)
        train(agent, folder, config)
        assert bool(columns(folder)) == (name == "tiny")
    assert columns(tmp_path / "tiny")["exact/gap"][0] == pytest.approx(1, abs=1e-4)


# -- reaching the optimum ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAIN)
def test_an_agent_comes_within_two_per_cent_of_the_optimum(name):
    gap = learn_tree(name, 0.5, seed=0, steps=80_000, vocab_size=3, horizon=3)
    assert 0 <= gap < 0.02


def test_a_transformer_comes_closer_to_its_optimum():
    callback = ExactGapCallback()
    agent = PPO("auto", tiny_text(), n_episodes=64, batch_size=None, n_epochs=4, learning_rate=0.01, seed=0)
    agent.learn(4_000, callback)
    assert callback.history[0][1]["gap"] == pytest.approx(1, abs=1e-4)
    assert callback.latest["gap"] < 0.3
