"""stable-baselines3's own algorithms on text: what the bridge and the policy promise."""

from __future__ import annotations

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from transformers import AutoModelForCausalLM

import textrl_env  # noqa: F401
from tests.tiny import PROMPTS, make_env, make_lm, make_tokenizer
from tests.vector_checker import bind_uniform
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.sb3.policy import (
    CausalLMActorCriticPolicy,
    GymVecEnv,
    SlotRolloutBuffer,
    TextRLHFCallback,
    bind_policy,
)

ALGORITHMS = {"PPO": (PPO, {"batch_size": 32, "n_epochs": 2}), "A2C": (A2C, {})}


def make_model(algorithm=PPO, num_envs=8, lm=None, env_kwargs=None, policy_kwargs=None, **kwargs):
    vec_env = GymVecEnv(make_env(num_envs, lm, **(env_kwargs or {})))
    policy_kwargs = {"lm": vec_env.get_attr("lm")[0]} | (policy_kwargs or {})
    kwargs = {"n_steps": 12, "seed": 0, "device": "cpu"} | kwargs
    if algorithm is PPO:
        kwargs.setdefault("batch_size", kwargs["n_steps"] * num_envs)
    return algorithm(CausalLMActorCriticPolicy, vec_env, policy_kwargs=policy_kwargs, **kwargs)


def play(model, steps: int):
    """Act for some steps; every observation, action, log-prob, value and list of infos."""
    vec_env = model.get_env()
    obs, seen = vec_env.reset(), []
    for _ in range(steps):
        with torch.no_grad():
            actions, values, log_probs = model.policy(obs_as_tensor(obs, "cpu"))
        after, rewards, dones, infos = vec_env.step(actions.numpy())
        seen.append((obs, actions, values, log_probs, rewards, dones, infos))
        obs = after
    return seen


def whole_forward(policy, obs):
    """Acting logits and values of left-padded observations, each row on its own, without padding."""
    logits, values = [], []
    for ids, mask in zip(obs["input_ids"], obs["attention_mask"], strict=True):
        out = policy.lm.model(input_ids=torch.as_tensor(ids[mask > 0])[None], output_hidden_states=True)
        logits.append(policy.lm.action_logits(out.logits[0, -1]))
        values.append(policy.value_net(out.hidden_states[-1][0, -1]))
    return torch.stack(logits), torch.stack(values)


def stacked(seen):
    """Rows of all steps in one shuffled batch: observations and actions."""
    order = np.random.default_rng(0).permutation(len(seen) * len(seen[0][1]))
    obs = {name: torch.as_tensor(np.concatenate([s[0][name] for s in seen])[order]) for name in seen[0][0]}
    return obs, torch.cat([s[1] for s in seen])[order], order


def wake_up(policy):
    """A value head that says something."""
    with torch.no_grad():
        policy.value_net.weight.normal_(generator=torch.Generator().manual_seed(0))


# The policy


def test_pretrained_weights_are_intact_and_the_value_is_zero_at_the_start(lm):
    model = make_model(lm=lm)
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    for name, tensor in model.policy.lm.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    obs = model.get_env().reset()
    logits = model.policy.get_distribution(obs_as_tensor(obs, "cpu")).distribution.logits
    expected, _ = whole_forward(model.policy, obs)
    torch.testing.assert_close(logits, expected.log_softmax(-1), rtol=0, atol=1e-5)
    assert (model.policy.predict_values(obs_as_tensor(obs, "cpu")) == 0).all()


def test_training_leaves_the_reference_alone():
    lm = make_lm()
    before = lm.model.get_input_embeddings().weight.clone()
    model = make_model(lm=lm, learning_rate=1e-2, batch_size=32).learn(96, TextRLHFCallback())
    assert torch.equal(lm.model.get_input_embeddings().weight, before)
    assert not torch.equal(model.policy.lm.model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_acting_with_the_cache_agrees_with_whole_forwards(lm, temperature):
    lm = CausalLM(lm.model, lm.tokenizer, temperature)
    model = make_model(lm=lm, num_envs=5)
    bind_policy(model)
    wake_up(model.policy)
    for obs, actions, values, log_probs, *_ in play(model, 10):
        logits, expected_values = whole_forward(model.policy, obs)
        expected = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-5)


