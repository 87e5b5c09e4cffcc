"""What every reward is: the rows it is asked about, the object that scores them, and the scores.

How to make one of a function, a model folder or a list is :mod:`reward_models.contract`.
"""

from __future__ import annotations

import math
import numbers
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reward_models.handing_over import own_copy
from reward_models.names import shorten
from reward_models.notes import Notes, pass_on
from reward_models.trust import is_own

#: Keywords that the contract itself fills; no dataset column may be called so.
RESERVED = (
    *("prompts", "completions", "prompt_ids", "completion_ids"),
    *("trainer_state", "log_metric", "log_extra"),
)


@dataclass
class TrainerState:
    """How far training is, under the names that rewards written for TRL read.

    Attributes:
        global_step: Updates done.
        max_steps: Updates there will be, by the steps of the last rollout; 0 before the first.
        epoch: The share of the training that is done, from 0 to 1.
        num_timesteps: Env steps done (on text: tokens).
        total_timesteps: Env steps there will be.
    """

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_timesteps: int = 0
    total_timesteps: int = 0


@dataclass(frozen=True)
class RewardResult:
    """The scores of ``N`` completions.

    Attributes:
        total: float64 ``[N]``, always finite: what the environment pays.
        parts: For each reward by name, its raw score, float64 ``[N]``: before weights, clipping and
            normalising. NaN where a reward does not apply.
        scored: bool ``[N]``, false for rows to which no reward applies; None where every row is scored.
        logged: What functions have logged beside their scores, ``[N]`` arrays, see :mod:`reward_models.notes`.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    scored: np.ndarray | None = None
    logged: dict[str, np.ndarray] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """The mean of each part over the rows it applies to; parts that apply to no row are left out."""
        applied = {name: part[~np.isnan(part)] for name, part in self.parts.items()}
        return {name: float(part.mean()) for name, part in applied.items() if len(part)}


@dataclass(frozen=True)
class Batch:
    """The ``N`` rows that a reward is asked about; checked to be of one length."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    prompt_ids: Sequence[Sequence[int]] | None = None
    completion_ids: Sequence[Sequence[int]] | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    trainer_state: Any = None
    notes: Notes = field(default_factory=Notes)

    def __post_init__(self) -> None:
        for name in self.columns:
            if name in RESERVED:
                raise ValueError(f"a column cannot be called {name!r}: rewards receive {RESERVED} themselves")
        for name, values in self.offered().items():
            if name == "trainer_state" or callable(values):
                continue
            if isinstance(values, str) or len(values) != len(self.prompts):
                came = "one string" if isinstance(values, str) else f"{len(values)} entries"
                raise ValueError(
                    f"{name!r} has {came} for {len(self.prompts)} prompts; expected one for each"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, which: slice) -> Batch:
        """Some of the rows."""
        columns = {name: values[which] for name, values in self.columns.items()}
        lists = (self.prompts, self.completions, self.prompt_ids, self.completion_ids)
        return Batch(
            *(None if values is None else values[which] for values in lists),
            columns,
            self.trainer_state,
            self.notes,
        )

    def copied(self) -> Batch:
        """The same rows in lists of their own."""
        return Batch(
            *own_copy((self.prompts, self.completions, self.prompt_ids, self.completion_ids, self.columns)),
            self.trainer_state,
            self.notes,
        )

    @property
    def log_metric(self) -> Callable[[str, float], None]:
        """See :meth:`reward_models.notes.Notes.log_metric`."""
        return self.notes.log_metric

    @property
    def log_extra(self) -> Callable[[str, Sequence[Any]], None]:
        """See :meth:`reward_models.notes.Notes.log_extra`."""
        return self.notes.log_extra

    def offered(self) -> dict[str, Any]:
        """Everything a reward function may ask for, by keyword."""
        own = {name: getattr(self, name) for name in RESERVED}
        return {name: values for name, values in own.items() if values is not None} | dict(self.columns)


