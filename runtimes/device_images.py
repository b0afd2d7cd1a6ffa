"""Images in the GPU's memory, and the kernels that work on them: a JPEG's planes to RGB, RGB to an engine's input.

Both compute to the last bit what processors do (images.decoding, images.resizing); tests/test_device_images.py compiles them
for processors and compares.
"""

import collections
import contextlib
import dataclasses
import functools

import numpy as np

ALIGNMENT = 256  # of images in the GPU's memory
BLOCK = 32, 8, 1  # threads
# What the kernels are told of each image, as `struct Image` and `struct Planes`. In Image, `height` and `width` are those that
# it is resized to.
IMAGE = np.dtype(
    [("pixels", np.uint64), ("stride", np.int64)]
    + [(name, np.int32) for name in ("rows", "columns", "height", "width")]
    + [(name, np.float32) for name in ("scale_y", "scale_x")]
)
PLANES = np.dtype(
    [(name, np.uint64) for name in ("y", "cb", "cr", "pixels")]
    + [(name, np.int32) for name in ("stride_y", "stride_c", "height", "width", "across", "down")]
)
# One thread a pixel, one layer of blocks an image.
#
# resize: TF1's bilinear resize (images.resizing) in float32, each product and sum rounded by itself: __fmul_rn and __fadd_rn
# are not merged into one rounding.
#
# join: as libjpeg-turbo does. A colour's plane of half the width, and height, is interpolated: three quarters of the nearest
# sample, one of the next, first down, then across; beyond an edge is the edge again; planes of one or two columns are
# repeated (jdsample.c, h2v1_fancy_upsample and h2v2_fancy_upsample). Then JFIF's YCbCr to RGB with 16 bits of fraction
# (jdcolor.c, build_ycc_rgb_table). nvJPEG's own interpolation differs by up to 3 of 255 (BENCHMARKS.md).
KERNELS = """
struct Image {
    const unsigned char *pixels;
    long long stride;
    int rows, columns, height, width;
    float scale_y, scale_x;
};

struct Planes {
    const unsigned char *y, *cb, *cr;
    unsigned char *pixels;
    int stride_y, stride_c, height, width, across, down;
};

__device__ float between(float a, float b, float weight) {
    return __fadd_rn(a, __fmul_rn(__fsub_rn(b, a), weight));
}

extern "C" __global__ void resize(const Image *images, TYPE *out, int height, int width,
                                  float pad_r, float pad_g, float pad_b) {
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= width || y >= height) return;
    Image image = images[blockIdx.z];
    out += (size_t)blockIdx.z * 3 * height * width;
    float pad[3] = {pad_r, pad_g, pad_b};
    float at_y = __fmul_rn((float)y, image.scale_y), at_x = __fmul_rn((float)x, image.scale_x);
    int top = (int)floorf(at_y), left = (int)floorf(at_x);
    int bottom = min(top + 1, image.rows - 1), right = min(left + 1, image.columns - 1);
    float down = __fsub_rn(at_y, (float)top), across = __fsub_rn(at_x, (float)left);
    bool inside = y < image.height && x < image.width;
    for (int c = 0; c < 3; c++) {
        float value = pad[c];
        if (inside) {
            const unsigned char *upper = image.pixels + top * image.stride + c;
            const unsigned char *lower = image.pixels + bottom * image.stride + c;
            value = between(between(upper[left * 3], upper[right * 3], across),
                            between(lower[left * 3], lower[right * 3], across), down);
        }
        out[PLANAR ? (c * height + y) * width + x : (y * width + x) * 3 + c] = ROUND(value);
    }
}

__device__ int colour(const unsigned char *plane, Planes image, int x, int y) {
    int columns = (image.width + image.across) >> image.across, rows = (image.height + image.down) >> image.down;
    int column = x >> image.across, row = y >> image.down;
    const unsigned char *here = plane + (size_t)row * image.stride_c;
    if (!image.across || columns <= 2) return here[column] - 128;
    int next = min(max(column + (x & 1 ? 1 : -1), 0), columns - 1);
    if (!image.down) return ((3 * here[column] + here[next] + (x & 1 ? 2 : 1)) >> 2) - 128;
    const unsigned char *other = plane + (size_t)min(max(row + (y & 1 ? 1 : -1), 0), rows - 1) * image.stride_c;
    int nearest = 3 * here[column] + other[column], beside = 3 * here[next] + other[next];
    return ((3 * nearest + beside + (x & 1 ? 7 : 8)) >> 4) - 128;
}

extern "C" __global__ void join(const Planes *images) {
    Planes image = images[blockIdx.z];
    int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x >= image.width || y >= image.height) return;
    int light = image.y[(size_t)y * image.stride_y + x];
    int cb = image.cb ? colour(image.cb, image, x, y) : 0, cr = image.cr ? colour(image.cr, image, x, y) : 0;
    unsigned char *pixel = image.pixels + ((size_t)y * image.width + x) * 3;
    pixel[0] = min(max(light + ((91881 * cr + 32768) >> 16), 0), 255);
    pixel[1] = min(max(light + ((-22554 * cb - 46802 * cr + 32768) >> 16), 0), 255);
    pixel[2] = min(max(light + ((116130 * cb + 32768) >> 16), 0), 255);
}
"""


