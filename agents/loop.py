"""The learning loop: collect and learn in turn, call the callbacks, write the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger

from agents.algorithms.safeguards import check_weights
from agents.parallel.processes import Processes, fingerprint
from agents.parallel.standing import give_standing, take_standing
from agents.process import tuned_for
from agents.rollouts.episode_log import EpisodeLog
from agents.rollouts.rollout import Rollout
from agents.rollouts.vector_envs import tell_trainer_state
from agents.runs import checkpoint
from agents.runs.callback_state import give_states
from agents.sb3_surface import StableBaselines3Surface
from reward_models import TrainerState


class LearningLoop(StableBaselines3Surface):
    """Runs :meth:`collect` and :meth:`train` in turn; :class:`~agents.base.Agent` says what they do."""

    device: torch.device
    episodes: EpisodeLog
    callback_states: list[Any]
    num_timesteps: int
    n_updates: int
    stopped: bool
    latest: dict[str, Any]
    processes: Processes
    #: Rollouts collected since the timesteps were last reset.
    iterations: int = 0
    #: Norm of all weights after the latest updates, and what it was times before them.
    weight_norm: float = 0.0
    weight_growth: float = 1.0
    #: When the present call of :meth:`learn` ends, in timesteps; None before the first.
    total_timesteps: int | None = None
    #: Quantities that the logger still shows although a line with them has been written.
    _written: list[str] = []  # noqa: RUF012, replaced and never changed

    @property
    def _total_timesteps(self) -> int | None:
        # The name that callbacks written for stable-baselines3 read.
        return self.total_timesteps

    def collect(self) -> Rollout:
        """One rollout."""
        raise NotImplementedError

    def train(self, rollout: Rollout) -> None:
        """Learn from one rollout."""
        raise NotImplementedError

    def learn(
        self,
        total_timesteps: int,
        callback: BaseCallback | list[BaseCallback] | Callable | None = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Learn until at least ``total_timesteps`` env steps (on text: tokens) have been taken.

        Args:
            total_timesteps: Env steps; more of them if ``reset_num_timesteps`` is False.
            callback: stable-baselines3 callbacks, or a function of ``(locals, globals)``.
            log_interval: Rollouts between two lines of the log; None logs nothing.
            tb_log_name: Name of the run in TensorBoard; None is the class name.
            reset_num_timesteps: False goes on counting, and goes on in the same environment state.
            progress_bar: Show one.
        """
        callback = self._set_up_learn(
            total_timesteps, callback, tb_log_name, reset_num_timesteps, progress_bar
        )
        given = locals()
        self._on_main(lambda: self._start_callbacks(callback, given))
        with tuned_for(self.policy):
            self._run(callback, log_interval)
        self._on_main(callback.on_training_end)
        return self

    def _run(self, callback: BaseCallback, log_interval: int | None) -> None:
        """Collect and learn in turn until the steps are spent or a callback asks to stop."""
        self.weight_norm = check_weights(self.policy, "before learning")
        while self.num_timesteps < self.total_timesteps and not self.stopped:
            self._on_main(callback.on_rollout_start)
            tell_trainer_state((self.envs, self.text_env), self._trainer_state())
            started = time.perf_counter()
            rollout = self.collect()
            self.logger.record("time/rollout_seconds", time.perf_counter() - started)
            callback.update_locals(locals())
            self._on_main(callback.on_rollout_end)
            self._progress_remaining = max(1.0 - self.num_timesteps / self.total_timesteps, 0.0)
            learned_from = rollout if self.keeps_unscored else rollout.without_unscored()
            if not self.stopped and len(learned_from):
                started = time.perf_counter()
                self._forget_written()
                with self.others_away():
                    self.train(learned_from)
                self.logger.record("time/update_seconds", time.perf_counter() - started)
            self.iterations += 1
            self._on_main(lambda: self._end_update(callback))
            if log_interval is not None and (self.iterations % log_interval == 0 or self.stopped):
                self.dump_logs(self.iterations, rollout)

    def _start_callbacks(self, callback: BaseCallback, given: dict[str, Any]) -> None:
        callback.on_training_start(given, globals())
        give_states(callback, self.callback_states)
        self.callback_states = []

    def _end_update(self, callback: BaseCallback) -> None:
        if not update_ended(callback):
            self.stopped = True

    def _on_main(self, call: Callable[[], Any]) -> None:
        """Call callbacks in the main process, and let the others stand where it stands afterwards."""
        if not self.processes.are_several:
            call()
            return
        standing = self.processes.on_main(lambda: (call(), take_standing(self))[1])
        if not self.processes.is_main:
            give_standing(self, standing)

    def check_shares(self) -> None:
        """Raise a ValueError where several processes could not share the work, whatever they hold."""
        if not self.processes.are_several:
            return
        if self.text_env is None:
            raise ValueError(
                f"{self.envs} is stepped, and {self.processes.count} processes share only what a language model writes "
                "as whole episodes (TextRLHF-v0): start it in one process, without torchrun or accelerate launch. What "
                "makes a stepped environment faster is more slots (n_envs)"
            )
        size = None if self.batch_size is None else self.batch_size * self.gradient_accumulation_steps
        self.processes.check_divides(n_episodes=self.n_episodes, batch_size=size)

    def _check_processes(self) -> None:
        """Raise a ValueError where several processes could not share the work, or are not alike."""
        if not self.processes.are_several:
            return
        self.check_shares()
        same = ("seed", "n_episodes", "group_size", "batch_size", "n_epochs", "num_timesteps")
        settings = {name: getattr(self, name) for name in same}
        settings |= {"prompts": self.text_env.num_prompts, "budget": self.text_env.max_new_tokens}
        weights = fingerprint(weight for _, weight in self.policy.named_weights())
        if self.policy.is_split:
            # All take as many passes, whatever memory each has found free.
            found = [size for size in self.processes.gather(self.micro_batch_size) if size is not None]
            self.micro_batch_size = min(found, default=None)
        self.processes.check_alike({"agent": type(self).__name__, **settings, "weights": weights})

    def _trainer_state(self) -> TrainerState:
        """How far training is, for rewards that ask for it."""
        done, total = self.num_timesteps, self.total_timesteps or 0
        share = min(done / total, 1.0) if total else 0.0
        updates = round(self.n_updates / share) if share else 0
        return TrainerState(self.n_updates, updates, share, done, total)

    def _set_up_learn(
        self, total_timesteps: int, callback: Any, name: str | None, reset: bool, progress_bar: bool
    ) -> BaseCallback:
        if self.envs is None:
            raise ValueError(
                f"{type(self).__name__} was loaded without an environment, so it can predict but not learn; "
                f"pass one: {type(self).__name__}.load(path, env=...)"
            )
        self._check_processes()
        self.processes.duties["state"] = lambda: checkpoint.learned_by_all(self)
        if reset:
            self.num_timesteps = self.iterations = 0
            self.callback_states = []
            self.episodes.forget()
            self.total_timesteps = total_timesteps
        else:
            self.total_timesteps = total_timesteps + self.num_timesteps
        self.stopped = False
        self._steps_at_start, self._time_at_start = self.num_timesteps, time.perf_counter()
        if reset or self.last_obs is None:
            # Seeded once: another call of learn() goes on with new episodes, it does not repeat the first ones.
            self.last_obs, _ = self.envs.reset(seed=self._env_seed)
            if self.text_env is not None and self.text_env is not self.envs.unwrapped:
                self.text_env.reset(seed=self._env_seed)
            self._env_seed = None
            self.waiting[:] = False
            self.episodes.begin(self.num_envs)
        if not self.processes.is_main:
            self._logger = Logger(None, [])
        elif not self._custom_logger:
            name = name or type(self).__name__
            self._logger = configure_logger(self.verbose, self.tensorboard_log, name, reset)
        if not self.processes.is_main:
            callback, progress_bar = None, False
        callbacks = [] if callback is None else callback if isinstance(callback, list) else [callback]
        callbacks = [c if isinstance(c, BaseCallback) else ConvertCallback(c) for c in callbacks]
        if progress_bar:
            from agents.callbacks.progress import ProgressCallback

            callbacks.append(ProgressCallback())
        self.callback = CallbackList(callbacks)
        self.callback.init_callback(self)
        return self.callback

    def count_steps(self, steps: int, done: np.ndarray, **step: Any) -> bool:
        """Count env steps and call the callbacks as stable-baselines3 does.

        Args:
            steps: Env steps taken at once.
            done: bool ``[N]``, episodes that ended with them.
            **step: What the callbacks find in their ``locals``: ``actions``, ``rewards``, ``new_obs``, ``infos``, ...

        Returns:
            Whether to go on; False asks to stop.
        """
        self.num_timesteps += steps
        self._callback_locals = {"dones": done, "self": self, **step}
        self.callback.update_locals(self._callback_locals)
        if not self.callback.on_step():
            self.stopped = True
        return not self.stopped

    def record_text_episodes(self, episodes: Any) -> None:
        """Note what an environment's fused way has produced, for the log."""
        self.episodes.add_text(episodes)

    def dump_logs(self, iteration: int = 0, rollout: Rollout | None = None) -> None:
        """Write a line of the log, as after each rollout.

        Args:
            iteration: Number of the rollout; 0 leaves it out.
            rollout: What to log sums of; None where one is still being collected.
        """
        self._forget_written()
        seconds = max(time.perf_counter() - self._time_at_start, 1e-9)
        record = self.logger.record
        self.episodes.log(record, rollout, self.policy.whole_episodes)
        fps = (self.num_timesteps - self._steps_at_start) / seconds
        if iteration:
            record("time/iterations", iteration, exclude="tensorboard")
        record("time/fps", int(fps))
        record("time/time_elapsed", int(seconds), exclude="tensorboard")
        record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        if self.policy.whole_episodes:
            record("time/tokens_per_second", int(fps))
            record("memory/peak_mb", _peak_memory_mb(self.device))
            if self.kl_coef is not None:
                record("objective/kl_coef", self.kl_coef)
        values, excluded = dict(self.logger.name_to_value), dict(self.logger.name_to_excluded)
        self.latest = values
        self.logger.dump(self.num_timesteps)
        # Callbacks read the last update from the logger while the next rollout is collected, as they can in
        # stable-baselines3, which writes its line before it learns.
        self._written = [name for name in values if name.startswith("train/")]
        for name in self._written:
            self.logger.name_to_value[name], self.logger.name_to_excluded[name] = values[name], excluded[name]

    def _forget_written(self) -> None:
        """Take what has been written off the logger, so that it is not written again."""
        for name in self._written:
            self.logger.name_to_value.pop(name, None)
            self.logger.name_to_excluded.pop(name, None)
        self._written = []


def update_ended(callback: BaseCallback) -> bool:
    """Tell callbacks that have an ``on_update_end`` that the update is done; False asks to stop.

    stable-baselines3 calls nothing between an update and its line of the log; what is measured of the new policy
    belongs into that line.
    """
    if isinstance(callback, CallbackList):
        answers = [update_ended(each) for each in callback.callbacks]  # every one is told
        return all(answers)
    ended = getattr(callback, "on_update_end", None)
    return True if ended is None else bool(ended())


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
