"""Runs model files: `open_detector(path)` returns a detector.Detector, `detect(detector, image)` what is in an image.

Any thread may call `infer` and `detect` of an open detector: an engine takes them one at a time, ONNX Runtime runs them
beside one another. `start` and `finish` belong to one thread.
"""

import shlex
from pathlib import Path

from commandline import UserError, warn

from runtimes.detector import detect

__all__ = ["detect", "open_detector", "open_first"]

# How files begin that are given by mistake: (offset, bytes, what they are).
FOREIGN = (
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"GIF8", "a GIF image"),
    (0, b"BM", "a BMP image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (4, b"TFL3", "a TensorFlow Lite model"),
)
# A saved_model.pb begins with its schema version, 1; no ONNX file has the ir_version 1.
SAVED_MODEL_BEGINS = b"\x08\x01\x12"
# A frozen_inference_graph.pb begins with a node, field 1 of a GraphDef.
FROZEN_GRAPH_BEGINS = b"\n"
# An ONNX file begins with its ir_version, field 1 of onnx.ModelProto.
ONNX_BEGINS = b"\x08"
# TensorRT's engines begin so ("magic tag").
ENGINE_BEGINS = b"ftrt"


def open_detector(path, gpu=0, runtime="auto", cores=None):
    """Opens an ONNX file of create_onnx.py, or an engine of build_engine.py (on TensorRT): what the file holds decides, not
    its name. gpu: which GPU it runs on, where it runs on one. runtime: what an ONNX file runs on, of options.add_runtime.
    cores: of the processor, that it may use there; None: all. Raises UserError, naming the file or the option, where that
    cannot be."""
    path = Path(path)
    if is_onnx(path):
        return open_onnx(path, gpu, runtime, cores)
    if runtime != "auto":
        raise UserError(
            f"--runtime {runtime}: {path} is no ONNX file, and engines run on TensorRT; leave the option out"
        )
    from runtimes.trt_detector import TrtDetector

    return TrtDetector(path, gpu)


def is_onnx(path):
    """Whether a model file is an ONNX file, else an engine. Raises UserError, naming it, where it is neither."""
    path = Path(path)
    if is_tensorflow(path):
        raise UserError(
            f"--engine {path}: it is a TensorFlow model; convert it with create_onnx.py --saved_model {shlex.quote(str(path))}"
        )
    if path.is_dir():
        raise UserError(f"--engine {path}: it is a folder; give the model.onnx or engine.trt in it")
    if not path.is_file():
        raise UserError(f"--engine {path}: no such file; make it with {maker(path)}")
    with open(path, "rb") as file:
        begin = file.read(4096)
    if what := foreign(begin):
        raise UserError(f"--engine {path}: it is {what}, not a model; make one with {maker(path)}")
    return begin.startswith(ONNX_BEGINS) or (path.suffix == ".onnx" and not begin.startswith(ENGINE_BEGINS))


def is_tensorflow(path):
    """Whether a path is a SavedModel, the export around one, or a frozen graph of TF1: files that begin much as ONNX's do."""
    if path.is_dir():
        files = path / "saved_model.pb", path / "saved_model" / "saved_model.pb", path / "frozen_inference_graph.pb"
        return any(file.is_file() for file in files)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        begin = file.read(len(SAVED_MODEL_BEGINS))
    return begin == SAVED_MODEL_BEGINS or (path.suffix == ".pb" and begin.startswith(FROZEN_GRAPH_BEGINS))


def open_onnx(path, gpu, runtime, cores=None):
    """Opens an ONNX file on a runtime: see open_detector."""
    import onnx_utils  # here: where only engines run, or a Triton server, there may be no package for ONNX
    from runtimes.openvino_detector import OpenVinoDetector
    from runtimes.ort_detector import OrtDetector

    model = onnx_utils.load(path)
    if runtime == "auto":
        runtime = faster_runtime(onnx_utils.read_metadata(model, path))
    if runtime == "openvino":
        return OpenVinoDetector(path, model, cores)
    if runtime == "cuda":
        detector = OrtDetector(path, model, gpu=gpu)
        warn("--runtime cuda: this project has never been run on ONNX Runtime's CUDA provider; try compare_tf.py first")
        return detector
    return OrtDetector(path, model, cores)


def faster_runtime(metadata):
    """The installed runtime for a model with this metadata: OpenVINO where it was clearly faster (BENCHMARKS.md), but for
    models whose crops go by the last bit of a box (faster_rcnn.crop_features): there two runtimes differ in a detection
    or two, and the converter's check ran on ONNX Runtime."""
    if metadata["meta_architecture"] != "faster_rcnn" or metadata.get("zero_outside", True):
        return "onnxruntime"
    try:
        import openvino  # noqa: F401
    except ImportError:
        return "onnxruntime"
    return "openvino"


def open_first(path, gpus, runtime="auto"):
    """Opens a model on the first of some GPUs. gpus: their numbers, or "all". Returns (Detector, the numbers of all of
    them); it is one where the model runs on processors."""
    if runtime == "cuda" and (gpus == "all" or len(gpus) > 1):
        raise UserError("--gpus: --runtime cuda runs on one GPU; name one")
    first = open_detector(path, 0 if gpus == "all" else gpus[0], runtime)
    if first.gpu is None:
        return first, [0]
    return first, list(range(first.gpu.count)) if gpus == "all" else gpus


def maker(path):
    """The script that makes a file of this name."""
    return "create_onnx.py" if path.suffix == ".onnx" else "build_engine.py"


def foreign(begin):
    """What a file is that begins with these bytes, where it is neither an ONNX file nor an engine; None where it may be."""
    for offset, signature, what in FOREIGN:
        if begin[offset:].startswith(signature):
            return what
    if not begin:
        return "an empty file"
    try:
        text = begin.decode()
    except UnicodeDecodeError as error:
        if error.start < len(begin) - 3:  # not just a letter that is cut in two
            return None
        text = begin[: error.start].decode()
    return "a text file" if not any(ord(c) < 9 or 13 < ord(c) < 32 for c in text) else None
