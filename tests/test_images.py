"""Decoding and resizing are TensorFlow's; batches keep their order, bad files are named and skipped."""

import time
from pathlib import Path

from commandline.inputs import find_images

import numpy as np
import pytest
from PIL import Image

from image_batcher import ImageBatcher
from images.decoding import ImageError, load_image
from images.resizing import keep_aspect_size, preprocess, resize_image
from runtimes.detector import InputSpec, image_input, network_inputs
from runtimes.workers import Workers
from tfod.tensorflow_import import import_tensorflow

RNG = np.random.default_rng(0)
FIXED = {"kind": "fixed_shape", "height": 32, "width": 48}
PADDED = {
    **{"kind": "keep_aspect_ratio", "height": 40, "width": 40, "min_dimension": 24, "max_dimension": 40},
    "pad_value": [1.0, 2.4, 3.0],
}


@pytest.fixture(scope="module")
def tf():
    return import_tensorflow()


def noise(height, width):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "size", [(480, 640), (375, 500), (500, 333), (37, 1), (1, 91), (1080, 1920), (320, 320), (7, 5)]
)
@pytest.mark.parametrize("target", [(320, 320), (300, 300), (640, 512), (1067, 800)])
def test_resize_is_tensorflows(tf, size, target):
    image = noise(*size)
    wanted = tf.compat.v1.image.resize_bilinear(image[None].astype(np.float32), target)[0].numpy()
    assert np.abs(resize_image(image, *target) - wanted).max() <= 1e-3


@pytest.mark.parametrize("method", ["nearest_neighbor", "bicubic", "area"])
@pytest.mark.parametrize("size", [(480, 640), (375, 500), (37, 1), (1, 91), (1080, 1920), (320, 320), (7, 5)])
@pytest.mark.parametrize("target", [(320, 320), (640, 512), (1067, 800), (32, 48)])
def test_other_resize_methods_are_tensorflows(tf, method, size, target):
    image = noise(*size)
    image[: size[0] // 2, : size[1] // 2] = 255  # an edge: bicubic overshoots there
    wanted = tf.compat.v1.image.resize_images(
        image.astype(np.float32), target, method.replace("nearest_neighbor", "nearest")
    )
    assert np.abs(resize_image(image, *target, method=method) - wanted.numpy()).max() <= 1e-3
    rounded = resize_image(image, *target, np.empty((*target, 3), np.uint8), method)
    assert np.abs(rounded - np.clip(wanted.numpy(), 0, 255)).max() <= 0.501


def test_the_method_is_the_resizers(tf):
    image = noise(90, 120)
    for method in ("nearest_neighbor", "bicubic", "area"):
        tensor, _ = preprocess(image, FIXED | {"method": method})
        assert np.array_equal(tensor, resize_image(image, 32, 48, method=method))
        tensor, placement = preprocess(image, PADDED | {"method": method})
        rows, columns = placement.true_shape
        assert np.array_equal(tensor[:rows, :columns], resize_image(image, rows, columns, method=method))
        assert not np.array_equal(tensor, preprocess(image, PADDED)[0])


@pytest.mark.parametrize("size", [(480, 640), (375, 500), (900, 700)])
@pytest.mark.parametrize("side", [300, 320, 640])
def test_resize_is_fast(size, side):
    """At most 1.5 times Pillow's antialiased resize with its cast, the best of many runs on either side."""
    pixels = noise(*size)
    image = Image.fromarray(pixels)

    def seconds(function):
        times = []
        for _ in range(40):
            begun = time.perf_counter()
            function()
            times.append(time.perf_counter() - begun)
        return min(times)

    pillow = seconds(lambda: np.asarray(image.resize((side, side), Image.BILINEAR)).astype(np.float32))
    assert seconds(lambda: resize_image(pixels, side, side)) <= 1.5 * pillow


@pytest.mark.parametrize(
    ("size", "limits", "wanted"),
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((480, 640), (640, 640), (480, 640)),
        ((640, 480), (640, 640), (640, 480)),
        ((100, 600), (640, 640), (107, 640)),
        ((300, 100), (800, 1333), (1333, 444)),
        ((1000, 1000), (800, 1333), (800, 800)),
    ],
)
def test_keep_aspect_size(size, limits, wanted):
    assert keep_aspect_size(*size, *limits) == wanted


