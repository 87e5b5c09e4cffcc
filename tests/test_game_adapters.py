"""Games of other kinds: what they are recognised by, and that they play by the rules of their own libraries."""

from __future__ import annotations

import json
import random
import re
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from transformers import LlamaConfig, LlamaForCausalLM

from tests.chat_templates import byte_tokenizer, chat_tokenizer
from tests.games import Copycat
from tests.test_text_game import bound, make_game, say
from tests.tiny import WORDS, make_lm
from textrl_env.games.gymnasium_env import GIVEN, GymnasiumGame, one_of
from textrl_env.games.layout import Turn
from textrl_env.games.loading import load_game
from textrl_env.games.textarena import FrozenModel
from textrl_env.games.tools import ToolGame
from textrl_env.lm.causal_lm import CausalLM
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


def test_a_cue_stands_behind_every_text_that_is_answered_and_success_is_the_envs():
    game = load_game("GridWorld-v0", {"cue": "\n> ", "map": ["SG"]})()
    assert game.reset(seed=0)[0].endswith("\nAG\n> ")
    for said, shown in (("left", "AG\n> "), ("fly", "Not understood. Expected left, down, right or up.\n> ")):
        text, *_, info = game.step(said)
        assert text == shown and not info.get("is_success", False)
    text, _, terminated, _, info = game.step("right\n")
    assert (text, terminated, info) == ("SA", True, {"is_success": True})
    with pytest.raises(TypeError, match="cue must be a text, got 3"):
        load_game("GridWorld-v0", {"cue": 3})()


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
    from agents.cli import main

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


# -- classes of tools, as trl takes them ----------------------------------------------------------------------


