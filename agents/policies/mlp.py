"""A multi-layer perceptron as policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, make_proba_distribution
from torch import Tensor, nn

from agents.policies.actions import Categorical, make_distribution
from agents.policies.base import Evaluation, Policy, make_linear
from agents.policies.features import check_finite, encode_observation, feature_size
from agents.rollouts.observations import add_batch, copied, is_single, map_arrays, stack_steps
from agents.rollouts.rollout import Rollout
from reward_models.warning import warn
from textrl_env.errors import check_choice

#: Weight and bias of each layer.
_Layers = list[tuple[np.ndarray, np.ndarray]]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class MlpPolicy(Policy):
    """A multi-layer perceptron, with actor and critic of its own or a shared trunk.

    It acts in numpy and learns in torch: for a handful of observations a torch operation costs several times
    its numbers.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these to any depth.
        action_space: Discrete, MultiDiscrete, MultiBinary, or Box (a diagonal Gaussian with a state-independent
            standard deviation).
        critic: "separate" network, "shared" trunk, or None.
        net_arch: Hidden sizes; ``{"pi": sizes, "vf": sizes}`` for an actor and a separate critic that differ.
        activation: "tanh" or "relu".
        activation_fn: Any torch activation class, in place of ``activation``.
        ortho_init: Orthogonal initial weights; False leaves torch's own.
        log_std_init: Initial log standard deviation of continuous actions.
        use_sde: Noise of continuous actions that is a function of the state (gSDE).
    """

    flat = True

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "separate",
        net_arch: Sequence[int] | dict[str, Sequence[int]] = (64, 64),
        activation: str = "tanh",
        activation_fn: type[nn.Module] | None = None,
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        use_sde: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, critic)
        check_choice("critic", critic, ("separate", "shared", None))
        check_choice("activation", activation, _ACTIVATIONS)
        self.activation_fn = activation_fn or _ACTIVATIONS[activation]
        features = self._num_features()
        actor, value = _hidden_sizes(net_arch, critic)
        width = [features, *actor][-1]
        self.distribution = make_distribution(action_space, log_std_init, width if use_sde else None)
        #: Hidden sizes in force.
        self.net_arch = {"pi": actor, "vf": value}
        self.trunk = self._mlp([features, *actor])
        self.action_head = make_linear(width, self.distribution.outputs, 0.01)
        self.value_trunk = self._mlp([features, *value]) if critic == "separate" else None
        self.value_head = None if critic is None else make_linear([features, *value][-1], 1, 0.0)
        self.log_std = getattr(self.distribution, "log_std", None)
        if not ortho_init:
            self._draw_default_weights()
        self._arrays: tuple[int, list[_Layers | None]] | None = None

    def _num_features(self) -> int:
        """How many numbers the trunks read."""
        return feature_size(self.observation_space)

    def _mlp(self, sizes: list[int]) -> nn.Sequential:
        pairs = pairwise(sizes)
        layers = [(make_linear(*pair, math.sqrt(2)), self.activation_fn()) for pair in pairs]
        return nn.Sequential(*itertools.chain(*layers))

    def _draw_default_weights(self) -> None:
        """Torch's own initial weights, but for the critic's head, which starts at zero whatever is asked."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer is not self.value_head:
                layer.reset_parameters()

    def critic_parameters(self) -> list[nn.Parameter]:
        modules = [module for module in (self.value_trunk, self.value_head) if module is not None]
        return [parameter for module in modules for parameter in module.parameters()]

    # -- in numpy ------------------------------------------------------------------------------------------

    def _networks(self) -> list[_Layers | None]:
        """Trunk, action head, value trunk and value head as numpy arrays; on the CPU the weights' own memory."""
        address = self.action_head.weight.data_ptr()
        if self._arrays is None or self._arrays[0] != address:
            parts = (self.trunk, self.action_head, self.value_trunk, self.value_head)
            self._arrays = address, [_as_arrays(part) for part in parts]
        return self._arrays[1]

    def _features(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        """What the actor and the critic read of a batch of observations, float32 ``[N, F]`` each."""
        features = encode_observation(self.observation_space, observation)
        check_finite(features, observation)
        # One memory layout, so that a matrix product rounds alike before and after a resume.
        features = np.ascontiguousarray(features)
        return features, features

    def _outputs(self, observation: Any, actor: bool = True, critic: bool = True) -> list[np.ndarray | None]:
        """Head outputs ``[N, A]`` and values float64 ``[N]``, None where not asked for (or not to be had)."""
        features, for_critic = self._features(observation)
        _, action_head, value_trunk, value_head = self._networks()
        out = values = None
        if actor or value_trunk is None:
            hidden = self._hidden(features, 0)
        if actor:
            out = _affine(hidden, *action_head[0])
            if self.distribution.reads_hidden:
                out = np.concatenate([out, hidden], axis=-1)
        if critic and value_head:
            hidden = hidden if value_trunk is None else self._hidden(for_critic, 2)
            values = _affine(hidden, *value_head[0])[:, 0].astype(np.float64)
        return [out, values]

    def _hidden(self, x: np.ndarray, network: int) -> np.ndarray:
        """What a trunk makes of its features; ``network`` is its place in :meth:`_networks`."""
        if self.activation_fn not in _ACTIVATIONS.values():
            with torch.no_grad():
                trunk = (self.trunk, None, self.value_trunk)[network]
                return self._forward(trunk, torch.from_numpy(x).to(self.device)).cpu().numpy()
        for weight, bias in self._networks()[network]:
            x = _affine(x, weight, bias)
            np.tanh(x, out=x) if self.activation_fn is nn.Tanh else np.maximum(x, 0.0, out=x)
        return x

    def act(self, observation: Any, deterministic: bool = False):
        out, values = self._outputs(observation)
        head = self.distribution
        actions = head.mode(out) if deterministic else head.draw(out, self.generator)
        log_probs = head.log_prob(out, actions)
        self._last = (observation, actions, log_probs)
        return actions, log_probs, np.zeros(len(out)) if values is None else values

    def obs_to_tensor(self, observation: Any) -> tuple[Any, bool]:
        """A batch of tensors from one observation or a batch of them, and whether it was a batch.

        With :meth:`get_distribution`, how scripts for stable-baselines3 ask for the probabilities of actions.
        """
        single = is_single(self.observation_space, observation)
        batch = add_batch(copied(observation)) if single else copied(observation)
        return map_arrays(lambda array: torch.from_numpy(array).to(self.device), batch), not single

    def get_distribution(self, obs: Any) -> Distribution:
        """The distribution over actions as stable-baselines3 has it, ``.distribution.probs`` of discrete ones.

        Args:
            obs: A batch of observations, tensors or arrays. The gradient goes back to the actor's own layers.

        Returns:
            Of Discrete and MultiDiscrete actions, over their places: 0 stands for ``start``.
        """
        arrays = map_arrays(
            lambda x: x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x), obs
        )
        hidden = self._forward(self.trunk, torch.from_numpy(self._features(arrays)[0]).to(self.device))
        out = self.action_head.forward(hidden)
        theirs = make_proba_distribution(self.action_space)
        if self.log_std is None:
            return theirs.proba_distribution(out)
        log_std = self.log_std
        if self.distribution.reads_hidden:
            log_std = self.distribution.log_std_of(hidden)
        return theirs.proba_distribution(out, log_std)

    def reset_noise(self, slots: int) -> None:
        if self.distribution.reads_hidden:
            self.distribution.reset_noise(slots, self.generator)

    def predict_values(self, observation: Any) -> np.ndarray:
        return self._outputs(observation, actor=False)[1]

    def _log_prob(self, observation: Any, action: np.ndarray) -> np.ndarray:
        return self.distribution.log_prob(self._outputs(observation, critic=False)[0], np.asarray(action))

    def weights_changed(self) -> None:
        super().weights_changed()
        self._arrays = None

    # -- in torch ------------------------------------------------------------------------------------------

    def _features_of(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """What the actor and the critic read of each step, ``[B * T, F]`` each."""
        features = rollout.inputs["features"].flatten(0, 1)
        return features, features

    def evaluate(self, rollout: Rollout) -> Evaluation:
        shape = rollout.mask.shape
        rows, for_critic = self._features_of(rollout)
        hidden = self._forward(self.trunk, rows)
        out = self.action_head.forward(hidden)
        if self.distribution.reads_hidden:
            out = torch.cat([out, hidden], dim=-1)
        log_probs, entropy = self.distribution.evaluate(out, rollout.actions.flatten(0, 1))
        values = None
        if self.value_head is not None:
            hidden = hidden if self.value_trunk is None else self._forward(self.value_trunk, for_critic)
            values = self.value_head.forward(hidden).view(shape)
        return Evaluation(log_probs.view(shape), values, entropy.view(shape))

    @torch.no_grad()
    def squared_probabilities(self, rollout: Rollout) -> Tensor:
        if not isinstance(self.distribution, Categorical):
            return super().squared_probabilities(rollout)
        rows, _ = self._features_of(rollout)
        out = self.action_head.forward(self._forward(self.trunk, rows))
        return out.softmax(-1).square().sum(-1).view(rollout.mask.shape)

    def _forward(self, trunk: nn.Sequential, x: Tensor) -> Tensor:
        # Calling a module costs as much as the sums of a small layer, and so does fresh memory.
        activate = {nn.Tanh: torch.tanh_, nn.ReLU: torch.relu_}.get(self.activation_fn)
        for layer in trunk:
            linear = isinstance(layer, nn.Linear)
            x = layer.forward(x) if linear or activate is None else activate(x)
        return x

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        stacked = stack_steps(observations)
        return {
            "features": torch.from_numpy(encode_observation(self.observation_space, stacked))
        }  # [N, T, F]


def _hidden_sizes(
    net_arch: Sequence[int] | dict[str, Sequence[int]], critic: str | None
) -> tuple[list[int], list[int]]:
    """Hidden sizes of the actor and of the critic."""
    if not isinstance(net_arch, dict) and len(net_arch) == 1 and isinstance(net_arch[0], dict):
        warn(f"net_arch={net_arch} is stable-baselines3's old form; write net_arch={net_arch[0]}")
        net_arch = net_arch[0]
    if not isinstance(net_arch, dict):
        return list(net_arch), list(net_arch)
    if unknown := set(net_arch) - {"pi", "vf"}:
        raise ValueError(f'net_arch has the keys "pi" and "vf", got {sorted(map(str, unknown))} too')
    actor, value = list(net_arch.get("pi", ())), list(net_arch.get("vf", ()))
    if critic == "shared" and actor != value:
        raise ValueError(
            f'net_arch={net_arch} gives actor and critic trunks of their own, which critic="shared" has not; '
            'use critic="separate", or one list of sizes'
        )
    return actor, value


def _as_arrays(part: nn.Module | None) -> _Layers | None:
    if part is None:
        return None
    layers = [module for module in part.modules() if isinstance(module, nn.Linear)]
    return [tuple(p.detach().cpu().numpy() for p in (layer.weight, layer.bias)) for layer in layers]


def _affine(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x @ weight.T
    x += bias
    return x
