"""Comparisons as data: what raters chose, as token ids, and in batches of whole prompts.

Records are ``{"prompt", "chosen", "rejected"}``, texts or messages, the prompt left out where both sides begin with it,
with the optional ``"margin"`` (a number), ``"chosen_ended"`` and ``"rejected_ended"`` (False for a completion that was
cut off at its budget). Left out: ties and ordinal labels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from reward_models.data.encoding import TEMPLATE_COLUMNS, TextEncoder
from reward_models.data.lengths import Lengths
from reward_models.data.records import RecordSet, load_records, with_prompts

_SIDES = ("prompt", "chosen", "rejected")


class FrozenMessages(str):
    """Messages, with the columns that their chat template reads, as JSON, so that they can be a key."""

    @classmethod
    def of(cls, value: Any, row: Mapping[str, Any] | None = None) -> str:
        """A text as it is, messages frozen."""
        if isinstance(value, str):
            return value
        settings = {name: row[name] for name in TEMPLATE_COLUMNS if (row or {}).get(name) is not None}
        return cls(json.dumps({"messages": list(value)} | settings, ensure_ascii=False, sort_keys=True))


class Comparison(NamedTuple):
    """One rater's choice between two completions of a prompt, each a text or :class:`FrozenMessages`.

    ``*_ended`` is False for a completion that was cut off at its budget: no end token follows it.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0
    chosen_ended: bool = True
    rejected_ended: bool = True

    def sides(self) -> tuple[tuple[str, str, bool], tuple[str, str, bool]]:
        """(prompt, completion, ended) of the chosen and of the rejected completion."""
        return (self.prompt, self.chosen, self.chosen_ended), (
            self.prompt,
            self.rejected,
            self.rejected_ended,
        )


def load_comparisons(pairs: Any) -> list[Comparison]:
    """Comparisons from any source of :mod:`reward_models.data.rows`; see :func:`read_comparisons`."""
    return read_comparisons(pairs)[0]


def comparison_records(pairs: Any, skip_bad_rows: bool = False, name: str = "data") -> RecordSet:
    """The rows of comparisons as they are, texts or messages, each with its prompt.

    Args:
        pairs: Any source of :mod:`reward_models.data.rows`.
        skip_bad_rows: Leave bad rows out instead of stopping at the first.
        name: What errors call a source that is no file.
    """
    optional = ("margin", "chosen_ended", "rejected_ended")
    forms = (_SIDES, _SIDES[1:])
    records = load_records(pairs, optional=optional, skip_bad_rows=skip_bad_rows, name=name, forms=forms)
    return with_prompts(records, skip_bad_rows)


def read_comparisons(pairs: Any, skip_bad_rows: bool = False) -> tuple[list[Comparison], list[str]]:
    """Comparisons, and what was wrong with the rows that were left out.

    Args:
        pairs: Any source of :mod:`reward_models.data.rows`.
        skip_bad_rows: Leave bad rows out instead of stopping at the first.

    Raises:
        ValueError: For a record without ``chosen`` and ``rejected``, or without a ``prompt`` where the two have no
            beginning in common, naming its place.
    """
    records = comparison_records(pairs, skip_bad_rows, name="pairs")
    found = []
    for record in records.rows():
        found.append(
            Comparison(
                *(FrozenMessages.of(record[name], record if name == "prompt" else None) for name in _SIDES),
                margin=record.get("margin") or 0.0,
                chosen_ended=record.get("chosen_ended") is not False,
                rejected_ended=record.get("rejected_ended") is not False,
            )
        )
    return found, records.skipped


def sides_of(comparisons: Iterable[Comparison]) -> Iterator[tuple[str, str, bool]]:
    """(prompt, completion, ended) of both sides of each comparison, chosen first."""
    return (side for comparison in comparisons for side in comparison.sides())


def encode_answer(
    tokenizer: PreTrainedTokenizerBase | TextEncoder, prompt: Any, completion: Any, ended: bool = True
) -> list[int]:
    """Token ids that a reward model reads; see :meth:`~reward_models.data.encoding.TextEncoder.whole`."""
    row = json.loads(prompt) if isinstance(prompt, FrozenMessages) else {}
    prompt = row.get("messages", prompt)
    completion = json.loads(completion)["messages"] if isinstance(completion, FrozenMessages) else completion
    return TextEncoder.of(tokenizer).whole(prompt, completion, ended, row)


def encode_sides(
    comparisons: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase | TextEncoder, lengths: Lengths
) -> tuple[list[Comparison], dict[tuple[str, str, bool], list[int]]]:
    """The comparisons to learn from, and both sides of each as token ids; a side in several of them is encoded once.

    What is too long loses its beginning, as it does when the model scores it.
    """
    encoder = TextEncoder.of(tokenizer)
    encoded: dict[tuple[str, str, bool], list[int]] = {}
    kept = []
    for comparison in comparisons:
        sides = comparison.sides()
        ids = [encoded[side] if side in encoded else encode_answer(encoder, *side) for side in sides]
        if lengths.off_prompt(0, max(map(len, ids))) is None:
            continue
        kept.append(comparison)
        encoded |= dict(zip(sides, ids, strict=True))
    if not kept:
        raise ValueError(
            f"all {len(comparisons)} comparisons are longer than max_length={lengths.limit} tokens and were left out"
        )
    if lengths.limit is not None:
        encoded = {side: ids[-lengths.limit :] for side, ids in encoded.items()}
    return kept, encoded


def prompt_batches(
    comparisons: Sequence[Comparison], batch_size: int, rng: random.Random
) -> Iterator[list[Comparison]]:
    """One epoch of batches, prompts in random order until ``batch_size`` is reached.

    All comparisons of a prompt share a batch, but for a prompt that has more than ``batch_size`` of them: those are
    shuffled and spread over batches of their own. A batch holds fewer than twice ``batch_size`` comparisons.
    """
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.prompt, []).append(comparison)
    chunks = []
    for group in groups.values():
        if len(group) > batch_size:
            group = rng.sample(group, len(group))
        chunks += [group[start : start + batch_size] for start in range(0, len(group), batch_size)]
    rng.shuffle(chunks)
    batch: list[Comparison] = []
    for chunk in chunks:
        batch += chunk
        if len(batch) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
