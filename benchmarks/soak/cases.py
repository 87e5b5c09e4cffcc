"""What faults are inflicted on: every agent, every world, every verb that writes something, on tiny models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agents import GRPO, PPO, VAPO, REINFORCEPlusPlus
from agents.runs.registry import AGENTS, find_agent

_WORDS = 32
#: Prompts and answers in the words of the tiny model.
_TEXTS = [f"w{2 + k} w{3 + k % 7} w{5 + k % 5}" for k in range(16)]
#: Agents that learn from language models only, and what each needs besides.
_TEXT_ONLY = {
    "ppo-ptx": ["--ptx-data", "demonstrations.jsonl", "--ptx-coef", "0.5", "--ptx-batch-size", "2"],
    "gkd": ["--teacher", "model"],
    "sdpo": ["--success-threshold", "0"],
}
#: Agents that want scores of at least 0, as CartPole gives them and the other toys do not.
_NOT_BELOW_0 = ("maxrl",)
#: Settings that a group of two or few steps need.
_FEW = {"pass-at-k": ["--k", "2"]}
_WORLDS = {
    "ToyBandit-v0": ["--total-timesteps", "160", "--save-every", "16"],
    "GridWorld-v0": ["--total-timesteps", "4000", "--save-every", "400"],
    "CartPole-v1": ["--total-timesteps", "640", "--save-every", "64"],
}


@dataclass(frozen=True)
class Case:
    """One command that can be stopped, gone on with, and compared with one that was left alone.

    Attributes:
        name: For messages.
        verb: The first word of the command.
        command: What is typed.
        again: What is typed where the process was killed and could say nothing.
        output: The folder or file that it writes.
        result: Files under ``output`` that have to come out alike, as patterns.
    """

    name: str
    verb: str
    command: Sequence[str]
    again: Sequence[str]
    output: str
    result: Sequence[str]


def make_place(place: Path) -> None:
    """Write the model, the data and the reward that all cases share."""
    from benchmarks.llama_costs import Shape
    from benchmarks.random_llama import make_lm

    lm = make_lm(Shape(_WORDS, 16, 24, 2, 4, 2))
    lm.model.config.eos_token_id = lm.model.generation_config.eos_token_id = 0
    lm.model.save_pretrained(str(place / "model"))
    lm.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    lm.tokenizer.save_pretrained(str(place / "model"))
    _write(place / "prompts.jsonl", [{"prompt": text} for text in _TEXTS])
    demonstrations = [{"prompt": p, "completion": c} for p, c in itertools.pairwise(_TEXTS)]
    _write(place / "demonstrations.jsonl", demonstrations)
    sides = zip(_TEXTS, _TEXTS[1:], _TEXTS[2:], strict=False)
    _write(place / "preferences.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sides])
    (place / "odd.py").write_text(
        "def share(prompts, completions, completion_ids):\n"
        "    return [sum(t % 2 for t in ids) / max(len(ids), 1) for ids in completion_ids]\n",
        encoding="utf-8",
    )


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def all_cases() -> list[Case]:
    """Every case once."""
    toys = [
        (agent, world)
        for agent in AGENTS
        for world in _WORLDS
        if agent not in _TEXT_ONLY and (agent not in _NOT_BELOW_0 or world == "CartPole-v1")
    ]
    texts = [(agent, lora) for agent in AGENTS for lora in (False, True)]
    normalised = ["--reward", "reward_models:RunningNormalizer('odd.py:share')"]
    return [
        *(_toy(*each) for each in toys),
        *(_text(*each) for each in texts),
        _text("grpo", False, "normalised rewards", normalised),
        _text("ppo", False, "adaptive KL", ["--kl-coef", "0.1", "--adaptive-kl-target", "0.5"]),
        _text(
            "grpo", False, "KL budget", ["--kl-coef", "0.1", "--kl-budget", "50", "--learning-rate", "0.3"]
        ),
        _text("ppo", False, "evaluated on the way", ["--eval-every", "24", "--eval-episodes", "8"]),
        *_from_files(),
    ]


def _toy(agent: str, world: str) -> Case:
    by_steps = issubclass(find_agent(agent), PPO) and not _learns_from_groups(agent)
    kind = ["--n-steps", "16"] if by_steps else ["--n-episodes", "8"]
    kind += ["--group-size", "2"] if agent == "vapo" else []
    return _train(agent, world, [*_WORLDS[world], "--env", world, *kind])


def _learns_from_groups(agent: str) -> bool:
    cls = find_agent(agent)
    return issubclass(cls, (GRPO, VAPO)) and cls is not REINFORCEPlusPlus


def _text(agent: str, lora: bool, name: str = "", more: Sequence[str] = ()) -> Case:
    groups = ["--group-size", "2", *_FEW.get(agent, [])] if _learns_from_groups(agent) else []
    reward = [] if "--reward" in more else ["--reward", "odd.py:share"]
    options = ["--model", "model", "--prompts", "prompts.jsonl", *reward, *more, *groups]
    options += ["--n-episodes", "4", "--max-new-tokens", "4"]
    options += [] if "--learning-rate" in more else ["--learning-rate", "0.01"]
    options += ["--total-timesteps", "96", "--save-every", "16", *_TEXT_ONLY.get(agent, [])]
    options += ["--lora-rank", "2"] if lora else []
    return _train(agent, f"text, {'LoRA' if lora else name}" if lora or name else "text", options)


def _train(agent: str, world: str, options: list[str]) -> Case:
    command = ["train", "--agent", agent, *options, "--seed", "3", "--no-progress", "--run-dir", "out"]
    allowed = ["--allow-module", "odd.py"] if "--reward" in options else []
    again = ["train", "--resume", "out", "--no-progress", *allowed]
    return Case(
        f"{agent} on {world}", "train", command, again, "out", ("final/**/*.safetensors", "samples/*.parquet")
    )


def _from_files() -> list[Case]:
    found = []
    for verb, data in (("sft", "demonstrations"), ("reward", "preferences"), ("dpo", "preferences")):
        for lora in (False, True):
            command = [verb, "--model", "model", "--data", f"{data}.jsonl", "--output", "out"]
            command += ["--batch-size", "2", "--epochs", "2", "--learning-rate", "0.01", "--save-every", "3"]
            command += ["--lora-rank", "2"] if lora else []
            name = f"{verb}{', LoRA' if lora else ''}"
            found.append(Case(name, verb, command, [*command, "--resume"], "out", ("*.safetensors",)))
    asked = ["preferences", "--model", "model", "--prompts", "prompts.jsonl", "--judge", "odd.py:share"]
    asked += ["--batch-size", "2", "--max-new-tokens", "4", "--output", "out.jsonl"]
    found.append(Case("preferences", "preferences", asked, [*asked, "--overwrite"], "out.jsonl", ()))
    judged = ["evaluate", "--model", "model", "--against", "model", "--prompts", "prompts.jsonl"]
    judged += ["--reward", "odd.py:share", "--max-new-tokens", "4", "--output", "out.json"]
    found.append(Case("evaluate", "evaluate", judged, judged, "out.json", ()))
    return found


def result_of(case: Case, place: Path) -> dict[str, bytes]:
    """The files that have to come out alike, by name."""
    output = place / case.output
    if not case.result:
        return {output.name: output.read_bytes()} if output.is_file() else {}
    files = sorted(file for pattern in case.result for file in output.glob(pattern))
    return {str(file.relative_to(output)): file.read_bytes() for file in files}
