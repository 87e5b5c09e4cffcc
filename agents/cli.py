"""The command line ``textrl``: one verb for each thing that people do.

Help answers at once: torch is imported by the verbs that need it, when they run. An error is one line on
standard error and exit code 2; ``--debug``, anywhere on the line, shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.commands import VERBS, StoppedError, command_line, interruptible
from agents.process import tuned_process
from textrl_env.errors import did_you_mean
from textrl_env.printable import printable


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        args: Arguments without the program's name; None takes those of the process.
    """
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    command_line.set(tuple(args))
    try:
        _raise_on_sigterm()
        _check_verb(args)
        with _with_others(args), tuned_process():
            code = make_app()(args, prog_name="textrl", standalone_mode=False)
    except (KeyboardInterrupt, StoppedError) as error:
        cause = error.__cause__ or error
        ended = isinstance(cause, _TerminatedError)
        told = " ".join(["terminated" if ended else "aborted", *_notes(cause)])
        print(f"textrl: {printable(told)}", file=sys.stderr)
        return 143 if ended else 130
    except _LeftError:
        return 2
    except Exception as error:
        if debug:
            raise
        print(f"textrl: {_one_line(error)}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def make_app() -> typer.Typer:
    """The typer application with every verb."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="Reinforcement learning on language models, through Gymnasium: a token is a step.",
        epilog="Start with: textrl demo",
    )
    app.callback()(_global_options)
    for verb in VERBS:
        module = importlib.import_module(f"agents.commands.{verb}")
        app.command(verb, **getattr(module, "SETTINGS", {}))(interruptible(getattr(module, verb)))
    return app


def _global_options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from textrl_env import __version__

        print(f"textrl-env {__version__}")
        raise typer.Exit


def _check_verb(args: list[str]) -> None:
    if args and not args[0].startswith("-") and args[0] not in VERBS:
        raise ValueError(f"there is no command {args[0]!r}. {did_you_mean(args[0], VERBS)}")


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM came; like Ctrl-C, so that a verb that saves on the one saves on the other."""


def _raise_on_sigterm() -> None:
    """SIGTERM ends a verb by an exception, so that files are closed and what can be saved is."""

    def handle(number: int, frame: Any) -> None:
        raise _TerminatedError

    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handle)


#: How launchers tell a process that it is one of several: torchrun and accelerate, Open MPI, MPICH.
_PROCESSES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
#: Verbs whose work several processes share.
_SHARED = ("train", "sft", "reward", "dpo")


class _LeftError(Exception):
    """Another process has said what went wrong."""


@contextlib.contextmanager
def _with_others(args: Sequence[str]) -> Iterator[None]:
    """Where a launcher has started several of us: meet them, and let the main one speak.

    Raises:
        ValueError: The verb shares no work, so that each process would do and write the same.
    """
    counts = {name: os.environ.get(name, "1") for name in _PROCESSES}
    counts = {name: int(count) for name, count in counts.items() if count.isdecimal() and int(count) > 1}
    if not counts:
        yield
        return
    name, count = next(iter(counts.items()))
    came = f"this is one of {count} processes that a launcher has started ({name}={count})"
    if args and args[0] in VERBS and args[0] not in _SHARED:
        raise ValueError(
            f"{came}, and textrl {args[0]} does not share its work between processes: start it without torchrun, "
            "accelerate launch or mpirun"
        )
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"{came}, and it does not say how they meet ({', '.join(missing)} not set): start it with torchrun or "
            "accelerate launch"
        )
    from agents.parallel import processes as parallel

    with parallel.started() as processes:
        try:
            with contextlib.nullcontext() if processes.is_main else _following():
                yield
        except BaseException as error:
            if not processes.tell(error):
                raise _LeftError from error
            if (
                processes.is_main
                or isinstance(error, parallel.SharedError)
                or not isinstance(error, Exception)
            ):
                raise
            raise parallel.SharedError(f"{processes.name()}: {_one_line(error)}") from error


@contextlib.contextmanager
def _following() -> Iterator[None]:
    """No output and no warnings, which the main process gives too; and it decides what a signal means."""
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _notes(error: BaseException) -> list[str]:
    """What was added to an error on its way, such as which completion a reward was scoring."""
    return [f"({note})" for note in getattr(error, "__notes__", ())]


def _one_line(error: Exception) -> str:
    """What an error says, in one line; a bare class name for one that says nothing."""
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if isinstance(error, KeyError):
        message = str(error.args[0]) if error.args else ""
    if not message:
        message = f"{type(error).__name__} (--debug shows where)"
    return printable(" ".join(" ".join([message, *_notes(error), *_place(error)]).split()))


def _place(error: Exception) -> list[str]:
    """The line of a user's own file that an error comes out of; none where we, or what we call, raised it."""
    libraries = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if _is_ours(file) or not file.is_file():
            break
        if not any(folder in file.parents for folder in libraries):
            return [f"({file.name}, line {frame.lineno}; --debug shows the traceback)"]
    return []


def _is_ours(file: Path) -> bool:
    root = Path(__file__).resolve().parents[1]
    return any(root / room in file.parents for room in ("agents", "textrl_env", "reward_models"))


if __name__ == "__main__":  # python -m agents.cli
    sys.exit(main())
