"""JPEG files decoded and resized on the GPU, straight into an engine's input: nothing but their bytes crosses the bus.

nvJPEG decodes (its hardware decoder equals libjpeg-turbo, which images.decoding uses, BENCHMARKS.md), a kernel resizes as
images.resizing does, bit for bit. What it is not sure to decode alike goes the CPU's way, image by image.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import os
import shutil
import stat
import struct

from commandline import UserError, warn

import numpy as np
from PIL import ExifTags, Image

from image_batcher import Batch, warn_of_skipped
from images.decoding import ImageError, load_image
from images.resizing import placement_of
from runtimes import nvjpeg
from runtimes.workers import MAX_THREADS, in_order

# Batches decoded at a time, and images, at least and at most. The hardware takes 10,500 a second from 32 on, 12,000 from 64,
# far fewer one by one; and the batches under way must keep the GPU busy meanwhile.
BATCHES_TOGETHER, FEWEST_TOGETHER, MOST_TOGETHER = 4, 8, 64
LOOK_AHEAD = 1  # such chunks of files, read meanwhile
PIXELS_TOGETHER = 100_000_000  # from so many on no more are decoded at a time
DECODERS = 1  # threads that decode
ALIGNMENT = 256  # of images in the GPU's memory
EXIF_WITHIN = 70_000  # bytes of a JPEG's beginning
# So many processors keep up with the fastest engine on one image at a time about as well (BENCHMARKS.md).
CORES_FOR_ONE_BY_ONE = 8
KEPT_BYTES = 2_000_000  # of a decoded image that is kept to be drawn on, at most; larger ones are decoded again
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

    def download(self, gpu):
        """Its pixels [height, width, 3] in the processor's memory. gpu: the trt_detector.GpuContext that it is in."""
        import pycuda.driver as cuda

        rows = np.empty((self.height, self.stride), np.uint8)
        with gpu:
            stream = cuda.Stream()  # not the default one: that waits for all others
            cuda.memcpy_dtoh_async(rows, self.pointer, stream)
            stream.synchronize()
        return rows[:, : 3 * self.width].reshape(self.height, self.width, 3)


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
    at, last = 2, len(data) - 9
    while at < last and data[at] == 0xFF:
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


def read_jpeg(path):
    """(bytes, (height, width)) of a JPEG as baseline_size wants it; None of any other file. Raises OSError."""
    # By the system's own calls: half the time of a file object's, for every image (a named pipe must not make it wait).
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not 2 <= status.st_size <= LARGEST:
            return None
        data = os.read(file, status.st_size)
    finally:
        os.close(file)
    size = baseline_size(data)
    return size and (data, size)


def is_turned(data):
    """Whether a JPEG's EXIF data ask for it to be shown other than it is stored."""
    if b"Exif" not in data[:EXIF_WITHIN]:
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


