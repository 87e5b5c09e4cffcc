"""Code as an answer: tests pass and fail, and what the limits stop."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from reward_models import load_reward
from reward_models.unit_tests import code_of, unit_tests

RIGHT = "def double(x):\n    return 2 * x\n"


def score(answers, tests="assert double(2) == 4", **kwargs):
    reward = load_reward(unit_tests(**({"timeout": 10.0, "workers": 4} | kwargs)))
    return reward(["q"] * len(answers), answers, tests=[tests] * len(answers))


def test_code_is_paid_by_the_share_of_tests_that_it_passes():
    tests = ["assert double(2) == 4", "assert double(0) == 0", "assert double('a') == 'aa'"]
    wrong, broken = "def double(x):\n    return x ** 2\n", "def double(x:\n"
    fenced = f"I would write\n```python\n{RIGHT}```\nas it says."
    assert score([RIGHT, fenced, wrong, broken], tests) == pytest.approx([1, 1, 2 / 3, 0])


def test_the_last_block_counts():
    assert code_of("```\na\n```\n```py\nb\n```") == "b\n" and code_of("c") == "c"


def test_leaving_before_the_tests_and_printing_pass_nothing():
    tricks = ["import sys; sys.exit(0)", "import os; os._exit(0)", "print('a' * 32)\nraise SystemExit"]
    assert score(tricks) == [0, 0, 0]


def test_time_memory_and_network_are_limited():
    loop = "while True: pass"
    hog = f"{RIGHT}import mmap\nx = mmap.mmap(-1, 2 ** 30)"  # a gigabyte that is not touched, so that none is needed
    sockets = f"{RIGHT}import socket\nsocket.socket()"
    shell = f"{RIGHT}import os\nassert os.system('exit 0') == 0"
    assert score([loop], timeout=1.0) == [0]
    assert score([hog, sockets, shell]) == [0, 0, 1]
    assert score([hog, sockets], memory=2048, network=True) == [1, 1]


def test_the_code_cannot_signal_other_processes():
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        assert score([f"{RIGHT}import os\nos.kill({sleeper.pid}, {int(signal.SIGTERM)})"]) == [0]
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_code_sees_neither_the_environment_nor_the_folder_of_the_run(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    looks = "import os\nseen = 'A_SECRET' in os.environ or bool(os.listdir('.')) or os.getcwd() == " + repr(
        os.getcwd()
    )
    assert score([looks], "assert not seen") == [1]


def test_columns_that_are_not_there_or_hold_no_tests_are_named():
    with pytest.raises(KeyError, match="reads the tests from the column 'tests'"):
        load_reward(unit_tests())(["q"], [RIGHT])
    with pytest.raises(TypeError, match="must hold a text or a list of texts, got 3 at index 0"):
        score([RIGHT], 3)
    with pytest.raises(ValueError, match="memory at least 64 MiB"):
        unit_tests(memory=1)
