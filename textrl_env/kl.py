"""The KL contract: who acts, how far that is from the reference, and what it costs.

Shared by every environment whose reward is ``1[t = T] * score - kl_coef * kl_t``. Pure numpy; the
estimators are those of Schulman, "Approximating KL divergence" (2020), written for samples from the acting
policy ``pi`` with the log-ratio ``k1 = log pi(a|s) - log pi_ref(a|s)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from reward_models.warning import warn
from textrl_env.core import Dynamics, DynamicsEnv, DynamicsVectorEnv
from textrl_env.errors import check_choice

#: ``log_prob(observation, action)``: the acting policy's log-probability of what was done.
LogProb = Callable[[Any, Any], Any]

KL_ESTIMATORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio**2,
    "k3": lambda log_ratio: np.expm1(-log_ratio) + log_ratio,
}


def estimate_kl(log_ratio: np.ndarray, estimator: str = "k1") -> np.ndarray:
    """The KL estimate for each sampled token.

    Args:
        log_ratio: ``log pi(a|s) - log pi_ref(a|s)`` of sampled actions, any shape, in nats.
        estimator: "k1" (unbiased), "k2" (half the square), or "k3" (unbiased, never negative).
    """
    check_choice("kl_estimator", estimator, KL_ESTIMATORS)
    return KL_ESTIMATORS[estimator](log_ratio)


def check_kl_arguments(kl_coef: float, kl_estimator: str) -> None:
    """Raise a ValueError for a negative or non-finite coefficient or an unknown estimator."""
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef must be a finite number >= 0, got {kl_coef!r}")
    check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS)


class KLDynamics(Dynamics):
    """Dynamics whose reward charges the acting policy for leaving a reference.

    Subclasses call :meth:`acting_log_prob` in their step and set ``kl_coef`` and ``kl_estimator`` here.
    """

    def __init__(self, num_slots: int, kl_coef: float, kl_estimator: str) -> None:
        super().__init__(num_slots)
        check_kl_arguments(kl_coef, kl_estimator)
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator
        self.log_prob: LogProb | None = None
        self._warned = False

    def acting_log_prob(self, actions: np.ndarray) -> np.ndarray:
        """``log pi(a|s)`` of the acting policy, float64 ``[N]``; uniform when no policy is bound."""
        if self.log_prob is None:
            if not self._warned:
                warn(
                    "No acting policy is bound, so the KL takes it to be uniform (as action_space.sample() "
                    "is). Tell the env who acts: env.unwrapped.bind_policy(log_prob)."
                )
                self._warned = True
            return np.full(self.num_slots, -math.log(self.action_space.n))
        log_prob = np.asarray(self.log_prob(self.observe(), actions), dtype=np.float64)
        if log_prob.shape != (self.num_slots,):
            raise ValueError(
                f"the bound log_prob returned shape {log_prob.shape}, expected ({self.num_slots},): "
                "one log-probability for each slot"
            )
        return log_prob


class KLEnv(DynamicsEnv):
    """A single env that can be told who acts, and whose KL coefficient can be changed between episodes."""

    dynamics: KLDynamics

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Gymnasium's AsyncVectorEnv shows of the envs in its worker processes nothing but their metadata.
        cls.metadata = {**cls.metadata, "charges_kl": True}

    def bind_policy(self, log_prob: LogProb | None) -> None:
        """Tell the env who acts.

        Args:
            log_prob: ``log_prob(observation, action) -> float``, the acting policy's log-probability in nats
                of one action in one observation; None unbinds.
        """

        def batched(observations: Any, actions: np.ndarray) -> np.ndarray:
            return np.array([float(log_prob(self._first(observations), actions[0].item()))])

        self.dynamics.log_prob = None if log_prob is None else batched

    @property
    def kl_coef(self) -> float:
        """Weight of the KL in the reward; an adaptive controller may set it between episodes."""
        return self.dynamics.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        check_kl_arguments(value, self.dynamics.kl_estimator)
        self.dynamics.kl_coef = value

    @property
    def kl_estimator(self) -> str:
        """How each token's KL is estimated: "k1", "k2" or "k3"."""
        return self.dynamics.kl_estimator


class KLVectorEnv(DynamicsVectorEnv):
    """A vector env that can be told who acts, and whose KL coefficient can be changed between episodes."""

    dynamics: KLDynamics

    def bind_policy(self, log_prob: LogProb | None) -> None:
        """Tell the env who acts.

        Args:
            log_prob: ``log_prob(observations, actions) -> array [N]``, the acting policy's log-probabilities
                in nats; None unbinds.
        """
        self.dynamics.log_prob = log_prob

    kl_coef = KLEnv.kl_coef
    kl_estimator = KLEnv.kl_estimator
