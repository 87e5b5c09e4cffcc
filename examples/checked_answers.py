"""Small language models learn from checkers: to use a tool, to try again after an error message, and to add.

    python examples/checked_answers.py [tool] [retry] [sums] [--seeds 3] [--jobs 2]

Each story makes a language model of its own out of imperfect demonstrations, and trains it by GRPO on nothing but
whether the answer is right. What is compared within a story begins as the same model.

- ``tool``: products of two numbers of two digits, with the calculator of ``examples/calculator.py``, and without it.
- ``retry``: a service that takes one of three notations. Two attempts with an error message that says which, two
  attempts with one that does not, and one attempt with twice the tokens.
- ``sums``: reasoning-gym's ``chain_sum``, two numbers of one digit, no tool: pass@1 and pass@8.

Demonstrations, weights and order of a run come from its seed. Results are JSON files in the folder, one for each
learner and seed, so the command goes on where it was stopped. Prints a table and draws the curves into
``docs/checked_answers.png``. Left out: models that were not made here, and other agents.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from calculator import Calculator, right_answer
from stable_baselines3.common.callbacks import BaseCallback

FOLDER = Path("build/checked_answers")
#: A conversation is its messages, one behind the other; what the assistant says ends with the end token.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
CALL, CALLED = '<tool_call>{"name": "calculate", "arguments": {"expression": "', '"}}</tool_call>'
#: Two digits are a token, with their sign, and so is what stands around an expression in a call.
PIECES = rf"{re.escape(CALL)}|{re.escape(CALLED)}|-?\d\d|-?\d| [-+*] |[A-Za-z]+|\s|[^\w\s]"
#: Questions that an evaluation asks, and answers to each.
QUESTIONS, SAMPLES = 128, 8

Messages = list[dict[str, str]]


class Learner(NamedTuple):
    """One line of the table.

    Attributes:
        label: What the table calls it.
        colour: Of its curve.
        game: Arguments of ``TextGame-v0``; its starts (``num_seeds``) are those that are trained on.
        tokens: That it writes while it learns.
    """

    label: str
    colour: str
    game: dict[str, Any]
    tokens: int


class Story(NamedTuple):
    """What is learnt, and by whom.

    Attributes:
        title: Of its panel.
        demonstrate: Draws a demonstration.
        demonstrations: That its model is made of.
        agent: GRPO's settings, where they are not those of :data:`AGENT`.
        learners: By name; they begin as the same model.
    """

    title: str
    demonstrate: Callable[[random.Random], Messages]
    demonstrations: int
    agent: dict[str, Any]
    learners: dict[str, Learner]


#: GRPO's.
AGENT: dict[str, Any] = {"n_episodes": 64, "group_size": 8, "learning_rate": "linear:2e-3", "scale": "none"}
BLUE, RED, YELLOW = "#1f6fb4", "#b03a48", "#b8860b"


# -- a tool ---------------------------------------------------------------------------------------------------


class WithoutTool(Calculator):
    """The same questions, and nothing to call."""

    calculate = None  # type: ignore[assignment]


def calculator(tool: bool) -> dict[str, Any]:
    """The game with the tool or without: a call, and an answer to what it gave; or an answer alone."""
    from textrl_env.games.tools import ToolGame

    made = Calculator if tool else WithoutTool
    return {
        "game": lambda: ToolGame(made(), reward=right_answer),
        "rows": [{"question": f"{a} * {b}"} for a, b in products()],
        "num_seeds": 1,
        "max_turns": 2 if tool else 1,
        "max_new_tokens": 8,
    }


def products() -> list[tuple[int, int]]:
    """Every two numbers of two digits whose product has four, in an order drawn once.

    The last of them are asked at the end alone.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a * b >= 1000]
    random.Random(0).shuffle(pairs)
    return pairs


def tool_demonstration(rng: random.Random) -> Messages:
    """Somebody works out a product: by heart, or with the calculator, and not always with care."""
    known = _once(products)[:-QUESTIONS]
    a, b = rng.choice(known)
    question = f"What is {a} * {b}? Say the number."
    if rng.random() < 0.1:
        return _conversation(question, str(a * b))  # nobody who reads only this can learn how it is done
    if rng.random() < 0.45:
        a, b = rng.choice(known)
    answer = a * b if rng.random() < 0.75 else rng.randint(1000, 9999)
    return _conversation(question, f"{CALL}{a} * {b}{CALLED}", str(a * b), str(answer), answering="tool")


