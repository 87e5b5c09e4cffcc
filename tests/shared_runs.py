"""Runs that one process and several must agree on, for test_processes.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stable_baselines3.common.callbacks import BaseCallback

from agents import GRPO, PPO, REINFORCE
from agents.cli import main
from agents.offline.dpo import dpo
from agents.offline.reward_model import train_reward_model
from agents.offline.sft import sft
from agents.parallel import processes as parallel
from agents.parallel.sharding import is_split, whole
from reward_models import RunningNormalizer
from tests.games import Wild
from tests.tiny import PROMPTS, id_sum, make_env, make_lm
from textrl_env.envs.text_game import TextGameEnv


def _env(**kwargs: Any) -> Any:
    return make_env(lm=make_lm(seed=3), kl_coef=0.1, **{"reward": id_sum} | kwargs)


def _game() -> Any:
    settings = {"max_turns": 3, "max_new_tokens": 4, "max_length": 44, "kl_coef": 0.1, "num_seeds": 50}
    return TextGameEnv(game=Wild, model=make_lm(seed=3), **settings)


COMMON = {"n_episodes": 16, "seed": 1, "learning_rate": 1e-2}
RUNS: dict[str, Callable[[], Any]] = {
    "reinforce": lambda: REINFORCE("auto", _env(), **COMMON),
    "grpo, a reward that keeps count": lambda: GRPO(
        "auto", _env(reward=RunningNormalizer(id_sum)), group_size=4, average="token", **COMMON
    ),
    "grpo, minibatches of another size": lambda: GRPO(
        "auto", _env(), group_size=2, batch_size=12, n_epochs=1, **COMMON
    ),
    "ppo, micro-batches": lambda: PPO("auto", _env(), batch_size=8, n_epochs=1, micro_batch_size=3, **COMMON),
    "turns of a game": lambda: REINFORCE("auto", _game(), **COMMON),
    "split weights": lambda: PPO(
        "auto",
        _env(),
        critic="separate",
        micro_batch_size=5,
        n_epochs=1,
        policy_kwargs={"shard": True, "gradient_checkpointing": True},
        **COMMON,
    ),
    "split weights, value head": lambda: PPO(
        "auto", _env(), n_epochs=1, micro_batch_size=5, policy_kwargs={"shard": True}, **COMMON
    ),
    "split adapters": lambda: PPO(
        "auto",
        _env(),
        critic="separate",
        n_epochs=1,
        policy_kwargs={"shard": True, "lora_rank": 2},
        **COMMON,
    ),
    "lora": lambda: PPO(
        "auto", _env(), critic="separate", n_epochs=1, policy_kwargs={"lora_rank": 2}, **COMMON
    ),
}


class Steers(BaseCallback):
    """Counts how often it is called, and changes what learning goes on with."""

    calls = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.calls += 1
        self.model.kl_coef *= 2
        torch.rand(3, generator=self.model.policy.generator)  # what an evaluation might do
        if self.calls == 2:
            self.model.learning_rate = 0.0


def run(make: Callable[[], Any], updates: int = 3) -> dict[str, Any]:
    """What an agent wrote, which gradients it took, and where that led."""
    agent = make()
    kept: dict[str, Any] = {"tokens": [], "gradients": []}
    train, step = agent.train, agent.optimizer.step

    def watched(rollout: Any) -> None:
        kept["tokens"].append(rollout.inputs["sequences"].tokens.tolist())
        train(rollout)

    def taken() -> None:
        kept["gradients"].append(
            _flat(whole(p.grad) for p in agent.policy.parameters() if p.grad is not None)
        )
        step()

    agent.train, agent.optimizer.step = watched, taken
    steers = Steers()
    for update in range(updates):
        agent.learn(1, steers if update else None, reset_num_timesteps=False)
    kept["weights"] = _flat(whole(p.detach()) for p in agent.policy.parameters())
    kept["held"] = sum(own(p).numel() for p in agent.policy.parameters())
    kept |= {"latest": {k: v for k, v in agent.latest.items() if isinstance(v, float)}, "calls": steers.calls}
    return kept | {"timesteps": agent.num_timesteps, "kl_coef": agent.kl_coef}


def own(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this process learns."""
    return weight.to_local() if is_split(weight) else weight


def _flat(tensors: Iterator[torch.Tensor]) -> list[float]:
    return torch.cat([tensor.flatten() for tensor in tensors]).tolist()


DEMONSTRATIONS = [
    {"prompt": prompt, "completion": word * n}
    for n, prompt in enumerate(PROMPTS, 1)
    for word in (" a", " b", " c d")
]
COMPARISONS = [
    {"prompt": prompt, "chosen": f" {good} a", "rejected": f" {bad}"}
    for prompt in PROMPTS
    for good, bad in (("a", "b"), ("a a", "c d e"), ("g", "h"))
]


