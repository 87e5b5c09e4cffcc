"""``textrl envs``: the environments, and the documentation page of each."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer


def envs(
    env_id: Annotated[
        str | None, typer.Argument(metavar="[ENV]", help="Show this one's documentation.")
    ] = None,
) -> None:
    """List the environments; with an id, show its documentation."""
    from rich.console import Console

    if env_id is not None:
        Console().print(documentation(env_id), markup=False, highlight=False)
        return
    Console().print(table())
    Console().print("Documentation of one: textrl envs TextRLHF-v0", style="dim", highlight=False)


def documentation(env_id: str) -> str:
    """The documentation page of an environment: its class's docstring.

    Raises:
        ValueError: Not an id of this package.
    """
    cls = _env_class(env_id)
    return f"# {env_id}\n\n{inspect.getdoc(cls)}"


def table() -> Any:
    """A table of ids with spaces and one line of description."""
    import gymnasium as gym
    from rich.table import Table
    from rich.text import Text

    from agents.commands.terminal import quiet_transformers
    from textrl_env import ENV_IDS

    quiet_transformers()
    rows = Table(title="Environments", title_justify="left", header_style="bold", expand=False)
    rows.add_column("id", style="cyan", no_wrap=True)
    for heading in ("observations", "actions", "what it is"):
        rows.add_column(heading, overflow="fold")
    for env_id in ENV_IDS:
        env = gym.make(env_id)
        spaces = (_short(env.observation_space), _short(env.action_space))
        about = inspect.getdoc(type(env.unwrapped)).split("\n")[0]
        rows.add_row(env_id, *(Text(cell) for cell in (*spaces, about)))
        env.close()
    return rows


def _env_class(env_id: str) -> type:
    import importlib

    import gymnasium as gym

    from textrl_env import ENV_IDS
    from textrl_env.errors import did_you_mean

    if env_id not in ENV_IDS:
        raise ValueError(f"there is no environment {env_id!r} here. {did_you_mean(env_id, ENV_IDS)}")
    module, _, name = gym.spec(env_id).entry_point.partition(":")
    return getattr(importlib.import_module(module), name)


def _short(space: Any) -> str:
    """A space in a few characters."""
    import gymnasium as gym

    if isinstance(space, gym.spaces.Dict):
        return ", ".join(f"{name}: {_short(child)}" for name, child in space.spaces.items())
    if isinstance(space, gym.spaces.Box):
        return f"{space.dtype.name}{list(space.shape)}"
    return str(space)
