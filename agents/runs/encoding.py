"""Constructor arguments and spaces as JSON, as checkpoints and policy files write them.

Functions and classes go by their names, and what a file names is imported only as :mod:`reward_models.trust` allows.
A schedule that has no name to be found by, a lambda for example, is written as a table of its values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common import torch_layers
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from agents.algorithms.schedules import TabulatedSchedule
from agents.runs.names import import_name, resolve_function

UNNAMED = object()


class Unread(dict):
    """Encoded arguments that loading had no use for; they are saved again as they were."""


def encode_argument(value: Any) -> Any:
    """A constructor argument as JSON; functions by name; ``UNNAMED`` where it cannot be."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Unread):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        items = [encode_argument(item) for item in value]
        return UNNAMED if any(item is UNNAMED for item in items) else items
    if isinstance(value, dict):
        items = {str(key): encode_argument(item) for key, item in value.items()}
        return UNNAMED if any(item is UNNAMED for item in items.values()) else items
    if (name := _part_name(value)) is not None:
        return {"__part__": name}
    if (schedule := _encode_schedule(value)) is not None:
        return {"__schedule__": schedule}
    if callable(value) and "<" not in getattr(value, "__qualname__", "<"):
        return {"__function__": import_name(value)}
    return UNNAMED


def decode_argument(value: Any) -> Any:
    """The inverse of :func:`encode_argument`."""
    if isinstance(value, dict):
        if "__part__" in value:
            return _part(value["__part__"])
        if "__schedule__" in value:
            return _decode_schedule(value["__schedule__"])
        if "__function__" in value:
            return resolve_function(value["__function__"])
        return {key: decode_argument(item) for key, item in value.items()}
    return [decode_argument(item) for item in value] if isinstance(value, list) else value


#: stable-baselines3's schedules by name, with the numbers that make them.
_SCHEDULES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ConstantSchedule": (ConstantSchedule, ("val",)),
    "LinearSchedule": (LinearSchedule, ("start", "end", "end_fraction")),
}


def tabulated(schedule: Any) -> Any:
    """A function of the remaining progress as what :func:`encode_argument` can write: itself, or a table of it."""
    return TabulatedSchedule.of(schedule) if encode_argument(schedule) is UNNAMED else schedule


def _encode_schedule(value: Any) -> dict[str, Any] | None:
    """A schedule that numbers describe as JSON, or None for anything else."""
    if isinstance(value, FloatSchedule):  # a wrapper, which an agent puts on again
        inner = encode_argument(value.value_schedule)
        return None if inner is UNNAMED else {"FloatSchedule": inner}
    if isinstance(value, TabulatedSchedule):
        return {"table": value.values.tolist(), "name": value.__name__}
    for name, (cls, arguments) in _SCHEDULES.items():
        if type(value) is cls:
            return {name: [float(getattr(value, argument)) for argument in arguments]}
    return None


def _decode_schedule(value: Any) -> Any:
    """The inverse of :func:`_encode_schedule`."""
    name = next(iter(value), None) if isinstance(value, dict) else None
    if name == "FloatSchedule":
        return FloatSchedule(decode_argument(value[name]))
    if name == "table":
        return TabulatedSchedule([float(each) for each in value["table"]], str(value.get("name", "")))
    if name not in _SCHEDULES:
        raise ValueError(
            f"a checkpoint names the schedule {value!r}; expected one of {['FloatSchedule', 'table', *_SCHEDULES]}"
        )
    return _SCHEDULES[name][0](*(float(each) for each in value[name]))


#: Classes of libraries that build a network and do nothing else; a checkpoint may name these without being trusted.
_PARTS: dict[str, tuple[Any, type]] = {
    "torch.nn": (torch.nn, torch.nn.Module),
    "torch.optim": (torch.optim, torch.optim.Optimizer),
    "stable_baselines3": (torch_layers, torch_layers.BaseFeaturesExtractor),
}


def _part_name(value: Any) -> list[str] | None:
    """The library and the name of one of :data:`_PARTS`, or None for anything else."""
    if not isinstance(value, type):
        return None
    for library, (module, base) in _PARTS.items():
        if issubclass(value, base) and getattr(module, value.__name__, None) is value:
            return [library, value.__name__]
    return None


def _part(name: Any) -> type:
    """The inverse of :func:`_part_name`."""
    library, attribute = name if isinstance(name, list) and len(name) == 2 else (None, None)
    module, base = _PARTS.get(library, (None, type(None)))
    found = getattr(module, str(attribute), None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"a checkpoint names {name!r} as a part of a network; expected a class of {list(_PARTS)}"
        )
    return found


_SPACES = ("Dict", "Tuple", "Discrete", "MultiDiscrete", "MultiBinary", "Box")


def encode_space(space: gym.Space) -> dict[str, Any]:
    """A Gymnasium space as JSON."""
    spaces = gym.spaces
    if isinstance(space, spaces.Dict):
        return {"Dict": {name: encode_space(child) for name, child in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"Tuple": [encode_space(child) for child in space.spaces]}
    if isinstance(space, spaces.Discrete):
        own = {"n": int(space.n), "start": int(space.start)}
        return {"Discrete": own if space.dtype == np.int64 else own | {"dtype": space.dtype.name}}
    if isinstance(space, spaces.MultiDiscrete):
        own = {"nvec": space.nvec.tolist(), "dtype": space.dtype.name}
        return {"MultiDiscrete": own | ({"start": space.start.tolist()} if space.start.any() else {})}
    if isinstance(space, spaces.MultiBinary):
        n = space.n
        return {"MultiBinary": {"n": int(n) if isinstance(n, (int, np.integer)) else [int(k) for k in n]}}
    if isinstance(space, spaces.Box):
        bounds = {"low": space.low.tolist(), "high": space.high.tolist()}
        if (
            space.low.size
            and (space.low == space.low.flat[0]).all()
            and (space.high == space.high.flat[0]).all()
        ):
            bounds = {"low": space.low.flat[0].item(), "high": space.high.flat[0].item()}
        return {"Box": bounds | {"shape": list(space.shape), "dtype": space.dtype.name}}
    raise ValueError(f"cannot write the space {space} to a checkpoint")


def decode_space(document: dict[str, Any]) -> gym.Space:
    """The inverse of :func:`encode_space`."""
    (kind, value), *_ = document.items()
    if kind not in _SPACES:
        raise ValueError(f"a checkpoint names the space {kind!r}; expected one of {sorted(_SPACES)}")
    if kind == "Dict":
        return gym.spaces.Dict({name: decode_space(child) for name, child in value.items()})
    if kind == "Tuple":
        return gym.spaces.Tuple([decode_space(child) for child in value])
    if kind == "Box":
        dtype = np.dtype(value["dtype"])
        low, high = (np.asarray(value[name], dtype=dtype) for name in ("low", "high"))
        shape = tuple(value["shape"])
        return gym.spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=dtype.type)
    return getattr(gym.spaces, kind)(**value)
