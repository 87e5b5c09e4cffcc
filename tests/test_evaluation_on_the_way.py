"""Claims about evaluation on the way: points compare, learning does not notice, the best stays beside the last."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import PPO
from agents.callbacks.evaluation import EvalCallback
from agents.callbacks.kl_control import StopAtKL
from agents.evaluation.evaluation import evaluate_policy, evaluation_env
from agents.evaluation.records import read_ends, read_evaluations, write_evaluation
from agents.evaluation.verdict import compare
from agents.runs import run_directory as runs
from agents.runs.best import best_score, best_timesteps
from agents.runs.checkpoint import read_document
from agents.runs.logs import read_progress
from reward_models import Ensemble, RunningNormalizer
from tests.tiny import PROMPTS, count_a, make_env, make_lm
from textrl_env import embedded


def likes_short(prompts, completions, **columns):
    return [-float(len(completion.split())) for completion in completions]


def make_agent(reward=count_a, **given):
    env = make_env(reward=reward, prompts=PROMPTS, max_new_tokens=4, **{"gold": likes_short} | given)
    return PPO("auto", env, seed=3, n_episodes=8, batch_size=8, n_epochs=1, learning_rate=0.02)


class Watch(BaseCallback):
    """Counts how often it is called."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def _on_step(self):
        self.calls += 1
        return True


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def test_weights_are_bitwise_those_of_a_run_without_evaluations(tmp_path):
    def reward():  # its running mean changes with whatever it scores
        return Ensemble([RunningNormalizer(count_a), likes_short])

    plain, watched = make_agent(reward()), make_agent(reward())
    plain.learn(70)
    watched.learn(70, EvalCallback(eval_freq=30, n_eval_episodes=8, log_path=tmp_path, max_share=100))
    assert len(read_evaluations(tmp_path)) > 2
    assert torch.equal(weights(plain), weights(watched))
    assert torch.equal(plain.policy.generator.get_state(), watched.policy.generator.get_state())


def test_every_point_has_the_same_prompts_and_as_many_answers(tmp_path):
    agent = make_agent()
    evaluation = EvalCallback(eval_freq=40, n_eval_episodes=8, log_path=tmp_path, max_share=100)
    agent.learn(80, evaluation)
    found = read_evaluations(tmp_path)
    assert [each.timesteps for each in found] == evaluation.evaluations_timesteps
    assert found[0].timesteps == 0 and found[-1].timesteps == agent.num_timesteps
    for each in found:
        assert each.sampled.prompts == PROMPTS and each.sampled.score.shape == (4, 2)
        assert each.greedy.score.shape == (4, 1)
    # Before anything is learned the policy is the reference, and the same random numbers give the same answers.
    again = EvalCallback(eval_freq=10_000, n_eval_episodes=8, log_path=tmp_path / "again")
    make_agent().learn(1, again)
    assert read_evaluations(tmp_path / "again")[0].sampled.responses == found[0].sampled.responses
    assert abs(found[0].sampled.kl).max() < 1e-4


def test_what_is_written_is_what_is_read(tmp_path):
    agent = make_agent()
    evaluation = EvalCallback(eval_freq=1000, n_eval_episodes=8)
    agent.learn(1, evaluation)
    write_evaluation(tmp_path, evaluation.ends["final"], "final")
    read = read_ends(tmp_path)["final"]
    for name in ("score", "gold", "kl", "length", "ended"):
        np.testing.assert_array_equal(
            getattr(read.sampled, name), getattr(evaluation.ends["final"].sampled, name)
        )
    assert read.sampled.responses == evaluation.ends["final"].sampled.responses
    assert read.means() == evaluation.ends["final"].means()


def test_the_log_names_what_was_measured_of_the_policy_after_that_update(tmp_path):
    config = run_config(tmp_path, eval_every=600)
    agent, run = runs.make_agent(config), tmp_path / "run"
    runs.train(agent, run, config)
    log = read_progress(run)
    at = {each.timesteps: each for each in read_evaluations(run)}
    steps = np.array(log["time/total_timesteps"])
    measured = np.isfinite(log["eval/scores"])
    assert set(steps[measured].astype(int)) == set(at) - {0} and 0 not in steps and len(at) > 3
    for row in np.flatnonzero(measured):
        sampled = at[int(steps[row])].sampled
        assert log["eval/scores"][row] == pytest.approx(sampled.score.mean())
        assert log["eval/gold_scores"][row] == pytest.approx(sampled.gold.mean())
        assert log["eval/kl"][row] == pytest.approx(sampled.kl.mean(), abs=1e-6)
        assert log["eval/eos_rate"][row] == sampled.ended.mean()
        assert 0 <= log["eval/win_rate"][row] <= 1 and 1 <= log["eval/distinct_of_10"][row] <= 10


