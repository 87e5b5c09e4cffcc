"""Reward models from comparisons: an SFT body, a scalar head, and the Bradley-Terry likelihood.

    P(chosen beats rejected) = sigmoid(r_chosen - r_rejected),    loss = -log of it

The model reads ``prompt + completion + end token`` and scores it at the last real token. All comparisons of one
prompt share a batch and each of its completions is read once, which is what keeps a reward model from overfitting
to completions that appear in many comparisons (Ouyang et al. 2022, section 3.5). The trained folder is an ordinary
``AutoModelForSequenceClassification`` with one label. Run it::

    from reward_models.bradley_terry import train_reward_model

    train_reward_model("my-sft", "comparisons.jsonl", output="my-reward", epochs=1, learning_rate=1e-4)

Left out: ordinal labels and ties (drop them, or give a margin), sharding over processes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from reward_models.calibration import evaluate, find_head, forward_scores, normalise
from reward_models.comparisons import Comparison, encode_sides, prompt_batches, read_comparisons, sides_of
from reward_models.data.encoding import TextEncoder, check_ids
from reward_models.data.lengths import Lengths


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None, centering: float = 0.0
) -> Tensor:
    """Mean of ``-log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)**2``.

    Args:
        chosen: Scores ``[B]`` of the preferred completions.
        rejected: Scores ``[B]`` of the others.
        margin: By how much the chosen one should win, ``[B]`` or a number (Llama 2, section 3.2.2).
        centering: Pulls scores towards 0, which the likelihood leaves free (Eisenstein et al. 2023).

    Returns:
        A scalar.
    """
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"chosen and rejected must pair up, got shapes {tuple(chosen.shape)}, {tuple(rejected.shape)}"
        )
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    loss = -F.logsigmoid(gap)
    if centering:
        loss = loss + centering * (chosen + rejected).square()
    return loss.mean()


def load_reward_model(
    model: str | Path, seed: int = 0, device: str | torch.device = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A body with a new scalar head, in float32, and its tokenizer.

    A folder that already is a scalar classifier keeps its head; any other gets one with weights of standard
    deviation ``1 / sqrt(d + 1)`` (Stiennon et al. 2020).
    """
    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no completion has an end to read; set eos_token")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that the head is missing is no news here
    try:
        with torch.random.fork_rng():
            scorer, loaded = AutoModelForSequenceClassification.from_pretrained(
                str(model),
                num_labels=1,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
    finally:
        logging.set_verbosity(verbosity)
    head = find_head(scorer)
    name = next(name for name, module in scorer.named_modules() if module is head)
    if f"{name}.weight" in loaded["missing_keys"]:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            head.weight.normal_(0.0, 1.0 / math.sqrt(head.in_features + 1), generator=generator)
            if head.bias is not None:
                head.bias.zero_()
    if scorer.config.pad_token_id is None:
        scorer.config.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return scorer.to(device).eval(), tokenizer


def train_reward_model(
    model: str | Path,
    pairs: str | Path | Iterable[dict[str, Any]],
    output: str | Path | None = None,
    *,
    eval_pairs: str | Path | Iterable[dict[str, Any]] | None = None,
    reference: Sequence[tuple[str, str]] | None = None,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    batch_size: int = 64,
    max_length: int | None = None,
    too_long: str = "cut",
    skip_bad_rows: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    warmup_ratio: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    centering: float = 0.0,
    dropout: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    logger: Any = None,
    log_interval: int = 10,
) -> dict[str, Any]:
    """Train a reward model on comparisons.

    Args:
        model: Folder or hub id of the SFT model whose body it starts from.
        pairs: ``{"prompt", "chosen", "rejected"}`` records, optionally with ``"margin"``: a list, a dataset of
            ``datasets``, or a file or folder that :mod:`reward_models.data.rows` reads.
        output: Folder for the trained model and its tokenizer.
        eval_pairs: Held-out comparisons, scored before the normalisation.
        reference: ``(prompt, completion)`` samples of the SFT model on which scores get mean 0 and standard
            deviation 1; None takes the completions that were compared.
        epochs: Passes over the comparisons; may be a fraction. More than one overfits easily.
        learning_rate: Peak of Adam's learning rate; linear warm-up, then a cosine to zero.
        batch_size: Comparisons per optimiser step, rounded up to whole prompts; a prompt that has more of them is
            spread over several steps.
        max_length: The most tokens of prompt and completion together; None is what the model can hold.
        too_long: What becomes of longer ones: "cut" takes tokens off the beginning, as in use; "skip" leaves the
            comparison out.
        skip_bad_rows: Leave rows out that cannot be read, instead of stopping at the first.
        chat_template_kwargs: Variables of the chat template, for example ``{"enable_thinking": False}``.
        warmup_ratio: Share of the steps spent warming up.
        weight_decay: Decoupled weight decay.
        max_grad_norm: The gradient's norm is clipped here.
        centering: See :func:`bradley_terry_loss`.
        dropout: Whether the model's dropout is active.
        seed: Of the head, the order of prompts and dropout.
        device: ``"auto"`` or any torch device.
        logger: A stable-baselines3 ``Logger``.
        log_interval: Optimiser steps between logged rows.

    Returns:
        ``loss`` and ``accuracy`` over the last tenth of the steps, ``steps``, ``records`` learned from, ``skipped``
        and ``cut`` ones, what :func:`normalise` found under
        ``normalisation``, and with ``eval_pairs`` what :func:`evaluate` found under ``eval``.
    """
    read, bad_rows = read_comparisons(pairs, skip_bad_rows)
    scorer, tokenizer = load_reward_model(model, seed, device)
    lengths = Lengths.of(max_length, scorer.config, tokenizer, too_long)
    encoder = TextEncoder(tokenizer, chat_template_kwargs)
    comparisons, encoded = encode_sides(read, encoder, lengths)
    for k, ids in enumerate(encoded.values()):
        check_ids(ids, scorer.get_input_embeddings().weight.shape[0], f"completion {k}")
    lengths.bad_rows = len(bad_rows)
    lengths.warn(len(read))
    rng = random.Random(seed)
    total_steps = max(
        1, round(epochs * len(list(prompt_batches(comparisons, batch_size, random.Random(seed)))))
    )
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=learning_rate, weight_decay=weight_decay)
    history: list[tuple[float, float]] = []
    scorer.train(dropout)
    with torch.random.fork_rng(enabled=dropout):
        if dropout:
            torch.manual_seed(seed)
        while len(history) < total_steps:
            for batch in prompt_batches(comparisons, batch_size, rng):
                if len(history) == total_steps:
                    break
                rate = learning_rate * _warmup_cosine(len(history), total_steps, warmup_ratio)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                chosen, rejected = _pair_scores(scorer, batch, encoded)
                margin = torch.tensor([c.margin for c in batch], device=chosen.device)
                loss = bradley_terry_loss(chosen, rejected, margin, centering)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), max_grad_norm).item()
                optimizer.step()
                history.append((loss.item(), (chosen > rejected).float().mean().item()))
                if logger is not None and (len(history) == 1 or len(history) % log_interval == 0):
                    named = zip(("loss", "accuracy"), history[-1], strict=True)
                    for name, value in (*named, ("learning_rate", rate), ("grad_norm", norm)):
                        logger.record(f"train/{name}", value)
                    logger.dump(len(history))
    scorer.eval()
    tail = history[-max(1, len(history) // 10) :]
    result: dict[str, Any] = {
        "loss": sum(loss for loss, _ in tail) / len(tail),
        "accuracy": sum(accuracy for _, accuracy in tail) / len(tail),
        "steps": len(history),
        "records": len(comparisons),
        "skipped": lengths.left_out,
        "cut": lengths.cut,
    }
    if eval_pairs is not None:
        result["eval"] = evaluate(scorer, encoder, eval_pairs)
    if reference is None:
        reference = [(prompt, completion) for prompt, completion, _ in encoded]
    result["normalisation"] = normalise(scorer, encoder, reference)
    if output is not None:
        scorer.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return result


def _pair_scores(
    model: PreTrainedModel, batch: Sequence[Comparison], encoded: dict[tuple[str, str, bool], list[int]]
) -> tuple[Tensor, Tensor]:
    """Scores of both sides of each comparison; a completion in several of them is read once."""
    rows = {side: row for row, side in enumerate(dict.fromkeys(sides_of(batch)))}
    scores = forward_scores(model, [encoded[side] for side in rows])
    index = torch.tensor([[rows[side] for side in c.sides()] for c in batch], device=scores.device)  # [B, 2]
    return scores[index[:, 0]], scores[index[:, 1]]


def _warmup_cosine(step: int, total_steps: int, warmup_ratio: float) -> float:
    warmup = max(1, round(warmup_ratio * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))
