"""A multi-layer perceptron as policy, and how observations become its features."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

from agents.policies.base import Evaluation, Policy, make_linear
from agents.rollouts.rollout import Rollout
from textrl_env.errors import check_choice

#: Integer spaces up to this many values are one-hot encoded, wider ones read as numbers.
_ONE_HOT_LIMIT = 64
_FEATURE_LIMIT = 100_000

#: Weight and bias of each layer.
_Layers = list[tuple[np.ndarray, np.ndarray]]


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

    It acts in numpy and learns in torch: for a handful of observations a torch operation costs several times
    its numbers.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary or Dict of these.
        action_space: Discrete, or Box (a diagonal Gaussian with a state-independent standard deviation).
        critic: "separate" network, "shared" trunk, or None.
        net_arch: Hidden sizes.
        activation: "tanh" or "relu".
        log_std_init: Initial log standard deviation of continuous actions.
    """

    flat = True

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
        self.activation = activation
        self.trunk = _mlp(sizes, activation)
        num_actions = int(action_space.n) if self.discrete else int(np.prod(action_space.shape))
        self.action_head = make_linear(sizes[-1], num_actions, 0.01)
        self.value_trunk = _mlp(sizes, activation) if critic == "separate" else None
        self.value_head = None if critic is None else make_linear(sizes[-1], 1, 0.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.full((num_actions,), log_std_init))
        self._arrays: tuple[int, list[_Layers]] | None = None

    # -- in numpy ------------------------------------------------------------------------------------------

    def _networks(self) -> list[_Layers]:
        """Trunk, action head, value trunk and value head as numpy arrays; on the CPU the weights' own memory."""
        address = self.action_head.weight.data_ptr()
        if self._arrays is None or self._arrays[0] != address:
            parts = (self.trunk, self.action_head, self.value_trunk, self.value_head)
            self._arrays = address, [_as_arrays(part) for part in parts]
        return self._arrays[1]

    def _outputs(self, observation: Any, actor: bool = True, critic: bool = True) -> list[np.ndarray | None]:
        """Head outputs ``[N, A]`` and values float64 ``[N]``, None where not asked for (or not to be had)."""
        # One memory layout, so that a matrix product rounds alike before and after a resume.
        features = np.ascontiguousarray(encode(self.observation_space, observation))
        trunk, action_head, value_trunk, value_head = self._networks()
        out = values = None
        if actor or not value_trunk:
            hidden = self._through(features, trunk)
        if actor:
            out = _affine(hidden, *action_head[0])
        if critic and value_head:
            hidden = self._through(features, value_trunk) if value_trunk else hidden
            values = _affine(hidden, *value_head[0])[:, 0].astype(np.float64)
        return [out, values]

    def _through(self, x: np.ndarray, layers: _Layers) -> np.ndarray:
        for weight, bias in layers:
            x = _affine(x, weight, bias)
            np.tanh(x, out=x) if self.activation == "tanh" else np.maximum(x, 0.0, out=x)
        return x

    def _log_std(self) -> np.ndarray:
        return self.log_std.detach().cpu().numpy()

    def _log_prob_of(self, out: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Log-probabilities, float64 ``[N]``, of given actions from the head's output ``[N, A]``."""
        if self.discrete:
            shifted = out.astype(np.float64) - out.max(-1, keepdims=True)
            return shifted[np.arange(len(out)), actions] - np.log(np.exp(shifted).sum(-1))
        log_std = self._log_std().astype(np.float64)
        z = (actions.reshape(out.shape) - out) / np.exp(log_std)
        return (-0.5 * z**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def _draw(self, out: np.ndarray) -> np.ndarray:
        noise = torch.empty(out.shape, device=self.action_head.weight.device)
        if self.discrete:  # the Gumbel trick
            noise = noise.exponential_(generator=self.generator).cpu().numpy()
            return (out - np.log(noise)).argmax(-1)
        noise = noise.normal_(generator=self.generator).cpu().numpy()
        return out + noise * np.exp(self._log_std())

    def act(self, observation: Any, deterministic: bool = False):
        out, values = self._outputs(observation)
        if deterministic:
            chosen = out.argmax(-1) if self.discrete else out
        else:
            chosen = self._draw(out)
        actions = chosen if self.discrete else chosen.reshape(-1, *self.action_space.shape)
        log_probs = self._log_prob_of(out, actions)
        self._last = (observation, actions, log_probs)
        return actions, log_probs, np.zeros(len(out)) if values is None else values

    def predict_values(self, observation: Any) -> np.ndarray:
        return self._outputs(observation, actor=False)[1]

    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        return self._log_prob_of(self._outputs(observation, critic=False)[0], np.asarray(action))

    def weights_changed(self) -> None:
        super().weights_changed()
        self._arrays = None

    # -- in torch ------------------------------------------------------------------------------------------

    def evaluate(self, rollout: Rollout) -> Evaluation:
        features = rollout.inputs["features"]  # [B, T, F]
        shape = features.shape[:2]
        rows = features.flatten(0, 1)
        hidden = self._forward(self.trunk, rows)
        out = self.action_head.forward(hidden)
        log_probs, entropy = self._distribution(out, rollout.actions.flatten(0, 1))
        values = None
        if self.value_head is not None:
            hidden = hidden if self.value_trunk is None else self._forward(self.value_trunk, rows)
            values = self.value_head.forward(hidden).view(shape)
        return Evaluation(log_probs.view(shape), values, entropy.view(shape))

    def _forward(self, trunk: nn.Sequential, x: Tensor) -> Tensor:
        # Calling a module costs as much as the sums of a small layer, and so does fresh memory.
        activate = torch.tanh_ if self.activation == "tanh" else torch.relu_
        for layer in trunk:
            x = layer.forward(x) if isinstance(layer, nn.Linear) else activate(x)
        return x

    def _distribution(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``[n]`` from the head's output ``[n, A]``."""
        if self.discrete:
            log_probs = out.log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            return -F.nll_loss(log_probs, actions.long(), reduction="none"), entropy
        z = (actions.view(out.shape) - out) / self.log_std.exp()
        log_density = -0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        entropy = (self.log_std + 0.5 + 0.5 * math.log(2 * math.pi)).sum()
        return log_density.sum(-1), entropy.expand(len(out))

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        if isinstance(observations[0], dict):
            stacked: Any = {n: np.stack([o[n] for o in observations], axis=1) for n in observations[0]}
        else:
            stacked = np.stack(observations, axis=1)
        return {"features": torch.from_numpy(encode(self.observation_space, stacked))}  # [N, T, F]


def _as_arrays(part: nn.Module | None) -> _Layers:
    modules = [] if part is None else part.modules()
    layers = [module for module in modules if isinstance(module, nn.Linear)]
    return [tuple(p.detach().cpu().numpy() for p in (layer.weight, layer.bias)) for layer in layers]


def _affine(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x @ weight.T
    x += bias
    return x


def _mlp(sizes: list[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [
            make_linear(inputs, outputs, math.sqrt(2)),
            nn.Tanh() if activation == "tanh" else nn.ReLU(),
        ]
    return nn.Sequential(*layers)
