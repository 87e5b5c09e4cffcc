"""Switching from stable-baselines3 is an import line: what its users do with an agent works here."""

from __future__ import annotations

import csv

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, IdentityEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import (
    SubprocVecEnv,
    VecEnv,
    VecNormalize,
    VecTransposeImage,
    is_vecenv_wrapped,
)

from agents import GRPO, PPO, REINFORCE
from agents.algorithms.schedules import schedule_value
from agents.policies.base import Policy
from agents.policies.factory import CausalLMPolicy, MlpPolicy
from agents.runs.checkpoint import decode_argument
from tests.tiny import make_env
from textrl_env.errors import ArgumentError

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 0}


def weights(agent):
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


class Peek(BaseCallback):
    """Keeps what it sees, as strangers' callbacks do."""

    def __init__(self, stop_after: int | None = None):
        super().__init__()
        self.seen, self.stop_after = [], stop_after

    def _on_step(self):
        names = ("infos", "rewards", "actions", "new_obs", "dones")
        self.seen.append({name: self.locals[name] for name in names})
        return self.stop_after is None or self.n_calls < self.stop_after


# A stranger's script


def stranger(algorithm, folder):
    """A script written for stable-baselines3; only the class that it imports is another."""

    class SaveOnBest(BaseCallback):
        def __init__(self, check_freq, path, verbose=0):
            super().__init__(verbose)
            self.check_freq, self.path, self.best, self.saved = check_freq, path, -np.inf, 0

        def _on_step(self):
            if self.n_calls % self.check_freq == 0 and len(self.model.ep_info_buffer) > 0:
                mean = np.mean([info["r"] for info in self.model.ep_info_buffer])
                if mean > self.best:
                    self.best, self.saved = mean, self.saved + 1
                    self.model.save(self.path)
            return True

    class Log(BaseCallback):
        def _on_training_start(self):
            self.returns = []
            self.lr = self.model.lr_schedule(1.0)
            assert self.training_env.num_envs == self.model.n_envs == 2

        def _on_step(self):
            for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
                if done:
                    self.returns.append(info["episode"]["r"])
                    assert info["terminal_observation"].shape == self.model.observation_space.shape
            self.logger.record("mine/reward", float(np.mean(self.locals["rewards"])))
            return True

        def _on_rollout_end(self):
            self.rollouts = getattr(self, "rollouts", 0) + 1

    env = make_vec_env("CartPole-v1", n_envs=2, seed=1)
    env = VecNormalize(env, norm_obs=True, norm_reward=True, clip_obs=10.0)
    model = algorithm(
        "MlpPolicy",
        env,
        learning_rate=lambda progress: 3e-4 * progress,
        n_steps=32,
        batch_size=16,
        n_epochs=2,
        gamma=0.98,
        ent_coef=0.01,
        policy_kwargs={
            "net_arch": {"pi": [16], "vf": [16]},
            "activation_fn": torch.nn.ReLU,
            "ortho_init": True,
        },
        verbose=0,
        seed=0,
    )
    save, log = SaveOnBest(16, str(folder / "best")), Log()
    monitored = make_vec_env("CartPole-v1", 1, wrapper_class=Monitor)
    held_out = VecNormalize(monitored, training=False, norm_reward=False)
    evaluation = EvalCallback(held_out, eval_freq=32, n_eval_episodes=1, verbose=0)
    model.learn(
        128, callback=CallbackList([save, log, evaluation, LogEveryNTimesteps(64)]), log_interval=None
    )
    model.save(folder / "last")
    env.save(str(folder / "normalize.pkl"))
    mean, _ = evaluate_policy(model, model.get_env(), n_eval_episodes=2)
    loaded = algorithm.load(str(folder / "last.zip"), env=env)
    observation = loaded.get_env().reset()
    action, _ = loaded.predict(observation, deterministic=True)
    loaded.learn(64, reset_num_timesteps=False)
    return save, log, mean, action, loaded.num_timesteps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("algorithm", [PPO, stable_baselines3.PPO], ids=["ours", "theirs"])
