"""Texts that end a turn, found in tokens while these are written."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np


class StopStrings:
    """Texts that end what the policy writes as soon as it holds one of them.

    Args:
        tokenizer: Of transformers.
        texts: One or several.

    Raises:
        ValueError: One of them is empty.
    """

    def __init__(self, tokenizer: Any, texts: str | Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.texts = (texts,) if isinstance(texts, str) else tuple(texts)
        if not self.texts or any(not isinstance(text, str) or not text for text in self.texts):
            raise ValueError(f"stop must be a text or several, none of them empty, got {texts!r}")

    def end(self, tokens: np.ndarray) -> bool:
        """Whether the text of the tokens holds one of the texts, the last token having completed it."""
        return bool(self._may_complete[tokens[-1]]) and self._holds_one(tokens)

    def first_end(self, tokens: np.ndarray) -> int | None:
        """How many tokens there are until one of the texts is complete; None if none ever is."""
        return next((n for n in range(1, len(tokens) + 1) if self.end(tokens[:n])), None)

    def _holds_one(self, tokens: np.ndarray) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return any(stop in text for stop in self.texts)

    @functools.cached_property
    def _may_complete(self) -> np.ndarray:
        """bool ``[V]``: tokens that hold the last character of one of the texts, or bytes that may belong to it."""
        last = {text[-1] for text in self.texts}
        size = max(self.tokenizer.get_vocab().values()) + 1
        decoded = self.tokenizer.batch_decode([[i] for i in range(size)], skip_special_tokens=False)
        # Where words are joined with spaces, any token but the first brings one along.
        joins = any(character.isspace() for character in last)
        return np.array([joins or "\N{REPLACEMENT CHARACTER}" in t or bool(last & set(t)) for t in decoded])
