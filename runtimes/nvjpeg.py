"""nvJPEG, NVIDIA's JPEG decoder, by its C interface: many images in one call, which leaves Python's lock alone.

Wrappers for Python take and leave that lock for each image, and wait for it each time (BENCHMARKS.md). (nvJPEG documentation,
"Batched Image Decoding"; nvjpeg.h.)
"""

import ctypes
import ctypes.util
import importlib.util
import shutil
from pathlib import Path

import numpy as np

# nvjpegBackend_t: the JPEG hardware of the GPU; Huffman codes by the GPU or by processors, the rest by the GPU.
BACKENDS = {"the JPEG hardware": 3, "the GPU and processors": 2}
# nvjpegOutputFormat_t: planes as they are in the file; one plane of pixels, 3 bytes each.
YUV, RGB = 1, 5
CHANNELS = 4  # of an nvjpegImage_t: so many planes, then so many bytes from row to row
THREADS = 8  # of processors, where they decode Huffman codes


def _libraries():
    """Yields where libnvjpeg may be: of its package, of the CUDA toolkit that nvcc belongs to, of the system."""
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else ():
        yield from sorted(Path(folder).glob("*/lib/libnvjpeg.so.*"), reverse=True)
    nvcc = shutil.which("nvcc")
    if nvcc:
        yield from sorted(Path(nvcc).resolve().parent.parent.glob("lib64/libnvjpeg.so.*"), reverse=True)
    system = ctypes.util.find_library("nvjpeg")
    if system:
        yield system


def load_library():
    """libnvjpeg, loaded. Raises ImportError."""
    reason = "libnvjpeg is not here"
    for path in _libraries():
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            reason = error
            continue
        if hasattr(library, "nvjpegDecodeBatchedSupported"):
            return library
        reason = f"{path} is too old"
    raise ImportError(str(reason))


def without_releasing(library):
    """The library for short calls, which keep Python's lock: to leave and take it would cost more than they do."""
    return ctypes.PyDLL(library._name)


class NvJpeg:
    """nvJPEG on the GPU whose context is current. `name` says what decodes."""

    def __init__(self):
        """Raises ImportError without the library, OSError where no backend runs on this GPU."""
        self._library, self._handle = load_library(), ctypes.c_void_p()
        for self.name, backend in BACKENDS.items():
            status = self._library.nvjpegCreateEx(backend, None, None, 0, ctypes.byref(self._handle))
            if not status:
                break
        else:
            raise OSError(f"nvjpegCreateEx gives status {status}")
        self._quick = without_releasing(self._library)

    def new_state(self, output):
        """A State, for one thread at a time. output: YUV or RGB."""
        return State(self._library, self._quick, self._handle, output)

    def close(self):
        """After its States."""
        self._library.nvjpegDestroy(self._handle)


class State:
    """What a batch under way needs."""

    def __init__(self, library, quick, handle, output):
        self._library, self._quick, self._handle, self._output, self._batch = library, quick, handle, output, 0
        self._state, self._header = ctypes.c_void_p(), ctypes.c_void_p()
        for create, made in (
            (library.nvjpegJpegStateCreate, self._state),
            (library.nvjpegJpegStreamCreate, self._header),
        ):
            status = create(handle, ctypes.byref(made))
            if status:
                raise OSError(f"{create.__name__} gives status {status}")

    def supports(self, data):
        """Whether `decode` can decode a JPEG's bytes."""
        answer = ctypes.c_int(1)
        failed = self._quick.nvjpegJpegStreamParseHeader(
            self._handle, data, ctypes.c_size_t(len(data)), self._header
        ) or self._quick.nvjpegDecodeBatchedSupported(self._handle, self._header, ctypes.byref(answer))
        return not failed and not answer.value

    def decode(self, files, pointers, strides, stream):
        """Queues the decoding of JPEGs to their planes y, cb and cr, or to pixels, in a stream. Returns whether that went well.

        files: their bytes, each of which it supports, to be kept until the stream has got there; pointers, strides [n, 3], or
        [n, 1] of pixels: where in the GPU's memory each plane begins, and its bytes from row to row. A grey one has y alone.
        """
        count = len(files)
        if count != self._batch:
            self._batch = 0
            if self._library.nvjpegDecodeBatchedInitialize(self._handle, self._state, count, THREADS, self._output):
                return False
            self._batch = count
        images = np.zeros((count, 2, CHANNELS), np.uint64)
        planes = len(pointers[0])
        images[:, 0, :planes], images[:, 1, :planes] = pointers, strides
        failed = self._library.nvjpegDecodeBatched(
            self._handle,
            self._state,
            (ctypes.c_char_p * count)(*files),
            (ctypes.c_size_t * count)(*map(len, files)),
            images.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_void_p(stream),
        )
        if failed:
            self._batch = 0  # a failed batch must be reset
        return not failed

    def close(self):
        self._library.nvjpegJpegStreamDestroy(self._header)
        self._library.nvjpegJpegStateDestroy(self._state)