class GpuDecoder:
    """JPEGs from memory to DeviceImages, by nvJPEG."""

    def __init__(self, gpu, exif_rotate=False, backends=nvjpeg.BACKENDS):
        """gpu: a trt_detector.GpuContext. Raises ImportError without nvJPEG, UserError where it does not run."""
        import pycuda.driver as cuda
        from pycuda.tools import DeviceMemoryPool

        self._gpu, self._cuda, self._exif_rotate = gpu, cuda, exif_rotate
        with gpu:
            try:
                self._codec = nvjpeg.NvJpeg(backends)
                self._states = [self._codec.new_state() for _ in range(DECODERS)]
            except OSError as error:
                raise UserError(
                    f"--decoder gpu: nvJPEG does not run on this GPU ({error}); use --decoder cpu"
                ) from error
            self._streams = {state: cuda.Stream() for state in self._states}
            self._pool = DeviceMemoryPool()
        self.name = self._codec.name

    def decode(self, files):
        """A DeviceImage for each (bytes, (height, width)) of read_jpeg; None for those that cannot be decoded here.

        DECODERS threads at a time. Raises UserError where the GPU's memory is too small.
        """
        state = self._states.pop()
        try:
            with self._gpu:
                return self._decode(files, state, self._streams[state])
        finally:
            self._states.append(state)

    def _decode(self, files, state, stream):
        able = [
            i
            for i, (data, _) in enumerate(files)
            if state.supports(data) and not (self._exif_rotate and is_turned(data))
        ]
        images = [None] * len(files)
        if not able:
            return images
        places, end = [], 0
        for i in able:
            height, width = files[i][1]
            places.append(end)
            end += -(-3 * height * width // ALIGNMENT) * ALIGNMENT
        # Powers of two: blocks that are given back fit again.
        try:
            memory = self._pool.allocate(1 << (end - 1).bit_length())
        except self._cuda.MemoryError as error:
            raise UserError("--decoder gpu: too little GPU memory; --decoder cpu takes less") from error
        pointers = [int(memory) + place for place in places]
        strides = [3 * files[i][1][1] for i in able]
        decoded = state.decode([files[i][0] for i in able], pointers, strides, stream.handle)
        stream.synchronize()
        if decoded:
            for i, pointer, stride in zip(able, pointers, strides, strict=True):
                images[i] = DeviceImage(pointer, stride, *files[i][1], memory)
        return images

    def upload(self, image):
        """A DeviceImage of an RGB array [height, width, 3] uint8."""
        with self._gpu:
            memory = self._cuda.to_device(np.ascontiguousarray(image))
        return DeviceImage(int(memory), 3 * image.shape[1], *image.shape[:2], _Uploaded(self._gpu, memory))

    def close(self):
        """In its context, which then goes."""
        self._streams.clear()
        for state in self._states:
            state.close()
        self._codec.close()
        self._pool.stop_holding()


class _Uploaded:
    """GPU memory that is freed in its context by whichever thread lets it go last; pycuda by itself would leak it there."""

    def __init__(self, gpu, memory):
        self._gpu, self._memory = gpu, memory

    def __del__(self):
        if not self._gpu.closed:
            with self._gpu:
                self._memory.free()


def choose_decoder(choice, detector, files, batch_size, exif_rotate=False):
    """The GpuDecoder for an open detector and image files, or None where processors are to decode. It closes with the detector.

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
        if exif_rotate not in detector.gpu.decoders:
            detector.gpu.decoders[exif_rotate] = GpuDecoder(detector.gpu, exif_rotate)
        return detector.gpu.decoders[exif_rotate]
    except ImportError as error:
        missing = f"nvJPEG cannot be loaded ({error}): pip install -r requirements-gpu.txt"
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


class GpuBatcher:
    """As image_batcher.ImageBatcher, with DeviceImages for tensors, in order.

    One thread reads files, one or some decode them, ahead of the thread that asks for batches.
    """

    def __init__(self, paths, resizer, batch_size, decoder, load=load_image, skip=None, keep_images=False):
        """keep_images: whether batches have `images`, on the GPU too, but for large ones."""
        self.paths, self.batch_size, self.skipped = paths, batch_size, 0
        self.decode_seconds = self.resize_seconds = 0.0  # of processors: none
        self.by_cpu = 0  # images that were decoded by the CPU
        self._resizer, self._decoder, self._load = resizer, decoder, load
        self._together = min(MOST_TOGETHER, max(FEWEST_TOGETHER, BATCHES_TOGETHER * batch_size))
        self._skip, self._keep = skip or warn_of_skipped, keep_images

    def __iter__(self):
        """Yields Batch after Batch, each but the last of batch_size images."""
        batch, numbers = [], itertools.count()
        with (
            concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as processors,
            concurrent.futures.ThreadPoolExecutor(1) as reader,
            concurrent.futures.ThreadPoolExecutor(DECODERS) as decoders,
        ):
            chunks = self._chunks(processors)
            read = in_order(lambda _: reader.submit(next, chunks, None), itertools.count(), LOOK_AHEAD)
            with contextlib.closing(read):
                begun = iter(lambda: next(read), None)
                decoded = in_order(lambda chunk: decoders.submit(self._decode, chunk), begun, DECODERS)
                with contextlib.closing(decoded):
                    for path, image in itertools.chain.from_iterable(decoded):
                        number = next(numbers)
                        if isinstance(image, str):
                            self.skipped += 1
                            self._skip(number, path, image)
                            continue
                        placement = placement_of(image.height, image.width, self._resizer)
                        kept = image if self._keep and image.height * image.stride <= KEPT_BYTES else None
                        batch.append((number, path, kept, placement, image))
                        if len(batch) == self.batch_size:
                            yield Batch(*map(list, zip(*batch, strict=True)))
                            batch = []
            if batch:
                yield Batch(*map(list, zip(*batch, strict=True)))

    def _chunks(self, processors):
        """Yields [(path, what read_jpeg gives)] of some files; of what the GPU cannot decode, `processors`' Future."""
        chunk, pixels = [], 0
        for path in self.paths:
            jpeg = self._read(path)
            chunk.append((path, jpeg or processors.submit(self._by_cpu, path)))
            pixels += jpeg[1][0] * jpeg[1][1] if jpeg else 0
            if len(chunk) == self._together or pixels >= PIXELS_TOGETHER:
                yield chunk
                chunk, pixels = [], 0
        if chunk:
            yield chunk

    def _read(self, path):
        """As read_jpeg; None too where the network does not take the image's shape, or the file cannot be read."""
        try:
            jpeg = read_jpeg(path)
            return jpeg and placement_of(*jpeg[1], self._resizer) and jpeg
        except (OSError, ImageError):
            return None

    def _by_cpu(self, path):
        """The image as the CPU decodes it, or why it cannot be read."""
        try:
            image = self._load(path)
            placement_of(*image.shape[:2], self._resizer)
        except ImageError as error:
            return str(error)
        return image

    def _decode(self, chunk):
        """[(path, DeviceImage, or why it cannot be read)] of a chunk."""
        found = iter(self._decoder.decode([jpeg for _, jpeg in chunk if isinstance(jpeg, tuple)]))
        images = []
        for path, other in chunk:
            image = (next(found) or self._by_cpu(path)) if isinstance(other, tuple) else other.result()
            if isinstance(image, np.ndarray):
                self.by_cpu += 1
                image = self._decoder.upload(image)
            images.append((path, image))
        return images
