"""JPEG files decoded and resized on the GPU, straight into an engine's input: nothing but their bytes crosses the bus.

nvImageCodec decodes (its hardware decoder equals libjpeg-turbo, which images.decoding uses, BENCHMARKS.md), a kernel resizes
as images.resizing does, bit for bit. What it is not sure to decode alike goes the CPU's way, image by image.
"""

import collections
import dataclasses
import functools
import itertools
import math
import os
import shutil
import struct

from commandline import UserError, warn

import numpy as np

import image_batcher
from image_batcher import Batch, warn_of_skipped
from images.decoding import ImageError, load_image
from images.resizing import placement_of
from runtimes.workers import in_order

PACKAGES = "nvidia-nvimgcodec-cu12 and nvidia-nvjpeg-cu12"
# Batches decoded at a time, and images, at least and at most. The hardware takes 10,500 a second from 32 on, 12,000 from 64,
# far fewer one by one; and the batches under way must keep the GPU busy meanwhile.
BATCHES_TOGETHER, FEWEST_TOGETHER, MOST_TOGETHER = 4, 8, 64
READ_AHEAD = 8  # such chunks of files: those that draw pictures read too
FILE_BYTES = 250_000  # memory for a file that another process reads; of a chunk, what does not fit comes as a message
# So many processors keep up with the fastest engine on one image at a time, and are faster: 991 images/s, the GPU 798.
CORES_FOR_ONE_BY_ONE = 8
LARGEST = 16_000_000  # pixels; larger ones go the CPU's way, which has limits of its own
# What the kernel is told of each image, as `struct Image`: `height` and `width` are those that it is resized to.
TABLE = np.dtype(
    [("pixels", np.uint64), ("stride", np.int64)]
    + [(name, np.int32) for name in ("rows", "columns", "height", "width")]
    + [(name, np.float32) for name in ("scale_y", "scale_x")]
)
# One thread a pixel of the network's input, one layer of blocks an image. TF1's bilinear resize (images.resizing) in float32,
# each product and sum rounded by itself: __fmul_rn and __fadd_rn are not merged into one rounding.
KERNEL = """
struct Image {
    const unsigned char *pixels;
    long long stride;
    int rows, columns, height, width;
    float scale_y, scale_x;
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
        out[PLANES ? (c * height + y) * width + x : (y * width + x) * 3 + c] = ROUND(value);
    }
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


class GpuResizer:
    """Resizes DeviceImages into an engine's input, [n, H, W, 3] or [n, 3, H, W], float32 or uint8."""

    def __init__(self, resizer, spec):
        """resizer: of the model's metadata; spec: its InputSpec. A CUDA context is current. Raises UserError without nvcc."""
        import pycuda.driver as cuda

        self._spec, self._copy = spec, cuda.memcpy_htod_async
        self._pad = [np.float32(value) for value in resizer.get("pad_value", (0, 0, 0))]
        self._kernel = _compile(spec.dtype.name, spec.layout)

    def resize(self, images, true_shapes, table, device_table, pointer, stream):
        """Queues the resize of DeviceImages to (height, width) `true_shapes` [n, 2], to the memory at `pointer`, in a stream.

        table, device_table: TABLE [n], page-locked, and the memory on the GPU that it goes to; theirs until the stream has
        got there.
        """
        rows = zip(images, np.asarray(true_shapes, np.int32).tolist(), strict=True)
        table[:] = [
            (image.pointer, image.stride, image.height, image.width, height, width, 0, 0)
            for image, (height, width) in rows
        ]
        for scale, old, new in (("scale_y", "rows", "height"), ("scale_x", "columns", "width")):
            table[scale] = table[old].astype(np.float32) / table[new].astype(np.float32)
        self._copy(device_table, table, stream)
        grid = -(-self._spec.width // 32), -(-self._spec.height // 8), len(table)
        arguments = int(device_table), int(pointer), self._spec.height, self._spec.width, *self._pad
        self._kernel.prepared_async_call(grid, (32, 8, 1), stream, *arguments)


@functools.cache
def _compile(dtype, layout):
    """The kernel for a type and a layout, compiled by nvcc and kept by pycuda in the user's cache folder."""
    from pycuda.compiler import SourceModule

    kind, rounding = ("float", "") if dtype == "float32" else ("unsigned char", "__float2uint_rn")
    options = [f"-DTYPE={kind}", f"-DPLANES={int(layout == 'NCHW')}", f"-DROUND(x)={rounding}(x)"]
    kernel = SourceModule(KERNEL, options=options, no_extern_c=True).get_function("resize")
    kernel.prepare("PPiifff")
    return kernel


def baseline_size(data):
    """(height, width) of a whole baseline JPEG of grey or YCbCr colours; None for any other file: that goes the CPU's way.

    (ITU T.81, B.2: markers, their lengths, the frame header; Adobe's marker says that colours are RGB by transform 0.)
    """
    if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
        return None
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xC0:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            plain = bits == 8 and components in (1, 3) and 0 < height * width <= LARGEST
            return (height, width) if plain else None
        if 0xC0 < marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):  # another coding; C4, C8 and CC are no frames
            return None
        if marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and data[at + 15 : at + 16] == b"\0":
            return None
        at += 2 + length
    return None


