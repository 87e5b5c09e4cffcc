"""What only scores leaves the device's memory while the policy learns, and the run stays the same.

On a CPU the host's memory is the device's too, so a copy in another place stands for one on the host.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from agents import GRPO
from agents.rollouts.vector_envs import frozen_models
from reward_models import HFRewardModel
from tests.tiny import EOS, WORDS, make_env, make_lm, make_tokenizer
from textrl_env.lm.offloading import Offloading


@pytest.fixture
def a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(Offloading, "may_leave", staticmethod(lambda device: True))


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), num_labels=1, pad_token_id=2, eos_token_id=EOS, **sizes)
    return HFRewardModel(LlamaForSequenceClassification(config).eval(), make_tokenizer())


def learner(offload, **policy_kwargs):
    env = make_env(lm=make_lm(seed=1).clone(), reward=classifier(), kl_coef=0.1)
    kwargs = {"n_episodes": 8, "group_size": 4, "learning_rate": 1e-2, "seed": 0}
    return GRPO("auto", env, offload=offload, policy_kwargs=policy_kwargs, **kwargs)


def places(models):
    return [p.data_ptr() for model in models for p in model.parameters()]


def test_reference_and_reward_model_are_away_in_the_update_and_the_run_is_the_same(a_device_of_its_own):
    agent, stays = learner(True), learner(False)
    frozen = frozen_models(agent.envs, agent.text_env)
    assert {type(model).__name__ for model in frozen} == {
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
    }
    before, during = places(frozen), []
    update = agent.update

    def watched(*args, **kwargs):
        during.append(places(frozen))
        return update(*args, **kwargs)

    agent.update = watched
    for each in (agent, stays):
        each.learn(100)
    assert len(during) >= 2 and all(here == during[0] for here in during)  # the host keeps the places
    assert all(here != there for here, there in zip(during[0], before, strict=True))
    weights, expected = (
        torch.cat([p.detach().flatten() for p in x.policy.parameters()]) for x in (agent, stays)
    )
    assert torch.equal(weights, expected)
    size = sum(p.nbytes for model in frozen for p in (*model.parameters(), *model.buffers()))
    assert agent.latest["memory/offloaded_gb"] == pytest.approx(size / 1e9)


def test_weights_that_adapters_lie_over_stay(a_device_of_its_own):
    agent = learner(True, lora_rank=2)
    reference, reward = frozen_models(agent.envs, agent.text_env)
    with agent._offloading.away([reference, reward], [agent.policy]) as moved:
        assert moved == sum(p.nbytes for p in (*reward.parameters(), *reward.buffers()))


def test_an_error_in_the_update_brings_everything_back(a_device_of_its_own):
    agent = learner(True)
    frozen = frozen_models(agent.envs, agent.text_env)
    before = [p.detach().clone() for model in frozen for p in model.parameters()]
    with pytest.raises(KeyError), agent.others_away():
        raise KeyError
    assert all(map(torch.equal, before, (p for model in frozen for p in model.parameters())))
    frozen[1].score.weight.data.add_(1.0)  # changed between two updates
    changed = frozen[1].score.weight.clone()
    with agent.others_away():
        pass
    assert torch.equal(frozen[1].score.weight, changed)


def test_on_a_cpu_it_is_said_that_nothing_is_spared(recwarn):
    agent = learner(True)
    assert [w for w in recwarn if "offload=True spares nothing here" in str(w.message)]
    with agent.others_away():
        pass
    assert agent.logger.name_to_value["memory/offloaded_gb"] == 0
