"""torch's Adam over one long vector, for networks so small that the calls cost more than the sums.

The parameters of a network become views of one vector and their gradients views of another, so that clipping and
stepping are a handful of operations however many layers there are; on CartPole that is a fifth of a step. Left out:
parameter groups, and parameters of several dtypes or devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class FlatAdam(torch.optim.Adam):
    """Adam (Kingma and Ba, 2015) over parameters that share one vector.

    Args:
        parameters: Of one dtype and on one device. Their values move into the vector and must stay there: load
            weights with ``load_state_dict`` or ``copy_``, not by assigning ``data``.
        **settings: As ``torch.optim.Adam`` takes them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        self.parameters = list(parameters)
        self.vector = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.vector.grad = torch.zeros_like(self.vector.detach())
        self.gradients = self.views(self.vector.grad)
        pieces = zip(self.parameters, self.views(self.vector.detach()), self.gradients, strict=True)
        for parameter, values, gradient in pieces:
            parameter.data, parameter.grad = values, gradient
        super().__init__([self.vector], **settings)

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector like the parameters', in their shapes."""
        pieces = vector.split([p.numel() for p in self.parameters])
        return [piece.view(p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set the gradients to zero; they are never None, whatever ``set_to_none``."""
        self.vector.grad.zero_()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient

    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale the gradient down to ``max_norm``; returns the norm it had."""
        self._gather()
        norm = float(torch.linalg.vector_norm(self.vector.grad))
        if norm > max_norm:
            self.vector.grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def _gather(self) -> None:
        """Take over gradients that somebody has put in the place of the views."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not gradient:
                gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
                parameter.grad = gradient

    def step(self, closure: None = None) -> None:
        """One step along the gradient."""
        self._gather()
        super().step()

    # torch wraps step() of every optimiser class to show it in its profiler; Adam's own is wrapped already.
    step.hooked = True
