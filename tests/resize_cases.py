"""What the GPU's resize is compared with, on processors and on a GPU: images.resizing, to the last bit."""

import numpy as np
import pytest

from images.decoding import ImageError
from images.resizing import preprocess
from runtimes.detector import InputSpec

SIZES = [(480, 640), (375, 500), (500, 333), (37, 1), (1, 91), (1080, 1920), (160, 160), (7, 5)]


def resize_cases(test):
    """Has a test run for each layout and type of the input, with padding and without."""
    for name, values in (("layout", ["NHWC", "NCHW"]), ("dtype", ["float32", "uint8"]), ("keep", [False, True])):
        test = pytest.mark.parametrize(name, values)(test)
    return test


def make_case(layout, dtype, keep):
    """(resizer, InputSpec, images [height, width, 3] of many sizes, their true shapes, what they become [n, H, W, 3])."""
    resizer = {"kind": "fixed_shape", "height": 160, "width": 200}
    if keep:
        resizer = {"kind": "keep_aspect_ratio", "height": 200, "width": 200, "min_dimension": 120, "max_dimension": 200}
        resizer["pad_value"] = [123.7, 116.3, 103.5]
    spec = InputSpec("images", None, resizer["height"], resizer["width"], layout, np.dtype(dtype), None)
    rng, images, shapes, wanted = np.random.default_rng(0), [], [], []
    for size in SIZES:
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        try:
            tensor, placement = preprocess(image, resizer, np.empty((spec.height, spec.width, 3), dtype))
        except ImageError:
            assert keep
            continue
        images.append(image)
        shapes.append(placement.true_shape)
        wanted.append(tensor)
    assert len(images) > 4
    return resizer, spec, images, shapes, np.stack(wanted)


def empty_input(spec, count):
    """An engine's input for so many images, to be filled."""
    shape = (spec.height, spec.width, 3) if spec.layout == "NHWC" else (3, spec.height, spec.width)
    return np.empty((count, *shape), spec.dtype)


def assert_same(found, spec, wanted, images):
    """found: an engine's input."""
    found = found if spec.layout == "NHWC" else found.transpose(0, 2, 3, 1)
    for image, tensor, result in zip(images, wanted, found, strict=True):
        np.testing.assert_array_equal(result, tensor, err_msg=str(image.shape))
