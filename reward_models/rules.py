"""Verifiable rewards: checkers instead of a reward model.

Each factory here returns a reward function, to be used alone or in a list:

    load_reward([numeric_answer("answer"), (format_reward(), 0.2), length_penalty(0.01)])

A checker that needs the right answer reads it from a column of the prompts. Where that column is None the
checker does not apply to the row and returns None. Completions are texts; of a message list the last
message counts.

Code is run by :mod:`reward_models.unit_tests`. Left out on purpose: symbolic maths, and judging by another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from reward_models.data.chat import answer_of as text_of
from reward_models.names import did_you_mean

RewardFunction = Callable[..., list[float | None]]

#: A number that no letter, digit or dot stands before; a minus behind a digit is a subtraction.
_NUMBER = re.compile(
    r"""(?<![\w.])
    [-+\u2212]?
    (?: (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
    (?:[eE][-+]?\d+)?
    (?:/\d+)?""",
    re.VERBOSE,
)


def exact_answer(
    column: str = "answer", extract: str | None = None, ignore_case: bool = False
) -> RewardFunction:
    """1 where the completion is the right answer, otherwise 0; white space at the ends does not count.

    Args:
        column: The column that holds the right answers.
        extract: A regular expression that finds the answer in the completion: its last match counts, and of
            that the first group if it has one. None compares the whole completion.
        ignore_case: Compare without regard to case.
    """
    pattern = None if extract is None else _compile(extract, "extract", re.DOTALL)

    def exact_answer(
        prompts: Any, completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        def tidy(text: str) -> str:
            return text.strip().casefold() if ignore_case else text.strip()

        scores: list[float | None] = []
        for completion, right in zip(completions, _column(columns, column, "exact_answer"), strict=True):
            found = _extract(pattern, text_of(completion))
            same = found is not None and right is not None and tidy(found) == tidy(str(right))
            scores.append(None if right is None else float(same))
        return scores

    return exact_answer


def numeric_answer(
    column: str = "answer", extract: str | None = None, tolerance: float = 1e-6
) -> RewardFunction:
    """1 where the last number of the completion is the right one, otherwise 0.

    Understands signs, decimals, thousands separators ("1,234.5"), exponents and fractions ("3/4"). The right
    answer may be a number, or a text of which the last number counts ("... #### 42").

    Args:
        column: The column that holds the right answers.
        extract: A regular expression for the part of the completion to look in, as in :func:`exact_answer`.
        tolerance: How far off a number may be, relative to the larger one, or absolutely near 0.
    """
    pattern = None if extract is None else _compile(extract, "extract", re.DOTALL)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be a number >= 0, got {tolerance!r}")

    def numeric_answer(
        prompts: Any, completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        scores: list[float | None] = []
        for i, right in enumerate(_column(columns, column, "numeric_answer")):
            if right is None:
                scores.append(None)
                continue
            expected = last_number(right)
            if expected is None:
                raise ValueError(
                    f"numeric_answer: the column {column!r} holds no number at index {i}: {right!r}"
                )
            given = last_number(_extract(pattern, text_of(completions[i])))
            close = given is not None and math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance)
            scores.append(float(close))
        return scores

    return numeric_answer


def regex_match(pattern: str, flags: int = 0, full: bool = False) -> RewardFunction:
    """1 where the pattern is found in the completion, otherwise 0.

    Args:
        pattern: A regular expression.
        flags: Flags of :mod:`re`, such as ``re.IGNORECASE``.
        full: Whether the pattern has to match the whole completion.
    """
    compiled = _compile(pattern, "pattern", flags)
    find = compiled.fullmatch if full else compiled.search

    def regex_match(completions: Sequence[Any]) -> list[float]:
        return [float(find(text_of(completion)) is not None) for completion in completions]

    return regex_match


def format_reward(tags: Sequence[str] = ("think", "answer"), opened: bool | None = None) -> RewardFunction:
    """1 where the completion is ``<think>...</think><answer>...</answer>`` and nothing else, otherwise 0.

    Args:
        tags: The tags, each of which has to come exactly once and in this order, with only white space
            between them.
        opened: Whether the prompt has opened the first tag already, as the generation prompt of some chat templates
            does (DeepSeek-R1's, Qwen3.5's). None sees it at the end of a prompt that is a text. Behind messages stands
            a generation prompt that is not seen, so there a completion may open the first tag or go on inside it.
    """
    if isinstance(tags, str) or not tags:
        raise ValueError(f"tags must be a list of at least one tag name, got {tags!r}")
    names = [re.escape(tag) for tag in tags]
    inside = rf"(?:(?!</?(?:{'|'.join(names)})>).)*"
    layout = r"\s*".join(f"<{name}>{inside}</{name}>" for name in names)
    compiled = re.compile(rf"\s*{layout}\s*", re.DOTALL)
    first = f"<{tags[0]}>"

    def beginnings(prompt: Any) -> tuple[str, ...]:
        """What may stand before the completion."""
        if opened is not None:
            return (first,) if opened else ("",)
        if isinstance(prompt, str):
            return (first,) if prompt.rstrip().endswith(first) else ("",)
        return ("", first)

    def format_reward(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        texts = [text_of(completion) for completion in completions]
        return [
            float(any(compiled.fullmatch(before + text) for before in beginnings(prompt)))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    return format_reward


def contains(words: str | Sequence[str], ignore_case: bool = True) -> RewardFunction:
    """The share of ``words`` (texts) that the completion contains, from 0 to 1.

    Args:
        words: One text, or several.
        ignore_case: Compare without regard to case.
    """
    wanted = [words] if isinstance(words, str) else list(words)
    if not wanted or not all(isinstance(word, str) and word for word in wanted):
        raise ValueError(f"words must be one or more texts that are not empty, got {words!r}")
    fold = str.casefold if ignore_case else str
    wanted = [fold(word) for word in wanted]

    def contains(completions: Sequence[Any]) -> list[float]:
        texts = [fold(text_of(completion)) for completion in completions]
        return [sum(word in text for word in wanted) / len(wanted) for text in texts]

    return contains


def length_penalty(alpha: float = 0.01) -> RewardFunction:
    """``-alpha * log|y|``, with ``|y|`` in tokens where token ids are known, otherwise in words.

    Args:
        alpha: Weight; an empty completion counts as length 1.
    """

    def length_penalty(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> list[float]:
        return [-alpha * math.log(max(len(unit), 1)) for unit in _units(completions, completion_ids)]

    return length_penalty


def overlong_penalty(max_length: int, cache: int) -> RewardFunction:
    """0 up to ``max_length - cache``, then down in a straight line to -1 at ``max_length`` and beyond.

    The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13). Lengths are in tokens where token
    ids are known, otherwise in words.

    Args:
        max_length: The length at which the penalty is full.
        cache: The length of the slope, from 1 to ``max_length``.
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache must be in [1, max_length={max_length}], got {cache}")

    def overlong_penalty(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> list[float]:
        lengths = [len(unit) for unit in _units(completions, completion_ids)]
        return [-min(max(length - (max_length - cache), 0) / cache, 1.0) for length in lengths]

    return overlong_penalty


def repetition_penalty(n: int = 3, weight: float = 1.0) -> RewardFunction:
    """``-weight`` times the share of n-grams that have come before in the same completion.

    n-grams are of tokens where token ids are known, otherwise of words; a completion of fewer than ``n``
    has none and scores 0.

    Args:
        n: Length of the n-grams, at least 1.
        weight: The penalty of a completion that is all repetition.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")

    def repetition_penalty(
        completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> list[float]:
        scores = []
        for unit in _units(completions, completion_ids):
            grams = [tuple(unit[i : i + n]) for i in range(len(unit) - n + 1)]
            repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
            scores.append(-weight * repeated)
        return scores

    return repetition_penalty


#: Everything here that makes a reward function and is none itself.
FACTORIES = (
    exact_answer,
    numeric_answer,
    regex_match,
    format_reward,
    contains,
    length_penalty,
    overlong_penalty,
    repetition_penalty,
)


def last_number(value: Any) -> float | None:
    """The last number in a text (or the number itself), or None; a fraction counts as its quotient."""
    if value is None or isinstance(value, int | float):
        return None if value is None else float(value)
    matches = _NUMBER.findall(str(value))
    if not matches:
        return None
    above, _, below = matches[-1].replace(",", "").replace("\u2212", "-").partition("/")
    below = float(below or 1)
    quotient = float(above) / below if below else math.inf
    return quotient if math.isfinite(quotient) else None


def _units(
    completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[Any]]:
    """What length is counted in: tokens where they are known, otherwise words."""
    return [text_of(c).split() for c in completions] if completion_ids is None else completion_ids


def _column(columns: dict[str, Sequence[Any]], name: str, rule: str) -> Sequence[Any]:
    if name not in columns:
        others = [column for column in columns if column not in ("prompt_ids", "completion_ids")]
        came = did_you_mean(name, others) if others else "The prompts came without any other column."
        raise KeyError(f"{rule} reads the right answer from the column {name!r}, which is not there. {came}")
    return columns[name]


def _extract(pattern: re.Pattern | None, text: str) -> str | None:
    """The last match of the pattern (its first group if it has one), or None; the text without a pattern."""
    if pattern is None:
        return text
    matches = list(pattern.finditer(text))
    return matches[-1].group(1 if pattern.groups else 0) if matches else None


def _compile(pattern: str, argument: str, flags: int) -> re.Pattern:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"{argument}={pattern!r} is not a regular expression: {error}") from error
