"""Evaluations that were made up, as a run leaves them: answers with scores, without a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from agents.evaluation.evaluation import EvaluationResult
from agents.evaluation.records import EvaluationRecord, write_evaluation

#: What every prompt has to itself, so that answers to one prompt are not independent.
PROMPTS = 64


def result(
    score, gold=None, kl=1.0, samples=4, seed=0, prompts=PROMPTS, noise=0.2, responses=None, columns=None
):
    """Answers whose scores and gold scores scatter around two means."""
    rng = np.random.default_rng(seed)
    by_prompt = 0.3 * np.random.default_rng(99).standard_normal((prompts, 1))

    def scatter(mean):
        return mean + by_prompt + noise * rng.standard_normal((prompts, samples))

    texts = [[f"answer {rng.integers(1000)}" for _ in range(samples)] for _ in range(prompts)]
    return EvaluationResult(
        prompts=[f"question {i}?" for i in range(prompts)],
        responses=texts if responses is None else responses,
        score=scatter(score),
        gold=None if gold is None else scatter(gold),
        parts={},
        kl=np.full((prompts, samples), float(kl)),
        length=np.full((prompts, samples), 8),
        ended=np.ones((prompts, samples), dtype=bool),
        prompt_ids=np.arange(prompts),
        columns={"kind": [("a", "b")[i % 2] for i in range(prompts)]} if columns is None else columns,
    )


def evaluation(timesteps, score, gold=None, kl=1.0, seed=0, held_out=True, distinct=9.0, **more):
    """One evaluation; see :func:`result`."""
    sampled = result(score, gold, kl, seed=seed, **more)
    more = {name: value for name, value in more.items() if name not in ("samples", "responses")}
    greedy = result(score, gold, kl, samples=1, seed=seed + 1, **more)
    return EvaluationRecord(timesteps, sampled, greedy, held_out, distinct, tokens=1000, seconds=1.0)


def record(folder, points, total, held_out=True, ended=True):
    """Write the evaluations of a run.

    Args:
        folder: The run directory.
        points: ``(timesteps, score, gold, kl)`` on the way; the best by gold is compared with the last.
        total: Timesteps of the last policy.
        held_out: Whether the prompts are held out.
        ended: Whether the comparison at the end was made.
    """
    for i, (at, *values) in enumerate(points):
        write_evaluation(folder, evaluation(at, *values, seed=10 * i, samples=2, held_out=held_out))
    write_evaluation(folder, evaluation(0, *points[0][1:], seed=1001, held_out=held_out), "start")
    if not ended:
        return
    last = points[-1]
    write_evaluation(folder, evaluation(total, *last[1:], seed=1002, held_out=held_out), "final")
    if last[2] is not None:
        best = max(points[1:], key=lambda point: point[2])
        if best is not last:
            write_evaluation(folder, evaluation(best[0], *best[1:], seed=1003, held_out=held_out), "best")


def recorded_ends(name):
    """Evaluations at the ends of a real run in the embedded world, seed 0."""
    document = json.loads((Path(__file__).parent / "recorded_comparisons.json").read_text())[name]
    found = {}
    for end, values in document.items():
        made = evaluation(values["timesteps"], 0.0, 0.0, prompts=len(values["score"]))
        scores = {part: np.array(values[part]) for part in ("score", "gold")}
        found[end] = dataclasses.replace(made, sampled=dataclasses.replace(made.sampled, **scores))
    return found
