"""Run directories: what a training run leaves behind, and how it is taken up again.

    runs/first/
        config.json              everything needed to run it again: see :func:`new_config`
        progress.csv             one row for each line of the log
        events.out.tfevents.*    the same for TensorBoard, with the tables of samples
        checkpoint-<timesteps>/  what ``Agent.save`` writes, between two updates
        final/                   the same at the end: a Hugging Face folder for a language model
        best/                    the same where an evaluation gave the highest score, see :class:`EvalCallback`
        samples/                 every response that was learned from, see :mod:`agents.runs.samples`
        evaluations/             every answer of the evaluations, see :mod:`agents.evaluation.records`
        policy.json              what was learned in a small world, see :mod:`agents.callbacks.toy_policy`
        report.html              what ``textrl report`` makes of it

A run that was interrupted and resumed ends with bitwise the weights of one that was not; of several processes the main
one writes, and any number may go on. Left out: remote storage.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shlex
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from agents.base import Agent
from agents.callbacks.evaluation import EvalCallback
from agents.callbacks.exact_gap import cheap_gap_callback
from agents.callbacks.guards import Guards
from agents.callbacks.kl_control import AdaptiveKL, AnnealKL, StopAtKL
from agents.callbacks.scale_guards import ScaleGuards
from agents.callbacks.toy_policy import FILE as TOY_POLICY
from agents.callbacks.toy_policy import KeepToyPolicy
from agents.callbacks.tracking import TrackSamples
from agents.evaluation.evaluation import evaluation_env
from agents.evaluation.records import FOLDER as EVALUATIONS
from agents.parallel.processes import SharedError
from agents.runs import best
from agents.runs.best import BEST
from agents.runs.checkpoint import DOCUMENT, Position, read_document, take_position
from agents.runs.checkpoint import save as save_checkpoint
from agents.runs.lock import HOLDER, LOCK
from agents.runs.logs import EVENTS, PROGRESS, check_reports, open_logger, report_names
from agents.runs.registry import find_agent, find_policy
from agents.runs.samples import FOLDER as SAMPLES
from agents.runs.saving import (
    SaveSchedule,
    StopRequest,
    TrainingInterrupted,
    stop_on_signals,
)
from agents.runs.tensorboard import Settings
from agents.runs.whole import (
    MANIFEST,
    TornCheckpointError,
    check_whole,
    read_json,
    settle,
    whole_folder,
    write_text,
)
from reward_models import trust
from reward_models.names import shorten
from textrl_env.printable import printable

FORMAT = 1
#: What every version has written.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("agent", "policy", "env", "device", "command", "working_directory"), (str,)),
    **dict.fromkeys(("agent_kwargs", "policy_kwargs", "env_kwargs"), (dict,)),
    **dict.fromkeys(("total_timesteps", "seed", "keep", "log_interval"), (int,)),
    "n_envs": (int, type(None)),
    "save_every": (int, str),
}
CONFIG, FINAL, CHECKPOINT = "config.json", "final", "checkpoint-"
EVALUATION, REPORT = "evaluation.json", "report.html"
_PACKAGES = ("textrl-env", "torch", "transformers", "gymnasium", "stable-baselines3", "numpy")


# -- the directory ----------------------------------------------------------------------------------------


def check_directory(folder: Path, overwrite: bool = False) -> None:
    """Raise a FileExistsError unless a new run may be made in ``folder``.

    Args:
        folder: Where.
        overwrite: Whether an earlier run there may be deleted (never anything else).
    """
    empty = (LOCK, HOLDER, f".{CONFIG}.new")  # what a run that was killed while it began leaves
    if not folder.exists() or (folder.is_dir() and all(p.name in empty for p in folder.iterdir())):
        return
    if folder.is_dir() and _is_run(folder):
        if overwrite:
            return
        ways = f"go on with --resume {folder}, or start anew with --overwrite"
        raise FileExistsError(f"{folder} already holds a run; {ways}")
    raise FileExistsError(f"{folder} is there and is not a run directory; choose another")


def _is_run(folder: Path) -> bool:
    """Whether a run was made there, also if its configuration has been torn since."""
    file = folder / CONFIG
    try:
        return file.is_file() and "agent" in read_json(file)
    except ValueError:
        return any(folder.glob(f"*/{DOCUMENT}")) or (folder / PROGRESS).is_file()


def prepare_directory(folder: Path, overwrite: bool = False) -> None:
    """Make a run directory, deleting what an earlier run left there if ``overwrite``.

    Raises:
        FileExistsError: See :func:`check_directory`.
    """
    check_directory(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    _delete_run(folder)


def _delete_run(folder: Path) -> None:
    ours = [folder / FINAL, folder / BEST, *folder.glob(f"{CHECKPOINT}*")]
    for path in ours:
        if (path / DOCUMENT).is_file() or (path / MANIFEST).is_file():
            shutil.rmtree(path)
    for name in (FINAL, BEST, f"{CHECKPOINT}*"):  # replacements that were cut short
        for path in [*folder.glob(f".{name}.new"), *folder.glob(f".{name}.old")]:
            shutil.rmtree(path)
    for path in [
        folder / EVALUATION,
        folder / REPORT,
        folder / TOY_POLICY,
        folder / PROGRESS,
        folder / CONFIG,
        *folder.glob(f"{EVENTS}*"),
        *folder.glob("*.png"),
        *folder.glob(f"{EVALUATIONS}/*.parquet"),
        *folder.glob(f"{SAMPLES}/*.parquet"),
    ]:
        path.unlink(missing_ok=True)
    for name in (EVALUATIONS, SAMPLES):
        with contextlib.suppress(OSError):  # it is not there, or holds something of another's
            (folder / name).rmdir()


def new_config(
    *,
    agent: str,
    env: str,
    total_timesteps: int,
    seed: int,
    policy: str = "auto",
    agent_kwargs: dict[str, Any] | None = None,
    policy_kwargs: dict[str, Any] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    n_envs: int | None = None,
    device: str = "auto",
    save_every: int | str | None = None,
    keep: int = 2,
    log_interval: int = 1,
    adaptive_kl: dict[str, float] | None = None,
    anneal_kl: dict[str, float] | None = None,
    guards: bool = True,
    eval_every: int | None = None,
    eval_prompts: str | None = None,
    eval_episodes: int = 256,
    kl_budget: float | None = None,
    report_to: str = "csv,tensorboard",
    command: str = "",
    defaults: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``config.json`` holds: JSON-able, and with :func:`make_agent` enough to run it again.

    Args:
        agent: "ppo", "grpo", "reinforce", ``"module:Class"`` or ``"file.py:Class"``.
        env: A Gymnasium id.
        total_timesteps: When to stop.
        seed: Of everything.
        policy: As for :class:`~agents.base.Agent`, or ``"module:Class"``.
        agent_kwargs: Hyper-parameters that differ from the defaults.
        policy_kwargs: For the policy.
        env_kwargs: For ``gym.make_vec``.
        n_envs: Slots of the vector env.
        device: "auto" or a torch device.
        save_every: When to write checkpoints, as :func:`~agents.runs.saving.parse_save_every` reads it; None is each
            tenth of ``total_timesteps`` and every 15 minutes.
        keep: Checkpoints to keep.
        log_interval: Updates between two lines of the log.
        adaptive_kl: Arguments of :class:`~agents.callbacks.kl_control.AdaptiveKL`; None leaves the coefficient alone.
        anneal_kl: Arguments of :class:`~agents.callbacks.kl_control.AnnealKL`; None does not let it fall.
        guards: Whether what goes wrong is reported on the way, see :mod:`agents.callbacks.guards`.
        eval_every: Timesteps between two evaluations of a language model, see
            :class:`~agents.callbacks.evaluation.EvalCallback`; None for none.
        eval_prompts: File of the prompts that are evaluated on; None is what ``EvalCallback`` takes by itself.
        eval_episodes: Sampled answers of an evaluation.
        kl_budget: Nats from the reference at which learning stops, and which the best model may have; None for none.
        report_to: Where the log goes, see :mod:`agents.runs.logs`; progress.csv is written in any case.
        command: The command line that says the same.
        defaults: The hyper-parameters left alone, for the reader.

    Raises:
        ValueError: There is no such place for a log.
        ImportError: A package for one is not installed.
    """
    check_reports(report_names(report_to))
    return {
        "format": FORMAT,
        "command": command,
        "agent": agent,
        "agent_kwargs": agent_kwargs or {},
        "agent_defaults": defaults or {},
        "policy": policy,
        "policy_kwargs": policy_kwargs or {},
        "env": env,
        "env_kwargs": env_kwargs or {},
        "n_envs": n_envs,
        "total_timesteps": total_timesteps,
        "seed": seed,
        "device": device,
        "save_every": save_every or f"{max(total_timesteps // 10, 1)},15m",
        "keep": keep,
        "log_interval": log_interval,
        "adaptive_kl": adaptive_kl,
        "anneal_kl": anneal_kl,
        "guards": guards,
        "eval_every": eval_every,
        "eval_prompts": eval_prompts,
        "eval_episodes": eval_episodes,
        "kl_budget": kl_budget,
        "report_to": report_to,
        "working_directory": str(Path.cwd()),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _PACKAGES},
    }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``."""
    write_json(folder / CONFIG, config)


def write_json(file: Path, document: dict[str, Any]) -> None:
    """Write JSON that people can read, whole or not at all."""
    write_text(file, json.dumps(document, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        FileNotFoundError: ``folder`` is not a run directory.
        ValueError: It is one of another version.
    """
    file = folder / CONFIG
    if not file.is_file():
        beside = (
            sorted(p.parent.name for p in folder.parent.glob(f"*/{CONFIG}")) if folder.parent.is_dir() else []
        )
        hint = f" Runs beside it: {', '.join(beside)}." if beside else ""
        raise FileNotFoundError(f"{folder} is not a run directory: it has no {CONFIG}.{hint}")
    config = read_json(file)
    if config.get("format") != FORMAT or "agent" not in config:
        raise ValueError(
            f"{file} is not the configuration of a run (format {FORMAT}); the folder of a model perhaps? "
            "A run directory holds checkpoint-*/ and final/"
        )
    missing = sorted(_TYPES.keys() - config.keys())
    if missing:
        raise ValueError(f"{file} does not say {', '.join(missing)}; has it been edited?")
    for name, types in _TYPES.items():
        value = config[name]
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise ValueError(f"{file} has {name}={shorten(value)}; expected {wanted}")
    return config


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint of a run with its timesteps, oldest first; ``final`` is one too.

    Only their names and first lines are looked at; see :func:`newest_whole`.
    """
    found = []
    for path in [*folder.glob(f"{CHECKPOINT}*"), whole_folder(folder / FINAL)]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append((int(read_json(path / DOCUMENT)["num_timesteps"]), path))
    return sorted(found)


def newest_whole(folder: Path) -> tuple[int, Path, list[str]]:
    """The newest checkpoint of a run that is as it was written.

    To be called by the process that holds the run's lock: a replacement that was cut short is finished.

    Returns:
        Its timesteps, the checkpoint, and of every newer one that is torn, which file and how.

    Raises:
        TornCheckpointError: All of them are torn.
        FileNotFoundError: There is none.
    """
    for name in (FINAL, BEST):
        settle(folder / name)
    torn: list[str] = []
    for path in sorted([*folder.glob(f"{CHECKPOINT}*"), folder / FINAL], key=_age):
        if path.is_dir():
            try:
                document = read_document(path)
                if document.get("sealed"):
                    check_whole(path)
                return int(document["num_timesteps"]), path, torn
            except (TornCheckpointError, FileNotFoundError) as error:
                torn.append(str(error))
    if torn:
        raise TornCheckpointError(f"no checkpoint of {folder} is whole: {'; '.join(torn)}")
    raise FileNotFoundError(f"{folder} holds no checkpoint yet")


def _age(path: Path) -> float:
    """Sorts checkpoints by their timesteps, the newest first; ``final`` is new where it cannot be told."""
    number = path.name.removeprefix(CHECKPOINT)
    if number.isdecimal():
        return -int(number)
    try:
        return -int(read_json(path / DOCUMENT)["num_timesteps"]) - 0.5
    except (OSError, ValueError, KeyError, TypeError):
        return -math.inf


# -- agents from configurations -----------------------------------------------------------------------------


def make_agent(config: dict[str, Any]) -> Agent:
    """The agent, with its environment, that a configuration describes."""
    cls = find_agent(config["agent"])
    # Only what was given, so that an agent of one's own need not take the rest.
    names = ("n_envs", "env_kwargs", "policy_kwargs", "device")
    given = {name: config[name] for name in names if config[name] not in (None, {}, "auto")}
    return cls(
        find_policy(config["policy"]), config["env"], seed=config["seed"], **given, **config["agent_kwargs"]
    )


def load_agent(
    config: dict[str, Any], checkpoint: Path, trust_modules: Sequence[str] = (), folder: Path | None = None
) -> Agent:
    """The agent of a checkpoint, in its environment, exactly where it stopped.

    Args:
        config: Of its run.
        checkpoint: One of the run's.
        trust_modules: Modules or ``.py`` files outside this project whose classes and functions the run may name.
        folder: The run directory; None is where the checkpoint lies.

    Raises:
        UntrustedNameError: The run names code that neither this project nor ``trust_modules`` has.
    """
    with names_of_run(folder or checkpoint.parent, trust_modules):
        parts = (config[name] for name in ("agent", "policy", "env_kwargs", "policy_kwargs", "agent_kwargs"))
        trust.check_values(*parts)
        cls = find_agent(config["agent"])
        find_policy(config["policy"])  # so that a policy of one's own can be found again
        device = {} if config["device"] == "auto" else {"device": config["device"]}
        return cls.load(checkpoint, config["env"], trust_modules=trust_modules, **device)


def names_of_run(folder: Path, trust_modules: Sequence[str]) -> AbstractContextManager[None]:
    """Inside, names come from the ``config.json`` of a run; see :func:`reward_models.trust.names_from`."""
    return trust.names_from(folder / CONFIG, trust_modules, lambda modules: _resume_command(folder, modules))


def resume_command(folder: Path, config: dict[str, Any]) -> str:
    """What to type to go on with a run, the modules of one's own that it needs named."""
    parts = (config[name] for name in ("agent", "policy", "env_kwargs", "policy_kwargs", "agent_kwargs"))
    modules = trust.foreign_modules(*parts)
    env_module = config["env"].rpartition(":")[0]
    if env_module.partition(".")[0] not in (*trust.PROJECT, ""):
        modules.append(env_module)
    return _resume_command(folder, modules)


