"""One wrapper that tells an environment which policy acts in it: CleanRL, Tianshou, TorchRL, a loop of your own.

``step(token)`` cannot know the acting policy's log-probability, so an environment that charges a KL has to be told.
Wrapped last, with a function of what the agent sees and does, it charges the right one::

    envs = gym.make_vec("TextRLHF-v0", num_envs=64)
    envs = textrl_env.ActingPolicy(envs, lambda observations, actions: my_policy.log_prob(observations, actions))

The function gets the very observations that the agent got, through all the wrappers inside this one. Around a
``gymnasium.vector.AsyncVectorEnv``, whose environments live in other processes and cannot be told, the KL that they
have charged is taken back and the right one charged in its place.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from textrl_env.kl import LogProb, estimate_kl
from textrl_env.protocols import BindsPolicy


class ActingPolicy(gym.Wrapper):
    """Tells an environment who acts; around a vector env it is a :class:`VectorActingPolicy`.

    Args:
        env: An environment that charges a KL, or a vector env of them, wrapped or not.
        log_prob: ``log_prob(observation, action)``: the acting policy's log-probability in nats of an action in an
            observation, a float; of a vector env's batches ``[N]``. None is told later, by ``bind_policy``.

    Raises:
        TypeError: The environment charges no KL.
    """

    def __new__(cls, env: gym.Env | gym.vector.VectorEnv, log_prob: LogProb | None = None) -> Any:
        if isinstance(env, gym.vector.VectorEnv):
            return VectorActingPolicy(env, log_prob)
        return super().__new__(cls)

    def __init__(self, env: gym.Env, log_prob: LogProb | None = None) -> None:
        super().__init__(env)
        if not isinstance(env.unwrapped, BindsPolicy):
            raise TypeError(_charges_none(env))
        self._observation: Any = None
        self._value = 0.0
        self.bind_policy(log_prob)

    def bind_policy(self, log_prob: LogProb | None) -> None:
        """Tell the environment who acts from now on; None unbinds."""
        self._log_prob = log_prob
        self.env.unwrapped.bind_policy(None if log_prob is None else lambda observation, action: self._value)

    def reset(self, **kwargs: Any):
        self._observation, info = self.env.reset(**kwargs)
        return self._observation, info

    def step(self, action: Any):
        if self._log_prob is not None:
            self._value = float(np.asarray(self._log_prob(self._observation, action)))
        self._observation, *rest = self.env.step(action)
        return self._observation, *rest


class VectorActingPolicy(gym.vector.VectorWrapper):
    """Tells a vector env who acts; see :class:`ActingPolicy`.

    Attributes:
        corrects: Whether the KL is put right here, since the environments are out of reach.
    """

    def __init__(self, env: gym.vector.VectorEnv, log_prob: LogProb | None = None) -> None:
        super().__init__(env)
        base = env.unwrapped
        self.corrects = isinstance(base, AsyncVectorEnv) and bool(base.metadata.get("charges_kl"))
        inner = [each.unwrapped for each in getattr(base, "envs", [])]
        if not (
            self.corrects or isinstance(base, BindsPolicy) or (inner and isinstance(inner[0], BindsPolicy))
        ):
            raise TypeError(_charges_none(env))
        self._observations: Any = None
        self._values = np.zeros(env.num_envs)
        self._kl_sums = np.zeros(env.num_envs)
        if self.corrects:
            # Something definite to take back, and no warning in each process that no policy is bound.
            uniform = -math.log(int(env.single_action_space.n))
            base.call("bind_policy", functools.partial(_constant, uniform))
            self._kl_coef = float(base.get_attr("kl_coef")[0])
            self.kl_estimator = base.get_attr("kl_estimator")[0]
        self.bind_policy(log_prob)

    @property
    def autoreset_mode(self) -> AutoresetMode | None:
        """As the env within has it; TorchRL reads it off the outermost wrapper."""
        mode = self.env.metadata.get("autoreset_mode")
        return None if mode is None else AutoresetMode(mode)

    @property
    def kl_coef(self) -> float:
        """Weight of the KL in the reward, of all slots."""
        return self._kl_coef if self.corrects else self.env.unwrapped.kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        if self.corrects:
            self.env.unwrapped.set_attr("kl_coef", value)
            self._kl_coef = value
        else:
            self.env.unwrapped.kl_coef = value

    def bind_policy(self, log_prob: LogProb | None) -> None:
        """Tell the environments who acts from now on; None unbinds."""
        self._log_prob = log_prob
        if self.corrects:
            return
        base = self.env.unwrapped
        if isinstance(base, BindsPolicy):
            base.bind_policy(None if log_prob is None else lambda observations, actions: self._values)
        for slot, inner in enumerate(getattr(base, "envs", [])):
            inner.unwrapped.bind_policy(None if log_prob is None else functools.partial(self._value_of, slot))

    def _value_of(self, slot: int, observation: Any, action: Any) -> float:
        return float(self._values[slot])

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None):
        self._observations, infos = self.env.reset(seed=seed, options=options)
        mask = (options or {}).get("reset_mask")
        self._kl_sums[slice(None) if mask is None else mask] = 0.0
        return self._observations, infos

    def step(self, actions: Any):
        if self._log_prob is not None:
            self._values = self._log_probs(actions)
        self._observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if self.corrects and self._log_prob is not None:
            rewards = self._corrected(np.array(rewards, dtype=np.float64), terminated | truncated, infos)
        return self._observations, rewards, terminated, truncated, infos

    def _log_probs(self, actions: Any) -> np.ndarray:
        values = np.asarray(self._log_prob(self._observations, actions), dtype=np.float64)
        if values.shape != (self.num_envs,):
            raise ValueError(
                f"log_prob returned shape {values.shape}, expected ({self.num_envs},): one log-probability for each "
                "slot"
            )
        return values

    def _corrected(self, rewards: np.ndarray, done: np.ndarray, infos: dict[str, Any]) -> np.ndarray:
        """The rewards with this policy's KL in place of a uniform one's; ``infos`` are put right as well."""
        same_step = self.env.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP
        ends = infos.get("final_info", {}) if same_step else infos
        for slot in range(self.num_envs):
            info = ends if done[slot] else infos
            if not np.any(info.get("_ref_logprob", np.zeros(self.num_envs, bool))[slot]):
                self._kl_sums[slot] = 0.0  # NEXT_STEP: this step was the reset of an episode that had ended
                continue
            kl = float(estimate_kl(self._values[slot] - info["ref_logprob"][slot], self.kl_estimator))
            rewards[slot] += self._kl_coef * (float(info["kl"][slot]) - kl)
            self._kl_sums[slot] += kl
            info["kl"][slot] = kl
            if done[slot]:
                info["kl_sum"][slot] = self._kl_sums[slot]
                self._kl_sums[slot] = 0.0
        return rewards


def _constant(value: float, observation: Any, action: Any) -> float:
    return value


def _charges_none(env: Any) -> str:
    return (
        f"ActingPolicy tells an environment who acts because its reward charges a KL, and {env} charges none; "
        "TextRLHF-v0 and TokenTree-v0 do, alone or in a vector env"
    )