def test_a_strangers_script_runs_by_changing_the_import(algorithm, tmp_path):
    save, log, mean, action, steps = stranger(algorithm, tmp_path)
    assert save.saved >= 1 and log.returns and log.rollouts == 2 and log.lr == pytest.approx(3e-4)
    assert mean > 0 and action.shape == (2,) and steps == 192
    # Monitor counts before VecNormalize scales: an episode of CartPole pays 1 a step.
    assert all(r == int(r) and r >= 5 for r in log.returns)


# What it is made of, read and written


@pytest.mark.filterwarnings("ignore:.*has no name that a checkpoint")
def test_a_schedule_without_a_name_comes_back_as_a_table_of_it(tmp_path):
    curved = PPO("MlpPolicy", "CartPole-v1", learning_rate=lambda done: 1e-3 * done**2, **SMALL)
    curved.save(tmp_path / "agent.zip")
    loaded = PPO.load(tmp_path / "agent.zip")
    assert loaded.learning_rate.__name__ == "<lambda>"
    for progress in (0.0, 0.123456, 0.5, 1.0):
        assert loaded.lr_schedule(progress) == pytest.approx(curved.lr_schedule(progress), abs=1e-9)
    loaded.save(tmp_path / "again")  # a table of a table is the same one
    again = PPO.load(tmp_path / "again")
    assert (again.learning_rate.values == loaded.learning_rate.values).all()


def test_its_schedules_come_back_as_what_they_are(tmp_path):
    agent = PPO("MlpPolicy", "CartPole-v1", learning_rate=LinearSchedule(1e-3, 1e-4, 0.5), **SMALL)
    agent.save(tmp_path / "agent")
    schedule = PPO.load(tmp_path / "agent").learning_rate
    assert isinstance(schedule, LinearSchedule) and vars(schedule) == vars(agent.learning_rate)


@pytest.mark.parametrize("given", [0.1, "linear:0.2", lambda done: 0.3 * done])
def test_the_clip_range_is_a_function_and_equals_what_was_given(given):
    agent = PPO("MlpPolicy", "CartPole-v1", clip_range=given, clip_range_vf=given, **SMALL)
    for clip in (agent.clip_range, agent.clip_range_vf):
        assert isinstance(clip, FloatSchedule) and clip == given and clip != 0.7
        assert clip(0.5) == schedule_value(given, 0.5) and type(clip(0.5)) is float
    agent.clip_range = 0.25  # what a callback may do
    agent.learn(16)
    assert agent.latest["train/clip_range"] == 0.25


def test_callbacks_read_the_last_update_and_nothing_is_written_twice(tmp_path):
    class Read(BaseCallback):
        def _on_step(self):
            self.seen = [*getattr(self, "seen", []), self.logger.name_to_value.get("train/loss")]
            return True

    agent, read = PPO("MlpPolicy", "CartPole-v1", **SMALL), Read()
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(48, callback=[read, LogEveryNTimesteps(8)], log_interval=1)
    assert read.seen[15] is None and len({*read.seen[16:23]}) == 1 and read.seen[16] is not None
    with open(tmp_path / "progress.csv") as file:
        losses = [row["train/loss"] for row in csv.DictReader(file)]
    written = [loss for loss in losses if loss]
    assert (
        len(written) == 3 and len(losses) > 6
    )  # one update for each rollout, whoever asks for lines in between
    assert agent.logger.name_to_value["train/loss"] == pytest.approx(float(written[-1]))


