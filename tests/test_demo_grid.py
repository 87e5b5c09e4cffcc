"""Claims about the demo on a board, and about language models that have read nothing but random walks."""

from __future__ import annotations

import io
import json
import random

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents.cli import main
from agents.commands import demo_grid
from agents.commands.demo_grid import GAME, MAX_MOVES, MOVES, Frame, make_grid_walker, picture, play
from agents.offline.random_walks import make_walker, random_walk, random_walks, walk_tokenizer
from agents.runs import run_directory
from textrl_env.envs.text_game import TextGameEnv
from textrl_env.games.loading import load_game


@pytest.fixture(scope="module")
def walker(tmp_path_factory):
    """A language model that has read a few walks."""
    folder = tmp_path_factory.mktemp("models") / "walker"
    make_grid_walker(folder, walks=48)
    return folder


@pytest.fixture(scope="module")
def env(walker):
    return TextGameEnv(**GAME | {"model": str(walker)})


def board_game():
    return load_game(GAME["game"], GAME["game_kwargs"])()


def test_a_walk_is_written_as_the_environment_shows_it(env):
    words = random.Random(5).choices(MOVES, k=4)
    observation, info = env.reset(options={"prompt_id": 3})
    written = [info["prompt"]]
    for word in words:
        for token in env.lm.tokenizer(f"{word}\n")["input_ids"]:
            observation, _, terminated, _, info = env.step(token)
        written += [f"{word}\n", info["game_text"]]
        if terminated:
            break
    shown = observation["input_ids"][observation["attention_mask"] == 1]
    walk = random_walk(board_game(), words[:1], 1, random.Random(0), seed=3)
    assert env.lm.tokenizer.decode(shown) == "".join(written) and "".join(written).startswith(walk)


def test_a_move_is_one_token_and_a_row_of_the_board_too():
    texts = random_walks(board_game, MOVES, 300, MAX_MOVES, seed=0)
    tokenizer = walk_tokenizer(texts, 256)
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in texts[:20])
    for text in (*(f"{move}\n" for move in MOVES), "..H.\n", "> "):
        assert len(tokenizer(text)["input_ids"]) == 1, text


def test_walks_and_models_of_one_seed_are_the_same_and_of_two_seeds_are_not(tmp_path):
    few = {"walks": 4, "game_kwargs": GAME["game_kwargs"], "hidden_size": 16, "num_layers": 1}
    losses = [
        make_walker(tmp_path / str(i), GAME["game"], MOVES, seed=seed, **few)["loss"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_model_that_is_there_is_not_made_again(walker):
    before = (walker / "model.safetensors").stat().st_mtime_ns
    assert make_grid_walker(walker, walks=10**9)["records"] == 48
    assert (walker / "model.safetensors").stat().st_mtime_ns == before


class Acts:
    """Writes the same moves whatever it reads."""

    def __init__(self, env, *moves):
        self.tokens = [t for move in moves for t in env.lm.tokenizer(f"{move}\n")["input_ids"]]

    def predict(self, observation):
        return self.tokens.pop(0), None


def test_frames_follow_the_walker_and_say_how_it_ended(env):
    start = next(k for k in range(100) if play(Acts(env), env, k).__next__().trail == ((3, 3),))
    *_, last = play(Acts(env, "G", "up", "up", "up"), env, start)
    assert last.outcome == "reached the goal after 4 moves"
    assert last.trail == ((3, 3), (3, 3), (2, 3), (1, 3), (0, 3)) and last.board.split("\n")[0] == "S..A"
    assert "".join(text for text, by_policy in last.talk if by_policy) == "G\nup\nup\nup\n"
    *_, last = play(Acts(env, "left", "up"), env, start)
    assert last.outcome == "fell into a pit after 2 moves"
    *_, last = play(Acts(env, *["left", "right"] * MAX_MOVES), env, start)
    assert last.outcome == f"still on the way after {MAX_MOVES} moves"


def test_the_board_and_the_text_stand_side_by_side():
    console = Console(file=io.StringIO(), width=100)
    talk = (("rules\nAG\n> ", False), ("right\n", True), ("SA", False))
    console.print(picture(Frame("SA", ((0, 0), (0, 1)), talk, "reached the goal after 1 moves"), "after"))
    text = console.file.getvalue()
    assert any("•" in line and "rules" in line for line in text.split("\n")) and "> right" in text
    assert "reached the goal" in text and " after " in text


def test_the_demo_in_a_small_form(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_grid, "WALKS", 16)
    monkeypatch.setattr(demo_grid, "HYPER_PARAMETERS", {"n_episodes": 8, "group_size": 4})
    assert main(["demo", "--game", "grid", "--total-timesteps", "60"]) == 0
    said = capsys.readouterr().out
    assert said.count("what it reads and writes") == 2 and "of walks" in said
    found = json.loads((tmp_path / "runs/grid/evaluation.json").read_text())
    assert 0 <= found["success_before"] <= 1 and found["episodes"] >= 8
    config = run_directory.read_config(tmp_path / "runs/grid")
    assert (
        config["env_kwargs"]["game"] == "GridWorld-v0"
        and (tmp_path / "runs/grid/learning_curve.png").exists()
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs/grid/final")
    AutoTokenizer.from_pretrained(tmp_path / "runs/grid/final")
    assert main(["demo", "--game", "chess"]) == 2
    assert "--game='chess' is not known; expected one of ['grid']" in capsys.readouterr().err