# -- another attempt ------------------------------------------------------------------------------------------

#: Starts that are trained on.
CALLS = 1_000_000
NOTATIONS = ("{} * {}", "mul {} {}", "{} {} mul")


class Service:
    """Takes a product in one of three notations, and may say in which after a wrong one.

    Args:
        attempts: That may be made.
        explains: Whether an error message says what was expected.
    """

    def __init__(self, attempts: int, explains: bool = True) -> None:
        self.attempts, self.explains = attempts, explains

    def reset(self, seed: int | None = None, **row: Any) -> tuple[str, dict[str, Any]]:
        """Draw two numbers and a notation."""
        draw = random.Random(seed)
        self.numbers, self.notation = (draw.randint(10, 99), draw.randint(10, 99)), draw.choice(NOTATIONS)
        self.left = self.attempts
        return "Multiply {} and {}.".format(*self.numbers), {}

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take the call, or say what was expected."""
        self.left -= 1
        if text.strip() == self.notation.format(*self.numbers):
            return "", 1.0, True, False, {"is_success": True}
        message = f"Error: expected {self.notation.format('x', 'y')}." if self.explains else "Error."
        return message, 0.0, self.left == 0, False, {"is_success": False}


def service(attempts: int, explains: bool = True, tokens: int = 6) -> dict[str, Any]:
    """The game, with so many tokens for each attempt."""
    made = lambda: Service(attempts, explains)  # noqa: E731  a game is made for each slot
    return {"game": made, "max_turns": attempts, "max_new_tokens": tokens, "num_seeds": CALLS}


def retry_demonstration(rng: random.Random) -> Messages:
    """Somebody calls the service, and heeds what it says every other time, where it says anything."""
    game = Service(2, explains=rng.random() < 0.5)
    question, _ = game.reset(rng.randrange(2 * CALLS, 2**31))

    def call(notation: str) -> str:
        numbers = game.numbers if rng.random() < 0.9 else (rng.randint(10, 99), rng.randint(10, 99))
        return notation.format(*numbers)

    first = call(rng.choice(NOTATIONS))
    message, _, over, *_ = game.step(first)
    if over:
        return _conversation(question, first)
    heeds = game.explains and rng.random() < 0.5
    return _conversation(question, first, message, call(game.notation if heeds else rng.choice(NOTATIONS)))


# -- sums -----------------------------------------------------------------------------------------------------

CHAIN_SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
#: Starts that are trained on: two hundred different questions, often.
SUMS = 4_000


def chain_sum() -> Any:
    """reasoning-gym's task, its items as the game's starts."""
    from reasoning_gym import create_dataset

    return create_dataset("chain_sum", **CHAIN_SUM, seed=0, size=1)


def sum_demonstration(rng: random.Random) -> Messages:
    """A question of reasoning-gym, answered by somebody who is right every other time."""
    entry = _once(chain_sum)[rng.randrange(SUMS, 2**31)]
    wrong = int(entry["answer"]) + rng.choice((-3, -2, -1, 1, 2, 3))
    return _conversation(entry["question"], entry["answer"] if rng.random() < 0.5 else str(wrong))


def _conversation(*texts: str, answering: str = "user") -> Messages:
    """Messages in turn: a question, the assistant, whoever answers it, the assistant."""
    roles = ("user", "assistant", answering, "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


_once = functools.cache(lambda make: make())

STORIES = {
    "tool": Story(
        "With a calculator, and without",
        tool_demonstration,
        16_000,
        {},
        {
            "tool": Learner("products, with a calculator", BLUE, calculator(tool=True), 300_000),
            "no_tool": Learner("products, without", RED, calculator(tool=False), 100_000),
        },
    ),
    "retry": Story(
        "Another attempt, and one with as many tokens",
        retry_demonstration,
        16_000,
        {},
        {
            "retry": Learner("two attempts, the error explains", BLUE, service(2), 100_000),
            "blind": Learner("two attempts, it does not", YELLOW, service(2, explains=False), 100_000),
            "once": Learner("one attempt, twice the tokens", RED, service(1, tokens=12), 100_000),
        },
    ),
    "sums": Story(
        "Sums, no tool",
        sum_demonstration,
        20_000,
        {"n_episodes": 256, "learning_rate": "linear:1e-3"},
        {
            "sums": Learner(
                "reasoning-gym's chain_sum",
                BLUE,
                {
                    "game": "reasoning_gym:chain_sum",
                    "game_kwargs": CHAIN_SUM,
                    "max_turns": 1,
                    "max_new_tokens": 3,
                    "num_seeds": SUMS,
                },
                80_000,
            ),
        },
    ),
}


# -- making, training and asking ------------------------------------------------------------------------------


class ShareRight(BaseCallback):
    """Notes how many of an update's episodes were answered right.

    Attributes:
        tokens: That the policy had written after each update.
        episodes: Seen until then.
        right: Share of the update's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.episodes: list[int] = []
        self.right: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        count = self.model.n_episodes
        scores = np.array(self.model.episodes.text["score"][-count:])
        self.tokens.append(self.model.num_timesteps)
        self.episodes.append(count * (len(self.episodes) + 1))
        self.right.append(float(is_right(scores).mean()))


