"""runtimes.device_images' kernels, compiled for processors: the GPU's memory is then the processor's. JPEGs of known planes."""

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from images.decoding import decode_image
from runtimes import device_images
from runtimes.gpu_images import SAMPLINGS

# What CUDA's C++ has and C++ has not; a grid's threads run one after the other.
BEFORE = """
#include <algorithm>
#include <cmath>
#include <cstddef>
#define __device__ static
#define __global__
using std::max; using std::min;
struct Three { int x, y, z; };
static Three blockIdx, blockDim, threadIdx;
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static unsigned __float2uint_rn(float a) { return (unsigned)lrintf(a); }
"""
AFTER = """
template <class Kernel> void launch(const int *grid, const int *block, Kernel kernel) {
    blockDim = {block[0], block[1], block[2]};
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++)
                for (threadIdx.y = 0; threadIdx.y < block[1]; threadIdx.y++)
                    for (threadIdx.x = 0; threadIdx.x < block[0]; threadIdx.x++) kernel();
}
extern "C" void launch_join(const int *grid, const int *block, const Planes *images) {
    launch(grid, block, [=] { join(images); });
}
extern "C" void launch_resize(const int *grid, const int *block, const Image *images, TYPE *out, int height, int width,
                              float r, float g, float b) {
    launch(grid, block, [=] { resize(images, out, height, width, r, g, b); });
}
"""
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
SHIFTS = {sampling: shifts for sampling, shifts in SAMPLINGS.items() if shifts}  # of colours
ARGUMENTS = {"join": [POINTER], "resize": [POINTER, POINTER, INT, INT, FLOAT, FLOAT, FLOAT]}


@functools.cache
def kernels(dtype="float32", layout="NHWC"):
    """In the place of device_images._kernels."""
    if not shutil.which("c++"):
        pytest.skip("there is no C++ compiler, c++, to compile the kernels for processors")
    folder = Path(tempfile.mkdtemp())
    (folder / "kernels.cpp").write_text(BEFORE + device_images.KERNELS + AFTER)
    options = [*device_images.compiler_options(dtype, layout), "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    subprocess.run(["c++", *options, "-o", folder / "kernels.so", folder / "kernels.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))
    return {name: _kernel(getattr(library, f"launch_{name}"), types) for name, types in ARGUMENTS.items()}


def _kernel(function, kinds):
    function.argtypes, function.restype = [POINTER, POINTER, *kinds], None

    def call(grid, block, stream, *arguments):
        function((INT * 3)(*grid), (INT * 3)(*block), *arguments)

    return types.SimpleNamespace(prepared_async_call=call)


def cuda():
    """In the place of pycuda.driver."""

    def copy(target, source, stream=None):
        ctypes.memmove(int(target), source.ctypes.data, source.nbytes)

    def copy_back(target, source, stream=None):
        ctypes.memmove(target.ctypes.data, int(source), target.nbytes)

    stream = types.SimpleNamespace(handle=0x4000, synchronize=lambda: None)
    return types.SimpleNamespace(
        memcpy_htod=copy,
        memcpy_htod_async=copy,
        memcpy_dtoh_async=copy_back,
        mem_alloc=Memory,
        Stream=lambda: stream,
        MemoryError=MemoryError,
    )


class Memory:
    """pycuda's DeviceAllocation, of the processor's memory."""

    def __init__(self, size):
        self._memory = np.empty(size, np.uint8)

    def __int__(self):
        return self._memory.ctypes.data

    def free(self):
        self._memory = None


def install(monkeypatch):
    """Has `pycuda.driver`, which it returns, and the kernels be those of processors."""
    driver = cuda()
    monkeypatch.setitem(sys.modules, "pycuda", types.SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setattr(device_images, "_kernels", kernels)
    return driver


def jpeg_of_planes(image, sampling):
    """(a JPEG with an image's colours, at least 2 x 2, the planes that decoding it gives).

    At quality 100 all tables are of ones, so that a plane decodes as it does as a grey JPEG of its own.
    """
    y, *colours = np.moveaxis(np.asarray(Image.fromarray(image).convert("YCbCr")), 2, 0)
    planes = [y]
    if sampling != "grey":
        across, down = SHIFTS[sampling]
        planes += [colour[:: 1 << down, :: 1 << across] for colour in colours]
    planes = [np.ascontiguousarray(plane) for plane in planes]
    # libjpeg-turbo reads an even number of rows and columns of the first.
    height, width = y.shape
    even = np.pad(planes[0], ((0, height % 2), (0, width % 2)), "edge")[:height, :width]
    data = simplejpeg.encode_jpeg_yuv_planes(even, *planes[1:], *[None] * (3 - len(planes)), quality=100)
    grey = [simplejpeg.encode_jpeg(plane[..., None], quality=100, colorspace="Gray") for plane in planes]
    return data, [decode_image(each)[..., 0] for each in grey]
