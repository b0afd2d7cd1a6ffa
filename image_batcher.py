"""Image files -> batches for the network, resized exactly as TFOD resizes them, decoded ahead.

Images are RGB arrays [height, width, 3]. Boxes are [N, 4] yxyx.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import time
import warnings
from pathlib import Path

from commandline import UserError, warn

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
# Rows of output per step of the resize: the few hundred kB it touches stay in the processor's cache.
BLOCK_ROWS = 64
# Bytes of a decoded image that processes hand on, at most: 12 megapixels. Larger ones are decoded again to be drawn on.
MAX_KEPT_BYTES = 36_000_000
# The share of the machine's memory that all of them together may take.
KEPT_SHARE = 1 / 4


class ImageError(Exception):
    """An image that cannot be read; the text says why."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """An image's size, and its size in the network's input, which it fills but for padding at the bottom and right."""

    height: int  # of the original image, pixels
    width: int
    true_shape: tuple  # height, width of the resized image, pixels

    @property
    def size(self):
        """[4]: boxes normalised to the image, times this, are pixels of the image."""
        return np.float32([self.height, self.width] * 2)


@dataclasses.dataclass(frozen=True)
class Batch:
    """n images, in input order."""

    paths: list  # of Path
    images: list  # as decoded, for `decoded`; None where they are not kept
    placements: list  # of Placement
    tensor: np.ndarray  # [n, network height, network width, 3], 0..255
    block: object  # whose memory the tensor is: see ImageBatcher.reuse

    @property
    def true_shapes(self):
        """[n, 2] float32: Placement.true_shape of each."""
        return np.float32([placement.true_shape for placement in self.placements])


def find_images(path, option="--input"):
    """Returns the image files of a folder, sorted by name, or [path] for a file. Raises UserError if there are none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{option} {path}: no such file or folder")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())
    if not found:
        raise UserError(f"{option} {path}: no images there ({', '.join(EXTENSIONS)}); name another folder")
    return found


def result_names(paths):
    """Returns a file name without extension for each input: its stem, or its full name where two inputs share a stem.

    Where two share that too, from other folders, these go before it: `cam1_0001.jpg`.
    """
    stems = collections.Counter(path.stem.lower() for path in paths)
    names = collections.Counter(path.name.lower() for path in paths)
    root = os.path.commonpath([path.parent for path in paths]) if len(names) < len(paths) else None
    return [
        path.stem
        if stems[path.stem.lower()] == 1
        else path.name
        if names[path.name.lower()] == 1
        else "_".join(path.relative_to(root).parts)
        for path in paths
    ]