class GpuDecoder:
    """JPEGs from memory to DeviceImages."""

    def __init__(self, gpu, exif_rotate=False):
        """gpu: a trt_detector.GpuContext. Raises ImportError without nvImageCodec."""
        import pycuda.driver as cuda
        from nvidia import nvimgcodec

        self._gpu, self._cuda, self._codec = gpu, cuda, nvimgcodec
        self._parameters = nvimgcodec.DecodeParams(apply_exif_orientation=exif_rotate)
        kinds = {"the JPEG hardware": "HW_GPU_ONLY", "the GPU and processors": "HYBRID_CPU_GPU"}
        for self.name, kind in kinds.items():
            try:
                backend = nvimgcodec.Backend(getattr(nvimgcodec.BackendKind, kind))
                self._decoder = nvimgcodec.Decoder(device_id=gpu.number, backends=[backend])
                break
            except Exception as error:  # no such hardware
                reason = error
        else:
            raise UserError(f"--decoder gpu: nvImageCodec has no decoder for this GPU ({reason}); use --decoder cpu")
        with gpu:
            self._stream = cuda.Stream()

    def decode(self, files):
        """A DeviceImage for each file's bytes, [n] uint8; None for those that cannot be decoded here."""
        with self._gpu:
            streams = [self._codec.CodeStream(data) for data in files]
            images = self._decoder.decode(streams, params=self._parameters, cuda_stream=self._stream.handle)
            self._stream.synchronize()
        return [image and self._device_image(image) for image in images]

    def _device_image(self, image):
        described = image.__cuda_array_interface__
        height, width, channels = described["shape"]
        if channels != 3:
            return None
        stride = described.get("strides")
        return DeviceImage(described["data"][0], stride[0] if stride else 3 * width, height, width, image)

    def upload(self, image):
        """A DeviceImage of an RGB array [height, width, 3] uint8."""
        with self._gpu:
            memory = self._cuda.to_device(np.ascontiguousarray(image))
        return DeviceImage(int(memory), 3 * image.shape[1], *image.shape[:2], _Uploaded(self._gpu, memory))


class _Uploaded:
    """GPU memory that is freed in its context by whichever thread lets it go last; pycuda by itself would leak it there."""

    def __init__(self, gpu, memory):
        self._gpu, self._memory = gpu, memory

    def __del__(self):
        if not self._gpu.closed:
            with self._gpu:
                self._memory.free()


def choose_decoder(choice, detector, files, batch_size, exif_rotate=False):
    """The GpuDecoder for an open detector and image files, or None where processors are to decode.

    choice: "auto", "cpu" or "gpu", of --decoder. Warns where only a package is missing; raises UserError where "gpu" cannot
    be.
    """
    reason = _why_not(detector, files)
    processors_suffice = batch_size == 1 and (os.cpu_count() or 1) >= CORES_FOR_ONE_BY_ONE
    if choice == "cpu" or (choice == "auto" and (reason or processors_suffice)):
        return None
    if reason:
        raise UserError(f"--decoder gpu: {reason}; use --decoder cpu")
    try:
        return GpuDecoder(detector.gpu, exif_rotate)
    except ImportError as error:
        missing = f"{PACKAGES} are not installed ({error}): pip install -r requirements-gpu.txt"
        if choice == "gpu":
            raise UserError(f"--decoder gpu: {missing}") from error
        warn(f"processors decode the images: {missing}")
        return None


