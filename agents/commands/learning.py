"""Learning as the verbs show it: a bar, and after a signal the line to go on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer


def learn(
    agent: Any, folder: Path, config: dict[str, Any], callbacks: Sequence[Any] = (), progress: bool = True
) -> None:
    """Train a run to its end.

    Args:
        agent: Made from ``config``.
        folder: The run directory, held and prepared.
        config: The run's configuration.
        callbacks: Of stable-baselines3, beside those of every run.
        progress: Whether a bar shows how far it is.

    Raises:
        typer.Exit: A signal has stopped it; what was saved, and how to go on, has been printed.
    """
    from agents.callbacks.progress import ProgressCallback
    from agents.runs import run_directory as runs
    from agents.runs.saving import TrainingInterrupted

    bar = ProgressCallback()
    try:
        runs.train(agent, folder, config, [*([bar] if progress else []), *callbacks])
    except TrainingInterrupted as error:
        bar.close()
        again = runs.resume_command(folder, config)
        print(f"stopped at {agent.num_timesteps:,} timesteps; go on with: {again}")
        raise typer.Exit(error.exit_code) from None
    finally:
        bar.close()
