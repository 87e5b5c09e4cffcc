"""Collect preferences: sample answers from a model, let a judge compare them, write the comparisons down.

    from agents.preferences.collection import collect_preferences

    collect_preferences("my-sft", "prompts.jsonl", judge="gold", output="preferences.jsonl")

A judge that scores (the gold rubric, a reward model, a function) prefers the answer of higher score. With
``rater_scale`` it is asked through simulated raters instead, who prefer by Bradley-Terry and so err and disagree:
``P(a preferred to b) = sigmoid(rater_scale * (score_a - score_b))``. A judge that compares (a language model behind an
endpoint) is taken at its word.

Each line of the output has ``prompt``, ``chosen``, ``rejected``, ``chosen_ended`` and ``rejected_ended`` (false for an
answer that was cut off at the budget), ``rater``, and from a judge that scores ``chosen_score`` and
``rejected_score``; and the ``kind`` of its prompt, where prompts have one. Left out: choosing the most telling pairs.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from agents.preferences.judges import load_judge
from reward_models import Reward
from reward_models.data.encoding import TEMPLATE_COLUMNS, TextEncoder
from reward_models.data.lengths import TOO_LONG, Lengths
from textrl_env import embedded
from textrl_env.data.prompts import PromptSet, load_prompts
from textrl_env.envs.text_rlhf import default_budget, last_tokens
from textrl_env.errors import check_choice
from textrl_env.lm.causal_lm import CausalLM
from textrl_env.lm.decoding import generate

#: The column of prompts that tells their kinds apart; a reward model's accuracy is told by it.
KIND = "kind"


class Answer(NamedTuple):
    """One sampled answer: its text, its token ids, whether it ended by itself, and its score if there is one."""

    text: str
    tokens: np.ndarray
    ended: bool
    score: float | None = None


class Collected(NamedTuple):
    """The comparisons, and how the collecting went; see :func:`collect_preferences`."""

    records: list[dict[str, Any]]
    statistics: dict[str, float]


def collect_preferences(
    model: str | Path | CausalLM,
    prompts: Any,
    judge: Any,
    output: str | Path | None = None,
    *,
    answers_per_prompt: int = 2,
    pairs_per_prompt: int | None = None,
    raters: int = 1,
    rater_scale: float | None = None,
    ties: str = "skip",
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    tokenizer: Any = None,
    batch_size: int = 64,
    skip_bad_rows: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    callback: Callable[[int, int], None] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    too_long: str = "cut",
    **loading: Any,
) -> Collected:
    """Sample answers, have them compared, and write the comparisons.

    Args:
        model: Folder or hub id of the causal LM that answers, or a :class:`CausalLM` (with its own temperature).
        prompts: A file, a list, or a ``datasets.Dataset``.
        judge: "gold" or "reward" of the embedded world, a reward of any form, an
            :class:`~agents.preferences.judges.OpenAIJudge`, or any object with its ``compare``.
        output: A ``.jsonl`` file; None writes none. While collecting it is called ``*.part.jsonl`` (:func:`part_of`),
            which keeps what was judged if the collecting ends early; an error says so in a note.
        answers_per_prompt: Answers to sample for each prompt; all pairs of different ones are compared.
        pairs_per_prompt: At most so many pairs of each prompt, drawn at random; None takes all.
        raters: Raters for each pair; each gives a record of its own.
        rater_scale: Log-odds per unit of score. None is the embedded world's for the gold rubric, and no noise for
            any other judge; ``math.inf`` is no noise.
        ties: What becomes of a pair that the judge cannot tell apart: "skip" it, or flip a "coin".
        temperature: Of sampling.
        max_new_tokens: Budget of an answer; None is 256 or what the model's context leaves, 24 with the embedded
            models.
        tokenizer: None takes the one that lies beside the model.
        batch_size: Prompts that are answered and judged together.
        skip_bad_rows: Leave prompts out that cannot be read, instead of stopping at the first.
        seed: Of the answers, the pairs and the raters, each rater being a different person.
        device: ``"auto"`` or any torch device.
        callback: Called after each batch with the prompts done and the number of all.
        chat_template_kwargs: Variables of the model's chat template, for prompts that are messages.
        allow_control_tokens: Whether text in messages may be control tokens; it stays text otherwise.
        too_long: What becomes of prompts that leave no room for an answer in the model's context: "cut" takes tokens
            off their beginning, "skip" leaves them out, "error" stops.
        **loading: How the model is loaded, see :class:`reward_models.loading.LoadOptions`.

    Returns:
        The records, each with the ``kind`` of its prompt where prompts have that column, and statistics: ``prompts``,
        ``answers``, ``pairs`` that were judged, ``records``, ``identical`` pairs (skipped: the same text twice),
        ``ties``, ``skipped`` and ``cut`` prompts, ``cut_off`` answers (share), ``agreement`` of two raters (measured
        if there are several), ``expected_agreement`` and ``rater_accuracy`` (both under the raters' model, where the
        judge scores), and ``unclear`` verdicts of a language model.

    Raises:
        ValueError: A bad prompt (its place is named), or a setting out of range.
    """
    check_choice("ties", ties, ("skip", "coin"))
    check_choice("too_long", too_long, TOO_LONG)
    for name, value, least in (("answers_per_prompt", answers_per_prompt, 2), ("raters", raters, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    is_gold = isinstance(judge, str) and judge == "gold"
    judge = load_judge(judge)
    scores = isinstance(judge, Reward)
    if rater_scale is None:
        rater_scale = embedded.raters.SCALE if is_gold else math.inf
    if not scores and (raters > 1 or math.isfinite(rater_scale)):
        raise ValueError(
            "simulated raters need a judge that scores; one that compares is asked once for each pair"
        )
    questions = load_prompts(prompts, skip_bad_rows=skip_bad_rows)
    lm = CausalLM.load(model, tokenizer, temperature, device, **loading)
    encoder = TextEncoder(lm.tokenizer, chat_template_kwargs, allow_control_tokens)
    ids = [np.array(_prompt_ids(encoder, questions, row), dtype=np.int64) for row in range(len(questions))]
    if max_new_tokens is None:
        room = math.inf if lm.max_length is None else lm.max_length
        max_new_tokens = default_budget(lm, max((len(x) for x in ids if len(x) < room), default=1))
    asked, cut = _within_context(lm, ids, max_new_tokens, too_long)
    if scores:
        judge.use_ids(lm.tokenizer)
    panel = Panel(raters, rater_scale, ties, seed)
    skipped = len(questions.skipped) + len(questions) - len(asked)
    tally: Counter[str] = Counter(prompts=len(asked), skipped=skipped, cut=cut)
    records: list[dict[str, Any]] = []
    sampling = torch.Generator(lm.device).manual_seed(seed)
    drawing = np.random.default_rng([seed, 0])
    with _writer(output) as write:
        for start in range(0, len(asked), batch_size):
            rows = list(asked)[start : start + batch_size]
            groups = _answer(
                lm, encoder, questions, asked, rows, answers_per_prompt, max_new_tokens, sampling
            )
            if scores:
                groups = _score(judge, asked, questions, rows, groups)
            tally["answers"] += sum(len(group) for group in groups)
            tally["cut_off"] += sum(not answer.ended for group in groups for answer in group)
            pairs = []
            for row, group in zip(rows, groups, strict=True):
                drawn = list(_pairs(group, pairs_per_prompt, drawing))
                tally["identical"] += sum(a.text == b.text for a, b in drawn)
                pairs += [(row, a, b) for a, b in drawn if a.text != b.text]
            texts = [[questions.texts[row], a.text, b.text] for row, a, b in pairs]
            verdicts = None if scores or not pairs else judge.compare(*map(list, zip(*texts, strict=True)))
            for k, (row, a, b) in enumerate(pairs):
                verdict = None if verdicts is None else verdicts[k]
                fresh = [_record(questions, row, *side) for side in panel.judge(a, b, verdict)]
                records += fresh
                write(fresh)
            if callback is not None:
                callback(start + len(rows), len(asked))
    statistics = _statistics(tally, panel, records)
    if hasattr(judge, "unclear"):
        statistics["unclear"] = float(judge.unclear)
    return Collected(records, statistics)


class Panel:
    """Raters who choose between answers: without noise, or by Bradley-Terry from the answers' scores.

    Args:
        raters: How many of them, each with a random stream of its own.
        scale: Log-odds per unit of score; infinite is no noise.
        ties: "skip" or "coin".
        seed: Of their choices.

    Attributes:
        pairs: Pairs judged.
        ties: Pairs that could not be told apart.
        agreed: Pairs of raters who chose alike, and of how many.
        expected_agreement: Of two raters, for each pair under the model.
        accuracy: The chance that a rater prefers the answer of higher score, for each pair under the model.
    """

    def __init__(self, raters: int, scale: float, ties: str, seed: int) -> None:
        self.scale, self.coin = scale, ties == "coin"
        self.streams = [np.random.default_rng([seed, 1 + rater]) for rater in range(raters)]
        self.pairs, self.ties = 0, 0
        self.agreed = np.zeros(2)
        self.expected_agreement: list[float] = []
        self.accuracy: list[float] = []

    def judge(self, a: Answer, b: Answer, verdict: float | None) -> Iterator[tuple[int, Answer, Answer]]:
        """``(rater, chosen, rejected)`` for each rater who can decide.

        Args:
            a: An answer.
            b: Another answer.
            verdict: 1, 0 or 0.5 from a judge that compares; None goes by the scores.
        """
        self.pairs += 1
        chance = self._chance(a, b) if verdict is None else verdict
        # A rater with noise has no ties: equal scores are an even chance.
        certain = verdict is not None or math.isinf(self.scale)
        if certain and chance == 0.5:
            self.ties += 1
            if not self.coin:
                return
        if verdict is None:
            self.expected_agreement.append(chance**2 + (1 - chance) ** 2)
            self.accuracy.append(max(chance, 1 - chance))
        choices = [stream.random() < chance for stream in self.streams]
        first = sum(choices)
        second = len(choices) - first
        self.agreed += [math.comb(first, 2) + math.comb(second, 2), math.comb(len(choices), 2)]
        for rater, choice in enumerate(choices):
            yield (rater, a, b) if choice else (rater, b, a)

    def _chance(self, a: Answer, b: Answer) -> float:
        if math.isinf(self.scale):
            return 0.5 if a.score == b.score else float(a.score > b.score)
        return embedded.raters.prefer_probability(a.score, b.score, self.scale)


def _within_context(
    lm: CausalLM, ids: list[np.ndarray], max_new_tokens: int, too_long: str
) -> tuple[dict[int, np.ndarray], int]:
    """The prompts that leave room for an answer, by row, and how many of them were cut for it."""
    limit = None if lm.max_length is None else lm.max_length - max_new_tokens
    if limit is not None and limit < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for prompts in the model's context of {lm.max_length} "
            "tokens; lower it"
        )
    lengths = Lengths(limit, too_long)
    kept = {}
    for row, tokens in enumerate(ids):
        off = lengths.off_prompt(len(tokens), len(tokens))
        if off is not None:
            kept[row] = tokens if off == 0 else last_tokens(lm, tokens, limit)
    lengths.warn(len(ids))
    if not kept:
        raise ValueError(
            f"all {len(ids)} prompts have more than {limit} tokens, and too_long='skip' leaves none"
        )
    return kept, lengths.cut


def _answer(
    lm: CausalLM,
    encoder: TextEncoder,
    questions: PromptSet,
    ids: Mapping[int, np.ndarray],
    rows: Sequence[int],
    count: int,
    max_new_tokens: int,
    generator: torch.Generator,
) -> list[list[Answer]]:
    """``count`` answers to each of the prompts in ``rows``."""
    prompts = [ids[row] for row in rows for _ in range(count)]
    after_text = [isinstance(_prompt(questions, row), str) for row in rows for _ in range(count)]
    responses, _ = generate(lm, prompts, max_new_tokens, generator)
    answers = []
    for tokens, is_text in zip(responses, after_text, strict=True):
        ended = bool(np.isin(tokens[-1], lm.eos_ids))
        body = tokens[:-1] if ended else tokens
        answers.append(Answer(encoder.decode(body, is_text), tokens, ended))
    return [answers[k : k + count] for k in range(0, len(answers), count)]


def _prompt(questions: PromptSet, row: int) -> Any:
    """A prompt as it came: a text, or messages."""
    messages = None if questions.messages is None else questions.messages[row]
    return questions.texts[row] if messages is None else messages


def _prompt_ids(encoder: TextEncoder, questions: PromptSet, row: int) -> list[int]:
    settings = {name: questions.columns[name][row] for name in TEMPLATE_COLUMNS if name in questions.columns}
    return encoder.prompt(_prompt(questions, row), settings)


def _completion(prompt: Any, text: str) -> Any:
    """An answer in the form of its prompt: a text, or messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _score(
    judge: Reward,
    ids: Mapping[int, np.ndarray],
    questions: PromptSet,
    rows: Sequence[int],
    groups: list[list[Answer]],
) -> list[list[Answer]]:
    """The same answers with their scores; the judge sees the tokens that were sampled, not a new tokenization."""
    flat = [(row, answer) for row, group in zip(rows, groups, strict=True) for answer in group]
    result = judge.score(
        [_prompt(questions, row) for row, _ in flat],
        [_completion(_prompt(questions, row), answer.text) for row, answer in flat],
        prompt_ids=[ids[row].tolist() for row, _ in flat],
        completion_ids=[answer.tokens.tolist() for _, answer in flat],
        columns={name: [values[row] for row, _ in flat] for name, values in questions.columns.items()},
    )
    applies = itertools.repeat(True) if result.scored is None else iter(result.scored.tolist())
    scored = zip(result.total.tolist(), applies, strict=False)
    found = [[(answer, *next(scored)) for answer in group] for group in groups]
    # An answer that the judge has no opinion of is compared with none.
    return [[answer._replace(score=score) for answer, score, known in group if known] for group in found]


