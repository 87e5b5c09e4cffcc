"""From logits to the next token: which one is drawn, and with what log-probability."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from textrl_env.lm.recording import Recorder, Recording

#: What is said of logits that nothing can be drawn from.
NOT_FINITE = (
    "the model's logits are NaN or infinite, so no token can be drawn; a lower learning_rate, or weights that "
    "are whole, usually help"
)


def gather_log_probs(logits: Tensor, actions: Tensor) -> Tensor:
    """``log softmax(logits)[actions]``: logits ``[..., V]``, actions ``[...]`` -> ``[...]``."""
    chosen = logits.gather(-1, actions.unsqueeze(-1).clamp(max=logits.shape[-1] - 1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def sample_actions(
    logits: Tensor,
    generator: torch.Generator | None,
    deterministic: bool = False,
    uniform: np.ndarray | Tensor | None = None,
) -> Tensor:
    """Sample from ``softmax(logits)``, or take the argmax. ``[..., V] -> [...]``.

    Args:
        logits: ``[..., V]``.
        generator: Source of randomness; None is torch's own.
        deterministic: Take the most likely action.
        uniform: The random numbers themselves, ``[...]`` in [0, 1), in place of a generator's. A tensor lies where the
            logits do, and nobody looks whether these are finite.

    Raises:
        FloatingPointError: The logits are not finite (on a CPU, where looking costs nothing).
    """
    if deterministic:
        return logits.argmax(-1)
    look = not isinstance(uniform, Tensor) and logits.device.type == "cpu"
    if isinstance(uniform, np.ndarray):
        uniform = torch.from_numpy(uniform).to(logits.device, _fine(logits))
    if logits.device.type != "cpu":
        if uniform is not None:
            return _sample_in_blocks(logits, uniform)
        # Gumbel's trick: noise is cheap where there are thousands of threads.
        noise = torch.empty_like(logits).exponential_(generator=generator)
        return (logits - noise.log()).argmax(-1)
    # One random number for each row, looked up in the cumulated probabilities.
    mass = (logits - logits.amax(-1, keepdim=True)).exp_().cumsum(-1, dtype=torch.float64)
    total = mass[..., -1:]
    if look and not bool(total.isfinite().all()):
        raise FloatingPointError(NOT_FINITE)
    if uniform is None:
        uniform = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64)
    return _look_up(mass, uniform.unsqueeze(-1) * total)


def _look_up(mass: Tensor, at: Tensor) -> Tensor:
    """The entry in whose share of the cumulated ``mass [..., V]`` the number ``at [..., 1]`` lies, ``[...]``."""
    total = mass[..., -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # never past the last entry that has mass
    return torch.searchsorted(mass, torch.minimum(at, below), right=True).squeeze(-1)


def _sample_in_blocks(logits: Tensor, uniform: Tensor, block: int = 256) -> Tensor:
    """What a CPU does in one sum over the vocabulary, in two short ones: a GPU adds up long rows slowly.

    Args:
        logits: ``[..., V]``.
        uniform: ``[...]`` in [0, 1).
        block: Actions in the sums of the second step.
    """
    mass = (logits - logits.amax(-1, keepdim=True)).exp_()
    mass = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block))
    blocks = mass.sum(-1, dtype=uniform.dtype).cumsum(-1)
    at = uniform.unsqueeze(-1) * blocks[..., -1:]
    chosen = _look_up(blocks, at).unsqueeze(-1)
    before = torch.where(chosen > 0, blocks.gather(-1, (chosen - 1).clamp(min=0)), 0.0)
    inside = mass.take_along_dim(chosen.unsqueeze(-1), -2).squeeze(-2).cumsum(-1, dtype=uniform.dtype)
    return chosen.squeeze(-1) * block + _look_up(inside, at - before)


def _fine(tensor: Tensor) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


class NextTokens:
    """The next token of every sequence, its log-probability, and whether it is an end token.

    Args:
        eos_ids: Tokens that end a response, int64 array.
        deterministic: Take the likeliest.
        limit: Changes the logits ``[N, V]`` before a token is drawn, given how many have been written.
        recorder: Records the drawing; None launches it. What ``limit`` does is never recorded.
    """

    def __init__(
        self,
        eos_ids: np.ndarray,
        deterministic: bool = False,
        limit: Callable[[Tensor, int], Tensor] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._eos_ids, self._deterministic = eos_ids, deterministic
        self._limit, self._recorder = limit, None if limit is not None else recorder
        self._logits: Tensor | None = None
        self._recording: Recording | None = None
        self._eos: Tensor | None = None

    def __call__(self, logits: Tensor, uniform: np.ndarray, written: int) -> np.ndarray:
        """float ``[3, N]``: tokens, log-probabilities, and 1 for an end token.

        Args:
            logits: Of the acting distribution, ``[N, V]``.
            uniform: Random numbers in [0, 1), float64 ``[N]``.
            written: Tokens of each response so far.

        Raises:
            FloatingPointError: The logits are not finite.
        """
        if self._eos is None:
            self._eos = torch.from_numpy(self._eos_ids).to(logits.device)
        logits = logits if self._limit is None else self._limit(logits, written)
        if self._recorder is None:
            drawn = self._draw(logits, uniform)
        else:
            if logits is not self._logits:  # a record knows where they are
                self._logits = logits
                draw = partial(self._draw, logits)
                self._recording = Recording(self._recorder, draw, logits.device)
            drawn = self._recording(uniform.astype(np.float32) if logits.device.type == "mps" else uniform)
        # All of it in one transfer, or a GPU is waited for three times a token; float32 holds ids below 2^24.
        found = drawn.cpu().numpy()
        if not np.isfinite(found[1]).all():
            raise FloatingPointError(NOT_FINITE)
        return found

    def _draw(self, logits: Tensor, uniform: np.ndarray | Tensor) -> Tensor:
        actions = sample_actions(logits, None, self._deterministic, uniform)
        return torch.stack([actions, gather_log_probs(logits, actions), torch.isin(actions, self._eos)])
