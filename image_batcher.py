"""Image files -> batches for the network, resized exactly as TFOD resizes them, decoded ahead.

Images are RGB arrays [height, width, 3]. Boxes are [N, 4] yxyx.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import io
import itertools
import math
import os
import stat
import struct
import time
import warnings
import zlib

from commandline import warn

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# No more of Pillow's: some of the others start programs or have no bounds.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
# What load_image takes without being told otherwise. The largest pictures of phones have as many pixels.
MAX_PIXELS = 200_000_000
# What is smaller decodes within a second, however few bytes it has. A blank PNG has a byte for 1,000 pixels, a blank JPEG for
# 64 to 512, a blank GIF for 1,300.
SMALL_PIXELS, PIXELS_PER_BYTE = 16_000_000, 1500
MAX_SIDE = 1_000_000  # libpng's limit, and so TensorFlow's
MAX_RLE_PIXELS = 4_000_000  # Pillow decodes run-length coded BMPs in Python
MAX_SCANS, MAX_SCANNED_PIXELS = 100, 2_000_000_000
STRIP_PIXELS, INFLATED_BYTES = 1 << 18, 1 << 20
JPEG_SIGNATURE, JPEG_SCAN, JPEG_ARITHMETIC = b"\xff\xd8", b"\xff\xda", (b"\xff\xc9", b"\xff\xca")
# A Huffman code has at least a bit, and each block of 8 x 8 samples at least one. Where no component has all the samples,
# as with two of 4 x 1 and 1 x 4, a byte is eight blocks of 128 pixels.
JPEG_PIXELS_PER_BYTE = 1024
PNG_SIGNATURE, PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf")
# First column and row, steps across and down of each pass of an interlaced PNG (PNG specification, 8.2).
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
EXIF_ORIENTATION, TIFF_BITS, TIFF_PHOTOMETRIC = 0x0112, 258, 262

Image.MAX_IMAGE_PIXELS = None  # load_image has its own limit, which its user can set
warnings.filterwarnings("ignore", module=r"PIL\.")  # about texts and tags that are not read

# Rows of output per step of the resize: the few hundred kB it touches stay in the processor's cache.
BLOCK_ROWS = 64
# Bytes of a decoded image that workers hand on, at most: 12 megapixels. Larger ones are decoded again to be drawn on.
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

    paths: list  # of str or Path, as they were given
    images: list  # as decoded, for `decoded`; None where they are not kept
    placements: list  # of Placement
    tensor: np.ndarray  # [n, network height, network width, 3], 0..255
    block: object  # whose memory the tensor is: see ImageBatcher.reuse

    @property
    def true_shapes(self):
        """[n, 2] float32: Placement.true_shape of each."""
        return np.float32([placement.true_shape for placement in self.placements])


def load_image(path, exif_rotate=False, max_pixels=None):
    """Decodes an image file to RGB uint8 [height, width, 3] as TensorFlow's decode_image(channels=3) does.

    Grey is repeated, palettes are looked up, alpha is dropped (not blended), 16 bits become the high 8, CMYK becomes
    (255 - c) * (255 - k) // 255 (tensorflow/core/lib/jpeg/jpeg_mem.cc), an animation gives its first frame. docs/decoding.md
    says where TensorFlow differs, and what becomes of what it does not read.

    exif_rotate: turn the image as its EXIF data say; else it is as it is stored. max_pixels: the most that are read; None:
    MAX_PIXELS, and SMALL_PIXELS of a file that has less than a byte for PIXELS_PER_BYTE. Raises ImageError.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise ImageError("it is a folder, a pipe or a device, not a file")
        with open(path, "rb") as file:
            return _decode(file, os.fstat(file.fileno()).st_size, exif_rotate, max_pixels)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"it is not an image that Pillow reads ({', '.join(FORMATS)})") from error
    except OSError as error:
        raise ImageError(error.strerror or str(error).strip() or type(error).__name__) from error
    except Exception as error:  # of broken files Pillow raises AssertionError, IndexError, struct.error, anything
        raise ImageError(f"it is broken ({type(error).__name__}: {str(error).strip()})".replace(": )", ")")) from error


