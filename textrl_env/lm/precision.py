"""Matrix products in bfloat16, everything that adds up in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        query, key, value = args[:3]
        with torch.autocast("cpu", enabled=False):
            out = func(query.float(), key.float(), value.float(), *args[3:], **kwargs)
        return out.to(query.dtype)


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
