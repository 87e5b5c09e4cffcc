"""The agents' surface is stable-baselines3's, and so is one update of PPO; logs, callbacks and plug-ins."""

from __future__ import annotations

import csv
import inspect
from contextlib import nullcontext
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env as make_sb3_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import GRPO, PPO, REINFORCE, Agent, Rollout, presets, process
from agents.algorithms import maths
from agents.cli import main
from agents.evaluation.diversity import distinct_n
from agents.process import fitting_threads, tuned_process
from agents.rollouts.vector_envs import bind_policy
from benchmarks.sb3_cartpole import copy_weights, layers_of, share_luck
from tests.tiny import PROMPTS, count_a, id_sum, make_env

AGENTS = {
    "PPO": (PPO, {"n_steps": 16, "batch_size": 16, "n_epochs": 2}),
    "REINFORCE": (REINFORCE, {"n_episodes": 8}),
    "GRPO": (GRPO, {"n_episodes": 8, "group_size": 4}),
}
every_agent = pytest.mark.parametrize("agent", AGENTS)


def make(agent: str, env="ToyBandit-v0", **kwargs) -> Agent:
    cls, settings = AGENTS[agent]
    settings = dict(settings)
    if isinstance(env, str):
        settings["n_envs"] = 4
    elif agent == "PPO" and hasattr(env, "run_episodes"):
        settings["n_episodes"] = 8
    return cls("auto", env, **({"seed": 0} | settings | kwargs))


# Against stable-baselines3


def twins(observation_space, action_space):
    """stable-baselines3's PPO and ours with the same weights."""

    class Blank(gym.Env):
        def __init__(self):
            self.observation_space, self.action_space = observation_space, action_space

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 0.0, False, False, {}

    settings = {
        "n_steps": 64,
        "batch_size": 64,
        "n_epochs": 4,
        "learning_rate": 1e-3,
        "gamma": 0.97,
        "gae_lambda": 0.9,
        "ent_coef": 0.01,
        "seed": 0,
        "device": "cpu",
    }
    theirs = sb3.PPO("MlpPolicy", Blank(), **settings)
    ours = PPO("MlpPolicy", Blank(), **settings)
    copy_weights(theirs, ours)
    return theirs, ours


@pytest.mark.parametrize(
    "action_space", [spaces.Discrete(3), spaces.Box(-1, 1, (2,))], ids=["discrete", "continuous"]
)
def test_one_update_of_ppo_gives_the_weights_that_stable_baselines3s_gives(action_space):
    theirs, ours = twins(spaces.Box(-1, 1, (4,)), action_space)
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (64, 1, 4)).astype(np.float32)
    rewards, done = rng.normal(size=64), rng.random(64) < 0.15
    theirs._setup_learn(10**6)
    buffer = theirs.rollout_buffer
    buffer.reset()
    starts = np.ones(1)
    for t in range(64):
        with torch.no_grad():
            action, value, log_prob = theirs.policy(torch.from_numpy(observations[t]))
        stored = action.numpy().reshape(1, -1)
        buffer.add(observations[t], stored, rewards[t : t + 1], starts, value, log_prob)
        starts = done[t : t + 1]
    last = theirs.policy.predict_values(torch.from_numpy(observations[0])).detach()
    buffer.compute_returns_and_advantage(last, starts)

    def row(array):  # [T, 1] -> [1, T]
        return torch.from_numpy(np.asarray(array, dtype=np.float32)).reshape(1, 64)

    values, mask, ends = buffer.values.T.copy(), np.ones((1, 64), bool), done[None]
    following = maths.shift_values(values, last.numpy()[0], mask, ends)
    shape = (1, 64) if isinstance(action_space, spaces.Discrete) else (1, 64, 2)
    rollout = Rollout(
        inputs={"features": torch.from_numpy(observations.reshape(1, 64, 4).copy())},
        actions=torch.from_numpy(buffer.actions.reshape(shape).copy()),
        rewards=row(rewards),
        log_probs=row(buffer.log_probs),
        values=row(values),
        next_values=row(following),
        mask=torch.from_numpy(mask),
        done=torch.from_numpy(ends),
    )
    theirs.train()
    ours.train(rollout)
    for mine, layer in layers_of(theirs, ours):
        for key, weight in layer.state_dict().items():
            assert mine.state_dict()[key] == pytest.approx(weight, abs=2e-5), key
    logged, expected = ours.logger.name_to_value, theirs.logger.name_to_value
    for name in ("policy_gradient_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction"):
        assert logged[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], abs=1e-3), name
    assert logged["train/explained_variance"] == pytest.approx(expected["train/explained_variance"], abs=1e-2)