def _resume_command(folder: Path, modules: Sequence[str]) -> str:
    allowed = [word for module in modules for word in ("--allow-module", module)]
    return printable(shlex.join(["textrl", "train", "--resume", str(folder), *allowed]))


# -- training -----------------------------------------------------------------------------------------------


class SaveRunCallback(BaseCallback):
    """Saves between updates, every so many timesteps or minutes, and when asked to stop.

    Args:
        folder: The run directory.
        save_every: As :func:`~agents.runs.saving.parse_save_every` reads it.
        keep: Checkpoints to keep, the latest ones.
    """

    def __init__(self, folder: Path, save_every: int | str, keep: int = 2) -> None:
        super().__init__()
        self.folder, self.keep = folder, keep
        self.schedule, self.stop_request = SaveSchedule(save_every), StopRequest()
        self._position: Position | None = None

    def _on_training_start(self) -> None:
        self.schedule.start(self.model.num_timesteps)

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self._position = None
        if self.stop_request:
            self.save()
            raise TrainingInterrupted(self.stop_request.number)
        if self.schedule.is_due(self.model.num_timesteps):
            self.save()
        self._position = take_position(self.model)

    def _on_rollout_end(self) -> None:
        self._position = None

    def save(self, position: Position | None = None) -> Path:
        """Write ``checkpoint-<timesteps>``, whole or not at all, and delete those too many.

        Args:
            position: Where the agent stood before the rollout under way; None is where it stands now.
        """
        timesteps = self.model.num_timesteps if position is None else position.document["num_timesteps"]
        path = self.folder / f"{CHECKPOINT}{timesteps}"
        save_checkpoint(self.model, path, position)
        numbered = [path for _, path in checkpoints(self.folder) if path.name.startswith(CHECKPOINT)]
        for old in numbered[: -self.keep]:
            shutil.rmtree(old)
        self.schedule.saved()
        return path

    def save_best(self, score: float) -> bool:
        """Write ``best/`` if no checkpoint there has a score as high; says whether it did.

        Args:
            score: Of the agent as it is now, from an evaluation.
        """
        return best.save_best(self.model, self.folder / BEST, score)

    def at_stake(self) -> str:
        """What is lost if the process ends now."""
        found = checkpoints(self.folder)
        last = found[-1][0] if found else 0
        return f"{self.model.num_timesteps - last:,} timesteps since " + (
            f"{found[-1][1]} are lost" if found else "the start are lost: there was no checkpoint yet"
        )

    def rescue(self) -> Path | None:
        """After an error: save where the agent stood before the rollout that failed; None where it was learning.

        Weights that an update has begun to change belong to no moment that could be gone on from.
        """
        if self._position is None:
            return None
        path = self.folder / f"{CHECKPOINT}{self._position.document['num_timesteps']}"
        return path if path.is_dir() else self.save(self._position)