class Calculator:
    """What trl takes as environment_factory."""

    def reset(self, a, b, **row):
        self.right, self.shown, self.asked = a * b, [], 0
        return f"{a} times {b}"

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: One number.
            b: The other.
        """
        self.shown.append(a * b)
        return a * b

    async def fail(self, reason: str) -> str:
        """Fail.

        Args:
            reason: Of the failure.
        """
        raise ValueError(reason)

    def get_reward(self):
        return float(self.right in self.shown) - 0.25 * len(self.shown)

    def _hidden(self):
        raise AssertionError


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def calculator(**row):
    game = load_game(Calculator)()
    observation, info = game.reset(seed=0, **({"a": 3, "b": 4} | row))
    return game, observation, info


def test_public_methods_are_tools_and_reset_gets_the_row():
    _, observation, info = calculator()
    assert observation == "3 times 4"
    assert [tool["function"]["name"] for tool in info["tools"]] == ["fail", "multiply"]
    assert info["tools"][1]["function"]["parameters"]["required"] == ["a", "b"]


def test_what_reset_returns_goes_to_the_end_of_the_rows_prompt():
    prompt = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "Compute "}]
    assert calculator(prompt=prompt)[1] == [prompt[0], {"role": "user", "content": "Compute 3 times 4"}]
    assert prompt[1]["content"] == "Compute "
    assert calculator(prompt="Compute ")[1] == "Compute 3 times 4"


def test_calls_are_made_in_their_order_and_answered_by_messages_of_the_tool():
    game, *_ = calculator()
    said = f"Let me see. {call('multiply', a=2, b=2)} and {call('multiply', a=3, b=4)}"
    observation, reward, terminated, truncated, _ = game.step(said)
    assert observation == [{"role": "tool", "name": "multiply", "content": text} for text in ("4", "12")]
    assert (reward, terminated, truncated) == (0.5, False, False)


def test_a_turn_without_a_call_ends_the_episode_and_the_score_is_get_reward():
    """Rewards add up to what get_reward says at the end, after whichever turn that is."""
    game, *_ = calculator()
    rewards = [game.step(call("multiply", a=a, b=4))[1] for a in (2, 3)]
    assert rewards == [-0.25, 0.75] and sum(rewards) == game.environment.get_reward()
    assert game.step("It is 12.")[1:4] == (0.0, True, False)
    game.reset(seed=0, a=2, b=2)
    assert game.step("4")[1:3] == (0.0, True)  # nothing is left of the episode before


@pytest.mark.parametrize(
    ("said", "name", "problem"),
    [
        (call("multiplies", a=1, b=2), "multiplies", "Did you mean 'multiply'"),
        (call("_hidden"), "_hidden", "there is no tool"),
        (call("get_reward"), "get_reward", "there is no tool"),
        (call("multiply", a=1), "multiply", "missing a required argument: 'b'"),
        (call("multiply", a=1, b=2, c=3), "multiply", "unexpected keyword argument 'c'"),
        (call("fail", reason="no luck"), "fail", "ValueError: no luck"),
        ('<tool_call>{"name": "multiply", "argum', "", "no JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', "", "names no tool"),
        ('<tool_call>{"name": "multiply", "arguments": [1]}</tool_call>', "multiply", "no object"),
    ],
)
def test_a_call_that_cannot_be_made_gets_an_error_for_an_answer(said, name, problem):
    game, *_ = calculator()
    (answer,), _, terminated, *_ = game.step(said)
    assert (answer["role"], answer["name"], terminated) == ("tool", name, False)
    assert problem in json.loads(answer["content"])["error"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("qwen2_5", call("multiply", a=3, b=4)),
        ("llama3_1", '{"name": "multiply", "parameters": {"a": 3, "b": 4}}'),
        (
            "qwen3_8",
            "<tool_call>\n<function=multiply>\n<parameter=a>\n3\n</parameter>\n<parameter=b>\n4\n</parameter>\n"
            "</function>\n</tool_call>",
        ),
    ],
)
def test_calls_are_read_by_the_tokenizers_own_format_where_it_has_one(template, said):
    from trl.chat_template_utils import add_response_schema

    tokenizer = add_response_schema(chat_tokenizer(template))
    header = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    if header.rstrip().endswith("<think>"):
        said = f"hm</think>\n\n{said}"
    tokens = np.array([*tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id])
    game, *_ = calculator()
    observation, reward, terminated, *_ = game.step(Turn.of(said, tokens, tokenizer, True, header))
    assert observation == [{"role": "tool", "name": "multiply", "content": "12"}]
    assert (reward, terminated) == (0.75, False)
    tokens = np.array([*tokenizer.encode("Twelve.", add_special_tokens=False), tokenizer.eos_token_id])
    assert game.step(Turn.of("Twelve.", tokens, tokenizer, True, header))[2] is True


def chat_game(template, **kwargs):
    """An env whose model has the tokens of a chat tokenizer, and that tokenizer."""
    tokenizer = chat_tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    config.eos_token_id, config.max_position_embeddings = tokenizer.eos_token_id, 4096
    lm = CausalLM(LlamaForCausalLM(config), tokenizer)
    return bound(make_game(lm=lm, max_length=4096, max_new_tokens=200, **kwargs)), tokenizer


def test_tools_are_shown_by_the_chat_template_and_their_answers_too():
    env, tokenizer = chat_game("qwen2_5", game=Calculator, rows=[{"a": 3, "b": 4}])
    observation, info = env.reset(seed=0)
    opening = tokenizer.decode(observation["input_ids"][observation["attention_mask"] > 0])
    assert info["prompt"] == "3 times 4" and '"name": "multiply"' in opening
    said = tokenizer.encode(call("multiply", a=3, b=4), add_special_tokens=False)
    for token in [*said, tokenizer.eos_token_id]:
        observation, _, terminated, _, info = env.step(token)
    shown = tokenizer.decode(observation["input_ids"][observation["attention_mask"] > 0])
    assert not terminated and info["turn_reward"] == 0.75
    answer = "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert shown.endswith(f"</tool_call><|im_end|>\n{answer}")


def test_a_turn_without_a_call_ends_the_episode_behind_a_chat_template():
    env, tokenizer = chat_game("qwen2_5", game=Calculator, rows=[{"a": 3, "b": 4}])
    env.reset(seed=0)
    for token in [*tokenizer.encode("Twelve.", add_special_tokens=False), tokenizer.eos_token_id]:
        _, _, terminated, _, info = env.step(token)
    assert terminated and (info["stop_reason"], info["game_text"], info["turns"]) == ("game", "", 1)


def test_a_reset_that_wants_columns_which_no_row_has_says_where_rows_come_from():
    game = load_game(Calculator)()
    with pytest.raises(
        TypeError, match=r"Calculator\.reset\(\): missing .* 'a'; the row has no columns.*--rows FILE"
    ):
        game.reset(seed=0)
    with pytest.raises(TypeError, match=r"missing .* 'b'; the row has the columns \['a'\]"):
        game.reset(seed=0, a=3)


def test_without_a_chat_template_answers_are_texts():
    class Words(Calculator):
        def reset(self, **row):
            super().reset(1, 1)
            return "a b"

    tokenizer = byte_tokenizer(None)
    game = load_game(Words)()
    assert game.reset(seed=0)[0] == "a b"
    text = Turn.of(call("multiply", a=1, b=1), np.zeros(1, dtype=np.int64), tokenizer, False, "")
    assert game.step(text)[0] == "\n<tool_response>\n1\n</tool_response>\n"


def test_rows_choose_among_several_classes_of_tools():
    class Other(Calculator):
        def reset(self, **row):
            super().reset(1, 1)
            return f"other {row}"

    game = load_game({"one": Calculator, "two": Other})()
    assert game.reset(seed=0, environment="one", a=2, b=2)[0] == "2 times 2"
    assert game.reset(seed=0, environment="two", k=1)[0] == "other {'k': 1}"
    with pytest.raises(ValueError, match=r"must name one of \['one', 'two'\], got None"):
        game.reset(seed=0)


def test_tools_without_a_reward_or_a_schema_are_refused():
    class Unpaid:
        def reset(self, **row): ...

        def tool(self, x: int):
            """A tool.

            Args:
                x: A number.
            """

    class Untold(Calculator):
        def tool(self, x):
            """A tool."""

    with pytest.raises(TypeError, match="no get_reward"):
        load_game(Unpaid)()
    with pytest.raises(TypeError, match=r"Untold\.tool has no schema"):
        load_game(Untold)()
    game = ToolGame(Unpaid(), reward=lambda environment, text: len(text))
    game.reset(seed=0)
    assert game.step("abc")[1:3] == (3.0, True)


def test_a_reset_that_names_the_seed_gets_it():
    class Seeded(Calculator):
        def reset(self, seed, **row):
            return f"seed {seed}"

    assert load_game(Seeded)().reset(seed=7)[0] == "seed 7"


def test_a_game_with_a_method_called_get_reward_is_a_game_all_the_same():
    class Own(Copycat):
        def get_reward(self):
            raise AssertionError

    assert type(load_game(Own)()) is Own


# -- environments of strings ----------------------------------------------------------------------------------


class GemStyle:
    """As GEM's: reset takes a seed and no row."""

    def __init__(self, rounds=1):
        self.rounds = rounds

    def reset(self, seed=None):
        return f"a {seed}", {}

    def step(self, action):
        self.rounds -= 1
        return "b", float(len(action)), self.rounds == 0, False, {}


