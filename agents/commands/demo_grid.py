"""``textrl demo --game grid``: a language model learns to walk over a board that it reads as text.

A small Llama is made on the spot from random walks and nothing else, so it knows the moves and prefers none. It plays
an episode of ``GridWorld-v0``, learns by GRPO, and plays another one; both are shown token by token, the board beside
the text. The settings are the constants below, those of ``examples/one_board.py`` too.

Left out: other games; any of them trains with ``textrl train --game``.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback

MOVES = ("left", "down", "right", "up")
#: Where the policy writes its move.
CUE = "\n> "
MAX_MOVES = 10
#: Starts at 3, 3 and 6 moves from the goal.
MAP = ("S..G", ".#..", "..H.", "S..S")
#: ``TextGame-v0``'s, but for the model.
GAME: dict[str, Any] = {
    "game": "GridWorld-v0",
    # A move that is none costs more than one that leads nowhere, or keeping silent would be the safest walk.
    "game_kwargs": {"cue": CUE, "map": list(MAP), "invalid_reward": -0.05},
    "layout": "text",
    "stop": "\n",
    "max_turns": MAX_MOVES,
    "max_length": 112,
    "max_new_tokens": 2,
    "kl_coef": 0.01,
    "device": "cpu",
}
#: GRPO's.
HYPER_PARAMETERS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "n_episodes": 64,
    "n_epochs": 4,
    "scale": "none",
    "stats_window_size": 64,
}
#: Random walks that the language model is made from.
WALKS = 3000
TOTAL_TIMESTEPS = 12_000
#: What cells look like, two characters wide.
_CELLS = {
    "S": "on grey23",
    ".": "on grey15",
    "#": "on grey50",
    "H": "on dark_red",
    "G": "on dark_green",
    "A": "bold black on yellow3",
}
_TRAIL, _LINES = "yellow3", 16


class Frame(NamedTuple):
    """An episode after some token.

    Attributes:
        board: The latest board, as text.
        trail: Cells that were walked over, ``(row, column)``.
        talk: All that was written so far, and whether the policy wrote it.
        outcome: How it ended; "" before.
    """

    board: str
    trail: tuple[tuple[int, int], ...]
    talk: tuple[tuple[str, bool], ...]
    outcome: str = ""


class Success(BaseCallback):
    """Notes how many of an update's episodes reached the goal.

    Attributes:
        points: ``(episodes, moves, timesteps, share that succeeded)`` after each rollout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, int, int, float]] = []
        self._episodes = self._moves = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        noted = self.model.episodes
        count = self.model.n_episodes
        latest = itertools.islice(reversed(noted.successes), count)
        self._episodes += count
        # A turn is a move; where there are none, a timestep is one.
        turns = noted.text.get("turns")
        self._moves = self.model.num_timesteps if turns is None else self._moves + int(np.sum(turns[-count:]))
        self.points.append(
            (self._episodes, self._moves, self.model.num_timesteps, float(np.mean(list(latest))))
        )


def grid_config(walker: str | Path, seed: int, total_timesteps: int, command: str = "") -> dict[str, Any]:
    """The ``config.json`` of a run on the board.

    Args:
        walker: Folder of the language model that it begins with.
        seed: Of everything.
        total_timesteps: Tokens to learn for.
        command: The command line that says the same.
    """
    from agents.runs import run_directory as runs

    return runs.new_config(
        agent="grpo",
        agent_kwargs=HYPER_PARAMETERS,
        env="TextGame-v0",
        env_kwargs=GAME | {"model": str(walker)},
        total_timesteps=total_timesteps,
        seed=seed,
        save_every=total_timesteps,
        command=command,
    )


def make_grid_walker(folder: Path, seed: int = 0, walks: int = WALKS) -> dict[str, float]:
    """The language model that has read random walks over the board, see :mod:`agents.offline.random_walks`."""
    from agents.offline.random_walks import make_walker

    return make_walker(
        folder, GAME["game"], MOVES, game_kwargs=GAME["game_kwargs"], walks=walks, seed=seed, turns=MAX_MOVES
    )


def success_rate(agent: Any, episodes: int = 256, seed: int = 10_000) -> float:
    """The share of fresh episodes of a text game in which the present policy, sampled, reaches the goal."""
    env, policy = agent.text_env, agent.policy
    starts = seed + np.arange(episodes)
    with policy.talking(env.max_length, env.stop):
        played = env.run_episodes(lambda prompts: policy.generate(prompts, env.max_new_tokens), starts)
    return float(played.success.mean())


def play(agent: Any, env: Any, seed: int) -> Iterator[Frame]:
    """An episode, a frame for each token."""
    observation, info = env.reset(seed=seed)
    board = _last_board(info["prompt"])
    trail: list[tuple[int, int]] = [_place(board)]
    talk: list[tuple[str, bool]] = [(info["prompt"], False)]
    yield Frame(board, tuple(trail), tuple(talk))
    over = False
    while not over:
        token, _ = agent.predict(observation)
        observation, _, terminated, truncated, info = env.step(int(token))
        over = terminated or truncated
        talk.append((env.unwrapped.lm.tokenizer.decode([int(token)]), True))
        if "game_text" in info:
            talk.append((info["game_text"], False))
            board = _last_board(info["game_text"]) or board
            trail.append(_place(board))
        yield Frame(board, tuple(trail), tuple(talk), _outcome(info) if over else "")


def _log_prob(agent: Any, observation: dict[str, np.ndarray], action: int) -> float:
    """What the policy says of one action of one environment."""
    batch = {name: value[None] for name, value in observation.items()}
    return float(agent.policy.log_prob(batch, np.array([action]))[0])


