"""What came back from a generator, held against what was asked for, before anything is learned from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from textrl_env.generators.sampling import Sampling
from textrl_env.lm.sequences import POLICY, Sequences
from textrl_env.protocols import Generator

#: A log-probability may be this far above 0, by rounding.
_ROUNDING = 1e-3
#: Who may have stopped a response.
_STOPS = ("eos", "length")


class GeneratorError(RuntimeError):
    """A generator failed, or returned something else than what was asked for."""


class Generated(NamedTuple):
    """What a generator returns.

    Attributes:
        responses: ``B`` arrays of token ids, the end token included.
        log_probs: ``B`` arrays, the log-probability of each token under the distribution that it was drawn from (after
            temperature and cut, renormalised), or None where the generator does not know them.
        stopped_by: ``B`` times "eos" or "length", or None where the generator does not say.
    """

    responses: Sequence[Any]
    log_probs: Sequence[Any] | None = None
    stopped_by: Sequence[str] | None = None


def ask(
    generator: Generator,
    prompts: Sequence[np.ndarray] | Sequences,
    sampling: Sampling,
    name: str,
    first_end: Callable[[np.ndarray], int | None] | None = None,
) -> Sequences:
    """One response to each prompt, or one more turn in each sequence, from any generator.

    Args:
        generator: What writes.
        prompts: ``B`` int64 arrays of token ids, or sequences to go on from.
        sampling: How.
        name: Of the generator, for messages.
        first_end: Of a response's tokens, how many there are up to where a text that ends it is complete; None if none
            is. The generator knows nothing of it: what comes after is cut off, which leaves what sampling up to there
            would have given.

    Returns:
        The prompts with their responses; the log-probabilities beside them are the generator's own.

    Raises:
        GeneratorError: It failed, or its answers do not fit what was asked for.
    """
    given = prompts if isinstance(prompts, Sequences) else Sequences.from_prompts(prompts)
    before = given.split(given.tokens)
    try:
        # Copies: what an engine does with its prompts is its own affair.
        answers = generator.generate([np.array(prompt) for prompt in before], sampling)
    except GeneratorError:
        raise
    except Exception as error:
        raise GeneratorError(
            f"the generator {name} failed while it wrote {len(before)} responses: {type(error).__name__}: {error}"
        ) from error
    return _checked(answers, given, sampling, name, first_end)


def push_weights(generator: Generator, model: Any, name: str) -> None:
    """Give a generator the present weights of a transformers model.

    Raises:
        GeneratorError: It did not take them.
    """
    try:
        generator.update_weights(model)
    except GeneratorError:
        raise
    except Exception as error:
        raise GeneratorError(
            f"the generator {name} failed to take new weights: {type(error).__name__}: {error}"
        ) from error


def _checked(
    answers: Any,
    given: Sequences,
    sampling: Sampling,
    name: str,
    first_end: Callable[[np.ndarray], int | None] | None,
) -> Sequences:
    def fail(text: str) -> GeneratorError:
        return GeneratorError(f"the generator {name} {text}; nothing was learned from this rollout")

    responses, log_probs, stopped_by = _parts(answers, given, fail)
    count = len(given)
    for what, found in (
        ("responses", responses),
        ("log-probability arrays", log_probs),
        ("reasons to stop", stopped_by),
    ):
        if found is not None and len(found) != count:
            raise fail(f"got {count} prompts and returned {len(found)} {what}")
    written = [_token_ids(response, i, fail) for i, response in enumerate(responses)]
    for i, tokens in enumerate(written):
        _check_tokens(tokens, None if stopped_by is None else stopped_by[i], i, sampling, fail)
    known = None if log_probs is None else [_numbers(row, i, fail) for i, row in enumerate(log_probs)]
    for i, row in enumerate(known or ()):
        _check_log_probs(row, len(written[i]), i, fail)
    if first_end is not None:
        ends = [first_end(tokens) for tokens in written]
        written = [tokens[:end] for tokens, end in zip(written, ends, strict=True)]
        known = None if known is None else [row[:end] for row, end in zip(known, ends, strict=True)]
    return given.extended(written, POLICY, known)


def _parts(answers: Any, given: Sequences, fail: Any) -> tuple[Any, Any, Any]:
    if isinstance(answers, Sequences):
        count = min(len(answers), len(given))
        pairs = zip(given.split(given.tokens)[:count], answers.split(answers.tokens)[:count], strict=True)
        for i, (before, whole) in enumerate(pairs):
            if not np.array_equal(before, whole[: len(before)]):
                raise fail(
                    f"returned a sequence that does not go on from prompt {i}: given {before.tolist()}, returned "
                    f"{whole.tolist()}"
                )
        if len(answers) != len(given):
            raise fail(f"got {len(given)} prompts and returned {len(answers)} responses")

        def new(values: np.ndarray) -> list[np.ndarray]:
            rows = zip(answers.split(values), given.lengths, strict=True)
            return [row[length:] for row, length in rows]

        return new(answers.tokens), None if answers.log_probs is None else new(answers.log_probs), None
    if isinstance(answers, (tuple, list)) and len(answers) in (2, 3):
        return (*answers, None) if len(answers) == 2 else tuple(answers)
    shape = f" of {len(answers)}" if isinstance(answers, (tuple, list)) else ""
    raise fail(
        "must return textrl_env.generators.Generated(responses, log_probs, stopped_by), a pair (responses, log_probs) "
        f"or Sequences, and returned a {type(answers).__name__}{shape}"
    )


def _token_ids(response: Any, i: int, fail: Any) -> np.ndarray:
    tokens = np.asarray(response)
    if tokens.ndim != 1 or (len(tokens) and not np.issubdtype(tokens.dtype, np.integer)):
        raise fail(
            f"returned {tokens.dtype} of shape {tokens.shape} for response {i}; expected token ids [T]"
        )
    return tokens.astype(np.int64)


def _numbers(row: Any, i: int, fail: Any) -> np.ndarray:
    try:
        return np.asarray(row, dtype=np.float64)  # None among them becomes NaN
    except (TypeError, ValueError) as error:
        raise fail(f"returned log-probabilities of response {i} that are no numbers: {error}") from error


def _check_tokens(tokens: np.ndarray, stopped_by: str | None, i: int, sampling: Sampling, fail: Any) -> None:
    if not 1 <= len(tokens) <= sampling.max_new_tokens:
        raise fail(
            f"returned {len(tokens)} tokens for prompt {i}; expected between 1 and max_new_tokens="
            f"{sampling.max_new_tokens}"
        )
    above = np.inf if sampling.vocab_size is None else sampling.vocab_size
    strange = tokens[(tokens < 0) | (tokens >= above)]
    if len(strange):
        raise fail(f"returned the token id {strange[0]} for prompt {i}; the model has 0 to {above - 1}")
    ends = np.flatnonzero(np.isin(tokens, sampling.eos_ids))
    if len(ends) and ends[0] + 1 < len(tokens):
        raise fail(f"went on after the end token {tokens[ends[0]]} in response {i}")
    if len(ends) and len(tokens) <= sampling.min_new_tokens:
        raise fail(
            f"ended response {i} after {len(tokens) - 1} tokens, and min_new_tokens is {sampling.min_new_tokens}"
        )
    if not len(ends) and len(tokens) < sampling.max_new_tokens:
        raise fail(
            f"cut response {i} off after {len(tokens)} tokens, with no end token and a budget of "
            f"{sampling.max_new_tokens}; is its context shorter than the model's?"
        )
    stop = "eos" if len(ends) else "length"
    if stopped_by is not None and stopped_by != stop:
        raise fail(
            f"says that response {i} was stopped by {stopped_by!r}, but its last token {tokens[-1]} says {stop!r}; "
            f"expected one of {_STOPS}. Has it the model's end tokens, {list(sampling.eos_ids)}?"
        )


def _check_log_probs(row: np.ndarray, length: int, i: int, fail: Any) -> None:
    if row.shape != (length,):
        raise fail(f"returned {length} tokens and log-probabilities of shape {row.shape} for prompt {i}")
    bad = row[~np.isfinite(row) | (row > _ROUNDING)]
    if len(bad):
        what = "above 0" if np.isfinite(bad[0]) else "not finite"
        raise fail(f"returned the log-probability {bad[0]} in response {i}, which is {what}")
