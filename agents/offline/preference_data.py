"""Preference records as token ids: pairs for DPO, single judged completions for KTO.

A prompt is tokenized on its own, a completion on its own, and the end token is put behind it; nothing is ever
re-tokenized jointly. What records look like is told in :mod:`agents.offline.dpo`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from agents.offline.sft import IGNORE, Example, encode, encode_prompt
from textrl_env.data.prompts import load_records


class Item(NamedTuple):
    """What one loss is made of.

    A pair: the chosen completion and the rejected one. For KTO: a completion, the same prompt with some other
    prompt's completion (for the baseline), and whether the completion is desirable.
    """

    first: Example
    second: Example
    label: bool = True


def completion_length(example: Example) -> int:
    """Labelled tokens, the end token included."""
    return sum(label != IGNORE for label in example.labels[1:])


def load_preferences(
    data: Any,
    tokenizer: PreTrainedTokenizerBase,
    paired: bool = True,
    max_length: int | None = None,
    skip_bad_rows: bool = False,
    seed: int = 0,
) -> tuple[list[Item], int]:
    """Records as token ids.

    Args:
        data: Records, or a file of them.
        tokenizer: The model's.
        paired: Whether to make pairs, or single judged completions (KTO).
        max_length: Sequences are cut here; what has no completion left is dropped.
        skip_bad_rows: Leave bad rows out instead of raising.
        seed: Of which completions are put to which prompts (KTO).

    Returns:
        The items, and how many rows were left out.
    """
    data = list(data) if isinstance(data, Iterator) else data
    as_pairs = paired or _has_pairs(data)
    needed = ("prompt", "chosen", "rejected") if as_pairs else ("prompt", "completion", "label")
    records = load_records(data, needed, skip_bad_rows=skip_bad_rows)
    rows = [_sides(row, as_pairs) for row in records.rows()]
    encoded = [
        [(encode_completion(*side, tokenizer, max_length), label) for *side, label in row] for row in rows
    ]
    fits = [row for row in encoded if all(completion_length(example) for example, _ in row)]
    if not fits:
        raise ValueError(
            f"none of the {len(rows)} records has a completion within max_length={max_length} tokens"
        )
    skipped = len(records.skipped) + len(encoded) - len(fits)
    if paired:
        return [Item(chosen, rejected) for (chosen, _), (rejected, _) in fits], skipped
    judged = [side for row in fits for side in row]
    return _with_mismatches(judged, max_length, seed), skipped


def _has_pairs(data: Any) -> bool:
    """Whether KTO was given comparisons: the first record tells."""
    first = next(load_records(data, skip_bad_rows=True).rows())
    return "chosen" in first and "label" not in first


def _sides(row: dict[str, Any], paired: bool) -> list[tuple[Any, Any, bool, bool]]:
    """``(prompt, completion, ended, label)`` of each completion in a record."""
    if not paired:
        return [(row["prompt"], row["completion"], row.get("ended") is not False, row["label"])]
    return [
        (row["prompt"], row[side], row.get(f"{side}_ended") is not False, side == "chosen")
        for side in ("chosen", "rejected")
    ]


def encode_completion(
    prompt: str | Sequence[dict[str, str]],
    completion: str | Sequence[dict[str, str]],
    ended: bool,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> Example:
    """Prompt tokens, completion tokens and the end token, each tokenized on its own; loss on the last two.

    With messages on either side the chat template lays them out; the last turn is the completion. A list that
    starts with anything but the assistant's turn is the whole conversation, the prompt included.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        example = encode({"prompt": prompt, "completion": completion}, tokenizer)
        if not ended:
            example = Example(example.input_ids[:-1], example.labels[:-1])
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        said = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else list(completion)
        )
        whole = [*messages, *said] if said[0]["role"] == "assistant" else said
        example = encode({"messages": whole}, tokenizer)
        before = len(encode_prompt(whole[:-1], tokenizer))
        example = Example(example.input_ids, [IGNORE] * before + example.labels[before:])
    return Example(example.input_ids[:max_length], example.labels[:max_length])


def _with_mismatches(judged: list[tuple[Example, bool]], max_length: int | None, seed: int) -> list[Item]:
    """Put to each prompt the completion of another prompt, each completion once.

    In an order where equal prompts are neighbours, everything moves on by the size of the largest group: then no
    completion meets its own prompt, unless one prompt has more than half of the records.
    """
    split = [_split(example) for example, _ in judged]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(judged), generator=generator).tolist()
    rank = {prompt: k for k, prompt in enumerate(dict.fromkeys(tuple(split[i][0]) for i in order))}
    order.sort(key=lambda i: rank[tuple(split[i][0])])
    groups = [0] * len(rank)
    for prompt, _ in split:
        groups[rank[tuple(prompt)]] += 1
    items: list[Item] = [Item(example, example, label) for example, label in judged]
    for place, i in enumerate(order):
        prompt, completion = split[i][0], split[order[(place + max(groups)) % len(order)]][1]
        other = Example(
            [*prompt, *completion][:max_length], ([IGNORE] * len(prompt) + completion)[:max_length]
        )
        items[i] = items[i]._replace(second=other)
    return items


def _split(example: Example) -> tuple[list[int], list[int]]:
    """Prompt and completion of an example."""
    start = next(k for k, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:start], example.input_ids[start:]
