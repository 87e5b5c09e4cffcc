"""The interface of a policy: what acts, and what says log-probabilities, values and entropies again."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.policies.actions import to_space
from agents.rollouts.observations import add_batch, copied, equal, is_single, row_of
from agents.rollouts.rollout import Rollout


class Evaluation(NamedTuple):
    """What a policy says of a rollout: log_probs, values (None without a critic), entropy, each ``[B, T]``."""

    log_probs: Tensor
    values: Tensor | None
    entropy: Tensor


class Policy(nn.Module):
    """The interface of a policy; subclass it to plug in another architecture.

    Attributes:
        whole_episodes: Whether it can only evaluate whole episodes (sequence models).
        has_critic: Whether ``values`` mean anything.
        autocast: Whether evaluation runs in bfloat16.
        flat: Whether the parameters are few and of one kind, so that the optimiser may keep them as one vector.
    """

    whole_episodes = False
    autocast = False
    flat = False

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, critic: str | None
    ) -> None:
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space
        self.has_critic = critic is not None
        self.generator: torch.Generator | None = None
        self._last: tuple[Any, np.ndarray, np.ndarray] | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def critic_parameters(self) -> list[nn.Parameter]:
        """The weights that only the critic has, which may have a learning rate of their own; none by default."""
        return []

    def act(self, observation: Any, deterministic: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Choose actions for a batch of observations.

        Returns:
            actions ``[N]`` (or ``[N, ...]``), those of the action space but for clipping; log_probs float64 ``[N]``;
            values float64 ``[N]``.
        """
        raise NotImplementedError

    def prepare(self, rollout: Rollout) -> None:
        """Called before the update that evaluates these rows: what evaluation needs is moved to the device now."""

    def evaluate(self, rollout: Rollout) -> Evaluation:
        """Log-probabilities, values and entropies of what was done, with gradient."""
        raise NotImplementedError

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        """``Rollout.inputs`` from ``T`` batches of observations and the actions ``[N, T]``."""
        raise NotImplementedError

    def predict_values(self, observation: Any) -> np.ndarray:
        """The critic's values of a batch of observations, float64 ``[N]``."""
        raise NotImplementedError

    def log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        """Log-probabilities ``[N]`` of given actions; those of the last :meth:`act` are not computed twice."""
        if self._last is not None and equal(self._last[:2], (observation, action)):
            return self._last[2]
        return self._log_prob(observation, action)

    def slot_log_prob(self, slot: int, observation: Any, action: Any) -> float:
        """The same of one observation, that of ``slot`` in the batch that has just acted.

        Single envs inside a vector env ask one by one; to answer each from the batch that they are part of keeps
        what a policy has cached of all slots.
        """
        if self._last is not None and slot < len(self._last[2]):
            acted, actions, log_probs = self._last
            if equal((row_of(acted, slot), actions[slot]), (observation, action)):
                return float(log_probs[slot])
        return float(self.log_prob(add_batch(observation), np.asarray(action)[None])[0])

    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def predict(
        self,
        observation: Any,
        state: tuple | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple | None]:
        """Actions for one observation or a batch of them; see :meth:`agents.base.Agent.predict`."""
        single = is_single(self.observation_space, observation)
        # The caller may write into what it has handed over; what a policy remembers must not change with it.
        observation = add_batch(copied(observation)) if single else copied(observation)
        actions = self.to_env(self.act(observation, deterministic)[0])
        return (actions[0] if single else actions), state

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Actions as the environment takes them: of its dtype, continuous ones clipped to the space."""
        return to_space(self.action_space, actions)

    def weights_changed(self) -> None:
        """Called after every update; forget what was computed with the old weights."""
        self._last = None


def make_linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer with an orthogonal weight of the given gain (0: zeros) and no bias to begin with."""
    layer = nn.Linear(inputs, outputs)
    if gain == 0.0:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