def run_config(folder, **given):
    """A run in the embedded world, as short as it can be, evaluated on a few prompts."""
    lines = embedded.path("prompts_heldout").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[::32]))
    if "eval_every" in given:
        given |= {"eval_prompts": str(folder / "few.jsonl"), "eval_episodes": 8}
    settings = {"agent_kwargs": {"n_episodes": 64, "n_epochs": 1, "learning_rate": 1e-3}, "save_every": 1200}
    return runs.new_config(
        **{"agent": "ppo", "env": "TextRLHF-v0", "total_timesteps": 2400, "seed": 0} | settings | given
    )


def test_answers_that_pass_or_fail_have_the_share_of_prompts_with_one_that_passes():
    def ends_in_a(prompts, completions, **columns):
        return [float(completion.endswith("a")) for completion in completions]

    agent, evaluation = make_agent(gold=ends_in_a), EvalCallback(n_eval_episodes=16)
    agent.learn(1, evaluation)
    passed = evaluation.latest.sampled.gold > 0
    assert passed.shape == (4, 4)
    assert agent.latest["eval/pass_at_k"] == pytest.approx(passed.any(1).mean())
    other = make_agent()
    other.learn(1, EvalCallback(n_eval_episodes=16))
    assert "eval/pass_at_k" not in other.latest, "lengths do not pass or fail"


def test_best_is_the_highest_gold_and_is_called_for_once_each_time_it_is_beaten(tmp_path):
    agent, watch = make_agent(), Watch()
    evaluation = EvalCallback(
        callback_on_new_best=watch,
        eval_freq=30,
        n_eval_episodes=12,
        log_path=tmp_path,
        best_model_save_path=tmp_path / "best",
        max_share=100,
    )
    agent.learn(150, evaluation)
    later = [each for each in read_evaluations(tmp_path) if each.timesteps]
    golds = [each.sampled.gold.mean() for each in later]
    records = sum(gold > max(golds[:i], default=-np.inf) for i, gold in enumerate(golds))
    assert watch.calls == records
    assert best_score(tmp_path / "best") == max(golds) == evaluation.best_mean_reward
    assert best_timesteps(tmp_path / "best") == later[int(np.argmax(golds))].timesteps


def test_without_a_gold_judge_best_is_the_highest_score_within_the_budget_and_none_without_one(tmp_path):
    agent = make_agent(gold=None)
    free = EvalCallback(n_eval_episodes=4, best_model_save_path=tmp_path / "free")
    agent.learn(1, free)
    assert not (tmp_path / "free").exists()
    settings = {"n_eval_episodes": 12, "eval_freq": 20, "max_share": 100}
    make_agent(gold=None).learn(140, EvalCallback(log_path=tmp_path, **settings))
    later = [each.sampled for each in read_evaluations(tmp_path) if each.timesteps]
    budget = float(np.median([each.kl.mean() for each in later]))
    within = [each.score.mean() for each in later if each.kl.mean() <= budget]
    assert 0 < len(within) < len(later)
    held = EvalCallback(best_model_save_path=tmp_path / "held", kl_budget=budget, **settings)
    make_agent(gold=None).learn(140, held)
    assert best_score(tmp_path / "held") == max(within)


def test_best_and_last_are_compared_on_answers_that_neither_was_chosen_by(tmp_path):
    agent = make_agent()
    evaluation = EvalCallback(
        n_eval_episodes=8,
        eval_freq=30,
        log_path=tmp_path,
        best_model_save_path=tmp_path / "best",
        max_share=100,
    )
    agent.learn(120, evaluation)
    ends = read_ends(tmp_path)
    assert {"start", "final"} <= set(ends) and ends["final"].timesteps == agent.num_timesteps
    chosen = {each.timesteps: each.sampled.responses for each in read_evaluations(tmp_path)}
    for end in ends.values():
        assert end.sampled.score.shape == (4, 4)
        assert [texts[:2] for texts in end.sampled.responses] != chosen[end.timesteps]
    if "best" in ends:
        assert ends["best"].timesteps == best_timesteps(tmp_path / "best") != agent.num_timesteps


def test_evaluations_cost_no_more_than_their_share_and_what_is_left_out_is_counted(tmp_path):
    agent = make_agent()
    evaluation = EvalCallback(eval_freq=20, n_eval_episodes=80, log_path=tmp_path, max_share=0.5)
    with pytest.warns(UserWarning, match="evaluations? (was|were) skipped"):
        agent.learn(120, evaluation)
    assert evaluation.skipped > 2
    assert [each.timesteps for each in read_evaluations(tmp_path)] == [0, agent.num_timesteps]