def test_an_environment_in_gems_style_is_a_game_and_so_is_a_name_that_gem_knows(monkeypatch):
    game = load_game(GemStyle)()
    assert game.reset(seed=3) == ("a 3", {}) and game.step("xyz")[:3] == ("b", 3.0, True)
    made = []
    gem = types.ModuleType("gem")
    gem.make = lambda name, **kwargs: made.append(name) or GemStyle(**kwargs)
    monkeypatch.setitem(sys.modules, "gem", gem)
    game = load_game("gem:game:Guess-v0", {"rounds": 2})()
    game.reset(seed=0)
    assert made == ["game:Guess-v0"] and [game.step("x")[2] for _ in range(2)] == [False, True]


class SkyRLStyle:
    """As skyrl-gym's: made for a row, begins with its prompt."""

    def __init__(self, env_config, extras=None):
        self.right = extras["answer"]
        self.closed, self.left = False, env_config.get("turns", 2)

    def init(self, prompt):
        return prompt, {}

    def step(self, action):
        self.left -= 1
        done = action == self.right or self.left == 0
        observations = [] if done else [{"role": "user", "content": "again"}]
        return {
            "observations": observations,
            "reward": float(action == self.right),
            "done": done,
            "metadata": {},
        }

    def close(self):
        self.closed = True