def test_ppo_walks_step_for_step_as_stable_baselines3s_does_time_limits_and_schedules_included():
    """Both draw their actions from one stream of uniform numbers; everything else is each library's own."""
    slots, limit, rollouts = 8, 40, 6
    settings = {"n_steps": 32, "batch_size": 256, "n_epochs": 4, "gamma": 0.98, "gae_lambda": 0.8, "seed": 0}
    theirs = sb3.PPO(
        "MlpPolicy",
        make_sb3_vec_env("CartPole-v1", slots, seed=0, env_kwargs={"max_episode_steps": limit}),
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
        device="cpu",
        **settings,
    )
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.make_vec("CartPole-v1", slots, "sync", max_episode_steps=limit, vector_kwargs=same_step)
    ours = PPO("MlpPolicy", envs, learning_rate="linear:1e-3", clip_range="linear:0.2", **settings)
    walked = share_luck(theirs, ours, 0)
    for agent in (theirs, ours):
        agent.learn(rollouts * 32 * slots)
    assert np.array_equal(walked["theirs"], walked["ours"])
    assert max(ours.episodes.lengths) == limit
    for mine, layer in layers_of(theirs, ours):
        for key, weight in layer.state_dict().items():
            assert mine.state_dict()[key] == pytest.approx(weight, abs=2e-5), key


def test_signatures_are_those_of_stable_baselines3():
    for name in ("learn", "predict"):
        theirs = list(inspect.signature(getattr(sb3.PPO, name)).parameters)
        assert list(inspect.signature(getattr(PPO, name)).parameters) == theirs
    ours, theirs = (inspect.signature(cls.__init__).parameters for cls in (PPO, sb3.PPO))
    base = inspect.signature(Agent.__init__).parameters
    shared = [name for name in theirs if name in ours]
    assert set(shared) > {
        "policy",
        "env",
        "learning_rate",
        "n_steps",
        "batch_size",
        "clip_range_vf",
        "target_kl",
    }
    for name in shared:
        if name in presets.DEFAULTS:  # None there: theirs where a network is trained, others on text
            assert presets.default(name, PPO, "network") == theirs[name].default, name
        elif name not in ("gamma", "policy", "env"):
            assert ours[name].default == theirs[name].default, name
    toy = PPO("MlpPolicy", "ToyBandit-v0", seed=0)
    assert (toy.gamma, toy.n_epochs) == (theirs["gamma"].default, theirs["n_epochs"].default)
    for name in ("tensorboard_log", "policy_kwargs", "verbose", "seed", "device", "stats_window_size"):
        assert name in base and name in theirs
    for name in ("save", "load", "get_env", "set_env", "logger", "set_logger"):
        assert hasattr(Agent, name)


@every_agent
def test_stable_baselines3s_evaluate_policy_takes_an_agent(agent):
    for learner, env in ((make(agent), gym.make("ToyBandit-v0")), (make(agent, make_env()), make_env())):
        if hasattr(env, "bind_policy"):
            bind_policy(env, learner.policy.log_prob)
        learner.learn(20)
        mean, std = evaluate_policy(learner, env, n_eval_episodes=3, warn=False)
        assert np.isfinite(mean) and np.isfinite(std)


# Using an agent


@every_agent
def test_the_env_may_be_an_id_an_env_or_a_vector_env(agent):
    for env in (
        "LineWorld-v0",
        "textrl_env:LineWorld-v0",
        gym.make("LineWorld-v0"),
        gym.make_vec("LineWorld-v0", num_envs=4),
        gym.vector.SyncVectorEnv([lambda: gym.make("LineWorld-v0")] * 4),
    ):
        learner = make(agent, env, group_size=1) if agent == "GRPO" else make(agent, env)
        learner.learn(30)
        assert isinstance(learner.get_env(), VecEnv) and isinstance(learner.envs, gym.vector.VectorEnv)
        assert learner.num_timesteps >= 30


