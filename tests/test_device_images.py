"""What the GPU computes of images, to the last bit what processors do: here by the same kernels, compiled for processors."""

import kernels_on_cpu
import numpy as np
import pytest
from conftest import DEMO, need_shared
from kernels_on_cpu import SHIFTS, jpeg_of_planes
from resize_cases import assert_same, empty_input, make_case, resize_cases

from images.decoding import decode_image, load_image
from runtimes.device_images import IMAGE, PLANES, DeviceImage, MemoryPool, join_planes, resize_images

PICTURES = sorted((DEMO / "images").glob("*.jpg"))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    return kernels_on_cpu.install(monkeypatch)


def padded(plane):
    """A plane with some bytes behind each row."""
    return np.pad(plane, ((0, 0), (0, 9)), constant_values=77)


def joined(images, sampling):
    """(what the kernel makes of the planes of JPEGs with these colours, what processors decode)."""
    rows, kept, wanted, found = [], [], [], []
    for image in images:
        data, planes = jpeg_of_planes(image, sampling)
        planes = [padded(plane) for plane in planes]
        kept.append(planes)
        wanted.append(decode_image(data))
        found.append(np.zeros_like(wanted[-1]))
        pointers = [plane.ctypes.data for plane in planes] + [0] * (3 - len(planes))
        strides = planes[0].shape[1], planes[-1].shape[1]
        rows.append((*pointers, found[-1].ctypes.data, *strides, *image.shape[:2], *SHIFTS.get(sampling, (0, 0))))
    table = np.array(rows, PLANES)
    device_table = np.empty(table.nbytes, np.uint8)
    join_planes(table, device_table.ctypes.data, None)
    return found, wanted


@pytest.mark.parametrize("sampling", ["grey", *SHIFTS])
def test_planes_become_the_pixels_of_libjpeg_turbo(sampling):
    """Of several images at a time, of all sizes, edges and narrow ones among them, of all colours."""
    rng = np.random.default_rng(0)
    images = [load_image(path) for path in PICTURES[:3]]
    images += [rng.integers(0, 256, (height, width, 3), np.uint8) for height in (2, 3, 4, 17) for width in range(2, 40)]
    for found, wanted in zip(*joined(images, sampling), strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=str(found.shape))


def test_photos_have_their_pixels():
    for path in sorted(need_shared("coco", "val2017").glob("*.jpg"))[:20]:
        for found, wanted in zip(*joined([load_image(path)], "4:2:0"), strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=path.name)


@resize_cases
def test_images_are_resized_to_the_last_bit(layout, dtype, keep):
    resizer, spec, images, shapes, wanted = make_case(layout, dtype, keep)
    found, table = empty_input(spec, len(images)), np.zeros(len(images), IMAGE)
    there = [DeviceImage(x.ctypes.data, 3 * x.shape[1], *x.shape[:2], x) for x in images]
    device_table = np.empty(table.nbytes, np.uint8)
    resize_images(there, shapes, resizer, spec, table, device_table.ctypes.data, found.ctypes.data, None)
    assert_same(found, spec, wanted, images)


def test_memory_is_kept_for_the_next(on_cpu):
    pool = MemoryPool(on_cpu)
    first = pool.allocate(5000)
    place, other = int(first), pool.allocate(5000)
    assert int(other) != place
    del first
    again = pool.allocate(8000)
    assert int(again) == place  # of the same power of two
    del again, other
    pool.close()


def test_what_lies_aside_is_freed_where_memory_is_short(on_cpu):
    given = []

    def allocate(size):
        if sum(size for size, _ in given) + size > 1 << 20:
            raise MemoryError
        given.append((size, memory := kernels_on_cpu.Memory(size)))
        memory.free = lambda: given.remove(next(x for x in given if x[1] is memory))
        return memory

    on_cpu.mem_alloc = allocate
    pool = MemoryPool(on_cpu)
    held = pool.allocate(1 << 19)
    del held
    assert int(pool.allocate(1 << 20)) and len(given) == 1
    with pytest.raises(MemoryError):
        pool.allocate(1 << 21)
