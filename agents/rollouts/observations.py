"""Observations of any space: arrays, and nested dicts and tuples of them.

Gymnasium batches a ``Dict`` space as a dict of batches and a ``Tuple`` space as a tuple of batches, to any depth.
What is done to an observation here is done to each of its arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces


def map_arrays(function: Callable[..., Any], observation: Any, *others: Any) -> Any:
    """``function`` of each array of an observation (and of the arrays at the same place in ``others``)."""
    if isinstance(observation, dict):
        return {
            name: map_arrays(function, value, *(other[name] for other in others))
            for name, value in observation.items()
        }
    if isinstance(observation, tuple):
        return tuple(map_arrays(function, *values) for values in zip(observation, *others, strict=True))
    return function(observation, *others)


def named_arrays(observation: Any, name: str = "") -> dict[str, Any]:
    """The arrays of an observation by where they are, such as "camera/left" or "0/position"; "" for a lone one."""
    if not isinstance(observation, (dict, tuple)):
        return {name: observation}
    children = observation.items() if isinstance(observation, dict) else enumerate(observation)
    return {
        path: array
        for key, value in children
        for path, array in named_arrays(value, f"{name}/{key}" if name else str(key)).items()
    }


def named_spaces(space: spaces.Space, name: str = "") -> dict[str, spaces.Space]:
    """The spaces of :func:`named_arrays`, by the same names."""
    if not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return {name: space}
    children = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
    return {
        path: leaf
        for key, child in children
        for path, leaf in named_spaces(child, f"{name}/{key}" if name else str(key)).items()
    }


def from_named_arrays(space: spaces.Space, arrays: dict[str, Any], name: str = "") -> Any:
    """The inverse of :func:`named_arrays`, for observations of ``space``."""
    if isinstance(space, spaces.Dict):
        children = space.spaces.items()
    elif isinstance(space, spaces.Tuple):
        children = enumerate(space.spaces)
    else:
        return arrays[name]
    values = {
        key: from_named_arrays(child, arrays, f"{name}/{key}" if name else str(key))
        for key, child in children
    }
    return values if isinstance(space, spaces.Dict) else tuple(values.values())


def copied(observation: Any) -> Any:
    """Arrays of one's own: an env may write its next observation into those it has handed out."""
    return map_arrays(np.array, observation)


def add_batch(observation: Any) -> Any:
    """One observation as a batch of one."""
    return map_arrays(lambda array: np.asarray(array)[None], observation)


def stack_steps(observations: list[Any]) -> Any:
    """``T`` batches ``[N, ...]`` -> one ``[N, T, ...]``."""
    return map_arrays(lambda *arrays: np.stack(arrays, axis=1), *observations)


def equal(a: Any, b: Any) -> bool:
    """Whether two observations hold the same numbers."""
    pairs: list[bool] = []
    map_arrays(lambda x, y: pairs.append(np.array_equal(x, y)), a, b)
    return all(pairs)


def row_of(observation: Any, slot: int) -> Any:
    """One observation out of a batch."""
    return map_arrays(lambda array: array[slot], observation)


def zeros_with_rows(like: Any, rows: dict[int, Any]) -> Any:
    """A batch of zeros shaped like ``like``, with these observations in the places that they name."""
    batch = map_arrays(np.zeros_like, like)
    for slot, row in rows.items():
        map_arrays(lambda array, value, slot=slot: array.__setitem__(slot, value), batch, row)
    return batch


def is_single(space: spaces.Space, observation: Any) -> bool:
    """Whether this is one observation of ``space`` and not a batch of them.

    Raises:
        ValueError: It is neither, by the shape of its arrays.
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        named = isinstance(space, spaces.Dict)
        key = next(iter(space.spaces)) if named else 0
        if not isinstance(observation, dict if named else (tuple, list)) or (
            named and key not in observation
        ):
            raise ValueError(f"expected an observation of {space}, got {_described(observation)}")
        return is_single(space.spaces[key], observation[key])
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
        raise ValueError(
            f"expected an observation of {space}, got (observation, info), as reset() of a Gymnasium env returns it; "
            "the observation alone is wanted (mixing Gym API and VecEnv API, whose reset() returns no info?)"
        )
    shape, own = np.shape(observation), space.shape or ()
    if shape[len(shape) - len(own) :] != own or len(shape) - len(own) not in (0, 1):
        raise ValueError(
            f"expected an observation of shape {own} or a batch of them, got shape {shape} ({space})"
        )
    return len(shape) == len(own)


def _described(observation: Any) -> str:
    if isinstance(observation, dict):
        return f"a dict of {sorted(map(str, observation))}"
    return f"{type(observation).__name__} of shape {np.shape(observation)}"