def test_timesteps_are_env_steps_and_on_text_tokens():
    learner = make("PPO").learn(100)
    assert learner.num_timesteps == 128  # two rollouts of 4 slots times 16 steps
    learner = make("REINFORCE", make_env())
    lengths = []
    learner.record_text_episodes = lambda episodes: lengths.append(int(episodes.mask.sum()))
    learner.learn(60)
    assert learner.num_timesteps == sum(lengths) >= 60


def test_learning_again_starts_over_or_goes_on():
    learner = make("PPO").learn(64)
    learner.learn(64)
    assert learner.num_timesteps == 64
    learner.learn(64, reset_num_timesteps=False)
    assert learner.num_timesteps == 128


@every_agent
def test_predict_takes_one_observation_or_a_batch(agent):
    learner = make(agent, make_env())
    env = make_env()
    observation, _ = env.reset(seed=0)
    action, state = learner.predict(observation, deterministic=True)
    assert env.action_space.contains(action) and state is None
    batch = {name: np.stack([value] * 3) for name, value in observation.items()}
    actions, _ = learner.predict(batch, state=None, episode_start=np.ones(3, bool), deterministic=True)
    assert actions.tolist() == [action] * 3
    assert make(agent).predict(np.int64(0))[0].shape == ()
    assert make(agent).predict(np.zeros(5, np.int64))[0].shape == (5,)


def test_unwrapped_text_envs_are_run_fused_and_wrapped_ones_stepped():
    class Changing(gym.vector.VectorWrapper):
        """May change anything."""

    statistics = gym.wrappers.vector.RecordEpisodeStatistics
    assert make("REINFORCE", make_env()).text_env is not None
    assert make("REINFORCE", statistics(make_env(2))).text_env is not None
    assert make("REINFORCE", Changing(make_env(2))).text_env is None
    assert make("REINFORCE", gym.wrappers.TransformReward(make_env(), lambda r: 2 * r)).text_env is None


def test_both_ways_give_rollouts_of_one_form():
    class Stepped(gym.vector.VectorWrapper):
        """Hides the fused way."""

    rollouts = []
    for env in (make_env(4, kl_coef=0.2), Stepped(make_env(4, kl_coef=0.2))):
        learner = make("GRPO", env)
        learner._set_up_learn(100, None, None, True, False)
        rollouts.append(learner.collect())
    fused, stepped = rollouts
    for name in ("actions", "rewards", "log_probs", "values", "mask", "done", "ref_log_probs", "penalties"):
        a, b = getattr(fused, name), getattr(stepped, name)
        assert a.dtype == b.dtype and a.ndim == b.ndim and len(a) == len(b), name
    assert fused.inputs.keys() == stepped.inputs.keys()
    assert fused.group.tolist() == stepped.group.tolist()


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_values_of_text_are_shifted_by_one_step_and_zero_after_the_end(critic):
    learner = make("PPO", make_env(), critic=critic)
    torch.nn.init.normal_(learner.policy.value_head.out.weight)
    learner._set_up_learn(100, None, None, True, False)
    rollout = learner.collect()
    for row in range(len(rollout)):
        n = int(rollout.lengths[row])
        assert rollout.next_values[row, : n - 1].tolist() == rollout.values[row, 1:n].tolist()
        assert rollout.next_values[row, n - 1] == 0
    values = learner.policy.evaluate(rollout).values.detach()
    assert rollout.values[rollout.mask].numpy() == pytest.approx(values[rollout.mask].numpy(), abs=1e-5)


