"""Generation one update ahead: what overlaps, by which weights it is written, and what a checkpoint keeps of it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from agents import DAPO, GRPO
from agents.runs.checkpoint import take_position
from tests.off_generator import OffGenerator
from tests.tiny import id_sum, make_env, make_lm
from textrl_env.generators import GeneratorError

GAP = "sampling/sampling_logp_difference/max"


class Watched(OffGenerator):
    """Knows how often weights had been pushed when each rollout was begun and when it was finished."""

    def __init__(self):
        super().__init__()
        self.begun, self.finished, self.dies_at = [], [], 10**9
        self.holds_from, self.may_finish = 10**9, threading.Event()

    def generate(self, prompts, sampling):
        self.begun.append(len(self.received))
        if len(self.begun) > self.dies_at:
            raise ConnectionError("gone")
        if len(self.begun) > self.holds_from:
            assert self.may_finish.wait(60)
        made = super().generate(prompts, sampling)
        self.finished.append(len(self.received))
        return made


def make_agent(engine=None, cls=GRPO, **kwargs):
    engine = Watched() if engine is None else engine
    kwargs = {"n_episodes": 8, "group_size": 4, "learning_rate": 1e-2, "seed": 0} | kwargs
    env = make_env(lm=make_lm(), reward=id_sum, kl_coef=0.1)
    agent = cls("CausalLMPolicy", env, policy_kwargs={"generator": engine}, generate_ahead=True, **kwargs)
    return agent, engine


def learn(agent, updates=1):
    gaps = []
    for _ in range(updates):
        agent.learn(1, reset_num_timesteps=agent.n_updates == 0)
        gaps.append(agent.latest[GAP])
    return gaps


def weights(agent):
    return torch.nn.utils.parameters_to_vector(agent.policy.parameters()).detach().clone()


def test_what_is_learned_from_is_one_update_old_and_never_older():
    agent, engine = make_agent()
    gaps = learn(agent, 4)
    agent.ahead.get_state()  # waits for the last one
    assert gaps[0] == pytest.approx(0, abs=1e-5) and min(gaps[1:]) > 1e-3
    # Rollouts 0 and 1 by the first weights, each further one by those of when the one before was taken.
    assert engine.begun == engine.finished == [1, 1, 2, 3, 4]


def test_the_policy_learns_while_the_next_responses_are_written():
    agent, engine = make_agent()
    before, engine.holds_from = (
        weights(agent),
        1,
    )  # what is written ahead cannot be ready before the update is over
    learn(agent)
    assert not torch.equal(before, weights(agent)) and len(engine.finished) == 1
    engine.may_finish.set()
    assert agent.ahead.get_state()


def test_a_run_that_goes_on_from_a_checkpoint_learns_from_what_was_written_ahead(tmp_path):
    through, _ = make_agent()
    learn(through, 4)
    stopped, _ = make_agent()
    learn(stopped, 2)
    stopped.save(tmp_path / "half")
    env, engine = make_env(lm=make_lm(), reward=id_sum, kl_coef=0.1), Watched()
    again = GRPO.load(tmp_path / "half", env=env, policy_kwargs={"generator": engine})
    assert again.generate_ahead and set(again.ahead.get_state()) == set(stopped.ahead.get_state())
    learn(again, 2)
    assert torch.equal(weights(again), weights(through))


def test_a_method_that_collects_several_times_for_an_update_goes_on_ahead():
    agent, engine = make_agent(cls=DAPO, max_resamples=1)
    learn(agent, 2)
    assert agent.n_updates == 2 and len(engine.begun) >= 3


def test_a_generator_that_dies_in_the_thread_is_one_error_when_its_responses_are_wanted():
    agent, engine = make_agent()
    engine.dies_at = 2
    learn(agent, 1)
    learn(agent, 1)
    assert not any(name.startswith("ahead.") for name in take_position(agent).arrays)
    with pytest.raises(
        GeneratorError, match="Watched failed while it wrote 8 responses: ConnectionError: gone"
    ):
        learn(agent, 1)


@pytest.mark.parametrize("generator", ["native", "transformers"])
def test_a_generator_that_reads_the_weights_in_training_cannot_go_ahead(generator):
    with pytest.raises(
        ValueError, match=f"generate_ahead=True wants a generator with weights of its own.*{generator}"
    ):
        GRPO(
            "CausalLMPolicy",
            make_env(lm=make_lm()),
            policy_kwargs={"generator": generator},
            generate_ahead=True,
        )


def test_prompts_are_drawn_in_the_same_order_as_without(monkeypatch):
    drawn = {}
    for ahead in (False, True):
        env = make_env(lm=make_lm(), reward=id_sum)
        agent = GRPO(
            "CausalLMPolicy",
            env,
            n_episodes=8,
            group_size=2,
            seed=3,
            policy_kwargs={"generator": OffGenerator()},
            generate_ahead=ahead,
        )
        seen = []
        monkeypatch.setattr(
            agent, "record_text_episodes", lambda episodes, seen=seen: seen.append(episodes.prompt_id)
        )
        agent.learn(1, log_interval=None)
        agent.learn(1, log_interval=None, reset_num_timesteps=False)
        drawn[ahead] = np.concatenate(seen)
    assert np.array_equal(drawn[False], drawn[True])