def train(
    agent: Agent, folder: Path, config: dict[str, Any], callbacks: list[BaseCallback] | None = None
) -> None:
    """Train an agent to the end of its run, logging and saving into the run directory.

    Where the optimum is cheap to know, the distance from it is logged too (``exact/gap``).

    Where ``eval_every`` is set the agent is evaluated on the way, and the best one kept in ``best/``.

    Args:
        agent: From :func:`make_agent` or :func:`load_agent`.
        folder: The run directory, ``config.json`` written.
        config: What is in it.
        callbacks: More callbacks, for example a progress bar.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM came; the update under way was finished and a checkpoint saved.
        KeyboardInterrupt: It came twice.
        Exception: What a reward, an environment or an update raised; a note says which checkpoint stands.
    """
    saver = SaveRunCallback(folder, config["save_every"], config["keep"])
    controls = {"adaptive_kl": AdaptiveKL, "anneal_kl": AnnealKL}
    control = [cls(**config[name]) for name, cls in controls.items() if config.get(name) is not None]
    gap = cheap_gap_callback(agent.envs)
    measured = [] if gap is None else [gap]
    if config.get("guards", True):
        measured.append(ScaleGuards())
        measured += [Guards()] if agent.policy.whole_episodes else []
    evaluation = evaluation_callback(agent, folder, config)
    measured += [] if evaluation is None else [evaluation]
    measured.append(KeepToyPolicy(folder) if agent.text_env is None else TrackSamples(folder, evaluation))
    budget = config.get("kl_budget")
    stop = None if budget is None else StopAtKL(budget)
    measured += [] if stop is None else [stop]
    asked = report_names(config.get("report_to", "tensorboard"))
    others = [name for name in asked if name not in ("csv", "none")]
    main = agent.processes.is_main
    logger = open_logger(folder, agent.num_timesteps, ["csv", *others]) if main else Logger(None, [])
    agent.set_logger(logger)
    if agent.num_timesteps == 0:
        logger.record("hparams", Settings(config), exclude=("stdout", "log", "csv", "json"))
        logger.dump(0)
    try:
        with stop_on_signals(saver.stop_request, "the update under way", saver.at_stake):
            agent.learn(
                config["total_timesteps"] - agent.num_timesteps,
                [*(callbacks or []), *control, *measured, saver],
                log_interval=config["log_interval"],
                # One that was stopped before its first rollout stands in an episode already.
                reset_num_timesteps=agent.num_timesteps == 0 and agent.last_obs is None,
            )
            stopped = stop is not None and stop.reached is not None
            note = {"stopped_at_kl": stop.reached} if stopped else None
            agent.processes.on_main(lambda: save_checkpoint(agent, folder / FINAL, note=note))
    except Exception as error:
        if main and not isinstance(error, TrainingInterrupted):
            error.add_note(_what_stands(saver, folder, config))
        elif isinstance(error, SharedError):  # said here if the main process is gone
            error.add_note(_last_checkpoint(folder, config))
        raise
    finally:
        logger.close()