def test_acting_takes_one_new_token_per_slot():
    model = make_model(num_envs=4, env_kwargs={"prompts": ["a b c d"]})
    bind_policy(model)
    play(model, 1)  # whether the cache works is measured once
    model.policy._decoder = None
    widths = []
    model.policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    seen = play(model, 4)
    assert widths[0] == (4, 4)
    ended = [int(s[5].sum()) for s in seen]
    grown = [width for width in widths[1:] if width[1] == 1]
    assert sum(rows for rows, _ in grown) == sum(4 - e for e in ended[:-1])
    assert sum(rows for rows, width in widths[1:] if width != 1) == sum(ended[:-1])


def test_evaluation_of_shuffled_prefixes_agrees_with_each_row_alone(lm):
    model = make_model(lm=lm)
    bind_policy(model)
    wake_up(model.policy)
    obs, actions, _ = stacked(play(model, 12))
    values, log_probs, entropy = model.policy.evaluate_actions(obs, actions)
    logits, expected_values = whole_forward(model.policy, {name: x.numpy() for name, x in obs.items()})
    logits = logits.log_softmax(-1)
    torch.testing.assert_close(log_probs, logits.gather(-1, actions[:, None])[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, -(logits.exp() * logits).sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(values, expected_values, rtol=0, atol=1e-5)


def test_evaluation_passes_each_episode_once_not_once_per_token():
    model = make_model(num_envs=4)
    bind_policy(model)
    seen = play(model, 12)
    obs, actions, _ = stacked(seen)
    rows = []
    model.policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    model.policy.evaluate_actions(obs, actions)
    episodes = 4 + sum(int(s[5].sum()) for s in seen[:-1])
    assert len(rows) == 1 and rows[0] <= episodes < len(actions)


def test_gradients_agree_with_each_row_alone():
    model = make_model(num_envs=3)
    bind_policy(model)
    policy = model.policy
    wake_up(policy)
    obs, actions, _ = stacked(play(model, 8))
    weights = torch.randn(len(actions), generator=torch.Generator().manual_seed(1))

    def gradients(values, log_probs):
        policy.zero_grad()
        (weights * log_probs + weights.square() * values.flatten()).sum().backward()
        return [p.grad.clone() for p in policy.parameters()]

    values, log_probs, _ = policy.evaluate_actions(obs, actions)
    logits, alone = whole_forward(policy, {name: x.numpy() for name, x in obs.items()})
    expected = gradients(alone, logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0])
    for given, wanted in zip(gradients(values, log_probs), expected, strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_token_ids_may_arrive_as_floats():
    model = make_model()
    obs = obs_as_tensor(model.get_env().reset(), "cpu")
    as_floats = {name: tensor.float() for name, tensor in obs.items()}
    actions = torch.zeros(8)
    for given, expected in zip(
        model.policy.evaluate_actions(as_floats, actions),
        model.policy.evaluate_actions(obs, actions.long()),
        strict=True,
    ):
        assert torch.equal(given, expected)


def test_dropout_stays_off_in_training_mode():
    model = make_model(lm=make_lm("gpt2", dropout=0.5))
    obs = obs_as_tensor(model.get_env().reset(), "cpu")
    model.policy.set_training_mode(True)
    first, again = (model.policy.get_distribution(obs).distribution.logits for _ in range(2))
    assert model.policy.training and torch.equal(first, again)


def test_logits_wider_than_the_vocabulary_are_never_sampled(lm_wide):
    model = make_model(lm=lm_wide, n_steps=30)
    model.learn(240, TextRLHFCallback())
    assert model.rollout_buffer.actions.max() < lm_wide.vocab_size


def test_changed_weights_are_noticed_while_acting():
    model = make_model(num_envs=3)
    bind_policy(model)
    obs = model.get_env().reset()
    with torch.no_grad():
        before = model.policy(obs_as_tensor(obs, "cpu"), deterministic=True)[2]
        model.policy.model.get_input_embeddings().weight.mul_(1.5)
        actions, _, after = model.policy(obs_as_tensor(obs, "cpu"), deterministic=True)
    expected = whole_forward(model.policy, obs)[0].log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ratio_is_one_on_the_first_minibatch(name, monkeypatch):
    algorithm, kwargs = ALGORITHMS[name]
    model = make_model(algorithm, learning_rate=3e-3, **kwargs)
    ratios = []
    train, evaluate = model.train, model.policy.evaluate_actions

    def first_of_each_update():
        samples = next(iter(model.rollout_buffer.get(None)))
        with torch.no_grad():
            _, log_probs, _ = evaluate(samples.observations, samples.actions)
        ratios.append((log_probs - samples.old_log_prob).exp())
        train()

    monkeypatch.setattr(model, "train", first_of_each_update)
    model.learn(3 * 96, TextRLHFCallback())
    assert len(ratios) == 3
    torch.testing.assert_close(torch.cat(ratios), torch.ones(3 * 96), rtol=0, atol=1e-4)


def test_slot_buffer_yields_every_row_once_and_a_stretch_of_each_slot_together():
    model = make_model(num_envs=8, rollout_buffer_class=SlotRolloutBuffer)
    model.learn(96, TextRLHFCallback())
    buffer = model.rollout_buffer
    batches = list(buffer.get(24))
    decode = model.policy.lm.tokenizer.decode
    everything = next(iter(DictRolloutBuffer.get(buffer, None)))
    assert [len(batch.actions) for batch in batches] == [24] * 4
    for name in ("advantages", "old_log_prob", "returns"):
        given = torch.cat([getattr(batch, name) for batch in batches])
        torch.testing.assert_close(given.sort()[0], getattr(everything, name).sort()[0], rtol=0, atol=0)
    for batch in batches:
        ids, mask = (batch.observations[n].numpy() for n in ("input_ids", "attention_mask"))
        for stretch in (slice(0, 12), slice(12, 24)):
            for now, after, length, length_after in zip(
                ids[stretch][:-1],
                ids[stretch][1:],
                mask[stretch][:-1].sum(1),
                mask[stretch][1:].sum(1),
                strict=True,
            ):
                grown = length_after == length + 1 and (now[-length:] == after[-length - 1 : -1]).all()
                assert grown or decode(after[-length_after:]) in PROMPTS


# Who acts


def test_kl_is_that_of_the_policy_and_costs_no_forward_of_its_own():
    model = make_model(num_envs=4)
    bind_policy(model)
    with torch.no_grad():
        for p in model.policy.lm.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    calls = []
    evaluate = model.policy._evaluate
    model.policy._evaluate = lambda obs: calls.append(1) or evaluate(obs)
    for *_, log_probs, rewards, dones, infos in play(model, 9):
        kl = log_probs.double().numpy() - [info["ref_logprob"] for info in infos]
        np.testing.assert_allclose([info["kl"] for info in infos], kl, atol=1e-9)
        assert np.abs(kl).max() > 1e-3
        score = [info["score"] if done else 0.0 for info, done in zip(infos, dones, strict=True)]
        np.testing.assert_allclose(rewards, score - 0.05 * kl, atol=1e-6)
    assert not calls


def test_kl_is_zero_while_the_policy_is_the_reference():
    model = make_model(learning_rate=0.0, batch_size=32)
    kls = []

    def collect(local, _):
        kls.extend(info["kl"] for info in local["infos"])
        return True

    model.learn(192, callback=[TextRLHFCallback(), ConvertCallback(collect)])
    assert len(kls) == 192 and np.abs(kls).max() < 1e-5


def test_log_prob_of_other_actions_is_computed():
    model = make_model(num_envs=3)
    obs = model.get_env().reset()
    actions, *_ = model.policy(obs_as_tensor(obs, "cpu"))
    other = (actions.numpy() + 1) % 12
    expected = whole_forward(model.policy, obs)[0].log_softmax(-1).gather(-1, torch.as_tensor(other)[:, None])
    np.testing.assert_allclose(model.policy.log_prob(obs, other), expected[:, 0].detach(), atol=1e-5)


def test_single_envs_behind_dummy_vec_env_are_bound_too():
    vec_env = DummyVecEnv([lambda: Monitor(make_env()), lambda: Monitor(make_env())])
    model = PPO(
        CausalLMActorCriticPolicy,
        vec_env,
        n_steps=16,
        batch_size=16,
        learning_rate=0.0,
        policy_kwargs={"lm": make_lm()},
        device="cpu",
    )
    bind_policy(model)
    calls = []
    evaluate = model.policy._evaluate
    model.policy._evaluate = lambda obs: calls.append(len(obs["input_ids"])) or evaluate(obs)
    for *_, infos in play(model, 8):
        assert max(abs(info["kl"]) for info in infos) < 1e-5
    assert not calls


@pytest.mark.parametrize("native", [True, False], ids=["native", "single"])
def test_any_network_that_acts_by_probabilities_is_charged_for_its_own(native):
    makers = [lambda: gym.make("TokenTree-v0")] * 2
    env = GymVecEnv(gym.make_vec("TokenTree-v0", num_envs=2)) if native else DummyVecEnv(makers)
    charged, acted = [], []

    class Compare(BaseCallback):
        def _on_step(self):
            charged.extend(info["kl"] + info["ref_logprob"] for info in self.locals["infos"])
            acted.extend(self.locals["log_probs"].tolist())
            return True

    kwargs = {"net_arch": [8], "ortho_init": False}
    model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=16, learning_rate=0.1, policy_kwargs=kwargs)
    model.learn(64, callback=[TextRLHFCallback(), Compare()])
    assert charged == pytest.approx(acted, abs=1e-6) and len({round(value, 3) for value in acted}) > 5


def test_an_agent_that_acts_by_values_has_no_kl_and_that_is_said():
    model = DQN("MultiInputPolicy", GymVecEnv(gym.make_vec("TokenTree-v0", num_envs=2)), buffer_size=10)
    with pytest.raises(TypeError, match=r"DQN acts by the values of actions.*kl_coef=0"):
        bind_policy(model)


def test_a_mask_of_actions_is_one_row_for_each_slot():
    class Masked(gym.vector.VectorWrapper):
        def action_masks(self):
            return np.arange(10).reshape(2, 5) % 3 > 0

    env = GymVecEnv(Masked(gym.make_vec("TokenTree-v0", num_envs=2)))
    assert np.array_equal(np.stack(env.env_method("action_masks")), env.envs.action_masks())
    assert np.array_equal(env.env_method("action_masks", indices=[1])[0], env.envs.action_masks()[1])


def test_env_in_another_process_is_refused():
    model = make_model()
    other = object.__new__(SubprocVecEnv)
    with pytest.raises(TypeError, match=r"GymVecEnv\(gym.make_vec"):
        bind_policy(model, other)


# Training


@pytest.mark.parametrize("name", ALGORITHMS)
def test_score_rises(name):
    algorithm, _ = ALGORITHMS[name]
    kwargs = {"n_epochs": 4, "batch_size": 96, "rollout_buffer_class": SlotRolloutBuffer}
    if algorithm is A2C:
        kwargs = {"normalize_advantage": True}
    model = make_model(algorithm, num_envs=16, learning_rate=1e-2, gamma=1.0, **kwargs)
    rows = []
    model.set_logger(configure(None, []))
    dump = model.logger.dump
    model.logger.dump = lambda step: rows.append(dict(model.logger.name_to_value)) or dump(step)
    model.learn(192 * 14, TextRLHFCallback(), log_interval=1)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    first, last = (rows[i]["objective/scores"] for i in (0, -1))
    assert first < 1 and last > first + 1.5, (first, last)
    assert rows[-1]["rollout/ep_rew_mean"] > rows[0]["rollout/ep_rew_mean"]


def test_one_seed_gives_one_run():
    def weights():
        model = make_model(batch_size=32, n_epochs=2, learning_rate=1e-3)
        return model.learn(192, TextRLHFCallback()).policy.parameters_to_vector()

    np.testing.assert_array_equal(weights(), weights())


def test_saved_model_goes_on_where_it_was(tmp_path):
    model = make_model(batch_size=32, n_epochs=1, learning_rate=1e-2).learn(96, TextRLHFCallback())
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", env=model.get_env(), device="cpu")
    np.testing.assert_array_equal(loaded.policy.parameters_to_vector(), model.policy.parameters_to_vector())
    obs = model.get_env().reset()
    np.testing.assert_array_equal(
        loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0]
    )
    loaded.learn(96, TextRLHFCallback())


