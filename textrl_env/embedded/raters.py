"""Simulated raters: they prefer by Bradley-Terry from the gold rubric, so they err, and disagree, like people.

A rater shown answers a and b prefers a with probability ``sigmoid(SCALE * (gold_a - gold_b))``. ``SCALE`` is
chosen so that two raters agree on 72 to 75 % of pairs of answers of the SFT model, which is what InstructGPT
reports of its labellers (Ouyang et al. 2022, section 3.4).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from textrl_env.embedded.rubric import gold_score

#: Log-odds per unit of gold.
SCALE = 6.0
#: Log-odds whose exponential would overflow.
_CERTAIN = 700.0


def prefer_probability(gold_a: float, gold_b: float, scale: float = SCALE) -> float:
    """The probability that a rater prefers a to b: ``sigmoid(scale * (gold_a - gold_b))``."""
    against = scale * (gold_b - gold_a)
    return 0.0 if against > _CERTAIN else 1.0 / (1.0 + math.exp(against))


def prefer(
    prompts: Sequence[str],
    completions_a: Sequence[str],
    completions_b: Sequence[str],
    seed: int = 0,
    scale: float = SCALE,
) -> list[bool]:
    """One rater's choices: True where the rater prefers a. Raters with different seeds are different people."""
    rng = random.Random(seed)
    gold_a = gold_score(prompts, completions_a)
    gold_b = gold_score(prompts, completions_b)
    return [rng.random() < prefer_probability(a, b, scale) for a, b in zip(gold_a, gold_b, strict=True)]


def agreement(gold_a: Sequence[float], gold_b: Sequence[float], scale: float = SCALE) -> float:
    """How often two raters agree with one another on these pairs: the mean of ``p**2 + (1 - p)**2``.

    Args:
        gold_a: Gold scores of the first answers.
        gold_b: Gold scores of the second answers.
        scale: Log-odds per unit of gold.
    """
    chances = [prefer_probability(a, b, scale) for a, b in zip(gold_a, gold_b, strict=True)]
    return sum(p * p + (1 - p) ** 2 for p in chances) / len(chances)
