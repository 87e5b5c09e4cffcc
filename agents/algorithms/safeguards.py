"""What goes wrong in an update and what is done about it: numbers that are not finite, and too little memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.algorithms.gradient_step import Loss, accumulate_gradients
from agents.policies.base import Policy
from agents.rollouts.rollout import Rollout
from reward_models.warning import warn
from textrl_env.lm.out_of_memory import is_out_of_memory

_ADVICE = "a lower learning_rate or a smaller reward scale usually helps"


class SkippedUpdates:
    """Counts gradient steps that were not taken because their gradient is not finite.

    Args:
        limit: So many in a row stop learning.

    Attributes:
        total: Since learning began.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.total, self._in_row = limit, 0, 0

    def taken(self) -> None:
        """A gradient step was taken."""
        self._in_row = 0

    def skip(self, what: str, when: str) -> None:
        """A gradient step was skipped.

        Args:
            what: Was not finite.
            when: In the run.

        Raises:
            FloatingPointError: It is the last of ``limit`` in a row.
        """
        self.total += 1
        self._in_row += 1
        if self._in_row >= self.limit:
            count = f"{self._in_row} updates in a row" if self._in_row > 1 else "an update"
            raise FloatingPointError(f"the gradient of {count} was not finite, {when}: {what}; {_ADVICE}")
        if self._in_row == 1:
            warn(f"an update was skipped, its gradient is not finite, {when}: {what}")


def find_non_finite(policy: Policy, batch: Rollout, loss: Loss, weights: Tensor, rows: int | None) -> str:
    """Where numbers stop being finite: in the rollout, in an episode's loss, in the gradient of a tensor.

    Args:
        policy: Its gradients are lost.
        batch: Rows of a rollout.
        loss: Of every step.
        weights: ``[b, T]``, how the steps are averaged.
        rows: Evaluated at once; None for all.
    """
    found = []
    for name in ("rewards", "advantages", "returns", "log_probs", "ref_log_probs", "values"):
        values = getattr(batch, name)
        if values is not None:
            bad = (~torch.isfinite(values) & batch.mask).any(1)
            if bad.any():
                found.append(f"{name} of {_episode(batch, bad)}")
    with torch.enable_grad():  # a policy asks a teacher only where there is a gradient
        bad = torch.zeros(len(batch), dtype=torch.bool, device=batch.mask.device)
        for micro, where in batch.micro_batches(rows):
            losses, _ = loss(micro, policy.evaluate(micro))
            bad[where] = (~torch.isfinite(losses * weights[where]) & micro.mask).any(1)
    if bad.any():
        found.append(f"the loss of {_episode(batch, bad)}")
    policy.zero_grad()
    accumulate_gradients(policy, batch, loss, weights, rows)
    names = [n for n, p in policy.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(f"the gradient of {names[0]}{others}")
    return ", ".join(found) or "its norm is too large for the precision of the numbers"


def _episode(batch: Rollout, bad: Tensor) -> str:
    row = int(bad.nonzero()[0])
    total = float((batch.rewards[row] * batch.mask[row]).sum())
    steps = int(batch.mask[row].sum())
    count = int(bad.sum())
    more = f", the first of {count}" if count > 1 else ""
    return f"row {row} of {len(batch)} ({steps} steps, rewards that add up to {total:.4g}{more})"


def check_weights(policy: Policy, when: str) -> float:
    """Raise a FloatingPointError that names the first tensor of weights that is not finite.

    Args:
        policy: One norm of all its weights is looked at, and each by itself only where that is not finite.
        when: For the message.

    Returns:
        The norm of all weights; 0 where there are none.
    """
    weights = [p.detach() for _, p in policy.named_weights() if is_plain(p)]
    norm = float(torch.nn.utils.get_total_norm(weights)) if weights else 0.0
    if math.isfinite(norm):
        return norm
    for name, weight in policy.named_weights():
        if is_plain(weight) and not _finite(weight):
            bad = int((~torch.isfinite(weight)).sum())
            raise FloatingPointError(
                f"{bad:,} of the {weight.numel():,} weights in {name} are NaN or infinite {when}; {_ADVICE}"
            )
    raise FloatingPointError(f"the norm of the weights is not finite {when}, so large are they; {_ADVICE}")


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is floating-point numbers and nothing more, as quantised ones are."""
    return weight.is_floating_point() and type(weight.detach()) is Tensor


def _finite(tensor: Tensor) -> bool:
    if hasattr(tensor, "to_local"):  # split over processes: the part that is here
        tensor = tensor.to_local()
    return bool(torch.isfinite(tensor).all())


class Accumulated(NamedTuple):
    """What :func:`accumulate_within_memory` did: names and means to log, and the rows evaluated at once."""

    names: list[str]
    totals: Tensor
    rows: int | None


def accumulate_within_memory(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Rollout,
    loss: Loss,
    weights: Tensor,
    rows: int | None,
    fresh: bool,
    share: np.ndarray | None = None,
    passes: int = 0,
) -> Accumulated:
    """:func:`~agents.algorithms.gradient_step.accumulate_gradients`, with half the rows at once while memory is short.

    The gradient is the same up to rounding: its weights belong to the whole minibatch.

    Args:
        policy: Evaluates the rows.
        optimizer: Its gradients are zero.
        batch: Rows of a rollout.
        loss: Of every step.
        weights: ``[b, T]``, how the steps are averaged.
        rows: Evaluated at once; None for all.
        fresh: No step has been taken since the rollout.
        share: Rows of this process; None is all of them.
        passes: Of the policy, at least so many.

    Raises:
        torch.OutOfMemoryError: A single row does not fit.
    """
    while True:
        try:
            done = accumulate_gradients(policy, batch, loss, weights, rows, fresh, share, passes)
            return Accumulated(*done, rows)
        except (MemoryError, RuntimeError) as error:
            count = len(batch) if share is None else len(share)
            at_once = min(rows or count, count)
            if (
                not is_out_of_memory(error) or policy.is_split
            ):  # the other processes are in the middle of a pass
                raise
            if at_once <= 1:
                longest = int(batch.mask.sum(1).max())
                error.add_note(
                    f"a single episode of {longest} steps does not fit into memory: lower max_new_tokens, train an "
                    "adapter (lora_rank), or take a smaller model"
                )
                raise
        # Outside the handler, where the error would keep the tensors of the failed attempt alive.
        rows = -(-at_once // 2)
        batch.evaluation = None
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warn(
            f"an update of {at_once} rows at once ran out of memory: it is done again, and all that follow, with "
            f"{rows} at once and the same gradient (micro_batch_size={rows} from the start saves the attempt)"
        )
