"""Networks over stable-baselines3's feature extractors: "CnnPolicy", "MultiInputPolicy", or one of your own.

A features extractor is a torch module that turns observations into numbers; actor and critic read those as
:class:`~agents.policies.mlp.MlpPolicy` reads its features. What it is given is prepared as stable-baselines3 does it:
images with their channels first and scaled to [0, 1], discrete values one-hot, everything else as float32. Left out:
batch normalisation and dropout, which would make the policy that learns another than the one that acted; an
extractor stays in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.vec_env import VecTransposeImage
from torch import Tensor, nn

from agents.policies.features import check_finite, encode_observation
from agents.policies.mlp import MlpPolicy
from agents.rollouts.observations import from_named_arrays, named_arrays, named_spaces, stack_steps
from agents.rollouts.rollout import Rollout
from textrl_env.errors import ArgumentError

#: The smallest image that the three convolutions of NatureCNN can read.
SMALLEST_IMAGE = 36


class ExtractorPolicy(MlpPolicy):
    """Actor and critic over what a features extractor says of an observation.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these to any depth. Of
            nested spaces the extractor gets a flat dict, with names such as "camera/left".
        action_space: Discrete, MultiDiscrete, MultiBinary or Box.
        critic: "separate" network, "shared" trunk, or None.
        features_extractor_class: stable-baselines3's, or a subclass of its ``BaseFeaturesExtractor``.
        features_extractor_kwargs: Its arguments, the observation space excluded.
        share_features_extractor: False gives a separate critic an extractor of its own.
        normalize_images: Scale images from [0, 255] to [0, 1].
        net_arch: Hidden sizes after the extractor; ``{"pi": sizes, "vf": sizes}`` where actor and critic differ.
        activation: "tanh" or "relu".
        activation_fn: Any torch activation class, in place of ``activation``.
        ortho_init: Orthogonal initial weights; False leaves torch's own.
        log_std_init: Initial log standard deviation of continuous actions.
        use_sde: Noise of continuous actions that is a function of the state (gSDE).
    """

    flat = False

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "separate",
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        net_arch: Sequence[int] | dict[str, Sequence[int]] = (64, 64),
        activation: str = "tanh",
        activation_fn: type[nn.Module] | None = None,
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        use_sde: bool = False,
    ) -> None:
        kwargs = dict(features_extractor_kwargs or {})
        if not normalize_images and issubclass(features_extractor_class, (NatureCNN, CombinedExtractor)):
            kwargs.setdefault("normalized_image", True)
        self._make = (
            features_extractor_class,
            kwargs,
        )  # read by _num_features, which the parent's constructor calls
        self._shared = share_features_extractor or critic != "separate"
        self.normalize_images = normalize_images
        self.leaves = named_spaces(observation_space)
        self.turns_images = any(_channels_first(leaf) is not leaf for leaf in self.leaves.values())
        super().__init__(
            observation_space,
            action_space,
            critic,
            net_arch,
            activation,
            activation_fn,
            ortho_init,
            log_std_init,
            use_sde,
        )
        if ortho_init:
            for layer in self.features_extractor.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    nn.init.orthogonal_(layer.weight, 2**0.5)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def _num_features(self) -> int:
        extractor, kwargs = self._make
        shown = {name: _channels_first(space) for name, space in self.leaves.items()}
        nested = isinstance(self.observation_space, (spaces.Dict, spaces.Tuple))
        space = spaces.Dict(shown) if nested else shown[""]
        _check_image_sizes(extractor, shown)
        self.features_extractor = extractor(space, **kwargs).eval()
        self.value_features_extractor = None if self._shared else extractor(space, **kwargs).eval()
        return self.features_extractor.features_dim

    def train(self, mode: bool = True) -> ExtractorPolicy:
        """Training mode for the heads alone: see the module's first lines."""
        super().train(mode)
        self.features_extractor.eval()
        if self.value_features_extractor is not None:
            self.value_features_extractor.eval()
        return self

    def predict(
        self,
        observation: Any,
        state: tuple | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple | None]:
        """Actions for one observation or a batch of them, their images in either layout."""
        if self.turns_images:
            arrays = named_arrays(observation)
            turned = {n: _as_space(self.leaves[n], a) if n in self.leaves else a for n, a in arrays.items()}
            if any(turned[name] is not arrays[name] for name in arrays):
                observation = from_named_arrays(self.observation_space, turned)
        return super().predict(observation, state, episode_start, deterministic)

    def _arrays_of(self, observation: Any) -> dict[str, np.ndarray]:
        """Boxes as they are (a byte of an image stays a byte), everything else encoded; by name."""
        arrays = named_arrays(observation)
        return {
            name: np.asarray(arrays[name])
            if isinstance(space, spaces.Box)
            else encode_observation(space, arrays[name])
            for name, space in self.leaves.items()
        }

    def _extract(self, arrays: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Features of the actor and of the critic, ``[n, F]``, from tensors ``[n, ...]``."""
        prepared = {name: self._prepared(self.leaves[name], array) for name, array in arrays.items()}
        nested = isinstance(self.observation_space, (spaces.Dict, spaces.Tuple))
        given = prepared if nested else prepared[""]
        features = self.features_extractor(given)
        own = self.value_features_extractor
        return features, features if own is None else own(given)

    def _prepared(self, space: spaces.Space, array: Tensor) -> Tensor:
        if not is_image_space(space):
            return array.float()
        if not is_image_space_channels_first(space):
            array = array.movedim(-1, -3)
        return array.float() / 255.0 if self.normalize_images else array.float()

    @torch.no_grad()
    def _features(self, observation: Any) -> tuple[np.ndarray, np.ndarray]:
        tensors = {n: torch.from_numpy(a).to(self.device) for n, a in self._arrays_of(observation).items()}
        actor, critic = self._extract(tensors)
        for_actor = np.ascontiguousarray(actor.cpu().numpy())
        check_finite(for_actor, observation)
        return for_actor, for_actor if critic is actor else np.ascontiguousarray(critic.cpu().numpy())

    def _features_of(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        flat = {name.partition(":")[2]: tensor.flatten(0, 1) for name, tensor in rollout.inputs.items()}
        return self._extract(flat)

    def stack(self, observations: list[Any], actions: np.ndarray, mask: np.ndarray) -> dict[str, Tensor]:
        arrays = self._arrays_of(stack_steps(observations))
        return {f"observation:{name}": torch.from_numpy(array) for name, array in arrays.items()}


class CnnPolicy(ExtractorPolicy):
    """A convolutional network (Mnih et al. 2015) over images, with a linear actor and critic on top.

    See :class:`ExtractorPolicy` for the arguments; ``features_extractor_class`` is ``NatureCNN`` and ``net_arch``
    empty, as in stable-baselines3.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        critic: str | None = "separate",
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        net_arch: Sequence[int] | dict[str, Sequence[int]] | None = None,
        activation: str = "tanh",
        activation_fn: type[nn.Module] | None = None,
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        use_sde: bool = False,
    ) -> None:
        if features_extractor_class is NatureCNN and not is_image_space(
            observation_space, normalized_image=not normalize_images
        ):
            raise ArgumentError(
                'policy="CnnPolicy" takes images, Box(0, 255, (height, width, channels), uint8), got '
                f'{observation_space}; policy="MlpPolicy" takes any Box, policy="MultiInputPolicy" a Dict'
            )
        if net_arch is None:
            net_arch = [] if features_extractor_class is NatureCNN else [64, 64]
        super().__init__(
            observation_space,
            action_space,
            critic,
            features_extractor_class,
            features_extractor_kwargs,
            share_features_extractor,
            normalize_images,
            net_arch,
            activation,
            activation_fn,
            ortho_init,
            log_std_init,
            use_sde,
        )


