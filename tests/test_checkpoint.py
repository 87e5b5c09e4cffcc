"""Saving, loading, and going on as if nothing had happened."""

from __future__ import annotations

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents import GRPO, PPO, REINFORCE, Agent
from agents.callbacks.guards import Guards
from agents.callbacks.kl_control import StopAtKL
from agents.callbacks.scale_guards import ScaleGuards
from agents.runs.callback_state import states_of
from agents.runs.checkpoint import decode_space, encode_space
from tests.tiny import count_a, id_sum, make_env, make_lm

AGENTS = {"PPO": PPO, "REINFORCE": REINFORCE, "GRPO": GRPO}


def halving(progress: float) -> float:
    """A schedule that can be found again by its name."""
    return 2e-3 * 0.5 ** (1 - progress)


class Surrogate(Agent):
    """A plug-in agent with an argument of its own."""

    whole_episodes = True

    def __init__(self, policy, env, sharpness: float = 1.0, **kwargs):
        super().__init__(policy, env, **kwargs)
        self.sharpness = sharpness

    def loss(self, batch, new):
        return -self.sharpness * new.log_probs * batch.advantages, {}


def text_env():
    return make_env(kl_coef=0.1, reward=id_sum)


def text_vector_env():
    return make_env(3, kl_coef=0.1, reward=id_sum)


WORLDS = {
    "bandit": lambda: "ToyBandit-v0",
    "line": lambda: "LineWorld-v0",
    "cartpole": lambda: "CartPole-v1",
    "pendulum": lambda: gym.make("Pendulum-v1", max_episode_steps=20),
    "text": text_env,
    "text-vector": text_vector_env,
}


def make(agent: str, world: str, **kwargs) -> Agent:
    env = WORLDS[world]()
    settings = {"n_episodes": 8, "seed": 0, "learning_rate": 1e-3}
    if isinstance(env, str):
        settings["n_envs"] = 4
    if agent == "PPO":
        settings |= {"batch_size": 8, "n_epochs": 2}
        if not world.startswith("text"):
            settings |= {"n_steps": 16, "n_episodes": None}
    if agent == "GRPO":
        settings |= {"group_size": 1 if world == "pendulum" else 4}
    if world.startswith("text"):
        settings["policy_kwargs"] = {"autocast": False}
    policy = "CausalLMPolicy" if world.startswith("text") else "MlpPolicy"
    return AGENTS[agent](policy, env, **(settings | kwargs))


def state(agent: Agent) -> dict[str, torch.Tensor]:
    found = {f"policy.{name}": tensor for name, tensor in agent.policy.state_dict().items()}
    for index, entries in agent.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    return found


def assert_bitwise(a: Agent, b: Agent) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("agent", AGENTS)
def test_a_resumed_run_ends_with_bitwise_the_weights_of_one_that_went_on(agent, world, tmp_path):
    agent = make(agent, world)
    agent.learn(100)
    agent.save(tmp_path / "checkpoint")
    torch.manual_seed(12345)  # the resumed run is in another process
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        resumed = type(agent).load(tmp_path / "checkpoint", env=WORLDS[world]())
    assert_bitwise(agent, resumed)
    before = agent.num_timesteps
    assert resumed.num_timesteps == before > 0 and resumed.n_updates == agent.n_updates
    resumed.learn(100, reset_num_timesteps=False)
    agent.learn(100, reset_num_timesteps=False)
    assert agent.num_timesteps == resumed.num_timesteps > before
    assert_bitwise(agent, resumed)
    assert agent.latest["rollout/ep_rew_mean"] == resumed.latest["rollout/ep_rew_mean"]


@pytest.mark.parametrize("world", ["line", "pendulum", "text"])
@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_loaded_without_an_env_predicts_the_same(agent, world, tmp_path):
    agent = make(agent, world).learn(50)
    agent.save(tmp_path)
    loaded = AGENTS[type(agent).__name__].load(tmp_path)
    observation, _ = agent.envs.reset(seed=1)
    expected, _ = agent.predict(observation, deterministic=True)
    got, _ = loaded.predict(observation, deterministic=True)
    # Continuous actions come out of matrix products, whose last bit depends on where the weights lie.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"without an environment.*env="):
        loaded.learn(10)


