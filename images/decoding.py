"""Image files -> RGB arrays [height, width, 3], as TensorFlow decodes them."""

import contextlib
import dataclasses
import functools
import io
import os
import stat
import struct
import warnings
import zlib

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
JPEG_SIGNATURE, JPEG_ARITHMETIC = b"\xff\xd8", (b"\xff\xc9", b"\xff\xca")
JPEG_SCAN = np.frombuffer(b"\xff\xda", np.uint16)[0]
# A Huffman code has at least a bit, and each block of 8 x 8 samples at least one. Where no component has all the samples,
# as with two of 4 x 1 and 1 x 4, a byte is eight blocks of 128 pixels.
JPEG_PIXELS_PER_BYTE = 1024
PNG_SIGNATURE, PNG_CHUNKS = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"eXIf")
# First column and row, steps across and down of each pass of an interlaced PNG (PNG specification, 8.2).
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
EXIF_ORIENTATION, TIFF_BITS, TIFF_PHOTOMETRIC = 0x0112, 258, 262

Image.MAX_IMAGE_PIXELS = None  # load_image has its own limit, which its user can set
warnings.filterwarnings("ignore", module=r"PIL\.")  # about texts and tags that are not read


class ImageError(Exception):
    """An image that cannot be read; the text says why."""


def load_image(path, exif_rotate=False, max_pixels=None):
    """Decodes an image file to RGB uint8 [height, width, 3] as TensorFlow's decode_image(channels=3) does.

    Grey is repeated, palettes are looked up, alpha is dropped (not blended), 16 bits become the high 8, CMYK becomes
    (255 - c) * (255 - k) // 255 (tensorflow/core/lib/jpeg/jpeg_mem.cc), an animation gives its first frame. docs/decoding.md
    says where TensorFlow differs, and what becomes of what it does not read.

    exif_rotate: turn the image as its EXIF data say; else it is as it is stored. max_pixels: the most that are read; None:
    MAX_PIXELS, and SMALL_PIXELS of a file that has less than a byte for PIXELS_PER_BYTE. Raises ImageError.
    """
    with _saying_why():
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise ImageError("it is a folder, a pipe or a device, not a file")
        with open(path, "rb") as file:
            return _decode(file, os.fstat(file.fileno()).st_size, exif_rotate, max_pixels)


def decode_image(data, exif_rotate=False, max_pixels=None):
    """load_image of a file's bytes."""
    with _saying_why():
        return _decode(io.BytesIO(data), len(data), exif_rotate, max_pixels)


@contextlib.contextmanager
def _saying_why():
    """Makes an ImageError of whatever decoding raises."""
    try:
        yield
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
                    pixels = _turn(pixels, orientation_of(image))
            return pixels
    elif start == PNG_SIGNATURE:
        png = _read_png(file, size)
        file = io.BytesIO(png.data)
    with Image.open(file, formats=FORMATS) as image:
        _check_size(*image.size, size, max_pixels)
        if start.startswith(JPEG_SIGNATURE):
            check_jpeg(*image.size, data)
        if image.format == "BMP" and image.info.get("compression") and image.width * image.height > MAX_RLE_PIXELS:
            raise ImageError(
                f"run-length coded BMPs are read up to {MAX_RLE_PIXELS // 10**6} megapixels; save it as PNG"
            )
        turned = image.format == "TIFF"  # by Pillow, as it loads it
        orientation = orientation_of(image) if exif_rotate or turned else 1
        frame = image.tile[0][1] if image.format == "GIF" and image.tile else None
        image.load()
        pixels = _to_rgb(image)
    if frame:  # around it is nothing, as where it is transparent
        left, top, right, bottom = frame
        for outside in (pixels[:top], pixels[bottom:], pixels[:, :left], pixels[:, right:]):
            outside[:] = 0
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


def check_jpeg(width, height, data, scans_once=False):
    """Raises ImageError for a JPEG that promises more than its data can hold, or paints itself over hundreds of times, which
    costs as long each time, and hardly a byte. scans_once: it is known not to."""
    if width * height > JPEG_PIXELS_PER_BYTE * len(data) and not any(frame in data for frame in JPEG_ARITHMETIC):
        raise ImageError(f"{len(data)} bytes of JPEG cannot hold the {width} x {height} pixels that it promises")
    if scans_once:
        return
    # Not data.count: for every image that takes four times as long, and keeps Python's lock. Pairs of bytes, from the first on
    # and from the second on: half the time of the bytes one by one.
    pairs = (np.frombuffer(data, JPEG_SCAN.dtype, (len(data) - start) // 2, start) for start in (0, 1))
    scans = sum(np.count_nonzero(some == JPEG_SCAN) for some in pairs)
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
        check_jpeg(width, height, data)
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
    with np.errstate(all="ignore"):  # it warns of signalling NaN and of -1e38 times 255
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


def orientation_of(image):
    """How a Pillow image lies by its EXIF or XMP data, 1 to 8."""
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # as of broken files; they are shown as they lie everywhere
        return 1


def is_on_its_side(image):
    """Whether the rows of a Pillow image are columns of what it shows, by its EXIF data."""
    return orientation_of(image) in (5, 6, 7, 8)


def _turn(pixels, orientation):
    """[height, width, 3] as an image of this EXIF orientation is to be seen (Exif 2.32, 4.6.4 A, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):  # its rows are columns
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
