"""Pixels are TensorFlow's or docs/decoding.md says why not; whatever a file holds, it gives an image or an ImageError soon."""

import functools
import io
import os
import random
import re
import struct
import subprocess
import sys
import time
import timeit
import zlib

import numpy as np
import pytest
from conftest import DEMO, ROOT, need_shared, variants
from PIL import Image, ImageOps

from images.decoding import ImageError, check_jpeg, load_image
from tfod.tensorflow_import import import_tensorflow

CORPUS = sorted((ROOT / "tests" / "corpus" / "images").iterdir())
RNG = np.random.default_rng(0)


@functools.cache
def documented():
    """{file name: what docs/decoding.md says that load_image gives} of the files that are not as TensorFlow's."""
    rows = {}
    for line in (ROOT / "docs" / "decoding.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6:
            rows |= {name: cells[3] for name in re.findall(r"`([\w.]+)`", cells[4])}
    return rows


def tensorflows(path):
    """The image as TensorFlow decodes it, or None. JPEGs by the exact transform: see docs/decoding.md."""
    io_ops, data = import_tensorflow().io, path.read_bytes()
    try:
        if data.startswith(b"\xff\xd8"):
            return io_ops.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE").numpy()
        return io_ops.decode_image(data, channels=3, expand_animations=False).numpy()
    except Exception:
        return None


def ours(path, **options):
    try:
        return load_image(path, **options)
    except ImageError:
        return None


def alike(one, other):
    return (one is None) == (other is None) and (one is None or np.array_equal(one, other))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_odd_images_are_tensorflows_or_documented(path):
    image, theirs = ours(path), tensorflows(path)
    here = documented().get(path.name)
    if here is None:
        assert image is not None
        assert alike(image, theirs)
        return
    assert here.startswith("refused") == (image is None)
    if not here.startswith("refused"):
        assert not alike(image, theirs)  # else the row is out of date
    if here.startswith("as Pillow"):
        with Image.open(path) as opened:
            np.testing.assert_array_equal(image, np.asarray(opened.convert("RGB")))


def test_the_documented_files_are_there():
    assert documented().keys() <= {path.name for path in CORPUS}
    assert len(documented()) > 40


def test_tensorflows_default_is_the_fast_transform():
    """The one difference of all JPEGs."""
    simplejpeg = pytest.importorskip("simplejpeg")
    data = (DEMO / "images" / "shapes_01.jpg").read_bytes()
    theirs = import_tensorflow().io.decode_image(data, channels=3).numpy()
    np.testing.assert_array_equal(simplejpeg.decode_jpeg(data, "RGB", fastdct=True), theirs)
    difference = np.abs(theirs.astype(int) - load_image(DEMO / "images" / "shapes_01.jpg"))
    assert 0 < difference.mean() < 2


def test_gif_frames_that_leave_pixels_out_leave_them_black():
    corpus = CORPUS[0].parent
    whole, part = load_image(corpus / "gif_plain.gif"), load_image(corpus / "gif_part.gif")
    assert part.shape == whole.shape == (11, 13, 3)
    assert (part[2:7, 3:10].reshape(-1, 3) == whole.reshape(-1, 3)[:35]).all()
    part[2:7, 3:10] = 0
    assert not part.any()
    assert load_image(corpus / "gif_over.gif").shape == (13, 16, 3)


def tiff(bits, photometric, data, width, height):
    """A grey TIFF of one strip."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 122, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.filterwarnings("error")
def test_numbers_of_more_than_eight_bits(tmp_path):
    path = tmp_path / "image.tif"
    share = RNG.random((9, 14), dtype=np.float32)
    share[0, :2] = 0, 1

    def loaded(array):
        Image.fromarray(array).save(path)
        return load_image(path)

    np.testing.assert_array_equal(loaded(share), np.repeat(np.rint(share * 255)[:, :, None], 3, axis=2))
    np.testing.assert_array_equal(loaded(share * 254.6)[:, :, 0], np.rint(share * 254.6))
    deep = RNG.integers(0, 65536, (9, 14)).astype(np.uint16)
    np.testing.assert_array_equal(loaded(deep), np.repeat((deep >> 8)[:, :, None], 3, axis=2))
    signalling = np.where(share > 0.5, np.uint32(0x7F800001), share.view(np.uint32)).view(np.float32)
    wrong = share * 3000, share - 0.5, share - 3e38, np.where(share > 0.5, np.float32("nan"), share), signalling
    for array in (*wrong, deep.astype(np.int32)):
        with pytest.raises(ImageError, match=r"8 (or 16 )?bits"):
            loaded(array)
    path.write_bytes(tiff(16, 0, deep.tobytes(), 14, 9))
    np.testing.assert_array_equal(load_image(path)[:, :, 1], 255 - (deep >> 8))
    twelve = RNG.integers(0, 4096, (9, 14))
    pairs = twelve.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    path.write_bytes(tiff(12, 1, packed.astype(np.uint8).tobytes(), 14, 9))
    np.testing.assert_array_equal(load_image(path)[:, :, 2], twelve >> 4)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, kind, orientation):
    path, exif = tmp_path / f"image.{kind}", Image.Exif()
    pixels = Image.fromarray(RNG.integers(0, 256, (11, 17, 3), dtype=np.uint8))
    pixels.save(path, lossless=True)
    stored = load_image(path)
    exif[0x0112] = orientation
    pixels.save(path, lossless=True, exif=exif)
    np.testing.assert_array_equal(load_image(path), stored)
    with Image.open(path) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(load_image(path, exif_rotate=True), wanted)


def test_the_turned_photos_of_the_cases():
    """Stored turned, so to be seen as they were; compressed anew, so nearly."""
    for path in need_shared("cases", "imgs_exif").iterdir():
        upright = load_image(need_shared("cases", "imgs", path.name)).astype(int)
        assert load_image(path).shape[:2] == upright.shape[1::-1]
        assert np.abs(load_image(path, exif_rotate=True) - upright).mean() < 5


def test_unreadable_files_say_why(tmp_path):
    good = (DEMO / "images" / "shapes_01.jpg").read_bytes()
    for name, content, reason in (
        ("empty.jpg", b"", "empty"),
        ("cut.jpg", good[: len(good) // 2], "truncated"),
        ("text.png", b"not an image", "not an image"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=reason):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "absent.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, "/dev/zero"):
        with pytest.raises(ImageError, match="not a file"):
            load_image(path)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows, *more, bits=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_what_a_png_holds_besides_pixels_does_not_matter(tmp_path):
    rows = bytes(1 + 3 * 4) * 4
    path = tmp_path / "image.png"
    for more in (
        chunk(b"iCCP", b""),
        chunk(b"tRNS", b"\1"),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))),
        chunk(b"tEXt", b"a\0b")[:-1] + b"x",
    ):
        path.write_bytes(png(4, 4, rows, more))
        assert load_image(path).shape == (4, 4, 3)
        assert alike(load_image(path), tensorflows(path))


def test_broken_pngs_are_refused_as_by_tensorflow(tmp_path):
    """Pillow leaves what is missing black."""
    noise = bytes(bytearray(RNG.integers(0, 256, 13 * 8, dtype=np.uint8)))
    rows = b"".join(b"\0" + noise[13 * i + 1 : 13 * i + 13] for i in range(8))
    path = tmp_path / "image.png"
    whole = png(4, 8, rows)
    path.write_bytes(whole)
    assert alike(load_image(path), tensorflows(path))
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for content in (
        png(4, 8, rows[: 13 * 5]),
        flipped,
        png(4, 4, rows, colour=3),
        png(4, 4, rows, chunk(b"CgBI", b"1")),
    ):
        path.write_bytes(content)
        assert ours(path) is None
        assert tensorflows(path) is None


MEASURED = """
import sys, time
from images.decoding import ImageError, load_image
load_image("demo/images/shapes_01.jpg")
def peak():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
for line in sys.stdin:
    path, limit = line.strip().rsplit(" ", 1)
    begun = time.process_time()
    try:
        result = str(load_image(path, max_pixels=int(limit) or None).shape)
    except ImageError as error:
        result = f"ImageError: {error}"
    print(f"{time.process_time() - begun:.3f} {peak() - before:.0f} {result}")
"""


def measured(*files):
    """[(seconds, megabytes, result)] of load_image on each (path, max_pixels or 0), one after the other in one process."""
    lines = "".join(f"{path} {limit}\n" for path, limit in files)
    process = subprocess.run(
        [sys.executable, "-c", MEASURED], input=lines, capture_output=True, text=True, cwd=ROOT, check=True
    )
    rows = [line.split(" ", 2) for line in process.stdout.splitlines()]
    return [(float(seconds), float(megabytes), result) for seconds, megabytes, result in rows]


def test_large_images_are_read_in_bounded_memory(tmp_path):
    """94 megapixels, which Pillow by itself refuses: 3 bytes a pixel for the array, 4 for Pillow's own."""
    side = 9_700
    blank = Image.new("RGB", (side, side), (10, 20, 30))
    blank.save(tmp_path / "large.jpg")
    Image.new("L", (side, side), 77).save(tmp_path / "large.png")
    (tmp_path / "huge.png").write_bytes(png(20_000, 20_000, b""))
    results = measured(
        *((tmp_path / name, limit) for name, limit in (("large.jpg", 0), ("large.png", 0), ("huge.png", 0)))
    )
    for _, megabytes, result in results[:2]:
        assert result == f"({side}, {side}, 3)"
        assert megabytes < 4.5 * side**2 / 2**20
    assert "--max_pixels 400000000" in results[2][2]
    with pytest.raises(ImageError, match=r"100 x 100 are 0.0 megapixels, more than --max_pixels 9999"):
        Image.new("RGB", (100, 100)).save(tmp_path / "small.png")
        load_image(tmp_path / "small.png", max_pixels=9999)
    assert load_image(tmp_path / "small.png", max_pixels=10_000).shape == (100, 100, 3)


def blank_bytes(mode, kind, side=4000, **options):
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, kind, **options)
    return file.getvalue()


