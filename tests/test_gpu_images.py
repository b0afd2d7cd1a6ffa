"""What surrounds decoding on a GPU, without one: which files go there, order, what is left to processors."""

import functools
import io
import os
import shutil
import types
from pathlib import Path

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO, need_shared
from PIL import Image

from image_batcher import ImageBatcher
from images.decoding import ImageError, decode_image, load_image
from runtimes.device_images import DeviceImage
from runtimes.gpu_images import (
    FEWEST_TOGETHER,
    MOST_TOGETHER,
    READ_AHEAD,
    READY_AHEAD,
    Frame,
    GpuBatcher,
    baseline_frame,
    choose_decoder,
    is_turned,
    read_jpeg,
)
from runtimes.workers import Workers

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
FIXED = {"kind": "fixed_shape", "height": 32, "width": 48}
KEEP = {**{"kind": "keep_aspect_ratio", "height": 40, "width": 40}, "min_dimension": 40, "max_dimension": 40}


def saved(mode="RGB", **options):
    """The bytes of a JPEG of the first picture."""
    buffer = io.BytesIO()
    Image.open(PICTURES[0]).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def numbered(numbers):
    """A JPEG of 4:4:4 with these numbers of components, and without the JFIF marker, which says YCbCr."""
    data = saved(subsampling=0)
    data = bytearray(data[:2] + data[4 + int.from_bytes(data[4:6], "big") :])
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 10 : frame + 19 : 3] = data[scan + 5 : scan + 11 : 2] = numbers
    return bytes(data)


def before_pixels(segment):
    """A JPEG with a segment more before its pixels."""
    data = saved()
    scan = data.index(b"\xff\xda")
    return data[:scan] + segment + data[scan:]