def test_keep_aspect_pads_bottom_and_right():
    image = noise(60, 120)
    resizer = {"kind": "keep_aspect_ratio", "height": 64, "width": 64, "min_dimension": 64, "max_dimension": 64}
    tensor, placement = preprocess(image, resizer | {"pad_value": [1.0, 2.0, 3.0]})
    assert np.array_equal(tensor[:32], resize_image(image, 32, 64))
    assert (tensor[32:] == [1, 2, 3]).all()
    assert placement.true_shape == (32, 64)
    assert (placement.height, placement.width) == (60, 120)
    with pytest.raises(ImageError, match="too long and thin"):
        preprocess(noise(300, 1), resizer | {"pad_value": [0, 0, 0]})


def test_batches_keep_their_order_and_skip_bad_files(tmp_path, capsys):
    for i in range(11):
        Image.new("RGB", (40 + i, 30), (i, i, i)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"")
    with Workers(0) as workers:
        batcher = ImageBatcher(find_images(tmp_path).files, FIXED, 4, workers)
        batches = list(batcher)
    assert [len(b.paths) for b in batches] == [4, 4, 2]
    stems = [Path(path).stem for b in batches for path in b.paths]
    assert stems == [f"{i:02}" for i in range(11) if i != 5]
    assert [int(x[0, 0, 0]) for b in batches for x in b.tensors] == [int(stem) for stem in stems]
    assert [p.width for b in batches for p in b.placements] == [40 + int(stem) for stem in stems]
    assert batcher.skipped == 1
    warning = capsys.readouterr().err
    assert "05.png" in warning
    assert "empty" in warning


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
@pytest.mark.parametrize(("resizer", "processes"), [(FIXED, False), (PADDED, False), (PADDED, True)])
def test_batches_are_what_the_network_takes(tmp_path, layout, dtype, resizer, processes):
    """In its type and layout, in its own memory or one that is given, bad files left out, short batches filled up."""
    for i in range(14):
        Image.fromarray(noise(20 + i, 30)).save(tmp_path / f"{i:02}.png")
    for bad in ("00", "06", "07", "12", "13"):
        (tmp_path / f"{bad}.png").write_bytes(b"")
    height, width = resizer["height"], resizer["width"]
    spec = InputSpec("images", 2, height, width, layout, np.dtype(dtype), "shapes")
    shape = (2, height, width, 3) if layout == "NHWC" else (2, 3, height, width)
    memory = np.full(shape, 7, dtype)
    seen, bytes_of_one = [], 3 * height * width * np.dtype(dtype).itemsize
    with Workers(1000, bytes_of_one, 2, cores=4 if processes else 1) as workers:
        assert workers.processes == processes
        batcher = ImageBatcher(find_images(tmp_path).files * 3, resizer, 2, workers, dtype)
        for batch in batcher:
            inputs = network_inputs(batch.tensors, batch.true_shapes, spec)
            assert image_input(batch.tensors, spec, memory) is memory
            wanted, placements = zip(*(preprocess(load_image(path), resizer) for path in batch.paths), strict=True)
            wanted = np.rint(wanted) if dtype == np.uint8 else np.array(wanted)
            for found in (inputs["images"], memory):
                assert (found.dtype, found.shape) == (np.dtype(dtype), shape)
                images = found if layout == "NHWC" else found.transpose(0, 2, 3, 1)
                np.testing.assert_array_equal(images[: len(wanted)], wanted)
                assert not images[len(wanted) :].any()
            assert inputs["shapes"][: len(wanted)].tolist() == [list(p.true_shape) for p in placements]
            seen += [Path(path).stem for path in batch.paths]
    assert seen == ["01", "02", "03", "04", "05", "08", "09", "10", "11"] * 3
    assert batcher.skipped == 15


def test_an_array_that_is_so_already_is_not_copied():
    spec = InputSpec("images", None, 4, 5, "NHWC", np.dtype(np.float32), None)
    batch = np.zeros((3, 4, 5, 3), np.float32)
    assert network_inputs(batch, None, spec)["images"] is batch
    assert not np.shares_memory(network_inputs(list(batch), None, spec)["images"], batch)
    for wrong in (batch[:, :-1], [batch[0][:-1]]):
        with pytest.raises(ValueError, match="the network takes"):
            network_inputs(wrong, None, spec)


def test_decoding_runs_ahead_with_bounded_memory(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    started = []

    def load(path):
        started.append(path)
        return load_image(path)

    with Workers(0, cores=2) as workers:
        batches = iter(ImageBatcher(paths, FIXED, 1, workers, load=load))
        next(batches)
        time.sleep(0.3)
        assert 3 <= len(started) <= 5  # the one given, and two for each of the two threads
        batches.close()
