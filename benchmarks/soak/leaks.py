"""Thousands of updates in one process: memory and open files before and after."""

from __future__ import annotations

import os
from pathlib import Path

from table import Table

#: Updates until caches have their size.
_WARM_UP = 200
#: Memory may grow by so many MB over the whole run, an allocator's noise.
_NOISE = 30.0


def long_run(place: Path, table: Table, updates: int) -> None:
    """Train the tiny language model for ``updates`` updates, logging and saving as a run does; in this process."""
    from agents import GRPO
    from agents.runs.logs import open_logger
    from agents.runs.run_directory import SaveRunCallback

    env = {"model": str(place / "model"), "prompts": str(place / "prompts.jsonl"), "max_new_tokens": 4}
    env["reward"] = f"{place / 'odd.py'}:share"
    agent = GRPO("auto", "TextRLHF-v0", n_episodes=4, group_size=2, seed=0, env_kwargs=env)
    logger = open_logger(place / "long")
    agent.set_logger(logger)
    marks: list[tuple[int, float, int]] = []

    def until(last: int):
        def go_on(local_variables: dict, global_variables: dict) -> bool:
            return local_variables["self"].n_updates < last

        return go_on

    for last in (_WARM_UP, updates // 2, updates):
        saver = SaveRunCallback(place / "long", 400)
        from stable_baselines3.common.callbacks import ConvertCallback

        agent.learn(10**9, [ConvertCallback(until(last)), saver], reset_num_timesteps=False)
        marks.append((agent.n_updates, _memory_mb(), len(os.listdir("/proc/self/fd"))))
    logger.close()
    (first, before, files), *_, (last, after, files_after) = marks
    flat = after - before < _NOISE and files_after <= files
    table.row(f"{updates:,} updates in one process").add(
        f"between update {first:,} and {last:,}: memory {after - before:+.1f} MB of {before:.0f} MB, open files "
        f"{files_after - files:+d}",
        "" if flat else f"{marks}",
    )


def _memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
