"""stable-baselines3's callbacks in supervised training, where a timestep is a step of the optimiser.

Left out: callbacks that need an environment (EvalCallback).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: What a trainer takes: stable-baselines3 callbacks, or a function of the step's number and its metrics.
StepCallback = BaseCallback | list[BaseCallback] | Callable[[int, dict[str, float]], Any]


class _Learner:
    """What a callback sees as its ``model``: a count of steps, a logger, and ``save``."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, logger: Logger | None
    ) -> None:
        self.policy, self.tokenizer = model, tokenizer
        self.logger = logger or configure_logger(0, None, "", True)
        self.num_timesteps = 0

    def get_env(self) -> None:
        """There is none."""

    def get_vec_normalize_env(self) -> None:
        """There is none; stable-baselines3's CheckpointCallback asks."""

    def save(self, path: str | Path) -> None:
        """Write the model as an ordinary Hugging Face folder."""
        self.policy.save_pretrained(str(path))
        self.tokenizer.save_pretrained(str(path))


class StepCallbacks(AbstractContextManager):
    """Callbacks as one function ``(step, metrics) -> go on?``, their start and end told by ``with``.

    Args:
        callback: See :data:`StepCallback`; None does nothing.
        model: What is being trained; ``save`` writes it.
        tokenizer: Written beside it.
        logger: The run's logger, which callbacks may record to.
    """

    def __init__(
        self,
        callback: StepCallback | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        logger: Logger | None,
    ) -> None:
        self.function = None if callback is None or isinstance(callback, (BaseCallback, list)) else callback
        listed = callback if isinstance(callback, list) else [callback] if self.function is None else []
        self.callbacks = CallbackList([each for each in listed if each is not None])
        self.learner = _Learner(model, tokenizer, logger)
        self.callbacks.init_callback(self.learner)

    def __enter__(self) -> StepCallbacks:
        self.callbacks.on_training_start({"self": self.learner}, {})
        return self

    def __call__(self, step: int, metrics: dict[str, float]) -> bool:
        """Tell the callbacks of one step; False asks to stop, as in stable-baselines3."""
        if self.function is not None:
            return self.function(step, metrics) is not False
        self.learner.num_timesteps = step
        self.callbacks.update_locals({"metrics": metrics})
        return self.callbacks.on_step()

    def __exit__(self, *error: object) -> None:
        self.callbacks.on_training_end()
