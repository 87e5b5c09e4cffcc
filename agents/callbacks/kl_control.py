"""KL coefficients that change while an agent learns: steered to a KL of one's choice, or falling to a target.

:class:`AdaptiveKL` is the controller of Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences"
(section 2.2, arXiv 1909.08593)::

    e = clip(KL / target - 1, -0.2, 0.2)
    kl_coef <- kl_coef * (1 + e * episodes / horizon)

:class:`AnnealKL` lets the coefficient fall, and :class:`StopAtKL` ends learning where a budget is used up. All are
callbacks, so they go with any agent here::

    PPO("auto", "TextRLHF-v0").learn(200_000, AdaptiveKL(target=4.0))
    PPO("auto", "TextRLHF-v0").learn(200_000, AnnealKL(start=1.0, target=0.05))

The coefficient is the environment's own, so checkpoints hold it and a resumed run goes on with it. Left out:
integral and derivative terms, and stable-baselines3's own agents, whose rollouts know no reference.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from agents.rollouts.rollout import Rollout

#: The relative error is clipped to plus and minus this.
MAX_ERROR = 0.2


def episode_kl(rollout: Rollout) -> tuple[float, int]:
    """The KL from the reference, as the acting policy's samples show it.

    Args:
        rollout: Of an environment with a reference. Only steps that the policy wrote count.

    Returns:
        ``log pi - log pi_ref`` in nats, summed over an episode and averaged over episodes (NaN if none has ended), and
        the number of episodes.
    """
    episodes = int(rollout.done.sum())
    if rollout.ref_log_probs is None:  # demonstrations, which nobody has written here
        return math.nan, 0
    total = float(((rollout.log_probs - rollout.ref_log_probs) * rollout.mask).double().sum())
    return (total / episodes if episodes else math.nan), episodes


def _coefficient(callback: BaseCallback) -> float:
    """The KL coefficient that a callback here is about to change.

    Raises:
        ValueError: The environment has no reference.
    """
    value = callback.model.kl_coef
    if value is None:
        raise ValueError(
            f"{type(callback).__name__} steers the kl_coef of an environment with a reference, and "
            f"{callback.model.envs} has none; TextRLHF-v0 and TokenTree-v0 do (stepped in this process, not in others)"
        )
    return value


def _check_positive(who: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{who}'s {name} must be a finite number > 0, got {value!r}")


class AdaptiveKL(BaseCallback):
    """Sets the environment's ``kl_coef`` after each rollout so that the KL comes to ``target``.

    What a rollout shows takes effect with the next one: rewards and losses of one rollout have one coefficient, which
    is also the one in its row of the log (``objective/kl_coef``). In a list of callbacks, it belongs before those that
    save.

    Args:
        target: KL per episode to aim for, in nats.
        horizon: Episodes over which the coefficient may change by the clipped error; small is fast.
        init: Coefficient that learning starts with; None is the environment's. A resumed run ignores it.
        verbose: As in stable-baselines3.

    Raises:
        ValueError: An argument is not positive; or, when learning starts, the environment has no reference, or the
            coefficient is 0, which no multiplication moves.
    """

    def __init__(
        self, target: float, horizon: float = 10_000, init: float | None = None, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        _check_positive("AdaptiveKL", target=target, horizon=horizon, init=init)
        self.target, self.horizon, self.init = target, horizon, init
        self._following: float | None = None

    def _on_training_start(self) -> None:
        self._following = None
        before = _coefficient(self)
        if self.init is not None and self.model.num_timesteps == 0:
            self.model.kl_coef = self.init
        elif before == 0:
            raise ValueError(
                "AdaptiveKL multiplies the KL coefficient, and kl_coef=0 stays 0; start it with "
                "AdaptiveKL(..., init=0.05) or the environment's kl_coef"
            )

    def updated(self, kl_coef: float, kl: float, episodes: int) -> float:
        """The coefficient after ``episodes`` episodes with a mean KL of ``kl`` nats."""
        error = min(max(kl / self.target - 1.0, -MAX_ERROR), MAX_ERROR)
        # More episodes than the horizon must not turn the sign of the coefficient.
        return kl_coef * max(1.0 + error * episodes / self.horizon, 0.1)

    def _on_rollout_end(self) -> None:
        kl, episodes = episode_kl(self.locals["rollout"])
        if episodes:
            self._following = self.updated(self.model.kl_coef, kl, episodes)

    def _on_rollout_start(self) -> None:
        self._apply()

    def _on_training_end(self) -> None:
        self._apply()

    def _apply(self) -> None:
        if self._following is not None:
            self.model.kl_coef, self._following = self._following, None

    def _on_step(self) -> bool:
        return True


class AnnealKL(BaseCallback):
    """Lets the environment's ``kl_coef`` go from ``start`` to ``target``, a straight line in its logarithm.

    The optimum of a large coefficient is near the reference and easy to find; followed slowly, it leads to the
    optimum of a small one, past the local optima that a policy gradient falls into when it starts there
    (``python benchmarks/optimality.py`` shows how far that goes).

    The coefficient depends on the agent's own counters of timesteps and on nothing else, so a resumed run goes on
    where it was. In a list of callbacks, it belongs before those that save.

    Args:
        start: The first coefficient.
        target: The last one.
        share: Share of the timesteps to learn for after which the target is reached, in (0, 1].
        verbose: As in stable-baselines3.

    Raises:
        ValueError: An argument is out of its range; or, when learning starts, the environment has no reference.
    """

    def __init__(self, start: float, target: float, share: float = 0.7, verbose: int = 0) -> None:
        super().__init__(verbose)
        _check_positive("AnnealKL", start=start, target=target, share=share)
        if share > 1:
            raise ValueError(f"AnnealKL's share must be at most 1, the whole of learning, got {share!r}")
        self.start, self.target, self.share = start, target, share

    def at(self, progress: float) -> float:
        """The coefficient after this share of the timesteps."""
        return self.start * (self.target / self.start) ** min(progress / self.share, 1.0)

    def _on_training_start(self) -> None:
        _coefficient(self)

    def _on_rollout_start(self) -> None:
        self._apply()

    def _on_training_end(self) -> None:
        self._apply()

    def _apply(self) -> None:
        # The agent's counters and not the callback's, which do not count what was before a run was resumed.
        self.model.kl_coef = self.at(self.model.num_timesteps / max(self.model.total_timesteps, 1))

    def _on_step(self) -> bool:
        return True


#: Episodes whose mean says that a budget is used up; one rollout may have few.
_BUDGET_EPISODES = 64


def check_budget(kl_budget: float | None) -> None:
    """Raise a ValueError unless a KL budget is None or a finite number of nats above 0."""
    _check_positive("A KL budget", nats=kl_budget)


class StopAtKL(BaseCallback):
    """Stops learning when the policy is further from its reference than a budget.

    The KL is that of the last 64 episodes or more, so a rollout that has already left the budget is not learned from.

    Args:
        budget: KL of an episode in nats.
        verbose: As in stable-baselines3; 0 says nothing.

    Attributes:
        reached: The KL that has stopped it; None where it has not.

    Raises:
        ValueError: The budget is not positive; or, when learning starts, the environment has no reference.
    """

    def __init__(self, budget: float, verbose: int = 1) -> None:
        super().__init__(verbose)
        check_budget(budget)
        self.budget = budget
        self.reached: float | None = None
        self._last: list[tuple[float, int]] = []

    def _on_training_start(self) -> None:
        _coefficient(self)
        self.reached, self._last = None, []

    def get_state(self) -> dict[str, Any]:
        """The KL and the episodes of the rollouts that the mean is taken over."""
        return {"last": self._last}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`get_state` returned."""
        self._last = [(float(kl), int(episodes)) for kl, episodes in state["last"]]

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        kl, episodes = episode_kl(self.locals["rollout"])
        if not episodes:
            return
        self._last.append((kl, episodes))
        while sum(n for _, n in self._last[1:]) >= _BUDGET_EPISODES:
            self._last.pop(0)
        total = sum(n for _, n in self._last)
        mean = sum(kl * n for kl, n in self._last) / total
        if total >= _BUDGET_EPISODES and mean > self.budget:
            self.reached = mean
            self.model.stopped = True
            if self.verbose:
                line = f"{mean:.2f} nats from the reference, beyond the budget of {self.budget:g}"
                print(
                    f"stopped at {self.model.num_timesteps:,} timesteps: {line}", file=sys.stderr, flush=True
                )