class Reward(ABC):
    """Something that scores completions. Make one with :func:`load_reward`, or subclass it.

    A subclass sets ``name``, and implements :meth:`evaluate`. A Reward is shared, never copied: copying an
    environment that holds one does not copy the weights behind it.

    Attributes:
        name: What errors and logs call it.
        names: The names of ``RewardResult.parts``.
    """

    name: str
    #: Whether it looks at one completion at a time, so that a batch may be scored in parts.
    row_by_row = False
    #: Scores a batch in the place of :meth:`evaluate`, which it may call: ``evaluator(reward, batch, optional)``. Set
    #: where several processes share the work.
    evaluator: Callable[[Reward, Batch, bool], RewardResult] | None = None
    _told_missing = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its parts, in order; its own alone unless it is made of several."""
        return (self.name,)

    @abstractmethod
    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        """Score a batch of at least one row; where ``optional``, NaN marks a row that it does not apply to."""

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        trainer_state: Any = None,
    ) -> RewardResult:
        """Score ``N`` completions. A row to which no reward applies has a total of 0, and one warning says so.

        No agent learns from such a row, as in TRL.

        Args:
            prompts: ``N`` texts (or message lists).
            completions: ``N`` texts (or message lists).
            prompt_ids: The prompts' token ids, without padding, if known.
            completion_ids: The completions' token ids, without padding, if known.
            columns: The dataset's other columns, ``N`` values each.
            trainer_state: How far training is, for functions that ask for it.

        Raises:
            ValueError: Lengths differ, or a score is NaN or infinite.
            TypeError: A score is not a number, or a function asks for a column that is not there.
        """
        batch = Batch(prompts, completions, prompt_ids, completion_ids, columns or {}, trainer_state)
        if len(batch) == 0:
            return RewardResult(np.zeros(0), {name: np.zeros(0) for name in self.names})
        result = self.evaluate_own(batch, optional=True)
        logged = batch.notes.columns(len(batch))
        missing = np.isnan(result.total)
        if not missing.any():
            return replace(result, logged=logged) if logged else result
        if not self._told_missing:
            self._told_missing = True
            row = int(missing.argmax())
            warnings.warn(
                f"reward {self.name!r} does not apply (None) to {missing.sum()} of {len(batch)} completions, and no "
                "other does: their score is 0, and nothing is learned from them. The first: prompt "
                f"{shorten(batch.prompts[row])}, completion "
                f"{shorten(batch.completions[row])}",
                stacklevel=2,
            )
        return RewardResult(np.where(missing, 0.0, result.total), result.parts, ~missing, logged)

    def evaluate_own(self, batch: Batch, optional: bool = False) -> RewardResult:
        """:meth:`evaluate`, on a copy of the rows where the class is not one of this project's."""
        if self.evaluator is not None:
            evaluator, self.evaluator = self.evaluator, None  # which may ask this very method
            try:
                return evaluator(self, batch, optional)
            finally:
                self.evaluator = evaluator
        return self.evaluate(batch if is_own(type(self)) else batch.copied(), optional)

    def leaves(self) -> list[Reward]:
        """The rewards that it is made of and computes with in the open; itself, unless it is made of others."""
        return [self]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: Sequence[Any],
    ) -> list[float]:
        """The totals as a list, so that a Reward is itself a reward function.

        One inside another function may be handed all that the function got; what it logs is passed on.
        """
        ids = prompt_ids, completion_ids
        result = self.score(prompts, completions, *ids, columns, trainer_state)
        pass_on(result.logged, log_metric, log_extra)
        return result.total.tolist()

    def use_ids(self, tokenizer: Any) -> bool:
        """Tell the reward which tokenizer the token ids come from; True if it will read them."""
        return False

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as a JSON-able dict; empty unless something is running."""
        return {}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        if state:
            raise ValueError(f"reward {self.name!r} keeps no state, got {sorted(state)}")

    def __deepcopy__(self, memo: dict) -> Reward:
        return self

    def __copy__(self) -> Reward:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.names)})"


def check_scores(values: Any, batch: Batch, name: str, optional: bool = False) -> np.ndarray:
    """What a reward returned, as float64 ``[N]``.

    Args:
        values: A list, array or tensor with one number for each row.
        batch: What was asked.
        name: The reward's name, for errors.
        optional: Whether None may mark a row that the reward does not apply to (NaN in the result).
    """
    entries = _entries(values, name, len(batch))
    if len(entries) != len(batch):
        raise ValueError(f"reward {name!r} returned {len(entries)} scores for {len(batch)} completions")
    scores = np.empty(len(batch))
    for i, entry in enumerate(entries):
        if entry is None and optional:
            scores[i] = np.nan
            continue
        problem = _problem(entry)
        if problem is not None:
            error = TypeError if problem == "not a number" else ValueError
            raise error(
                f"reward {name!r} returned {shorten(entry)} at index {i}: {problem}. "
                f"Prompt: {shorten(batch.prompts[i])}, completion: {shorten(batch.completions[i])}"
            )
        scores[i] = float(entry)
    return scores


def _entries(values: Any, name: str, count: int) -> list[Any]:
    """The returned values as a flat list; an array or tensor of shape [N] or [N, 1] is one."""
    if hasattr(values, "detach"):  # a torch tensor, of any dtype and on any device
        values = values.detach().cpu().double().numpy()
    if isinstance(values, np.ndarray):
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        if values.ndim != 1:
            raise ValueError(
                f"reward {name!r} returned shape {values.shape} for {count} completions, not ({count},)"
            )
        return values.tolist()
    if values is None or isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise TypeError(
            f"reward {name!r} returned {type(values).__name__} ({shorten(values)}) for {count} completions; "
            "expected a list with one number for each"
        )
    return [entry.item() if getattr(entry, "shape", None) == () else entry for entry in values]


def _problem(entry: Any) -> str | None:
    if entry is None:
        return "this reward has to score every row"
    if not isinstance(entry, numbers.Real):
        return "not a number"
    return None if math.isfinite(entry) else "not finite"
