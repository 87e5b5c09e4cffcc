"""Code as an answer: run with its tests in a process of its own, with limits.

    load_reward([(unit_tests("tests"), 1.0), (format_reward(), 0.1)])

The process has a folder of its own, an empty environment, and limits on time, memory, the size of files and (on
Linux, by a filter of system calls) network and signals to others. That stops accidents and cheap tricks, such as
leaving before the tests. It is no prison: the code reads what the user can read. Models that nobody trusts belong in a
container.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reward_models.data.chat import answer_of as text_of
from reward_models.names import did_you_mean, shorten
from reward_models.rules import RewardFunction

_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_RUNNER = Path(__file__).with_name("unit_tests_runner.py")


def unit_tests(
    column: str = "tests",
    timeout: float = 5.0,
    memory: int = 512,
    network: bool = False,
    workers: int | None = None,
) -> RewardFunction:
    """The share of tests that the code in the completion passes, from 0 to 1.

    The code is the last block between ``` marks, or the whole completion where there is none. Each test is Python that
    runs after the code, in a process of its own, and passes if it raises nothing.

    Args:
        column: The column that holds the tests: a text, or a list of texts.
        timeout: Seconds of computing for each test; by the clock it may take four times as long, and 30 s to start.
        memory: MiB of address space.
        network: True lets the code use the network. False needs Linux on x86_64 or aarch64.
        workers: Processes at the same time; None takes one for each core.

    Raises:
        RuntimeError: Network cannot be denied here.
    """
    if not timeout > 0 or memory < 64 or (workers is not None and workers < 1):
        raise ValueError(
            f"timeout must be > 0, memory at least 64 MiB and workers at least 1, got {timeout}, {memory} and {workers}"
        )
    if not network and not sys.platform.startswith("linux"):
        raise RuntimeError(
            f"unit_tests can deny the network on Linux only, and this is {sys.platform}; network=True lets the code "
            "have it"
        )
    limits = {"seconds": timeout, "memory": memory * 2**20, "network": network}
    workers = workers or os.cpu_count() or 1

    def unit_tests(prompts: Any, completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
        if column not in columns:
            others = [name for name in columns if name not in ("prompt_ids", "completion_ids")]
            came = did_you_mean(column, others) if others else "The prompts came without any other column."
            raise KeyError(
                f"unit_tests reads the tests from the column {column!r}, which is not there. {came}"
            )
        tests = [_tests(each, column, i) for i, each in enumerate(columns[column])]
        codes = [code_of(text_of(completion)) for completion in completions]
        jobs = [(code, test) for code, each in zip(codes, tests, strict=True) for test in each or ()]
        with ThreadPoolExecutor(workers) as pool:
            passed = iter(list(pool.map(lambda job: passes(*job, **limits), jobs)))
        return [None if each is None else sum(next(passed) for _ in each) / len(each) for each in tests]

    return unit_tests


def code_of(text: str) -> str:
    """The last block between ``` marks, or the whole text where there is none."""
    blocks = _BLOCK.findall(text)
    return blocks[-1] if blocks else text


def passes(code: str, test: str, seconds: float, memory: int, network: bool) -> bool:
    """Whether a test raises nothing after some code, in a process of its own.

    Args:
        code: Python.
        test: Python that uses what the code defines.
        seconds: Of computing.
        memory: Bytes of address space.
        network: Whether the network may be used.

    Raises:
        RuntimeError: The limits could not be set, so nothing was run.
    """
    # Only the runner knows the word, and says it when the test is over: leaving early with exit code 0 passes nothing.
    word = secrets.token_hex(16)
    job = {"code": code, "test": test, "seconds": seconds, "memory": memory, "network": network, "word": word}
    with tempfile.TemporaryDirectory(prefix="unit_tests_") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(job).encode("ascii"), timeout=4 * seconds + 30)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
    if out.startswith(b"cannot limit"):
        raise RuntimeError(f"unit_tests runs no code without its limits: {out.decode(errors='replace')}")
    return out.decode("ascii", "replace").strip().endswith(word)


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        pipe.close()


def _tests(given: Any, column: str, i: int) -> list[str] | None:
    if given is None:
        return None
    tests = [given] if isinstance(given, str) else list(given) if isinstance(given, Sequence) else []
    if not tests or not all(isinstance(test, str) for test in tests):
        raise TypeError(
            f"unit_tests: the column {column!r} must hold a text or a list of texts, got {shorten(given)} at index {i}"
        )
    return tests
