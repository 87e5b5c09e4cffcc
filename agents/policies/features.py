"""Observations of any space as the numbers that a network reads.

A space is its bounds, its start and its dtype: ``Discrete(3, start=-1)`` holds -1, 0 and 1, integers between narrow
bounds are kinds rather than amounts, and only an image's bytes are brightness from 0 to 255.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from agents.rollouts.observations import named_arrays

#: Integer spaces up to this many values are one-hot encoded, wider ones read as numbers.
_ONE_HOT_LIMIT = 64
_FEATURE_LIMIT = 100_000


def feature_size(space: spaces.Space) -> int:
    """Number of features :func:`encode` makes of one observation of ``space``.

    Raises:
        ValueError: A space an MLP cannot take.
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return sum(feature_size(child) for child in _children(space).values())
    if isinstance(space, spaces.Discrete):
        size = int(space.n)
    elif isinstance(space, spaces.MultiDiscrete):
        size = int(space.nvec.sum())
    elif isinstance(space, spaces.MultiBinary):
        size = int(np.prod(space.shape))
    elif isinstance(space, spaces.Box):
        size = int(np.prod(space.shape)) * (_one_hot_width(space) or 1)
    else:
        raise ValueError(
            f"MlpPolicy cannot take the observation space {space}; it takes Box, Discrete, MultiDiscrete, "
            "MultiBinary, and Dict and Tuple of these (a FlattenObservation wrapper may help)"
        )
    if size > _FEATURE_LIMIT:
        raise ValueError(
            f"MlpPolicy would turn the observation space {space} into {size} features; "
            'text environments want policy="CausalLMPolicy", images policy="CnnPolicy"'
        )
    return size


def is_image(space: spaces.Space) -> bool:
    """Whether a space holds images: bytes from 0 to 255 in rows and columns."""
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) >= 2
        and bool((space.low == 0).all() and (space.high == 255).all())
    )


def encode_observation(space: spaces.Space, observation: Any) -> np.ndarray:
    """Observations with any leading shape -> float32 features ``[..., feature_size(space)]``.

    Raises:
        ValueError: A value that the space does not have, where it would be one-hot encoded.
    """
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = [encode_observation(child, observation[name]) for name, child in _children(space).items()]
        return np.concatenate(parts, axis=-1)
    x = np.asarray(observation)
    if isinstance(space, spaces.Discrete):
        return _one_hot(x.astype(np.int64) - int(space.start), int(space.n), space)
    leading = x.shape[: x.ndim - len(space.shape)]
    if isinstance(space, spaces.MultiDiscrete):
        places = (x.astype(np.int64) - space.start.astype(np.int64)).reshape(*leading, -1)
        hot = [_one_hot(places[..., i], int(n), space) for i, n in enumerate(space.nvec.flat)]
        return np.concatenate(hot, axis=-1)
    if isinstance(space, spaces.Box) and (width := _one_hot_width(space)):
        hot = _one_hot(x.astype(np.int64) - int(space.low.min()), width, space)
        return hot.reshape(*leading, -1)
    scale = 255.0 if is_image(space) else 1.0
    return (x.astype(np.float32) / np.float32(scale)).reshape(*leading, -1)


def check_finite(features: np.ndarray, observation: Any) -> None:
    """Raise a ValueError for features ``[N, F]`` that hold NaN or infinity, naming the slot and the part.

    A network would answer NaN to them, and one such step would spoil its weights for good.
    """
    # The sum is the quick look: it is finite wherever all are, but for numbers near the end of float32.
    if math.isfinite(float(features.sum())) or np.isfinite(features).all():
        return
    slot = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
    for name, array in named_arrays(observation).items():
        part = np.asarray(array)[slot]
        if part.dtype.kind == "f" and not np.isfinite(part.astype(np.float32)).all():
            where = f"slot {slot}" + (f", {name!r}" if name else "")
            raise ValueError(
                f"the environment's observation in {where} holds NaN or infinity: {part!r}; a policy cannot act on "
                "it. Mend the env, or replace such values in a wrapper (gymnasium.wrappers.TransformObservation)"
            )


def _children(space: spaces.Dict | spaces.Tuple) -> dict[Any, spaces.Space]:
    return dict(space.spaces) if isinstance(space, spaces.Dict) else dict(enumerate(space.spaces))


def _one_hot_width(space: spaces.Box) -> int:
    """Number of values of a narrow integer box; 0 for any other box."""
    if space.dtype.kind not in "iu" or is_image(space):
        return 0
    width = int(space.high.max()) - int(space.low.min()) + 1
    return width if width <= _ONE_HOT_LIMIT else 0


def _one_hot(places: np.ndarray, width: int, space: spaces.Space) -> np.ndarray:
    if places.size and (places.min() < 0 or places.max() >= width):
        raise ValueError(
            f"the environment gave an observation outside its observation space {space}: "
            f"place {places.min() if places.min() < 0 else places.max()} of 0 to {width - 1}"
        )
    hot = np.zeros((*places.shape, width), dtype=np.float32)
    np.put_along_axis(hot, places[..., None], 1.0, axis=-1)
    return hot