def test_saved_policy_loads_alone(tmp_path):
    model = make_model()
    wake_up(model.policy)
    model.policy.save(tmp_path / "policy.pt")
    loaded = CausalLMActorCriticPolicy.load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(loaded.parameters_to_vector(), model.policy.parameters_to_vector())


def test_language_model_is_saved_as_a_hugging_face_folder(tmp_path, model_folder):
    model = make_model(policy_kwargs={"lm": str(model_folder)}, learning_rate=1e-2, batch_size=32)
    model.learn(96, TextRLHFCallback()).policy.save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    for name, tensor in model.policy.lm.model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_evaluate_policy_counts_the_episodes_of_the_bridge(recwarn):
    model = make_model()
    bind_policy(model)
    returns, lengths = evaluate_policy(
        model, model.get_env(), n_eval_episodes=10, deterministic=False, return_episode_rewards=True
    )
    assert len(returns) == len(lengths) == 10 and max(lengths) <= 6
    assert not [w for w in recwarn if "Monitor" in str(w.message)]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lm": None}, "policy_kwargs"),
        (
            {
                "lm": CausalLM(
                    make_lm(extra_vocab=7).model, make_tokenizer(words=["<eos>", "<unk>"], pad=None)
                )
            },
            "actions",
        ),
        ({"net_arch": [64]}, "net_arch"),
    ],
)
def test_wrong_policy_arguments_are_named(kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make_model(policy_kwargs=kwargs)


def test_policy_refuses_an_env_without_text():
    with pytest.raises(ValueError, match="MlpPolicy"):
        PPO(CausalLMActorCriticPolicy, "CartPole-v1", policy_kwargs={"lm": make_lm()}, device="cpu")


# The vector env


def sync(env_id="CartPole-v1", num_envs=3, mode=AutoresetMode.SAME_STEP, **kwargs):
    return SyncVectorEnv([lambda: gym.make(env_id, **kwargs) for _ in range(num_envs)], autoreset_mode=mode)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "LineWorld-v0", "TokenTree-v0"])
