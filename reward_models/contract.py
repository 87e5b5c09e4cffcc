"""The reward contract: anything that can score a completion, behind one object.

    reward = load_reward(my_function)
    reward = load_reward("path/to/reward_model")
    reward = load_reward("my_package.rewards:brevity")
    reward = load_reward([(my_function, 1.0), ("path/to/reward_model", 0.5)])
    result = reward.score(["2 + 2 ="], [" 4"], columns={"answer": ["4"]})
    result.total, result.parts

A reward function is ``reward(prompts, completions, **columns) -> list[float]``: the dataset's other columns
arrive as keywords, one list each, and so do ``prompt_ids`` and ``completion_ids`` (lists of token ids) when
they are known. A function without ``**kwargs`` only receives what it names. Async functions are awaited.

Where prompts are message lists, a function gets them as they are, and completions as
``[{"role": "assistant", "content": ...}]``; where they are texts, texts. ``trainer_state`` says how far training is;
``log_metric`` and ``log_extra`` are functions to log with (:mod:`reward_models.notes`).

None means "this reward does not apply to this row": such an entry contributes 0 to the total and is NaN in
``parts``. A row to which no reward applies has a total of 0, nothing is learned from it, and a warning says so.

Left out on purpose: running several rewards at once, and caching of scores.
"""

from __future__ import annotations

import inspect
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reward_models.base import Batch, Reward, RewardResult
from reward_models.function import FunctionReward
from reward_models.locate import find_reward
from reward_models.names import shorten, unique_names


class WeightedSum(Reward):
    """Several rewards, added with weights; every part stays visible by name.

    Args:
        rewards: What :func:`load_reward` takes, one for each term.
        weights: One finite number each; all 1 by default.
    """

    def __init__(self, rewards: Sequence[Any], weights: Sequence[float] | None = None) -> None:
        self.rewards = [load_reward(reward) for reward in rewards]
        self.weights = [1.0] * len(self.rewards) if weights is None else [float(w) for w in weights]
        if not self.rewards:
            raise ValueError("an empty list is no reward; give at least one")
        if len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.weights)} weights for {len(self.rewards)} rewards")
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"the weights of rewards have to be finite, got {self.weights}")
        self._names = tuple(unique_names(name for reward in self.rewards for name in reward.names))
        self.name = " + ".join(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def evaluate(self, batch: Batch, optional: bool = False) -> RewardResult:
        several = len(self.rewards) > 1
        results = [reward.evaluate_own(batch, optional=optional or several) for reward in self.rewards]
        total = np.zeros(len(batch))
        for weight, result in zip(self.weights, results, strict=True):
            total += weight * np.nan_to_num(result.total, nan=0.0)
        total[np.all([np.isnan(result.total) for result in results], axis=0)] = np.nan
        parts = [part for result in results for part in result.parts.values()]
        return RewardResult(total, dict(zip(self.names, parts, strict=True)))

    def leaves(self) -> list[Reward]:
        return [leaf for reward in self.rewards for leaf in reward.leaves()]

    def use_ids(self, tokenizer: Any) -> bool:
        told = [reward.use_ids(tokenizer) for reward in self.rewards]  # every one, so no short cut
        return any(told)

    def get_state(self) -> dict[str, Any]:
        return states_of(self.rewards)

    def set_state(self, state: Mapping[str, Any]) -> None:
        set_states(self.rewards, state)


def load_reward(spec: Any) -> Reward:
    """Make a :class:`Reward` of anything that the environments accept as one.

    Args:
        spec: A reward function; the path or hub id of a sequence-classification model;
            ``"package.module:function"`` or ``"path/to/file.py:function"``, also with literal arguments as in
            ``"reward_models:numeric_answer(column='answer')"``; a sequence-classification model; a Reward; or
            a list of these, or of ``(spec, weight)`` pairs, which is their weighted sum.

    Raises:
        FileNotFoundError: No such model folder or file.
        ImportError: No such module or function.
        TypeError: Not something that can score.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, list | tuple):
        return _load_list(spec)
    if isinstance(spec, str) or hasattr(spec, "__fspath__"):
        return load_reward(find_reward(str(spec)))
    if inspect.isclass(spec):
        raise TypeError(f"{spec.__name__} is a class; give an instance of it, or a function")
    if _is_torch_module(spec):
        from reward_models.classifier import HFRewardModel

        return HFRewardModel(spec)
    if callable(spec):
        return FunctionReward(spec)
    raise TypeError(
        "a reward is a function reward(prompts, completions, **columns), a model folder, "
        "'package.module:function', or a list of these with weights; "
        f"got {type(spec).__name__}: {shorten(spec)}"
    )


def states_of(rewards: Sequence[Reward]) -> dict[str, Any]:
    """The states of those that keep one, by position."""
    states = {str(i): reward.get_state() for i, reward in enumerate(rewards)}
    return {key: state for key, state in states.items() if state}


def set_states(rewards: Sequence[Reward], state: Mapping[str, Any]) -> None:
    """Go on from what :func:`states_of` returned."""
    expected, came = states_of(rewards).keys(), state.keys()
    if expected != came:
        raise ValueError(
            f"the state holds rewards {sorted(came)}, but those with a state are {sorted(expected)}"
        )
    for key, value in state.items():
        rewards[int(key)].set_state(value)


def _load_list(spec: Sequence[Any]) -> WeightedSum:
    if _is_pair(spec):
        spec = [spec]
    weighted = [entry if _is_pair(entry) else (entry, 1.0) for entry in spec]
    return WeightedSum([reward for reward, _ in weighted], [weight for _, weight in weighted])


def _is_pair(spec: Any) -> bool:
    return (
        isinstance(spec, list | tuple)
        and len(spec) == 2
        and isinstance(spec[1], numbers.Real)
        and not isinstance(spec[1], bool)
    )


def _is_torch_module(spec: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(spec, torch.nn.Module)