def load_image(path):
    """Decodes an image file to RGB uint8 [height, width, 3] as TensorFlow's decode_image(channels=3) does.

    Grey is repeated, palettes are looked up, alpha is dropped (not blended), 16 bits become the high 8, CMYK becomes
    (255 - c) * (255 - k) // 255 (tensorflow/core/lib/jpeg/jpeg_mem.cc); EXIF rotation is ignored. Raises ImageError.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ImageError("the file is empty")
        if (image := _decode_jpeg(path)) is not None:
            return image
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("it is not an image that Pillow reads") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(str(error).strip() or type(error).__name__) from error


def _decode_jpeg(path):
    """A JPEG of the usual kind by simplejpeg, half as long again as fast as Pillow and bit for bit the same (both are
    libjpeg-turbo); None for any other file, and where simplejpeg is not installed."""
    if simplejpeg is None:
        return None
    with open(path, "rb") as file:
        data = file.read(2)
        if data != b"\xff\xd8":
            return None
        data += file.read()
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > Image.MAX_IMAGE_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None  # broken: Pillow says how


def _to_rgb(image):
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip instead of scale
        grey = (np.asarray(image).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "CMYK":
        inks = 255 - np.asarray(image).astype(np.uint16)
        return (inks[:, :, :3] * inks[:, :, 3:] // 255).astype(np.uint8)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@functools.lru_cache(maxsize=256)
def _taps(size_in, size_out):
    """For each output pixel: the two input pixels it lies between and how far it is towards the second.

    TF1's ResizeBilinear (align_corners=False, half_pixel_centers=False): source = destination * scale, in float32.
    """
    position = np.arange(size_out, dtype=np.float32) * (np.float32(size_in) / np.float32(size_out))
    low = np.floor(position).astype(np.intp)
    return low, np.minimum(low + 1, size_in - 1), (position - low).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _column_taps(width_in, width_out):
    """_taps for rows of interleaved RGB values: indices and weights [3 * width_out]."""
    low, high, weight = _taps(width_in, width_out)
    colours = np.arange(3)
    return ((low[:, None] * 3 + colours).ravel(), (high[:, None] * 3 + colours).ravel(), np.repeat(weight, 3))


def resize_image(image, height, width, out=None):
    """Resizes RGB [H, W, 3] to [height, width, 3] float32 exactly as TFOD does (see _taps): no antialiasing.

    out: where to write, [height, width, 3], float32 or uint8 (rounded); default: a new float32 array. Steps over blocks of
    rows, skipping the interpolation along an axis whose output pixels all fall on input pixels (640 -> 320, say).
    """
    rows_in, columns_in = image.shape[:2]
    out = np.empty((height, width, 3), np.float32) if out is None else out
    lower, upper, down = _taps(rows_in, height)
    left, right, across = _column_taps(columns_in, width)
    on_rows, on_columns = not down.any(), not across.any()
    flat = np.ascontiguousarray(image).reshape(rows_in, columns_in * 3)
    for start in range(0, height, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, height)
        first = lower[start]
        source = flat.take(lower[start:end], axis=0) if on_rows else flat[first : upper[end - 1] + 1]
        if columns_in == width:
            block = source.astype(np.float32)
        else:
            block = source.take(left, axis=1).astype(np.float32)
            if not on_columns:
                change = source.take(right, axis=1).astype(np.float32)
                change -= block
                change *= across
                block += change
        if not on_rows:
            top, bottom = block.take(lower[start:end] - first, axis=0), block.take(upper[start:end] - first, axis=0)
            bottom -= top
            bottom *= down[start:end, None]
            block = np.add(top, bottom, out=bottom)
        if out.dtype == np.uint8:
            block = np.rint(block)
        out[start:end] = block.reshape(end - start, width, 3)
    return out


def keep_aspect_size(height, width, min_dimension, max_dimension):
    """(height, width) after TFOD's keep_aspect_ratio_resizer (preprocessor._compute_new_dynamic_size), in float32.

    The shorter side becomes min_dimension, unless the longer one would pass max_dimension; then that becomes it.
    """
    size = np.float32([height, width])
    large = np.rint(size * (np.float32(min_dimension) / size.min()))
    small = np.rint(size * (np.float32(max_dimension) / size.max()))
    chosen = small if large.max() > max_dimension else large
    return int(chosen[0]), int(chosen[1])


def preprocess(image, resizer, out=None):
    """Brings RGB [H, W, 3] to the network's input.

    resizer: the dict of tfod.config.describe_resizer. out: as of resize_image. Returns (array [height, width, 3], 0..255,
    Placement). Raises ImageError for an image of which the resizer leaves nothing.
    """
    rows, columns = image.shape[:2]
    height, width = resizer["height"], resizer["width"]
    out = np.empty((height, width, 3), np.float32) if out is None else out
    if resizer["kind"] == "fixed_shape":
        return resize_image(image, height, width, out), Placement(rows, columns, (height, width))
    new_height, new_width = keep_aspect_size(rows, columns, resizer["min_dimension"], resizer["max_dimension"])
    if not new_height or not new_width:  # TensorFlow's resizer fails on it too
        raise ImageError(f"{columns} x {rows} pixels are too long and thin for the model's resizer")
    padding = np.float32(resizer["pad_value"])
    padding = np.rint(padding) if out.dtype == np.uint8 else padding
    out[new_height:] = padding
    out[:new_height, new_width:] = padding
    resize_image(image, new_height, new_width, out[:new_height, :new_width])
    return out, Placement(rows, columns, (new_height, new_width))


class ImageBatcher:
    """Iterates over files in batches, in order, decoding ahead, each image straight to its place in a batch.

    Close it where its workers are processes or it has a page_lock. A file that cannot be read is warned about and left out; `skipped` counts
    them. Few images are in memory: two tasks for each worker, rounded up to batches, besides the batches in hand.
    """

    def __init__(self, paths, resizer, batch_size, workers, spec=None, page_lock=None, keep_images=True):
        """workers: a workers.Workers, which decode. spec: the detector.InputSpec of the tensors; None: float32,
        NHWC. page_lock: is given each array that tensors lie in, returns what is called to let it go. keep_images: whether
        batches have their `images`."""
        self.paths, self.resizer, self.batch_size = list(paths), resizer, batch_size
        self.skipped = 0
        self.decode_seconds = self.resize_seconds = 0.0  # spent in all workers together
        self._workers, self._spec, self._page_lock, self._keep_images = workers, spec, page_lock, keep_images
        self._free, self._blocks = [], []  # of _Block: to be used again; to be freed

    def reuse(self, batch):
        """Says that nothing reads the batch's tensor and images any more: their memory goes to a later batch."""
        batch.block.in_use -= 1
        self._recycle(batch.block)

    def _recycle(self, block):
        if block.in_use == 0 and not block.jobs:
            self._free.append(block)

    def __iter__(self):
        workers = self._workers
        waiting, todo = collections.deque(), iter(self.paths)
        # Blocks hold whole batches and whole tasks, or nearly.
        size = self.batch_size * -(-workers.task_images // self.batch_size)
        most = 1 + -(-2 * workers.count * workers.task_images // size)
        # As many images again as wait here may wait to be drawn on.
        row_bytes = kept_bytes(2 * most * size) if workers.processes and self._keep_images else 0
        try:
            while True:
                while len(waiting) < most and (paths := list(itertools.islice(todo, size))):
                    waiting.append(self._begin(workers, paths, size, row_bytes))
                if not waiting:
                    return
                yield from self._batches(waiting[0])
                waiting.popleft()
        finally:
            concurrent.futures.wait([job for block in waiting for job, _ in block.jobs if not job.cancel()])

    def close(self):
        """Gives back shared and page-locked memory, once no worker and no GPU reads it."""
        for block in self._blocks:
            block.free()
        self._blocks, self._free = [], []

    def _begin(self, workers, paths, size, row_bytes):
        """Gives the paths to the workers; returns the block that the images will be in. row_bytes: of _Block."""
        if not self._free:
            self._free.append(_Block(workers, size, self.resizer, self._spec, self._page_lock, row_bytes))
            if workers.processes or self._page_lock:
                self._blocks.append(self._free[-1])
        block = self._free.pop()
        for first in range(0, len(paths), workers.task_images):
            some = paths[first : first + workers.task_images]
            task = _prepare, some, self.resizer, block.memory, first, block.layout, block.pixels, self._keep_images
            block.jobs.append((workers.submit(*task), some))
        return block

    def _batches(self, block):
        """Yields the block's batches as they are ready, without the files that could not be read."""
        jobs, read, row, yielded, size = collections.deque(block.jobs), [], 0, 0, self.batch_size
        block.in_use += 1  # not to be recycled meanwhile
        while jobs:
            job, paths = jobs.popleft()
            for path, result in zip(paths, job.result(), strict=True):
                row += 1
                if isinstance(result, str):
                    self.skipped += 1
                    warn(f"{path}: skipped, {result}")
                    continue
                image, placement, decoding, resizing = result
                if isinstance(image, tuple):
                    image = SharedImage(block.pixels, row - 1, image)
                self.decode_seconds += decoding
                self.resize_seconds += resizing
                if len(read) != row - 1:
                    block.images[len(read)] = block.images[row - 1]
                read.append((path, image, placement))
            while len(read) - yielded >= size or (not jobs and len(read) > yielded):
                rows = slice(yielded, min(yielded + size, len(read)))
                block.in_use += 1
                yield Batch(*map(list, zip(*read[rows], strict=True)), block.images[rows], block)
                yielded = rows.stop
        block.jobs, block.in_use = [], block.in_use - 1
        self._recycle(block)


def kept_bytes(images):
    """Bytes of a decoded image that processes hand on, of so many images at a time."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(MAX_KEPT_BYTES, int(KEPT_SHARE * memory / images)))


class _Block:
    """Memory for some batches, and the tasks that fill it."""

    def __init__(self, workers, size, resizer, spec, page_lock, row_bytes):
        """row_bytes: memory for each decoded image, where processes are to hand it on; 0: none."""
        self.layout = spec.layout if spec else "NHWC"
        shape = (resizer["height"], resizer["width"])
        shape = (size, 3, *shape) if self.layout == "NCHW" else (size, *shape, 3)
        self.memory = workers.memory(shape, spec.dtype if spec else np.float32)
        self.images = as_images(self.memory.array, self.layout)
        # Pages that no image needs are never made.
        self.pixels = workers.memory((size, row_bytes), np.uint8) if row_bytes else None
        self.jobs, self.in_use = [], 0
        self._unlock = page_lock(self.memory.array) if page_lock else None

    def free(self):
        if self._unlock:
            self._unlock()
        self.memory.free()
        if self.pixels:
            self.pixels.free()


@dataclasses.dataclass(frozen=True)
class SharedImage:
    """A decoded image in memory that processes share."""

    pixels: object  # workers.Memory [n, bytes]
    row: int
    shape: tuple

    @property
    def array(self):
        return self.pixels.array[self.row, : math.prod(self.shape)].reshape(self.shape)


def decoded(image, path):
    """The image [height, width, 3] of a Batch's path; one that was too large to be kept is read again."""
    if image is None:
        return load_image(path)
    return image.array if isinstance(image, SharedImage) else image


def as_images(array, layout):
    """An array of images in the network's layout, seen as [n, height, width, 3]."""
    return array.transpose(0, 2, 3, 1) if layout == "NCHW" else array


def _prepare(paths, resizer, memory, first, layout, pixels, keep):
    """A worker's task: decodes and resizes images into memory.array from row `first` on.

    keep: the decoded images too, in the rows of pixels.array where there is one. Returns for each (image or its shape in
    pixels or None, Placement, seconds of decoding, of resizing), or why it cannot be read.
    """
    images, results = as_images(memory.array, layout), []
    for row, path in enumerate(paths, first):
        try:
            begun = time.perf_counter()
            image = load_image(path)
            between = time.perf_counter()
            _, placement = preprocess(image, resizer, images[row])
        except ImageError as error:
            results.append(str(error))
            continue
        kept = image if keep and not pixels else None
        if pixels and image.size <= pixels.array.shape[1]:
            pixels.array[row, : image.size] = image.ravel()
            kept = image.shape
        results.append((kept, placement, between - begun, time.perf_counter() - between))
    return results
