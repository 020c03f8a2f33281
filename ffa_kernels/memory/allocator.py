"""What glibc's malloc must be told of freed memory: give it back, or keep it for the next step.

Left alone, it does a little of both. It raises the size from which a block gets pages of its own
with each large block that is freed, up to 32 MiB. Smaller tensors then lie in a heap with holes
between them, so that a process holds far more than its tensors; larger ones, and the end of that
heap, are given back in each step, and the next step waits while it gets them anew, page by page.
"""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# glibc's own first values; setting them is what stops them from moving.
_THRESHOLD = 128 * 1024
_LARGEST, _LARGEST_OF_OLD = 2**31 - 1, 32 << 20


def give_freed_memory_back() -> bool:
    """Tensors of 128 KiB or more get pages of their own in this process, freed when they are.

    Costs the faults of fresh pages. What is free in the heap already is given back as well, but a
    hole between blocks that live is filled again before pages are asked for: call this early.

    Returns:
        Whether the C library is one that can be told: glibc. Others are left as they are.
    """
    libc = _told(_THRESHOLD)
    if libc is not None:
        libc.malloc_trim(0)
    return libc is not None


def keep_freed_memory() -> bool:
    """Freed tensors' memory stays in this process, where the next steps find its pages.

    Takes the faults of fresh pages out of each step on a CPU, a twentieth of its time or more. The
    process holds its peak, and the holes in it, until it ends: not for a client under a memory
    limit, which `give_freed_memory_back` is for.

    Returns:
        Whether the C library is one that can be told: glibc. Others are left as they are.
    """
    return _told(_LARGEST) is not None


def _told(threshold: int) -> ctypes.CDLL | None:
    """The C library, once blocks of so many bytes get pages of their own, and a heap's end that has
    so many free is given back; None where it cannot be told."""
    if platform.libc_ver()[0] != "glibc":
        return None
    libc = ctypes.CDLL(None)
    # Older ones take no more than 32 MiB for the first.
    blocks = libc.mallopt(_M_MMAP_THRESHOLD, threshold) or libc.mallopt(
        _M_MMAP_THRESHOLD, min(threshold, _LARGEST_OF_OLD)
    )
    return libc if libc.mallopt(_M_TRIM_THRESHOLD, threshold) and blocks else None
