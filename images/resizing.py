"""RGB arrays [height, width, 3] -> the network's input, resized exactly as TFOD resizes them."""

import dataclasses
import functools

import numpy as np

from images.decoding import ImageError

# Rows of output per step of the resize: the few hundred kB it touches stay in the processor's cache.
BLOCK_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Placement:
    """An image's size, and its size in the network's input, which it fills but for padding at the bottom and right."""

    height: int  # of the original image, pixels
    width: int
    true_shape: tuple  # height, width of the resized image, pixels


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


def placement_of(rows, columns, resizer):
    """The Placement of an image of rows x columns pixels in the input of a model with that resizer (of its metadata).

    Raises ImageError for an image of which the resizer leaves nothing, and for one of another aspect ratio than a model
    without padding was converted for, unless the resizer says `fit`.
    """
    if resizer["kind"] == "fixed_shape":
        return Placement(rows, columns, (resizer["height"], resizer["width"]))
    shape = keep_aspect_size(rows, columns, resizer["min_dimension"], resizer["max_dimension"])
    if "image_size" in resizer and shape != (resizer["height"], resizer["width"]):
        shape = _fitted(rows, columns, resizer)
    if not all(shape):  # TensorFlow's resizer fails on it too
        raise ImageError(f"{columns} x {rows} pixels are too long and thin for the model's resizer")
    return Placement(rows, columns, shape)


def _fitted(rows, columns, resizer):
    """(height, width) that fit an image into an input that was made for images of another aspect ratio.

    Raises ImageError unless the resizer says `fit`: TensorFlow's input would be of another size.
    """
    if not resizer.get("fit"):
        made_for = "{1} x {0}".format(*resizer["image_size"])
        raise ImageError(
            f"{columns} x {rows} pixels have another aspect ratio than {made_for}, which the model was converted for;"
            " --fit resizes and pads them, with other results than TensorFlow's"
        )
    scale = min(resizer["height"] / rows, resizer["width"] / columns)
    return min(round(rows * scale), resizer["height"]), min(round(columns * scale), resizer["width"])


def preprocess(image, resizer, out=None):
    """Brings RGB [H, W, 3] to the network's input.

    resizer: the dict of tfod.config.describe_resizer. out: as of resize_image. Returns (array [height, width, 3], 0..255,
    Placement). Raises ImageError for an image of which the resizer leaves nothing.
    """
    placement = placement_of(*image.shape[:2], resizer)
    height, width = placement.true_shape
    out = np.empty((resizer["height"], resizer["width"], 3), np.float32) if out is None else out
    if resizer["kind"] != "fixed_shape":
        padding = np.float32(resizer["pad_value"])
        padding = np.rint(padding) if out.dtype == np.uint8 else padding
        out[height:] = padding
        out[:height, width:] = padding
    resize_image(image, height, width, out[:height, :width], resizer.get("method", "bilinear"))
    return out, placement
