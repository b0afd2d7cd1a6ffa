"""JPEG files decoded and resized on the GPU, straight into an engine's input: nothing but their bytes crosses the bus.

nvImageCodec decodes (its hardware decoder equals libjpeg-turbo, which images.decoding uses, BENCHMARKS.md), a kernel resizes
as images.resizing does, bit for bit. What it is not sure to decode alike goes the CPU's way, image by image.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import shutil
import stat
import struct

from commandline import UserError, warn

import numpy as np

from image_batcher import Batch, chunks, warn_of_skipped
from images.decoding import ImageError, load_image
from images.resizing import placement_of
from runtimes.workers import MAX_THREADS, in_order

PACKAGES = "nvidia-nvimgcodec-cu12 and nvidia-nvjpeg-cu12"
# Batches decoded at a time, and images, at least and at most. The hardware takes 10,500 a second from 32 on, 12,000 from 64,
# far fewer one by one; and the batches under way must keep the GPU busy meanwhile.
BATCHES_TOGETHER, FEWEST_TOGETHER, MOST_TOGETHER = 4, 8, 64
LOOK_AHEAD = 2  # such chunks of files, whose reading begins meanwhile
HEADER_BYTES = 4096  # of a JPEG that are read at first
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


def baseline_size(data, end=None):
    """(height, width) of a whole baseline JPEG of grey or YCbCr colours; None for any other file: that goes the CPU's way.

    data: the file's beginning, to its frame header at least; end: its last two bytes, if `data` is not all of it. (ITU T.81,
    B.2: markers, their lengths, the frame header; Adobe's marker says that colours are RGB by transform 0.)
    """
    if not data.startswith(b"\xff\xd8") or (data[-2:] if end is None else end) != b"\xff\xd9":
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


def plain_jpeg(path):
    """As baseline_size, of a file. Asks the system to have all of it in memory soon. Raises OSError."""
    # By the system's own calls: half the time of a file object's, for every image (a named pipe must not make it wait).
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not 2 <= status.st_size <= LARGEST:
            return None
        data = os.read(file, HEADER_BYTES)
        os.lseek(file, -2, os.SEEK_END)
        end = os.read(file, 2)
        size = baseline_size(data, end)
        if not size and len(data) < status.st_size:  # there may be a preview before the frame header
            os.lseek(file, 0, os.SEEK_SET)
            size = baseline_size(os.read(file, LARGEST), end)
        if size and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
        return size
    finally:
        os.close(file)


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

    def decode(self, paths):
        """A DeviceImage for each file; None for those that cannot be decoded here. For one thread at a time."""
        with self._gpu:
            streams = [self._open(path) for path in paths]
            opened = [stream for stream in streams if stream]
            images = iter(self._decoder.decode(opened, params=self._parameters, cuda_stream=self._stream.handle))
            self._stream.synchronize()
        return [stream and self._device_image(next(images)) for stream in streams]

    def _open(self, path):
        """The codec's view of a file, which it reads itself, without Python's lock; None where it cannot."""
        try:
            return self._codec.CodeStream(os.fspath(path))
        except Exception:  # whatever it raises: the CPU's way says why
            return None

    def _device_image(self, image):
        if image is None:
            return None
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


class GpuBatcher:
    """As image_batcher.ImageBatcher, with DeviceImages for tensors, in order.

    One thread decodes, a chunk ahead of the thread that asks for batches; the codec itself reads the files. It takes and
    leaves Python's lock for each image, so that any more Python at work makes it wait (BENCHMARKS.md).
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
            concurrent.futures.ThreadPoolExecutor(1) as ahead,
        ):
            decoding = self._decoding(processors)
            decoded = in_order(lambda _: ahead.submit(next, decoding, None), itertools.count(), 1)
            with contextlib.closing(decoded):
                for path, image in itertools.chain.from_iterable(iter(lambda: next(decoded), None)):
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

    def _decoding(self, processors):
        """Yields [(path, DeviceImage, or why it cannot be read)] of some files; `processors` decode what the GPU cannot."""
        looked_at = collections.deque()
        for paths in chunks(self.paths, self._together):
            looked_at.append(
                [(path, None if self._plain(path) else processors.submit(self._by_cpu, path)) for path in paths]
            )
            if len(looked_at) > LOOK_AHEAD:
                yield self._decode(looked_at.popleft())
        while looked_at:
            yield self._decode(looked_at.popleft())

    def _plain(self, path):
        """Whether the GPU can decode a file, and the network takes its shape."""
        try:
            size = plain_jpeg(path)
            return size and placement_of(*size, self._resizer)
        except (OSError, ImageError):
            return False

    def _by_cpu(self, path):
        """The image as the CPU decodes it, or why it cannot be read."""
        try:
            image = self._load(path)
            placement_of(*image.shape[:2], self._resizer)
        except ImageError as error:
            return str(error)
        return image

    def _decode(self, looked_at):
        found = iter(self._decoder.decode([path for path, other in looked_at if not other]))
        images = []
        for path, other in looked_at:
            image = other.result() if other else next(found) or self._by_cpu(path)
            if isinstance(image, np.ndarray):
                self.by_cpu += 1
                image = self._decoder.upload(image)
            images.append((path, image))
        return images