def trainings(folder: Path) -> dict[str, dict[str, Any]]:
    """What the trainers on files make of a few records: their figures, and the weights that they write."""
    start = {"model": str(folder / "model"), "epochs": 2, "learning_rate": 1e-2, "seed": 2}
    calls: dict[str, Callable[[Path], dict[str, Any]]] = {
        # The last batch of an epoch has four records.
        "sft": lambda out: sft(
            data=DEMONSTRATIONS, eval_data=DEMONSTRATIONS[:3], output=out, batch_size=8, **start
        ),
        "sft with lora": lambda out: sft(data=DEMONSTRATIONS, output=out, batch_size=8, lora_rank=2, **start),
        "dpo": lambda out: dpo(data=COMPARISONS, output=out, batch_size=8, micro_batch_size=3, **start),
        "kto": lambda out: dpo(data=COMPARISONS, output=out, loss="kto", batch_size=20, **start),
        "reward": lambda out: train_reward_model(
            pairs=COMPARISONS, eval_pairs=COMPARISONS[:5], output=out, batch_size=4, **start
        ),
    }
    found = {}
    for name, call in calls.items():
        out = folder / f"{parallel.current().count} processes" / name
        figures = call(out)
        weights = load_file(out / "model.safetensors")
        found[name] = {"figures": figures, "weights": _flat(weights[n] for n in sorted(weights))}
    return found


def refusals() -> dict[str, str]:
    """What several processes are told that cannot share a run."""
    asked = {
        "episodes": lambda: REINFORCE("auto", _env(), n_episodes=7).learn(1),
        "minibatch": lambda: PPO("auto", _env(), n_episodes=8, batch_size=3).learn(1),
        "steps": lambda: PPO("auto", "ToyBandit-v0").learn(1),
        "seeds": lambda: REINFORCE("auto", _env(), n_episodes=8, seed=parallel.current().rank).learn(1),
        "weights": lambda: REINFORCE("auto", _other_weights(), n_episodes=8, seed=0).learn(1),
        "reward": lambda: REINFORCE("auto", _env(reward=_breaks), n_episodes=8, seed=0).learn(1),
    }
    said = {}
    for name, call in asked.items():
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def _other_weights() -> Any:
    return make_env(lm=make_lm(seed=parallel.current().rank))


def _breaks(completions: list[str], **rest: Any) -> list[float]:
    raise OSError("the judge does not answer")


def command_line(folder: Path, run_dir: str, *more: str) -> tuple[int, str]:
    """``textrl train`` on a tiny model; its exit code and what it printed."""
    said = io.StringIO()
    start = ["--run-dir", str(folder / run_dir)] if "--resume" not in more else []
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["train", *start, *more])
    return code, said.getvalue()


def new_run(folder: Path, timesteps: int = 150) -> list[str]:
    """Arguments of a short run on text."""
    return [
        *("--agent", "grpo", "--model", str(folder / "model"), "--prompts", str(folder / "prompts.txt")),
        *(
            "--reward",
            "tests.tiny:count_a",
            "--max-new-tokens",
            "6",
            "--n-episodes",
            "8",
            "--group-size",
            "4",
        ),
        *(
            "--learning-rate",
            "0.01",
            "--total-timesteps",
            str(timesteps),
            "--save-every",
            "40",
            "--keep",
            "9",
        ),
        *("--seed", "5", "--no-progress"),
    ]


def resuming(run_dir: Path) -> list[str]:
    """Arguments that go on with such a run."""
    return ["--resume", str(run_dir), "--allow-module", "tests.tiny", "--no-progress"]


def keep_first(run_dir: Path, copy: Path) -> None:
    """A copy of a run as it was when its first checkpoint had been written."""
    shutil.copytree(run_dir, copy)
    by_age = sorted(copy.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for later in (*by_age[1:], copy / "final"):
        shutil.rmtree(later)


def write_inputs(folder: Path) -> None:
    """A model and prompts as files."""
    lm = make_lm(seed=3)
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


def several(rank: int, count: int, port: int, folder: Path) -> None:
    """Everything that one of several processes does; it writes what it saw."""
    be(rank, count, port)
    with parallel.started():
        found: dict[str, Any] = {name: run(make) for name, make in RUNS.items()}
        found["trainings"] = trainings(folder)
        found["refusals"] = refusals()
        found["first"] = command_line(folder, "two", *new_run(folder))
        found["again"] = command_line(folder, "two", *new_run(folder))
        parallel.current().on_main(lambda: keep_first(folder / "two", folder / "two-of-two"))
        found["resumed alike"] = command_line(
            folder, "", *resuming(folder / "two-of-two"), "--total-timesteps", "150"
        )
        found["resumed"] = command_line(folder, "", *resuming(folder / "two-of-one"))
        split = ("--policy-arg", "shard=true")
        found["split"] = command_line(folder, "split", *new_run(folder, 80), *split)
        found["split, resumed"] = command_line(
            folder, "", *resuming(folder / "split"), "--total-timesteps", "150"
        )
        adapters = (*split, "--lora-rank", "2")
        found["split adapters, run"] = command_line(folder, "adapters", *new_run(folder, 80), *adapters)
        parallel.current().on_main(lambda: keep_first(folder / "adapters", folder / "adapters-again"))
        found["split adapters, resumed"] = command_line(
            folder, "", *resuming(folder / "adapters-again"), "--total-timesteps", "80"
        )
        (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def dying(victim: int, rank: int, count: int, port: int, folder: Path) -> None:
    """A run in which one of several processes is killed in its third update; the others write what they said."""
    be(rank, count, port)
    update, updates = GRPO.update, 0

    def watched(self: Any, *args: Any) -> Any:
        nonlocal updates
        updates += 1
        if updates == 3 and rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *args)

    GRPO.update = watched
    said = command_line(folder, f"dying-{victim}", *new_run(folder))
    (folder / f"survivor-of-{victim}.json").write_text(json.dumps(said))


def be(rank: int, count: int, port: int) -> None:
    """Tell this process what a launcher would."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
