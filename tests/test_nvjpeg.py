"""What nvJPEG is called with, as nvjpeg.h declares it: here by functions that decode with Pillow into the processor's memory."""

import ctypes
import io

import numpy as np
import pytest
from conftest import DEMO
from PIL import Image

from images.decoding import load_image
from runtimes import nvjpeg

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
HANDLE, STATE, HEADER, STREAM = 0x1000, 0x2000, 0x3000, 0x4000


class NvjpegImage(ctypes.Structure):
    _fields_ = [("channel", ctypes.c_void_p * 4), ("pitch", ctypes.c_size_t * 4)]


class Library:
    """libnvjpeg's functions. Each gives status 2 for arguments that it was not meant to get; `made` says what lives."""

    def __init__(self):
        self.working, self.refused, self.made, self.batch = [2, 3], b"\xff\xc2", set(), 0
        pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        out = ctypes.POINTER(pointer)
        signatures = {
            "CreateEx": (number, pointer, pointer, ctypes.c_uint, out),
            "Destroy": (pointer,),
            "JpegStateCreate": (pointer, out),
            "JpegStateDestroy": (pointer,),
            "JpegStreamCreate": (pointer, out),
            "JpegStreamDestroy": (pointer,),
            "JpegStreamParseHeader": (pointer, pointer, size, pointer),
            "DecodeBatchedSupported": (pointer, pointer, ctypes.POINTER(number)),
            "DecodeBatchedInitialize": (pointer, pointer, number, number, number),
            "DecodeBatched": (pointer, pointer, pointer, pointer, pointer, pointer),
        }
        for name, types in signatures.items():
            function = ctypes.CFUNCTYPE(number, *types)(getattr(self, f"_{name}"))
            function.__name__ = f"nvjpeg{name}"
            setattr(self, f"nvjpeg{name}", function)

    def _make(self, number, out):
        self.made.add(number)
        out[0] = number
        return 0

    def _destroy(self, number):
        self.made.remove(number)
        return 0

    def _CreateEx(self, backend, device_allocator, pinned_allocator, flags, out):
        if backend not in self.working:
            return 7
        return 2 if device_allocator or pinned_allocator or flags != 32 else self._make(HANDLE, out)

    def _JpegStateCreate(self, handle, out):
        return self._make(STATE, out) if handle == HANDLE else 2

    def _JpegStreamCreate(self, handle, out):
        return self._make(HEADER, out) if handle == HANDLE else 2

    _Destroy = _JpegStateDestroy = _JpegStreamDestroy = _destroy

    def _JpegStreamParseHeader(self, handle, data, length, header):
        if (handle, header) != (HANDLE, HEADER):
            return 2
        self.header = ctypes.string_at(data, length)
        return 0 if self.header.startswith(b"\xff\xd8") else 3

    def _DecodeBatchedSupported(self, handle, header, answer):
        answer[0] = int(self.refused in self.header)
        return 0 if (handle, header) == (HANDLE, HEADER) else 2

    def _DecodeBatchedInitialize(self, handle, state, count, threads, kind):
        self.batch = count
        return 0 if (handle, state, kind) == (HANDLE, STATE, 5) and threads > 0 else 2

    def _DecodeBatched(self, handle, state, files, lengths, images, stream):
        if (handle, state, stream) != (HANDLE, STATE, STREAM) or not self.batch:
            return 2
        files = ctypes.cast(files, ctypes.POINTER(ctypes.c_void_p))
        lengths = ctypes.cast(lengths, ctypes.POINTER(ctypes.c_size_t))
        images = ctypes.cast(images, ctypes.POINTER(NvjpegImage))
        for i in range(self.batch):
            try:
                pixels = np.asarray(Image.open(io.BytesIO(ctypes.string_at(files[i], lengths[i]))).convert("RGB"))
            except OSError:
                self.batch = 0  # must be initialised again
                return 3
            for y, row in enumerate(pixels):
                ctypes.memmove(images[i].channel[0] + y * images[i].pitch[0], row.tobytes(), row.size)
        return 0


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setattr(nvjpeg, "load_library", lambda: made)
    monkeypatch.setattr(nvjpeg, "without_releasing", lambda library: library)
    return made


def decoded(state, files):
    """(whether it went well, images) of files, decoded one behind the other, with some bytes behind each row."""
    sizes = [Image.open(io.BytesIO(data)).size for data in files]
    memory = [np.zeros((height, 3 * width + 5), np.uint8) for width, height in sizes]
    fine = state.decode(files, [m.ctypes.data for m in memory], [m.shape[1] for m in memory], STREAM)
    return fine, [m[:, :-5].reshape(len(m), -1, 3) for m in memory]


def test_images_go_where_they_are_to(library):
    codec = nvjpeg.NvJpeg()
    state = codec.new_state()
    assert codec.name == "the JPEG hardware"
    for paths in (PICTURES[:3], PICTURES[3:6], PICTURES[:1]):  # the number of images may change
        fine, images = decoded(state, [path.read_bytes() for path in paths])
        assert fine
        for path, image in zip(paths, images, strict=True):
            np.testing.assert_array_equal(image, np.asarray(Image.open(path)))
    state.close()
    codec.close()
    assert not library.made


def test_after_a_batch_that_fails_the_next_is_decoded(library):
    state = nvjpeg.NvJpeg().new_state()
    whole = PICTURES[0].read_bytes()
    broken = whole[:-2000]
    assert not decoded(state, [whole, broken])[0]
    fine, images = decoded(state, [whole, whole])
    assert fine
    np.testing.assert_array_equal(images[1], load_image(PICTURES[0]))


def test_it_is_asked_what_it_supports(library):
    state = nvjpeg.NvJpeg().new_state()
    whole = PICTURES[0].read_bytes()
    assert state.supports(whole)
    assert not state.supports(whole[:2] + library.refused + whole[2:])
    assert not state.supports(b"no JPEG")


def test_other_hardware_has_another_decoder(library):
    library.working = [2]
    assert nvjpeg.NvJpeg().name == "the GPU and processors"
    library.working = []
    with pytest.raises(OSError, match="nvjpegCreateEx gives status 7"):
        nvjpeg.NvJpeg()
