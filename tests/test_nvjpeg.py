"""JPEGs decoded by nvJPEG, in whose place here are functions as nvjpeg.h declares them, which know some JPEGs' planes."""

import ctypes
import types

from commandline import UserError

import kernels_on_cpu
import numpy as np
import pytest
from conftest import DEMO
from kernels_on_cpu import SHIFTS, jpeg_of_planes

from images.decoding import decode_image, load_image
from runtimes import gpu_images, nvjpeg
from runtimes.gpu_images import MOST_TOGETHER, GpuDecoder, baseline_frame, choose_decoder
from runtimes.nvjpeg import RGB, YUV

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
IMAGES = [load_image(path) for path in PICTURES[:3]] + [load_image(PICTURES[3])[:45, :67]]
# [bytes, planes]: one of each kind and more.
JPEGS = [
    jpeg_of_planes(image, kind) for image, kind in zip(IMAGES * 2, ["grey", *SHIFTS, *SHIFTS, "grey"], strict=True)
]
HANDLE, STATE, HEADER, STREAM = 0x1000, 0x2000, 0x3000, 0x4000


class NvjpegImage(ctypes.Structure):
    _fields_ = [("channel", ctypes.c_void_p * 4), ("pitch", ctypes.c_size_t * 4)]


class Library:
    """libnvjpeg's functions. Each gives status 2 for arguments that it was not meant to get; `made` says what lives.

    Pixels of 4:2:2 and 4:2:0 are beside libjpeg-turbo's, as nvJPEG's are. `working`: the backends that there are; `beside`: by
    how much each sample is decoded wrong.
    """

    def __init__(self):
        self.working, self.refused, self.made = [2, 3], b"\xff\xc2", []
        self.batches, self.decoded = {}, []  # {state: (images, kind of output)}, [kind of each that was]
        self.planes, self.beside = dict(JPEGS), 0
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
        for name, arguments in signatures.items():
            function = ctypes.CFUNCTYPE(number, *arguments)(getattr(self, f"_{name}"))
            function.__name__ = f"nvjpeg{name}"
            setattr(self, f"nvjpeg{name}", function)

    def _make(self, number, out):
        self.made.append(number)
        out[0] = number
        return 0

    def _destroy(self, number):
        self.made.remove(number)
        return 0

    def _CreateEx(self, backend, device_allocator, pinned_allocator, flags, out):
        if backend not in self.working:
            return 7
        return 2 if device_allocator or pinned_allocator or flags else self._make(HANDLE, out)

    def _JpegStateCreate(self, handle, out):
        return self._make(STATE + len(self.made), out) if handle == HANDLE else 2

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
        self.batches[state] = count, kind
        return 0 if handle == HANDLE and state in self.made and kind in (YUV, RGB) and threads > 0 else 2

    def _DecodeBatched(self, handle, state, files, lengths, images, stream):
        count, kind = self.batches.get(state, (0, 0))
        if (handle, stream) != (HANDLE, STREAM) or not count:
            return 2
        files = ctypes.cast(files, ctypes.POINTER(ctypes.c_void_p))
        lengths = ctypes.cast(lengths, ctypes.POINTER(ctypes.c_size_t))
        images = ctypes.cast(images, ctypes.POINTER(NvjpegImage))
        for i in range(count):
            data = ctypes.string_at(files[i], lengths[i])
            planes = self.planes.get(data)
            if planes is None:
                del self.batches[state]  # must be initialised again
                return 3
            if kind == RGB:
                wrong = baseline_frame(data).sampling in ("4:2:2", "4:2:0")
                pixels = decode_image(data)
                planes = [pixels.reshape(len(pixels), -1) + np.uint8(wrong)]
            self.decoded.append(kind)
            for plane, pointer, pitch in zip(planes, images[i].channel, images[i].pitch, strict=False):
                for y, row in enumerate(plane + np.uint8(self.beside)):
                    ctypes.memmove(pointer + y * pitch, row.tobytes(), row.size)
        return 0


@pytest.fixture
def library(monkeypatch):
    made = Library()
    monkeypatch.setattr(nvjpeg, "load_library", lambda: made)
    monkeypatch.setattr(nvjpeg, "without_releasing", lambda library: library)
    return made


@pytest.fixture
def gpu(library, monkeypatch):
    """A GpuContext of the processor; the sample pictures of GpuDecoder are of known planes."""
    kernels_on_cpu.install(monkeypatch)
    samples = {kind: jpeg_of_planes(IMAGES[3], kind) for kind in ("grey", *SHIFTS)}
    library.planes.update(samples.values())
    monkeypatch.setattr(gpu_images, "sample_picture", lambda kind: samples[kind][0])
    monkeypatch.setattr(gpu_images.shutil, "which", lambda name: name)
    return Gpu()


class Gpu:
    def __init__(self):
        self.decoders = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def decoded(state, files):
    """(whether it went well, planes) of JPEGS, decoded one behind the other, with some bytes behind each row."""
    memory = [[np.zeros((len(plane), plane.shape[1] + 5), np.uint8) for plane in planes] for _, planes in files]
    none = [0] * 3
    pointers = [([m.ctypes.data for m in each] + none)[:3] for each in memory]
    strides = [([m.shape[1] for m in each] + none)[:3] for each in memory]
    fine = state.decode([data for data, _ in files], pointers, strides, STREAM)
    return fine, [[m[:, :-5] for m in each] for each in memory]