@pytest.mark.parametrize(
    ("data", "sampling"),
    [
        (saved(), "4:2:0"),
        (saved(subsampling=0), "4:4:4"),
        (saved(subsampling="4:2:2"), "4:2:2"),
        (saved(optimize=True, quality=30, exif=Image.Exif(), comment="\xff\xc2 no marker"), "4:2:0"),
        (saved("L"), "grey"),
        (saved(streamtype=2).replace(b"\1\x22\0\2", b"\1\x12\0\2"), None),  # 4:4:0, which few have
        (saved(progressive=True), None),
        (saved("CMYK"), None),
        (saved(keep_rgb=True), None),  # RGB, not YCbCr, as Adobe's marker says
        (numbered(b"RGB"), None),  # RGB too, as the components' numbers say
        (before_pixels(b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"), None),  # and Adobe's marker behind the frame header
        (before_pixels(saved()[saved().index(b"\xff\xc0") :][:19]), None),  # two frame headers
        (saved().replace(b"\xff\xda\0\x0c\3", b"\xff\xda\0\x0c\1"), None),  # the first scan has one component alone
        (saved()[:-2], None),  # cut off
        (saved()[:-1000], None),
        (saved() + b"more", None),
        (b"\xff\xd8\xff\xd9", None),
        (b"\xff\xd8" + b"\xff" * 50 + b"\xff\xd9", None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"", None),
    ],
)
def test_only_read_jpegs_go_to_the_gpu(data, sampling):
    frame = baseline_frame(data)
    assert frame == (sampling and Frame(*decode_image(data).shape[:2], sampling))


def test_whole_read_jpegs_are_read(tmp_path):
    """One with a long preview before its header too; none that is cut off, and nothing that is no file."""
    path, preview = tmp_path / "a.jpg", b"\xff\xe1\xff\xff" + bytes(0xFFFD)
    for data, found in (
        (saved(), True),
        (saved()[:2] + 3 * preview + saved()[2:], True),
        (saved()[:-1], False),
        (saved(progressive=True), False),
        (b"", False),
        (b"\xff", False),
    ):
        path.write_bytes(data)
        assert read_jpeg(path) == ((data, Frame(*load_image(path).shape[:2], "4:2:0")) if found else None)
    os.mkfifo(tmp_path / "pipe.jpg")
    assert read_jpeg(tmp_path / "pipe.jpg") is None
    assert read_jpeg(tmp_path) is None
    with pytest.raises(OSError, match="absent"):
        read_jpeg(tmp_path / "absent.jpg")


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_turned_images_are_known(orientation):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    assert is_turned(saved(exif=exif)) == (orientation in (3, 6, 8))


XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-\
syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


@pytest.mark.parametrize(
    ("name", "segments"),
    [
        ("xmp", [XMP]),
        ("far", [bytes(60_000)] * 2 + ["exif"]),
        ("broken", [b"Exif\0\0XXXXXXXX"]),
        ("none", [b"Exif\0\0II*\0"]),
    ],
)
def test_turned_images_are_known_wherever_it_is_said(name, segments, tmp_path):
    """As processors see it, who take what is broken for nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(dpi=(72, 72))
    for segment in reversed([exif.tobytes() if x == "exif" else x for x in segments]):
        data = data[:20] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[20:]
    (tmp_path / "a.jpg").write_bytes(data)
    turned = load_image(tmp_path / "a.jpg", exif_rotate=True).shape != load_image(tmp_path / "a.jpg").shape
    assert is_turned(data) == turned == (name in ("xmp", "far"))


def test_sizes_are_those_of_the_photos():
    for path in sorted(need_shared("coco", "val2017").glob("*.jpg"))[:60]:
        frame = baseline_frame(path.read_bytes())
        if frame:
            assert frame[:2] == load_image(path).shape[:2]


class StandIn:
    """In the place of GpuDecoder: pixels stay in the processor's memory. Every third file it does not decode, and no grey one."""

    def __init__(self):
        self.files, self.chunks, self.samplings = 0, [], {"4:2:0"}

    def decode(self, files):
        self.chunks.append(len(files))
        images = []
        for data, frame in files:
            self.files += 1
            image = Image.open(io.BytesIO(data)).convert("RGB")
            assert (*image.size, frame.sampling) == (frame.width, frame.height, "4:2:0")
            images.append(None if self.files % 3 == 0 else self.upload(np.asarray(image)))
        return images

    def upload(self, image):
        return DeviceImage(0, 3 * image.shape[1], *image.shape[:2], image)


@pytest.mark.parametrize("size", [1, 5, 32, 50])
@pytest.mark.parametrize("resizer", [FIXED, KEEP])
def test_images_come_in_order_whoever_decodes_them(size, resizer, tmp_path, capsys):
    """Of JPEGs, PNGs and broken files among each other: the same as ImageBatcher gives, and the same warnings."""
    for i in range(70):
        source, target = PICTURES[i % 8], tmp_path / f"{i:02}.jpg"
        if i % 10 == 4:
            target.write_bytes(source.read_bytes()[: 500 * i])  # empty, or cut off
        elif i % 10 == 7:
            Image.open(source).save(target, "PNG")
        elif i % 10 == 8:
            Image.open(source).convert("L").save(target)
        else:
            shutil.copy(source, target)
    files, decoder = sorted(tmp_path.iterdir()), StandIn()
    files += [tmp_path / "absent.jpg", tmp_path]
    batcher = GpuBatcher(files, resizer, size, decoder)
    batches = list(batcher)
    said = capsys.readouterr().err
    with Workers(0) as workers:
        plain = ImageBatcher(files, resizer | {"pad_value": [0, 0, 0]}, size, workers)
        wanted = list(plain)
    assert said == capsys.readouterr().err
    assert batcher.skipped == plain.skipped >= 7
    assert [batch.paths for batch in batches] == [batch.paths for batch in wanted]
    assert [batch.placements for batch in batches] == [batch.placements for batch in wanted]
    for batch in batches:
        for path, image in zip(batch.paths, batch.tensors, strict=True):
            np.testing.assert_array_equal(image.owner, load_image(path))
    assert max(decoder.chunks) <= MOST_TOGETHER
    assert batcher.by_cpu > 7


def test_what_is_not_to_be_read_is_the_processors(tmp_path, capsys):
    """By --max_pixels; and a file that cannot hold what it promises. They say why."""
    promising = bytearray(saved(quality=5))
    frame = promising.index(b"\xff\xc0")
    promising[frame + 5 : frame + 9] = (3900).to_bytes(2, "big") * 2
    (tmp_path / "a.jpg").write_bytes(promising)
    pixels = np.prod(load_image(PICTURES[0]).shape[:2])
    files = [PICTURES[0], tmp_path / "a.jpg"]
    for most, skipped in ((pixels, 1), (pixels - 1, 2), (None, 1)):
        batcher = GpuBatcher(files, FIXED, 1, StandIn(), functools.partial(load_image, max_pixels=most))
        assert len(list(batcher)) == 2 - skipped == 2 - batcher.skipped
        assert "a.jpg: skipped" in capsys.readouterr().err


def test_it_reads_only_some_way_ahead():
    read = []

    def load(path):
        read.append(path)
        raise ImageError("not that one")

    files = [Path(f"{i}.png") for i in range(10_000)]
    pictures = iter(GpuBatcher([PICTURES[0], *files], FIXED, 1, StandIn(), load))
    next(pictures)
    pictures.close()
    assert len(read) <= (READ_AHEAD + READY_AHEAD + 3) * FEWEST_TOGETHER


def detector(**changes):
    return types.SimpleNamespace(
        **{"gpu": types.SimpleNamespace(decoders={}), "runtime": "X", "metadata": {"resizer": FIXED}, **changes}
    )


@pytest.mark.parametrize(
    ("changes", "files", "said"),
    [
        ({"gpu": None}, PICTURES, "X does not run on a GPU"),
        ({"metadata": {"resizer": FIXED | {"method": "bicubic"}}}, PICTURES, "bicubic"),
        ({}, [Path("a.png"), Path("b.png"), Path("c.jpg")], "most of the images are no JPEGs"),
    ],
)
def test_where_processors_decode(changes, files, said, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: "nvcc")
    assert choose_decoder("auto", detector(**changes), files) is None
    assert choose_decoder("cpu", detector(**changes), files) is None
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match=said):
        choose_decoder("gpu", detector(**changes), files)


def test_without_the_packages_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: "nvcc")
    monkeypatch.setitem(__import__("sys").modules, "pycuda", None)
    assert choose_decoder("auto", detector(), PICTURES) is None
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "requirements-gpu.txt" in said
    with pytest.raises(UserError, match="--decoder gpu: nvJPEG cannot be loaded"):
        choose_decoder("gpu", detector(), PICTURES)