def sized(data, width, height):
    """A JPEG whose header promises this size."""
    data = bytearray(data)
    for frame in (b"\xff\xc0", b"\xff\xc2"):
        if (at := data.find(frame)) >= 0:
            data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def hostile():
    """{name: content} of small files that promise much."""
    noise = Image.fromarray(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    files = {}
    for mode in ("L", "RGB", "CMYK"):
        for progressive in (False, True):
            file = io.BytesIO()
            noise.convert(mode).save(file, "JPEG", progressive=progressive, subsampling=0)
            name, data = f"{mode}_{progressive}", file.getvalue()
            files[f"{name}_wide.jpg"] = sized(data, 9000, 9000)
            files[f"{name}_some.jpg"] = sized(data, 700, 700)
            if progressive:  # its last scan, which may lack its data, again and again
                scan = b"\xff\xda" + data[:-2].split(b"\xff\xda")[-1].split(b"\xff\xc4")[0]
                files[f"{name}_scans.jpg"] = sized(data[:-2] + scan * (20_000 // len(scan)) + data[-2:], 4000, 4000)
    files["lossless.webp"] = blank_bytes("RGBA", "WEBP", lossless=True)
    files["fax.tif"] = blank_bytes("1", "TIFF", compression="group4")
    files["lzma.tif"] = blank_bytes("RGB", "TIFF", 1500, compression="lzma")
    files["bits.png"] = blank_bytes("1", "PNG")
    files["palette.png"] = blank_bytes("P", "PNG")
    files["grey.png"] = blank_bytes("L", "PNG")
    files["more_bits.png"] = blank_bytes("1", "PNG", 9000)
    files["short.png"] = png(4000, 4000, bytes(12001) * 30)
    files["tall.png"] = png(1, 2_000_000, bytes(1_000_000))
    files["blank.gif"] = blank_bytes("P", "GIF")
    files["canvas.gif"] = (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 128, 0, 0)
        + bytes(6)
        + (b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\2\x44\1\0;")
    )
    for width in (2_000, 200_000):  # rows that end at once
        data = bytes(2 * 1900) + b"\0\1"
        head = struct.pack("<IiiHHIIiiII", 40, width, 1900, 1, 8, 1, len(data), 0, 0, 0, 0) + bytes(1024)
        files[f"rows_{width}.bmp"] = b"BM" + struct.pack("<IHHI", 14 + len(head + data), 0, 0, 1078) + head + data
    return files


def test_small_files_that_promise_much_are_answered_soon(tmp_path):
    files = hostile()
    for name, content in files.items():
        assert len(content) < 60_000, name
        (tmp_path / name).write_bytes(content)
    for name, (seconds, megabytes, result) in zip(files, measured(*((tmp_path / n, 0) for n in files)), strict=True):
        assert seconds < 1, (name, seconds, result)
        assert megabytes < 500, (name, megabytes, result)
        if name.endswith(("_wide.jpg", "_scans.jpg")) or name in (
            "more_bits.png",
            "short.png",
            "tall.png",
            "canvas.gif",
        ):
            assert result.startswith("ImageError"), (name, result)


def test_the_images_of_the_cases_are_answered_soon():
    paths = sorted(need_shared("cases", "images").iterdir())
    for path, (seconds, megabytes, result) in zip(paths, measured(*((path, 0) for path in paths)), strict=True):
        assert seconds < 1, path
        assert megabytes < 500, path
        assert result == "(4, 4, 3)" if path.name == "min_IndexError_iCCP.png" else result.startswith("ImageError")


def test_blank_images_are_small_and_valid(tmp_path):
    """No limit is so low that it refuses what an ordinary program writes."""
    for mode, kind, options in (
        ("L", "JPEG", {"optimize": True, "progressive": True, "quality": 1}),
        ("RGB", "JPEG", {"optimize": True, "quality": 1}),
        ("RGB", "PNG", {}),
        ("L", "PNG", {"compress_level": 9}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {"quality": 1}),
    ):
        path = tmp_path / f"{mode}.{kind.lower()}"
        path.write_bytes(blank_bytes(mode, kind, 5000, **options))
        assert load_image(path).max() <= 2


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_give_an_image_or_an_image_error(tmp_path, seed, recwarn):
    """Bits, bytes, sizes and lengths changed, pieces cut out and repeated. NumPy warns of nothing."""
    choose = random.Random(seed)
    contents = [path.read_bytes() for path in CORPUS]
    path, slowest = tmp_path / "damaged.jpg", 0
    for _ in range(variants(150)):
        data = bytearray(choose.choice(contents))
        for _ in range(choose.choice((1, 1, 2, 4))):
            at = choose.randrange(min(len(data), choose.choice((40, 200, 10**6))))
            match choose.randrange(5):
                case 0:
                    data[at] ^= 1 << choose.randrange(8)
                case 1:
                    data[at] = choose.choice((0, 1, 127, 128, 255))
                case 2:
                    number = choose.choice((0, 1, 255, 4000, 65535, 2**31 - 1, 2**32 - 1))
                    data[at : at + 4] = number.to_bytes(4, choose.choice(("big", "little")))
                case 3:
                    del data[at + 1 : at + choose.randrange(50)]
                case 4:
                    data[at:at] = data[at : at + choose.randrange(50)]
        path.write_bytes(data)
        begun = time.process_time()
        image = ours(path, exif_rotate=choose.random() < 0.5)
        slowest = max(slowest, time.process_time() - begun)
        assert image is None or (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3)
    assert slowest < 1
    assert not [str(warning) for warning in recwarn if warning.category is not UserWarning]


def test_pillows_warnings_do_not_come_through(tmp_path):
    """They are about tags that are not read, and name lines of Pillow."""
    path, exif = tmp_path / "image.jpg", Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    Image.new("RGB", (8, 4)).save(path, exif=exif)
    data = bytearray(path.read_bytes())
    at = data.find(b"Exif") + 14
    data[at : at + 2] = b"\0\x20"  # 32 tags, it says
    path.write_bytes(data)
    code = "import sys; from images.decoding import load_image; print(load_image(sys.argv[1], exif_rotate=True).shape)"
    process = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=ROOT)
    assert (process.stdout, process.stderr) == ("(8, 4, 3)\n", "")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):  # which pytest lets through
        load_image(path, exif_rotate=True)


@pytest.mark.parametrize("begin", [20_000, 20_001])
def test_scans_are_counted_wherever_they_begin(begin):
    """At even and at odd places: they are looked for as pairs of bytes."""
    start, scan = b"\xff\xd8" + bytes(begin - 2), b"\xff\xda\0\0"
    check_jpeg(4000, 4000, start + 125 * scan)
    with pytest.raises(ImageError, match="with 126 scans"):
        check_jpeg(4000, 4000, start + 126 * scan)


def test_looking_for_traps_takes_little_time():
    """It is done for every image: with bytes.count, which takes four times as long and keeps Python's lock, the GPU waited for it."""
    data = RNG.bytes(300_000)

    def fastest(function):
        return min(timeit.repeat(function, number=20, repeat=15))

    assert fastest(lambda: check_jpeg(1000, 1000, data)) < 0.6 * fastest(lambda: data.count(b"\xff\xda"))