def test_planes_go_where_they_are_to(library):
    codec = nvjpeg.NvJpeg()
    state = codec.new_state(YUV)
    assert codec.name == "the JPEG hardware"
    for files in (JPEGS[:3], JPEGS[3:6], JPEGS[:1]):  # the number of images may change
        fine, found = decoded(state, files)
        assert fine
        for (_, planes), ours in zip(files, found, strict=True):
            for plane, our in zip(planes, ours, strict=True):
                np.testing.assert_array_equal(our, plane)
    state.close()
    codec.close()
    assert not library.made


def test_after_a_batch_that_fails_the_next_is_decoded(library):
    state = nvjpeg.NvJpeg().new_state(YUV)
    whole, planes = JPEGS[1]
    assert not decoded(state, [(whole, planes), (whole[:-2000], planes)])[0]
    fine, found = decoded(state, [JPEGS[1]] * 2)
    assert fine
    np.testing.assert_array_equal(found[1][2], planes[2])


def test_it_is_asked_what_it_supports(library):
    state = nvjpeg.NvJpeg().new_state(YUV)
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


def test_jpegs_of_all_kinds_become_their_pixels(gpu, library):
    """As many as go together, one that is not supported among them; then one that is broken, with one that is not."""
    decoder = GpuDecoder(gpu)
    assert decoder.differences == dict.fromkeys(["grey", *SHIFTS], 0)
    files = [(data, baseline_frame(data)) for data, _ in JPEGS]
    assert [frame.sampling for _, frame in files] == ["grey", *SHIFTS, *SHIFTS, "grey"]
    refused = files[2][0][:2] + b"\xff\xfe\0\4" + library.refused + files[2][0][2:]
    files = [*(files * 9)[: MOST_TOGETHER - 1], (refused, files[2][1])]
    library.decoded.clear()
    *images, none = decoder.decode(files)
    assert none is None
    to_pixels = [frame.sampling in ("grey", "4:4:4") for _, frame in files[:-1]]
    assert library.decoded == [RGB] * sum(to_pixels) + [YUV] * (len(to_pixels) - sum(to_pixels))
    for (data, _), image in zip(files, images, strict=False):
        np.testing.assert_array_equal(image.download(gpu), decode_image(data))
    assert decoder.decode([files[0], (files[0][0][:-100], files[0][1])]) == [None, None]
    (again,) = decoder.decode(files[:1])
    np.testing.assert_array_equal(again.download(gpu), decode_image(files[0][0]))
    decoder.close()
    assert not library.made


def detector(gpu):
    return types.SimpleNamespace(gpu=gpu, runtime="TensorRT", metadata={"resizer": {"kind": "fixed_shape"}})


def test_what_decodes_otherwise_is_not_used_unasked(gpu, library, capsys):
    """By default the pixels are those of processors; who asks for the GPU is told how far they are not."""
    assert choose_decoder("auto", detector(gpu), PICTURES).samplings == {"grey", *SHIFTS}
    gpu.decoders.clear()
    library.beside, library.working = 2, [2]
    library.made.clear()
    assert choose_decoder("auto", detector(gpu), PICTURES) is None
    assert capsys.readouterr().err == ""
    assert not library.made  # it takes no memory
    decoder = choose_decoder("gpu", detector(gpu), PICTURES)
    said = capsys.readouterr().err
    assert "nvJPEG (the GPU and processors)" in said and "4:2:0" in said and "up to 6 of 255" in said
    image = decoder.decode([(JPEGS[0][0], baseline_frame(JPEGS[0][0]))])[0].download(gpu)
    np.testing.assert_array_equal(image, decode_image(JPEGS[0][0]) + np.uint8(2))


def test_what_it_cannot_decode_is_left_to_processors(gpu, library):
    colours = [data for data, planes in library.planes.items() if len(planes) == 3]
    for data in colours:
        del library.planes[data]
    decoder = choose_decoder("gpu", detector(gpu), PICTURES)
    assert decoder.samplings == {"grey"}
    (grey,) = decoder.decode([(JPEGS[0][0], baseline_frame(JPEGS[0][0]))])
    assert grey.width == IMAGES[0].shape[1]
    assert decoder.decode([(JPEGS[2][0], baseline_frame(JPEGS[2][0]))]) == [None]
    gpu.decoders.clear()
    library.planes.clear()
    with pytest.raises(UserError, match="decodes nothing on this GPU"):
        choose_decoder("gpu", detector(gpu), PICTURES)


def test_that_nothing_is_exact_is_not_asked_again(gpu, library, monkeypatch):
    """As for each table of Ray's."""
    library.beside = 1
    assert choose_decoder("auto", detector(gpu), PICTURES) is None
    monkeypatch.setattr(gpu_images, "GpuDecoder", None)
    assert choose_decoder("auto", detector(gpu), PICTURES) is None


@pytest.mark.parametrize(
    "error", [RuntimeError("nvcc: no such GPU\nand more"), OSError("nvjpegCreateEx gives status 7")]
)
def test_what_fails_is_one_line_and_left_to_processors(gpu, error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(gpu_images, "join_planes", fail)
    assert choose_decoder("auto", detector(gpu), PICTURES) is None
    assert capsys.readouterr().err == f"warning: processors decode the images: {str(error).splitlines()[0]}\n"
    assert choose_decoder("auto", detector(gpu), PICTURES) is None
    assert capsys.readouterr().err == ""  # once is enough
    with pytest.raises(UserError, match=r"--decoder gpu: nv.*; or use --decoder cpu"):
        choose_decoder("gpu", detector(gpu), PICTURES)


def test_the_decoder_stays_for_the_next_files(gpu):
    opened = detector(gpu)
    decoder = choose_decoder("auto", opened, PICTURES)
    assert decoder is not None
    assert choose_decoder("gpu", opened, PICTURES[:1]) is decoder