def has_image(space: spaces.Space) -> bool:
    """Whether a convolutional network can read an observation of this space, or a part of it."""
    return any(
        is_image_space(leaf) and _short_side(leaf) >= SMALLEST_IMAGE for leaf in named_spaces(space).values()
    )


def _short_side(space: spaces.Box) -> int:
    return min(_channels_first(space).shape[1:])


def _as_space(space: spaces.Space, array: Any) -> Any:
    """An image, or a batch of them, with its channels where the space has them; anything else as it is."""
    first = _channels_first(space)
    if first is space or np.shape(array)[-3:] == space.shape or np.shape(array)[-3:] != first.shape:
        return array
    return np.moveaxis(np.asarray(array), -3, -1)


def _channels_first(space: spaces.Space) -> spaces.Space:
    if is_image_space(space) and not is_image_space_channels_first(space):
        return VecTransposeImage.transpose_space(space)
    return space


def _check_image_sizes(extractor: type[BaseFeaturesExtractor], leaves: dict[str, spaces.Space]) -> None:
    """Raise a ValueError for an image that NatureCNN is too deep for."""
    if extractor not in (NatureCNN, CombinedExtractor):
        return
    for name, space in leaves.items():
        if is_image_space(space) and _short_side(space) < SMALLEST_IMAGE:
            raise ValueError(
                f"the convolutions of {extractor.__name__} need images of at least {SMALLEST_IMAGE} pixels a side, "
                f'got {space}{f" ({name})" if name else ""}; use policy="MlpPolicy", or bring a network of your '
                'own with policy_kwargs={"features_extractor_class": ...}'
            )
