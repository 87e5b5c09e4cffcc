"""Scores of a reward model, how well they predict comparisons, and their normalisation.

Left out: choosing a temperature; ``normalise`` returns the one that gives the log-odds back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.classifier import last_token_logits
from reward_models.comparisons import Comparison, encode_answer, load_comparisons, sides_of
from reward_models.data.encoding import TextEncoder
from reward_models.data.lengths import context_length


def find_head(model: PreTrainedModel) -> torch.nn.Linear:
    """The linear layer with one output that makes the score."""
    heads = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1]
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no linear head with one output; expected num_labels=1, "
            f"got num_labels={model.config.num_labels}"
        )
    return heads[-1]


def forward_scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Scores ``[B]`` of token sequences in one pass, with gradient."""
    return last_token_logits(model, sequences, model.config.pad_token_id).squeeze(-1).float()


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | TextEncoder,
    prompts: Sequence[str],
    completions: Sequence[str],
    ended: Sequence[bool] | None = None,
    batch_size: int = 64,
) -> list[float]:
    """Scores of completions, without gradient and with dropout off; rows of like length share a pass.

    What the model cannot hold loses its beginning, as in training.

    Args:
        model: The reward model.
        tokenizer: Its tokenizer, or an encoder with settings of its own.
        prompts: ``N`` prompts.
        completions: As many completions.
        ended: Which of them end with the end token; None is all of them.
        batch_size: Sequences per pass.
    """
    ended = [True] * len(prompts) if ended is None else ended
    encoder = TextEncoder.of(tokenizer)
    limit = context_length(model.config, encoder.tokenizer) or 0  # [-0:] is everything
    sequences = [
        encode_answer(encoder, *row)[-limit:] for row in zip(prompts, completions, ended, strict=True)
    ]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    scores = [0.0] * len(sequences)
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for i, value in zip(rows, forward_scores(model, [sequences[i] for i in rows]).tolist(), strict=True):
            scores[i] = value
    return scores


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | TextEncoder,
    pairs: str | Path | Iterable[dict[str, Any]],
    scale: float = 1.0,
    num_bins: int = 5,
) -> dict[str, Any]:
    """How well a reward model predicts comparisons, and whether it knows how well.

    Args:
        model: The reward model.
        tokenizer: Its tokenizer, or an encoder with settings of its own.
        pairs: Comparisons it has not seen, from any source of :mod:`reward_models.data.rows`.
        scale: Log-odds per unit of score: ``normalise(...)["std"]`` for a normalised model.
        num_bins: Reliability bins over the confidence, from 0.5 to 1.

    Returns:
        ``accuracy`` (ties count half), ``loss``, ``ece`` (expected calibration error), ``bins``, each with
        ``confidence``, ``accuracy`` and ``count``, and ``right``: for each comparison 1, 0 or, for a tie, 0.5.
    """
    comparisons = pairs if _are_comparisons(pairs) else load_comparisons(pairs)
    scores = torch.tensor(
        score(model, tokenizer, *zip(*sides_of(comparisons), strict=True)), dtype=torch.float64
    )
    return reliability(scale * (scores[0::2] - scores[1::2]), num_bins)


def _are_comparisons(pairs: Any) -> bool:
    return isinstance(pairs, list) and bool(pairs) and isinstance(pairs[0], Comparison)


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
    return {
        "accuracy": right.mean().item(),
        "loss": loss,
        "ece": error,
        "bins": bins,
        "right": right.tolist(),
    }


@torch.no_grad()
def normalise(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | TextEncoder,
    reference: Sequence[tuple[str, str]],
    batch_size: int = 64,
) -> dict[str, float]:
    """Fold an affine map into the head so that scores have mean 0 and standard deviation 1 on ``reference``.

    The scale goes into the head's weights. The shift goes into its bias; a head without one (Llama and most
    causal LMs) is moved along the direction in which the features of ``reference`` vary least while their mean
    is 1, the nearest thing to a bias that plain loading keeps. There the shift is exact on average and nearly so
    per sample: ``correlation`` is how nearly.

    Args:
        model: The reward model; its head is changed in place.
        tokenizer: Its tokenizer, or an encoder with settings of its own.
        reference: ``(prompt, completion)`` samples, at least two with different scores.
        batch_size: Sequences per pass.

    Returns:
        ``mean`` and ``std`` of the scores before, and ``correlation`` of the scores before and after.
    """
    head = find_head(model)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().cpu()))
    try:
        score(model, tokenizer, *zip(*reference, strict=True), batch_size=batch_size)
    finally:
        handle.remove()
    h = torch.cat(seen)  # [N, d]
    weight = head.weight[0].double().cpu()
    bias = 0.0 if head.bias is None else float(head.bias)
    before = h @ weight + bias
    mean, std = before.mean(), before.std(correction=0)
    if not std > 1e-6:
        raise ValueError(
            f"all {len(reference)} reference scores are {mean:.6g}; there is no spread to normalise"
        )
    if head.bias is None:
        weight = weight - mean * constant_direction(h)
        std = (h @ weight).std(correction=0)
    else:
        head.bias.copy_(torch.tensor([(bias - mean) / std]))
    head.weight.copy_((weight / std).to(head.weight)[None])
    after = h @ weight
    correlation = torch.corrcoef(torch.stack([before, after]))[0, 1]
    return {"mean": float(mean), "std": float(std), "correlation": float(correlation)}


def constant_direction(features: Tensor, ridge: float = 1e-4) -> Tensor:
    """The direction u with ``mean(features @ u) = 1`` along which features vary least: features ``[N, d] -> [d]``."""
    mean = features.mean(0)
    centred = features - mean
    covariance = centred.T @ centred / len(features)
    scale = covariance.diagonal().mean().clamp(min=1e-12)
    u = torch.linalg.solve(covariance + ridge * scale * torch.eye(len(mean), dtype=features.dtype), mean)
    return u / (mean @ u)
