"""Memory of weights that are mapped from a file: the kernel may have it back, since it can read the file again."""

from __future__ import annotations

import ctypes
import mmap
import sys
from array import array
from functools import cache
from typing import Any

from torch import Tensor

_PRESENT, _SWAPPED, _OF_A_FILE = 1 << 63, 1 << 62, 1 << 61
"""Bits of an entry of /proc/self/pagemap (Linux: Documentation/admin-guide/mm/pagemap.rst)."""


def give_back(weight: Tensor) -> None:
    """Give the memory of a tensor [...] back to the kernel if every page of it that is in memory is an unmodified page of a file.

    The next access reads it again, from the kernel's cache of files where it still is, and finds the same bytes. A page that was
    written to is no page of the file any more, so such a tensor stays. Does nothing elsewhere than on Linux and on a CPU.
    """
    advise = _madvise()
    if advise is None or weight.device.type != "cpu":
        return
    start = -(-weight.data_ptr() // mmap.PAGESIZE)  # whole pages, inside of the tensor
    count = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE - start
    if weight.is_contiguous() and count > 0 and _is_of_a_file(start, count):
        advise(start * mmap.PAGESIZE, count * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _is_of_a_file(start: int, count: int) -> bool:
    """Whether pages are of a file, unmodified, or not in memory."""
    pages = array("Q")
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as opened:
            opened.seek(start * pages.itemsize)
            pages.frombytes(opened.read(count * pages.itemsize))
    except OSError:
        return False
    return len(pages) == count and all(
        page & (_PRESENT | _SWAPPED) == 0 or page & (_PRESENT | _SWAPPED | _OF_A_FILE) == _PRESENT | _OF_A_FILE
        for page in set(pages)
    )


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
