"""The exact state of any environment, as arrays and JSON, for checkpoints that resume bitwise.

Environments of this project say their own state (``get_state``). For any other, the numbers, arrays and random
generators that it and its wrappers hold as attributes are taken: enough for Gymnasium's classic control and
toy text, not for simulators that keep their state elsewhere (those start a new episode on resume).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from textrl_env.errors import check_choice
from textrl_env.protocols import Stateful

#: Attributes that lead to another environment, not to state.
_LINKS = ("env", "envs")
#: Attributes that are derived or immutable.
_SKIP = ("metadata", "spec", "_cached_spec", "render_mode", "num_envs")


def capture(env: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The state of an environment or vector env.

    Returns:
        A JSON-able tree, and the arrays that it refers to by name.
    """
    arrays: dict[str, np.ndarray] = {}
    return {path: _encode_object(part, path, arrays) for path, part in _walk(env, "env")}, arrays


def restore(env: Any, tree: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Put an environment into the state that :func:`capture` took.

    Raises:
        ValueError: The environment is built of other parts than the captured one.
    """
    parts = dict(_walk(env, "env"))
    if parts.keys() != tree.keys():
        raise ValueError(
            f"the checkpoint holds the state of {sorted(tree)}, but this environment has {sorted(parts)}; "
            "resume with the same env, number of envs and wrappers"
        )
    for path, part in parts.items():
        if "state" in tree[path]:
            part.set_state({name: arrays[key] for name, key in tree[path]["state"].items()})
            continue
        for name, value in tree[path]["attributes"].items():
            decoded = _decode(value, arrays)
            if isinstance(decoded, np.random.Generator) and isinstance(vars(part).get(name), type(decoded)):
                vars(part)[name].bit_generator.state = decoded.bit_generator.state
            else:
                setattr(part, name, decoded)


def _walk(env: Any, path: str) -> list[tuple[str, Any]]:
    """The environment and everything it wraps, with a path for each."""
    found = [(path, env)]
    if isinstance(env, Stateful):
        return found
    inner = vars(env).get("env")
    if inner is not None:
        found += _walk(inner, f"{path}.env")
    for i, each in enumerate(vars(env).get("envs") or []):
        found += _walk(each, f"{path}.envs[{i}]")
    return found


def _encode_object(part: Any, path: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    if isinstance(part, Stateful):
        names = {}
        for name, array in part.get_state().items():
            arrays[f"{path}:{name}"] = array
            names[name] = f"{path}:{name}"
        return {"state": names}
    attributes = {}
    for name, value in vars(part).items():
        if name in _LINKS or name in _SKIP or callable(value):
            continue
        encoded = _encode(value, f"{path}.{name}", arrays)
        if encoded is not None:
            attributes[name] = encoded
    return {"attributes": attributes}


def _encode(value: Any, key: str, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """A tagged JSON value, or None for something that is not state."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, np.random.Generator):
        return {"generator": value.bit_generator.state}
    if isinstance(value, (np.ndarray, np.generic)) and np.asarray(value).dtype.kind in "biuf":
        arrays[key] = np.array(value)
        return {"array": key, "scalar": isinstance(value, np.generic)}
    if isinstance(value, (list, tuple, deque)):
        items = [_encode(item, f"{key}[{i}]", arrays) for i, item in enumerate(value)]
        if any(item is None for item in items):
            return None
        kind = "deque" if isinstance(value, deque) else type(value).__name__
        maxlen = value.maxlen if isinstance(value, deque) else None
        return {"items": items, "kind": kind, "maxlen": maxlen} if kind in _SEQUENCES else None
    return None


_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_SEQUENCES = {"list": list, "tuple": tuple, "deque": deque}


def _decode(tagged: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    if "value" in tagged:
        return tagged["value"]
    if "generator" in tagged:
        state = tagged["generator"]
        check_choice("bit_generator", state["bit_generator"], _BIT_GENERATORS)
        generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
        generator.bit_generator.state = state
        return generator
    if "array" in tagged:
        array = arrays[tagged["array"]]
        return array[()] if tagged["scalar"] else array.copy()
    items = [_decode(item, arrays) for item in tagged["items"]]
    if tagged["kind"] == "deque":
        return deque(items, maxlen=tagged["maxlen"])
    return _SEQUENCES[tagged["kind"]](items)
