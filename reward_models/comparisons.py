"""Comparisons as data: what raters chose, as token ids, and in batches of whole prompts.

Records are ``{"prompt", "chosen", "rejected"}`` with the optional ``"margin"`` (a number), ``"chosen_ended"`` and
``"rejected_ended"`` (False for a completion that was cut off at its budget). Left out: ties and ordinal labels.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from reward_models.data.lengths import Lengths
from reward_models.data.records import load_records


class Comparison(NamedTuple):
    """One rater's choice between two completions of a prompt.

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


def read_comparisons(pairs: Any, skip_bad_rows: bool = False) -> tuple[list[Comparison], list[str]]:
    """Comparisons, and what was wrong with the rows that were left out.

    Args:
        pairs: Any source of :mod:`reward_models.data.rows`.
        skip_bad_rows: Leave bad rows out instead of stopping at the first.

    Raises:
        ValueError: For a record without the texts ``prompt``, ``chosen`` and ``rejected``, naming its place.
    """
    texts = ("prompt", "chosen", "rejected")
    records = load_records(
        pairs, texts, ("margin", "chosen_ended", "rejected_ended"), skip_bad_rows=skip_bad_rows, name="pairs"
    )
    found = []
    for number, record in enumerate(records.rows(), 1):
        laid_out = [name for name in texts if not isinstance(record[name], str)]
        if laid_out:
            raise ValueError(
                f"comparison {number} has message lists in {', '.join(laid_out)}, expected texts; "
                "textrl reward lays them out with the model's chat template"
            )
        found.append(
            Comparison(
                *(record[name] for name in texts),
                margin=record.get("margin") or 0.0,
                chosen_ended=record.get("chosen_ended") is not False,
                rejected_ended=record.get("rejected_ended") is not False,
            )
        )
    return found, records.skipped


def sides_of(comparisons: Iterable[Comparison]) -> Iterator[tuple[str, str, bool]]:
    """(prompt, completion, ended) of both sides of each comparison, chosen first."""
    return (side for comparison in comparisons for side in comparison.sides())


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, ended: bool = True) -> list[int]:
    """Token ids of ``prompt + completion``, each tokenized on its own, and the end token where it ``ended``."""
    ids = list(tokenizer(prompt)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    ids += tokenizer(completion, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if ended else ids


def encode_sides(
    comparisons: Sequence[Comparison], tokenizer: PreTrainedTokenizerBase, lengths: Lengths
) -> tuple[list[Comparison], dict[tuple[str, str, bool], list[int]]]:
    """The comparisons to learn from, and both sides of each as token ids; a side in several of them is encoded once.

    What is too long loses its beginning, as it does when the model scores it.
    """
    encoded: dict[tuple[str, str, bool], list[int]] = {}
    kept = []
    for comparison in comparisons:
        sides = comparison.sides()
        ids = [encoded[side] if side in encoded else encode(tokenizer, *side) for side in sides]
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