def test_an_environment_in_skyrl_gyms_style_is_made_for_every_row():
    game = load_game(SkyRLStyle)()
    prompt = [{"role": "user", "content": "one or two?"}]
    assert game.reset(seed=0, prompt=prompt, answer="two") == (prompt, {})
    first = game.env
    assert game.step("one")[:3] == ([{"role": "user", "content": "again"}], 0.0, False)
    assert game.step("two")[:3] == ("", 1.0, True)
    game.reset(seed=0, prompt=prompt, answer="one")
    assert first.closed and game.step("one")[:3] == ("", 1.0, True)
    assert load_game(SkyRLStyle, {"env_config": {"turns": 1}})().make({"answer": "x"}).left == 1
    with pytest.raises(ValueError, match=r"'prompt' of a row, which is not there\. Did you mean 'prompts'"):
        game.reset(seed=0, prompts=prompt)


def test_a_name_that_skyrl_gym_knows_is_made_with_the_row_as_its_extras(monkeypatch):
    skyrl = types.ModuleType("skyrl_gym")
    skyrl.make = lambda name, env_config, extras: SkyRLStyle(env_config, extras)
    monkeypatch.setitem(sys.modules, "skyrl_gym", skyrl)
    env = bound(make_game(game="skyrl_gym:any", rows=[{"prompt": "a b", "answer": "c"}], kl_coef=0.0))
    assert env.reset(seed=0)[1]["prompt"] == "a b"
    info = say(env, "c", "<eos>")[-1]
    assert (info["score"], info["stop_reason"]) == (1.0, "game")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("gem:x", "pip install gem-llm"),
        ("skyrl_gym:x", "pip install skyrl-gym"),
        ("textarena:Nim-v0", r"pip install 'textrl-env\[textarena\]'"),
        ("reasoning_gym:chain_sum", r"pip install 'textrl-env\[games\]'"),
    ],
)
def test_a_package_that_is_missing_is_named_with_how_to_install_it(name, command, monkeypatch):
    monkeypatch.setitem(sys.modules, name.partition(":")[0], None)
    with pytest.raises(ModuleNotFoundError, match=command):
        load_game(name)()


# -- reasoning-gym --------------------------------------------------------------------------------------------


def reasoning(name="chain_sum", **kwargs):
    pytest.importorskip("reasoning_gym")
    return load_game(f"reasoning_gym:{name}", kwargs)()


def test_a_seed_is_a_question_and_its_verifier_scores_the_answer():
    game = reasoning(min_terms=2, max_terms=2)
    openings = [game.reset(seed=seed)[0] for seed in (0, 1, 0)]
    assert openings[0] == openings[2] != openings[1] and openings[0].endswith("=")
    right = game.entry["answer"]
    assert eval(game.entry["metadata"]["expression"]) == int(right)
    assert game.step(f" {right}\n")[:4] == ("", 1.0, True, False)
    game.reset(seed=0)
    assert game.step(f"It is <answer>7</answer>, no, <answer>{right}</answer>.")[1] == 1.0
    game.reset(seed=0)
    assert game.step("no number")[1:3] == (0.0, True)


