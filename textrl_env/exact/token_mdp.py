"""A language as arrays: every prefix a row, level by level.

What :mod:`textrl_env.exact.solver` solves. Made from a ``TokenTree-v0`` (:func:`from_token_tree`), from a tiny
``TextRLHF-v0`` (:func:`from_text_env`), or from any reference and score (:func:`from_functions`). A million
responses take seconds; more than memory holds is not attempted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: One float64 array ``[n_t, V]`` (or ``[n_t]``) for each level, the prefixes of ``t < horizon`` tokens.
Levels = list[np.ndarray]


@dataclass(frozen=True)
class TokenMDP:
    """A language as arrays.

    Level ``t`` has one row for each prefix of ``t`` tokens after which the response still goes on, ``n_t`` of
    them, prompt by prompt. The continuations of row ``i`` are the next level's rows
    ``i * m, ..., i * m + m - 1``, one for each of the ``m`` tokens that do not end it, in order.

    Args:
        ref_log_probs: The reference, ``[n_t, V]`` for each level; ``-inf`` where a token is impossible.
        scores: Score of the response that ends with each token, ``[n_t, V]``; where it goes on, anything.
        kl_coef: Weight of the KL, ``beta`` of the papers.
        eos: The tokens that end a response early; none by default.
    """

    ref_log_probs: Levels
    scores: Levels
    kl_coef: float
    eos: tuple[int, ...] = ()

    @property
    def horizon(self) -> int:
        """The most tokens that a response can have."""
        return len(self.ref_log_probs)

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self.ref_log_probs[0])

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, ``V``."""
        return self.ref_log_probs[0].shape[1]

    def ends(self, t: int) -> np.ndarray:
        """bool ``[V]``: the tokens that end a response of ``t`` tokens."""
        if t == self.horizon - 1:
            return np.full(self.vocab_size, True)
        return np.isin(np.arange(self.vocab_size), self.eos)

    def outcome(self, t: int, values: np.ndarray | None, scores: np.ndarray | None = None) -> np.ndarray:
        """What each token of level ``t`` leads to, ``[n_t, V]``.

        Args:
            t: The level.
            values: Value of each row of the next level, ``[n_{t+1}]``; None at the last level.
            scores: What a response that ends is worth, ``[n_t, V]``; the MDP's own scores if None.
        """
        outcome = (self.scores[t] if scores is None else scores).copy()
        goes_on = ~self.ends(t)
        if goes_on.any():
            outcome[:, goes_on] = values.reshape(len(outcome), -1)
        return outcome

    def visits(self, policy: Levels) -> Levels:
        """Probability that an episode passes through each row, ``[n_t]`` for each level."""
        visits = [np.full(self.num_prompts, 1.0 / self.num_prompts)]
        for t in range(self.horizon - 1):
            reached = visits[t][:, None] * np.exp(policy[t])
            visits.append(reached[:, ~self.ends(t)].ravel())
        return visits


def from_token_tree(env: Any) -> TokenMDP:
    """The language of a ``TokenTree-v0``, single or vector, wrapped or not."""
    tree = env.unwrapped.dynamics
    levels = [tree.level(t) for t in range(tree.horizon)]
    return TokenMDP(
        ref_log_probs=[tree.ref_table[rows] for rows in levels],
        scores=[tree.score_table[rows] for rows in levels],
        kl_coef=tree.kl_coef,
        eos=(0,) if tree.eos else (),
    )


def from_functions(
    log_probs: Callable[[np.ndarray, np.ndarray], np.ndarray],
    score: Callable[[np.ndarray, np.ndarray], np.ndarray],
    vocab_size: int,
    horizon: int,
    num_prompts: int = 1,
    kl_coef: float = 0.1,
    eos: Sequence[int] = (),
    batch_size: int = 4096,
) -> TokenMDP:
    """Enumerate a language level by level from a reference and a score.

    Args:
        log_probs: ``log_probs(prompt_ids [n], tokens [n, t]) -> [n, V]``, the reference after each prefix.
        score: ``score(prompt_ids [n], tokens [n, t]) -> [n]``, of complete responses.
        vocab_size: Number of tokens, V.
        horizon: The most tokens that a response can have.
        num_prompts: Prompts are numbered from 0.
        kl_coef: Weight of the KL.
        eos: The tokens that end a response early; none by default.
        batch_size: The most prefixes or responses for one call.
    """
    prompt_ids = np.arange(num_prompts)
    tokens = np.zeros((num_prompts, 0), dtype=np.int64)
    ref_levels, score_levels = [], []
    for t in range(horizon):
        ends = np.isin(np.arange(vocab_size), eos) | (t == horizon - 1)
        ref_levels.append(_in_batches(log_probs, prompt_ids, tokens, batch_size))
        ended = _append(prompt_ids, tokens, np.flatnonzero(ends))
        scores = np.zeros((len(tokens), vocab_size))
        if ends.any():
            scores[:, ends] = _in_batches(score, *ended, batch_size).reshape(len(tokens), -1)
        score_levels.append(scores)
        prompt_ids, tokens = _append(prompt_ids, tokens, np.flatnonzero(~ends))
    return TokenMDP(ref_levels, score_levels, kl_coef, tuple(int(token) for token in eos))


def from_text_env(env: Any, batch_size: int = 256) -> TokenMDP:
    """The language of a ``TextRLHF-v0`` whose vocabulary and budget are tiny.

    It has ``prompts * vocab_size ** max_new_tokens`` responses; the reference is asked about every prefix and
    the reward about every response, with the env's own penalty for a missing end.

    Args:
        env: Single or vector, wrapped or not.
        batch_size: Prefixes in one pass of the reference, responses in one call of the reward.
    """
    from textrl_env.lm.slot_decoder import SlotDecoder

    text = env.unwrapped.dynamics
    lm = text.lm

    def log_probs(prompt_ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        rows = [
            np.append(text.prompt_tokens[k], written) for k, written in zip(prompt_ids, tokens, strict=True)
        ]
        decoder = SlotDecoder(lm, len(rows), max(map(len, rows)), use_cache=False)
        return decoder.prefill(np.arange(len(rows)), rows).double().log_softmax(-1).cpu().numpy()

    def score(prompt_ids: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        texts = [text.prompt_texts[k] for k in prompt_ids]
        prompts = [text.prompt_tokens[k] for k in prompt_ids]
        is_eos = np.isin(tokens[:, -1], lm.eos_ids)
        return text.score_responses(texts, prompts, list(tokens), prompt_ids, is_eos)["score"]

    return from_functions(
        log_probs,
        score,
        vocab_size=lm.vocab_size,
        horizon=text.max_new_tokens,
        num_prompts=len(text.prompt_tokens),
        kl_coef=text.kl_coef,
        eos=lm.eos_ids,
        batch_size=batch_size,
    )


def _append(prompt_ids: np.ndarray, tokens: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every prefix followed by each of ``more``, in row order: ``[n * m]`` and ``[n * m, t + 1]``."""
    grown = np.repeat(tokens, len(more), axis=0)
    return np.repeat(prompt_ids, len(more)), np.column_stack([grown, np.tile(more, len(tokens))])


def _in_batches(function: Callable, prompt_ids: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
    parts = [
        np.asarray(function(prompt_ids[i : i + size], tokens[i : i + size]), dtype=np.float64)
        for i in range(0, len(tokens), size)
    ]
    return np.concatenate(parts)
