"""JPEG files decoded on the GPU and resized into an engine's input: nothing but their bytes crosses the bus.

nvJPEG decodes, to pixels where they are exact, else to planes that a kernel makes pixels of; another one resizes
(runtimes.device_images). JPEG hardware and these kernels give to the last bit what processors give (images.decoding,
images.resizing); GpuDecoder makes sure of that with a picture of each kind. Whatever else goes the CPU's way, image by image.
"""

import concurrent.futures
import contextlib
import functools
import io
import itertools
import os
import shutil
import stat
import struct
import typing

from commandline import UserError, warn

import numpy as np
from PIL import Image

from image_batcher import Batch, warn_of_skipped
from images.decoding import ImageError, check_jpeg, decode_image, load_image, orientation_of
from images.resizing import placement_of
from runtimes import nvjpeg
from runtimes.device_images import ALIGNMENT, PLANES, DeviceImage, MemoryPool, join_planes
from runtimes.processes import processor_count
from runtimes.workers import MAX_THREADS, in_order

# Batches decoded at a time, and images, at least and at most: far fewer a second one by one (BENCHMARKS.md).
BATCHES_TOGETHER, FEWEST_TOGETHER, MOST_TOGETHER = 4, 8, 32
DECODERS = 2  # threads that decode
READY_AHEAD = 4  # such chunks of files, being decoded or waiting for the network
READ_AHEAD = 1  # being read
PIXELS_TOGETHER = 100_000_000  # from so many on no more are decoded at a time
# By how many bits the colours' planes are narrower and lower; a grey image has none. Of any other kind few JPEGs are.
SAMPLINGS = {"grey": None, "4:4:4": (0, 0), "4:2:2": (1, 0), "4:2:0": (1, 1)}
NAMES = {b"\x11\x11\x11": "4:4:4", b"\x21\x11\x11": "4:2:2", b"\x22\x11\x11": "4:2:0"}
KEPT_BYTES = 2_000_000  # of a decoded image that is kept to be drawn on, at most; larger ones are decoded again
LARGEST = 16_000_000  # pixels; larger ones go the CPU's way, which has limits of its own


class Frame(typing.NamedTuple):
    """What a JPEG's header says of its pixels."""

    height: int
    width: int
    sampling: str  # of SAMPLINGS


def baseline_frame(data):
    """The Frame of a whole baseline JPEG of grey or YCbCr colours in one scan; None for any other file: that goes the CPU's way.

    (ITU T.81, B.2: markers, their lengths, headers of frame and scan; Adobe's marker says that colours are RGB by transform 0.)
    """
    if not data.startswith(b"\xff\xd8") or not data.endswith(b"\xff\xd9"):
        return None
    at, last, frame = 2, len(data) - 9, None
    while at < last and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        rgb = marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and data[at + 15 : at + 16] == b"\0"
        if rgb or (0xC0 < marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC)):  # another coding; these are no frames
            return None
        if marker == 0xDA:  # the pixels begin, of so many components
            return frame if frame and data[at + 4] == (1 if frame.sampling == "grey" else 3) else None
        if marker == 0xC0:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            # Of each component: its number, how many samples of it stand for the most of all, across and down, its table.
            sampling = "grey" if components == 1 else NAMES.get(data[at + 11 : at + 10 + 3 * components : 3])
            plain = bits == 8 and sampling and 0 < height * width <= LARGEST
            if frame or not plain or data[at + 10 : at + 19 : 3] == b"RGB":  # libjpeg takes these numbers for RGB
                return None
            frame = Frame(height, width, sampling)
        at += 2 + length
    return None


def read_jpeg(path):
    """(bytes, Frame) of a JPEG as baseline_frame wants it; None of any other file. Raises OSError."""
    # By the system's own calls: half the time of a file object's, for every image (a named pipe must not make it wait).
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not 2 <= status.st_size <= LARGEST:
            return None
        data = os.read(file, status.st_size)
    finally:
        os.close(file)
    frame = baseline_frame(data)
    return frame and (data, frame)


def is_turned(data):
    """Whether a JPEG's EXIF or XMP data ask for it to be shown other than it is stored."""
    if b"Exif" not in data and b"Orientation" not in data:  # XMP has it by name
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return orientation_of(image) != 1
    except Exception:  # whatever Pillow raises: the CPU's way says why
        return True


class _Lane(typing.NamedTuple):
    """What one thread decodes with."""

    pixels: nvjpeg.State
    planes: nvjpeg.State
    stream: object  # CUDA's


