"""Games of other kinds: what they are recognised by, and that they play by the rules of their own libraries."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from tests.test_text_game import bound, make_game, say
from tests.tiny import WORDS
from textrl_env.games.gymnasium_env import GIVEN, GymnasiumGame, one_of
from textrl_env.games.loading import load_game
from textrl_env.protocols import Game

# -- Gymnasium ------------------------------------------------------------------------------------------------


class Echo(gym.Env):
    """Spaces of texts; pays the length of what it heard."""

    observation_space = spaces.Text(100)
    action_space = spaces.Text(5, charset="abcdefghi ")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        word = (options or {}).get("word") or WORDS[self.np_random.integers(3, len(WORDS))]
        return f"{word} {word}", {}

    def step(self, action):
        return action, np.float64(len(action)), np.True_, False, {}


def test_an_env_with_spaces_of_texts_is_a_game_as_it_is():
    env = bound(make_game(game=Echo, kl_coef=0.0))
    assert (
        env.reset(options={"prompt_id": 4})[1]["prompt"] == env.reset(options={"prompt_id": 4})[1]["prompt"]
    )
    *_, terminated, _, info = say(env, "a", "b", "<eos>")
    assert terminated and info["score"] == 3.0 and info["game_text"] == "a b"


def test_a_row_becomes_the_options_of_the_envs_reset():
    env = bound(make_game(game=Echo, rows=[{"word": "c"}]))
    assert env.reset(seed=0)[1]["prompt"] == "c c"


def test_what_is_no_action_is_answered_and_the_env_does_not_notice():
    game = GymnasiumGame(Echo(), invalid_reward=-0.5)
    game.reset(seed=0)
    text, reward, terminated, truncated, _ = game.step("a word too long")
    assert "1 to 5 characters" in text and (reward, terminated, truncated) == (-0.5, False, False)
    assert game.step("abc")[:3] == ("abc", 3.0, True)


IDS = ["GridWorld-v0", "textrl_env:GridWorld-v0", "FrozenLake-v1", "Taxi-v4"]
IDS += ["Blackjack-v1", "CartPole-v1"]


@pytest.mark.parametrize("name", IDS)
def test_an_id_of_gymnasium_plays_as_the_env_does(name):
    """Every action, by name and by number, does to the game what it does to the env, observation for observation."""
    game, env = load_game(name)(), gym.make(name)
    assert isinstance(game, Game)
    words = GIVEN[env.spec.name](env.unwrapped)
    names = [word.strip(" .") for word in words.choices.replace(" or ", ", ").split(", ")]
    assert len(names) == env.action_space.n
    text, _ = game.reset(seed=3)
    observation, _ = env.reset(seed=3)
    assert text == f"{words.rules}\n{words.to_text(observation)}"
    for t in range(2 * len(names)):
        action = t % len(names)
        said = f"I say {names[action].upper()}." if t < len(names) else f" {action}\n"
        observation, reward, terminated, truncated, _ = env.step(action)
        assert game.step(said)[:4] == (words.to_text(observation), reward, terminated, truncated)
        if terminated or truncated:
            game.reset(seed=t)
            env.reset(seed=t)


def test_texts_show_everything_that_the_observations_hold():
    """Different observations of an env have different texts, so nothing is hidden from who reads."""
    for name in ("GridWorld-v0", "FrozenLake-v1", "Taxi-v4"):
        env = gym.make(name)
        to_text = GIVEN[env.spec.name](env.unwrapped).to_text
        count = env.observation_space.n
        assert len({to_text(state) for state in range(count)}) == count
    to_text = GIVEN["Blackjack"](None).to_text
    assert to_text((14, 10, 1)) == "You have 14, with an ace that counts 11. The dealer shows 10."


def test_the_board_of_frozen_lake_is_shown_with_who_walks_on_it():
    text, _ = load_game("FrozenLake-v1", {"is_slippery": False})().reset(seed=0)
    assert text.splitlines()[1:] == ["AFFF", "FHFH", "FFFH", "HFFG"] and "slippery" not in text
    assert "slippery" in load_game("FrozenLake-v1")().reset(seed=0)[0]


def test_the_last_of_several_names_counts_and_parts_of_words_do_not():
    to_action = one_of(["left", "right"])
    assert to_action("not LEFT but right") == 1
    assert [to_action(text) for text in ("leftover", "2", "-1", "", "1 or 0")] == [None] * 5


def test_the_envs_own_time_limit_is_a_truncation():
    game = load_game("FrozenLake-v1", {"max_episode_steps": 1, "is_slippery": False})()
    game.reset(seed=0)
    assert game.step("down")[2:4] == (False, True)


def to_text(observation):
    return f"state {observation}"


def test_other_envs_need_a_pair_of_functions_and_an_error_says_so():
    with pytest.raises(TypeError, match="give to_text"):
        load_game("CliffWalking-v1")()
    with pytest.raises(TypeError, match="give to_action"):
        load_game("CliffWalking-v1", {"to_text": to_text})()
    both = {
        "to_text": "tests.test_game_adapters:to_text",
        "to_action": one_of(["up", "right", "down", "left"]),
    }
    game = load_game("CliffWalking-v1", both)()
    assert game.reset(seed=0)[0] == "state 36" and game.step("up")[0] == "state 24"
    with pytest.raises(gym.error.Error, match="FrozenLake"):
        load_game("FrozenLak-v1")()


def test_the_command_line_trains_on_an_env_of_gymnasium(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from agents.cli import main
    from tests.chat_templates import byte_tokenizer

    tokenizer = byte_tokenizer(None)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    line = f"--game FrozenLake-v1 --model {tmp_path / 'model'} --agent reinforce --total-timesteps 20 --max-turns 2"
    line += f" --max-new-tokens 3 --max-length 250 --n-episodes 2 --no-progress --run-dir {tmp_path / 'run'}"
    main(["train", *line.split(), "--game-kwargs", '{"is_slippery": false}'])
    assert (tmp_path / "run" / "final").is_dir()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["env_kwargs"]
    assert (saved["game"], saved["game_kwargs"]) == ("FrozenLake-v1", {"is_slippery": False})
