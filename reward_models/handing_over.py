"""What a reward is handed: copies of its own; and which row it was at when it failed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from reward_models.names import shorten

_IMMUTABLE = (str, bytes, int, float, complex, bool, type(None))


def own_copy(value: Any) -> Any:
    """A copy that may be changed without anybody noticing: lists, dicts, sets and arrays at any depth.

    What cannot be copied (a lock, an open file) is handed over as it is.
    """
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list:
        return [each if type(each) in _IMMUTABLE else own_copy(each) for each in value]
    if kind is tuple:
        return tuple(own_copy(each) for each in value)
    if kind is dict:
        return {key: own_copy(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return value.copy()
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def failed_row(error: BaseException, prompts: Sequence[Any], completions: Sequence[Any]) -> int | None:
    """The row that the failed code was at, where its variables show it.

    Args:
        error: Raised while scoring.
        prompts: As they were handed over.
        completions: As they were handed over.
    """
    row, trace = None, error.__traceback__
    while trace is not None:
        held = {id(value) for value in trace.tb_frame.f_locals.values()}
        rows = [i for i, completion in enumerate(completions) if id(completion) in held]
        rows = [i for i in rows if id(prompts[i]) in held] or rows
        row = rows[0] if len(rows) == 1 else row
        trace = trace.tb_next
    return row


def messages_hint(error: BaseException, completions: Sequence[Any]) -> str:
    """What a function for texts has to know that fails at messages; empty for other failures."""
    conversations = any(isinstance(each, list) for each in completions)
    if not conversations or not isinstance(error, TypeError | AttributeError):
        return ""
    return (
        "completions are lists of messages because the prompts are conversations, as in TRL: the text of one is "
        'completion[0]["content"]'
    )


def describe_failure(error: BaseException, prompts: Sequence[Any], completions: Sequence[Any]) -> str:
    """Which completion was being scored, for an error: the row at fault, or how many there were and the first."""
    row = 0 if len(completions) == 1 else failed_row(error, prompts, completions)
    shown = f"completion {shorten(completions[row or 0])} to the prompt {shorten(prompts[row or 0])}"
    if row is None:
        return f"{len(completions)} completions, the first of them the {shown}"
    return f"the {shown}" + (f" (row {row} of {len(completions)})" if len(completions) > 1 else "")
