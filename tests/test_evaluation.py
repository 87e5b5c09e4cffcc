"""Claims about evaluating text policies and about win rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agents import PPO, CausalLMPolicy
from agents.evaluation.evaluation import evaluate_policy, heldout_env, win_rate
from agents.evaluation.plots import plot_learning_curve, smoothed, style_axes
from tests.tiny import PROMPTS, count_a, make_env, make_lm


def count_b(prompts, completions):
    return [float(c.split().count("b")) for c in completions]


def test_a_policy_that_always_wins_has_win_rate_one():
    assert win_rate(np.ones(20), np.zeros(20)) == (1.0, 1.0, 1.0)


def test_ties_count_half():
    assert win_rate([1.0, 0.0, 0.5, 0.5], [0.0, 1.0, 0.5, 0.5])[0] == 0.5
    assert win_rate(np.ones(9), np.ones(9)) == (0.5, 0.5, 0.5)


def test_win_rate_compares_every_pair_of_answers_to_a_prompt():
    assert win_rate([[1.0, 3.0]], [[0.0, 2.0, 4.0]])[0] == pytest.approx(3 / 6)


def test_win_rates_of_the_two_sides_sum_to_one():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, size=(2, 30, 3)).astype(float)
    assert win_rate(a, b)[0] + win_rate(b, a)[0] == pytest.approx(1.0)


def test_interval_covers_the_true_rate_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        wins = rng.random(80) < 0.7
        rate, low, high = win_rate(wins.astype(float), np.full(80, 0.5))
        assert low <= rate <= high
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_copies_of_an_answer_do_not_narrow_the_interval():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 40))
    once, copied = win_rate(a, b), win_rate(np.repeat(a[:, None], 10, 1), b)
    assert copied == pytest.approx(once)


def test_win_rate_refuses_nan_and_other_prompts():
    with pytest.raises(ValueError, match="NaN"):
        win_rate([1.0, np.nan], [0.0, 0.0])
    with pytest.raises(ValueError, match="same P prompts"):
        win_rate(np.ones(3), np.ones(4))


def test_evaluation_gives_one_row_for_each_prompt_with_the_env_s_own_scores():
    env = make_env(gold=count_b)
    result = evaluate_policy(env.lm, env, n_samples=3)
    assert result.prompts == PROMPTS
    assert result.score.shape == result.gold.shape == result.kl.shape == (len(PROMPTS), 3)
    for row, texts in enumerate(result.responses):
        assert result.score[row].tolist() == count_a(None, texts)
        assert result.gold[row].tolist() == count_b(None, texts)


def test_kl_of_the_reference_from_itself_is_zero():
    env = make_env()
    assert np.abs(evaluate_policy(env.lm, env).kl).max() < 1e-4


def test_kl_of_another_model_is_positive_on_average():
    env = make_env()
    assert evaluate_policy(make_lm(seed=1), env, n_samples=50).kl.mean() > 0.1


def test_agent_policy_and_language_model_are_evaluated_alike():
    env = make_env()
    agent = PPO("auto", env, n_episodes=4, seed=0, device="cpu")
    assert isinstance(agent.policy, CausalLMPolicy)
    results = [evaluate_policy(who, env, seed=3) for who in (agent, agent.policy, agent.policy.lm)]
    assert results[0].responses == results[1].responses == results[2].responses


def test_evaluation_leaves_the_env_s_episode_and_every_random_stream_alone():
    env = make_env()
    env.reset(seed=0)
    before, torch_before = env.get_state(), torch.get_rng_state()
    evaluate_policy(make_lm(seed=1), env)
    after = env.get_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert torch.equal(torch_before, torch.get_rng_state())


def test_seeds_repeat_and_prompts_can_be_chosen():
    env = make_env()
    first, again, other = (evaluate_policy(env.lm, env, 5, seed=s, prompt_ids=[2, 0]) for s in (1, 1, 2))
    assert first.prompts == [PROMPTS[2], PROMPTS[0]]
    assert first.responses == again.responses != other.responses


def test_evaluating_something_else_says_what_is_wanted():
    env = make_env()
    with pytest.raises(TypeError, match=r"TextRLHF-v0 or TextGame-v0 env, got object"):
        evaluate_policy(env.lm, object())
    with pytest.raises(TypeError, match="a CausalLM or its folder, got int"):
        evaluate_policy(3, env)


def test_heldout_prompts_are_not_the_training_prompts_and_share_the_env_s_model():
    env = heldout_env(kl_coef=0.3)
    again = heldout_env(env)
    assert again.lm is env.lm and again.kl_coef == 0.3
    trained = make_training_prompts()
    assert not trained & set(env.dynamics.prompt_texts)


def make_training_prompts() -> set[str]:
    from textrl_env import embedded
    from textrl_env.data.prompts import load_prompts

    return set(load_prompts(embedded.path("prompts_train")).texts)


def test_learning_curve_is_written_for_text_and_for_returns(tmp_path):
    steps = [100.0, 200.0, 300.0]
    text = {
        "time/total_timesteps": steps,
        "objective/scores": [0.0, 1.0, 2.0],
        "objective/kl": [0.0, float("nan"), 1],
    }
    assert plot_learning_curve(text, tmp_path / "text.png", "It learns").stat().st_size > 5_000
    returns = {"time/total_timesteps": steps, "rollout/ep_rew_mean": [float("nan"), 1.0, 2.0]}
    assert plot_learning_curve(returns, tmp_path / "returns.png", "It learns").is_file()
    with pytest.raises(ValueError, match="no score and no return"):
        plot_learning_curve({"time/total_timesteps": steps}, tmp_path / "none.png", "Nothing")


def test_numbers_beside_a_curve_that_hardly_moves_are_whole():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1000], [1.0983, 1.0986])
    style_axes(axes)
    figure.canvas.draw()
    assert axes.yaxis.get_offset_text().get_text() == ""
    assert all(float(label.get_text()) > 1 for label in axes.get_yticklabels())


def test_axes_with_names_or_powers_of_ten_keep_them():
    from matplotlib.figure import Figure

    named, powers = Figure().subplots(1, 2)
    named.barh(["before", "after"], [1.0, 2.0])
    powers.plot([0, 1000], [1.0, 1000.0])
    powers.set_yscale("log")
    for axes in (named, powers):
        style_axes(axes)
        axes.figure.canvas.draw()
    assert [label.get_text() for label in named.get_yticklabels()] == ["before", "after"]


def test_smoothing_keeps_constants_and_skips_gaps():
    assert np.allclose(smoothed(np.full(40, 2.0)), 2.0)
    assert np.isfinite(smoothed(np.array([1.0, np.nan, 3.0]))).all()


def test_smoothing_leaves_the_first_and_the_last_point_as_they_were_measured():
    rising = np.linspace(0.0, 1.0, 50) ** 2
    assert smoothed(rising)[0] == 0.0 and smoothed(rising)[-1] == 1.0
    straight = np.arange(50.0)
    assert np.allclose(smoothed(straight), straight), "a straight line stays where it is"


def test_smoothing_is_the_mean_of_each_window_without_its_gaps():
    values = np.random.default_rng(0).standard_normal(70)
    values[[3, 40, 41]] = np.nan
    halves = [min(3, i, 69 - i) for i in range(70)]  # as wide on both sides, so narrower towards the ends
    windows = (values[i - half : i + half + 1] for i, half in enumerate(halves))
    assert np.allclose(smoothed(values), [np.nanmean(w) for w in windows])
    assert np.isnan(smoothed(np.full(5, np.nan))).all() and smoothed(np.array([2.0])) == 2.0


def test_a_reward_that_does_not_apply_to_some_rows_has_the_mean_of_the_others():
    prompts = [{"prompt": "a", "topic": "sums"}, {"prompt": "b c", "topic": "poems"}]

    def sums(prompts, completions, topic):
        return [3.0 if each == "sums" else None for each in topic]

    def poems(prompts, completions):
        return [None] * len(prompts)

    env = make_env(reward=[sums, count_a, poems], prompts=prompts)
    means = evaluate_policy(make_lm(), env, n_samples=2).summary()
    assert means["rewards/sums"] == 3.0
    assert "rewards/poems" not in means  # no mean of nothing, which would be no JSON either