def _pairs(
    group: Sequence[Answer], limit: int | None, generator: np.random.Generator
) -> Iterator[tuple[Answer, Answer]]:
    """Pairs of a prompt's answers, at most ``limit`` of them, the first of each pair drawn by a coin."""
    found = list(itertools.combinations(group, 2))
    if limit is not None and limit < len(found):
        found = [found[k] for k in sorted(generator.permutation(len(found))[:limit])]
    for a, b in found:
        yield (a, b) if generator.random() < 0.5 else (b, a)


def _record(questions: PromptSet, row: int, rater: int, chosen: Answer, rejected: Answer) -> dict[str, Any]:
    prompt = _prompt(questions, row)
    record: dict[str, Any] = {"prompt": prompt}
    settings = {name: questions.columns[name][row] for name in TEMPLATE_COLUMNS if name in questions.columns}
    record |= {name: value for name, value in settings.items() if value is not None}
    if KIND in questions.columns:
        record[KIND] = questions.columns[KIND][row]
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        record[name] = _completion(prompt, answer.text)
    record |= {"chosen_ended": chosen.ended, "rejected_ended": rejected.ended, "rater": rater}
    if chosen.score is not None:
        record |= {"chosen_score": chosen.score, "rejected_score": rejected.score}
    return record


def part_of(output: str | Path) -> Path:
    """What the file of comparisons is called until all are collected."""
    return Path(output).with_suffix(".part.jsonl")