def test_a_checkpoint_leaves_out_and_takes_in_what_it_is_told_to(tmp_path):
    agent = PPO("MlpPolicy", "CartPole-v1", gamma=0.9, verbose=0, **SMALL)
    agent.save(tmp_path / "without", exclude=["gamma", "a_name_of_nothing"])
    assert PPO.load(tmp_path / "without").gamma == 0.99
    agent.verbose = 2
    agent.save(tmp_path / "with", exclude=["verbose"], include=["verbose"])
    assert PPO.load(tmp_path / "with").verbose == 2
    with pytest.raises(ArgumentError, match=r"include=\['thoughts'\].*names no argument of PPO"):
        agent.save(tmp_path / "with", include=["thoughts"])


# Its networks


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_a_policy_is_saved_and_loaded_without_its_agent(policy, tmp_path):
    env = FakeImageEnv(screen_height=36, screen_width=36) if policy == "CnnPolicy" else "CartPole-v1"
    kwargs = {"net_arch": [8], "activation_fn": torch.nn.ELU}
    agent = PPO(policy, env, policy_kwargs=kwargs, **SMALL)
    agent.policy.save(tmp_path / "policy.pkl")
    loaded = type(agent.policy).load(tmp_path / "policy.pkl")
    observation = agent.env.single_observation_space.sample()
    batch = np.stack([observation] * 3)
    assert all(torch.equal(w, loaded.state_dict()[name]) for name, w in agent.policy.state_dict().items())
    assert loaded.predict(batch, deterministic=True)[0].tolist() == (
        agent.policy.predict(batch, deterministic=True)[0].tolist()
    )
    assert isinstance(Policy.load(tmp_path / "policy.pkl"), type(agent.policy))
    with pytest.raises(ValueError, match="not a CausalLMPolicy"):
        CausalLMPolicy.load(tmp_path / "policy.pkl")
    assert (tmp_path / "policy.pkl").read_bytes()[8:9] == b"{"  # safetensors, whatever the name ends in


def test_a_policy_s_file_names_no_code_that_is_not_trusted(tmp_path):
    class Mine(MlpPolicy):
        pass

    Mine.__qualname__, Mine.__module__ = "Mine", "somebody_else"
    Mine(gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)).save(tmp_path / "policy.safetensors")
    with pytest.raises(ImportError, match="somebody_else"):
        Policy.load(tmp_path / "policy.safetensors")
    assert isinstance(Mine.load(tmp_path / "policy.safetensors"), Mine)  # the caller has it in hand
    with pytest.raises(TypeError, match=r"policy\.save_pretrained"):
        PPO("CausalLMPolicy", make_env()).policy.save(tmp_path / "lm")


def test_one_discrete_action_is_an_array_that_a_dict_can_be_asked_for():
    agent = PPO("MlpPolicy", "FrozenLake-v1", **SMALL)
    action, _ = agent.predict(0)
    assert isinstance(action, np.ndarray) and action.shape == () and agent.action_space.contains(action)
    assert {0: "a", 1: "b", 2: "c", 3: "d"}[action] == "abcd"[int(action)]
    env = gym.make("FrozenLake-v1")
    env.reset(seed=0)
    env.step(action)  # which looks it up in a dict


