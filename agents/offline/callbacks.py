"""stable-baselines3's callbacks in supervised training, where a timestep is a step of the optimiser.

Left out: callbacks that need an environment (EvalCallback).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger

from agents.offline.learner import Learner

#: What a trainer takes: stable-baselines3 callbacks, or a function of the step's number and its metrics.
StepCallback = BaseCallback | list[BaseCallback] | Callable[[int, dict[str, float]], Any]


class _Learner:
    """What a callback sees as its ``model``: a count of steps, a logger, and ``save``."""

    #: What a timestep is.
    unit = "steps"

    def __init__(self, learner: Learner, logger: Logger | None, total: int, first: int) -> None:
        self.policy, self.tokenizer, self.save = learner.model, learner.tokenizer, learner.save
        self.logger = logger or configure_logger(0, None, "", True)
        self.num_timesteps, self.total_timesteps = first, total
        self.latest: dict[str, float] = {}

    def get_env(self) -> None:
        """There is none."""

    def get_vec_normalize_env(self) -> None:
        """There is none; stable-baselines3's CheckpointCallback asks."""


class StepCallbacks(AbstractContextManager):
    """Callbacks as one function ``(step, metrics) -> go on?``, their start and end told by ``with``.

    Args:
        callback: See :data:`StepCallback`; None does nothing.
        learner: What is being trained; ``save`` writes it.
        logger: The run's logger, which callbacks may record to.
        total: Steps in all.
        first: Steps that a run that goes on has taken already.
    """

    def __init__(
        self,
        callback: StepCallback | None,
        learner: Learner,
        logger: Logger | None,
        total: int,
        first: int = 0,
    ) -> None:
        self.function = None if callback is None or isinstance(callback, (BaseCallback, list)) else callback
        listed = callback if isinstance(callback, list) else [callback] if self.function is None else []
        self.callbacks = CallbackList([each for each in listed if each is not None])
        self.learner = _Learner(learner, logger, total, first)
        self.callbacks.init_callback(self.learner)

    def __enter__(self) -> StepCallbacks:
        self.callbacks.on_training_start({"self": self.learner}, {})
        return self

    def __call__(self, step: int, metrics: dict[str, float]) -> bool:
        """Tell the callbacks of one step; False asks to stop, as in stable-baselines3."""
        if self.function is not None:
            return self.function(step, metrics) is not False
        self.learner.num_timesteps, self.learner.latest = step, metrics
        self.callbacks.update_locals({"metrics": metrics})
        return self.callbacks.on_step()

    def __exit__(self, *error: object) -> None:
        self.callbacks.on_training_end()
