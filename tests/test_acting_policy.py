"""Whoever acts, the KL that is charged is that of who acts; what cannot be told is put right or refused."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import textrl_env
from agents import PPO, REINFORCE
from agents.rollouts.vector_envs import make_envs
from tests.tiny import make_env
from textrl_env.acting_policy import VectorActingPolicy
from textrl_env.core import parse_autoreset_mode

ROOT = Path(__file__).parents[1]
TREE = "TokenTree-v0"
KWARGS = {"kl_coef": 0.5, "horizon": 3}


def log_prob(observations, actions):
    """A policy that is not uniform, and that looks at what it sees."""
    return -0.3 * (1 + np.asarray(actions)) - 0.01 * np.asarray(observations["attention_mask"]).sum(-1)


def tree():
    return gym.make(TREE, **KWARGS)


def play(envs, steps=7):
    """Rewards, KLs and sums of a few fixed actions, by slot."""
    seen = []
    envs.reset(seed=3)
    for t in range(steps):
        _, rewards, terminated, _, infos = envs.step(np.array([1 + t % 3, t % 4]))
        ends = infos.get("final_info", infos)
        sums = np.where(terminated, ends.get("kl_sum", np.zeros(2)), 0.0)
        running, ended = (each.get("kl", np.zeros(2)) for each in (infos, ends))
        kl = np.where(terminated, ended, running)
        seen.append((rewards, terminated, sums, kl))
    envs.close()
    return [np.array(column, dtype=np.float64) for column in zip(*seen, strict=True)]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_the_wrapper_charges_alike_in_native_sync_and_async_vector_envs(mode):
    native = gym.make_vec(TREE, num_envs=2, autoreset_mode=mode, **KWARGS)
    native.unwrapped.bind_policy(log_prob)
    expected = play(native)
    makers = [tree, tree]
    for envs in (
        gym.make_vec(TREE, num_envs=2, autoreset_mode=mode, **KWARGS),
        SyncVectorEnv(makers, autoreset_mode=mode),
        AsyncVectorEnv(makers, autoreset_mode=mode, context="fork"),
    ):
        got = play(textrl_env.ActingPolicy(envs, log_prob))
        for theirs, ours in zip(expected, got, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9), envs
    assert (expected[0] != 0).any() and (expected[2] != 0).any()


def test_the_wrapper_asks_with_what_the_agent_saw_through_all_wrappers():
    seen = []

    def acting(observation, action):
        seen.append(np.array(observation))
        return -1.0

    env = gym.wrappers.FlattenObservation(tree())
    env = textrl_env.ActingPolicy(env, acting)
    first, _ = env.reset(seed=0)
    second, reward, *_, info = env.step(1)
    env.step(1)
    assert np.array_equal(seen[0], first) and np.array_equal(seen[1], second)
    assert info["kl"] == pytest.approx(-1.0 - info["ref_logprob"])
    assert reward == pytest.approx(-0.5 * info["kl"])


def test_a_policy_equal_to_the_reference_pays_nothing_unlike_one_that_nobody_told_of():
    env = textrl_env.ActingPolicy(make_env(2), None)
    with pytest.warns(UserWarning, match="bind_policy"):
        env.reset(seed=0)
        env.step(np.array([3, 4]))
    lm = env.unwrapped.lm
    agent = REINFORCE("auto", env, n_episodes=2, policy_kwargs={"model": lm}, seed=0).learn(1)
    assert agent.latest["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_an_env_without_a_kl_is_refused():
    for env in (gym.make("CartPole-v1"), gym.make_vec("LineWorld-v0", num_envs=2)):
        with pytest.raises(TypeError, match="charges none"):
            textrl_env.ActingPolicy(env, log_prob)


def test_one_log_probability_for_each_slot_is_asked_for():
    envs = textrl_env.ActingPolicy(gym.make_vec(TREE, num_envs=2), lambda observations, actions: -1.0)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"returned shape \(\), expected \(2,\)"):
        envs.step(np.array([1, 1]))


def test_an_agent_refuses_envs_in_other_processes_unless_their_kl_can_be_put_right():
    makers = [tree, tree]
    envs = AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP, context="fork")
    try:
        with pytest.raises(ValueError, match="worker processes"):
            PPO("MlpPolicy", envs, n_steps=4, seed=0)
        agent = PPO("MlpPolicy", textrl_env.ActingPolicy(envs), n_steps=6, batch_size=6, seed=0)
        asynchronous = agent.learn(12)
    finally:
        envs.close()
    sync = PPO(
        "MlpPolicy",
        SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP),
        n_steps=6,
        batch_size=6,
        seed=0,
    )
    sync.learn(12)
    for name in ("objective/kl", "objective/rlhf_reward", "rollout/ep_rew_mean", "objective/scores"):
        assert asynchronous.latest[name] == pytest.approx(sync.latest[name], abs=1e-6), name
    assert isinstance(asynchronous.envs, VectorActingPolicy) and asynchronous.kl_coef == 0.5


@pytest.mark.parametrize("name", ["same-step", "SAME_STEP", "SameStep", AutoresetMode.SAME_STEP])
def test_an_autoreset_mode_is_a_keyword_of_make_vec_in_any_spelling(name):
    envs = gym.make_vec(TREE, num_envs=2, autoreset_mode=name)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert parse_autoreset_mode("next-step") is AutoresetMode.NEXT_STEP
    assert parse_autoreset_mode("disabled") is AutoresetMode.DISABLED
    with pytest.raises(ValueError, match="expected one of"):
        gym.make_vec(TREE, num_envs=2, autoreset_mode="never")


def test_an_id_whose_vector_env_is_another_game_is_trained_on_as_gym_make_makes_it():
    class Two(gym.vector.VectorEnv):
        def __init__(self, num_envs=1, **kwargs):
            self.num_envs = num_envs
            self.single_observation_space = gym.spaces.Box(0, 255, (8,), np.uint8)
            self.single_action_space = gym.spaces.Discrete(2)
            self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}

        def close(self, **kwargs):
            pass

    gym.register("TwoGames-v0", "gymnasium.envs.classic_control:CartPoleEnv", vector_entry_point=Two)
    try:
        envs = make_envs("TwoGames-v0", 2)
        assert envs.single_observation_space == gym.make("CartPole-v1").observation_space
    finally:
        gym.registry.pop("TwoGames-v0")


def test_numeric_infos_are_the_same_numbers_in_every_step_of_a_single_env():
    env, plain = textrl_env.NumericInfo(tree()), tree()
    shapes = set()
    for each in range(2):
        _, info = env.reset(seed=each)
        _, said = plain.reset(seed=each)
        done = False
        while not done:
            assert info == {"ref_logprob": 0.0, "kl": 0.0, "score": 0.0, "kl_sum": 0.0} | said_numbers(
                info, said
            )
            shapes.add(tuple((name, type(value)) for name, value in info.items()))
            prompt = said["prompt_id"]
            _, _, done, _, info = env.step(1)
            _, _, _, _, said = plain.step(1)
            said |= {"prompt_id": prompt}
        assert info["score"] == said["score"] and info["response_length"] == said["response_length"] == 3
    assert len(shapes) == 1


def said_numbers(info, said):
    return {name: said.get(name, 0) for name in info}


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_numeric_infos_are_the_same_numbers_in_every_step_of_a_vector_env(mode):
    def make():
        return gym.make_vec(TREE, num_envs=3, autoreset_mode=mode, **KWARGS)

    numeric, plain = textrl_env.NumericInfo(make()), make()
    _, infos = numeric.reset(seed=0)
    _, said = plain.reset(seed=0)
    names, prompts = set(infos), said["prompt_id"]
    assert "response" not in names and not any(array.dtype == object for array in infos.values())
    for t in range(12):
        actions = np.array([t % 4, 1, (t + 1) % 3])
        _, _, terminated, _, infos = numeric.step(actions)
        _, _, _, _, said = plain.step(actions)
        assert set(infos) - {"final_obs", "_final_obs"} == names
        assert np.array_equal(infos["prompt_id"], prompts) or mode is AutoresetMode.NEXT_STEP
        prompts = np.where(said.get("_prompt_id", np.zeros(3, bool)), said.get("prompt_id", 0), prompts)
        ends = said.get("final_info", said)
        assert np.array_equal(infos["_score"], terminated)
        assert np.array_equal(infos["score"][terminated], np.asarray(ends.get("score", prompts))[terminated])
        going = np.asarray(said.get("_kl", np.zeros(3, bool))) & ~terminated
        assert np.array_equal(infos["kl"][going], np.asarray(said.get("kl", prompts))[going])


def test_the_loop_in_the_manner_of_cleanrl_is_charged_for_what_it_writes_down():
    script = ROOT / "examples" / "other_agents" / "cleanrl_ppo.py"
    command = [sys.executable, str(script), "--steps", "1024"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout.splitlines()[-1])
    # Two rollouts of 32 steps in 16 slots, less the steps that only reset a slot.
    assert line["largest_difference"] < 1e-6 and 700 < line["steps_compared"] < 1024
    shown = load_script("other_agents").table([line]).splitlines()[-1]
    assert shown.startswith("| textrl-env ") and f"in {line['steps_compared']} steps" in shown


def load_script(name):
    """A script of ``benchmarks``, as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