def test_bridge_agrees_with_dummy_vec_env(env_id):
    native = env_id != "CartPole-v1"
    envs = gym.make_vec(env_id, num_envs=3) if native else sync(env_id)
    bridge = GymVecEnv(bind_uniform(envs))
    dummy = DummyVecEnv([lambda: Monitor(bind_uniform(gym.make(env_id)))] * 3)
    for vec_env in (bridge, dummy):
        vec_env.seed(7)
    np.testing.assert_equal(bridge.reset(), dummy.reset())
    assert bridge.reset_infos == dummy.reset_infos
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(120):
        actions = rng.integers(bridge.action_space.n, size=3)
        given, expected = bridge.step(actions), dummy.step(actions)
        for mine, theirs in zip(given[:3], expected[:3], strict=True):
            np.testing.assert_equal(mine, theirs)
        for infos in (given[3], expected[3]):
            episodes.append([info.pop("episode", None) for info in infos])
        np.testing.assert_equal(given[3], expected[3])
        assert bridge.reset_infos == dummy.reset_infos
    mine, theirs = ([e for row in rows for e in row if e] for rows in (episodes[::2], episodes[1::2]))
    assert len(mine) > 4
    assert [e["l"] for e in mine] == [e["l"] for e in theirs]
    np.testing.assert_allclose([e["r"] for e in mine], [e["r"] for e in theirs], atol=1e-6)