def _decode(file, size, exif_rotate, max_pixels):
    """load_image of an open file of `size` bytes."""
    if not size:
        raise ImageError("the file is empty")
    start = file.read(len(PNG_SIGNATURE))
    file.seek(0)
    png = None
    if start.startswith(JPEG_SIGNATURE):
        data = file.read()
        file = io.BytesIO(data)
        if (pixels := _decode_jpeg(data, max_pixels)) is not None:
            if exif_rotate:
                with Image.open(file, formats=FORMATS) as image:
                    pixels = _turn(pixels, _orientation(image))
            return pixels
    elif start == PNG_SIGNATURE:
        png = _read_png(file, size)
        file = io.BytesIO(png.data)
    with Image.open(file, formats=FORMATS) as image:
        _check_size(*image.size, size, max_pixels)
        if start.startswith(JPEG_SIGNATURE):
            _check_jpeg(*image.size, data)
        if image.format == "BMP" and image.info.get("compression") and image.width * image.height > MAX_RLE_PIXELS:
            raise ImageError(
                f"run-length coded BMPs are read up to {MAX_RLE_PIXELS // 10**6} megapixels; save it as PNG"
            )
        turned = image.format == "TIFF"  # by Pillow, as it loads it
        orientation = _orientation(image) if exif_rotate or turned else 1
        left, top, right, bottom = image.tile[0][1] if image.format == "GIF" and image.tile else (0, 0, *image.size)
        image.load()
        pixels = _to_rgb(image)
    for outside in (pixels[:top], pixels[bottom:], pixels[:, :left], pixels[:, right:]):
        outside[:] = 0  # of a GIF's frame: nothing is there, as where it is transparent
    if png:
        _check_png_is_whole(png, pixels)
    if exif_rotate == turned:
        return pixels
    return _turn(pixels, orientation if exif_rotate else {6: 8, 8: 6}.get(orientation, orientation))


def _check_size(width, height, size, max_pixels):
    """Raises ImageError for an image that is too large to be decoded, from a file of `size` bytes."""
    pixels = width * height
    what = f"{width} x {height} are {pixels / 1e6:.1f} megapixels"
    if max(width, height) > MAX_SIDE:
        raise ImageError(f"{width} x {height}: sides longer than {MAX_SIDE:,} pixels are not read; cut it into pieces")
    if pixels > (max_pixels or MAX_PIXELS):
        raise ImageError(f"{what}, more than --max_pixels {max_pixels or MAX_PIXELS}; give --max_pixels {pixels}")
    if not max_pixels and pixels > max(SMALL_PIXELS, PIXELS_PER_BYTE * size):
        raise ImageError(f"{what} in {size} bytes, which may be a trap; give --max_pixels {pixels} to read it")


def _check_jpeg(width, height, data):
    """Raises ImageError for a JPEG that promises more than its data can hold, or paints itself over hundreds of times, which
    costs as long each time, and hardly a byte."""
    if width * height > JPEG_PIXELS_PER_BYTE * len(data) and not any(frame in data for frame in JPEG_ARITHMETIC):
        raise ImageError(f"{len(data)} bytes of JPEG cannot hold the {width} x {height} pixels that it promises")
    scans = data.count(JPEG_SCAN)
    if scans > MAX_SCANS and scans * width * height > MAX_SCANNED_PIXELS:
        raise ImageError(f"a JPEG of {width} x {height} pixels with {scans} scans may be a trap; save it anew")


def _decode_jpeg(data, max_pixels):
    """A JPEG of the usual kind by simplejpeg, half as long again as fast as Pillow and bit for bit the same (both are
    libjpeg-turbo); None for any other, and where simplejpeg is not installed."""
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray"):
            return None
        _check_size(width, height, len(data), max_pixels)
        _check_jpeg(width, height, data)
        return simplejpeg.decode_jpeg(data, "RGB")
    except (ValueError, KeyError):  # broken, or subsampled in a way it has no name for: Pillow says which
        return None


@dataclasses.dataclass(frozen=True)
class _Png:
    """A PNG reduced to what its pixels depend on."""

    header: tuple  # width, height, bits a sample, colour type, compression, filter, interlace
    pieces: list  # of the compressed data
    data: bytes  # the file


