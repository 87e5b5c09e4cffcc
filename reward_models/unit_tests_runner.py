"""Runs some code and a test of it under limits; started by :mod:`reward_models.unit_tests`, imports nothing of ours.

Reads a job as JSON from the standard input, and writes its word to the standard output if the test raises nothing.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import resource
import signal
import sys

#: Architecture by the kernel's number, and its numbers of socket, connect, kill, io_uring_setup, pidfd_send_signal.
_DENIED = {
    "x86_64": (0xC000003E, (41, 42, 62, 425, 424)),
    "aarch64": (0xC00000B7, (198, 203, 129, 425, 424)),
}
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM


def limit(seconds: float, memory: int, network: bool) -> None:
    """Limit this process for good.

    Raises:
        OSError, ValueError: It cannot be done here.
    """
    whole = math.ceil(seconds)
    for what, most in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 2**24),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    if not network:
        deny_network()


def deny_network() -> None:
    """Let the kernel refuse sockets, and signals to others, to this process and what it starts.

    Raises:
        OSError: It does not.
    """
    machine = platform.machine()
    if machine not in _DENIED:
        raise OSError(f"no system calls are known for {machine}, so the network cannot be denied")
    architecture, calls = _DENIED[machine]
    # (code, if true, if false, value): load the architecture, load the call's number, compare, allow or refuse.
    steps = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), (0x06, 0, 0, _REFUSE), (0x20, 0, 0, 0)]
    steps.append((0x35, len(calls) + 1, 0, 0x40000000))  # the other set of numbers that x86_64 has
    steps += [(0x15, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    steps += [(0x06, 0, 0, _ALLOW), (0x06, 0, 0, _REFUSE)]

    class Step(ctypes.Structure):
        _fields_ = (
            ("code", ctypes.c_uint16),
            ("true", ctypes.c_uint8),
            ("false", ctypes.c_uint8),
            ("value", ctypes.c_uint32),
        )

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step)))

    program = Program(len(steps), (Step * len(steps))(*(Step(*step) for step in steps)))
    call = ctypes.CDLL(None, use_errno=True).prctl
    call.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 4
    if call(38, 1, None, None, None) or call(22, 2, ctypes.addressof(program), None, None):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    try:
        limit(job["seconds"], job["memory"], job["network"])
    except (OSError, ValueError) as error:
        print(f"cannot limit: {error}")
        return
    told = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the code prints is nothing to the verdict
    names = {"__name__": "answer"}
    exec(compile(job["code"], "answer.py", "exec"), names)
    exec(compile(job["test"], "test.py", "exec"), names)
    os.write(told, job["word"].encode("ascii"))
    signal.raise_signal(
        signal.SIGKILL
    )  # what the code has left running, or to be run at the end, is not waited for


if __name__ == "__main__":
    main()