def evaluation_callback(agent: Agent, folder: Path, config: dict[str, Any]) -> EvalCallback | None:
    """What evaluates a run on the way; None where its configuration asks for nothing."""
    every, prompts = config.get("eval_every"), config.get("eval_prompts")
    if every is None:
        return None
    env = None if prompts is None or agent.text_env is None else evaluation_env(agent.text_env, prompts)[0]
    return EvalCallback(
        env,
        n_eval_episodes=config["eval_episodes"],
        eval_freq=every,
        log_path=folder,
        best_model_save_path=folder / BEST,
        kl_budget=config.get("kl_budget"),
    )


def _what_stands(saver: SaveRunCallback, folder: Path, config: dict[str, Any]) -> str:
    """After an error: which checkpoint there is, and how to go on from it."""
    try:
        rescued = saver.rescue()
    except Exception as error:
        return f"and no checkpoint could be written: {error}"
    if rescued is not None:
        return f"saved as it was before this rollout: {rescued}; go on with: {resume_command(folder, config)}"
    return _last_checkpoint(folder, config)


def _last_checkpoint(folder: Path, config: dict[str, Any]) -> str:
    found = checkpoints(folder)
    if not found:
        return "there was no checkpoint yet"
    return f"the last checkpoint is {found[-1][1]}; go on with: {resume_command(folder, config)}"
