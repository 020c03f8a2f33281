"""What glibc's malloc must be told so that memory given back is memory that others can have.

Left alone, it raises the size from which a block gets pages of its own with each large block that
is freed, up to 32 MiB. Tensors then lie in a heap with holes between them, and a process holds
far more than its tensors.
"""

from __future__ import annotations

import ctypes
import platform

# Of malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# glibc's own first values; setting them is what stops them from moving.
_THRESHOLD = 128 * 1024


def give_freed_memory_back() -> bool:
    """Tensors of 128 KiB or more get pages of their own in this process, freed when they are.

    Costs the faults of fresh pages. What is free in the heap already is given back as well, but a
    hole between blocks that live is filled again before pages are asked for: call this early.

    Returns:
        Whether the C library is one that can be told: glibc. Others are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if not all(libc.mallopt(p, _THRESHOLD) for p in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)):
        return False
    libc.malloc_trim(0)
    return True