def _outcome(info: dict[str, Any]) -> str:
    moves = f"after {info['turns']} moves"
    if info.get("is_success"):
        return f"reached the goal {moves}"
    return f"fell into a pit {moves}" if info["stop_reason"] == "game" else f"still on the way {moves}"


def _last_board(text: str) -> str:
    """The last lines that are nothing but cells; "" where there are none."""
    lines = text.removesuffix(CUE).split("\n")
    rows = itertools.takewhile(lambda line: line and set(line) <= set(_CELLS), reversed(lines))
    return "\n".join(reversed(list(rows)))


def _place(board: str) -> tuple[int, int]:
    """Row and column of the walker."""
    rows = board.split("\n")
    row = next(i for i, line in enumerate(rows) if "A" in line)
    return row, rows[row].index("A")


def picture(frame: Frame, title: str) -> Any:
    """A frame for the terminal: the board at the left, the end of the text at the right."""
    drawn = Text()
    for i, row in enumerate(frame.board.split("\n")):
        for j, cell in enumerate(row):
            walked = (i, j) in frame.trail and cell != "A"
            style = f"{_TRAIL} {_CELLS[cell]}" if walked else _CELLS[cell]
            drawn.append(f" {'•' if walked else cell if cell in 'AGH' else ' '} ", style=style)
        drawn.append("\n")
    drawn.rstrip()
    said = Text()
    for text, by_policy in frame.talk:
        said.append(text, style="bold cyan" if by_policy else "dim")
    lines = said.split("\n")[-_LINES:]
    text_panel = Panel(Text("\n").join(lines), title="what it reads and writes", width=34, height=_LINES + 2)
    board_panel = Panel(Group(drawn, Text(frame.outcome, style="bold")), title=title)
    return Columns([board_panel, text_panel])


def show(console: Console, agent: Any, env: Any, title: str, seed: int, seconds: float) -> Frame:
    """Play an episode before the reader's eyes, so many seconds for a token; without a terminal its last frame."""
    frames = play(agent, env, seed)
    frame = next(frames)
    if not console.is_terminal:
        *_, frame = frames
        console.print(picture(frame, title))
        return frame
    with Live(picture(frame, title), console=console, auto_refresh=False) as live:
        for frame in frames:
            live.update(picture(frame, title), refresh=True)
            time.sleep(seconds)
    return frame


def run(folder: Path, total_timesteps: int, seed: int) -> None:
    """The whole demo."""
    import gymnasium as gym
    import torch

    from agents.commands.learning import learn
    from agents.commands.terminal import print_files, quiet_transformers
    from agents.evaluation.plots import plot_learning_curve
    from agents.runs import run_directory as runs
    from agents.runs.lock import locked
    from agents.runs.logs import read_progress

    torch.set_num_threads(1)
    started, console = time.perf_counter(), Console()
    quiet_transformers()
    walker = folder.with_name(f"{folder.name}_walker")
    console.print(
        "\n[bold]A language model learns to walk over a board that it reads as text.[/bold]\n"
        "It writes a move, the environment answers with the board; a token is a step, a walk an episode. "
        f"First it reads {WALKS:,} random walks ...\n",
        highlight=False,
    )
    runs.check_directory(folder, overwrite=True)
    made = make_grid_walker(walker, seed, WALKS)
    console.print(
        f"{made['parameters']:,.0f} weights, a vocabulary of {made['vocabulary']:.0f}, made from "
        f"{made['tokens']:,.0f} tokens; loss {made['first_loss']:.2f} to {made['loss']:.2f}.\n",
        style="dim",
        highlight=False,
    )
    config = grid_config(walker, seed, total_timesteps, "textrl demo --game grid")
    agent = runs.make_agent(config)
    env = gym.make("textrl_env:TextGame-v0", **GAME | {"model": agent.text_env.lm})
    env.unwrapped.bind_policy(lambda observation, action: _log_prob(agent, observation, action))
    show(console, agent, env, "before", seed, 0.08)
    success = Success()
    with locked(folder):
        runs.prepare_directory(folder, overwrite=True)
        runs.write_config(folder, config)
        learn(agent, folder, config, [success])
    show(console, agent, env, "after", seed, 0.15)
    before, after = success.points[0][-1], success_rate(agent)
    results = {"success_before": before, "success_after": after, "episodes": success.points[-1][0]}
    runs.write_json(folder / runs.EVALUATION, results)
    console.print(
        f"\n[bold]It reaches the goal in {after:.0%} of walks, {before:.0%} before[/bold] "
        f"(at most {MAX_MOVES} moves, {success.points[-1][0]:,} walks to learn from).",
        highlight=False,
    )
    title = f"GRPO: {before:.0%} to {after:.0%} of walks reach the goal"
    plot_learning_curve(read_progress(folder), folder / "learning_curve.png", title)
    files = [
        ("learning_curve.png", "reward and KL against tokens"),
        ("final", "the trained model, an ordinary Hugging Face folder"),
        ("progress.csv", "the log"),
    ]
    commands = [
        (f"textrl report {folder}", "the run as one page"),
        ("textrl train --agent grpo --env GridWorld-v0 --run-dir runs/mlp", "the same board with an MLP"),
        ("textrl train --game FrozenLake-v1 --run-dir runs/lake", "another game"),
    ]
    print_files(console, folder, files, commands)
    console.print(f"That took {time.perf_counter() - started:.0f} s.", style="dim", highlight=False)