class GpuDecoder:
    """JPEGs from memory to DeviceImages, by nvJPEG. `name` says by what of it."""

    def __init__(self, gpu, exif_rotate=False):
        """gpu: a trt_detector.GpuContext. Raises ImportError without nvJPEG, and what ctypes, CUDA and nvcc raise."""
        import pycuda.driver as cuda

        self._gpu, self._cuda, self._exif_rotate = gpu, cuda, exif_rotate
        self._pool = MemoryPool(cuda)
        with gpu:
            self._codec = nvjpeg.NvJpeg()
            self._lanes = [self._new_lane() for _ in range(DECODERS)]
        self.name = self._codec.name
        self.samplings = set(SAMPLINGS)  # that are decoded here
        # To pixels at once, where these are exact: no planes in between, and no kernel.
        self._to_pixels = set(SAMPLINGS)
        self._to_pixels = {sampling for sampling in SAMPLINGS if not self._difference(sampling)}
        others = {sampling: self._difference(sampling) for sampling in SAMPLINGS.keys() - self._to_pixels}
        self.differences = dict.fromkeys(SAMPLINGS, 0) | others

    def _new_lane(self):
        return _Lane(self._codec.new_state(nvjpeg.RGB), self._codec.new_state(nvjpeg.YUV), self._cuda.Stream())

    def _difference(self, sampling):
        """By how much a picture of a kind differs from what processors decode, of 255; 255 where it is not decoded here."""
        data = sample_picture(sampling)
        (image,) = self.decode([(data, baseline_frame(data))])
        if image is None:
            return 255
        return int(np.abs(image.download(self._gpu) - decode_image(data).astype(int)).max())

    def decode(self, files):
        """A DeviceImage for each (bytes, Frame) of read_jpeg; None for those that cannot be decoded here.

        DECODERS threads at a time. Raises UserError where the GPU's memory is too small.
        """
        lane, images = self._lanes.pop(), [None] * len(files)
        try:
            with self._gpu, self._naming_want_of_memory():
                able = [i for i, file in enumerate(files) if self._can_decode(lane, *file)]
                to_pixels = [i for i in able if files[i][1].sampling in self._to_pixels]
                to_planes = [i for i in able if files[i][1].sampling not in self._to_pixels]
                for some, way in ((to_pixels, self._decode_pixels), (to_planes, self._decode_planes)):
                    if some:
                        made = way(lane, *zip(*(files[i] for i in some), strict=True))
                        for i, image in zip(some, made, strict=True):
                            images[i] = image
        finally:
            self._lanes.append(lane)
        return images

    @contextlib.contextmanager
    def _naming_want_of_memory(self):
        try:
            yield
        except self._cuda.MemoryError as error:
            raise UserError("--decoder gpu: too little GPU memory; --decoder cpu takes less") from error

    def _decode_pixels(self, lane, data, frames):
        """A DeviceImage for each of JPEGs, bytes and Frames; None for all where nvJPEG fails."""
        images = self._allocate(frames)
        try:
            pointers, strides = ([[getattr(x, name)] for x in images] for name in ("pointer", "stride"))
            fine = lane.pixels.decode(data, pointers, strides, lane.stream.handle)
        finally:
            lane.stream.synchronize()
        return images if fine else [None] * len(data)

    def _decode_planes(self, lane, data, frames):
        """As _decode_pixels."""
        kinds = [_planes(frame) for frame in frames]
        planes = self._pool.allocate(sum(size for kind in kinds for _, size in kind))
        images = self._allocate(frames)
        rows = _rows(frames, kinds, int(planes), images)
        try:
            strides = [(row[4], row[5], row[5]) for row in rows]
            fine = lane.planes.decode(data, [row[:3] for row in rows], strides, lane.stream.handle)
            if fine:
                device_table = self._pool.allocate(len(rows) * PLANES.itemsize)
                join_planes(np.array(rows, PLANES), int(device_table), lane.stream)
        finally:
            lane.stream.synchronize()  # then the planes may go
        return images if fine else [None] * len(data)

    def _allocate(self, frames):
        """DeviceImages for the pixels of JPEGs, one behind the other."""
        sizes = [_aligned(3 * frame.height * frame.width) for frame in frames]
        memory = self._pool.allocate(sum(sizes))
        places = itertools.accumulate(sizes[:-1], initial=int(memory))
        return [
            DeviceImage(place, 3 * frame.width, frame.height, frame.width, memory)
            for place, frame in zip(places, frames, strict=True)
        ]

    def _can_decode(self, lane, data, frame):
        known = frame.sampling in self.samplings
        return known and lane.planes.supports(data) and not (self._exif_rotate and is_turned(data))

    def upload(self, image):
        """A DeviceImage of an RGB array [height, width, 3] uint8. Raises UserError as `decode`."""
        with self._gpu, self._naming_want_of_memory():
            memory = self._pool.allocate(image.nbytes)
            self._cuda.memcpy_htod(int(memory), np.ascontiguousarray(image))
        return DeviceImage(int(memory), 3 * image.shape[1], *image.shape[:2], memory)

    def close(self):
        """In its context, which then goes."""
        for lane in self._lanes:
            lane.pixels.close()
            lane.planes.close()
        self._lanes.clear()
        self._codec.close()
        self._pool.close()