def test_with_attempts_a_wrong_answer_may_be_given_again_and_gains_add_up_to_the_best():
    game = reasoning(attempts=3, retry="again", instruction="Only the number.")
    assert game.reset(seed=5)[0].endswith("=\nOnly the number.")
    right = game.entry["answer"]
    partly = f"{right} or so"  # reasoning-gym gives a share to an answer that holds the right one
    observation, first, terminated, *_ = game.step(partly)
    assert observation == "again" and 0 < first < 1 and not terminated
    assert game.step("wrong")[:3] == ("again", 0.0, False)
    observation, last, terminated, *_ = game.step(right)
    assert first + last == pytest.approx(1.0) and terminated
    game.reset(seed=5)
    assert [game.step("wrong")[2] for _ in range(3)] == [False, False, True]


def test_rows_hold_more_of_a_tasks_config():
    game = reasoning(max_digits=1, min_digits=1)
    for n in (2, 6):
        game.reset(seed=2, min_terms=n, max_terms=n)
        assert game.entry["metadata"]["num_terms"] == n and len(game.entry["answer"]) <= 2


def test_tasks_that_draw_all_their_items_at_once_have_a_question_for_every_seed_too():
    game = reasoning("acre")
    openings = [game.reset(seed=seed)[0] for seed in (0, 7, 8, 7)]
    assert openings[1] == openings[3] and len(set(openings)) == 3
    assert game.step(game.entry["answer"])[1] == 1.0


def test_an_answer_on_which_the_verifier_fails_counts_as_wrong_and_is_warned_of():
    game = reasoning("game_of_life")
    game.reset(seed=0)
    with pytest.warns(UserWarning, match="1 answers so far count as wrong"):
        assert game.step("{}")[1] == 0.0
    assert game.task.unscored == 1


def test_a_task_or_a_config_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no task 'chain_sums'\. Did you mean 'chain_sum'"):
        reasoning("chain_sums")
    with pytest.raises(ValueError, match="does not take the config"):
        reasoning(terms=3)
    with pytest.raises(ValueError, match="'size' is no config"):
        reasoning(size=10)


def test_a_verifier_that_runs_answers_as_code_is_warned_of():
    with pytest.warns(UserWarning, match="verifier of spiral_matrix evaluates answers as Python"):
        reasoning("spiral_matrix")


def test_a_verifier_that_only_evaluates_its_own_answer_is_not(recwarn):
    reasoning("number_sorting")
    assert not [w for w in recwarn if "as Python" in str(w.message)]


# -- textarena ------------------------------------------------------------------------------------------------


def takes_one(seen):
    """An opponent in Nim that takes one from the first pile that has any left."""
    piles = re.findall(r"pile (\d): (\d+)", seen)[-3:]
    return f"[{next(pile for pile, left in piles if int(left))} 1]"


def calls(seen):
    """An opponent in poker that pays to see, or checks."""
    return "[check]" if seen.rfind("[check]") > seen.rfind("[call]") else "[call]"


def arena(name="Nim-v0", **kwargs):
    pytest.importorskip("textarena")
    return load_game(f"textarena:{name}", kwargs)()


def test_a_game_of_two_is_played_against_an_opponent_that_is_given():
    game = arena(opponent="tests.test_game_adapters:takes_one", piles=[1, 1, 1], seat=0)
    opening, _ = game.reset(seed=0)
    assert "Welcome to Nim, Player 0!" in opening and opening.endswith("pile 0: 1\n  pile 1: 1\n  pile 2: 1")
    shown, reward, terminated, *_ = game.step("[1 1]")
    assert (reward, terminated) == (0.0, False) and shown.endswith("pile 0: 0\n  pile 1: 0\n  pile 2: 1")
    assert "[Player 1] [0 1]" in shown and "[1 1]" not in shown and "Welcome" not in shown
    shown, reward, terminated, truncated, _ = game.step("[2 1]")
    assert (reward, terminated, truncated) == (1.0, True, False) and "took the last" in shown


