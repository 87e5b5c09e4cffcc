"""Matrix products in bfloat16, everything that adds up in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Float32Attention(TorchFunctionMode):
    """Attention in float32: its bfloat16 backward pass takes two and a half times as long on a CPU.

    Without gradient too, so that a reference says to the bit what the policy that starts from it says.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            out = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return out.to(args[0].dtype)


def _wide(value: Any) -> Any:
    """A tensor of low precision (a mask that is added may be one) in float32; anything else as it is."""
    is_low = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_low else value


@contextmanager
def bfloat16_products(device: torch.device, enabled: bool) -> Iterator[None]:
    """Autocast to bfloat16 on ``device``, or nothing at all.

    Args:
        device: Where the model is.
        enabled: False changes nothing.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
        if enabled and device.type == "cpu":
            with _Float32Attention():
                yield
        else:
            yield


def for_both_passes() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts for :func:`torch.utils.checkpoint.checkpoint`: of a pass now, and of the same pass done again later.

    The second takes place outside of :func:`bfloat16_products`, of which torch restores the autocast only.
    """
    again = _Float32Attention() if torch.is_autocast_enabled("cpu") else nullcontext()
    return nullcontext(), again
