"""Preference records as token ids: pairs for DPO, single judged completions for KTO.

A prompt is tokenized on its own, a completion on its own, and the end token is put behind it; nothing is ever
re-tokenized jointly. What records look like is told in :mod:`agents.offline.dpo`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from agents.offline.sft import IGNORE, Example, cut_example, labelled, tokens_before_loss
from reward_models.data.encoding import TextEncoder
from reward_models.data.lengths import Lengths
from reward_models.data.records import load_records, with_prompts


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
    tokenizer: PreTrainedTokenizerBase | TextEncoder,
    paired: bool = True,
    lengths: Lengths | None = None,
    skip_bad_rows: bool = False,
    seed: int = 0,
) -> tuple[list[Item], int]:
    """Records as token ids.

    Args:
        data: Records, or a file of them.
        tokenizer: The model's, or an encoder with settings of its own.
        paired: Whether to make pairs, or single judged completions (KTO).
        lengths: What to do with what is too long, and the count of it; None is no limit.
        skip_bad_rows: Leave bad rows out instead of raising.
        seed: Of which completions are put to which prompts (KTO).

    Returns:
        The items, and how many rows were left out.
    """
    lengths = Lengths(None) if lengths is None else lengths
    pairs, judged = (
        (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
        ("prompt", "completion", "label"),
    )
    forms = pairs if paired else (judged, *pairs)
    records = load_records(data, optional=_ENDED, skip_bad_rows=skip_bad_rows, forms=forms)
    records = with_prompts(records, skip_bad_rows)
    encoder = TextEncoder.of(tokenizer)
    encoded = [
        [
            (encode_completion(*side, encoder, record), label)
            for *side, label in _sides(record, paired or not _is_judged(record))
        ]
        for record in records.rows()
    ]
    fits = [fitted for row in encoded if (fitted := _fit(row, lengths)) is not None]
    if not fits:
        raise ValueError(
            f"none of the {len(encoded)} records can be learned from: {lengths.skipped} are longer than "
            f"max_length={lengths.limit} tokens, {lengths.empty} have no completion"
        )
    lengths.bad_rows += len(records.skipped)
    lengths.warn(len(encoded))
    skipped = lengths.left_out
    if paired:
        return [Item(chosen, rejected) for (chosen, _), (rejected, _) in fits], skipped
    return _with_mismatches([side for row in fits for side in row], lengths.limit, seed), skipped


#: Whether completions ended by themselves, or were cut off at a budget.
_ENDED = ("ended", "chosen_ended", "rejected_ended")


def _is_judged(record: Mapping[str, Any]) -> bool:
    """Whether a record is a single judged completion; a pair may have empty cells of that kind beside it."""
    return record.get("completion") is not None and record.get("label") is not None


def _fit(row: list[tuple[Example, bool]], lengths: Lengths) -> list[tuple[Example, bool]] | None:
    """The completions of a record within the model's length, their common prompt cut alike; None if left out."""
    if not all(completion_length(example) for example, _ in row):
        lengths.empty += 1
        return None
    prompt = min(tokens_before_loss(example) for example, _ in row)
    off = lengths.off_prompt(prompt, max(len(example.input_ids) for example, _ in row))
    return (
        None if off is None else [(cut_example(example, off, lengths.limit), label) for example, label in row]
    )


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
    tokenizer: PreTrainedTokenizerBase | TextEncoder,
    row: Mapping[str, Any] | None = None,
) -> Example:
    """Prompt and completion as :meth:`~reward_models.data.encoding.TextEncoder.answer` has them; loss on the latter."""
    return labelled(TextEncoder.of(tokenizer).answer(prompt, completion, ended, row))


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
        other = Example([*prompt, *completion], [IGNORE] * len(prompt) + completion)
        if max_length is not None:
            other = cut_example(
                other, max(0, min(len(other.input_ids) - max_length, len(prompt) - 1)), max_length
            )
        items[i] = items[i]._replace(second=other)
    return items


def _split(example: Example) -> tuple[list[int], list[int]]:
    """Prompt and completion of an example."""
    start = next(k for k, label in enumerate(example.labels) if label != IGNORE)
    return example.input_ids[:start], example.input_ids[start:]