def test_time_limit_is_marked_as_truncated():
    bridge = GymVecEnv(sync(max_episode_steps=3))
    bridge.reset()
    for _ in range(3):
        _, _, dones, infos = bridge.step(np.zeros(3, dtype=np.int64))
    assert dones.all() and all(info["TimeLimit.truncated"] is True for info in infos)
    assert all(info["terminal_observation"].shape == (4,) for info in infos)


def test_observations_are_not_written_into_again():
    envs = SyncVectorEnv(
        [lambda: gym.make("CartPole-v1")], autoreset_mode=AutoresetMode.SAME_STEP, copy=False
    )
    bridge = GymVecEnv(envs)
    first = bridge.reset()
    kept = first.copy()
    bridge.step(np.zeros(1, dtype=np.int64))
    np.testing.assert_array_equal(first, kept)


def test_one_start_for_all_slots_or_one_for_each():
    bridge = GymVecEnv(bind_uniform(make_env(4)))

    def starts(options):
        bridge.set_options(options)
        bridge.reset()
        return [info["prompt_id"] for info in bridge.reset_infos]

    assert starts({"prompt_id": 2}) == [2] * 4
    assert starts({"prompt_id": [3, 2, 1, 0]}) == [3, 2, 1, 0]
    assert starts([{"prompt_id": k} for k in (1, 1, 3, 0)]) == [1, 1, 3, 0]
    assert bridge.reset() is not None and bridge._vector_options is None


