"""Image files -> batches for the network, resized exactly as TFOD resizes them, decoded ahead in threads.

Images are RGB arrays [height, width, 3]. Boxes are [N, 4] yxyx.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from cli import UserError, warn

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp")
# Rows of output per step of the resize: the few hundred kB it touches stay in the processor's cache.
BLOCK_ROWS = 64


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
    images: list  # of uint8 [height, width, 3], as decoded
    placements: list  # of Placement
    tensor: np.ndarray  # [n, network height, network width, 3] float32, 0..255

    @property
    def true_shapes(self):
        """[n, 2] float32: Placement.true_shape of each."""
        return np.float32([placement.true_shape for placement in self.placements])


def find_images(path):
    """Returns the image files of a folder, sorted by name, or [path] for a file. Raises UserError if there are none."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"--input {path}: no such file or folder")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())
    if not found:
        raise UserError(f"--input {path}: no images there ({', '.join(EXTENSIONS)}); name another folder")
    return found


def result_names(paths):
    """Returns a file name without extension for each input: its stem, or its full name where two inputs share a stem."""
    count = collections.Counter(path.stem.lower() for path in paths)
    return [path.stem if count[path.stem.lower()] == 1 else path.name for path in paths]


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

    out: where to write, float32 [height, width, 3]; default: a new array. Steps over blocks of rows, skipping the
    interpolation along an axis whose output pixels all fall on input pixels (640 -> 320, say).
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


def preprocess(image, resizer):
    """Brings RGB [H, W, 3] to the network's input.

    resizer: the dict of tfod_config.describe_resizer. Returns (float32 [height, width, 3], 0..255, Placement). Raises
    ImageError for an image of which the resizer leaves nothing.
    """
    rows, columns = image.shape[:2]
    height, width = resizer["height"], resizer["width"]
    if resizer["kind"] == "fixed_shape":
        return resize_image(image, height, width), Placement(rows, columns, (height, width))
    new_height, new_width = keep_aspect_size(rows, columns, resizer["min_dimension"], resizer["max_dimension"])
    if not new_height or not new_width:  # TensorFlow's resizer fails on it too
        raise ImageError(f"{columns} x {rows} pixels are too long and thin for the model's resizer")
    tensor = np.empty((height, width, 3), np.float32)
    tensor[:] = np.float32(resizer["pad_value"])
    resize_image(image, new_height, new_width, out=tensor[:new_height, :new_width])
    return tensor, Placement(rows, columns, (new_height, new_width))


class ImageBatcher:
    """Iterates over files in batches, in order, decoding ahead in threads.

    A file that cannot be read is warned about and left out; `skipped` counts them. At most `threads` + `ahead` images are
    in memory besides the batch in hand.
    """

    def __init__(self, paths, resizer, batch_size, threads=None, ahead=8):
        self.paths, self.resizer, self.batch_size = list(paths), resizer, batch_size
        self.threads, self.ahead = threads or min(8, os.cpu_count() or 1), ahead
        self.skipped = 0
        self.decode_seconds = self.resize_seconds = 0.0  # spent in all threads together

    def _prepare(self, path):
        begun = time.perf_counter()
        image = load_image(path)
        decoded = time.perf_counter()
        tensor, placement = preprocess(image, self.resizer)
        return path, image, tensor, placement, (decoded - begun, time.perf_counter() - decoded)

    def _images(self):
        """Yields (path, image, tensor, placement) of the readable files in order."""
        waiting, todo = collections.deque(), iter(self.paths)
        with concurrent.futures.ThreadPoolExecutor(self.threads) as pool:
            try:
                while True:
                    while len(waiting) < self.threads + self.ahead and (path := next(todo, None)) is not None:
                        waiting.append((path, pool.submit(self._prepare, path)))
                    if not waiting:
                        return
                    path, future = waiting.popleft()
                    try:
                        *item, seconds = future.result()
                        self.decode_seconds += seconds[0]
                        self.resize_seconds += seconds[1]
                        yield item
                    except ImageError as error:
                        self.skipped += 1
                        warn(f"{path}: skipped, {error}")
            finally:
                for _, future in waiting:
                    future.cancel()

    def __iter__(self):
        group = []
        for item in self._images():
            group.append(item)
            if len(group) == self.batch_size:
                yield _batch(group)
                group = []
        if group:
            yield _batch(group)


def _batch(group):
    paths, images, tensors, placements = map(list, zip(*group, strict=True))
    return Batch(paths, images, placements, tensors[0][None] if len(tensors) == 1 else np.stack(tensors))
