"""What the verbs that learn from files share: flags, where output may go, and the closing lines."""

from __future__ import annotations

import contextlib
import functools
import inspect
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from agents import presets
from agents.commands import command_line, flags
from textrl_env.printable import printable

#: Fewer optimiser steps than this teach little: Adam's averages have hardly settled.
FEW_STEPS = 30

# -- flags that the trainers share --------------------------------------------------------------------------

_DATA, _MODEL, _ADAPTER, _RUN = "Data", "Loading", "What is trained, and how", "Watching and saving"


def learning_rate(trainer: str) -> Any:
    """The flag of a trainer's learning rate; None is the default by what is trained."""
    shown = presets.describe_on_files(trainer, "learning_rate")
    text = "Peak of Adam's; warm-up, then --lr-scheduler-type."
    return Annotated[float | None, typer.Option(min=0, help=text, show_default=shown)]


BatchSize = Annotated[int, typer.Option(min=1, help="Records (comparisons) per optimiser step.")]
MicroBatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Of these, per forward pass: less memory, same result.", show_default="all"),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=2, help="The most tokens of a record.", show_default="what the model holds", rich_help_panel=_DATA
    ),
]
TooLong = Annotated[
    str,
    typer.Option(
        help="What becomes of longer records: cut (tokens off the prompt's beginning), skip or error.",
        rich_help_panel=_DATA,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Budget of an answer in tokens.", show_default="256; 24 with the embedded models"
    ),
]
AllowControlTokens = Annotated[
    bool,
    typer.Option(
        "--allow-control-tokens",
        help="Let text in messages be control tokens of the chat template; it stays plain text otherwise.",
        rich_help_panel=_DATA,
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        metavar="JSON",
        help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
        rich_help_panel=_DATA,
    ),
]
SkipBadRows = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows",
        help="Leave out rows that cannot be read; stop otherwise.",
        rich_help_panel=_DATA,
    ),
]
WarmupRatio = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the steps in which the learning rate rises from 0.")
]
WeightDecay = Annotated[float, typer.Option(min=0, help="Decoupled weight decay, on matrices only.")]
MaxGradNorm = Annotated[float, typer.Option(help="The gradient's norm is clipped here.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the data's order, and of what is new in the model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.", rich_help_panel=_MODEL)]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write over an earlier output.", rich_help_panel=_RUN)
]

#: Where the options of :class:`~agents.offline.options.TrainerOptions` stand in the help.
_PANELS = {
    "lr_scheduler_type": _ADAPTER,
    "lr_scheduler_kwargs": _ADAPTER,
    "lora_rank": _ADAPTER,
    "lora_alpha": _ADAPTER,
    "lora_targets": _ADAPTER,
    "autocast": _ADAPTER,
    "gradient_checkpointing": _ADAPTER,
    "save_dtype": _RUN,
    "eval_every": _RUN,
    "save_every": _RUN,
    "keep": _RUN,
    "resume": _RUN,
    "report_to": _RUN,
    "log_dir": _RUN,
}
#: The command line logs and saves without being asked.
_DEFAULTS = {"report_to": flags.REPORT_TO, "save_every": "15m"}


def with_trainer_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with a flag for every field of :class:`~agents.offline.options.TrainerOptions`.

    Args:
        command: A typer command with a last parameter ``options``, which receives those that were given, as a dict.
    """

    def run(values: dict[str, Any], options: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            from agents.runs.saving import TrainingInterrupted
            from reward_models.data.lengths import DataWarning

            warnings.simplefilter("ignore", DataWarning)  # the last page tells what was left out
            try:
                command(**values, options=_DEFAULTS | options)
            except TrainingInterrupted as error:
                print(f"stopped, and saved in {values['output']}; go on with: {_resume_command()}")
                raise typer.Exit(error.exit_code) from None

    return _with_flags(command, flags.trainer_flags(), run)


def with_loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with a flag for every field of :class:`~reward_models.loading.LoadOptions`; see above."""

    def run(values: dict[str, Any], options: dict[str, Any]) -> None:
        command(**values, options=options)

    return _with_flags(command, flags.loading_flags(), run)


def _with_flags(
    command: Callable[..., None],
    shared: list[flags.Flag],
    run: Callable[[dict[str, Any], dict[str, Any]], None],
) -> Callable[..., None]:
    """``run(values, options)`` as a typer command: ``values`` for the arguments of ``command``, options for flags."""
    own = list(inspect.signature(command).parameters.values())[:-1]
    hints = get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in shared}
        run(values, flags.parse_values(shared, given))

    parameters = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    panels = {flag.name: _PANELS.get(flag.name, _MODEL) for flag in shared}
    with_flags.__signature__ = inspect.Signature(
        [*parameters, *flags.as_typer_parameters(shared, panels, _DEFAULTS)]
    )
    with_flags.__annotations__ = {}
    del with_flags.__wrapped__  # its annotations would be read instead
    return with_flags