@contextlib.contextmanager
def _writer(path: str | Path | None) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A function that writes records to a new ``.jsonl`` file, which gets its name at the end; or to nothing."""
    if path is None:
        yield lambda records: None
        return
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"output={str(path)!r} must end in .jsonl: a comparison is a line")
    part, count = part_of(path), 0
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "w", encoding="utf-8") as file:

            def write(records: list[dict[str, Any]]) -> None:
                nonlocal count
                try:
                    file.write("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))
                    file.flush()
                except OSError as error:
                    raise OSError(error.errno, f"cannot write {part}: {error.strerror}") from error
                count += len(records)

            yield write
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        if count:
            error.add_note(f"the {count:,} comparisons until then are in {part}")
        raise


def _statistics(tally: Counter[str], panel: Panel, records: list[dict[str, Any]]) -> dict[str, float]:
    result = {name: float(tally[name]) for name in ("prompts", "skipped", "cut", "answers", "identical")}
    result["cut_off"] = tally["cut_off"] / max(tally["answers"], 1)
    result |= {"pairs": float(panel.pairs), "ties": float(panel.ties), "records": float(len(records))}
    if panel.agreed[1]:
        result["agreement"] = float(panel.agreed[0] / panel.agreed[1])
    for name in ("expected_agreement", "accuracy"):
        values = getattr(panel, name)
        if values:
            result["rater_accuracy" if name == "accuracy" else name] = sum(values) / len(values)
    return result
