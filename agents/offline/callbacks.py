"""stable-baselines3's callbacks in supervised training, where a timestep is a step of the optimiser.

Left out: callbacks that need an environment (EvalCallback).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger

from agents.offline.learner import Learner
from agents.runs.saving import StopRequest, stop_on_signals


class StopOnSignals(BaseCallback):
    """The first SIGINT or SIGTERM ends training after the step under way, with a checkpoint; the second at once.

    A trainer with an output folder then raises :class:`~agents.runs.saving.TrainingInterrupted`. The command line
    has it; a program of one's own gets its KeyboardInterrupt where it is, unless it asks for this.

    Args:
        resumed: Whether to print where a run goes on.
    """

    def __init__(self, resumed: bool = False) -> None:
        super().__init__()
        self.request, self.resumed = StopRequest(), resumed
        self._handlers: AbstractContextManager[None] = nullcontext()

    def _on_training_start(self) -> None:
        done = self.model.num_timesteps
        if self.resumed and done:
            print(f"resuming at step {done:,} of {self.model.total_timesteps:,}", flush=True)
        elif self.resumed:
            print("there was no checkpoint yet: starting at the first step", flush=True)
        self._handlers = stop_on_signals(
            self.request, "the step under way", lambda: self.model.at_stake(self.num_timesteps)
        )
        self._handlers.__enter__()

    def _on_step(self) -> bool:
        return not self.request

    def _on_training_end(self) -> None:
        self._handlers.__exit__(None, None, None)


#: What a trainer takes: stable-baselines3 callbacks, or a function of the step's number and its metrics.
StepCallback = BaseCallback | list[BaseCallback] | Callable[[int, dict[str, float]], Any]


class _Learner:
    """What a callback sees as its ``model``: a count of steps, a logger, and ``save``."""

    #: What a timestep is.
    unit = "steps"

    def __init__(
        self, learner: Learner, logger: Logger | None, total: int, first: int, at_stake: Callable[[int], str]
    ) -> None:
        self.policy, self.tokenizer, self.save = learner.model, learner.tokenizer, learner.save
        self.at_stake = at_stake
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
        at_stake: Says what is lost if the process ends after so many steps.
    """

    def __init__(
        self,
        callback: StepCallback | None,
        learner: Learner,
        logger: Logger | None,
        total: int,
        first: int,
        at_stake: Callable[[int], str],
    ) -> None:
        self.function = None if callback is None or isinstance(callback, (BaseCallback, list)) else callback
        listed = callback if isinstance(callback, list) else [callback] if self.function is None else []
        self.callbacks = CallbackList([each for each in listed if each is not None])
        self.learner = _Learner(learner, logger, total, first, at_stake)
        self.callbacks.init_callback(self.learner)

    @property
    def stopped_by(self) -> int | None:
        """The signal that asked for a stop, if one did."""
        requests = [each.request for each in self.callbacks.callbacks if isinstance(each, StopOnSignals)]
        return next((request.number for request in requests if request), None)

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
