"""Answers to which no reward applies (each returned None): nothing is learned from them, as in TRL."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from agents import DAPO, GRPO, PPO, REINFORCE, RLOO
from agents.preferences.collection import collect_preferences
from agents.rollouts.rollout import concatenate
from tests.tiny import PROMPTS, make_env, make_lm

AGENTS = {"GRPO": GRPO, "RLOO": RLOO, "DAPO": DAPO, "PPO": PPO, "REINFORCE": REINFORCE}


def picky(prompts, completions):
    """How many "a" an answer holds; it does not apply to answers that end with one of three letters."""
    return [
        None if c.split()[-1:] in (["b"], ["c"], ["d"]) else float(c.split().count("a")) for c in completions
    ]


def never(prompts, completions):
    return [None] * len(prompts)


def make(name: str, reward, num_envs: int | None = None, **settings):
    env = make_env(num_envs, reward=reward, kl_coef=0.1, max_new_tokens=5)
    groups = {"group_size": 4} if name in ("GRPO", "RLOO", "DAPO") else {}
    groups |= {"max_resamples": 0} if name == "DAPO" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AGENTS[name](
            "CausalLMPolicy", env, n_episodes=16, seed=1, learning_rate=1e-2, **groups | settings
        )


def ready(*args, **settings):
    """An agent that can be asked to collect."""
    return make(*args, **settings).learn(1)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.mark.parametrize("num_envs", [None, 3])
def test_both_ways_tell_which_answers_have_no_score(num_envs):
    agent = ready("REINFORCE", picky, num_envs)
    if num_envs is not None:
        agent.text_env = None  # stepped
    rollout = agent.collect()
    paid = rollout.rewards + rollout.penalties
    assert rollout.scored.shape == rollout.mask.shape
    scored = rollout.scored.any(1)
    assert 0 < int(scored.sum()) < len(rollout)
    assert torch.equal(rollout.scored, rollout.mask & scored[:, None])
    for row, has_score in zip(paid, scored, strict=True):
        assert has_score or row.abs().max() < 1e-6, (
            "the step that ends such an answer pays the KL and nothing else"
        )


@pytest.mark.parametrize("name", ["PPO", "REINFORCE"])
def test_agents_without_groups_learn_from_the_others_alone(name, monkeypatch):
    agent = ready(name, picky)
    rollout = agent.collect()
    scored = rollout.scored.any(1)
    seen = []

    def note(learned_from):
        seen.append(learned_from)
        agent.num_timesteps = agent.total_timesteps

    monkeypatch.setattr(agent, "train", note)
    monkeypatch.setattr(agent, "collect", lambda: rollout)
    agent.learn(1)
    (learned_from,) = seen
    assert 0 < len(learned_from) < len(rollout)
    assert torch.equal(learned_from.rewards, rollout.rewards[scored])


@pytest.mark.parametrize("name", ["GRPO", "RLOO", "DAPO"])
def test_a_group_is_measured_by_its_answers_that_have_a_score(name):
    agent = ready(name, picky)
    rollout = agent.collect()
    scored = rollout.scored.any(1)
    advantages = agent.advantages(rollout)
    assert (advantages[~scored] == 0).all()
    scores = agent.episode_scores(rollout).numpy()
    for k in range(0, len(rollout), 4):
        rows = np.arange(k, k + 4)[scored[k : k + 4].numpy()]
        values = scores[rows]
        if len(rows) < 2 or np.ptp(values) < 1e-6:
            continue
        wanted = values - values.mean()
        if name == "RLOO":
            wanted = wanted * len(rows) / (len(rows) - 1)
        elif not agent.equal_groups(rollout)[k // 4]:
            wanted = wanted / (values.std(ddof=1) + 1e-4)
        assert advantages[rows, 0].numpy() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", AGENTS)
def test_a_rollout_without_any_score_teaches_nothing_and_stops_nothing(name):
    agent = make(name, never)
    before = {n: p.detach().clone() for n, p in agent.policy.named_parameters()}
    agent.learn(60)
    assert all(torch.equal(p, before[n]) for n, p in agent.policy.named_parameters())
    assert np.isnan(agent.latest["objective/scores"]) and agent.latest["objective/unscored"] == 1.0


def test_the_log_s_mean_leaves_them_out():
    agent = make("GRPO", picky)
    agent.learn(1)
    texts = agent.latest
    assert 0 < texts["objective/unscored"] < 1
    rollout = agent.collect()
    scored = rollout.scored.any(1)
    agent.dump_logs(1, rollout)
    scores = agent.scores_before_kl(rollout)[scored]
    assert agent.latest["objective/scores"] == pytest.approx(scores.mean().item())


def test_rollouts_with_and_without_such_answers_join():
    some = ready("REINFORCE", picky).collect()
    all_of_it = ready("REINFORCE", lambda p, c: [1.0] * len(p)).collect()
    joined = concatenate([all_of_it, some])
    assert torch.equal(joined.scored.any(1), torch.cat([torch.ones(16, dtype=bool), some.scored.any(1)]))


def test_an_answer_that_the_judge_has_no_opinion_of_is_compared_with_none():
    found = collect_preferences(
        make_lm(), PROMPTS, picky, answers_per_prompt=6, max_new_tokens=4, device="cpu"
    )
    texts = [record[side] for record in found.records for side in ("chosen", "rejected")]
    assert texts and None not in picky([""] * len(texts), texts)
