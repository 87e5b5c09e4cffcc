"""What acts and what says log-probabilities again are one policy, for every space and every network."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import PPO, CausalLMPolicy, Evaluation, MlpPolicy, Policy, Rollout
from agents.policies.factory import feature_size, make_policy
from agents.policies.features import encode_observation
from agents.rollouts.vector_envs import make_envs
from tests.tiny import make_env, make_lm
from textrl_env.lm.sequences import Sequences

DISCRETE = spaces.Discrete(3)
OBSERVATION_SPACES = {
    "box": spaces.Box(-1, 1, (4,)),
    "matrix": spaces.Box(-1, 1, (2, 3)),
    "image": spaces.Box(0, 255, (2, 2), np.uint8),
    "integers": spaces.Box(-1, 2, (3,), np.int64),
    "wide-integers": spaces.Box(0, 10**6, (3,), np.int64),
    "discrete": spaces.Discrete(5, start=2),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(4),
    "dict": spaces.Dict(x=spaces.Box(-1, 1, (2,)), y=spaces.Discrete(3)),
}
ACTION_SPACES = {
    "discrete": DISCRETE,
    "box": spaces.Box(-1.0, 1.0, (2,)),
    "matrix-box": spaces.Box(-0.5, 0.5, (2, 2)),
}


def batch_of(space: spaces.Space, count: int):
    space.seed(0)
    samples = [space.sample() for _ in range(count)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([sample[name] for sample in samples]) for name in space.spaces}
    return np.stack(samples)


def mlp(observation="box", action="discrete", critic="separate", **kwargs) -> MlpPolicy:
    torch.manual_seed(0)
    policy = MlpPolicy(OBSERVATION_SPACES[observation], ACTION_SPACES[action], critic, **kwargs)
    policy.generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # far from uniform, and values that are not 0
        policy.action_head.weight.mul_(100)
        if critic is not None:
            policy.value_head.weight.normal_()
    return policy


def rollout_of(policy, observations: list, actions: np.ndarray) -> Rollout:
    mask = np.ones(actions.shape[:2], dtype=bool)
    zeros, ones = torch.zeros(mask.shape), torch.from_numpy(mask)
    inputs = policy.stack(observations, actions, mask)
    return Rollout(inputs, torch.from_numpy(actions), zeros, zeros, zeros, zeros, ones, ones)


# MLP


@pytest.mark.parametrize("critic", ["separate", "shared", None])
@pytest.mark.parametrize("action", ACTION_SPACES)
@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_evaluating_says_what_acting_said(observation, action, critic):
    policy = mlp(observation, action, critic)
    observations = [batch_of(policy.observation_space, 6) for _ in range(2)]
    acted = [policy.act(o) for o in observations]
    actions = np.stack([a for a, _, _ in acted], axis=1)  # [N, T, ...]
    new = policy.evaluate(rollout_of(policy, observations, actions))
    assert new.log_probs.shape == new.entropy.shape == (6, 2)
    expected = np.stack([log_probs for _, log_probs, _ in acted], axis=1)
    assert new.log_probs.detach().numpy() == pytest.approx(expected, abs=1e-5)
    if critic is None:
        assert new.values is None and not policy.has_critic
    else:
        values = np.stack([values for _, _, values in acted], axis=1)
        assert new.values.detach().numpy() == pytest.approx(values, abs=1e-5)
        assert policy.predict_values(observations[0]) == pytest.approx(values[:, 0], abs=1e-6)


@pytest.mark.parametrize("action", ACTION_SPACES)
def test_log_probs_and_entropies_are_those_of_torchs_distributions(action):
    policy = mlp(action=action)
    observation = batch_of(policy.observation_space, 5)
    actions, log_probs, _ = policy.act(observation)
    new = policy.evaluate(rollout_of(policy, [observation], actions[:, None]))
    with torch.no_grad():
        out = policy.action_head(policy.trunk(torch.from_numpy(observation)))
        if action == "discrete":
            theirs = torch.distributions.Categorical(logits=out)
        else:
            theirs = torch.distributions.Normal(out, policy.log_std.exp())
            theirs = torch.distributions.Independent(theirs, 1)
        given = (
            torch.from_numpy(actions).reshape(5, -1) if action != "discrete" else torch.from_numpy(actions)
        )
        assert log_probs == pytest.approx(theirs.log_prob(given).numpy(), abs=1e-5)
        assert new.entropy[:, 0] == pytest.approx(theirs.entropy(), abs=1e-5)


def test_log_prob_is_the_same_for_the_last_action_and_for_any_other():
    policy = mlp()
    observation = batch_of(policy.observation_space, 4)
    actions, log_probs, _ = policy.act(observation)
    assert policy.log_prob(observation, actions) is log_probs  # not computed twice
    others = (actions + 1) % 3
    policy.weights_changed()
    total = sum(np.exp(policy.log_prob(observation, (actions + k) % 3)) for k in range(3))
    assert total == pytest.approx(np.ones(4), abs=1e-5)
    assert policy.log_prob(observation, others) != pytest.approx(log_probs)


def test_acting_follows_weights_that_change_and_not_those_of_a_copy():
    policy = mlp()
    observation = batch_of(policy.observation_space, 4)
    before = policy.act(observation, deterministic=True)[1]
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert other.act(observation, deterministic=True)[1] != pytest.approx(before, abs=1e-3)
    policy.weights_changed()
    assert policy.act(observation, deterministic=True)[1] == pytest.approx(before)
    policy.load_state_dict(other.state_dict())
    again = policy.act(observation, deterministic=True)[1]
    assert again == pytest.approx(other.act(observation, deterministic=True)[1])


def test_continuous_actions_are_clipped_for_the_env_and_judged_as_they_were_drawn():
    policy = mlp(action="box", log_std_init=2.0)
    actions, log_probs, _ = policy.act(batch_of(policy.observation_space, 50))
    assert (np.abs(actions) > 1).any()
    assert np.abs(policy.to_env(actions)).max() == 1.0
    new = policy.evaluate(rollout_of(policy, [batch_of(policy.observation_space, 50)], actions[:, None]))
    assert new.log_probs[:, 0].detach().numpy() == pytest.approx(log_probs, abs=1e-5)


def test_the_deterministic_action_is_the_most_likely_one():
    policy = mlp()
    observation = batch_of(policy.observation_space, 8)
    best, log_probs, _ = policy.act(observation, deterministic=True)
    for k in range(3):
        assert (policy.log_prob(observation, np.full(8, k)) <= log_probs + 1e-6).all()
    assert policy.act(observation, deterministic=True)[0].tolist() == best.tolist()
    policy = mlp(action="box")
    with torch.no_grad():
        mean = policy.action_head(policy.trunk(torch.from_numpy(observation))).numpy()
    assert policy.act(observation, deterministic=True)[0] == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("name", OBSERVATION_SPACES)
def test_encoded_observations_have_the_promised_size_and_are_told_apart(name):
    space = OBSERVATION_SPACES[name]
    observation = batch_of(space, 6)
    features = encode_observation(space, observation)
    assert features.shape == (6, feature_size(space)) and features.dtype == np.float32
    if name in ("discrete", "multi-discrete"):
        assert set(np.unique(features)) == {0.0, 1.0}
    if name == "discrete":
        assert features.argmax(1).tolist() == (observation - 2).tolist()
    if name == "image":
        assert features.max() <= 1.0


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_value_heads_start_at_zero(critic):
    policy = MlpPolicy(OBSERVATION_SPACES["box"], DISCRETE, critic)
    assert (policy.predict_values(batch_of(policy.observation_space, 5)) == 0).all()
    env = make_env(2)
    policy = CausalLMPolicy(env.single_observation_space, env.single_action_space, critic, model=env.lm)
    assert (policy.predict_values(env.reset(seed=0)[0]) == 0).all()


def test_a_separate_critic_shares_no_weights_and_a_shared_one_does():
    for critic, shared in (("separate", False), ("shared", True)):
        policy = mlp(critic=critic)
        observation = batch_of(policy.observation_space, 3)
        actions, *_ = policy.act(observation)
        policy.evaluate(rollout_of(policy, [observation], actions[:, None])).values.sum().backward()
        assert (policy.trunk[0].weight.grad is not None) == shared


def test_a_fresh_policy_is_nearly_uniform():
    policy = MlpPolicy(OBSERVATION_SPACES["box"], DISCRETE)
    observation = batch_of(policy.observation_space, 20)
    for k in range(3):
        assert np.exp(policy.log_prob(observation, np.full(20, k))) == pytest.approx(1 / 3, abs=0.02)


# Language model


def lm_policy(kind="llama", critic="shared", num_envs=3, **kwargs):
    env = make_env(num_envs, make_lm(kind, **kwargs))
    torch.manual_seed(0)
    policy = CausalLMPolicy(env.single_observation_space, env.single_action_space, critic, model=env.lm)
    policy.generator = torch.Generator().manual_seed(0)
    env.bind_policy(policy.log_prob)
    if critic is not None:
        torch.nn.init.normal_(policy.value_head.out.weight)
    return env, policy


def lm_rollout(policy, prompts, responses) -> Rollout:
    sequences = Sequences.from_responses(prompts, responses)
    mask = torch.from_numpy(sequences.mask())
    actions, zeros = torch.from_numpy(sequences.padded(sequences.actions)), torch.zeros(mask.shape)
    return Rollout({"sequences": sequences}, actions, zeros, zeros, zeros, zeros, mask, mask)


@pytest.mark.parametrize("critic", ["separate", "shared", None])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_says_again_what_it_said_when_generating(kind, critic):
    env, policy = lm_policy(kind, critic)
    prompts = [env.dynamics.prompt_tokens[k] for k in (3, 0, 2, 1)]
    responses, log_probs = policy.generate(prompts, 6)
    new = policy.evaluate(lm_rollout(policy, prompts, responses))
    for row, said in zip(new.log_probs.detach().numpy(), log_probs, strict=True):
        assert row[: len(said)] == pytest.approx(said, abs=1e-4)
    assert (new.entropy[new.log_probs != 0] >= 0).all()
    assert (new.values is None) == (critic is None)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_language_models_entropy_is_that_of_the_distribution_it_acts_by(temperature):
    env, policy = lm_policy()
    policy.lm.temperature = temperature
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(5.0)  # far from uniform
    prompt, response = env.dynamics.prompt_tokens[2], np.array([4, 5, 6])
    entropy = policy.evaluate(lm_rollout(policy, [prompt], [response])).entropy.detach()[0]
    ids = torch.from_numpy(np.concatenate([prompt, response]))[None]
    with torch.no_grad():
        logits = policy.model(ids).logits[0, len(prompt) - 1 : -1, : policy.lm.vocab_size] / temperature
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert entropy.numpy() == pytest.approx(expected.numpy(), abs=1e-4)
    assert entropy.max() < 0.95 * np.log(policy.lm.vocab_size)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_values_do_not_depend_on_padding_or_on_what_comes_later(critic):
    env, policy = lm_policy(critic=critic)
    prompts = [env.dynamics.prompt_tokens[k] for k in (3, 0)]
    responses = [np.array([4, 5]), np.array([6, 7, 8, 9, 3])]
    together = policy.evaluate(lm_rollout(policy, prompts, responses)).values.detach()
    for row, prompt, response in zip(together, prompts, responses, strict=True):
        alone = policy.evaluate(lm_rollout(policy, [prompt], [response])).values.detach()[0]
        assert row[: len(response)] == pytest.approx(alone, abs=1e-5)
        first = policy.evaluate(lm_rollout(policy, [prompt], [response[:1]])).values.detach()[0]
        assert first == pytest.approx(row[:1], abs=1e-5)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_values_of_an_observation_are_those_of_its_place_in_the_episode(critic):
    env, policy = lm_policy(critic=critic)
    observation, _ = env.reset(options={"prompt_id": 2})
    prompt, response = env.dynamics.prompt_tokens[2], np.array([4, 5, 6])
    expected = policy.evaluate(lm_rollout(policy, [prompt], [response])).values.detach()[0]
    for t, token in enumerate(response):
        assert policy.predict_values(observation) == pytest.approx(np.full(3, expected[t]), abs=1e-4)
        observation, *_ = env.step(np.full(3, token))


def test_acting_uses_the_new_weights_after_an_update():
    env, policy = lm_policy(critic=None)
    observation, _ = env.reset(seed=0)
    actions, before, _ = policy.act(observation)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(3)
    policy.weights_changed()
    after = policy.log_prob(observation, actions)
    fresh = CausalLMPolicy(env.single_observation_space, env.single_action_space, None, model=policy.lm)
    assert after == pytest.approx(fresh.log_prob(observation, actions), abs=1e-5)
    assert after != pytest.approx(before, abs=1e-3)


def test_the_policy_starts_as_the_reference_and_training_it_leaves_the_reference_alone():
    env, policy = lm_policy(critic=None)
    reference = env.lm.model.lm_head.weight.clone()
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1.0)
    assert torch.equal(env.lm.model.lm_head.weight, reference)
    assert not torch.equal(policy.model.lm_head.weight, reference)


# Choosing one


def test_auto_takes_a_language_model_where_the_env_has_one():
    for env, expected in ((make_env(2), CausalLMPolicy), (make_envs("ToyBandit-v0", 2), MlpPolicy)):
        assert type(make_policy("auto", env, "default", {})) is expected
    single = make_envs(make_env(), 1)
    assert type(make_policy("auto", single, None, {})) is CausalLMPolicy


def test_an_mlp_can_act_on_the_tokens_of_a_tiny_world():
    agent = PPO("MlpPolicy", "TokenTree-v0", n_steps=8, n_envs=4, batch_size=None, n_epochs=1, seed=0)
    agent.learn(32)
    assert agent.num_timesteps == 32


def test_a_policy_class_of_ones_own_plugs_in():
    class Uniform(Policy):
        def __init__(self, observation_space, action_space, critic=None):
            super().__init__(observation_space, action_space, critic)
            self.logits = torch.nn.Parameter(torch.zeros(int(action_space.n)))

        def act(self, observation, deterministic=False):
            n = len(observation)
            actions = torch.randint(len(self.logits), (n,), generator=self.generator).numpy()
            return actions, np.full(n, -np.log(len(self.logits))), np.zeros(n)

        def evaluate(self, rollout):
            table = self.logits.log_softmax(0)
            entropy = -(table.exp() * table).sum().expand(rollout.mask.shape)
            return Evaluation(table[rollout.actions], torch.zeros(rollout.mask.shape), entropy)

        def stack(self, observations, actions, mask):
            return {}

        def predict_values(self, observation):
            return np.zeros(len(observation))

    agent = PPO(Uniform, "ToyBandit-v0", n_steps=8, n_envs=4, batch_size=16, n_epochs=1, seed=0).learn(32)
    assert agent.policy.logits.abs().max() > 0


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_first_update_takes_over_what_the_rollout_has_already_evaluated(micro_batch_size, monkeypatch):
    def learn(keep: bool) -> tuple[int, torch.Tensor]:
        agent = PPO(
            "auto",
            make_env(),
            n_episodes=8,
            batch_size=None,
            n_epochs=2,
            micro_batch_size=micro_batch_size,
            seed=0,
        )
        calls, evaluate, collect = [], agent.policy.evaluate, agent.collect
        monkeypatch.setattr(agent.policy, "evaluate", lambda batch: calls.append(1) or evaluate(batch))
        if not keep:
            monkeypatch.setattr(agent, "collect", lambda: dataclasses.replace(collect()))
        agent.learn(1)
        return len(calls), torch.cat([p.detach().flatten() for p in agent.policy.parameters()])

    (kept, with_it), (again, without) = learn(True), learn(False)
    assert (kept, again) == ((2, 3) if micro_batch_size is None else (9, 9))
    torch.testing.assert_close(with_it, without, atol=0, rtol=0)
