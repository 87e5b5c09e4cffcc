"""Optimisers by name, and eight-bit moments in checkpoints."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from agents import GRPO
from agents.algorithms import optimizers
from tests.tiny import make_env, make_lm


def learner(env=None, **kwargs):
    env = env or make_env(lm=make_lm(seed=1), kl_coef=0.1)
    return GRPO("auto", env, n_episodes=8, group_size=4, learning_rate=1e-2, seed=0, policy_kwargs=kwargs)


class Nested(torch.optim.AdamW):
    """Writes its state as bitsandbytes does: a count that is a plain number, and moments in one more dictionary."""

    def state_dict(self):
        whole = super().state_dict()
        nested = {
            index: {"step": int(x["step"]), "quantised": {n: x[n] for n in ("exp_avg", "exp_avg_sq")}}
            for index, x in whole["state"].items()
        }
        return whole | {"state": nested}

    def load_state_dict(self, state_dict):
        flat = {}
        for index, entries in state_dict["state"].items():
            assert type(entries["step"]) is int
            flat[index] = entries["quantised"] | {"step": torch.tensor(float(entries["step"]))}
        super().load_state_dict(state_dict | {"state": flat})


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def assert_goes_on_to_the_bit(tmp_path, **kwargs):
    agent = learner(**kwargs)
    agent.learn(1)
    agent.save(tmp_path / "saved")
    again = GRPO.load(tmp_path / "saved", env=make_env(lm=make_lm(seed=1), kl_coef=0.1))
    agent.learn(1, reset_num_timesteps=False)
    again.learn(1, reset_num_timesteps=False)
    assert torch.equal(weights(agent), weights(again))
    return agent


def test_moments_in_a_dictionary_of_their_own_are_saved_and_go_on_to_the_bit(tmp_path, monkeypatch):
    module = types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = Nested
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: name)
    agent = assert_goes_on_to_the_bit(tmp_path, optimizer_class="adamw_8bit")
    assert isinstance(agent.optimizer, Nested) and agent.optimizer.param_groups[0]["eps"] == 1e-5


def test_eight_bits_of_bitsandbytes_are_saved_and_go_on_to_the_bit(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    small = {"optimizer_kwargs": {"min_8bit_size": 64}}  # the tiny model's matrices too
    agent = assert_goes_on_to_the_bit(tmp_path, optimizer_class="adamw_8bit", **small)
    held = [x for state in agent.optimizer.state.values() for x in state.values()]
    assert any(isinstance(x, torch.Tensor) and x.dtype == torch.uint8 for x in held)


def test_an_optimiser_that_is_not_there_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"optimizer_class='adamw_8bits' is not known.*'adamw_8bit'"):
        learner(optimizer_class="adamw_8bits")
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'paged_adamw_8bit' needs bitsandbytes.*pip install bitsandbytes"):
        learner(optimizer_class="paged_adamw_8bit")
