"""Rewards that several processes ask together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np

from agents.parallel.processes import Processes
from reward_models.base import Batch, Reward, RewardResult


@contextlib.contextmanager
def shared_rewards(processes: Processes, rewards: Iterable[Reward]) -> Iterator[None]:
    """Inside, every process gets the scores of all completions, and each completion is scored once.

    A reward that looks at one completion at a time (a model) shares the rows out. Any other may look at a whole batch,
    ask a service or keep notes, so the main process asks it, just as a single one would. Rewards made of rewards
    compute with what those inside them gave, in every process.

    Args:
        processes: Who shares.
        rewards: All of them are asked about the same batches in the same order everywhere.
    """
    if not processes.are_several:
        yield
        return

    def evaluate(reward: Reward, batch: Batch, optional: bool) -> RewardResult:
        if not reward.row_by_row:
            return processes.on_main(lambda: reward.evaluate_own(batch, optional))
        mine = batch.rows(processes.rows(len(batch)))
        part = reward.evaluate_own(mine, optional) if len(mine) else None
        parts = [each for each in processes.gather(part) if each is not None]
        totals = np.concatenate([each.total for each in parts])
        return RewardResult(
            totals, {name: np.concatenate([each.parts[name] for each in parts]) for name in parts[0].parts}
        )

    asked = {id(leaf): leaf for reward in rewards for leaf in reward.leaves()}.values()
    for leaf in asked:
        leaf.evaluator = evaluate
    try:
        yield
    finally:
        for leaf in asked:
            leaf.evaluator = None
