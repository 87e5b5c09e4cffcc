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

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


class Comparison(NamedTuple):
    """One rater's choice between two completions of a prompt."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0


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


def load_comparisons(pairs: str | Path | Iterable[dict[str, Any]]) -> list[Comparison]:
    """Comparisons from a ``.jsonl`` file, a list of dicts or a Dataset.

    Raises:
        ValueError: For a record without ``prompt``, ``chosen`` and ``rejected``, naming the record.
    """
    if isinstance(pairs, (str, Path)):
        if not Path(pairs).is_file():
            raise FileNotFoundError(f"pairs={str(pairs)!r}: there is no such file; expected a .jsonl file")
        lines = Path(pairs).read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines if line.strip()]
    found = []
    for number, record in enumerate(pairs, 1):
        missing = [key for key in ("prompt", "chosen", "rejected") if not isinstance(record.get(key), str)]
        if missing:
            raise ValueError(
                f"comparison {number} needs the texts 'prompt', 'chosen' and 'rejected' (and optionally a number "
                f"'margin'); {missing} missing or not text, it has the keys {sorted(record)}"
            )
        margin = float(record.get("margin") or 0.0)
        found.append(Comparison(record["prompt"], record["chosen"], record["rejected"], margin))
    if not found:
        raise ValueError("there are no comparisons to learn from: pairs is empty")
    return found


def load_reward_model(
    model: str | Path, seed: int = 0, device: str | torch.device = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A body with a new scalar head, in float32, and its tokenizer.

    A folder that already is a scalar classifier keeps its head; any other gets one with weights of standard
    deviation ``1 / sqrt(d + 1)`` (Stiennon et al. 2020).
    """
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no completion has an end to read; set eos_token")
    scorer, loaded = AutoModelForSequenceClassification.from_pretrained(
        str(model), num_labels=1, dtype=torch.float32, output_loading_info=True
    )
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


