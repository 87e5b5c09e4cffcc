"""``best/`` beside ``final/``: the checkpoint with the highest score on held-out prompts."""

from __future__ import annotations

import math
from pathlib import Path

from agents.runs.checkpoint import Checkpointed, read_document, save

BEST = "best"


def save_best(agent: Checkpointed, folder: Path, score: float) -> bool:
    """Write the checkpoint ``folder`` if none there has a score as high; says whether it did.

    Args:
        agent: Between two updates.
        folder: Where the best one is kept.
        score: Of the agent as it is now, from an evaluation.
    """
    if folder.is_dir() and best_score(folder) >= score:
        return False
    save(agent, folder, note={"score": score})
    return True


def best_score(folder: Path) -> float:
    """The score of the checkpoint in ``folder``; minus infinity where it has none."""
    return read_document(folder).get("score", -math.inf)


def best_timesteps(folder: Path) -> int:
    """When the checkpoint in ``folder`` was saved."""
    return int(read_document(folder)["num_timesteps"])