@pytest.mark.parametrize("agent", AGENTS)
def test_a_text_checkpoint_is_an_ordinary_hugging_face_folder(agent, tmp_path):
    agent = make(agent, "text").learn(50)
    agent.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        # The weights are the same to the bit; logits of weights at another address may differ in the last one.
        torch.testing.assert_close(model(ids).logits, agent.policy.model(ids).logits, atol=1e-5, rtol=0)
        before = agent.envs.envs[0].unwrapped.lm.model(ids).logits
        assert (model(ids).logits - before).abs().max() > 1e-3
    for name, weight in agent.policy.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a b")["input_ids"] == [3, 4]


@pytest.mark.parametrize("world", ["cartpole", "text"])
def test_a_checkpoint_holds_no_pickle(world, tmp_path):
    make("PPO", world).learn(20).save(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jinja"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        # What pickles, and the zip files that torch.save makes of them, begin with.
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_the_value_head_and_a_separate_critic_are_saved_too(tmp_path):
    for critic in ("shared", "separate"):
        agent = make("PPO", "text", critic=critic).learn(60)
        agent.save(tmp_path / critic)
        loaded = PPO.load(tmp_path / critic)
        observation, _ = agent.envs.reset(seed=1)
        values = agent.policy.predict_values(observation)
        assert (values != 0).all()
        assert loaded.policy.predict_values(observation) == pytest.approx(values, abs=1e-5)


def test_the_temperature_comes_back_with_the_policy(tmp_path):
    env = make_env(lm=make_lm(temperature=0.7))
    REINFORCE("CausalLMPolicy", env, n_episodes=4, seed=0).learn(10).save(tmp_path)
    assert REINFORCE.load(tmp_path).policy.lm.temperature == 0.7


def test_a_kl_coefficient_that_was_changed_on_the_way_comes_back(tmp_path):
    for world in ("text", "text-vector"):
        agent = make("PPO", world).learn(20)
        agent.kl_coef = 0.33
        agent.save(tmp_path / world)
        assert PPO.load(tmp_path / world, env=WORLDS[world]()).kl_coef == 0.33


def test_schedules_are_saved_by_name_and_what_has_none_is_warned_about(tmp_path):
    agent = make("PPO", "bandit", learning_rate=halving, clip_range="linear:0.2").learn(20)
    agent.save(tmp_path / "named")
    loaded = PPO.load(tmp_path / "named", env="ToyBandit-v0", trust_modules=[__name__])
    assert loaded.learning_rate is halving and loaded.clip_range == "linear:0.2"
    nameless = make("PPO", "bandit", learning_rate=lambda progress: 1e-3).learn(20)
    with pytest.warns(UserWarning, match=r"learning_rate=.*pass it again to load"):
        nameless.save(tmp_path / "nameless")
    assert PPO.load(tmp_path / "nameless", env="ToyBandit-v0", learning_rate=halving).learning_rate is halving
    assert PPO.load(tmp_path / "nameless", env="ToyBandit-v0").learning_rate(0.3) == 1e-3


def test_constructor_arguments_come_back_and_can_be_replaced(tmp_path):
    agent = make("GRPO", "bandit", scale="none", average="token", max_grad_norm=0.3).learn(10)
    agent.save(tmp_path)
    loaded = GRPO.load(tmp_path, env="ToyBandit-v0", max_grad_norm=0.7)
    assert (loaded.scale, loaded.average, loaded.group_size) == ("none", "token", 4)
    assert loaded.max_grad_norm == 0.7 and loaded.seed == agent.seed and loaded.num_envs == 4


@pytest.mark.parametrize("env", ["ToyBandit-v0", "text"])
def test_plug_in_agents_are_saved_and_loaded_like_the_others(env, tmp_path):
    make_it = WORLDS.get(env, lambda: env)
    slots = {"n_envs": 4} if isinstance(make_it(), str) else {}
    agent = Surrogate("auto", make_it(), sharpness=2.0, n_episodes=8, **slots, seed=0).learn(30)
    agent.save(tmp_path)
    loaded = Agent.load(tmp_path, env=make_it(), trust_modules=[__name__])
    assert type(Surrogate.load(tmp_path)) is Surrogate, "the class that loads is named by the call"
    assert type(loaded) is Surrogate and loaded.sharpness == 2.0
    loaded.learn(30, reset_num_timesteps=False)
    agent.learn(30, reset_num_timesteps=False)
    assert_bitwise(agent, loaded)


def test_a_reward_of_a_script_is_warned_about_and_is_not_needed_to_predict(tmp_path, monkeypatch):
    script = type(count_a)(count_a.__code__, {}, "reward")
    script.__module__ = "__main__"
    kwargs = {"n_episodes": 2, "seed": 0, "env_kwargs": {"reward": script, "max_new_tokens": 2}}
    agent = PPO("auto", "TextRLHF-v0", **kwargs)
    with pytest.warns(
        UserWarning, match=r"env_kwargs names a function of this script.*load\(\.\.\., env_kwargs"
    ):
        agent.save(tmp_path / "one")
    loaded = PPO.load(tmp_path / "one")
    with pytest.raises(ImportError, match="defined in the script that wrote the file"):
        PPO.load(tmp_path / "one", env="TextRLHF-v0")
    loaded.save(tmp_path / "two")
    again = PPO.load(tmp_path / "two", env="TextRLHF-v0", env_kwargs={"reward": count_a})
    assert again.env.unwrapped.dynamics.reward.function is count_a
    kept = [json.loads((tmp_path / name / "agent.json").read_text())["kwargs"] for name in ("one", "two")]
    assert kept[0]["env_kwargs"] == kept[1]["env_kwargs"], "what was not read is kept"


def test_more_slots_than_were_saved_start_new_episodes_with_the_saved_weights(tmp_path):
    agent = make("PPO", "cartpole").learn(80)
    agent.save(tmp_path)
    wider = PPO.load(tmp_path, env=gym.make_vec("CartPole-v1", num_envs=6))
    assert_bitwise(agent, wider)
    wider.learn(96, reset_num_timesteps=False)


def test_loading_what_is_not_there_names_what_is(tmp_path):
    make("PPO", "bandit").learn(10).save(tmp_path / "run" / "best")
    with pytest.raises(FileNotFoundError, match=r"bset is not a checkpoint.*\['best'\]"):
        PPO.load(tmp_path / "run" / "bset")
    with pytest.raises(ValueError, match=r"holds a PPO, not a GRPO; load it with PPO.load"):
        GRPO.load(tmp_path / "run" / "best")
    document = tmp_path / "run" / "best" / "agent.json"
    document.write_text(document.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        PPO.load(tmp_path / "run" / "best")


def test_paths_may_be_strings_and_a_folder_may_be_written_again(tmp_path):
    agent = make("PPO", "bandit").learn(10)
    for _ in range(2):
        agent.save(str(tmp_path / "deep" / "folder.zip"))
    assert PPO.load(str(tmp_path / "deep" / "folder.zip")).num_timesteps == agent.num_timesteps


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1, 1, (2, 3)),
        gym.spaces.Box(np.array([0, -np.inf], np.float32), np.array([1, np.inf], np.float32)),
        gym.spaces.Box(0, 255, (2,), np.uint8),
        gym.spaces.Discrete(4, start=-1),
        gym.spaces.MultiDiscrete([2, 3]),
        gym.spaces.MultiBinary(3),
        gym.spaces.MultiBinary([2, 3]),
        gym.spaces.Dict(a=gym.spaces.Discrete(2), b=gym.spaces.Box(0, 1, (1,))),
    ],
    ids=str,
)
def test_spaces_survive_json(space):
    assert decode_space(json.loads(json.dumps(encode_space(space)))) == space


