"""The CUDA driver's own interface, for what pycuda has no call for."""

import ctypes
import functools
import sys


@functools.cache
def cuda_driver():
    """The driver's library: libcuda.so.1, or nvcuda.dll on Windows. Raises OSError where there is none."""
    if sys.platform == "win32":
        return ctypes.WinDLL("nvcuda.dll")
    return ctypes.CDLL("libcuda.so.1")