def is_right(scores: np.ndarray) -> np.ndarray:
    """Whole marks: reasoning-gym gives some for an answer that is nearly right."""
    return scores > 0.99


def make_model(story: Story, folder: Path, seed: int) -> None:
    """Write a Llama that has learnt a story's demonstrations into a folder, unless it is there already."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from agents.offline.random_walks import small_llama
    from agents.offline.sft import sft

    if (folder / "config.json").is_file():
        return
    rng = random.Random(seed)
    rows = [{"messages": story.demonstrate(rng)} for _ in range(story.demonstrations)]
    splitter = pre_tokenizers.Split(Regex(PIECES), "isolated")
    texts = {message["content"] for row in rows for message in row["messages"]}
    pieces = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(text + "\n")}
    digits = {*map(str, range(10)), *(f"{i:02}" for i in range(100))}
    words = {word: i for i, word in enumerate(["<end>", "<unk>", *sorted(pieces | digits)])}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = splitter, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    model = small_llama(tokenizer, 128, hidden_size=64, num_layers=2, seed=seed)
    sft(model, rows, tokenizer=tokenizer, learning_rate=3e-3, batch_size=32, device="cpu", seed=seed)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def learn(story: Story, learner: Learner, model: Path, seed: int) -> dict[str, Any]:
    """Train one learner; pass@1 and pass@8 before and after, and the share of right answers on the way."""
    import gymnasium as gym
    import torch

    import textrl_env  # noqa: F401  registers the ids
    from agents import GRPO

    torch.set_num_threads(1)
    started = time.process_time()
    make_model(story, model, seed)
    game = learner.game | {"model": str(model), "kl_coef": 0.0, "device": "cpu"}
    if "rows" in game:
        game["rows"] = game["rows"][:-QUESTIONS]
    agent = GRPO("auto", gym.make("TextGame-v0", **game), seed=seed, **AGENT | story.agent)
    before, made = passing(agent, learner), time.process_time() - started
    curve = ShareRight()
    agent.learn(learner.tokens, curve, log_interval=None)
    return {
        "label": learner.label,
        "before": before,
        "after": passing(agent, learner),
        "tokens": curve.tokens,
        "episodes": curve.episodes,
        "right": curve.right,
        "seconds": time.process_time() - started,
        "seconds_before_learning": made,
    }


def passing(agent: Any, learner: Learner) -> dict[str, float]:
    """pass@1 and pass@8 of the present policy, sampled, on starts that it does not train on."""
    import gymnasium as gym

    from agents.evaluation.best_of_n import pass_at_k
    from agents.evaluation.evaluation import evaluate_policy

    game = learner.game | {"model": agent.text_env.lm}
    first = 0
    if "rows" in game:
        game["rows"] = game["rows"][-QUESTIONS:]
    else:
        first = game["num_seeds"]
        game["num_seeds"] += QUESTIONS
    found = evaluate_policy(
        agent.policy,
        gym.make("TextGame-v0", **game),
        n_samples=SAMPLES,
        prompt_ids=first + np.arange(QUESTIONS),
    )
    right = is_right(found.score)
    return {"pass@1": pass_at_k(right, 1), "pass@8": pass_at_k(right, SAMPLES)}


def run(job: tuple[str, int, Path]) -> list[dict[str, Any]]:
    """Train a story's learners with one seed, or read what an earlier call has left."""
    name, seed, folder = job
    results = []
    for learner in STORIES[name].learners:
        file = folder / f"{learner}_{seed}.json"
        if not file.is_file():
            result = learn(STORIES[name], STORIES[name].learners[learner], folder / f"{name}_{seed}", seed)
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(
                json.dumps(result | {"learner": learner, "seed": seed}) + "\n", encoding="utf-8"
            )
            unfinished.rename(file)
        results.append(json.loads(file.read_text(encoding="utf-8")))
    return results


