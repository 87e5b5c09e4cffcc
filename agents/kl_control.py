"""The adaptive KL controller: a KL coefficient that steers the policy to a KL of one's choice.

    e = clip(KL / target - 1, -0.2, 0.2)
    kl_coef <- kl_coef * (1 + e * episodes / horizon)

(Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2, arXiv 1909.08593.) A callback,
so it goes with any agent here::

    PPO("auto", "TextRLHF-v0").learn(200_000, AdaptiveKL(target=4.0))

The coefficient is the environment's own, so checkpoints hold it and a resumed run goes on with it. Left out:
integral and derivative terms, and stable-baselines3's own agents, whose rollouts know no reference.
"""

from __future__ import annotations

import math

from stable_baselines3.common.callbacks import BaseCallback

from agents.rollout import Rollout

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
    total = float(((rollout.log_probs - rollout.ref_log_probs) * rollout.mask).double().sum())
    return (total / episodes if episodes else math.nan), episodes


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
        for name, value in (("target", target), ("horizon", horizon), ("init", init)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"AdaptiveKL's {name} must be a finite number > 0, got {value!r}")
        self.target, self.horizon, self.init = target, horizon, init
        self._following: float | None = None

    def _on_training_start(self) -> None:
        self._following = None
        before = self.model.kl_coef
        if before is None:
            raise ValueError(
                f"AdaptiveKL steers the kl_coef of an environment with a reference, and {self.model.env} has none; "
                "TextRLHF-v0 and TokenTree-v0 do (stepped in this process, not in others)"
            )
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
