"""Every environment draws itself, so that whatever asks Gymnasium for ``rgb_array`` gets a picture."""

from __future__ import annotations

import itertools

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

import textrl_env
from tests.tiny import make_env, make_tokenizer
from textrl_env.envs.canvas import Canvas, wrapped
from textrl_env.envs.line_world import RIGHT
from textrl_env.envs.text_picture import draw_response, token_texts

TOYS = [name for name in textrl_env.ENV_IDS if name != "TextRLHF-v0"]


def assert_picture(frame):
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3 and min(frame.shape[:2]) >= 100
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 10  # smooth edges, so not one flat colour


@pytest.mark.filterwarnings("ignore:.*No acting policy")
@pytest.mark.parametrize("env_id", TOYS)
def test_a_step_shows_in_the_picture_of_one_env_and_of_a_slot(env_id):
    env = gym.make(env_id, render_mode="rgb_array")
    envs = gym.make_vec(env_id, num_envs=2, render_mode="rgb_array")
    action = 1 if env_id in ("GridWorld-v0", "TokenTree-v0") else RIGHT
    env.reset(seed=0)
    envs.reset(seed=0)
    before = env.render(), *envs.render()
    for frame in before:
        assert_picture(frame)
    env.step(action)
    envs.step(np.array([action, action]))
    after = env.render(), *envs.render()
    assert all(a.shape == b.shape and (a != b).any() for a, b in zip(before, after, strict=True))
    assert np.array_equal(after[0], after[1])  # slot 0 is the single env of its seed


def test_text_in_the_making_is_drawn_token_by_token():
    env = make_env(render_mode="rgb_array")
    env.bind_policy(lambda observation, action: -1.0)
    env.reset(seed=0, options={"prompt_id": 3})
    frames = [env.render()]
    for word in ("a", "b", "<eos>"):
        env.step(make_tokenizer().convert_tokens_to_ids(word))
        frames.append(env.render())
    for frame in frames:
        assert_picture(frame)
    assert all((a != b).any() for a, b in itertools.pairwise(frames))


def test_the_text_of_tokens_adds_up_to_the_text():
    tokenizer = make_tokenizer()
    ids = np.array(tokenizer("a b c a")["input_ids"])
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == 4 and "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("pieces", [[], ["word " * 400], ["x" * 300, "\n\n", "end"]])
def test_a_response_of_any_length_keeps_the_picture_in_its_frame(pieces):
    shapes = {draw_response(prompt, pieces, 8, 0.5, True).shape for prompt in ("short", "long " * 300)}
    assert shapes == {(412, 640, 3)}


def test_wrapped_text_loses_nothing_and_fits():
    canvas = Canvas(100, 100)
    text = "one two " + "t" * 60 + " three\nfour"
    lines = wrapped(canvas, [text], 90, 13)
    assert "".join(word for line in lines for _, word, _ in line).replace(" ", "") == text.replace(
        " ", ""
    ).replace("\n", "")
    assert all(x + canvas.text_width(word, 13) <= 90.5 for line in lines for x, word, _ in line)


def test_stable_baselines3_takes_an_id_as_it_is():
    model = PPO("MlpPolicy", "LineWorld-v0", n_steps=8, batch_size=8, n_epochs=1, seed=0).learn(8)
    assert_picture(model.get_env().render("rgb_array"))


@pytest.mark.filterwarnings("ignore:.*No acting policy")
def test_stable_baselines3_makes_vector_envs_of_text():
    envs = make_vec_env("TextRLHF-v0", 2, env_kwargs={"max_new_tokens": 4})
    envs.reset()
    _, rewards, dones, infos = envs.step(np.array([5, 6]))
    assert rewards.shape == dones.shape == (2,) and "kl" in infos[0]
    assert_picture(envs.render("rgb_array"))
