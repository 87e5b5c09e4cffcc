"""Rewards for language models: the contract, models that score, rules that check, and their sums.

``import reward_models`` loads neither torch nor transformers; what needs them is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from reward_models.base import Batch, Reward, RewardResult, TrainerState
from reward_models.compose import Clip, Ensemble, RunningNormalizer
from reward_models.contract import WeightedSum, load_reward
from reward_models.function import FunctionReward
from reward_models.rules import (
    contains,
    exact_answer,
    format_reward,
    length_penalty,
    numeric_answer,
    overlong_penalty,
    regex_match,
    repetition_penalty,
)

#: Public names that need torch or tenacity, and the module each is in.
_LAZY = {"HFRewardModel": "reward_models.classifier", "Guarded": "reward_models.guarded"}

__all__ = [
    "Batch",
    "Clip",
    "Ensemble",
    "FunctionReward",
    "Guarded",
    "HFRewardModel",
    "Reward",
    "RewardResult",
    "RunningNormalizer",
    "TrainerState",
    "WeightedSum",
    "contains",
    "exact_answer",
    "format_reward",
    "length_penalty",
    "load_reward",
    "numeric_answer",
    "overlong_penalty",
    "regex_match",
    "repetition_penalty",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'reward_models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