def _planes(frame):
    """[(bytes from row to row, bytes)] of the planes of a JPEG: one, or y, cb and cr; whole blocks of 8 x 8 samples in each."""
    width, height = (-(-size // 16) * 16 for size in (frame.width, frame.height))
    shifts = SAMPLINGS[frame.sampling]
    sizes = [(width, height)] + ([(width >> shifts[0], height >> shifts[1])] * 2 if shifts else [])
    return [(width, _aligned(width * height)) for width, height in sizes]


def _aligned(size):
    return -(-size // ALIGNMENT) * ALIGNMENT


def _rows(frames, kinds, planes, images):
    """[values of a PLANES] for JPEGs whose planes (kinds: what _planes gives of each) lie one behind the other from that place
    on, and whose pixels are to be those DeviceImages."""
    rows = []
    for frame, kind, image in zip(frames, kinds, images, strict=True):
        pointers, strides = [0, 0, 0], [0, 0, 0]
        for i, (stride, size) in enumerate(kind):
            pointers[i], strides[i] = planes, stride
            planes += size
        rows.append((*pointers, image.pointer, *strides[:2], *frame[:2], *(SAMPLINGS[frame.sampling] or (0, 0))))
    return rows


def sample_picture(sampling):
    """A small JPEG of a kind of SAMPLINGS, of many colours and edges, its sizes not even."""
    y, x = np.mgrid[:45, :67]
    image = (
        np.stack([x * 3 + y, x * y // 9, 255 - y * 4 + x % 7 * 9], axis=2) + 60 * (x // 6 % 2 * (y // 5 % 2))[..., None]
    )
    image = Image.fromarray((image % 256).astype(np.uint8))
    buffer = io.BytesIO()
    if sampling == "grey":
        image.convert("L").save(buffer, "JPEG")
    else:
        image.save(buffer, "JPEG", subsampling=sampling)
    return buffer.getvalue()


def choose_decoder(choice, detector, files, exif_rotate=False):
    """The GpuDecoder for an open detector and image files, or None where processors are to decode. It closes with the detector.

    choice: "auto", "cpu" or "gpu", of --decoder. Where "gpu" cannot be, raises UserError. With "auto" warns where nvJPEG, CUDA
    or nvcc fail.
    """
    reason = _why_not(detector, files)
    if choice == "cpu" or (choice == "auto" and reason):
        return None
    if reason:
        raise UserError(f"--decoder gpu: {reason}; use --decoder cpu")
    decoders = detector.gpu.decoders
    if choice == "auto" and exif_rotate in decoders and not decoders[exif_rotate]:
        return None  # as it was before
    try:
        decoder = decoders.get(exif_rotate) or GpuDecoder(detector.gpu, exif_rotate)
    except Exception as error:  # of ctypes, CUDA, nvcc: whatever it is, processors can do it
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, ImportError):
            why = f"nvJPEG cannot be loaded ({why}): pip install -r requirements-gpu.txt"
        if choice == "gpu":
            raise UserError(f"--decoder gpu: {why}; or use --decoder cpu") from error
        warn(f"processors decode the images: {why}")
        decoders[exif_rotate] = None
        return None
    _limit(choice, decoder)
    if not decoder.samplings and not decoders.get(exif_rotate):
        with detector.gpu:
            decoder.close()
    decoders[exif_rotate] = decoder if decoder.samplings else None
    return decoders[exif_rotate]


def _limit(choice, decoder):
    """Has a GpuDecoder decode only what it decodes as processors do. With "gpu" it decodes the rest too, and that is said;
    raises UserError where it decodes nothing at all."""
    differences = {sampling: by for sampling, by in decoder.differences.items() if by < 255}
    exact, others = ({sampling for sampling, by in differences.items() if (by > 0) == more} for more in (False, True))
    decoder.samplings = exact
    if choice == "gpu":
        if not differences:
            raise UserError(f"--decoder gpu: nvJPEG ({decoder.name}) decodes nothing on this GPU; use --decoder cpu")
        decoder.samplings = exact | others
        if others:
            warn(
                f"--decoder gpu: nvJPEG ({decoder.name}) decodes JPEGs of {', '.join(sorted(others))} up to"
                f" {max(differences.values())} of 255 beside what processors give; --decoder cpu is exact"
            )


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

    One thread reads files, DECODERS decode them, ahead of the thread that asks for batches.
    """

    def __init__(self, paths, resizer, batch_size, decoder, load=load_image, skip=None, keep_images=False):
        """keep_images: whether batches have `images`, on the GPU too, but for large ones."""
        self.paths, self.batch_size, self.skipped = paths, batch_size, 0
        self.decode_seconds = self.resize_seconds = 0.0  # of processors: none
        self.by_cpu = 0  # images that were decoded by the CPU
        self._resizer, self._decoder, self._load = resizer, decoder, load
        # Of load_image, if it has options.
        self._max_pixels = getattr(load, "keywords", {}).get("max_pixels") or LARGEST
        self._together = min(MOST_TOGETHER, max(FEWEST_TOGETHER, BATCHES_TOGETHER * batch_size))
        self._skip, self._keep = skip or warn_of_skipped, keep_images

    def __iter__(self):
        """Yields Batch after Batch, each but the last of batch_size images."""
        batch, numbers = [], itertools.count()
        with (
            concurrent.futures.ThreadPoolExecutor(min(processor_count(), MAX_THREADS)) as processors,
            concurrent.futures.ThreadPoolExecutor(1) as reader,
            concurrent.futures.ThreadPoolExecutor(DECODERS) as decoders,
        ):
            chunks = self._chunks(processors)
            read = in_order(lambda _: reader.submit(next, chunks, None), itertools.count(), READ_AHEAD)
            with contextlib.closing(read):
                begun = iter(lambda: next(read), None)
                decode = functools.partial(decoders.submit, self._decode, processors)
                decoded = in_order(decode, begun, READY_AHEAD)
                with contextlib.closing(decoded):
                    for path, image, placement in itertools.chain.from_iterable(decoded):
                        number = next(numbers)
                        if isinstance(image, str):
                            self.skipped += 1
                            self._skip(number, path, image)
                            continue
                        kept = image if self._keep and image.height * image.stride <= KEPT_BYTES else None
                        batch.append((number, path, kept, placement, image))
                        if len(batch) == self.batch_size:
                            yield Batch(*map(list, zip(*batch, strict=True)))
                            batch = []
            if batch:
                yield Batch(*map(list, zip(*batch, strict=True)))

    def _chunks(self, processors):
        """Yields [(path, (bytes, Frame), Placement)] of some files; of what the GPU cannot decode (path, None, `processors`'
        Future of what _by_cpu gives)."""
        chunk, pixels = [], 0
        for path in self.paths:
            jpeg, placement = self._read(path)
            # Few of those of which the size is not known, as large as they may be.
            pixels += placement.height * placement.width if jpeg else PIXELS_TOGETHER // FEWEST_TOGETHER
            chunk.append((path, jpeg, placement or processors.submit(self._by_cpu, path)))
            if len(chunk) == self._together or pixels >= PIXELS_TOGETHER:
                yield chunk
                chunk, pixels = [], 0
        if chunk:
            yield chunk

    def _read(self, path):
        """(what read_jpeg gives, Placement); (None, None) too where the network does not take the image's shape, the GPU its
        kind, or the file cannot be read or is not to be."""
        try:
            jpeg = read_jpeg(path)
            if jpeg and jpeg[1].sampling in self._decoder.samplings:
                data, (height, width, _) = jpeg
                # By baseline_frame its first scan is the last that libjpeg reads. To count them took half of this thread's time.
                check_jpeg(width, height, data, scans_once=True)
                if height * width <= self._max_pixels:
                    return jpeg, placement_of(height, width, self._resizer)
        except (OSError, ImageError):
            pass
        return None, None

    def _by_cpu(self, path):
        """(image as the CPU decodes it, Placement), or (why it cannot be read, None)."""
        try:
            image = self._load(path)
            return image, placement_of(*image.shape[:2], self._resizer)
        except ImageError as error:
            return str(error), None

    def _decode(self, processors, chunk):
        """[(path, DeviceImage, Placement)] of a chunk, which it empties; (path, why it cannot be read, None)."""
        found, images = iter(self._decoder.decode([jpeg for _, jpeg, _ in chunk if jpeg])), []
        for path, jpeg, placement in chunk:
            image = next(found) if jpeg else None
            if jpeg and image is None:
                placement = processors.submit(self._by_cpu, path)
            images.append((path, image, placement))
        chunk.clear()  # whoever holds it needs no bytes, and no Futures with images
        for i, (path, image, placement) in enumerate(images):
            if image is None:
                image, placement = placement.result()
            if isinstance(image, np.ndarray):
                self.by_cpu += 1
                image = self._decoder.upload(image)
            images[i] = path, image, placement
        return images
