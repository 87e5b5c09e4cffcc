"""Claims about PPO with a share of supervised gradient."""

from __future__ import annotations

import json

import pytest
import torch

from agents import PPO, PPOptx
from agents.commands.flags import hyper_parameters, parse_value
from agents.offline.sft import encode_all, evaluate_sft, pad_batch, sft_loss
from tests.tiny import make_env

DEMOS = [
    {"prompt": "a", "completion": "b c"},
    {"prompt": "b c", "completion": "d"},
    {"prompt": "d e f g", "completion": "h i g"},
    {"prompt": "h i a b c d", "completion": "e"},
    {"text": "c d e f"},
]


def make(agent=PPOptx, **kwargs):
    settings = {"n_episodes": 8, "batch_size": 4, "n_epochs": 2, "seed": 0, "learning_rate": 3e-3}
    return agent("auto", make_env(kl_coef=0.05), **(settings | kwargs))


def parameters(agent):
    return dict(agent.policy.named_parameters())


def assert_bitwise(a, b):
    for name, value in parameters(a).items():
        assert torch.equal(value, parameters(b)[name]), name


def demonstration_loss(agent):
    lm = agent.policy.lm
    return evaluate_sft(lm.model, encode_all(DEMOS, lm.tokenizer), lm.pad_id)["loss"]


def test_without_a_coefficient_it_is_ppo_to_the_bit():
    plain = make(PPO).learn(150)
    assert_bitwise(plain, make(ptx_coef=0.0).learn(150))
    with pytest.warns(UserWarning, match="nothing learns from it; pass a ptx_coef"):
        assert_bitwise(plain, make(ptx_data=DEMOS, ptx_coef=0.0).learn(150))
    assert not torch.equal(
        plain.policy.lm.model.lm_head.weight,
        make(ptx_data=DEMOS, ptx_coef=0.1).learn(150).policy.lm.model.lm_head.weight,
    )


def test_the_demonstrations_stay_more_likely_than_under_ppo_alone():
    few = {"n_episodes": 16, "batch_size": 8}
    before = demonstration_loss(make(**few))
    plain = demonstration_loss(make(**few).learn(500))
    mixed = demonstration_loss(make(ptx_data=DEMOS, ptx_coef=1.0, **few).learn(500))
    assert plain > before  # the reward counts "a", which is in no demonstration
    assert mixed < plain


def test_the_reward_is_still_learned():
    learner = make(ptx_data=DEMOS, ptx_coef=0.05, n_episodes=32, batch_size=16, n_epochs=4)
    learner.learn(200)
    before = learner.latest["objective/scores"]
    learner.learn(2000, reset_num_timesteps=False)
    assert learner.latest["objective/scores"] > before + 0.5


def test_the_gradient_of_a_step_is_ppos_plus_the_coefficient_times_the_supervised_one(monkeypatch):
    gradients = {}
    for coef in (0.0, 0.5, 1.0):
        learner = make(
            ptx_data=DEMOS if coef else None, ptx_coef=coef, n_epochs=1, batch_size=8, max_grad_norm=1e9
        )
        monkeypatch.setattr(learner.optimizer, "step", lambda: None)
        learner.learn(1)
        gradients[coef] = learner.policy.lm.model.lm_head.weight.grad.clone()
    lm = learner.policy.lm
    ids, mask, labels = pad_batch(encode_all(DEMOS, lm.tokenizer), lm.pad_id)
    lm.model.zero_grad()
    sft_loss(lm.model(input_ids=ids, attention_mask=mask).logits, labels).backward()
    supervised = lm.model.lm_head.weight.grad
    for coef in (0.5, 1.0):
        torch.testing.assert_close(gradients[coef] - gradients[0.0], coef * supervised, atol=1e-6, rtol=1e-4)


def test_the_supervised_loss_is_logged_without_its_coefficient():
    learner = make(ptx_data=DEMOS, ptx_coef=1e-6, n_epochs=1, batch_size=None, learning_rate=0.0).learn(1)
    assert learner.latest["train/ptx_loss"] == pytest.approx(demonstration_loss(learner), rel=1e-5)
    assert "train/ptx_loss" not in make().learn(1).latest


@pytest.mark.parametrize("as_file", [True, False])
def test_a_resumed_run_ends_bitwise_where_one_that_went_on_does(as_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demos.jsonl").write_text("\n".join(json.dumps(record) for record in DEMOS))
    data = "demos.jsonl" if as_file else DEMOS
    whole = make(ptx_data=data, ptx_coef=0.5, ptx_batch_size=2).learn(100)
    whole.save(tmp_path / "checkpoint")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # a path given from another folder still leads to the data
    torch.manual_seed(12345)
    resumed = PPOptx.load(tmp_path / "checkpoint", env=make_env(kl_coef=0.05))
    for learner in (whole, resumed):
        learner.learn(100, reset_num_timesteps=False)
    assert_bitwise(whole, resumed)


def test_loaded_to_predict_it_needs_no_demonstrations_and_to_learn_it_says_what_is_missing(tmp_path):
    data = tmp_path / "demos.jsonl"
    data.write_text(json.dumps(DEMOS[0]))
    make(ptx_data=data, ptx_coef=0.5).learn(20).save(tmp_path / "checkpoint")
    data.unlink()
    loaded = PPOptx.load(tmp_path / "checkpoint")
    observation, _ = make_env().reset(seed=0)
    assert loaded.predict(observation, deterministic=True)[0] >= 0
    with pytest.raises(FileNotFoundError, match=r"demos\.jsonl"):
        PPOptx.load(tmp_path / "checkpoint", env=make_env())


def test_what_cannot_work_is_refused_before_anything_is_learned():
    with pytest.raises(ValueError, match=r"ptx_coef=0.5 needs demonstrations"):
        make(ptx_coef=0.5)
    with pytest.raises(ValueError, match=r"ptx_coef must be a finite number >= 0, got -1"):
        make(ptx_coef=-1)
    with pytest.raises(ValueError, match=r"ptx_batch_size must be at least 1"):
        make(ptx_data=DEMOS, ptx_batch_size=0)
    with pytest.raises(ValueError, match=r"'completions'"):
        make(ptx_data=[{"prompt": "a", "completions": "b"}], ptx_coef=0.5)
    with pytest.raises(ValueError, match=r"MlpPolicy has no language model; use PPO"):
        PPOptx("MlpPolicy", "ToyBandit-v0", ptx_data=DEMOS, ptx_coef=0.5)


def test_its_hyper_parameters_are_flags():
    flags = {flag.name: flag for flag in hyper_parameters(PPOptx)}
    assert flags["ptx_data"].help and parse_value(flags["ptx_data"], "demos.jsonl") == "demos.jsonl"
    assert parse_value(flags["ptx_coef"], "0.5") == 0.5
    assert "clip_range" in flags and "gae_lambda" in flags
