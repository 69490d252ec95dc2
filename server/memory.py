"""How the process gets memory from the system."""

import ctypes
import os

M_ARENA_MAX = -8  # glibc's malloc.h


def share_one_heap() -> None:
    """Let all threads allocate from one heap, before the second one starts; the variable MALLOC_ARENA_MAX goes before.

    glibc gives threads heaps of their own, and each keeps what was freed in it: 100 MB after all endpoints have answered.
    Other C libraries have one heap anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(M_ARENA_MAX, 1)
