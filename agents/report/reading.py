"""Run directories as the report sees them: their log, their settings, and which of them belong together."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from agents import presets
from agents.arguments import entries
from agents.callbacks.toy_policy import FILE as TOY_POLICY
from agents.evaluation.kinds import Change, Loss, changes, column_of, losses
from agents.evaluation.records import EvaluationRecord, read_ends, read_evaluations
from agents.evaluation.verdict import Verdict, judge
from agents.report.samples import Table, read_tables
from agents.runs import run_directory as run_directories
from agents.runs.checkpoint import DOCUMENT
from agents.runs.logs import read_progress
from agents.runs.registry import AGENTS, find_agent
from agents.runs.whole import read_json, whole_folder
from textrl_env.errors import did_you_mean

STEPS = "time/total_timesteps"
#: What two runs that differ by the seed only have in common, and the reader sees as settings.
_SETTINGS = ("agent", "env", "policy", "n_envs", "total_timesteps", "adaptive_kl", "anneal_kl")
_NESTED = ("agent_kwargs", "env_kwargs", "policy_kwargs")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        folder: As it was given.
        config: Its ``config.json``.
        progress: Columns of its log; NaN where a row has none.
        tables: Samples recorded while training, oldest first.
        started: When its first TensorBoard event was written, in seconds since 1970; None without events.
        evaluation: Its ``evaluation.json`` (``textrl demo`` leaves one), or None.
        is_finished: Whether it has come to its end.
        stopped_at_kl: The KL at which its budget has ended it, or None.
        evaluations: Those on the way, oldest first.
        by: The column to tell kinds of prompts by; None is "kind", where there is one.
        toy: What was learned in a small world, see :mod:`agents.callbacks.toy_policy`; None elsewhere.
        ends: The first, the best and the last policy, answering more often; see :mod:`agents.evaluation.records`.
    """

    folder: Path
    config: dict[str, Any]
    progress: dict[str, list[float]]
    tables: list[Table]
    started: float | None
    evaluation: dict[str, Any] | None
    is_finished: bool
    stopped_at_kl: float | None = None
    evaluations: list[EvaluationRecord] = dataclasses.field(default_factory=list)
    ends: dict[str, EvaluationRecord] = dataclasses.field(default_factory=dict)
    toy: dict[str, Any] | None = None
    by: str | None = None

    @functools.cached_property
    def verdict(self) -> Verdict | None:
        """What held-out comparisons say; None for a run that has not ended, or was not evaluated."""
        return judge(self.ends)

    @functools.cached_property
    def kind_column(self) -> str | None:
        """The column of the prompts that tells their kinds apart; None where there is none, or no verdict."""
        return None if self.verdict is None else column_of([self.ends["start"].sampled], self.by)

    @functools.cached_property
    def changes(self) -> list[Change]:
        """Kinds of prompts that the last policy declines more or less often than the first one did."""
        if self.kind_column is None:
            return []
        return changes(self.ends["start"].sampled, self.ends["final"].sampled, self.kind_column)

    @functools.cached_property
    def losses(self) -> list[Loss]:
        """Kinds of prompts whose gold is lower for the last policy than for the first one."""
        if self.kind_column is None:
            return []
        return losses(self.ends["start"].sampled, self.ends["final"].sampled, self.kind_column)

    def series(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and values ``[n]`` of the rows that have a finite value; empty where none has."""
        values = np.array(self.progress.get(column, []), dtype=np.float64)
        steps = np.array(self.progress[STEPS])[: len(values)]
        there = np.isfinite(values) & np.isfinite(steps)
        return steps[there], values[there]

    @property
    def is_text(self) -> bool:
        """Whether a timestep is a token."""
        return "objective/scores" in self.progress

    @property
    def has_question(self) -> bool:
        """Whether it is a language model that a reward can fool, and that evaluations on the way could watch."""
        return self.is_text and (self.env_name.startswith("TextRLHF") or bool(self.evaluations))

    @property
    def unit(self) -> str:
        """What a timestep is."""
        return "tokens" if self.is_text else "steps"

    @property
    def num_timesteps(self) -> int:
        """Timesteps of the last row."""
        return int(np.nanmax(self.progress[STEPS]))

    @property
    def agent_name(self) -> str:
        """The name of the class: PPO, GRPO, MyAgent."""
        spec = self.config["agent"]
        return AGENTS.get(spec.lower(), spec).rpartition(":")[2]

    @property
    def env_name(self) -> str:
        """The id without the module it is registered by."""
        return self.config["env"].rpartition(":")[2]


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs whose settings differ by the seed only.

    Attributes:
        label: What the page calls them.
        runs: At least one.
    """

    label: str
    runs: list[Run]


def read_run(folder: str | Path, by: str | None = None) -> Run:
    """Read a run directory.

    Args:
        folder: What ``textrl train`` or ``textrl demo`` wrote, finished or not.
        by: The column to tell kinds of prompts by; None is "kind", where there is one.

    Raises:
        FileNotFoundError: There is no such folder, or it is no run directory.
        ValueError: It has not finished a rollout, or its files cannot be read.
    """
    folder = Path(folder).expanduser()
    _check_is_run(folder)
    config = run_directories.read_config(folder)
    log = folder / run_directories.PROGRESS
    progress = read_progress(folder) if log.is_file() else {}
    evaluation = folder / run_directories.EVALUATION
    evaluated = read_json(evaluation) if evaluation.is_file() else None
    if not np.isfinite(progress.get(STEPS, [])).any():
        raise ValueError(
            f"{folder} has not finished a rollout yet: its {run_directories.PROGRESS} has no row. "
            "Let it go on for longer, then report it"
        )
    tables, started = read_tables(folder)
    ends = [at for at, path in run_directories.checkpoints(folder) if path.name == run_directories.FINAL]
    stopped_at_kl = _stopped_at_kl(folder) if ends else None
    is_finished = stopped_at_kl is not None or any(at >= config["total_timesteps"] for at in ends)
    held_out = read_evaluations(folder), read_ends(folder)
    toy = read_json(folder / TOY_POLICY) if (folder / TOY_POLICY).is_file() else None
    return Run(
        folder, config, progress, tables, started, evaluated, is_finished, stopped_at_kl, *held_out, toy, by
    )


def _stopped_at_kl(folder: Path) -> float | None:
    """The KL at which a run's budget has ended it."""
    file = whole_folder(folder / run_directories.FINAL) / DOCUMENT
    return read_json(file).get("stopped_at_kl")


def _check_is_run(folder: Path) -> None:
    """Raises an error that names what ``folder`` is instead, where that shows; ``read_config`` raises for the rest."""
    if not folder.exists():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = f" {did_you_mean(folder.name, beside)}" if beside else ""
        raise FileNotFoundError(f"there is no folder {folder}.{hint}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is a file; a run directory is a folder, perhaps {folder.parent}")
    if (folder / "agent.json").is_file() and (folder.parent / run_directories.PROGRESS).is_file():
        raise ValueError(f"{folder} is a checkpoint; the run is {folder.parent}")
    if (folder / run_directories.CONFIG).is_file():
        return
    inside = sorted(str(p.parent) for p in folder.glob(f"*/{run_directories.PROGRESS}"))
    if inside:
        raise FileNotFoundError(
            f"{folder} is not a run, it holds some; try: textrl report {' '.join(inside)}"
        )


# -- settings -----------------------------------------------------------------------------------------------


def settings(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a run was told that is not the default: value and default by name.

    The default is None where it is none or cannot be known: the code of an agent or environment of one's own is
    not imported for it.
    """
    agent, env = _agent_defaults(config), _env_defaults(config)
    found = {name: (value, agent.get(name)) for name, value in config["agent_kwargs"].items()}
    found |= {name: (value, env.get(name)) for name, value in config["env_kwargs"].items()}
    found |= {name: (value, None) for name, value in config["policy_kwargs"].items()}
    found |= {name: (config.get(name), None) for name in ("n_envs", "adaptive_kl", "anneal_kl")}
    found["policy"] = (config["policy"], "auto")
    return {name: pair for name, pair in found.items() if pair[0] != pair[1]}


def all_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Every setting that can tell two runs apart, by name; the seed and what only concerns saving left out."""
    plain = {name: config.get(name) for name in _SETTINGS}
    return plain | {name: value for nested in _NESTED for name, value in config[nested].items()}


def default_of(config: dict[str, Any], name: str) -> Any:
    """The default of a setting of this run's agent or environment; None where there is none."""
    return (_agent_defaults(config) | _env_defaults(config)).get(name)


def _agent_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Defaults of the run's agent, those that depend on what is trained too."""
    if config["agent"].lower() not in AGENTS:
        return {}
    agent = find_agent(config["agent"])
    column = config.get("in_force", {}).get("trained", {}).get("preset") or _guessed_column(config)
    by_model = {name: presets.default(name, agent, column) for name in presets.DEFAULTS}
    return _defaults(agent) | by_model | {name: said.value for name, said in entries(agent).items()}


def _guessed_column(config: dict[str, Any]) -> str:
    """What is trained in a run that has not noted it."""
    if not config["env"].rpartition(":")[2].startswith("TextRLHF"):
        return "network"
    if "model" not in config["env_kwargs"]:
        return "embedded"
    return "lora" if config["policy_kwargs"].get("lora_rank") else "full"


def _env_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Defaults of the run's environment; where they depend on the model, what was in force."""
    from textrl_env import ENV_IDS

    env_id = config["env"].rpartition(":")[2]
    if env_id not in ENV_IDS:
        return {}
    defaults = _env_signature(env_id)
    if "max_new_tokens" in defaults:
        noted = config.get("in_force", {}).get("env", {})
        # Runs of version 0.1 have noted nothing; their budget was 24.
        defaults["max_new_tokens"] = noted.get("max_new_tokens", 24)
    return defaults


def _env_signature(env_id: str) -> dict[str, Any]:
    import gymnasium as gym

    return _defaults(gym.envs.registration.load_env_creator(gym.spec(env_id).entry_point).dynamics_class)


def _defaults(cls: type) -> dict[str, Any]:
    """Defaults of a constructor's parameters, a class's own before those of its bases."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base) and base is not object:
            parameters = inspect.signature(base.__init__).parameters.values()
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return found


# -- several runs -------------------------------------------------------------------------------------------


def check_comparable(runs: list[Run]) -> None:
    """Raise a ValueError unless runs can be laid over each other."""
    if not runs:
        raise ValueError("give at least one run directory")
    seen: set[Path] = set()
    for run in runs:
        if run.folder.resolve() in seen:
            raise ValueError(f"{run.folder} is given twice")
        seen.add(run.folder.resolve())
    envs = {run.env_name: run.folder for run in runs}
    if len(envs) > 1:
        where = ", ".join(f"{name} ({folder})" for name, folder in envs.items())
        raise ValueError(f"these runs are on different environments, their figures do not compare: {where}")
    by_form = {run.is_text: run.folder for run in runs}
    if len(by_form) > 1:
        raise ValueError(
            f"{by_form[True]} logs objective/scores and {by_form[False]} does not: there is nothing to compare"
        )


def group_runs(runs: list[Run]) -> list[Group]:
    """Put runs together whose settings differ by the seed only, in the order in which they came."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(all_settings(run.config), sort_keys=True), []).append(run)
    labels = [_label(group) for group in found.values()]
    whole = [str(group[0].folder) for group in found.values()]
    labels = [label if labels.count(label) == 1 else path for label, path in zip(labels, whole, strict=True)]
    return [Group(label, group) for label, group in zip(labels, found.values(), strict=True)]


def _label(runs: list[Run]) -> str:
    """The folder's name; of several seeds what their names begin with."""
    names = [run.folder.resolve().name for run in runs]
    stems = {re.sub(r"[-_. ]*(seed)?[-_. ]*\d+$", "", name) for name in names}
    return stems.pop() or names[0] if len(names) > 1 and len(stems) == 1 else names[0]


def run_label(run: Run, runs: list[Run]) -> str:
    """A run's folder by name, by path where another of ``runs`` has that name."""
    names = [other.folder.resolve().name for other in runs]
    name = run.folder.resolve().name
    return name if names.count(name) == 1 else str(run.folder)