def test_the_mean_baseline_of_reinforce_is_that_of_the_other_episodes():
    returns = torch.tensor([[3.0, 1.0], [5.0, 0.0], [10.0, 4.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    baseline = REINFORCE._mean_of_others(returns, mask)
    assert baseline[:, 0].tolist() == [7.5, 6.5, 4.0]
    assert baseline[[0, 2], 1].tolist() == [4.0, 1.0]
    alone = REINFORCE._mean_of_others(returns, torch.tensor([[True, True], [True, False], [True, False]]))
    assert alone[0, 1] == 7.5  # nobody else got that far: their mean over all steps


def test_target_kl_stops_the_passes_over_a_rollout():
    counts = []
    for target_kl in (None, 1e-6):
        learner = make("PPO", learning_rate=0.05, n_epochs=20, target_kl=target_kl)
        calls, update = [], learner.update
        learner.update = lambda *args, calls=calls, update=update: calls.append(1) or update(*args)
        learner.learn(1)
        counts.append(len(calls))
    assert counts[0] == 20 * 4 and 1 < counts[1] < 20


# Plug-ins


class Hinge(Agent):
    """A new method: its loss and nothing else."""

    whole_episodes = True

    def loss(self, batch, new):
        return (1 - batch.advantages * new.log_probs).relu(), {"margin": batch.advantages}


class BatchMean(GRPO):
    """A new advantage for an old method."""

    def advantages(self, rollout):
        scores = self.episode_scores(rollout)
        return (scores - scores.mean())[:, None] * rollout.mask


@pytest.mark.parametrize("cls", [Hinge, BatchMean])
@pytest.mark.parametrize("world", ["bandit", "cartpole", "text"])
def test_a_new_method_is_a_few_lines_and_runs_everywhere(cls, world):
    env = {"bandit": "ToyBandit-v0", "cartpole": "CartPole-v1", "text": None}[world] or make_env()
    settings = {"group_size": 4} if cls is BatchMean else {}
    learner = cls("auto", env, n_episodes=8, n_envs=4, seed=0, **settings)
    before = [p.clone() for p in learner.policy.parameters()]
    learner.learn(60)
    assert not all(torch.equal(a, b) for a, b in zip(before, learner.policy.parameters(), strict=True))
    if cls is Hinge:
        assert "train/margin" in learner.latest


# Callbacks


def test_callbacks_see_every_step_and_can_stop():
    class Count(BaseCallback):
        def __init__(self):
            super().__init__()
            self.events = []

        def _on_training_start(self):
            self.events.append("training start")

        def _on_rollout_start(self):
            self.events.append("rollout start")

        def _on_step(self):
            return self.n_calls < 20

        def _on_rollout_end(self):
            self.events.append("rollout end")

        def _on_training_end(self):
            self.events.append("training end")

    callback = Count()
    learner = make("PPO").learn(10**6, callback=callback)
    assert callback.n_calls == 20 and learner.num_timesteps == 80
    assert callback.events == ["training start", *["rollout start", "rollout end"] * 2, "training end"]
    assert callback.num_timesteps == 80 and callback.model is learner


@every_agent
def test_a_function_is_a_callback_and_false_stops(agent):
    seen = []
    make(agent).learn(10**6, callback=lambda locals_, globals_: seen.append(locals_) or len(seen) < 5)
    assert len(seen) >= 5 and all("dones" in locals_ for locals_ in seen)


@pytest.mark.parametrize("world", ["bandit", "text"])
@every_agent
def test_stable_baselines3s_callbacks_work(agent, world, tmp_path):
    env = "ToyBandit-v0" if world == "bandit" else make_env()
    judge = gym.make("ToyBandit-v0") if world == "bandit" else make_env()
    if world == "text":
        judge.bind_policy(lambda observation, action: -1.0)
    learner = make(agent, env)
    evaluation = EvalCallback(
        judge,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path / "log"),
        eval_freq=4,
        n_eval_episodes=2,
        verbose=0,
        warn=False,
    )
    checkpoints = CheckpointCallback(save_freq=4, save_path=str(tmp_path / "checkpoints"))
    stop = StopTrainingOnMaxEpisodes(max_episodes=10)
    learner.learn(10**5, callback=[evaluation, checkpoints, stop])
    assert learner.num_timesteps < 10**4
    assert (tmp_path / "log" / "evaluations.npz").is_file() and np.isfinite(evaluation.best_mean_reward)
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert saved and type(learner).load(saved[0]).num_timesteps > 0
    best = type(learner).load(tmp_path / "best" / "best_model")
    assert type(best) is type(learner)


def test_the_progress_bar_draws(capsys):
    make("PPO").learn(64, progress_bar=True)


# Logs


EVERYWHERE = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/fps",
    "time/total_timesteps",
    "time/time_elapsed",
    "time/rollout_seconds",
    "time/update_seconds",
    "train/entropy_loss",
    "train/grad_norm",
    "train/learning_rate",
    "train/loss",
    "train/n_updates",
    "train/policy_gradient_loss",
}
CLIPPED = {"train/approx_kl", "train/clip_fraction", "train/clip_range", "val/ratio", "val/ratio_var"}
WITH_CRITIC = {"train/explained_variance", "train/value_loss", "val/clipfrac"}
GROUPED = {"group/reward_std", "group/frac_zero_std"}
TEXT = {
    "objective/scores",
    "objective/kl",
    "objective/kl_coef",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/gold_scores",
    "rewards/count_a",
    "rewards/id_sum",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "completions/distinct_2",
    "time/score_seconds",
    "time/tokens_per_second",
    "memory/peak_mb",
}
OWN = {"PPO": CLIPPED | WITH_CRITIC, "GRPO": CLIPPED | GROUPED, "REINFORCE": set()}


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "progress.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("world", ["line", "text"])
@every_agent
def test_every_promised_name_is_logged(agent, world, tmp_path):
    env = "LineWorld-v0"
    if world == "text":
        env = make_env(reward=[count_a, id_sum], gold=id_sum)
    learner = make(agent, env)
    learner.set_logger(configure(str(tmp_path), ["csv"]))
    learner.learn(400)
    expected = EVERYWHERE | OWN[agent] | (TEXT if world == "text" else {"rollout/success_rate"})
    rows = rows_of(tmp_path)
    assert expected <= set(rows[-1]), expected - set(rows[-1])
    for name in expected:
        assert rows[-1][name] != "", name
    steps = [int(row["time/total_timesteps"]) for row in rows]
    assert steps == sorted(steps) and steps[-1] == learner.num_timesteps


def test_tensorboard_holds_the_same_names_and_the_table_of_samples(tmp_path):
    learner = make("PPO", make_env(), tensorboard_log=str(tmp_path)).learn(150, tb_log_name="run")
    (folder,) = tmp_path.iterdir()
    assert folder.name == "run_1"
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"objective/scores", "train/approx_kl", "rollout/ep_rew_mean"} <= scalars
    tables = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/table")]
    texts = [e.tensor_proto.string_val[0].decode() for tag in tables for e in events.Tensors(tag)]
    assert (
        len(texts) == len(events.Scalars("objective/scores")) > 1
    )  # one a line of the log, none overwritten
    assert texts[0].startswith("| prompt | response | score | kl_sum |")
    assert any(prompt in texts[0] for prompt in PROMPTS)
    assert learner.latest["samples/table"] == texts[-1]


