"""Whoever generated, the policy says what the log-probabilities are; what does not fit the prompts is refused."""

from __future__ import annotations

import numpy as np
import pytest

from agents import GRPO, CausalLMPolicy
from agents.rollouts.episode_log import EpisodeLog
from tests.tiny import make_env, make_lm
from textrl_env.lm import Sequences, generate


class Reports(CausalLMPolicy):
    """Generates as the policy does and reports log-probabilities that are ``shift`` off, as lists."""

    shift = 0.0

    def generate(self, prompts, max_new_tokens, deterministic=False):
        responses, log_probs = super().generate(prompts, max_new_tokens, deterministic)
        return responses, [row + self.shift for row in log_probs]


class AsSequences(Reports):
    """The same, as one batch of sequences."""

    def generate(self, prompts, max_new_tokens, deterministic=False):
        return Sequences.from_responses(prompts, *super().generate(prompts, max_new_tokens, deterministic))


class Rewritten(CausalLMPolicy):
    """What our own decoder has written, with other log-probabilities put beside it."""

    def generate(self, prompts, max_new_tokens, deterministic=False):
        made = super().generate(prompts, max_new_tokens, deterministic)
        return made.with_values(log_probs=made.log_probs + Reports.shift)


def learn_once(policy, shift, monkeypatch, critic=None, **kwargs):
    """What one update of a policy that is still its reference logs, and the warnings about the generator."""
    monkeypatch.setattr(Reports, "shift", shift)
    warned = []
    monkeypatch.setattr("agents.rollouts.episode_log.logger.warn", warned.append)
    env = make_env(lm=make_lm(), kl_coef=0.5)
    agent = GRPO(policy, env, n_episodes=8, group_size=4, seed=0, **kwargs)
    agent.learn(1)
    agent.learn(1, reset_num_timesteps=False)
    return agent.latest, warned, agent


@pytest.mark.parametrize("policy", [Reports, AsSequences, Rewritten])
def test_another_generators_log_probs_are_the_policys_own_and_the_kl_is_charged_by_those(policy, monkeypatch):
    monkeypatch.setattr(
        "agents.base.Agent.train", lambda self, rollout: None
    )  # the policy stays its reference
    latest, warned, _ = learn_once(policy, -9.0, monkeypatch)
    assert latest["objective/kl"] == pytest.approx(0, abs=1e-3)
    assert latest["objective/rlhf_reward"] == pytest.approx(latest["objective/scores"], abs=1e-3)
    assert latest["rollout/generator_log_prob_gap"] == pytest.approx(9, abs=1e-3)
    assert len(warned) == 1 and "9 nats from the policy's" in warned[0]


def test_a_generator_that_agrees_is_measured_and_not_warned_about(monkeypatch):
    latest, warned, _ = learn_once(Reports, 0.0, monkeypatch)
    assert latest["rollout/generator_log_prob_gap"] == pytest.approx(0, abs=1e-5) and not warned


def test_our_own_decoder_is_believed_and_costs_no_further_pass(monkeypatch):
    calls = []
    evaluate = CausalLMPolicy.evaluate
    monkeypatch.setattr(CausalLMPolicy, "evaluate", lambda self, r: calls.append(len(r)) or evaluate(self, r))
    latest, _, _ = learn_once("CausalLMPolicy", 0.0, monkeypatch)
    assert "rollout/generator_log_prob_gap" not in latest
    assert calls == [8, 8]  # one in each of two updates


def test_a_gap_that_is_no_number_is_warned_about(monkeypatch):
    warned = []
    monkeypatch.setattr("agents.rollouts.episode_log.logger.warn", warned.append)
    EpisodeLog(10).note_generator(float("nan"))
    assert len(warned) == 1


# -- at the environment's boundary -------------------------------------------------------------------------------


def test_an_environment_takes_sequences_and_pairs_alike():
    env = make_env(lm=make_lm())
    made = []
    first = env.run_episodes(lambda prompts: made.append(generate(env.lm, prompts, 6)) or made[0], [3, 0, 3])
    second = env.run_episodes(lambda prompts: tuple(made[0]), [3, 0, 3])
    for name in ("tokens", "mask", "log_prob", "ref_logprob", "kl", "rewards", "score"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert first.sequences.native and not second.sequences.native
    assert first.sequences.rewards.sum() == pytest.approx(first.rewards.sum())


def returned(change):
    """What an environment says to a generator whose sequences have been changed."""
    env = make_env(lm=make_lm())
    env.run_episodes(lambda prompts: change(generate(env.lm, prompts, 6), prompts), [3, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda made, prompts: made[:1], ValueError, "got 2 prompts and returned 1 sequences"),
        (lambda made, prompts: made[[1, 0]], ValueError, r"does not go on from prompt 0: given \[.*\], returned \["),
        (lambda made, prompts: made.with_values(log_probs=None), ValueError, "without log_probs"),
        (lambda made, prompts: Sequences.from_responses(prompts, [[3], []], [[-1.0], []]), ValueError, "episode 1"),
        (lambda made, prompts: Sequences.from_responses(prompts, [[3] * 7, [3]], [[-1.0] * 7, [-1.0]]), ValueError,
         "7 tokens for episode 0; expected between 1 and max_new_tokens=6"),
        (lambda made, prompts: made.responses, ValueError, "responses and . log-probability arrays"),
        (lambda made, prompts: "text", TypeError, "must return Sequences or a pair .* got str"),
        (lambda made, prompts: (made.responses, [[-1.0], [-1.0] * 3]), ValueError, "expected equally many"),
    ],
)  # fmt: skip
def test_what_does_not_fit_what_was_asked_for_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        returned(change)