@dataclasses.dataclass(frozen=True)
class DeviceImage:
    """An RGB image in the GPU's memory, [height, width, 3] uint8."""

    pointer: int
    stride: int  # bytes from row to row
    height: int
    width: int
    owner: object  # what the memory lives by

    def download(self, gpu):
        """Its pixels [height, width, 3] in the processor's memory. gpu: the trt_detector.GpuContext that it is in."""
        import pycuda.driver as cuda

        rows = np.empty((self.height, self.stride), np.uint8)
        with gpu:
            stream = cuda.Stream()  # not the default one: that waits for all others
            cuda.memcpy_dtoh_async(rows, self.pointer, stream)
            stream.synchronize()
        return rows[:, : 3 * self.width].reshape(self.height, self.width, 3)


class MemoryPool:
    """GPU memory by powers of two, kept for whoever wants as much next.

    Any thread may let it go: it is only put aside then. (pycuda's DeviceMemoryPool ends the process where a thread without a
    CUDA context lets go.)
    """

    def __init__(self, cuda):
        self._cuda, self._aside = cuda, collections.defaultdict(list)

    def allocate(self, size):
        """A Block of at least `size` bytes. Its context is current. Raises pycuda's MemoryError."""
        size = 1 << max(size - 1, ALIGNMENT).bit_length()
        try:
            return Block(self._aside[size], self._aside[size].pop())
        except IndexError:
            pass
        try:
            return Block(self._aside[size], self._cuda.mem_alloc(size))
        except self._cuda.MemoryError:
            self.close()  # what lies aside may be as much
            return Block(self._aside[size], self._cuda.mem_alloc(size))

    def close(self):
        """Frees what lies aside. Its context is current."""
        for blocks in list(self._aside.values()):
            with contextlib.suppress(IndexError):  # other threads take some too
                while True:
                    blocks.pop().free()


class Block:
    """Memory of a MemoryPool, for as long as this lives."""

    def __init__(self, aside, memory):
        self._aside, self._memory = aside, memory

    def __int__(self):
        return int(self._memory)

    def __del__(self):
        self._aside.append(self._memory)


def resize_images(images, true_shapes, resizer, spec, table, device_table, pointer, stream):
    """Queues the resize of DeviceImages into an engine's input, [n, H, W, 3] or [n, 3, H, W], at `pointer`, in a stream.

    true_shapes [n, 2]: the (height, width) that each is resized to; resizer: of the model's metadata; spec: its InputSpec.
    table, device_table: IMAGE [n], page-locked, and the memory on the GPU that it goes to; theirs until the stream has got
    there. A CUDA context is current. Raises what pycuda raises, without nvcc at the first call.
    """
    import pycuda.driver as cuda

    rows = zip(images, np.asarray(true_shapes, np.int32).tolist(), strict=True)
    table[:] = [
        (image.pointer, image.stride, image.height, image.width, height, width, 0, 0) for image, (height, width) in rows
    ]
    for scale, old, new in (("scale_y", "rows", "height"), ("scale_x", "columns", "width")):
        table[scale] = table[old].astype(np.float32) / table[new].astype(np.float32)
    cuda.memcpy_htod_async(device_table, table, stream)
    pad = [np.float32(value) for value in resizer.get("pad_value", (0, 0, 0))]
    kernel = _kernels(spec.dtype.name, spec.layout)["resize"]
    arguments = int(device_table), int(pointer), spec.height, spec.width, *pad
    kernel.prepared_async_call(_grid(spec.height, spec.width, len(table)), BLOCK, stream, *arguments)


def join_planes(table, device_table, stream):
    """Queues the joining of JPEGs' planes to RGB images, in a stream.

    table: PLANES [n]: where the planes of each lie and its pixels go, bytes from row to row of the planes, its size, and by
    how many bits the colours' planes are narrower (across) and lower (down); `cb` and `cr` are 0 of a grey one. Pixels
    [height, width, 3] have no gaps. device_table: as of resize_images.
    """
    import pycuda.driver as cuda

    cuda.memcpy_htod_async(device_table, table, stream)
    grid = _grid(int(table["height"].max()), int(table["width"].max()), len(table))
    _kernels()["join"].prepared_async_call(grid, BLOCK, stream, int(device_table))


def _grid(height, width, images):
    return -(-width // BLOCK[0]), -(-height // BLOCK[1]), images


@functools.cache
def _kernels(dtype="float32", layout="NHWC"):
    """{name: kernel} for an engine's input of a type and a layout, compiled by nvcc, kept by pycuda in the user's cache.

    Who has pycuda mostly has nvcc: pip compiles pycuda with the CUDA toolkit. NVRTC would be one more package.
    """
    from pycuda.compiler import SourceModule

    module = SourceModule(KERNELS, options=compiler_options(dtype, layout), no_extern_c=True)
    kernels = {"resize": "PPiifff", "join": "P"}
    for name, arguments in kernels.items():
        kernels[name] = module.get_function(name)
        kernels[name].prepare(arguments)
    return kernels


def compiler_options(dtype, layout):
    """What makes KERNELS those for a type, "float32" or "uint8", and a layout."""
    kind, rounding = ("float", "") if dtype == "float32" else ("unsigned char", "__float2uint_rn")
    return [f"-DTYPE={kind}", f"-DPLANAR={int(layout == 'NCHW')}", f"-DROUND(x)={rounding}(x)"]
