"""What the C library does with memory that a step has freed."""

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
_LARGEST_THRESHOLD = 32 << 20  # bytes; glibc takes no more


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the next step.

    glibc gives the large buffers of a step back to the system, which fills every page of them with zeros when the next step
    asks for them again. Other C libraries are left as they are.

    Returns:
        Whether it could be set.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
