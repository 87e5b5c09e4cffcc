"""Checkpoints of the trainers on files: an ordinary model folder, and beside it what it takes to go on.

    OUTPUT/checkpoint-300/
        model.safetensors, config.json, ...   the model so far; loads like any other
        trained.safetensors                   what is trained, in float32
        optimizer.safetensors                 Adam's averages
        random.safetensors                    the random states of dropout
        trainer.json                          the metrics of every step, and which run this is
        manifest.json                         size and checksum of every file

The order of the data follows from the seed, so its position is the number of steps. Never a pickle.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from agents.offline.learner import Learner
from agents.runs.whole import TornCheckpointError, check_whole, write_folder

PREFIX = "checkpoint-"
_TRAINED, _ADAM, _RANDOM, _STATE = (
    "trained.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "trainer.json",
)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        learner: The model in training.
        optimizer: AdamW over what is trained.
        output: The folder that the checkpoints lie in; None makes none.
        keep: Checkpoints to keep, the latest ones.
        identity: Settings that a run must share with the one it goes on with.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        output: str | Path | None,
        keep: int,
        identity: dict[str, Any],
    ) -> None:
        self.learner, self.optimizer, self.keep, self.identity = learner, optimizer, keep, identity
        self.output = None if output is None else Path(output)
        self._random: dict[str, torch.Tensor] = {}

    def listed(self) -> list[tuple[int, Path]]:
        """Every whole checkpoint with its step, oldest first."""
        found = [] if self.output is None else self.output.glob(f"{PREFIX}*")
        return sorted((int(p.name.removeprefix(PREFIX)), p) for p in found if (p / _STATE).is_file())

    def save(self, history: list[dict[str, float]]) -> None:
        """Write ``checkpoint-<step>``, whole or not at all, and delete those too many."""
        self.output.mkdir(parents=True, exist_ok=True)
        write_folder(self.output / f"{PREFIX}{len(history)}", lambda folder: self._write(folder, history))
        for _, old in self.listed()[: -self.keep]:
            shutil.rmtree(old)

    def _write(self, folder: Path, history: list[dict[str, float]]) -> None:
        self.learner.write_files(folder)
        trained = {name: p.detach().cpu().contiguous() for name, p in self.learner.parameters()}
        save_file(trained, folder / _TRAINED)
        state = self.optimizer.state_dict()["state"]
        adam = {f"{k}.{name}": value.cpu() for k, values in state.items() for name, value in values.items()}
        save_file(adam, folder / _ADAM)
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state()
        save_file(random, folder / _RANDOM)
        document = {"identity": self.identity, "history": history}
        (folder / _STATE).write_text(json.dumps(document), encoding="utf-8")

    def discard(self) -> None:
        """Delete the checkpoints of an earlier run in the same folder: nobody may go on from them by mistake."""
        for _, old in self.listed():
            shutil.rmtree(old)

    def at_stake(self, step: int) -> str:
        """What is lost if the process ends now, ``step`` steps being done."""
        found = self.listed()
        if not found:
            return f"{step:,} steps since the start are lost: there was no checkpoint yet"
        return f"{step - found[-1][0]:,} steps since {found[-1][1]} are lost"

    def note_of_last(self) -> str | None:
        """What an error of the run should say of the checkpoints; None where none were asked for."""
        if self.output is None:
            return None
        found = self.listed()
        if not found:
            return "there was no checkpoint yet"
        return f"the last checkpoint is {found[-1][1]}; the same command with --resume (resume=True) goes on from it"

    def resume(self) -> list[dict[str, float]]:
        """Put model and optimiser where the latest checkpoint has them; the metrics of its steps, none without one.

        Raises:
            ValueError: It is of a run with other settings or another model.
        """
        folder = self._latest()
        if folder is None:
            return []
        document = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        different = [
            f"{name} was {value!r} and is {self.identity.get(name)!r}"
            for name, value in document["identity"].items()
            if self.identity.get(name) != value
        ]
        if different:
            raise ValueError(f"{folder} is of another run: {', '.join(different)}")
        self._load_weights(folder)
        self._load_adam(folder)
        self._random = load_file(folder / _RANDOM)
        return document["history"]

    def _latest(self) -> Path | None:
        """The latest checkpoint that is as it was written."""
        for _, folder in reversed(self.listed()):
            try:
                check_whole(folder)
                return folder
            except TornCheckpointError as error:
                warnings.warn(f"{error}; the one before it is taken", stacklevel=4)
        return None

    @torch.no_grad()
    def _load_weights(self, folder: Path) -> None:
        saved = load_file(folder / _TRAINED)
        own = dict(self.learner.parameters())
        strange = sorted(own.keys() ^ saved.keys()) or [n for n in own if own[n].shape != saved[n].shape]
        if strange:
            raise ValueError(
                f"{folder} is of another model, or of other adapters: {', '.join(strange[:4])} differ"
            )
        for name, parameter in own.items():
            parameter.copy_(saved[name])

    def _load_adam(self, folder: Path) -> None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in load_file(folder / _ADAM).items():
            number, _, part = name.partition(".")
            state.setdefault(int(number), {})[part] = value.clone()
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )

    def restore_random_state(self) -> None:
        """Put dropout where the checkpoint has it; nothing without one."""
        if "cpu" in self._random:
            torch.set_rng_state(self._random["cpu"])
        if "cuda" in self._random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._random["cuda"])
