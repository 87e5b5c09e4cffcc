"""Commands in processes of their own that begin at once: forked from this one, which has imported everything.

Each child is an ordinary process with its own output, signals and death. The parent imports and never computes, since
torch's backward pass does not survive a fork.
"""

from __future__ import annotations

import importlib
import io
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

#: What the verbs import when they run; imported once, here.
_MODULES = (
    "agents.cli",
    "agents.evaluation.evaluation",
    "agents.evaluation.token_page",
    "agents.offline.dpo",
    "agents.offline.reward_model",
    "agents.offline.sft",
    "agents.preferences.collection",
    "agents.runs.run_directory",
    "agents.report",
    "peft",
    "rich.live",
    "textrl_env.envs.text_rlhf",
    "torch.utils.tensorboard",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
)
#: The exit code of a child whose command has raised; the command line itself never does.
RAISED = 70


class FailsAlone(RuntimeError):
    """A command fails, or leaves too little, before any fault was inflicted on it."""


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: Its exit code; minus the number of the signal that killed it.
        output: What it wrote to standard output and standard error.
        seconds: Processor time that it used.
        was_hit: Whether it was still running when the signal was sent.
        begun: Processor time after which the file or folder that was waited for was there.
    """

    code: int
    output: str
    seconds: float
    was_hit: bool = False
    begun: float = 0.0


class Hit(NamedTuple):
    """A signal at a moment: when the process has used ``seconds`` of processor time, and then ``pause`` later."""

    number: int
    seconds: float
    pause: float

    @classmethod
    def at_random(cls, rng: random.Random, number: int, alone: Ended) -> Hit:
        """At a moment of a process that would go like one that was left alone; four of five after it has begun."""
        first = 0.9 * alone.begun if rng.random() < 0.8 else 0.0
        return cls(number, rng.uniform(first, alone.seconds), rng.choice([0.0, rng.uniform(0.0, 0.02)]))


def prepare() -> None:
    """Import everything, on one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    torch.set_num_threads(1)
    for name in _MODULES:
        importlib.import_module(name)


def start(
    arguments: Sequence[str], place: Path, output: Path, before: Callable[[], None] | None = None
) -> int:
    """Begin ``textrl ARGUMENTS`` in a folder; returns the process id.

    Args:
        arguments: Without the program's name.
        place: The working directory.
        output: A file for what it writes.
        before: Called in the new process first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = RAISED
    try:
        os.chdir(place)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(handle, stream)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(stream, "wb", closefd=False), line_buffering=True) for stream in (1, 2)
        )
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if before is not None:
            before()
        from agents.cli import main

        code = main(list(arguments))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(process: int, output: Path, hits: Sequence[Hit] = (), waits_for: Path | None = None) -> Ended:
    """Wait for a process, sending it signals on the way, and note when a file or folder is there."""
    watch = os.pidfd_open(process)
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    was_hit, begun = False, 0.0
    while waits_for is not None and not waits_for.exists() and not poll.poll(2):
        begun = _used(process)
    for hit in hits:
        while _used(process) < hit.seconds and not poll.poll(1):
            pass
        if not poll.poll(1000 * hit.pause):
            signal.pidfd_send_signal(watch, hit.number)
            was_hit = True
    _, status, usage = os.wait4(process, 0)
    os.close(watch)
    text = output.read_text(encoding="utf-8", errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime, was_hit, begun)


def run(
    arguments: Sequence[str],
    place: Path,
    hits: Sequence[Hit] = (),
    before: Callable[[], None] | None = None,
    waits_for: Path | None = None,
) -> Ended:
    """Run ``textrl ARGUMENTS`` in a folder to its end."""
    output = place / f".output-{time.monotonic_ns()}"
    try:
        return finish(start(arguments, place, output, before), output, hits, waits_for)
    finally:
        output.unlink(missing_ok=True)


def _used(process: int) -> float:
    """Processor time of a process so far, in seconds."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):  # it has just ended
        return float("inf")