def test_noise_that_is_a_function_of_the_state_is_learned_as_there(tmp_path):
    kwargs = {
        "use_sde": True,
        "sde_sample_freq": 4,
        "n_steps": 16,
        "batch_size": 16,
        "n_epochs": 1,
        "seed": 0,
    }
    agent = PPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [8], "log_std_init": -1.0}, **kwargs)
    theirs = StateDependentNoiseDistribution(1)
    theirs.proba_distribution_net(8, log_std_init=-1.0)
    out = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    actions = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    mean, hidden = torch.from_numpy(out[:, :1]), torch.from_numpy(out[:, 1:])
    theirs.proba_distribution(mean, agent.policy.log_std.detach(), hidden)
    mine = agent.policy.distribution
    expected = theirs.log_prob(torch.from_numpy(actions)).numpy()
    assert mine.log_prob(out, actions) == pytest.approx(expected, abs=1e-5)
    log_probs, entropy = mine.evaluate(torch.from_numpy(out), torch.from_numpy(actions))
    assert log_probs.detach().numpy() == pytest.approx(expected, abs=1e-5)
    assert entropy.detach().numpy() == pytest.approx(theirs.entropy().numpy(), abs=1e-5)
    # Between two draws the noise is one function: the same state, the same action.
    agent.policy.reset_noise(5)
    first = mine.draw(out, agent.policy.generator)
    assert (mine.draw(out, agent.policy.generator) == first).all()
    agent.policy.reset_noise(5)
    assert (mine.draw(out, agent.policy.generator) != first).all()
    agent.learn(64)
    agent.save(tmp_path / "agent")
    assert PPO.load(tmp_path / "agent", env="Pendulum-v1").learn(32).policy.distribution.reads_hidden
    with pytest.raises(ValueError, match="use_sde=True explores with continuous actions"):
        PPO("MlpPolicy", "CartPole-v1", use_sde=True)
    with pytest.raises(AssertionError, match="squash_output is left out"):
        PPO("MlpPolicy", "Pendulum-v1", policy_kwargs={"squash_output": True})


def test_images_are_shown_as_the_policy_reads_them_and_taken_either_way():
    agent = PPO("CnnPolicy", FakeImageEnv(screen_height=36, screen_width=40, n_channels=1), **SMALL)
    envs = agent.get_env()
    assert is_vecenv_wrapped(envs, VecTransposeImage) and envs.observation_space.shape == (1, 36, 40)
    shown = envs.reset()
    as_given = np.moveaxis(shown, 1, -1)
    for pair in ((shown, as_given), (shown[0], as_given[0])):
        first, second = (agent.predict(each, deterministic=True)[0] for each in pair)
        assert (first == second).all()
    agent.set_env(envs)  # the one that it has
    agent.learn(16)
    assert evaluate_policy(agent, envs, n_eval_episodes=1)[0] == 0.0


def test_a_gpu_that_is_not_there_is_the_cpu_and_that_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.warns(UserWarning, match="there is no GPU here: the CPU is used"):
        agent = PPO("MlpPolicy", "CartPole-v1", device="cuda", **SMALL)
    assert agent.device.type == agent.policy.device.type == "cpu"


def test_a_compiled_policy_is_saved_as_the_policy_that_it_is(tmp_path):
    agent = PPO("MlpPolicy", "CartPole-v1", **SMALL)
    agent.policy = torch.compile(agent.policy)
    agent.save(tmp_path / "agent")
    assert torch.equal(weights(PPO.load(tmp_path / "agent")), weights(agent))


# Its environments


def test_an_env_that_draws_from_its_action_space_is_seeded_too():
    starts = []
    for _ in range(2):
        agent = PPO("MlpPolicy", IdentityEnv(1000), **SMALL)
        starts.append(agent.get_env().reset().tolist())
    assert starts[0] == starts[1]


def test_env_is_what_get_env_returns_and_reaches_gymnasiums_vector_env():
    agent = PPO("MlpPolicy", "TokenTree-v0", n_envs=2, **SMALL)
    assert agent.env is agent.get_env() and agent.env.observation_space == agent.observation_space
    assert set(agent.env.reset()) == {"input_ids", "attention_mask"}  # no info beside it
    assert agent.env.unwrapped is agent.envs.unwrapped
    assert agent.env.single_action_space == agent.action_space and agent.env.kl_coef == agent.kl_coef
    with pytest.raises(AttributeError, match="no attribute '_private'"):
        agent.env._private  # noqa: B018
    given = make_vec_env("CartPole-v1", 2)
    assert PPO("MlpPolicy", given, **SMALL).env is given


def test_another_number_of_slots_is_refused_with_the_next_step():
    agent = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SMALL)
    with pytest.raises(AssertionError, match=r"num_envs=3, expected 2.*load\(path, env="):
        agent.set_env(make_vec_env("CartPole-v1", 3))


