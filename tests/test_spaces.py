"""A space is its bounds, start and dtype, to any depth; what an env hands out stays the env's."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents import PPO, REINFORCE, MlpPolicy
from agents.policies.actions import make_distribution, to_space
from agents.policies.extractor import CnnPolicy, ExtractorPolicy
from agents.policies.factory import make_policy
from agents.policies.features import encode_observation, feature_size
from agents.rollouts.observations import from_named_arrays, is_single, named_arrays
from agents.rollouts.vector_envs import make_envs
from agents.runs.checkpoint import decode_space, encode_space
from tests.test_policies import rollout_of

NESTED = spaces.Dict(
    camera=spaces.Dict(left=spaces.Box(0, 255, (2, 2), np.uint8), on=spaces.MultiBinary(2)),
    pose=spaces.Tuple([spaces.Discrete(3, start=-1), spaces.Box(-1, 1, (2,))]),
)
OBSERVATIONS = {
    "flags": spaces.Box(0, 1, (3,), np.uint8),
    "start": spaces.Discrete(4, start=-2),
    "multi-start": spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "grid": spaces.MultiDiscrete([[2, 3], [2, 2]]),
    "nested": NESTED,
    "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (2,))]),
}
ACTIONS = {
    "start": spaces.Discrete(3, start=-1),
    "multi": spaces.MultiDiscrete([2, 3], start=[0, 4]),
    "grid": spaces.MultiDiscrete([[2, 3], [2, 2]]),
    "bits": spaces.MultiBinary(3),
    "bit-grid": spaces.MultiBinary([2, 2]),
    "integers": spaces.Box(-2, 3, (2,), np.int32),
    "double": spaces.Box(-1, 1, (2,), np.float64),
}


class Echo(gym.Env):
    """Shows random observations for three steps, refuses actions that it does not have, pays the first flag."""

    def __init__(self, observation_space=OBSERVATIONS["flags"], action_space=ACTIONS["start"], info=None):
        self.observation_space, self.action_space = observation_space, action_space
        self.info = info or {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        reward = float(np.sum(action))
        return self.observation_space.sample(), reward, self.t == 3, False, dict(self.info)


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_every_observation_space_is_learned_from(name):
    space = OBSERVATIONS[name]
    space.seed(0)
    features = encode_observation(space, space.sample())
    assert features.shape == (feature_size(space),) and features.dtype == np.float32
    agent = PPO("MlpPolicy", Echo(space), n_steps=8, batch_size=8, n_epochs=1, seed=0)
    before = weights(agent)
    assert not torch.equal(before, weights(agent.learn(8)))


@pytest.mark.parametrize("name", ACTIONS)
def test_only_actions_of_the_space_are_sent_and_predicted(name):
    space = ACTIONS[name]
    agent = REINFORCE("MlpPolicy", Echo(action_space=space), n_episodes=4, seed=0).learn(12)
    for deterministic in (True, False):
        action, _ = agent.predict(np.zeros(3, np.uint8), deterministic=deterministic)
        assert space.contains(action) and action.dtype == space.dtype
    batch, _ = agent.predict(np.zeros((5, 3), np.uint8))
    assert batch.shape == (5, *space.shape) and all(space.contains(row) for row in batch)


@pytest.mark.parametrize("name", ACTIONS)
def test_a_distribution_says_the_same_in_numpy_and_in_torch_and_adds_up(name):
    space = ACTIONS[name]
    head = make_distribution(space)
    generator = torch.Generator().manual_seed(0)
    out = np.random.default_rng(0).normal(size=(6, head.outputs)).astype(np.float32)
    actions = head.draw(out, generator)
    log_probs, entropy = head.evaluate(torch.from_numpy(out), torch.from_numpy(actions))
    assert log_probs.detach().numpy() == pytest.approx(head.log_prob(out, actions), abs=1e-5)
    assert (head.log_prob(out, head.mode(out)) >= head.log_prob(out, actions) - 1e-9).all()
    if isinstance(space, spaces.Box):
        return
    # The entropy is minus the mean log-probability of many draws.
    many = head.draw(np.repeat(out[:1], 20_000, axis=0), generator)
    mean = -head.log_prob(np.repeat(out[:1], 20_000, axis=0), many).mean()
    assert float(entropy[0].detach()) == pytest.approx(mean, abs=0.03)


def test_a_start_is_part_of_what_an_action_is():
    head = make_distribution(spaces.Discrete(3, start=-1))
    out = np.log(np.array([[0.7, 0.2, 0.1]], dtype=np.float32))
    assert head.mode(out).tolist() == [-1]
    assert np.exp(head.log_prob(out, np.array([-1]))) == pytest.approx([0.7], abs=1e-6)
    assert np.exp(head.log_prob(out, np.array([1]))) == pytest.approx([0.1], abs=1e-6)


@pytest.mark.parametrize("use_sde", [False, True])
def test_an_initial_log_standard_deviation_may_be_a_whole_number(use_sde):
    head = make_distribution(spaces.Box(-1, 1, (2,)), -2, 3 if use_sde else None)
    assert head.log_std.dtype == torch.float32 and (head.log_std == -2.0).all()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.Box(-1, 1, (2,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("use_sde", [False, True])
def test_the_distribution_that_scripts_ask_for_is_the_one_that_acts(space, use_sde):
    if use_sde and not isinstance(space, spaces.Box):
        pytest.skip("noise that is a function of the state is for continuous actions")
    torch.manual_seed(0)
    policy = MlpPolicy(spaces.Box(-1, 1, (4,)), space, net_arch=[8], use_sde=use_sde)
    torch.nn.init.normal_(policy.action_head.weight)
    batch = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    tensors, batched = policy.obs_to_tensor(batch)
    actions, log_probs, _ = policy.act(batch)
    places = torch.from_numpy(actions - getattr(space, "start", 0)).float()
    assert batched and not policy.obs_to_tensor(batch[0])[1]
    theirs = policy.get_distribution(tensors).log_prob(places)
    assert theirs.detach().numpy() == pytest.approx(log_probs, abs=1e-5)
    theirs.sum().backward()
    assert policy.action_head.weight.grad.abs().sum() > 0


def test_integer_boxes_are_rounded_within_their_bounds():
    space = spaces.Box(np.array([0, -5]), np.array([1, 5]), dtype=np.int64)
    sent = to_space(space, np.array([[0.6, -9.7], [1.4, 2.4]]))
    assert sent.tolist() == [[1, -5], [1, 2]] and sent.dtype == np.int64


def test_bytes_are_brightness_only_where_they_are_an_image():
    image, memory = spaces.Box(0, 255, (2, 2), np.uint8), spaces.Box(0, 255, (4,), np.uint8)
    board = spaces.Box(0, 2, (2, 2), np.uint8)
    assert encode_observation(image, np.full((2, 2), 255, np.uint8)).tolist() == [1.0] * 4
    assert encode_observation(memory, np.full(4, 200, np.uint8)).tolist() == [200.0] * 4
    assert encode_observation(board, np.array([[0, 1], [2, 0]], np.uint8)).reshape(4, 3).argmax(
        1
    ).tolist() == [
        0,
        1,
        2,
        0,
    ]


def test_a_value_outside_the_observation_space_is_refused_and_not_wrapped_around():
    with pytest.raises(ValueError, match=r"outside its observation space Discrete\(3, start=1\)"):
        encode_observation(spaces.Discrete(3, start=1), np.array([0]))
    with pytest.raises(ValueError, match="outside its observation space"):
        encode_observation(spaces.Box(0, 1, (2,), np.int64), np.array([0, 2]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_observation_that_is_no_number_is_refused_by_slot_and_part(value):
    space = spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Box(-1, 1, (2,)))
    policy = MlpPolicy(space, spaces.Discrete(2))
    observation = {"a": np.zeros((3, 2)), "b": np.zeros((3, 2))}
    observation["b"][1, 0] = value
    with pytest.raises(ValueError, match="slot 1, 'b' holds NaN or infinity"):
        policy.act(observation)


def test_a_reward_that_is_no_number_is_refused_by_slot():
    class Broken(Echo):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, float("nan"), *rest

    with pytest.raises(ValueError, match="reward nan in slot 0"):
        PPO("MlpPolicy", Broken(), n_steps=4, seed=0).learn(4)


class Reusing(gym.Wrapper):
    """Hands out the same arrays again and again, and writes its next step into them."""

    def __init__(self, env):
        super().__init__(env)
        self.buffer = np.zeros(env.observation_space.shape, env.observation_space.dtype)

    def _fill(self, observation):
        self.buffer[...] = observation
        return self.buffer

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        return self._fill(observation), info

    def step(self, action):
        observation, *rest = self.env.step(action)
        return self._fill(observation), *rest


@pytest.mark.parametrize("cls", [PPO, REINFORCE])
def test_an_env_may_use_its_arrays_again(cls):
    settings = {"n_steps": 8} if cls is PPO else {"n_episodes": 4}

    def train(env, copy):
        mode = gym.vector.AutoresetMode.SAME_STEP
        envs = gym.vector.SyncVectorEnv([lambda: env], copy=copy, autoreset_mode=mode)
        return weights(cls("MlpPolicy", envs, seed=0, **settings).learn(24))

    space = spaces.Box(-1, 1, (3,))
    plain = train(Echo(space), copy=True)
    assert torch.equal(plain, train(Reusing(Echo(space)), copy=True))
    assert torch.equal(plain, train(Reusing(Echo(space)), copy=False))


@pytest.mark.parametrize("key", ["score", "ref_logprob", "kl", "response"])
def test_a_strangers_info_means_nothing_here(key):
    def train(info):
        agent = REINFORCE("MlpPolicy", Echo(info=info), n_episodes=4, seed=0).learn(12)
        return weights(agent), agent.latest

    plain, log = train({})
    same, logged = train({key: 7.0})
    assert torch.equal(plain, same)
    assert set(logged) == set(log) and not any(name.startswith("objective/") for name in logged)


@pytest.mark.parametrize(
    "space", [*OBSERVATIONS.values(), *ACTIONS.values(), spaces.Discrete(3, dtype=np.int8)], ids=str
)
def test_spaces_of_every_kind_survive_json(space):
    assert decode_space(encode_space(space)) == space


def test_a_checkpoint_goes_on_in_a_nested_observation(tmp_path):
    agent = PPO("MlpPolicy", Echo(NESTED), n_steps=4, seed=0).learn(4)
    agent.save(tmp_path)
    again = PPO.load(tmp_path, Echo(NESTED))
    ours, theirs = named_arrays(agent.last_obs), named_arrays(again.last_obs)
    assert list(ours) == ["camera/left", "camera/on", "pose/0", "pose/1"]
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert isinstance(from_named_arrays(NESTED, ours)["pose"], tuple)


def test_one_observation_is_told_from_a_batch_and_from_another_shape():
    assert is_single(NESTED, NESTED.sample())
    assert not is_single(spaces.Discrete(3), np.zeros(4))
    with pytest.raises(ValueError, match=r"expected an observation of shape \(3,\)"):
        is_single(spaces.Box(-1, 1, (3,)), np.zeros(4))
    with pytest.raises(ValueError, match="expected an observation of Dict"):
        is_single(spaces.Dict(a=spaces.Discrete(2)), np.zeros(3))


# Networks over images and feature extractors

IMAGE = spaces.Box(0, 255, (36, 40, 3), np.uint8)


class Halves(BaseFeaturesExtractor):
    """The mean of each half of a vector."""

    def __init__(self, observation_space, scale=1.0):
        super().__init__(observation_space, features_dim=2)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, observations):
        return self.scale * observations.unflatten(1, (2, -1)).mean(2)


def policy_for(name, space, critic="separate", **policy_kwargs):
    return make_policy(name, make_envs(Echo(space), 1), critic, policy_kwargs)


@pytest.mark.parametrize(
    "name, space, kwargs",
    [
        ("CnnPolicy", IMAGE, {"features_extractor_kwargs": {"features_dim": 8}}),
        ("MlpPolicy", spaces.Box(-1, 1, (4,)), {"features_extractor_class": Halves}),
        (
            "MultiInputPolicy",
            spaces.Dict(i=IMAGE, d=spaces.Discrete(3, start=2)),
            {"share_features_extractor": False},
        ),
    ],
)
def test_a_features_extractor_learns_with_the_policy_it_serves(name, space, kwargs):
    agent = PPO(name, Echo(space), n_steps=4, batch_size=4, n_epochs=1, policy_kwargs=kwargs, seed=0)
    assert isinstance(agent.policy, ExtractorPolicy)
    before = [p.detach().clone() for p in agent.policy.features_extractor.parameters()]
    agent.learn(4)
    moved = [
        not torch.equal(a, b)
        for a, b in zip(before, agent.policy.features_extractor.parameters(), strict=True)
    ]
    assert any(moved)


def test_acting_and_evaluating_agree_over_images_with_their_channels_last():
    torch.manual_seed(0)
    policy = CnnPolicy(IMAGE, spaces.Discrete(3), features_extractor_kwargs={"features_dim": 8})
    policy.generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        policy.action_head.weight.mul_(100)
    IMAGE.seed(0)
    observations = [np.stack([IMAGE.sample() for _ in range(2)]) for _ in range(2)]
    acted = [policy.act(observation) for observation in observations]
    actions = np.stack([a for a, *_ in acted], axis=1)
    new = policy.evaluate(rollout_of(policy, observations, actions))
    assert new.log_probs.detach().numpy() == pytest.approx(
        np.stack([p for _, p, _ in acted], axis=1), abs=1e-4
    )


def test_a_policy_is_chosen_by_what_is_shown():
    assert isinstance(policy_for("auto", IMAGE), CnnPolicy)
    assert type(policy_for("auto", spaces.Dict(i=IMAGE))) is ExtractorPolicy
    assert type(policy_for("auto", NESTED)) is MlpPolicy
    assert type(policy_for("MultiInputPolicy", NESTED)) is MlpPolicy
    with pytest.raises(ValueError, match='"CnnPolicy" takes images'):
        policy_for("CnnPolicy", spaces.Box(-1, 1, (4,)))
    with pytest.raises(ValueError, match="at least 36 pixels"):
        policy_for("CnnPolicy", spaces.Box(0, 255, (8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match='use "MlpPolicy"'):
        policy_for("MultiInputPolicy", spaces.Box(-1, 1, (4,)))


def test_actor_and_critic_may_differ_in_size_and_activation():
    policy = MlpPolicy(
        spaces.Box(-1, 1, (4,)),
        spaces.Discrete(2),
        net_arch={"pi": [8], "vf": []},
        activation_fn=nn.ELU,
        ortho_init=False,
    )
    assert [layer.out_features for layer in policy.trunk if isinstance(layer, nn.Linear)] == [8]
    assert len(policy.value_trunk) == 0 and (policy.value_head.weight == 0).all()
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    with torch.no_grad():
        expected = policy.action_head(nn.functional.elu(policy.trunk[0](torch.from_numpy(x)))).log_softmax(-1)
    assert policy.log_prob(x, np.zeros(5, int)) == pytest.approx(expected[:, 0].numpy(), abs=1e-5)
    with pytest.raises(ValueError, match='has the keys "pi" and "vf"'):
        MlpPolicy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2), net_arch={"qf": [8]})
