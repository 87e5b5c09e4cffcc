"""Comparisons as data: what raters chose, as token ids, and in batches that never split a prompt.

Records are ``{"prompt", "chosen", "rejected"}`` with the optional ``"margin"`` (a number), ``"chosen_ended"`` and
``"rejected_ended"`` (False for a completion that was cut off at its budget). Left out: ties and ordinal labels.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase


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


def load_comparisons(pairs: str | Path | Iterable[dict[str, Any]]) -> list[Comparison]:
    """Comparisons from a ``.jsonl`` file, a list of dicts or a Dataset.

    Raises:
        ValueError: For a record without ``prompt``, ``chosen`` and ``rejected``, naming the record.
    """
    if isinstance(pairs, (str, Path)):
        if not Path(pairs).is_file():
            raise FileNotFoundError(f"pairs={str(pairs)!r}: there is no such file; expected a .jsonl file")
        lines = Path(pairs).read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines if line.strip()]
    found = []
    for number, record in enumerate(pairs, 1):
        missing = [key for key in ("prompt", "chosen", "rejected") if not isinstance(record.get(key), str)]
        if missing:
            raise ValueError(
                f"comparison {number} needs the texts 'prompt', 'chosen' and 'rejected' (and optionally a number "
                f"'margin'); {missing} missing or not text, it has the keys {sorted(record)}"
            )
        found.append(
            Comparison(
                record["prompt"],
                record["chosen"],
                record["rejected"],
                float(record.get("margin") or 0.0),
                bool(record.get("chosen_ended", True)),
                bool(record.get("rejected_ended", True)),
            )
        )
    if not found:
        raise ValueError("there are no comparisons to learn from: pairs is empty")
    return found


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


def prompt_batches(
    comparisons: Sequence[Comparison], batch_size: int, rng: random.Random
) -> Iterator[list[Comparison]]:
    """One epoch of batches that never split a prompt: prompts in random order until ``batch_size`` is reached."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.prompt, []).append(comparison)
    prompts = list(groups)
    rng.shuffle(prompts)
    batch: list[Comparison] = []
    for prompt in prompts:
        batch += groups[prompt]
        if len(batch) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
