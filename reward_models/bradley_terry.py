"""Reward models from comparisons: an SFT body, a scalar head, and the Bradley-Terry likelihood.

    P(chosen beats rejected) = sigmoid(r_chosen - r_rejected),    loss = -log of it

The model reads ``prompt + completion + end token`` and scores it at the last real token. All comparisons of one
prompt share a batch and each of its completions is read once, which is what keeps a reward model from overfitting
to completions that appear in many comparisons (Ouyang et al. 2022, section 3.5). The trained folder is an ordinary
``AutoModelForSequenceClassification`` with one label. Training lies with the other trainers on files, in
:mod:`agents.offline.reward_model`.

Left out: ordinal labels and ties (drop them, or give a margin).
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from reward_models.calibration import find_head, forward_scores
from reward_models.comparisons import Comparison, sides_of
from reward_models.loading import (
    LoadOptions,
    adapter_base,
    check_decoder,
    check_model_path,
    load_causal_lm,
    load_tokenizer,
    place,
)


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
    model: str | Path,
    seed: int = 0,
    device: str | torch.device = "auto",
    options: LoadOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A body with a scalar head, and its tokenizer.

    A folder that already is a scalar classifier keeps its head; any other gets one with weights of standard
    deviation ``1 / sqrt(d + 1)`` (Stiennon et al. 2020).

    Args:
        model: Folder (of a model, or of a peft adapter, which is merged into its model) or hub id.
        seed: Of a new head.
        device: ``"auto"`` or any torch device.
        options: How to load; float32 by default.

    Raises:
        FileNotFoundError: No such folder.
        ValueError: An encoder-decoder, or a tokenizer without an end token.
    """
    options = options or LoadOptions()
    tokenizer = load_tokenizer(model, options)
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so no completion has an end to read; set eos_token")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer, new_head = _load_scorer(model, options)
    if new_head:
        head = find_head(scorer)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = torch.empty(head.weight.shape).normal_(
                0.0, 1.0 / math.sqrt(head.in_features + 1), generator=generator
            )
            head.weight.copy_(weight)
            if head.bias is not None:
                head.bias.zero_()
    if scorer.config.pad_token_id is None:
        scorer.config.pad_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    return place(scorer, torch.device(device), options).eval(), tokenizer


def _load_scorer(model: str | Path, options: LoadOptions) -> tuple[PreTrainedModel, bool]:
    """A model with a scalar head, and whether the head is new."""
    with torch.random.fork_rng():
        if adapter_base(model) is not None:
            writer = load_causal_lm(model, options)
            _check_has_scorer(writer.config, model)
            writer.config.num_labels = 1
            scorer = AutoModelForSequenceClassification.from_config(writer.config, dtype=writer.dtype)
            scorer.base_model.load_state_dict(writer.base_model.state_dict())
            return scorer, True
        check_model_path(model)
        config = AutoConfig.from_pretrained(str(model), **options.source)
        check_decoder(config, f"model={str(model)!r}", encoders=True)
        _check_has_scorer(config, model)
        config.num_labels = 1
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # that the head is missing is no news here
        try:
            scorer, loaded = AutoModelForSequenceClassification.from_pretrained(
                str(model), config=config, output_loading_info=True, **options.keywords()
            )
        finally:
            logging.set_verbosity(verbosity)
    head = find_head(scorer)
    name = next(name for name, module in scorer.named_modules() if module is head)
    strange = sorted(set(loaded["missing_keys"]) - {f"{name}.weight", f"{name}.bias"})
    if strange:
        raise ValueError(
            f"model={str(model)!r} is not whole: {strange[:4]} are not in it and would be random"
        )
    return scorer, f"{name}.weight" in loaded["missing_keys"]


def _check_has_scorer(config: PretrainedConfig, model: str | Path) -> None:
    """Raise a ValueError for an architecture of which transformers has no model with a score head."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(
            f"model={str(model)!r} is a {config.model_type} model, and transformers has no sequence classifier of that "
            "kind, which a reward model is; start from a model of another kind (a Llama, Qwen, Gemma, ...)"
        )


def pair_scores(
    model: PreTrainedModel, batch: Sequence[Comparison], encoded: dict[tuple[str, str, bool], list[int]]
) -> tuple[Tensor, Tensor]:
    """Scores of both sides of each comparison; a completion in several of them is read once."""
    rows = {side: row for row, side in enumerate(dict.fromkeys(sides_of(batch)))}
    scores = forward_scores(model, [encoded[side] for side in rows])
    index = torch.tensor([[rows[side] for side in c.sides()] for c in batch], device=scores.device)  # [B, 2]
    return scores[index[:, 0]], scores[index[:, 1]]


#: Names that were here in version 0.1, and where they are now. Nothing in this package uses them.
_MOVED = {"train_reward_model": "agents.offline.reward_model"}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} has moved to {_MOVED[name]}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(_MOVED[name]), name)