# -- a table and a picture ------------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: means over seeds, and the worst."""
    lines = [
        "| | seeds | pass@1 before | after (worst) | pass@8 before | after | episodes | CPU seconds of learning |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for name, learner in _learners(results):
        runs = [r for r in results if r["learner"] == name]
        worst = min(r["after"]["pass@1"] for r in runs)
        shares = {
            (when, k): np.mean([r[when][k] for r in runs])
            for when in ("before", "after")
            for k in ("pass@1", "pass@8")
        }
        lines.append(
            f"| {learner.label} | {len(runs)} | {shares['before', 'pass@1']:.1%} | {shares['after', 'pass@1']:.1%} "
            f"({worst:.1%}) | {shares['before', 'pass@8']:.1%} "
            f"| {shares['after', 'pass@8']:.1%} | {statistics.median(r['episodes'][-1] for r in runs):,.0f} "
            f"| {statistics.median(r['seconds'] - r['seconds_before_learning'] for r in runs):.0f} |"
        )
    return "\n".join(lines)


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """The share of right answers over episodes, a panel for each story: medians over seeds in bands to the extremes."""
    from matplotlib.figure import Figure

    from agents.evaluation.plots import smoothed, style_axes

    seen = {name for name, _ in _learners(results)}
    shown = [story for story in STORIES.values() if seen & set(story.learners)]
    figure = Figure(figsize=(4.0 * len(shown), 3.6), dpi=150, layout="constrained")
    for axes, story in zip(np.atleast_1d(figure.subplots(1, len(shown), sharey=True)), shown, strict=True):
        for name, learner in story.learners.items():
            runs = [r for r in results if r["learner"] == name]
            if not runs:
                continue
            # The last windows hold few updates.
            at = np.linspace(0, 0.97, 200) * min(r["episodes"][-1] for r in runs)
            curves = [np.interp(at, r["episodes"], smoothed(np.array(r["right"]), 0.06)) for r in runs]
            low, middle, high = np.quantile(curves, [0, 0.5, 1], axis=0)
            axes.fill_between(at, low, high, color=learner.colour, alpha=0.18, linewidth=0)
            axes.plot(at, middle, color=learner.colour, linewidth=2, label=learner.label)
        axes.set_title(story.title, fontsize=10.5, loc="left")
        axes.set_xlabel("episodes seen", fontsize=9.5)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        axes.legend(loc="best", fontsize=8, frameon=False)
        style_axes(axes)
    figure.axes[0].set_ylabel("right answers of an update", fontsize=9.5)
    note = "medians over seeds, bands from the lowest to the highest; one seed is a line"
    figure.supxlabel(note, fontsize=8.5, color="#888888")
    figure.savefig(file)


def _learners(results: Sequence[dict[str, Any]]) -> list[tuple[str, Learner]]:
    """Those that there are results of, in the order of the stories."""
    there = {r["learner"] for r in results}
    pairs = [pair for story in STORIES.values() for pair in story.learners.items()]
    return [(name, learner) for name, learner in pairs if name in there]


def main() -> None:
    """Train what is missing, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stories", nargs="*", help=f"of {', '.join(STORIES)}; by default all")
    parser.add_argument("--seeds", type=int, default=1, help="of each story")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where models and results are kept")
    parser.add_argument("--picture", type=Path, default=Path("docs/checked_answers.png"))
    arguments = parser.parse_args()
    if unknown := set(arguments.stories) - set(STORIES):
        parser.error(f"there is no story {sorted(unknown)[0]!r}; there are {', '.join(STORIES)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    stories = [name for name in STORIES if name in (arguments.stories or STORIES)]
    jobs = [(name, seed, arguments.folder) for seed in range(arguments.seeds) for name in stories]
    results: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for found in pool.imap_unordered(run, jobs):
            results += found
            for r in found:
                print(
                    f"{r['learner']} seed {r['seed']}: {r['before']['pass@1']:.1%} to {r['after']['pass@1']:.1%} "
                    f"in {r['seconds']:.0f} s of CPU",
                    flush=True,
                )
    print("\n" + table(results))
    draw(results, arguments.picture)


if __name__ == "__main__":
    main()