def _resume_command() -> str:
    """What to type to go on with the run of this command."""
    return f"{_command()} --resume"


def _command() -> str:
    """What was typed, to begin anew."""
    typed = [word for word in command_line.get() if word not in ("--overwrite", "--resume")]
    return printable(shlex.join(["textrl", *typed]))


@contextlib.contextmanager
def naming(data: str | Path) -> Iterator[None]:
    """Errors of records all taken together name the file; those of one record do already."""
    try:
        yield
    except ValueError as error:
        if Path(data).name not in str(error):
            error.add_note(f"learning from {data}")
        raise


def say_what_a_kill_loses(folder: Path, options: dict[str, Any]) -> None:
    """Before training begins."""
    from agents.runs.saving import what_a_kill_loses

    print(f"{folder}: {what_a_kill_loses(options.get('save_every'), 'steps')}")


# -- files --------------------------------------------------------------------------------------------------


def check_output(path: str | Path, overwrite: bool, options: dict[str, Any] | None = None) -> Path:
    """A folder or file that may be written: it is not there, or empty, or may be overwritten or gone on with."""
    from agents.parallel.processes import current

    path = Path(path).expanduser()
    # Asked once: another process may have begun to write.
    there = current().on_main(lambda: any(path.iterdir()) if path.is_dir() else path.exists())
    if there and not overwrite and not (options or {}).get("resume"):
        raise FileExistsError(f"{path} is already there; give another --output, or --overwrite")
    return path


def check_data(data: str | None, default: str, how: str) -> str:
    """The data file; without one the default if it is there, otherwise an error with the command that makes it."""
    if data is not None:
        return data
    if not Path(default).is_file():
        raise FileNotFoundError(f"give --data FILE; without it {default} is taken, which is not here: {how}")
    return default


def report(headline: str, figures: dict[str, float | str], skipped: Sequence[str] = ()) -> None:
    """What came out, in a few lines; then the first of the rows that were left out."""
    from rich.console import Console

    console = Console()
    console.print(f"\n{printable(headline)}", style="bold", highlight=False, markup=False, soft_wrap=True)
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        line = f"  {name:<{width}}  {printable(_shown(value))}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if skipped:
        line = f"  {len(skipped)} bad rows were left out, the first: {printable(skipped[0])}"
        console.print(line, style="yellow", markup=False)


def _shown(figure: float | str) -> str:
    return figure if isinstance(figure, str) else f"{figure:.4g}"


def keep_note(folder: Path, options: dict[str, Any], figures: dict[str, float | str]) -> None:
    """Keep the command and its figures beside the log, for the report; without a log there is none."""
    from agents.runs.training_note import TrainingNote, write_note

    place = Path(options["log_dir"]) if options.get("log_dir") else folder / "logs"
    if place.is_dir():
        shown = {printable(name): printable(_shown(value)) for name, value in figures.items()}
        write_note(place, TrainingNote(_command(), shown))


def steps_and_loss(result: dict[str, Any]) -> dict[str, str]:
    """How far training went and what it did to the loss, for :func:`report`."""
    steps = int(result["steps"])
    few = "" if steps >= FEW_STEPS else "; that is few: a smaller --batch-size or more --epochs makes more"
    figures = {
        "loss": f"{result['first_loss']:.4g} -> {result['loss']:.4g}",
        "optimiser steps": f"{steps:,}{few}",
        "records": f"{int(result['records']):,}",
    }
    if result["cut"]:
        figures["cut"] = f"{int(result['cut']):,} records were too long (--too-long, --max-length)"
    if result["skipped"]:
        figures["left out"] = f"{int(result['skipped']):,} records"
    return figures


def held_out(result: dict[str, Any]) -> dict[str, float]:
    """The figures of the held-out records, for :func:`report`."""
    return {n.replace("eval_", "held-out "): value for n, value in result.items() if n.startswith("eval_")}


def print_next(commands: Sequence[tuple[str, str]]) -> None:
    """What to type next; lines that can be copied whole."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print("\nNext", style="bold")
    for command, meaning in commands:
        line = Text(f"  {command}", style="cyan")
        line.append(f"   # {meaning}", style="dim")
        console.print(line, soft_wrap=True)