def test_objective_figures_are_sums_over_responses_averaged_over_episodes():
    learner = make("REINFORCE", make_env(kl_coef=0.3, reward=id_sum), learning_rate=0.0)
    with torch.no_grad():
        learner.policy.model.lm_head.weight.mul_(1.5)
    episodes, keep = [], learner.record_text_episodes
    learner.record_text_episodes = lambda e: (episodes.append(e), keep(e))
    learner.learn(1)
    (e,) = episodes
    log = learner.latest
    assert log["objective/scores"] == pytest.approx(e.score.mean(), abs=1e-5)
    assert log["objective/kl"] == pytest.approx((e.log_prob - e.ref_logprob).sum(1).mean(), abs=1e-4)
    assert log["objective/non_score_reward"] == pytest.approx(-0.3 * e.kl.sum(1).mean(), abs=1e-4)
    total = log["objective/scores"] + log["objective/non_score_reward"]
    assert log["objective/rlhf_reward"] == pytest.approx(total, abs=1e-4)
    assert log["objective/entropy"] == pytest.approx(-e.log_prob.sum(1).mean(), abs=1e-4)
    lengths = e.mask.sum(1)
    assert log["completions/mean_length"] == pytest.approx(lengths.mean())
    assert (log["completions/min_length"], log["completions/max_length"]) == (lengths.min(), lengths.max())
    cut = np.mean([reason == "length" for reason in e.stop_reason])
    assert log["completions/clipped_ratio"] == pytest.approx(cut)
    assert log["rollout/ep_rew_mean"] == pytest.approx(log["objective/rlhf_reward"], abs=1e-4)


