"""How different answers are: a policy that says one thing to everybody has collapsed, however well it scores."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

#: n-grams that :func:`distinct_n` is told for.
SAMPLE = 256


def distinct_n(texts: Sequence[str], n: int, sample: int = SAMPLE) -> float:
    """The share of n-grams of words that are distinct, among as many as ``sample`` of them; 0 if there are none.

    The share falls with the number of n-grams looked at, whatever a model does: more text has more repetitions. So it
    is the expected one among ``sample`` n-grams drawn without replacement (Hurlbert's rarefaction, 1971), which does
    not depend on how many answers were drawn. Fewer n-grams than that are taken as they are.

    Args:
        texts: All answers.
        n: Words of an n-gram.
        sample: n-grams that the share is told for.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        grams.update(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    if total <= sample:
        return len(grams) / total if total else 0.0
    all_of = _log_choose(total, sample)
    # A gram that comes c times is missed by a sample with probability C(total - c, sample) / C(total, sample).
    times = Counter(grams.values())
    missed = {
        c: math.exp(_log_choose(total - c, sample) - all_of) if total - c >= sample else 0.0 for c in times
    }
    return sum(count * (1 - missed[c]) for c, count in times.items()) / sample


def _log_choose(m: int, n: int) -> float:
    return math.lgamma(m + 1) - math.lgamma(n + 1) - math.lgamma(m - n + 1)


def distinct_of(responses: Sequence[Sequence[str]], count: int) -> float:
    """Different answers among ``count`` to the same prompt, expected over all choices of so many, mean over prompts.

    NaN where prompts have fewer answers.
    """
    if min(map(len, responses), default=0) < count:
        return math.nan
    found = []
    for texts in responses:
        total = len(texts)
        missed = (
            math.exp(_log_choose(total - c, count) - _log_choose(total, count)) if total - c >= count else 0.0
            for c in Counter(texts).values()
        )
        found.append(sum(1 - each for each in missed))
    return float(np.mean(found))


def self_similarity(responses: Sequence[Sequence[str]]) -> float:
    """How alike answers to the same prompt are: the words that two share over all of theirs, mean over pairs.

    1 where all answers have the same words, 0 where none have one in common; NaN where no prompt has two answers.
    """
    found = []
    for texts in responses:
        words = [set(text.split()) for text in texts]
        pairs = itertools.combinations(words, 2)
        alike = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
        if alike:
            found.append(np.mean(alike))
    return float(np.mean(found)) if found else math.nan