def test_its_vector_envs_give_the_rollouts_that_gymnasiums_do():
    makers = [lambda: gym.make("CartPole-v1")] * 2
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    ours = PPO("MlpPolicy", envs, **SMALL)
    theirs = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SMALL)
    for agent in (ours, theirs):
        agent.learn(64)
    assert torch.equal(weights(ours), weights(theirs))
    assert ours.ep_info_buffer[0]["l"] == theirs.ep_info_buffer[0]["l"]


def test_get_env_is_what_was_given_or_steps_like_a_vec_env():
    given = make_vec_env("CartPole-v1", 2)
    agent = PPO("MlpPolicy", given, **SMALL)
    assert agent.get_env() is given and agent.get_vec_normalize_env() is None
    normalized = VecNormalize(given)
    assert PPO("MlpPolicy", normalized, **SMALL).get_vec_normalize_env() is normalized
    for env in (
        gym.make_vec("CartPole-v1", num_envs=2),
        gym.make_vec("LineWorld-v0", num_envs=2),
    ):  # NEXT_STEP, SAME_STEP
        agent = PPO("MlpPolicy", env, **SMALL).learn(32)
        envs = agent.get_env()
        assert isinstance(envs, VecEnv) and agent.get_env() is envs
        actions, _ = agent.predict(envs.reset())
        _, rewards, dones, infos = envs.step(actions)
        assert rewards.shape == dones.shape == (2,) and len(infos) == 2
        assert agent.last_obs is None  # the episode that it was in is over
        before = agent.num_timesteps
        agent.learn(32, reset_num_timesteps=False)
        assert agent.num_timesteps >= before + 32


def test_an_evaluation_counts_no_reset_as_a_step():
    agent = PPO("MlpPolicy", gym.make_vec("CartPole-v1", num_envs=2), **SMALL)  # NEXT_STEP autoreset
    returns, lengths = evaluate_policy(agent, agent.get_env(), n_eval_episodes=6, return_episode_rewards=True)
    assert returns == lengths  # CartPole pays 1 for each step


def test_text_in_worker_processes_is_refused():
    envs = SubprocVecEnv([lambda: gym.make("TokenTree-v0")], start_method="fork")
    try:
        with pytest.raises(ValueError, match="worker processes"):
            PPO("MlpPolicy", envs, **SMALL)
    finally:
        envs.close()


# Callbacks


@pytest.mark.parametrize("env", ["CartPole-v1", "LineWorld-v0", "text"])
def test_callbacks_find_one_entry_for_each_env_in_their_locals(env):
    if env == "text":
        agent, count = REINFORCE("auto", make_env(2), n_episodes=4, seed=0), 4
    else:
        agent, count = PPO("MlpPolicy", env, n_envs=2, **SMALL), 2
    peek = Peek()
    agent.learn(120 if env == "CartPole-v1" else 40, callback=peek)
    ended = 0
    for seen in peek.seen:
        assert {len(seen[name]) for name in ("infos", "rewards", "actions", "dones")} == {count}
        for info, done in zip(seen["infos"], seen["dones"], strict=True):
            assert ("episode" in info) == bool(done)
            ended += bool(done)
    assert ended == len(agent.ep_info_buffer) or len(agent.ep_info_buffer) == 100
    assert all({"r", "l", "t"} <= set(info) for info in agent.ep_info_buffer)
    if env == "text":
        first = peek.seen[0]["new_obs"]
        assert first["input_ids"].shape == first["attention_mask"].shape and len(first["input_ids"]) == 4


@pytest.mark.parametrize("cls", [PPO, REINFORCE, GRPO])
def test_a_callback_that_returns_false_stops_within_a_step(cls):
    settings = {"n_steps": 64} if cls is PPO else {"n_episodes": 8}
    agent = cls("MlpPolicy", "CartPole-v1", n_envs=1, seed=0, **settings)
    before = weights(agent)
    agent.learn(10_000, callback=Peek(stop_after=3))
    assert agent.num_timesteps == 3 and torch.equal(before, weights(agent))


