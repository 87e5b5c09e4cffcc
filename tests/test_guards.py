"""Claims about guards: each trips on a run that goes its way wrong, and is silent on one that does not."""

from __future__ import annotations

import csv

import numpy as np

from agents import GRPO, PPO, Guards
from agents.callbacks.guards import Reading
from agents.cli import main
from tests.tiny import count_a, make_env, make_lm, make_model, make_tokenizer

HEALTHY = {"learning_rate": 1e-3, "n_episodes": 16, "group_size": 4, "seed": 0}


def trained(steps=600, env=None, cls=GRPO, guards=None, **settings):
    """The guards that tripped in a run, by name, and their lines."""
    lines = []
    guards = Guards(emit=lines.append) if guards is None else guards
    agent = cls("auto", make_env(1) if env is None else env, **(HEALTHY | settings))
    agent.learn(steps, guards)
    assert lines == [line for _, line in guards.messages]
    return {line.split()[1]: line for line in lines}


def graded(prompts, completions):
    """A reward that no answer of a group shares with another for long."""
    return [float(np.mean([ord(c) for c in text] or [0])) / 50 for text in completions]


def test_a_healthy_run_trips_no_guard():
    env = make_env(1, max_new_tokens=40, reward=graded, kl_coef=0.1)
    assert trained(env=env, steps=1_500) == {}


def test_a_learning_rate_far_too_large_is_said_after_its_first_update():
    steps = {"steps": 200, "lr_scheduler_type": "constant"}
    tripped = trained(env=make_env(1, reward=graded), learning_rate=0.5, **steps)
    assert "nats of KL in a response after 1 update: the steps are too large" in tripped["early_kl"]
    assert "--learning-rate (now 0.5)" in tripped["early_kl"]
    assert "early_kl" not in trained(env=make_env(1, reward=graded), learning_rate=1e-3, **steps)


def test_a_late_kl_is_no_early_one():
    guards = Guards(max_early_kl=5.0, early_updates=5)
    for rollouts, kl, expected in (
        (1, 9.0, False),
        (2, 9.0, True),
        (6, 9.0, True),
        (7, 9.0, False),
        (2, 4.0, False),
    ):
        guards._rollouts, guards.model = rollouts, GRPO("auto", make_env(1), **HEALTHY)
        assert (guards._early_kl(Reading(kl=kl)) is not None) is expected, (rollouts, kl)


def test_answers_that_the_budget_cuts_off_are_said_with_the_budget():
    tripped = trained(steps=60, env=make_env(1, max_new_tokens=1))
    assert "of the answers are cut off by the budget" in tripped["cut_off"]
    assert "--max-new-tokens (now 1)" in tripped["cut_off"] and "--missing-eos-penalty" in tripped["cut_off"]
    assert "cut_off" not in trained(steps=60, env=make_env(1, max_new_tokens=40))


def test_an_entropy_that_is_gone_is_said():
    env = make_env(1, max_new_tokens=6, kl_coef=0.0, reward=count_a)
    tripped = trained(steps=1_500, env=env, learning_rate=0.03)
    assert "answers hardly differ" in tripped["entropy"] and "--ent-coef" in tripped["entropy"]
    assert "entropy" not in trained(steps=600, env=make_env(1, kl_coef=1.0), learning_rate=1e-3)


def test_groups_that_score_alike_are_said_after_three_rollouts_of_them():
    flat = make_env(1, reward=lambda prompts, completions: [0.5] * len(prompts), max_new_tokens=40)
    tripped = trained(steps=700, env=flat)
    assert "in 100% of the groups all answers score alike" in tripped["equal_groups"]
    assert "--group-size (now 4)" in tripped["equal_groups"]
    assert "equal_groups" not in trained(steps=700, env=make_env(1, reward=graded, max_new_tokens=40))


def test_a_reward_that_likes_gibberish_is_said():
    env = make_env(1, max_new_tokens=20, kl_coef=0.0, reward=count_a)
    tripped = trained(steps=1_500, env=env, learning_rate=0.02)
    assert "the score rose from" in tripped["gibberish"] and "--kl-coef (now 0)" in tripped["gibberish"]
    held = make_env(1, max_new_tokens=20, kl_coef=2.0, reward=count_a)
    assert "gibberish" not in trained(steps=1_500, env=held, learning_rate=1e-3)


def test_a_score_that_falls_while_the_policy_runs_away_is_another_trouble():
    guards = Guards()
    guards.model = GRPO("auto", make_env(1), **HEALTHY)
    guards._rollouts = 9
    guards._first = [Reading(score=1.0, kl=0.0, length=10.0, distinct_2=0.8)]
    guards._last.append(Reading(score=0.5, kl=50.0, length=10.0, distinct_2=0.8))
    assert guards._gibberish(guards._last[-1]) is None
    guards._last[-1] = Reading(score=1.5, kl=50.0, length=10.0, distinct_2=0.8)
    assert "50.0 nats from the reference (5.00 a token)" in guards._gibberish(guards._last[-1])
    guards._last[-1] = Reading(score=1.5, kl=0.1, length=10.0, distinct_2=0.1)
    assert "distinct-2 of the answers has fallen from 0.80 to 0.10" in guards._gibberish(guards._last[-1])