def _read_png(file, size):
    """The PNG without texts, colour profiles and transparency, which TensorFlow does not heed and which make Pillow fail
    or fill memory. Raises ImageError where TensorFlow (libpng) refuses it for its chunks."""
    parts, kinds = [file.read(len(PNG_SIGNATURE))], []
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in PNG_CHUNKS:
            body = file.read(min(length + 4, size))
            whole = len(body) == length + 4  # else Pillow says that it is cut off
            if whole and zlib.crc32(body[:-4], zlib.crc32(kind)) != int.from_bytes(body[-4:], "big"):
                raise ImageError(f"its {kind.decode()} is damaged (wrong checksum)")
            kinds.append(kind)
            parts += [head, body]
            if kind == b"IEND":
                break
        elif kind[0] < ord("a"):  # a capital: without it the pixels mean nothing
            raise ImageError(f"it is a PNG with the chunk {kind!r}, which only some programs know")
        else:
            file.seek(length + 4, os.SEEK_CUR)
    bodies = parts[2::2]
    if kinds[:1] != [b"IHDR"] or len(bodies[0]) != 17:
        raise ImageError("it is a PNG without a header")
    header = struct.unpack(">IIBBBBB", bodies[0][:13])
    if header[3] == 3 and b"PLTE" not in kinds:
        raise ImageError("it is a PNG without the palette that it needs")
    pieces = [body[:-4] for kind, body in zip(kinds, bodies, strict=True) if kind == b"IDAT"]
    return _Png(header, pieces, b"".join(parts))


