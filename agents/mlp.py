"""A multi-layer perceptron as policy, and how observations become its features."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from agents.policy import Evaluation, Policy, make_linear
from agents.rollout import Rollout
from textrl_env.decoding import sample_actions
from textrl_env.errors import check_choice

#: Integer spaces up to this many values are one-hot encoded, wider ones read as numbers.
_ONE_HOT_LIMIT = 64
_FEATURE_LIMIT = 100_000


def feature_size(space: spaces.Space) -> int:
    """Number of features :func:`encode` makes of one observation of ``space``.

    Raises:
        ValueError: A space an MLP cannot take.
    """
    if isinstance(space, spaces.Dict):
        return sum(feature_size(child) for child in space.spaces.values())
    if isinstance(space, spaces.Discrete):
        size = int(space.n)
    elif isinstance(space, spaces.MultiDiscrete):
        size = int(space.nvec.sum())
    elif isinstance(space, spaces.MultiBinary):
        size = int(np.prod(space.shape))
    elif isinstance(space, spaces.Box):
        size = int(np.prod(space.shape)) * (_one_hot_width(space) or 1)
    else:
        raise ValueError(
            f"MlpPolicy cannot take the observation space {space}; it takes Box, Discrete, MultiDiscrete, "
            "MultiBinary and Dict of these (a FlattenObservation wrapper may help)"
        )
    if size > _FEATURE_LIMIT:
        raise ValueError(
            f"MlpPolicy would turn the observation space {space} into {size} features; "
            'text environments want policy="CausalLMPolicy"'
        )
    return size


def _one_hot_width(space: spaces.Box) -> int:
    """Number of values of a narrow integer box; 0 for any other box."""
    if space.dtype.kind not in "iu" or space.dtype == np.uint8:
        return 0
    width = int(space.high.max()) - int(space.low.min()) + 1
    return width if width <= _ONE_HOT_LIMIT else 0


def encode(space: spaces.Space, observation: Any) -> np.ndarray:
    """Observations with any leading shape -> float32 features ``[..., feature_size(space)]``."""
    if isinstance(space, spaces.Dict):
        parts = [encode(child, observation[name]) for name, child in space.spaces.items()]
        return np.concatenate(parts, axis=-1)
    x = np.asarray(observation)
    if isinstance(space, spaces.Discrete):
        return _one_hot(x - int(space.start), int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        hot = [_one_hot(x[..., i], int(n)) for i, n in enumerate(space.nvec)]
        return np.concatenate(hot, axis=-1)
    leading = x.shape[: x.ndim - len(space.shape)]
    if isinstance(space, spaces.Box) and (width := _one_hot_width(space)):
        hot = _one_hot(x - int(space.low.min()), width)
        return hot.reshape(*leading, -1)
    scale = 255.0 if x.dtype == np.uint8 else 1.0
    return (x.astype(np.float32) / np.float32(scale)).reshape(*leading, -1)


def _one_hot(x: np.ndarray, width: int) -> np.ndarray:
    hot = np.zeros((*x.shape, width), dtype=np.float32)
    np.put_along_axis(hot, x[..., None].astype(np.int64), 1.0, axis=-1)
    return hot


class MlpPolicy(Policy):
    """A multi-layer perceptron, with actor and critic of its own or a shared trunk.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary or Dict of these.
        action_space: Discrete, or Box (a diagonal Gaussian with a state-independent standard deviation).
        critic: "separate" network, "shared" trunk, or None.
        net_arch: Hidden sizes.
        activation: "tanh" or "relu".
        log_std_init: Initial log standard deviation of continuous actions.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "separate",
        net_arch: tuple[int, ...] | list[int] = (64, 64),
        activation: str = "tanh",
        log_std_init: float = 0.0,
    ) -> None:
        super().__init__(observation_space, action_space, critic)
        check_choice("critic", critic, ("separate", "shared", None))
        check_choice("activation", activation, ("tanh", "relu"))
        self.discrete = isinstance(action_space, spaces.Discrete)
        if not self.discrete and not isinstance(action_space, spaces.Box):
            raise ValueError(
                f"MlpPolicy acts in Discrete and Box action spaces, got {action_space}; "
                "a wrapper that flattens the actions may help"
            )
        sizes = [feature_size(observation_space), *net_arch]
        self.trunk = _mlp(sizes, activation)
        num_actions = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.action_head = make_linear(sizes[-1], num_actions, 0.01)
        self.value_trunk = _mlp(sizes, activation) if critic == "separate" else None
        self.value_head = None if critic is None else make_linear(sizes[-1], 1, 0.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((num_actions,), log_std_init))

    def _features(self, observation: Any) -> Tensor:
        # One memory layout, so that a matrix product rounds alike before and after a resume.
        features = np.ascontiguousarray(encode(self.observation_space, observation))
        return torch.from_numpy(features).to(self.device)

    def _values(self, features: Tensor, hidden: Tensor) -> Tensor | None:
        if self.value_head is None:
            return None
        hidden = hidden if self.value_trunk is None else self.value_trunk(features)
        return self.value_head(hidden).squeeze(-1)

    def _distribution_log_probs(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``[...]`` from the head's output ``[..., A]``."""
        if self.discrete:
            logits = out - out.logsumexp(-1, keepdim=True)
            log_probs = logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
            return log_probs, -(logits.exp() * logits).sum(-1)
        z = (actions.view(out.shape) - out) / self.log_std.exp()
        log_density = -0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        entropy = (self.log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum()
        return log_density.sum(-1), entropy.expand(out.shape[:-1])

    @torch.no_grad()
    def act(self, observation: Any, deterministic: bool = False):
        features = self._features(observation)
        hidden = self.trunk(features)
        out = self.action_head(hidden)
        if self.discrete:
            actions = sample_actions(out, self.generator, deterministic)
        else:
            noise = torch.empty_like(out).normal_(generator=self.generator) * (not deterministic)
            actions = (out + noise * self.log_std.exp()).view(-1, *self.action_space.shape)
        log_probs = self._distribution_log_probs(out, actions)[0].double().cpu().numpy()
        values = self._values(features, hidden)
        values = np.zeros(len(log_probs)) if values is None else values.double().cpu().numpy()
        actions = actions.cpu().numpy()
        self._last = (observation, actions, log_probs)
        return actions, log_probs, values

    def evaluate(self, rollout: Rollout) -> Evaluation:
        features = rollout.inputs["features"]  # [B, T, F]
        hidden = self.trunk(features)
        log_probs, entropy = self._distribution_log_probs(self.action_head(hidden), rollout.actions)
        return Evaluation(log_probs, self._values(features, hidden), entropy)

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        if isinstance(observations[0], dict):
            stacked: Any = {n: np.stack([o[n] for o in observations], axis=1) for n in observations[0]}
        else:
            stacked = np.stack(observations, axis=1)
        return {"features": torch.from_numpy(encode(self.observation_space, stacked))}  # [N, T, F]

    @torch.no_grad()
    def predict_values(self, observation: Any) -> np.ndarray:
        features = self._features(observation)
        return self._values(features, self.trunk(features)).double().cpu().numpy()

    @torch.no_grad()
    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        out = self.action_head(self.trunk(self._features(observation)))
        actions = torch.from_numpy(np.asarray(action)).to(self.device)
        return self._distribution_log_probs(out, actions)[0].double().cpu().numpy()


def _mlp(sizes: list[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [
            make_linear(inputs, outputs, math.sqrt(2)),
            nn.Tanh() if activation == "tanh" else nn.ReLU(),
        ]
    return nn.Sequential(*layers)