class Backwards(GRPO):
    """Learns the worst of each group."""

    def advantages(self, rollout):
        return -super().advantages(rollout)


def test_a_score_that_falls_is_said():
    env = make_env(1, max_new_tokens=20, reward=count_a)
    tripped = trained(steps=2_500, env=env, cls=Backwards, learning_rate=3e-3)
    assert (
        "the score has fallen from" in tripped["score_falls"]
        and "--n-epochs (now 1)" in tripped["score_falls"]
    )
    assert "score_falls" not in trained(steps=2_500, env=env, learning_rate=3e-3)


def test_a_kl_in_the_loss_that_outweighs_everything_is_said():
    env = make_env(1, max_new_tokens=20, reward=count_a, kl_coef=0.01)
    tripped = trained(steps=600, env=env, learning_rate=0.1, n_epochs=4, kl_in="loss")
    assert "nats a token in the last update" in tripped["kl_loss"] and "--kl-in reward" in tripped["kl_loss"]
    assert "kl_loss" not in trained(steps=600, env=env, learning_rate=1e-3, kl_in="loss")


def test_answers_of_one_word_have_no_pairs_that_could_be_too_few():
    env = make_env(1, max_new_tokens=2, reward=count_a)  # the end takes a token
    agent, readings = GRPO("auto", env, **HEALTHY), []
    guards = Guards(emit=lambda line: None)
    look = guards._gibberish
    guards._gibberish = lambda reading: readings.append(reading) or look(reading)
    agent.learn(200, guards)
    assert all(np.isnan(reading.distinct_2) for reading in readings) and len(readings) > 4
    assert not any("distinct-2" in line for _, line in guards.messages)


def test_a_guard_speaks_once_until_it_has_been_quiet():
    guards, lines = Guards(), []
    guards.emit = lines.append
    agent = GRPO("auto", make_env(1, max_new_tokens=1), **HEALTHY)
    agent.learn(200, guards)
    assert sum("cut_off" in line for line in lines) == 1
    agent.text_env.dynamics.max_new_tokens = 1
    guards._tripped.clear()
    agent.learn(20, guards, reset_num_timesteps=False)
    assert sum("cut_off" in line for line in lines) == 2


def test_guards_leave_the_run_as_it_was():
    def weights(*callbacks):
        agent = PPO("auto", make_env(1), learning_rate=1e-2, n_episodes=8, seed=0)
        agent.learn(200, list(callbacks))
        return agent.policy.model.get_output_embeddings().weight.detach().clone()

    assert (weights() == weights(Guards(emit=lambda line: None))).all()


def test_networks_have_no_guards():
    guards = Guards()
    PPO("MlpPolicy", "ToyBandit-v0", n_steps=32, seed=0).learn(64, guards)
    assert guards.messages == []


def test_the_command_line_prints_and_logs_them_and_can_do_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model("llama").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    (tmp_path / "prompts.txt").write_text("a\nb c\n")
    (tmp_path / "guard_reward.py").write_text(
        "def r(prompts, completions): return [float(len(c)) for c in completions]\n"
    )
    line = ["train", "--no-progress", "--agent", "grpo", "--model", "model", "--reward", "guard_reward.py:r"]
    line += [
        "--prompts",
        "prompts.txt",
        "--max-new-tokens",
        "1",
        "--n-episodes",
        "8",
        "--total-timesteps",
        "24",
    ]
    assert main([*line, "--run-dir", "run"]) == 0
    assert capsys.readouterr().err.count("guard cut_off at 8 tokens:") == 1
    rows = list(csv.DictReader((tmp_path / "run" / "progress.csv").open()))
    assert [float(row["guard/cut_off"]) for row in rows] == [1.0] * 3
    assert [float(row["guard/early_kl"]) for row in rows] == [0.0] * 3
    assert main([*line, "--run-dir", "quiet", "--no-guards"]) == 0
    assert "guard" not in capsys.readouterr().err


def test_a_resumed_run_is_compared_with_its_own_start(tmp_path):
    env = make_env(16, lm=make_lm(), reward=graded)
    agent, guards = GRPO("auto", env, **HEALTHY), Guards(emit=list)
    agent.learn(400, [guards])
    agent.save(tmp_path / "half")
    again, later = GRPO.load(tmp_path / "half", env=env), Guards(emit=list)
    again.learn(100, [later], reset_num_timesteps=False)
    assert guards._first and later._first == guards._first and later._rollouts > guards._rollouts
    later._last.extend([Reading(entropy=0.001 * guards._first[0].entropy)] * 3)
    assert "0% of what it was" in later._entropy(later._last[-1])
