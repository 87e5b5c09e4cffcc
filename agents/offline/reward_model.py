"""Training of reward models on comparisons, by the Bradley-Terry likelihood.

    from agents.offline.reward_model import train_reward_model

    train_reward_model("my-sft", "comparisons.jsonl", output="my-reward")

The loss, the head and what is read of a comparison are in :mod:`reward_models.bradley_terry`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from agents import presets
from agents.offline.callbacks import StepCallback
from agents.offline.learner import Learner
from agents.offline.options import TrainerOptions
from agents.offline.trainer import Task, digest_of_data, optimise, tail_mean
from agents.parallel.processes import current
from reward_models.bradley_terry import bradley_terry_loss, load_reward_model, pair_scores
from reward_models.calibration import evaluate, find_head, normalise
from reward_models.comparisons import (
    Comparison,
    encode_sides,
    prompt_batches,
    read_comparisons,
    sides_of,
)
from reward_models.data.encoding import TextEncoder, check_ids
from reward_models.data.lengths import Lengths


def train_reward_model(
    model: str | Path,
    pairs: str | Path | Iterable[dict[str, Any]],
    output: str | Path | None = None,
    *,
    eval_pairs: str | Path | Iterable[dict[str, Any]] | None = None,
    reference: Sequence[tuple[str, str]] | None = None,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int = 64,
    max_length: int | None = None,
    too_long: str = "cut",
    skip_bad_rows: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    allow_control_tokens: bool = False,
    warmup_ratio: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    centering: float = 0.0,
    dropout: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    logger: Any = None,
    log_interval: int = 10,
    callback: StepCallback | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a reward model on comparisons.

    Args:
        model: Folder (of a model, or of a peft adapter, which is merged into its model) or hub id of the SFT model
            whose body it starts from.
        pairs: ``{"prompt", "chosen", "rejected"}`` records, optionally with ``"margin"``: a list, a dataset of
            ``datasets``, or a file or folder that :mod:`reward_models.data.rows` reads.
        output: Folder for the trained model and its tokenizer.
        eval_pairs: Held-out comparisons, scored before the normalisation, and every ``eval_every`` steps.
        reference: ``(prompt, completion)`` samples of the SFT model on which scores get mean 0 and standard
            deviation 1; None takes the completions that were compared.
        epochs: Passes over the comparisons; may be a fraction. More than one overfits easily. None is 1, for the
            embedded models 3.
        learning_rate: Peak of Adam's learning rate; linear warm-up, then ``lr_scheduler_type``, a cosine to zero. None
            is 1e-5, for an adapter 1e-4, for the embedded models 1e-3 (:data:`agents.presets.ON_FILES`).
        batch_size: Comparisons per optimiser step, rounded up to whole prompts; a prompt that has more of them is
            spread over several steps.
        max_length: The most tokens of prompt and completion together; None is what the model can hold.
        too_long: What becomes of longer ones: "cut" takes tokens off the beginning, as in use; "skip" leaves the
            comparison out; "error" refuses the data.
        skip_bad_rows: Leave rows out that cannot be read, instead of stopping at the first.
        chat_template_kwargs: Variables of the chat template, for example ``{"enable_thinking": False}``.
        allow_control_tokens: Whether text in messages may be control tokens; it stays text otherwise.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: Decoupled weight decay, on matrices only.
        max_grad_norm: The gradient's norm is clipped here.
        centering: See :func:`bradley_terry_loss`.
        dropout: Whether the model's dropout is active.
        seed: Of the head, the order of prompts and dropout.
        device: ``"auto"`` or any torch device.
        logger: A stable-baselines3 ``Logger``.
        log_interval: Optimiser steps between logged rows.
        callback: stable-baselines3 callbacks (a timestep is an optimiser step), or a function of the step's number
            and its metrics, which stops the training by returning False.
        **options: See :class:`agents.offline.options.TrainerOptions`: adapters, schedules, checkpoints, logs, loading.

    Returns:
        ``loss`` and ``accuracy`` over the last tenth of the steps, ``first_loss`` before the first, ``steps``,
        ``records`` learned from, ``skipped`` and ``cut`` ones, what :func:`normalise` found under
        ``normalisation``, and with ``eval_pairs`` what :func:`evaluate` found under ``eval``.
    """
    read, bad_rows = read_comparisons(pairs, skip_bad_rows)
    held_out = None if eval_pairs is None else list(read_comparisons(eval_pairs, skip_bad_rows)[0])
    processes = current()
    settings = TrainerOptions.of("train_reward_model()", options)

    def load(path: str | Path, loading: Any, where: torch.device) -> Any:
        return load_reward_model(path, seed, where, loading)[0]

    learner = Learner(model, None, device, settings, load, find_head, seed)
    scorer, tokenizer = learner.model, learner.tokenizer
    default = functools.partial(presets.on_files, "reward", tokenizer=tokenizer, lora_rank=settings.lora_rank)
    lengths = Lengths.of(max_length, scorer.config, tokenizer, too_long)
    encoder = TextEncoder(tokenizer, chat_template_kwargs, allow_control_tokens)
    comparisons, encoded = encode_sides(read, encoder, lengths)
    for k, ids in enumerate(encoded.values()):
        check_ids(ids, scorer.get_input_embeddings().weight.shape[0], f"completion {k}")
    lengths.bad_rows = len(bad_rows)
    lengths.warn(len(read))

    def batches(rng: random.Random) -> Iterable[list[Comparison]]:
        return prompt_batches(comparisons, batch_size, rng)

    def backward(batch: list[Comparison]) -> dict[str, float]:
        # Whole prompts, so that a completion in several comparisons is read once.
        mine = [each for prompt in processes.share(*_by_prompt(batch, encoded)) for each in prompt]
        loss = right = 0.0
        if mine:
            chosen, rejected = pair_scores(scorer, mine, encoded)
            margin = torch.tensor([c.margin for c in mine], device=chosen.device)
            part = bradley_terry_loss(chosen, rejected, margin, centering) * (len(mine) / len(batch))
            part.backward()
            loss, right = part.item(), int((chosen > rejected).sum())
        everywhere = processes.gather((loss, right))
        losses, counts = zip(*everywhere, strict=True)
        return {"loss": sum(losses), "accuracy": sum(counts) / len(batch)}

    def look() -> dict[str, float]:
        found = evaluate(scorer, encoder, held_out)
        return {name: found[name] for name in ("loss", "accuracy", "ece")}

    sides = [encoded[side] for comparison in comparisons for side in comparison.sides()]
    identity = {"centering": centering, "data": digest_of_data(sides)}
    history, _ = optimise(
        learner,
        Task(batches, backward, None if held_out is None else look, identity),
        epochs=default("epochs") if epochs is None else epochs,
        learning_rate=default("learning_rate") if learning_rate is None else learning_rate,
        batch_size=batch_size,
        warmup_ratio=warmup_ratio,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        dropout=dropout,
        seed=seed,
        logger=logger,
        log_interval=log_interval,
        callback=callback,
        options=settings,
        output=output,
    )
    result: dict[str, Any] = {
        "loss": tail_mean(history, "loss"),
        "first_loss": history[0]["loss"],
        "accuracy": tail_mean(history, "accuracy"),
        "steps": len(history),
        "records": len(comparisons),
        "skipped": lengths.left_out,
        "cut": lengths.cut,
    }
    if reference is None:
        reference = [(prompt, completion) for prompt, completion, _ in encoded]

    def close() -> dict[str, Any]:
        found = {} if held_out is None else {"eval": evaluate(scorer, encoder, held_out)}
        found["normalisation"] = normalise(scorer, encoder, reference)
        if output is not None:
            learner.save(output)
        return found

    return result | processes.on_main(close)


def _by_prompt(
    batch: Sequence[Comparison], encoded: Mapping[tuple[str, str, bool], Sequence[int]]
) -> tuple[list[list[Comparison]], list[int]]:
    """The comparisons of each prompt, and how many tokens their completions have."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in batch:
        groups.setdefault(comparison.prompt, []).append(comparison)
    lengths = [sum(len(encoded[side]) for side in set(sides_of(group))) for group in groups.values()]
    return list(groups.values()), lengths