def find_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The linear layer with one output that makes the score."""
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear head with one output; expected num_labels=1, "
            f"got num_labels={model.config.num_labels}"
        )
    return heads[-1]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """Token ids of ``prompt + completion + end token``, each part tokenized on its own."""
    ids = list(tokenizer(prompt)["input_ids"])
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return [*ids, *tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def forward_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Scores ``[B]`` of token sequences in one pass, padded on the right, with gradient."""
    width = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), width), model.config.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    out = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device))
    return out.logits.squeeze(-1).float()


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    batch_size: int = 64,
) -> list[float]:
    """Scores of completions, without gradient and with dropout off; rows of like length share a pass."""
    sequences = [encode(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [0.0] * len(sequences)
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for i, value in zip(rows, forward_scores(model, [sequences[i] for i in rows]).tolist(), strict=True):
            scores[i] = value
    return scores


def prompt_batches(
    comparisons: Sequence[Comparison], batch_size: int, rng: random.Random
) -> Iterator[list[Comparison]]:
    """One epoch of batches that never split a prompt: prompts in random order until ``batch_size`` is reached."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.prompt, []).append(comparison)
    prompts = list(groups)
    rng.shuffle(prompts)
    batch: list[Comparison] = []
    for prompt in prompts:
        batch += groups[prompt]
        if len(batch) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


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
        pairs: ``{"prompt", "chosen", "rejected"}`` records, optionally with ``"margin"``, or a ``.jsonl`` file.
        output: Folder for the trained model and its tokenizer.
        eval_pairs: Held-out comparisons, scored before the normalisation.
        reference: ``(prompt, completion)`` samples of the SFT model on which scores get mean 0 and standard
            deviation 1; None takes the completions that were compared.
        epochs: Passes over the comparisons; may be a fraction. More than one overfits easily.
        learning_rate: Peak of Adam's learning rate; linear warm-up, then a cosine to zero.
        batch_size: Comparisons per optimiser step, rounded up to whole prompts.
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
        ``loss`` and ``accuracy`` over the last tenth of the steps, ``steps``, what :func:`normalise` found under
        ``normalisation``, and with ``eval_pairs`` what :func:`evaluate` found under ``eval``.
    """
    comparisons = load_comparisons(pairs)
    scorer, tokenizer = load_reward_model(model, seed, device)
    encoded = {(c.prompt, text): [] for c in comparisons for text in (c.chosen, c.rejected)}
    for prompt, text in encoded:
        encoded[prompt, text] = encode(tokenizer, prompt, text)
    rng = random.Random(seed)
    total_steps = max(1, round(epochs * len(list(prompt_batches(comparisons, batch_size, random.Random(seed))))))
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
    }
    if eval_pairs is not None:
        result["eval"] = evaluate(scorer, tokenizer, eval_pairs)
    result["normalisation"] = normalise(scorer, tokenizer, list(encoded) if reference is None else reference)
    if output is not None:
        scorer.save_pretrained(output)
        tokenizer.save_pretrained(output)
    return result


def _pair_scores(
    model: PreTrainedModel, batch: Sequence[Comparison], encoded: dict[tuple[str, str], list[int]]
) -> tuple[Tensor, Tensor]:
    """Scores of both sides of each comparison; a completion in several of them is read once."""
    rows = {key: i for i, key in enumerate({(c.prompt, t): None for c in batch for t in (c.chosen, c.rejected)})}
    scores = forward_scores(model, [encoded[key] for key in rows])
    chosen = torch.tensor([rows[c.prompt, c.chosen] for c in batch], device=scores.device)
    rejected = torch.tensor([rows[c.prompt, c.rejected] for c in batch], device=scores.device)
    return scores[chosen], scores[rejected]


def _warmup_cosine(step: int, total_steps: int, warmup_ratio: float) -> float:
    warmup = max(1, round(warmup_ratio * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: str | Path | Iterable[dict[str, Any]],
    scale: float = 1.0,
    num_bins: int = 5,
) -> dict[str, Any]:
    """How well a reward model predicts comparisons, and whether it knows how well.

    Args:
        model: The reward model.
        tokenizer: Its tokenizer.
        pairs: Comparisons it has not seen.
        scale: Log-odds per unit of score: ``normalise(...)["std"]`` for a normalised model.
        num_bins: Reliability bins over the confidence, from 0.5 to 1.

    Returns:
        ``accuracy`` (ties count half), ``loss``, ``ece`` (expected calibration error) and ``bins``, each with
        ``confidence``, ``accuracy`` and ``count``.
    """
    comparisons = load_comparisons(pairs)
    prompts = [c.prompt for c in comparisons]
    chosen = score(model, tokenizer, prompts, [c.chosen for c in comparisons])
    rejected = score(model, tokenizer, prompts, [c.rejected for c in comparisons])
    gaps = torch.tensor(chosen, dtype=torch.float64) - torch.tensor(rejected, dtype=torch.float64)
    return reliability(scale * gaps, num_bins)


def reliability(gaps: Tensor, num_bins: int = 5) -> dict[str, Any]:
    """Accuracy, loss, calibration error and bins from score gaps (chosen minus rejected) in log-odds, ``[B]``."""
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    confidence = torch.sigmoid(gaps.abs())
    which = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    for k in range(num_bins):
        inside = which == k
        if inside.any():
            bins.append(
                {
                    "confidence": confidence[inside].mean().item(),
                    "accuracy": right[inside].mean().item(),
                    "count": int(inside.sum()),
                }
            )
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(gaps)
    loss = -F.logsigmoid(gaps).mean().item()
    return {"accuracy": right.mean().item(), "loss": loss, "ece": error, "bins": bins}


@torch.no_grad()
def normalise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: Sequence[tuple[str, str]],
    batch_size: int = 64,
) -> dict[str, float]:
    """Fold an affine map into the head so that scores have mean 0 and standard deviation 1 on ``reference``.

    The scale goes into the head's weights. The shift goes into its bias; a head without one (Llama and most
    causal LMs) is moved along the direction in which the features of ``reference`` vary least while their mean
    is 1, the nearest thing to a bias that plain loading keeps. There the shift is exact on average and nearly so
    per sample: ``correlation`` says how nearly.

    Args:
        model: The reward model; its head is changed in place.
        tokenizer: Its tokenizer.
        reference: ``(prompt, completion)`` samples, at least two with different scores.
        batch_size: Sequences per pass.

    Returns:
        ``mean`` and ``std`` of the scores before, and ``correlation`` of the scores before and after.
    """
    head = find_head(model)
    features: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    prompts, completions = [p for p, _ in reference], [c for _, c in reference]
    sequences = [encode(tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
    rows = []
    for start in range(0, len(sequences), batch_size):
        features.clear()
        part = sequences[start : start + batch_size]
        forward_scores(model, part)
        h = features[-1]  # [B, T, d], or [B, d] where the model pools first
        if h.dim() == 3:
            h = h[torch.arange(len(part)), _last_read(part, model.config.pad_token_id)]
        rows.append(h.double().cpu())
    handle.remove()
    h = torch.cat(rows)  # [N, d]
    weight = head.weight[0].double().cpu()
    bias = 0.0 if head.bias is None else float(head.bias)
    before = h @ weight + bias
    mean, std = before.mean(), before.std(correction=0)
    if not std > 1e-8:
        raise ValueError(f"all {len(reference)} reference scores are {mean:.6g}; there is no spread to normalise")
    if head.bias is None:
        weight = weight - mean * constant_direction(h)
        std = (h @ weight).std(correction=0)
    else:
        head.bias.copy_(torch.tensor([(bias - mean) / std]))
    head.weight.copy_((weight / std).to(head.weight)[None])
    after = h @ weight
    correlation = torch.corrcoef(torch.stack([before, after]))[0, 1]
    return {"mean": float(mean), "std": float(std), "correlation": float(correlation)}


def _last_read(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Position that a sequence classifier reads: the last token that is not the pad id."""
    return torch.tensor([max(t for t, token in enumerate(ids) if token != pad_id) for ids in sequences])


def constant_direction(features: Tensor, ridge: float = 1e-4) -> Tensor:
    """The direction u with ``mean(features @ u) = 1`` along which features vary least: features ``[N, d] -> [d]``."""
    mean = features.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / len(features)
    scale = covariance.diagonal().mean().clamp(min=1e-12)
    u = torch.linalg.solve(covariance + ridge * scale * torch.eye(len(mean), dtype=features.dtype), mean)
    return u / (mean @ u)