# -- precision ------------------------------------------------------------------------------------------------


def half_world(dtype: torch.dtype):
    lm = make_lm("gpt2").clone()  # with tied weights
    lm.model.to(dtype)
    return make_env(lm=lm, kl_coef=0.1, reward=id_sum)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("agent", ["GRPO", "PPO"])
def test_a_half_precision_model_is_saved_in_what_it_came_in_and_resumes_bitwise(agent, dtype, tmp_path):
    def learner(env):
        extra = {"critic": "separate", "batch_size": 4} if agent == "PPO" else {"group_size": 4}
        return AGENTS[agent]("CausalLMPolicy", env, n_episodes=8, seed=0, learning_rate=1e-6, **extra)

    one = learner(half_world(dtype)).learn(60)
    folder = tmp_path / "checkpoint"
    one.save(folder)
    written = AutoModelForCausalLM.from_pretrained(folder)
    assert written.dtype == dtype and json.loads((folder / "config.json").read_text())["dtype"] in str(dtype)
    exact = one.policy.model.state_dict()
    assert all(w.dtype == torch.float32 for w in exact.values())
    for name, weight in written.state_dict().items():
        assert torch.equal(weight, exact[name].to(dtype)), name
    small = [name for name, w in written.state_dict().items() if not torch.equal(w.float(), exact[name])]
    assert small, (
        "steps of 1e-6 are finer than what is written, so the folder alone could not be gone on from"
    )
    torch.manual_seed(1)
    resumed = AGENTS[agent].load(folder, env=half_world(dtype))
    assert_bitwise(one, resumed)
    one.learn(60, reset_num_timesteps=False)
    resumed.learn(60, reset_num_timesteps=False)
    assert_bitwise(one, resumed)
    resumed.save(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
    alone = AGENTS[agent].load(folder)
    assert torch.equal(alone.policy.model.lm_head.weight, resumed.policy.model.lm_head.weight)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_what_came_in_half_precision_can_be_written_in_float32(lora_rank, tmp_path):
    policy_kwargs = {"save_dtype": "float32", "lora_rank": lora_rank}
    env = half_world(torch.bfloat16)
    agent = GRPO(
        "auto", env, n_episodes=8, group_size=4, seed=0, learning_rate=1e-6, policy_kwargs=policy_kwargs
    )
    agent.learn(60).save(tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert written.dtype == torch.float32
    assert any((w != w.bfloat16().float()).any() for w in written.state_dict().values())
    assert GRPO.load(tmp_path, env=half_world(torch.bfloat16)).policy.saved_dtype == torch.float32


class Counting(BaseCallback):
    """A user's callback that knows how many rollouts it has seen."""

    seen = 0

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.seen += 1

    def get_state(self):
        return {"seen": self.seen}

    def set_state(self, state):
        self.seen = state["seen"]


def watchers():
    return [Guards(emit=list), ScaleGuards(emit=list), StopAtKL(50.0), Counting()]


def test_callbacks_of_a_resumed_run_know_what_those_of_an_uninterrupted_one_know(tmp_path):
    whole, halves = make("GRPO", "text"), make("GRPO", "text")
    alone, before, after = watchers(), watchers(), watchers()
    halves.learn(160, before)
    halves.save(tmp_path / "half")
    resumed = Agent.load(tmp_path / "half", env=text_env())
    resumed.save(tmp_path / "unused")  # what waits for the callbacks is not lost on the way
    resumed = Agent.load(tmp_path / "unused", env=text_env())
    resumed.learn(160, after, reset_num_timesteps=False)
    whole.learn(resumed.num_timesteps, alone)
    known, expected = states_of(CallbackList(after)), states_of(CallbackList(alone))
    assert [name for name, _ in known] == [type(each).__name__ for each in alone]
    assert known == expected and after[-1].seen > before[-1].seen > 0


def test_a_state_that_does_not_fit_its_callback_is_named_and_the_callback_begins_anew(tmp_path):
    agent = make("GRPO", "text")
    agent.learn(40, watchers())
    agent.callback_states = [["Guards", {"first": 3}], ["Counting", {"seen": 5}], ["Unknown", {}]]
    counting = Counting()
    with pytest.warns(UserWarning, match="saved state of the callback Guards does not fit"):
        agent.learn(40, [Guards(emit=list), counting], reset_num_timesteps=False)
    assert counting.seen > 5
    agent.callback_states = "rubbish"
    agent.learn(40, [Guards(emit=list)], reset_num_timesteps=False)


def test_a_state_that_is_no_json_names_its_callback(tmp_path):
    agent, counting = make("GRPO", "text"), Counting()
    agent.learn(40, [counting])
    counting.seen = {1, 2}
    with pytest.raises(TypeError, match="callback Counting is no JSON"):
        agent.save(tmp_path / "saved")