def test_options_that_differ_are_refused_where_the_env_cannot_take_them():
    with pytest.raises(ValueError, match="give set_options"):
        GymVecEnv(sync()).set_options([{"low": -0.1}, {"low": -0.2}, {}])


def test_seeds_give_the_same_prompts_again():
    bridge = GymVecEnv(bind_uniform(make_env(16)))

    def prompts():
        bridge.seed(5)
        bridge.reset()
        return [info["prompt"] for info in bridge.reset_infos]

    first = prompts()
    assert first == prompts() and len(set(first)) > 1


def test_last_info_of_an_episode_is_the_episodes_and_not_the_next_ones():
    bridge = GymVecEnv(bind_uniform(make_env(4)))
    bridge.reset()
    for _ in range(6):
        _, _, dones, infos = bridge.step(np.full(4, 3))
    assert dones.all()
    for info, start in zip(infos, bridge.reset_infos, strict=True):
        assert info["response"] == "a a a a a a" and info["score"] == 6.0
        assert "prompt" not in info and start["prompt"] in PROMPTS
        assert info["episode"]["l"] == info["response_length"] == 6
        assert info["episode"]["r"] == pytest.approx(6.0 - 0.05 * info["kl_sum"])


def test_gymnasiums_own_statistics_are_kept():
    bridge = GymVecEnv(RecordEpisodeStatistics(bind_uniform(make_env(2))))
    bridge.reset()
    for _ in range(6):
        *_, infos = bridge.step(np.full(2, 3))
    assert all(info["episode"]["l"] == 6 for info in infos)
    assert bridge.env_is_wrapped(RecordEpisodeStatistics) == [True, True]


def test_attributes_and_methods_reach_the_vector_env_and_sub_envs():
    envs = make_env(3)
    bridge = GymVecEnv(RecordEpisodeStatistics(envs))
    assert bridge.get_attr("lm") == [envs.lm] * 3
    bridge.set_attr("kl_coef", 0.2)
    assert envs.kl_coef == envs.dynamics.kl_coef == 0.2
    bridge.env_method("bind_policy", None)
    with pytest.raises(ValueError, match="all 3 slots"):
        bridge.set_attr("kl_coef", 0.1, indices=[0])
    with pytest.raises(AttributeError, match="no_such"):
        bridge.get_attr("no_such")
    carts = GymVecEnv(sync())
    assert carts.get_attr("x_threshold", indices=[0, 2]) == [2.4, 2.4]
    carts.set_attr("x_threshold", 1.0)
    assert carts.get_attr("x_threshold") == [1.0] * 3
    assert not carts.has_attr("no_such")


def test_text_is_rendered_for_each_slot():
    bridge = GymVecEnv(make_env(2, render_mode="ansi"))
    bridge.reset()
    assert [text.startswith("[prompt]") for text in bridge.render()] == [True, True]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode):
    with pytest.raises(ValueError, match="SAME_STEP"):
        GymVecEnv(sync(mode=mode))


def test_importing_the_package_loads_neither_torch_nor_stable_baselines3():
    code = "import sys, textrl_env; assert not {'torch', 'stable_baselines3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