def test_the_log_interval_thins_the_log(tmp_path):
    for interval, expected in ((1, 8), (4, 2), (None, 0)):
        learner = make("PPO")
        folder = tmp_path / str(interval)
        learner.set_logger(configure(str(folder), ["csv"]))
        learner.learn(512, log_interval=interval)
        text = (folder / "progress.csv").read_text()
        assert len(text.splitlines()) == (expected + 1 if expected else 0)


def test_distinct_n_is_the_share_of_ngrams_that_differ():
    assert distinct_n(["a b c", "a b"], 2) == 2 / 3
    assert distinct_n(["a a a a"], 2) == 1 / 3
    assert distinct_n(["a"], 2) == 0.0


def test_nothing_computed_with_old_weights_survives_an_update():
    envs = make_env(4)
    learner = make("PPO", envs, learning_rate=0.05)
    learner._set_up_learn(100, None, None, True, False)
    observation, _ = envs.reset(seed=0)
    actions, before, _ = learner.policy.act(observation)
    learner.train(learner.collect())
    after = learner.policy.log_prob(observation, actions)
    learner.policy.weights_changed()
    assert after == pytest.approx(learner.policy.log_prob(observation, actions), abs=1e-6)
    assert after != pytest.approx(before, abs=1e-3)


def test_a_small_network_learns_on_one_thread_and_gives_the_others_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []
    try:
        with tuned_process():
            make("PPO").learn(64, callback=lambda *_: seen.append(torch.get_num_threads()) or True)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        with fitting_threads(torch.nn.Linear(2000, 1000)):  # two million parameters
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_learning_leaves_the_process_alone_that_does_not_ask(monkeypatch):
    """Threads are the caller's; the command line and ``tune_process`` ask."""
    asked = []
    monkeypatch.setattr(process, "fitting_threads", lambda module: asked.append("threads") or nullcontext())
    agent = REINFORCE("auto", make_env(2), n_episodes=2, seed=0)
    agent.learn(4)
    assert asked == []
    with process.tuned_process():
        agent.learn(4)
    assert asked == ["threads"]
    monkeypatch.setenv("TEXTRL_TUNE_PROCESS", "0")
    with process.tuned_process():
        agent.learn(4)
    assert len(asked) == 1
    monkeypatch.setenv("TEXTRL_TUNE_PROCESS", "1")
    agent.learn(4)
    assert len(asked) == 2
    monkeypatch.setenv("TEXTRL_TUNE_PROCESS", "yes")
    with pytest.raises(ValueError, match="TEXTRL_TUNE_PROCESS='yes': expected 0 or 1"):
        agent.learn(4)


def test_the_command_line_owns_its_process(monkeypatch):
    asked = []
    monkeypatch.setattr("agents.cli.make_app", lambda: lambda *_, **__: asked.append(process.is_tuned()))
    assert main(["envs"]) == 0
    assert asked == [True] and not process.is_tuned()


@pytest.mark.parametrize(
    "env",
    [
        lambda: gym.make("GridWorld-v0"),
        lambda: gym.make_vec("GridWorld-v0", num_envs=4, vectorization_mode="sync"),
        lambda: gym.make("TokenTree-v0"),
    ],
)
def test_groups_share_their_start_in_single_envs_and_vector_envs_of_them_too(env):
    agent = GRPO("MlpPolicy", env(), n_episodes=8, group_size=4, seed=0).learn(1)
    first = agent.collect().inputs["features"][:, 0].reshape(2, 4, -1)  # [groups, G, features]
    assert torch.equal(first, first[:, :1].expand_as(first))


def test_a_ppo_loaded_without_an_environment_keeps_its_passes(tmp_path):
    agent = PPO("MlpPolicy", "ToyBandit-v0", n_steps=8, n_envs=2, seed=0).learn(16)
    agent.save(tmp_path)
    assert PPO.load(tmp_path).n_epochs == agent.n_epochs == 10


def test_a_reward_that_does_not_always_apply_is_logged_over_where_it_does():
    def sometimes(prompts, completions):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    learner = PPO("auto", make_env(reward=[count_a, sometimes]), n_episodes=4, seed=0).learn(1)
    assert learner.latest["rewards/sometimes"] == 1.0