def _check_png_is_whole(png, pixels):
    """Raises ImageError for a PNG whose data end before its last row, which Pillow leaves black without a word."""
    width, height, bits, colour_type, _, _, interlace = png.header
    if not interlace and (pixels[-1] != pixels[-1, 0]).any():
        return
    rows = ((height, width),)
    if interlace:
        rows = [(-(-(height - y) // down), -(-(width - x) // across)) for x, y, across, down in ADAM7]
    samples = {2: 3, 4: 2, 6: 4}.get(colour_type, 1)
    left = sum(count * (1 + (long * samples * bits + 7) // 8) for count, long in rows if count > 0 and long > 0)
    inflate = zlib.decompressobj()
    for piece in png.pieces:
        while piece and left > 0:
            left -= len(inflate.decompress(piece, INFLATED_BYTES))
            piece = inflate.unconsumed_tail
    if left > 0:
        raise ImageError("its data end before its last row")


def _to_rgb(image):
    """A loaded Pillow image as RGB uint8 [height, width, 3]; strip by strip, as its own conversion takes as much again."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    to_rgb = _converter(image)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = to_rgb(strip)
    return pixels


def _converter(image):
    """The function that makes a strip of this Pillow image RGB, [rows, width, 3] or, for grey, [rows, width, 1]."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow's own would clip
        return functools.partial(_from_sixteen_bits, *_tiff_grey(image))
    if image.mode == "I":
        raise ImageError("whole numbers of 32 bits, or with a sign, have no agreed white; save it with 8 or 16 bits")
    if image.mode == "F":
        return functools.partial(_from_floats, 255 if image.getextrema()[1] <= 1 else 1)
    if image.mode == "CMYK":
        # Pillow takes all JPEGs for Adobe's, which store what is left of white.
        return functools.partial(_from_inks, image.format == "JPEG" and "adobe" not in image.info)
    if image.format == "GIF" and "transparency" in image.info:  # black, and not the colour it has by chance
        return lambda strip: np.asarray(strip.convert("RGBA").convert("RGBa"))[:, :, :3]
    return lambda strip: np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _tiff_grey(image):
    """(bits, whether 0 is white) of an image with 16 bits a pixel: Pillow leaves both to its user."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(TIFF_BITS, (16,))[0], tags.get(TIFF_PHOTOMETRIC) == 0


def _from_sixteen_bits(bits, zero_is_white, strip):
    grey = (np.asarray(strip).astype(np.int32) >> (bits - 8)).astype(np.uint8)[:, :, None]
    return 255 - grey if zero_is_white else grey


def _from_floats(scale, strip):
    grey = np.asarray(strip)[:, :, None] * np.float32(scale)
    if not (grey.min() >= 0 and grey.max() <= 255):  # nor NaN
        raise ImageError(
            "its floating-point values are neither 0 to 1 nor 0 to 255; scale them, or save it with 8 bits"
        )
    return np.rint(grey)


def _from_inks(negative, strip):
    inks = np.asarray(strip).astype(np.uint16)
    left = inks if negative else 255 - inks
    product = left[:, :, :3] * left[:, :, 3:]
    return (product + 1 + (product >> 8)) >> 8  # product // 255, which takes five times as long


def _orientation(image):
    """How the Pillow image lies by its EXIF data, 1 to 8."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as of broken files; they are shown as they lie everywhere
        return 1


def _turn(pixels, orientation):
    """[height, width, 3] as an image of this EXIF orientation is to be seen (Exif 2.32, 4.6.4 A, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):  # its rows are columns
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


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


# The other methods' taps: for each output pixel some input pixels, [taps, size_out], and what each counts. They follow the
# kernels of tensorflow/core/kernels/image, align_corners=False, half_pixel_centers=False, in float32.


@functools.lru_cache(maxsize=256)
def _nearest_taps(size_in, size_out):
    low, _, _ = _taps(size_in, size_out)
    return np.minimum(low, size_in - 1)[None], np.ones((1, size_out), np.float32)


@functools.lru_cache(maxsize=256)
def _cubic_taps(size_in, size_out):
    """Four taps of Keys' cubic convolution with a = -0.75, at distances that TensorFlow rounds to 1/1024 of a pixel."""
    low, _, towards = _taps(size_in, size_out)
    part = np.rint(towards * np.float32(1024)) / 1024
    x, a = np.stack([1 + part, part, 1 - part, 2 - part]), -0.75
    weight = np.where(x <= 1, ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a)
    return np.clip(low + np.arange(-1, 3)[:, None], 0, size_in - 1), weight.astype(np.float32)


@functools.lru_cache(maxsize=256)
def _area_taps(size_in, size_out):
    """All pixels that an output pixel covers, by how much of each."""
    scale = np.float32(size_in) / np.float32(size_out)
    edges = np.arange(size_out + 1, dtype=np.float32) * scale
    begin, end = edges[:-1], edges[1:]
    first, last = np.floor(begin).astype(np.intp), np.ceil(end).astype(np.intp)
    index = first + np.arange((last - first).max())[:, None]
    left, right = index.astype(np.float32), (index + 1).astype(np.float32)
    # Within one input pixel TensorFlow takes the scale itself, which differs from end - begin by rounding.
    within = (left < begin) & (right > end)
    weight = np.where(within, scale, np.minimum(right, end) - np.maximum(left, begin)) / scale
    return np.clip(index, 0, size_in - 1), np.where(index < last, weight, np.float32(0))


TAPS = {"nearest_neighbor": _nearest_taps, "bicubic": _cubic_taps, "area": _area_taps}


def _weigh(pixels, index, weight, axis):
    """The sum of `pixels`, taken along the axis by each row of `index`, times the rows of `weight`."""
    if len(index) == 1 and np.all(weight == 1):  # pixels as they are
        return pixels.take(index[0], axis)
    return sum(pixels.take(i, axis) * w for i, w in zip(index, weight, strict=True))


def _resample(image, rows, columns, out):
    """Weighs input pixels by the taps of the output's rows and columns; `out` as of resize_image."""
    (row_index, row_weight), (column_index, column_weight) = rows, columns
    column_index = (column_index[..., None] * 3 + np.arange(3)).reshape(len(column_index), -1)
    column_weight = np.repeat(column_weight, 3, axis=1)
    flat = np.ascontiguousarray(image).reshape(len(image), -1)
    for start in range(0, len(out), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        block = _weigh(flat, row_index[:, part], row_weight[:, part, None], axis=0)
        block = _weigh(block, column_index, column_weight, axis=1)
        if out.dtype == np.uint8:
            block = np.rint(block).clip(0, 255)  # bicubic overshoots at edges
        out[part] = block.reshape(-1, *out.shape[1:])
    return out


def resize_image(image, height, width, out=None, method="bilinear"):
    """Resizes RGB [H, W, 3] to [height, width, 3] float32 exactly as TFOD does (see _taps): no antialiasing.

    out: where to write, [height, width, 3], float32 or uint8 (rounded); default: a new float32 array. method: "bilinear"
    or one of TAPS. Bilinear steps over blocks of rows, skipping the interpolation along an axis whose output pixels all
    fall on input pixels (640 -> 320, say).
    """
    rows_in, columns_in = image.shape[:2]
    out = np.empty((height, width, 3), np.float32) if out is None else out
    if method != "bilinear":
        return _resample(image, TAPS[method](rows_in, height), TAPS[method](columns_in, width), out)
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
    height, width, method = resizer["height"], resizer["width"], resizer.get("method", "bilinear")
    out = np.empty((height, width, 3), np.float32) if out is None else out
    if resizer["kind"] == "fixed_shape":
        return resize_image(image, height, width, out, method), Placement(rows, columns, (height, width))
    new_height, new_width = keep_aspect_size(rows, columns, resizer["min_dimension"], resizer["max_dimension"])
    if not new_height or not new_width:  # TensorFlow's resizer fails on it too
        raise ImageError(f"{columns} x {rows} pixels are too long and thin for the model's resizer")
    padding = np.float32(resizer["pad_value"])
    padding = np.rint(padding) if out.dtype == np.uint8 else padding
    out[new_height:] = padding
    out[:new_height, new_width:] = padding
    resize_image(image, new_height, new_width, out[:new_height, :new_width], method)
    return out, Placement(rows, columns, (new_height, new_width))


class ImageBatcher:
    """Iterates over files in batches, in order, decoding ahead, each image straight to its place in a batch.

    Close it where its workers are processes or it has a page_lock. A file that cannot be read is warned about and left out; `skipped` counts
    them. Few images are in memory: two tasks for each worker, rounded up to batches, besides the batches in hand.
    """

    def __init__(
        self, paths, resizer, batch_size, workers, spec=None, page_lock=None, keep_images=True, load=load_image
    ):
        """workers: a workers.Workers, which decode. spec: the detector.InputSpec of the tensors; None: float32,
        NHWC. page_lock: is given each array that tensors lie in, returns what is called to let it go. keep_images: whether
        batches have their `images`. load: load_image with its options, functools.partial."""
        self.paths, self.resizer, self.batch_size = list(paths), resizer, batch_size
        self.skipped = 0
        self.decode_seconds = self.resize_seconds = 0.0  # spent in all workers together
        self._workers, self._spec, self._page_lock, self._keep_images = workers, spec, page_lock, keep_images
        self._load = load
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
            place = block.memory, first, block.layout, block.pixels
            job = workers.submit(_prepare, some, self.resizer, *place, self._keep_images, self._load)
            block.jobs.append((job, some))
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


def decoded(image, path, load=load_image):
    """The image [height, width, 3] of a Batch's path; one that was too large to be kept is read again, as it was before."""
    if image is None:
        return load(path)
    return image.array if isinstance(image, SharedImage) else image


def as_images(array, layout):
    """An array of images in the network's layout, seen as [n, height, width, 3]."""
    return array.transpose(0, 2, 3, 1) if layout == "NCHW" else array


def _prepare(paths, resizer, memory, first, layout, pixels, keep, load):
    """A worker's task: decodes and resizes images into memory.array from row `first` on.

    keep: the decoded images too, if they are not large, in the rows of pixels.array where there is one. Returns for each
    (image or its shape in pixels or None, Placement, seconds of decoding, of resizing), or why it cannot be read.
    """
    images, results = as_images(memory.array, layout), []
    for row, path in enumerate(paths, first):
        try:
            begun = time.perf_counter()
            image = load(path)
            between = time.perf_counter()
            _, placement = preprocess(image, resizer, images[row])
        except ImageError as error:
            results.append(str(error))
            continue
        kept = image if keep and not pixels and image.size <= MAX_KEPT_BYTES else None
        if pixels and image.size <= pixels.array.shape[1]:
            pixels.array[row, : image.size] = image.ravel()
            kept = image.shape
        results.append((kept, placement, between - begun, time.perf_counter() - between))
    return results