def test_text_stops_within_a_token_of_its_batch():
    agent = REINFORCE("auto", make_env(2), n_episodes=4, seed=0)
    agent.learn(10_000, callback=Peek(stop_after=1))
    assert agent.num_timesteps == 4  # the first token of four episodes


def test_its_own_callbacks_save_evaluate_and_stop(tmp_path):
    agent = PPO("MlpPolicy", "CartPole-v1", **SMALL)
    callbacks = [CheckpointCallback(16, str(tmp_path), "step"), StopTrainingOnMaxEpisodes(2)]
    agent.learn(10_000, callback=callbacks)
    assert len(agent.ep_info_buffer) == 2
    assert PPO.load(tmp_path / "step_16_steps.zip").num_timesteps == 16


# Going on


def test_learn_in_a_loop_goes_on_with_new_data():
    asked = []

    def reward(prompts, completions):
        asked[-1] += list(completions)
        return [0.0] * len(prompts)

    agent = REINFORCE("auto", make_env(2, reward=reward), n_episodes=4, seed=0, learning_rate=0.0)
    for _ in range(3):
        asked.append([])
        agent.learn(1)
    assert asked[0] != asked[1] != asked[2]
    walker = PPO("MlpPolicy", "CartPole-v1", **SMALL)
    firsts = [_first_observation(walker) for _ in range(4)]
    assert len({tuple(first) for first in firsts}) == 4 and walker.num_timesteps == 16


def _first_observation(agent):
    peek = Peek()
    agent.learn(16, callback=peek)
    return peek.seen[0]["new_obs"][0].tolist()


def test_one_seed_is_one_run_and_set_random_seed_starts_it_anew():
    first, second = (PPO("MlpPolicy", "CartPole-v1", **SMALL) for _ in range(2))
    assert _first_observation(first) == _first_observation(second)
    assert torch.equal(weights(first), weights(second))
    runs = []
    for _ in range(2):
        first.set_random_seed(7)
        runs.append(_first_observation(first))
    assert runs[0] == runs[1] != _first_observation(second)


