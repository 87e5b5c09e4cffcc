"""Claims about small worlds in the report: what is kept is what the policy does, and the picture shows it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from agents import PPO
from agents.callbacks.toy_policy import toy_policy
from agents.report import write_report
from agents.report.toys import section
from agents.runs import run_directory as runs
from tests.test_report import text_of
from textrl_env.exact.solver import value_iteration


def make_agent(env, **kwargs):
    return PPO("auto", env, n_steps=16, n_envs=2, batch_size=16, n_epochs=1, seed=0, env_kwargs=kwargs)


@pytest.mark.parametrize(
    ("env", "kind", "states", "actions"),
    [("GridWorld-v0", "grid", 36, 4), ("LineWorld-v0", "line", 7, 3), ("ToyBandit-v0", "bandit", 1, 10)],
)
def test_probabilities_and_values_are_those_of_the_policy_in_every_state(env, kind, states, actions):
    agent = make_agent(env).learn(64)
    found = toy_policy(agent)
    assert found["kind"] == kind and json.loads(json.dumps(found)) == found
    probs = np.array(found["probs"])
    assert probs.shape[1] == actions and np.allclose(probs.sum(1), 1, atol=1e-3)
    greedy, _ = agent.predict(np.arange(len(probs)), deterministic=True)
    assert (probs[np.arange(len(probs)), greedy] >= probs.max(1) - 1e-4).all()
    np.testing.assert_allclose(found["values"], agent.policy.predict_values(np.arange(len(probs))), atol=1e-4)
    optimal = value_iteration(*agent.env.unwrapped.dynamics.transition_model(), gamma=agent.gamma)[0]
    np.testing.assert_allclose(found["optimal_values"], optimal[: len(probs)], atol=1e-4)


def test_a_tree_shows_its_likeliest_responses_against_the_optimum():
    agent = PPO("auto", "TokenTree-v0", n_episodes=16, batch_size=16, n_epochs=1, seed=0).learn(64)
    found = toy_policy(agent)
    rows = found["responses"]
    assert found["kind"] == "tree" and 2 <= len(rows) <= 12
    assert len({row["text"] for row in rows}) == len(rows)
    assert (
        0 < sum(row["policy"] for row in rows) <= 1.001 and 0 < sum(row["optimum"] for row in rows) <= 1.001
    )
    # What the optimum likes more than the reference scores higher than what it likes less: exp(score / kl_coef).
    gains = [np.log(row["optimum"] / row["reference"]) for row in rows if row["optimum"] > 0.001]
    scores = [row["score"] for row in rows if row["optimum"] > 0.001]
    slope = np.subtract.outer(gains, gains) * found["kl_coef"] - np.subtract.outer(scores, scores)
    assert np.abs(slope).max() < 0.02 * max(np.ptp(scores), 1) + 0.02


def test_a_world_that_cannot_be_looked_at_as_a_whole_has_no_picture():
    assert toy_policy(make_agent("CartPole-v1")) is None
    assert section(None) == "" and section({"kind": "of a later version"}) == ""


def test_the_longest_arrow_points_where_the_policy_goes():
    probs = np.full((4, 4), 0.05)
    probs[:, 2] = 0.85
    policy = {
        "kind": "grid",
        "cells": ["S.", ".G"],
        "probs": probs.tolist(),
        "values": [0.25, 0.5, -0.5, 0.0],
    }
    policy |= {"optimal_values": [0.9, 0.95, 0.95, 0.0], "optimal_actions": [2, 1, 2, 0], "gamma": 0.99}
    picture = section(policy)
    arrows = [
        tuple(map(float, found)) for found in re.findall(r"M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)M", picture)
    ]
    longest = max(arrows, key=lambda a: abs(a[2] - a[0]) + abs(a[3] - a[1]))
    assert longest[2] > longest[0] and longest[3] == longest[1], "to the right"
    assert "goal" in picture and "start" in picture and "\N{MINUS SIGN}0.50" in picture


@pytest.mark.parametrize("env", ["GridWorld-v0", "LineWorld-v0", "ToyBandit-v0", "TokenTree-v0"])
def test_a_run_keeps_what_it_learned_and_the_report_draws_it(env, tmp_path):
    given = {"n_episodes": 16} if env == "TokenTree-v0" else {"n_steps": 16}
    config = runs.new_config(
        agent="ppo", env=env, agent_kwargs=given | {"n_epochs": 1}, total_timesteps=64, seed=0
    )
    runs.prepare_directory(tmp_path / "run")
    runs.write_config(tmp_path / "run", config)
    torch.manual_seed(0)
    runs.train(runs.make_agent(config), tmp_path / "run", config)
    page = write_report(tmp_path / "run").page.read_text()
    assert "What was learned" in text_of(page) and "<svg class=toy" in page
    runs.prepare_directory(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "policy.json").exists()