def test_a_run_that_was_stopped_and_resumed_ends_like_one_that_was_not(tmp_path):
    config = run_config(tmp_path, eval_every=600)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    agent = runs.make_agent(config)
    runs.train(agent, whole, config)
    runs.prepare_directory(halves)
    runs.write_config(halves, config)
    first = runs.make_agent(config)

    class Stop(BaseCallback):
        def _on_rollout_start(self):
            if self.model.num_timesteps >= 1800:
                raise RuntimeError("pulled the plug")

        def _on_step(self):
            return True

    with pytest.raises(RuntimeError, match="pulled the plug"):
        runs.train(first, halves, config, [Stop()])
    _, checkpoint, _ = runs.newest_whole(halves)
    second = runs.load_agent(config, checkpoint)
    runs.train(second, halves, config)
    assert torch.equal(weights(agent), weights(second))
    for one, other in zip(read_evaluations(whole), read_evaluations(halves), strict=True):
        assert one.timesteps == other.timesteps and one.sampled.responses == other.sampled.responses
    ends = read_ends(whole), read_ends(halves)
    assert ends[0].keys() == ends[1].keys()
    assert all(ends[0][n].sampled.responses == ends[1][n].sampled.responses for n in ends[0])


def test_the_kl_budget_ends_a_run_and_the_run_says_so(tmp_path, capsys):
    config = run_config(tmp_path, kl_budget=1e-6)
    agent = runs.make_agent(config)
    runs.train(agent, tmp_path, config)
    assert agent.num_timesteps < 2400
    assert "beyond the budget of 1e-06" in capsys.readouterr().err
    assert read_document(tmp_path / "final")["stopped_at_kl"] > 1e-6


def test_a_budget_must_be_a_number_of_nats():
    for given in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="finite number > 0"):
            StopAtKL(given)
        with pytest.raises(ValueError, match="finite number > 0"):
            EvalCallback(kl_budget=given)


def test_an_env_without_texts_is_refused_with_the_callback_to_take():
    with pytest.raises(ValueError, match=r"stable_baselines3\.common\.callbacks\.EvalCallback"):
        PPO("auto", "CartPole-v1", n_steps=8, n_envs=1, batch_size=8).learn(8, EvalCallback())


def test_a_scale_that_moves_is_taken_off_before_points_are_compared():
    env, _ = evaluation_env(make_env(reward=RunningNormalizer(count_a), prompts=PROMPTS))
    result = evaluate_policy(make_lm(), env)
    counts = count_a(result.prompts, [texts[0] for texts in result.responses])
    np.testing.assert_array_equal(result.score[:, 0], counts)


def test_prompts_of_the_training_are_not_taken_for_held_out_ones():
    env, held_out = evaluation_env(make_env(prompts=PROMPTS))
    assert not held_out and env.dynamics.prompt_texts == PROMPTS
    env, held_out = evaluation_env(make_env(prompts=PROMPTS), ["a b"])
    assert held_out and env.dynamics.prompt_texts == ["a b"]


def test_without_a_gold_judge_the_reference_answers_for_its_best_of_n(tmp_path):
    settings = {"n_eval_episodes": 4, "eval_freq": 1000}
    agent = make_agent(gold=None)
    plain = make_agent(gold=None)
    plain.learn(20)
    watch = EvalCallback(log_path=tmp_path, **settings)
    agent.learn(20, watch)
    reference = read_ends(tmp_path)["reference"].sampled
    assert reference.score.shape == (len(set(PROMPTS)), 32) and abs(reference.kl).max() < 1e-5
    assert torch.equal(weights(plain), weights(agent)), "learning does not notice"
    judged = EvalCallback(log_path=tmp_path / "judged", **settings)
    make_agent().learn(20, judged)
    assert "reference" not in read_ends(tmp_path / "judged")


def never_long(prompts, completions, **columns):
    """Scores answers of up to two words only."""
    return [float(len(c.split())) if len(c.split()) <= 2 else None for c in completions]


@pytest.mark.filterwarnings("ignore:reward 'never_long' does not apply")
def test_answers_that_no_reward_applied_to_are_left_out_of_an_evaluation_and_counted(tmp_path):
    env = make_env(reward=never_long, prompts=PROMPTS, max_new_tokens=4)
    found = evaluate_policy(env.lm, env, 6, seed=1)
    lengths = np.array([[len(text.split()) for text in texts] for texts in found.responses])
    short = lengths <= 2
    assert 0 < short.sum() < short.size
    assert np.array_equal(np.isnan(found.score), ~short)
    assert found.summary()["score"] == lengths[short].mean() and found.unscored == (~short).sum()
    other = evaluate_policy(env.lm, env, 6, seed=2)
    against = compare(found, other)
    assert against.gold is None and against.win_rate.low <= against.win_rate.mean <= against.win_rate.high
    agent = make_agent(reward=never_long, gold=None)
    watch = EvalCallback(n_eval_episodes=8, eval_freq=20, max_share=100, log_path=tmp_path, kl_budget=100.0)
    agent.learn(60, watch)
    last = read_ends(tmp_path)["final"]
    assert last.means()["unscored"] == np.isnan(last.sampled.score).sum() > 0
    assert np.isfinite(last.means()["scores"]) and np.isfinite(watch.best_mean_reward)
