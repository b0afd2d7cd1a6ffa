"""One interface to whatever runs a model; what a file holds decides what runs it."""

import inspect
import re
import shutil
import subprocess
import sys

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO, DEMO_MODEL, ROOT

from images.decoding import load_image
from runtimes import detect, open_detector
from runtimes.detector import Detector, detect_image
from runtimes.openvino_detector import OpenVinoDetector
from runtimes.ort_detector import OrtDetector
from runtimes.trt_detector import TrtDetector
from tfod.tensorflow_import import import_tensorflow

PICTURE = DEMO / "images" / "shapes_02.jpg"


@pytest.mark.parametrize("kind", [OrtDetector, OpenVinoDetector, TrtDetector])
def test_detectors_have_the_one_interface(kind):
    methods = {name: value for name, value in vars(Detector).items() if inspect.isfunction(value)}
    methods = {name: value for name, value in methods.items() if name not in ("__init__", "__subclasshook__")}
    assert {"infer", "start", "finish", "images_per_second", "close", "__exit__"} <= methods.keys()
    for name, method in methods.items():
        theirs = inspect.signature(getattr(kind, name))
        if name != "__exit__":
            assert list(theirs.parameters) == list(inspect.signature(method).parameters), name
    source = "".join(map(inspect.getsource, inspect.getmro(kind)[:-1]))
    for name in Detector.__annotations__:
        assert f"self.{name} = " in source or f"\n    {name} = " in source, name


def test_an_open_model_has_what_the_interface_says(detector):
    model = detector("demo", "--batch_size", "4")
    for name, kind in Detector.__annotations__.items():
        assert isinstance(getattr(model, name), kind), name
    assert model.max_batch == 4
    assert detector("demo", "--batch_size", "dynamic").max_batch is None
    assert model.images_per_second(np.zeros((4, 160, 160, 3), np.float32), images=8) > 1


@pytest.mark.parametrize("name", ["model.bin", "engine.trt", "model", "photo.jpg"])
def test_an_onnx_file_runs_under_any_name(name, convert, detector, tmp_path):
    shutil.copy(convert("demo")[0], tmp_path / name)
    image = load_image(PICTURE)
    with open_detector(tmp_path / name) as model:
        assert model.runtime == "ONNX Runtime"
        assert detect_image(model, image).scores.tolist() == detect_image(detector("demo"), image).scores.tolist()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.onnx", PICTURE, "a JPEG image"),
        ("engine.trt", PICTURE, "a JPEG image"),
        ("picture.png", b"\x89PNG\r\n\x1a\n", "a PNG image"),
        ("model.onnx", DEMO / "ssd_mobilenet_v1_shapes" / "labels.txt", "a text file"),
        ("engine.trt", "Modell f\u00fcr \u4e2d\u6587\n".encode() * 500, "a text file"),
        ("model.onnx", b"", "an empty file"),
        ("model.tar.gz", b"\x1f\x8b\x08\x00\x01", "a gzip archive"),
        ("model.tflite", b"\x1c\x00\x00\x00TFL3\x14\x00", "a TensorFlow Lite model"),
        ("model.onnx", b"\x08\x09\xff\xff broken", "not a readable ONNX file"),
        ("model.onnx", b"\xfe\xed" * 50, "not a readable ONNX file"),
        ("absent.onnx", None, "no such file; make it with create_onnx.py"),
        ("absent.trt", None, "no such file; make it with build_engine.py"),
    ],
)
def test_what_is_no_model_is_called_what_it_is(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    with pytest.raises(UserError) as raised:
        open_detector(tmp_path / name)
    assert name in str(raised.value)
    assert said in str(raised.value)


def test_a_folder_is_called_a_folder(tmp_path):
    with pytest.raises(UserError, match="it is a folder"):
        open_detector(tmp_path)


@pytest.mark.parametrize("within", ["", "saved_model", "saved_model/saved_model.pb"])
def test_a_tensorflow_model_is_called_one(within):
    path = DEMO_MODEL / within
    with pytest.raises(UserError, match=r"it is a TensorFlow model; convert it with create_onnx\.py") as raised:
        open_detector(path)
    assert str(raised.value).startswith(f"--engine {path}: ")


def test_a_frozen_graph_is_called_a_tensorflow_model(tmp_path):
    tf = import_tensorflow()
    with tf.Graph().as_default() as graph:
        tf.constant(1.0)
    for name in ("graph.pb", "frozen_inference_graph.pb"):
        (tmp_path / name).write_bytes(graph.as_graph_def().SerializeToString())
    for path in (tmp_path / "graph.pb", tmp_path):
        with pytest.raises(UserError, match="it is a TensorFlow model"):
            open_detector(path)


IMAGE = load_image(PICTURE)
HEIGHT, WIDTH = IMAGE.shape[:2]


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (np.float32(IMAGE) / 255, f"float32 [{HEIGHT}, {WIDTH}, 3]"),
        (np.uint16(IMAGE) * 257, f"uint16 [{HEIGHT}, {WIDTH}, 3]"),
        (IMAGE[..., 0], f"uint8 [{HEIGHT}, {WIDTH}]"),
        (np.dstack([IMAGE, IMAGE[..., :1]]), f"uint8 [{HEIGHT}, {WIDTH}, 4]"),
        (IMAGE.transpose(2, 0, 1), f"uint8 [3, {HEIGHT}, {WIDTH}]"),
        (IMAGE[None], f"uint8 [1, {HEIGHT}, {WIDTH}, 3]"),
        (IMAGE[:0], f"uint8 [0, {WIDTH}, 3]"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image_is_refused(image, what, detector):
    with pytest.raises(ValueError, match=re.escape(f"uint8 RGB [height, width, 3], 0..255; this is {what}") + "$"):
        detect(detector("demo"), image)


def test_an_array_is_what_its_file_is(detector):
    scores = [[found.score for found in detect(detector("demo"), image)] for image in (PICTURE, IMAGE)]
    assert scores[0] == scores[1] != []


@pytest.mark.parametrize(("end", "shown"), [("os.abort()", True), ("pass", False), ("raise OSError('ours')", False)])
def test_last_words_are_shown(end, shown):
    """TensorFlow's start-up lines are held back, unless the process dies of what they say."""
    code = (
        "import os\nfrom tfod.tensorflow_import import silenced\n"
        f"with silenced():\n    os.write(2, b'compiled to use AVX')\n    {end}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ("compiled to use AVX" in done.stderr) == shown
    assert ("OSError: ours" in done.stderr) == ("ours" in end)
