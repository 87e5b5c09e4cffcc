"""What callbacks remember, so that a resumed run goes on with it.

A callback that has ``get_state()``, which returns JSON, and ``set_state(state)`` is part of every checkpoint, as a
reward with these two methods is. Left out: callbacks of stable-baselines3 itself, which have neither.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from reward_models.warning import warn


def states_of(callback: BaseCallback | None) -> list[list[Any]]:
    """The state of each callback that has one, as ``[name of the class, state]``.

    Raises:
        TypeError: A state is no JSON.
    """
    found = []
    for each in _stateful(callback):
        name, state = type(each).__name__, each.get_state()
        try:
            json.dumps(state)
        except TypeError as error:
            raise TypeError(f"get_state() of the callback {name} is no JSON: {error}") from None
        found.append([name, state])
    return found


def give_states(callback: BaseCallback, states: Any) -> None:
    """Let callbacks go on from what :func:`states_of` returned, by the name of their class and in their order.

    A callback that was not there begins anew; one whose state does not fit says so and begins anew.
    """
    waiting: defaultdict[str, list[Any]] = defaultdict(list)
    for name, state in states if _is_list_of_pairs(states) else []:
        waiting[name].append(state)
    for each in _stateful(callback):
        name = type(each).__name__
        if not waiting[name]:
            continue
        try:
            each.set_state(waiting[name].pop(0))
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            warn(
                f"the saved state of the callback {name} does not fit, it starts anew: {type(error).__name__}: {error}"
            )


def _is_list_of_pairs(states: Any) -> bool:
    pairs = isinstance(states, list) and all(isinstance(s, list) and len(s) == 2 for s in states)
    return pairs and all(isinstance(name, str) for name, _ in states)


def _stateful(callback: BaseCallback | None) -> Iterator[Any]:
    if isinstance(callback, CallbackList):
        for each in callback.callbacks:
            yield from _stateful(each)
    elif hasattr(callback, "get_state") and hasattr(callback, "set_state"):
        yield callback