def test_the_opponent_may_move_first_and_win():
    game = arena(opponent=takes_one, piles=[1, 1, 0], seat=1)
    opening, _ = game.reset(seed=0)
    assert "[Player 0] [0 1]" in opening
    assert game.step("no move")[1:3] == (0.0, False)  # textarena lets one pass, and says so
    assert game.step("no move")[1:3] == (-1.0, True)
    lost = arena(opponent=takes_one, piles=[1, 1, 1], seat=1)
    lost.reset(seed=0)
    assert lost.step("[1 1]")[1:3] == (-1.0, True)


def test_seats_are_drawn_from_the_seed():
    game = arena(opponent=takes_one)
    seats = []
    for seed in (*range(8), 0):
        game.reset(seed=seed)
        seats.append(game.seat)
    assert set(seats) == {0, 1} and seats[0] == seats[-1]
    game.reset(seed=0, seat=1)
    assert game.seat == 1


def test_games_side_by_side_draw_from_random_numbers_of_their_own():
    """textarena draws from Python's own numbers; what it draws for one game is nothing to another one, or to us."""
    make = load_game(
        f"textarena:{pytest.importorskip('textarena') and 'Poker-v0'}", {"opponent": calls, "seat": 0}
    )

    def play(*games):
        shown = [[game.reset(seed=3)[0]] for game in games]
        for _ in range(4):
            for game, seen in zip(games, shown, strict=True):
                seen.append(game.step("[check]" if "[check]" in seen[-1] else "[call]")[0])
        return shown

    random.seed(11)
    before = random.getstate()
    (alone,), beside = play(make()), play(make(), make())
    assert random.getstate() == before
    assert beside == [alone, alone]


def test_a_frozen_model_is_an_opponent_and_a_game_that_it_cannot_begin_is_begun_again():
    rival = FrozenModel(make_lm(), max_new_tokens=3)
    moves = [rival("a b c", rng=random.Random(seed)) for seed in (5, 5, 6, 7, 8)]
    assert moves[0] == moves[1] and len(set(moves)) > 1 and set(" ".join(moves).split()) <= set(WORDS)
    game = arena(opponent=rival, seat=0)
    game.reset(seed=0)
    assert game.step("[0 1]")[1:3] == (1.0, True)  # it knows no move, and the second bad one loses
    with pytest.raises(ValueError, match="over before the policy's first turn 20 times"):
        arena(opponent=lambda seen: "no move", seat=1).reset(seed=0)


def test_a_game_for_one_player_needs_no_opponent_and_one_for_two_says_that_it_does():
    game = arena("GuessTheNumber-v0")
    assert "guess" in game.reset(seed=0)[0].lower()
    right = game.env.state.game_state["game_number"]
    shown, _, terminated, *_ = game.step(f"[{right % 20 + 1}]")
    assert "target number is" in shown and not terminated
    assert game.step(f"[{right}]")[1:3] == (1.0, True)
    with pytest.raises(ValueError, match=r"Nim-v1.*Did you mean 'Nim-v0"):
        arena("Nim-v1")


# -- the example ----------------------------------------------------------------------------------------------


def test_the_calculator_of_the_examples_pays_for_the_right_answer_after_a_call():
    game = load_game("examples/calculator.py:game")()
    opening, info = game.reset(seed=4)
    question = re.search(r"What is (.*)\?", opening)[1]
    assert opening == game.reset(seed=4)[0] != game.reset(seed=5)[0]
    assert [tool["function"]["name"] for tool in info["tools"]] == ["calculate"]
    game.reset(seed=4)
    (answer,), reward, terminated, *_ = game.step(call("calculate", expression=question))
    assert int(answer["content"]) == eval(question) and (reward, terminated) == (0.0, False)
    (answer,), reward, *_ = game.step(call("calculate", expression="__import__('os')"))
    assert "expected whole numbers" in answer["content"] and reward == 0.0
    assert game.step(f"It is {eval(question)}.")[1:3] == (1.0, True)
    game.reset(question="2 - 3 * 4 + 1")
    assert game.step("-9")[1:3] == (1.0, True)
