"""A reference that follows the policy: what is charged, stepping and fused, and what checkpoints hold of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agents import GRPO
from tests.tiny import id_sum, make_env

SETTINGS = {
    "group_size": 4,
    "n_episodes": 8,
    "seed": 0,
    "learning_rate": 3e-2,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "ref_model_mixup_alpha": 0.6,
}


def make(num_envs=2, **kwargs) -> GRPO:
    env = make_env(num_envs, kl_coef=0.2, reward=id_sum)
    return GRPO("auto", env, **(SETTINGS | {"policy_kwargs": {"autocast": False}} | kwargs))


def weights(lm) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def learn(agent, updates):
    """So many updates of one gradient step each, and the policy's weights after each."""
    after = []
    for _ in range(updates):
        agent.learn(1, reset_num_timesteps=False, log_interval=None)
        after.append(weights(agent.policy.lm))
    return after


def test_the_reference_moves_by_its_share_of_the_policy_every_so_many_steps():
    agent = make()
    dynamics = agent.text_env.dynamics
    first = weights(dynamics.lm)
    after = learn(agent, 3)
    for name, moved in dynamics.reference.model.named_parameters():
        # Mixed after the second step alone (TR-DPO, soft update).
        torch.testing.assert_close(moved, 0.6 * after[1][name] + 0.4 * first[name], rtol=1e-6, atol=1e-7)
        assert not moved.requires_grad
    for name, own in dynamics.lm.model.named_parameters():
        assert torch.equal(own, first[name]), "whoever else holds the model keeps it as it was"


def test_stepping_and_running_whole_episodes_charge_the_kl_to_where_the_reference_is():
    agent = make()
    learn(agent, 2)
    env = agent.text_env
    reference, policy = env.dynamics.reference, agent.policy.lm
    prompts = env.draw_prompts(4)
    episodes = env.run_episodes(lambda p: agent.policy.generate(p, env.max_new_tokens), prompts)
    sequences = episodes.sequences
    with torch.no_grad():
        expected, first = (lm.evaluate(sequences)[0].numpy() for lm in (reference, env.lm))
        acting = policy.evaluate(sequences)[0].numpy()
    np.testing.assert_allclose(episodes.ref_logprob[episodes.mask], expected, atol=1e-5)
    assert np.abs(expected - first).max() > 1e-2
    stepped = make_env(None, kl_coef=0.2, reward=id_sum, lm=env.lm).unwrapped
    stepped.dynamics.moved = reference

    def log_prob(observation, action):
        shown = {name: np.asarray(x)[None] for name, x in observation.items()}
        return float(agent.policy.log_prob(shown, np.array([action]))[0])

    stepped.bind_policy(log_prob)
    start = 0
    for row, length in enumerate(episodes.mask.sum(1)):
        stepped.reset(options={"prompt_id": int(prompts[row])})
        for t in range(length):
            _, reward, *_, info = stepped.step(int(episodes.tokens[row, t]))
            assert info["ref_logprob"] == pytest.approx(float(expected[start + t]), abs=1e-5)
            assert info["kl"] == pytest.approx(float(acting[start + t] - expected[start + t]), abs=1e-4)
            assert reward == pytest.approx(episodes.rewards[row, t], abs=1e-4)
        start += length


def test_an_episode_under_way_is_charged_by_the_moved_reference_from_then_on():
    env = make_env(None, kl_coef=0.2).unwrapped
    other = make_env(None, lm=env.lm.clone()).unwrapped.lm
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.5)
    env.reset(seed=0)
    env.step(3)
    env.dynamics.move_reference(dict(other.model.named_parameters()), 1.0)
    observation = env.dynamics.observe()
    _, _, _, _, info = env.step(4)
    tokens = observation["input_ids"][0][observation["attention_mask"][0] > 0]
    with torch.no_grad():
        logits = other.model(torch.from_numpy(tokens)[None]).logits[0, -1]
    expected = other.action_logits(logits).log_softmax(-1)[4]
    assert info["ref_logprob"] == pytest.approx(float(expected), abs=1e-5)


def test_a_resumed_run_goes_on_with_the_moved_reference_bitwise(tmp_path):
    agent = make()
    learn(agent, 3)
    agent.save(tmp_path)
    torch.manual_seed(12345)
    resumed = GRPO.load(tmp_path, env=make_env(2, kl_coef=0.2, reward=id_sum))
    for each in (agent, resumed):
        learn(each, 3)
    pairs = zip(weights(agent.policy.lm).values(), weights(resumed.policy.lm).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    theirs = [weights(each.text_env.dynamics.reference) for each in (agent, resumed)]
    assert all(torch.equal(theirs[0][name], theirs[1][name]) for name in theirs[0])
    first = weights(resumed.text_env.lm)
    assert any(not torch.equal(first[name], theirs[1][name]) for name in first)


def test_a_checkpoint_of_a_reference_that_stayed_does_not_hold_it(tmp_path):
    agent = make(ref_model_sync_steps=100)
    learn(agent, 1)
    agent.save(tmp_path)
    assert not [name for name in load_file(tmp_path / "agent.safetensors") if name.startswith("reference.")]


@pytest.mark.parametrize(
    ("env", "options", "told"),
    [
        (lambda: make_env(2, kl_coef=0.0), {}, "kl_coef is 0"),
        (lambda: make_env(2), {"policy_kwargs": {"lora_rank": 2}}, "under the adapters"),
        (lambda: "TokenTree-v0", {}, "no KL against a language model"),
        (lambda: make_env(2), {"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha"),
        (lambda: make_env(2), {"ref_model_sync_steps": 0}, "ref_model_sync_steps"),
    ],
)
def test_a_reference_that_cannot_follow_is_refused(env, options, told):
    with pytest.raises(ValueError, match=told):
        GRPO("auto", env(), **(SETTINGS | options))


def test_a_reference_moves_to_models_of_its_kind_alone():
    env = make_env(None).unwrapped
    with pytest.raises(ValueError, match="of its own kind"):
        env.dynamics.move_reference({"x": torch.zeros(1)}, 0.5)
