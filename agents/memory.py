"""Where the memory of freed tensors goes on a CPU."""

from __future__ import annotations

import ctypes
import platform

#: Names of settings in glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: The largest block that glibc agrees to keep.
_LARGEST = 32 * 2**20


def keep_freed_memory() -> bool:
    """Let the C library keep the memory of freed tensors for the next ones, as torch does on a GPU.

    Otherwise it gives every large block back to the kernel, and the next pass through the model faults all of its
    pages in again: a tenth of a training step. In return the process needs a tenth more memory, a small model's a
    quarter, and stays as large as it once was until it ends.

    Returns:
        Whether that was possible; it is with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    taken = libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST), libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return all(taken)
