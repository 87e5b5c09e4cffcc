"""The device: what it is called, what it reaches, how something is timed on it and what happens if memory runs out.

Left out: several devices, and anything that changes a device's clocks.
"""

from __future__ import annotations

import gc
import platform
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.capacity_step import DEVICES, Device


def describe(device: torch.device) -> dict[str, Any]:
    """Name and versions, and the vendor's nominal figures where the device is in the table of ``capacity_step.py``."""
    about: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if device.type != "cuda":
        return about | {
            "name": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    about |= {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    known = nominal(properties.name)
    return about | ({"nominal_flops": known.flops, "nominal_bandwidth": known.bandwidth} if known else {})


def nominal(name: str) -> Device | None:
    """The data sheet's figures of a device by the name that CUDA gives it; None for one that is not in the table.

    The table holds the fastest board of each name, so slower ones of the same name are left out.
    """
    slower = ("PCIe", "NVL", "40GB", "Laptop", " D")
    if any(word in name for word in slower):
        return None
    return next((device for key, device in DEVICES.items() if re.search(rf"\b{key}\b", name)), None)


def synchronize(device: torch.device) -> None:
    """Wait for everything that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    function: Callable[[], Any], device: torch.device, repeats: int, warm_up: int | None = None
) -> float:
    """Median wall-clock seconds of a call, the device idle before and after.

    Calls that do not count come first: one, or none where a single call is timed.
    """
    for _ in range(min(1, repeats - 1) if warm_up is None else warm_up):
        function()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def copy_bandwidth(device: torch.device, size: int = 2**30, repeats: int = 20) -> float:
    """Bytes per second, read and written, of copying ``size`` bytes from the device's memory to itself."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, repeats)


def matmul_flops(
    device: torch.device, size: int = 8192, dtype: torch.dtype = torch.bfloat16, repeats: int = 20
) -> float:
    """Floating point operations per second of a square matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device, repeats, warm_up=3)


def peak_memory(device: torch.device, start: bool = False) -> float | None:
    """Peak bytes of tensors since the last ``start``; None where the device does not count them."""
    if device.type != "cuda":
        return None
    if start:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.max_memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device and through whichever wrapper."""
    words = str(error).lower()
    phrases = ("out of memory", "not enough memory", "can't allocate memory")  # CUDA, and CPUs here and there
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(p in words for p in phrases)


def attempt(function: Callable[[], dict[str, Any]], **sizes: Any) -> dict[str, Any]:
    """A row of results: the sizes and what the function measured, or at these sizes what went wrong.

    A GPU is lent for a while, so one engine that fails must not cost the rest; the command's exit status tells.
    """
    try:
        return sizes | function()
    except Exception as error:
        what = "out of memory" if is_out_of_memory(error) else type(error).__name__
        return sizes | {"error": what, "message": str(error).partition("\n")[0]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