def test_an_env_without_an_end_is_given_up_with_advice():
    class Endless(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 0.0, False, False, {}

    agent = REINFORCE("MlpPolicy", Endless(), n_episodes=2, seed=0)
    with pytest.raises(RuntimeError, match="TimeLimit"):
        agent.learn(64)
    assert agent.num_timesteps <= 11_000
    REINFORCE("MlpPolicy", gym.wrappers.TimeLimit(Endless(), 5), n_episodes=2, seed=0).learn(10)


# Parameters, saving, arguments


def test_parameters_are_taken_out_and_put_back():
    agent, other = (PPO("MlpPolicy", "LineWorld-v0", n_steps=4, seed=seed) for seed in (0, 1))
    parameters = agent.get_parameters()
    assert set(parameters) == {"policy", "policy.optimizer"}
    other.set_parameters(parameters)
    assert torch.equal(weights(agent), weights(other))
    with pytest.raises(ValueError, match=r"unknown: \['critic'\]"):
        other.set_parameters({"critic": {}}, exact_match=False)
    with pytest.raises(ValueError, match=r"missing: \['policy.optimizer'\]"):
        other.set_parameters({"policy": parameters["policy"]})
    other.set_parameters({"policy": parameters["policy"]}, exact_match=False)


def test_a_name_with_zip_is_a_file_and_both_names_find_either(tmp_path):
    agent = PPO("MlpPolicy", "LineWorld-v0", n_steps=4, seed=0).learn(8)
    agent.save(tmp_path / "folder")
    agent.save(str(tmp_path / "file.zip"))
    assert (tmp_path / "folder" / "agent.json").is_file() and (tmp_path / "file.zip").is_file()
    with open(tmp_path / "stream", "w+b") as stream:
        agent.save(stream)
        stream.seek(0)
        streamed = PPO.load(stream)
    for name in ("folder", "folder.zip", "file", "file.zip"):
        assert torch.equal(weights(PPO.load(tmp_path / name)), weights(agent))
    assert torch.equal(weights(streamed), weights(agent))
    loaded = PPO.load(tmp_path / "file", custom_objects={"learning_rate": 1e-5, "nonsense": 1})
    assert loaded.learning_rate == 1e-5


def test_parts_of_a_network_come_back_by_name_and_nothing_else_does(tmp_path):
    kwargs = {"activation_fn": torch.nn.ELU, "optimizer_class": torch.optim.SGD}
    PPO("MlpPolicy", "LineWorld-v0", policy_kwargs=kwargs, **SMALL).save(tmp_path)
    loaded = PPO.load(tmp_path)
    assert loaded.policy.activation_fn is torch.nn.ELU and isinstance(loaded.optimizer, torch.optim.SGD)
    for name in (["torch.nn", "Module.forward"], ["torch.nn", "functional"], ["os", "system"], "torch.nn"):
        with pytest.raises(ValueError, match="part of a network"):
            decode_argument({"__part__": name})


def test_a_file_of_stable_baselines3_is_refused_unread(tmp_path):
    stable_baselines3.PPO("MlpPolicy", "LineWorld-v0", n_steps=4, batch_size=4).save(tmp_path / "theirs")
    with pytest.raises(ValueError, match="pickle, which is not read here"):
        PPO.load(tmp_path / "theirs")


def test_old_habits_are_understood_or_named():
    with pytest.warns(UserWarning, match="old form"):
        agent = PPO("MlpPolicy", "CartPole-v1", policy_kwargs={"net_arch": [{"vf": [8]}]}, **SMALL)
    assert agent.policy.net_arch == {"pi": [], "vf": [8]}
    with pytest.raises(ValueError, match=r"got \(observation, info\)"):
        agent.predict(gym.make("CartPole-v1").reset())
    with pytest.raises(AssertionError, match="clip_range"):  # a ValueError, too
        PPO("MlpPolicy", "CartPole-v1", clip_range=-0.2)

    with pytest.raises(TypeError, match=r"takes no rollout_buffer_class: .*agents\.Rollout"):
        PPO("MlpPolicy", "CartPole-v1", rollout_buffer_class=dict)

    class Old(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2)

        def reset(self, seed=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 0.0, True, False, {}

    assert PPO("MlpPolicy", Old(), **SMALL).learn(16).num_timesteps == 16


def test_its_policy_classes_and_optimizers_are_understood():
    agent = PPO(
        ActorCriticPolicy,
        "LineWorld-v0",
        policy_kwargs={
            "optimizer_class": torch.optim.SGD,
            "optimizer_kwargs": {"momentum": 0.5},
            "net_arch": None,
        },
        **SMALL,
    )
    assert isinstance(agent.optimizer, torch.optim.SGD) and agent.optimizer.defaults["momentum"] == 0.5
    before = weights(agent).clone()
    assert not torch.equal(before, weights(agent.learn(16)))
    with pytest.raises(TypeError, match=r"subclass of agents\.Policy"):
        PPO(stable_baselines3.PPO, "LineWorld-v0")


@pytest.mark.parametrize(
    "name, value",
    [
        ("clip_range", -0.2),
        ("clip_range", 0.0),
        ("clip_range_vf", -1.0),
        ("learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("n_steps", 1),
        ("batch_size", 1),
        ("ent_coef", -0.1),
        ("max_grad_norm", float("inf")),
        ("target_kl", 0.0),
        ("stats_window_size", 0),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        PPO("MlpPolicy", "LineWorld-v0", **{name: value})
