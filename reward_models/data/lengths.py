"""What becomes of sequences that a model cannot hold: one rule for every trainer, and a count of what it did.

``"cut"`` takes tokens off the beginning of the prompt, as the environments and reward models do in use; of a sequence
whose completion alone is too long, the end goes too, its end token with it. ``"skip"`` leaves the record out. Either
way the number is warned of and is part of what the trainer returns. ``"error"`` refuses the data.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from reward_models.names import did_you_mean

TOO_LONG = ("cut", "skip", "error")


class DataWarning(UserWarning):
    """Records were left out or cut."""


def context_length(config: Any, tokenizer: Any) -> int | None:
    """The most tokens that model and tokenizer name as their limit, or None where neither names one."""
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    limits = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]
    return min(limits, default=None)


@dataclass
class Lengths:
    """The limit that sequences have to fit, and how many did not.

    Attributes:
        limit: In tokens; None is no limit.
        too_long: "cut", "skip" or "error".
        cut: Records that lost tokens.
        skipped: Records that were left out for their length.
        empty: Records that were left out because nothing in them can be learned from.
        bad_rows: Rows that were left out because they could not be read.
    """

    limit: int | None
    too_long: str = "cut"
    cut: int = 0
    skipped: int = 0
    empty: int = 0
    bad_rows: int = 0

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise ValueError(
                f"too_long={self.too_long!r} is not known. {did_you_mean(self.too_long, TOO_LONG)}"
            )

    @classmethod
    def of(cls, max_length: int | None, config: Any, tokenizer: Any, too_long: str = "cut") -> Lengths:
        """The limit that was asked for, or without one what the model holds.

        Raises:
            ValueError: More was asked for than the model holds, or less than two tokens.
        """
        holds = context_length(config, tokenizer)
        if max_length is not None and max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (a token to read and one to learn), got {max_length}"
            )
        if max_length is not None and holds is not None and max_length > holds:
            raise ValueError(
                f"max_length={max_length} is more than the {holds} tokens that the model (max_position_embeddings) "
                "and its tokenizer (model_max_length) hold"
            )
        return cls(holds if max_length is None else max_length, too_long)

    def off_prompt(self, prompt: int, longest: int) -> int | None:
        """How many tokens to take off the beginning of a record's prompt, counting the record if it is too long.

        Args:
            prompt: Tokens of the prompt; one of them stays.
            longest: Tokens of the record's longest sequence, the prompt included.

        Returns:
            None if the record has to be left out.

        Raises:
            ValueError: It is too long, and ``too_long`` is "error".
        """
        if self.limit is None or longest <= self.limit:
            return 0
        if self.too_long == "error":
            raise ValueError(
                f"a record of {longest:,} tokens is longer than {self.limit:,}; too_long='cut' shortens such records, "
                "'skip' leaves them out, max_length sets the limit"
            )
        if self.too_long == "skip":
            self.skipped += 1
            return None
        self.cut += 1
        return min(longest - self.limit, max(prompt - 1, 0))

    @property
    def left_out(self) -> int:
        """Records left out, for whatever reason."""
        return self.skipped + self.empty + self.bad_rows

    def warn(self, records: int) -> None:
        """Warn of what was cut or left out, if anything was.

        Args:
            records: All records that could be read, those left out included.
        """
        beyond = f"of {records:,} records are longer than {self.limit:,} tokens" if self.limit else ""
        if self.bad_rows:
            warnings.warn(f"{self.bad_rows:,} bad rows were left out", DataWarning, stacklevel=3)
        if self.cut:
            warnings.warn(
                f"{self.cut:,} {beyond} and were cut (too_long='skip' leaves them out, max_length sets the limit)",
                DataWarning,
                stacklevel=3,
            )
        if self.empty:
            warnings.warn(
                f"{self.empty:,} of {records:,} records hold no token to learn from and were left out",
                DataWarning,
                stacklevel=3,
            )
        if self.skipped:
            warnings.warn(
                f"{self.skipped:,} {beyond} and were left out (too_long='cut' shortens them, max_length sets the "
                "limit)",
                DataWarning,
                stacklevel=3,
            )
