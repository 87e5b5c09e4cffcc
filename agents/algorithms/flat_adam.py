"""Adam over one long vector, for networks so small that the calls cost more than the sums.

The parameters of a network become views of one vector and their gradients views of another, so that clipping and
stepping are a handful of operations however many layers there are. The numbers are those of ``torch.optim.Adam``.
Left out: weight decay, AMSGrad, and parameters of several dtypes or devices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlatAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015) over parameters that share one vector.

    Args:
        parameters: Of one dtype and on one device. Their values move into the vector and must stay there: load
            weights with ``load_state_dict`` or ``copy_``, not by assigning ``data``.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = list(parameters)
        self.vector = nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.vector.grad = torch.zeros_like(self.vector.detach())
        self.gradients = self._views(self.vector.grad)
        pieces = zip(self.parameters, self._views(self.vector.detach()), self.gradients, strict=True)
        for parameter, values, gradient in pieces:
            parameter.data, parameter.grad = values, gradient
        super().__init__([self.vector], {"lr": lr, "betas": betas, "eps": eps})
        moments = (torch.zeros_like(self.vector.grad) for _ in range(2))
        self.state[self.vector] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True))
        self.state[self.vector]["step"] = torch.zeros((), device=self.vector.device)

    def _views(self, vector: Tensor) -> list[Tensor]:
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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step along the gradient."""
        self._gather()
        group, state = self.param_groups[0], self.state[self.vector]
        state["step"].add_(1)
        # The kernel of torch.optim.Adam(fused=True), without the search for tensors that go together.
        torch._fused_adam_(
            [self.vector],
            [self.vector.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    # torch wraps step() to show it in its profiler, which costs as much as the step itself.
    step.hooked = True