def _why_not(detector, files):
    """Why the GPU cannot decode, or is not worth it; None where it can."""
    if detector.gpu is None:
        return f"{detector.runtime} does not run on a GPU here"
    if detector.metadata["resizer"].get("method", "bilinear") != "bilinear":
        return f"resize_method {detector.metadata['resizer']['method']} is done by processors alone"
    if not shutil.which("nvcc"):
        return "nvcc, of the CUDA toolkit, is not on the PATH: it compiles the resize"
    jpegs = sum(str(path).lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif")) for path in files)
    return None if 2 * jpegs >= len(files) else "most of the images are no JPEGs"


def files_together(batch_size):
    """How many files are read, and decoded, at a time."""
    return min(MOST_TOGETHER, max(FEWEST_TOGETHER, BATCHES_TOGETHER * batch_size))


def reading_memories(batch_size):
    """(number, bytes) of the shared memories that a GpuBatcher needs of runtimes.workers.Workers."""
    return READ_AHEAD + 2, files_together(batch_size) * FILE_BYTES


class GpuBatcher:
    """As image_batcher.ImageBatcher, with DeviceImages for tensors, in order.

    Workers read ahead, the thread that asks for batches decodes: the codec takes and leaves Python's lock for each image,
    so that whatever runs in this process's Python beside it makes it wait (BENCHMARKS.md).
    """

    def __init__(self, paths, resizer, batch_size, decoder, workers, load=load_image, skip=None):
        """workers: a runtimes.workers.Workers, where they are processes with `reading_memories`."""
        self.paths, self.batch_size, self.skipped = paths, batch_size, 0
        self.decode_seconds = self.resize_seconds = 0.0  # of processors: none
        self.by_cpu = 0  # images that were decoded by the CPU
        self._resizer, self._decoder, self._workers, self._load = resizer, decoder, workers, load
        self._read = functools.partial(_read, resizer=resizer, load=load)
        self._free = collections.deque(range(len(workers.memory)))  # numbers of shared memories, with processes
        self._skip = skip or warn_of_skipped

    def __iter__(self):
        """Yields Batch after Batch, each but the last of batch_size images."""
        batch, numbers = [], itertools.count()
        tasks = in_order(self._submit, _chunks(self.paths, files_together(self.batch_size)), READ_AHEAD)
        try:
            for slot, paths, results in tasks:
                images = self._decode(paths, self._contents(slot, results))
                if slot is not None:
                    self._free.append(slot)
                for path, image in zip(paths, images, strict=True):
                    number = next(numbers)
                    if isinstance(image, str):
                        self.skipped += 1
                        self._skip(number, path, image)
                        continue
                    batch.append((number, path, None, placement_of(image.height, image.width, self._resizer), image))
                    if len(batch) == self.batch_size:
                        yield Batch(*map(list, zip(*batch, strict=True)))
                        batch = []
            if batch:
                yield Batch(*map(list, zip(*batch, strict=True)))
        finally:
            tasks.close()

    def _submit(self, paths):
        slot = self._free.popleft() if self._free else None
        return self._workers.submit(self._read, paths, slot)

    def _contents(self, slot, results):
        """What `_read` tells of, from the shared memory where it is there."""
        memory = None if slot is None else np.frombuffer(self._workers.memory[slot], np.uint8)
        return [
            memory[result[0] : result[0] + math.prod(result[1])].reshape(result[1])
            if isinstance(result, tuple)
            else result
            for result in results
        ]

    def _decode(self, paths, contents):
        """A DeviceImage for each of what `_read` makes of files, or why it cannot be read."""
        found = iter(self._decoder.decode([x for x in contents if not isinstance(x, str) and x.ndim == 1]))
        images = []
        for path, image in zip(paths, contents, strict=True):
            if not isinstance(image, str) and image.ndim == 1:
                image = next(found) or _by_cpu(path, self._resizer, self._load)
            if isinstance(image, np.ndarray):
                self.by_cpu += 1
                image = self._decoder.upload(image)
            images.append(image)
        return images


def _read(paths, slot, resizer, load):
    """A worker's task: a baseline JPEG's bytes [n] uint8, any other file's pixels [height, width, 3], or why there are none.

    What fits into the shared memory `slot` is written there, and told by (where it begins, its shape). Returns (slot,
    paths, results).
    """
    memory = np.empty(0, np.uint8) if slot is None else np.frombuffer(image_batcher.SHARED[slot], np.uint8)
    results, begin = [], 0
    for path in paths:
        data = _baseline(path, resizer)
        data = _by_cpu(path, resizer, load) if data is None else np.frombuffer(data, np.uint8)
        if not isinstance(data, str) and begin + data.size <= memory.size:
            memory[begin : begin + data.size] = data.ravel()
            begin, data = begin + data.size, (begin, data.shape)
        results.append(data)
    return slot, paths, results


def _baseline(path, resizer):
    """The bytes of a baseline JPEG; None for any other file, which the CPU may read or say why not."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) > LARGEST:
            return None
        with open(path, "rb") as file:
            data = file.read()
        size = baseline_size(data)
        return data if size and placement_of(*size, resizer) else None
    except (OSError, ImageError):
        return None


def _by_cpu(path, resizer, load):
    """The image as the CPU decodes it, or why it cannot be read."""
    try:
        image = load(path)
        placement_of(*image.shape[:2], resizer)
    except ImageError as error:
        return str(error)
    return image


def _chunks(paths, size):
    paths = iter(paths)
    return iter(lambda: list(itertools.islice(paths, size)), [])
