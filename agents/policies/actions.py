"""Distributions over actions: how the outputs of a network become actions of a space, and how likely those are.

Each says it twice, in numpy for acting and in torch for learning; the numbers are the same. Actions are always those
of the space: of ``Discrete(3, start=-1)`` they are -1, 0 and 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class ActionDistribution(ABC):
    """The actions that a network's outputs ``[N, outputs]`` stand for.

    Attributes:
        outputs: Width of the network's head.
    """

    outputs: int
    #: Whether ``out`` is ``[N, outputs + H]``: the head's outputs and the hidden units that they were made of.
    reads_hidden = False

    @abstractmethod
    def draw(self, out: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        """Sampled actions ``[N, ...]``."""

    @abstractmethod
    def mode(self, out: np.ndarray) -> np.ndarray:
        """The most likely actions ``[N, ...]``."""

    @abstractmethod
    def log_prob(self, out: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Log-probabilities of given actions, float64 ``[N]``."""

    @abstractmethod
    def evaluate(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies ``[n]`` of given actions, with gradient."""


class Categorical(ActionDistribution):
    """One of ``n`` actions, by their logits."""

    def __init__(self, space: spaces.Discrete) -> None:
        self.outputs, self.start = int(space.n), int(space.start)

    def draw(self, out: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        # The Gumbel trick.
        noise = _noise(out, generator).exponential_(generator=generator).cpu().numpy()
        return (out - np.log(noise)).argmax(-1) + self.start

    def mode(self, out: np.ndarray) -> np.ndarray:
        return out.argmax(-1) + self.start

    def log_prob(self, out: np.ndarray, actions: np.ndarray) -> np.ndarray:
        shifted = out.astype(np.float64) - out.max(-1, keepdims=True)
        return shifted[np.arange(len(out)), actions - self.start] - np.log(np.exp(shifted).sum(-1))

    def evaluate(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = out.log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return -F.nll_loss(log_probs, actions.long() - self.start, reduction="none"), entropy


class MultiCategorical(ActionDistribution):
    """Several choices at once, each a :class:`Categorical` of its own and independent of the others."""

    def __init__(self, space: spaces.MultiDiscrete) -> None:
        pairs = zip(space.nvec.flat, space.start.flat, strict=True)
        self.parts = [Categorical(spaces.Discrete(int(n), start=int(start))) for n, start in pairs]
        self.outputs = int(space.nvec.sum())
        self.shape = space.shape
        self.ends = np.cumsum(space.nvec.flat)[:-1].tolist()
        self.sizes = [part.outputs for part in self.parts]

    def _each(self, out: np.ndarray, actions: np.ndarray):
        return zip(
            self.parts, np.split(out, self.ends, axis=-1), actions.reshape(len(out), -1).T, strict=True
        )

    def draw(self, out: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        slices = zip(self.parts, np.split(out, self.ends, axis=-1), strict=True)
        drawn = [part.draw(piece, generator) for part, piece in slices]
        return np.stack(drawn, axis=-1).reshape(-1, *self.shape)

    def mode(self, out: np.ndarray) -> np.ndarray:
        slices = zip(self.parts, np.split(out, self.ends, axis=-1), strict=True)
        return np.stack([part.mode(piece) for part, piece in slices], axis=-1).reshape(-1, *self.shape)

    def log_prob(self, out: np.ndarray, actions: np.ndarray) -> np.ndarray:
        return sum(part.log_prob(piece, chosen) for part, piece, chosen in self._each(out, actions))

    def evaluate(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        pieces, chosen = out.split(self.sizes, dim=-1), actions.reshape(len(out), -1).unbind(-1)
        each = [part.evaluate(*pair) for part, *pair in zip(self.parts, pieces, chosen, strict=True)]
        log_probs, entropies = zip(*each, strict=True)
        return sum(log_probs), sum(entropies)


class Bernoullis(ActionDistribution):
    """Independent bits, by their logits."""

    def __init__(self, space: spaces.MultiBinary) -> None:
        self.outputs, self.shape = int(np.prod(space.shape)), space.shape

    def draw(self, out: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        noise = _noise(out, generator).uniform_(generator=generator).cpu().numpy()
        with np.errstate(over="ignore", divide="ignore"):
            return (out > np.log(noise) - np.log1p(-noise)).astype(np.int8).reshape(-1, *self.shape)

    def mode(self, out: np.ndarray) -> np.ndarray:
        return (out > 0).astype(np.int8).reshape(-1, *self.shape)

    def log_prob(self, out: np.ndarray, actions: np.ndarray) -> np.ndarray:
        # log sigmoid(z) = -log(1 + e^-z), of z or -z as the bit is set or not.
        signed = np.where(actions.reshape(out.shape) != 0, out, -out).astype(np.float64)
        return -np.logaddexp(0.0, -signed).sum(-1)

    def evaluate(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        signed = torch.where(actions.reshape(out.shape) != 0, out, -out)
        entropy = F.softplus(out) - out * out.sigmoid()
        return F.logsigmoid(signed).sum(-1), entropy.sum(-1)


class DiagonalGaussian(ActionDistribution):
    """Real numbers, their means by the network; their standard deviations do not depend on the state.

    Attributes:
        log_std: ``[outputs]``, a parameter for the policy to own.
    """

    def __init__(self, space: spaces.Box, log_std_init: float = 0.0) -> None:
        self.outputs, self.shape = int(np.prod(space.shape)), space.shape
        self.log_std = nn.Parameter(torch.full((self.outputs,), float(log_std_init)))

    def _log_std(self) -> np.ndarray:
        return self.log_std.detach().cpu().numpy()

    def draw(self, out: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        noise = _noise(out, generator).normal_(generator=generator).cpu().numpy()
        return (out + noise * np.exp(self._log_std())).reshape(-1, *self.shape)

    def mode(self, out: np.ndarray) -> np.ndarray:
        return out.reshape(-1, *self.shape)

    def log_prob(self, out: np.ndarray, actions: np.ndarray) -> np.ndarray:
        log_std = self._log_std().astype(np.float64)
        z = (actions.reshape(out.shape) - out) / np.exp(log_std)
        return (-0.5 * z**2 - log_std - _HALF_LOG_TAU).sum(-1)

    def evaluate(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        z = (actions.view(out.shape) - out) / self.log_std.exp()
        log_density = -0.5 * z**2 - self.log_std - _HALF_LOG_TAU
        entropy = (self.log_std + 0.5 + _HALF_LOG_TAU).sum()
        return log_density.sum(-1), entropy.expand(len(out))


class StateDependentGaussian(ActionDistribution):
    """Real numbers with noise that is a function of the state (gSDE; Raffin, Kober and Stulp 2021, arXiv 2005.05719).

        a = mu(s) + z(s) @ (E * std)    with E ~ N(0, 1) drawn now and then, so that an episode is explored smoothly
        a ~ N(mu(s), z(s)^2 @ std^2)    over the draws, which is what log-probabilities are of

    ``z(s)`` are the hidden units of the actor, which do not learn from the noise. As in stable-baselines3, but for its
    ``full_std=False``, ``use_expln`` and ``squash_output``, which are left out.

    Attributes:
        log_std: ``[H, outputs]``, a parameter for the policy to own.
    """

    reads_hidden = True
    #: Keeps a variance off 0 where all hidden units are 0.
    _SMALLEST = 1e-6

    def __init__(self, space: spaces.Box, hidden: int, log_std_init: float = 0.0) -> None:
        self.outputs, self.shape = int(np.prod(space.shape)), space.shape
        self.log_std = nn.Parameter(torch.full((hidden, self.outputs), float(log_std_init)))
        self._noise: np.ndarray | None = None  # E, [slots, H, outputs]

    def reset_noise(self, slots: int, generator: torch.Generator | None) -> None:
        """Draw ``E`` anew for each of so many slots."""
        shape = (slots, *self.log_std.shape)
        self._noise = _room(shape, generator).normal_(generator=generator).cpu().numpy()

    def log_std_of(self, hidden: Tensor) -> Tensor:
        """The log standard deviation of each action ``[n, outputs]``, over the draws of the noise."""
        return 0.5 * (hidden.detach() ** 2 @ self.log_std.exp() ** 2 + self._SMALLEST).log()

    def _std(self) -> np.ndarray:
        return np.exp(self.log_std.detach().cpu().numpy())

    def draw(self, out: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        mean, hidden = np.split(out, [self.outputs], axis=-1)
        if self._noise is None:
            self.reset_noise(len(out), generator)
        # One observation, or any other number than there are slots, is explored as the first slot is.
        noise = self._noise if len(out) == len(self._noise) else self._noise[:1]
        shift = np.matmul(hidden[:, None], noise * self._std())[:, 0]
        return (mean + shift).reshape(-1, *self.shape)

    def mode(self, out: np.ndarray) -> np.ndarray:
        return out[:, : self.outputs].reshape(-1, *self.shape)

    def log_prob(self, out: np.ndarray, actions: np.ndarray) -> np.ndarray:
        mean, hidden = np.split(out.astype(np.float64), [self.outputs], axis=-1)
        variance = hidden**2 @ self._std().astype(np.float64) ** 2 + self._SMALLEST
        squares = (actions.reshape(mean.shape) - mean) ** 2 / variance
        return (-0.5 * squares - 0.5 * np.log(variance) - _HALF_LOG_TAU).sum(-1)

    def evaluate(self, out: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        mean, half_log = out[:, : self.outputs], self.log_std_of(out[:, self.outputs :])
        z = (actions.view(mean.shape) - mean) / half_log.exp()
        log_density = -0.5 * z**2 - half_log - _HALF_LOG_TAU
        return log_density.sum(-1), (half_log + 0.5 + _HALF_LOG_TAU).sum(-1)


def _noise(out: np.ndarray, generator: torch.Generator | None) -> Tensor:
    """Room for one random number beside each output, on the generator's device."""
    return _room(out.shape, generator)


def _room(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.empty(shape, device="cpu" if generator is None else generator.device)


_DISTRIBUTIONS = {
    spaces.Discrete: Categorical,
    spaces.MultiDiscrete: MultiCategorical,
    spaces.MultiBinary: Bernoullis,
    spaces.Box: DiagonalGaussian,
}


def make_distribution(
    space: spaces.Space, log_std_init: float = 0.0, sde_hidden: int | None = None
) -> ActionDistribution:
    """The distribution over the actions of a space.

    Args:
        space: Of the actions.
        log_std_init: Initial log standard deviation of continuous actions.
        sde_hidden: Hidden units that the noise of continuous actions is a function of; None for noise that is not.

    Raises:
        ValueError: A space that none is made for, or state-dependent noise where actions are not continuous.
    """
    if sde_hidden is not None:
        if not isinstance(space, spaces.Box):
            raise ValueError(f"use_sde=True explores with continuous actions, got the action space {space}")
        return StateDependentGaussian(space, sde_hidden, log_std_init)
    for kind, distribution in _DISTRIBUTIONS.items():
        if isinstance(space, kind):
            return distribution(space, *([log_std_init] if kind is spaces.Box else []))
    raise ValueError(
        f"a network acts in Discrete, MultiDiscrete, MultiBinary and Box action spaces, got {space}; "
        "a wrapper that flattens the actions may help"
    )


def to_space(space: spaces.Space, actions: np.ndarray) -> np.ndarray:
    """Actions ``[N, ...]`` as the environment takes them, in arrays of its own and of its dtype.

    What a Gaussian drew is clipped to the bounds of a Box, and rounded where the Box holds integers.
    """
    if isinstance(space, spaces.Box):
        actions = np.clip(actions, space.low, space.high)
        if space.dtype.kind in "iu":
            actions = np.rint(actions)
    return np.array(actions, dtype=space.dtype)
