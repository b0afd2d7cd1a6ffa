"""What comes with a model's file is input from outside: its metadata, its graph, a calibration."""

import copy
import json
import random
import resource
import time

from commandline import UserError

import numpy as np
import onnx
import pytest
from conftest import DEMO, ROOT, variants
from test_convert import command

import onnx_utils
from images.decoding import load_image
from runtimes import open_detector, quantization
from runtimes.detector import detect_image

PICTURE = sorted((DEMO / "images").glob("*.jpg"))[0]
NAN = float("nan")
ODD = [None, True, -1, 0, 1, 3, 10**9, 10**30, 1.5, 320.0, NAN, float("inf"), "", "x", "object", "fp8", "NCHW", "area"]
ODD += ["nearest_neighbor", "keep_aspect_ratio", "standard", "x" * 5000, [], {}, [1], [3, 10**9], [[]], {"kind": None}]
RAW = ["", "null", "[]", "5", '"x"', "{", "[" * 100_000, '{"num_classes": ' + "9" * 5000 + "}", "{}", "\ud800"]


@pytest.fixture(scope="module")
def model(convert):
    return onnx_utils.load(convert("demo", "--batch_size", "dynamic")[0])


@pytest.fixture(scope="module")
def metadata(model):
    return onnx_utils.read_metadata(model, "model")


def opened(model, text, path):
    """Writes the model with other metadata; what detects in a picture with it, or the UserError."""
    onnx.helper.set_model_props(model, {onnx_utils.METADATA_KEY: text})
    onnx_utils.save(model, path)
    try:
        with open_detector(path) as detector:
            return detect_image(detector, load_image(PICTURE))
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
        return error


def test_class_agnostic_nms_as_it_once_was_is_refused(model, metadata, tmp_path):
    """TensorRT 8.6's plugin has that switch, and suppresses class by class all the same."""
    old = copy.deepcopy(model)
    (plugin,) = [node for node in old.graph.node if node.op_type == "EfficientNMS_TRT"]
    plugin.attribute.append(onnx.helper.make_attribute("class_agnostic", 1))
    error = opened(old, json.dumps(metadata), tmp_path / "old.onnx")
    assert "convert the SavedModel again" in str(error)
    plugin.attribute[-1].i = 0
    assert len(opened(old, json.dumps(metadata), tmp_path / "none.onnx").scores) > 0


def damaged(rng, metadata):
    """The metadata with one or two odd values, without a part of them, or with one more."""
    content = copy.deepcopy(metadata)
    for _ in range(rng.choice([1, 1, 2])):
        place = (
            rng.choice([content, content, content["resizer"]]) if isinstance(content.get("resizer"), dict) else content
        )
        key = rng.choice([*place, "unheard_of"])
        if rng.random() < 0.15:
            place.pop(key, None)
        else:
            place[key] = copy.deepcopy(rng.choice(ODD))
    return content


@pytest.mark.fuzz
def test_odd_metadata_give_detections_or_one_line(model, metadata, tmp_path):
    """Nothing else, in a second and 500 MB each; what passes as something else than it was still fits the graph."""
    rng = random.Random(23)
    texts = [*RAW, *(json.dumps(damaged(rng, metadata)) for _ in range(variants(200)))]
    opened(model, json.dumps(metadata), tmp_path / "sound.onnx")
    outcomes = {"detections": 0, "line": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in texts:
        begun = time.process_time()
        result = opened(model, text.encode("utf-8", "replace").decode(), tmp_path / "odd.onnx")
        outcomes["line" if isinstance(result, UserError) else "detections"] += 1
        assert time.process_time() - begun < 5, text[:200]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500e3  # kB
    assert outcomes["line"] > len(texts) // 2
    assert outcomes["detections"] > 5


@pytest.mark.parametrize("key", sorted(onnx_utils.METADATA))
def test_each_value_is_looked_at(metadata, key):
    """Of each: what is written passes, an object in its place does not."""
    assert onnx_utils.check_metadata(metadata, "model") == metadata
    with pytest.raises(UserError, match=f"^model: its metadata say {key} "):
        onnx_utils.check_metadata({**metadata, key: {"a": 1}}, "model")
    if key in metadata and key != "ops":
        with pytest.raises(UserError, match=f"^model: its metadata lack {key}: an older version"):
            onnx_utils.check_metadata({k: v for k, v in metadata.items() if k != key}, "model")


def test_metadata_of_another_graph(model, metadata):
    """Another size, layout, type or batch than the graph takes, and an input too few."""
    for changed, named in (
        ({"resizer": {**metadata["resizer"], "height": 10_000}}, "input_tensor is float32"),
        ({"input_format": "NCHW"}, "input_tensor"),
        ({"input_type": "uint8"}, "input_tensor is uint8"),
        ({"batch_size": 4}, "input_tensor"),
    ):
        onnx_utils.write_metadata(model, {**metadata, **changed})
        with pytest.raises(UserError, match=f"^file: its metadata say that input {named}"):
            onnx_utils.read_metadata(model, "file")
    padded = {
        **metadata["resizer"],
        "kind": "keep_aspect_ratio",
        "min_dimension": 9,
        "max_dimension": 9,
        "pad_value": [0, 0, 0],
    }
    onnx_utils.write_metadata(model, {**metadata, "resizer": padded})
    with pytest.raises(UserError, match=r"input true_shape is float32 \[batch, 2\], it is not there"):
        onnx_utils.read_metadata(model, "file")


COMMANDS = ["infer.py", "eval_coco.py", "compare_tf.py", "build_engine.py", "export_triton.py", "infer_ray.py"]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_damaged_metadata(model, metadata, tmp_path, name):
    path = tmp_path / "odd.onnx"
    onnx_utils.write_metadata(model, {**metadata, "num_classes": "many"})
    onnx_utils.save(model, path)
    options = {
        "infer.py": ["--engine", path, "--input", PICTURE, "--output", tmp_path / "out"],
        "eval_coco.py": ["--engine", path, "--input", PICTURE.parent, "--annotations", DEMO / "instances_shapes.json"],
        "compare_tf.py": [
            "--engine",
            path,
            "--saved_model",
            DEMO / "ssd_mobilenet_v1_shapes",
            "--input",
            PICTURE,
            "--output",
            tmp_path / "out",
        ],
        "build_engine.py": ["--onnx", path, "--engine", tmp_path / "engine.trt"],
        "export_triton.py": ["--engine", path, "--repository", tmp_path / "out"],
        "infer_ray.py": ["--engine", path, "--input", PICTURE, "--output", tmp_path / "out"],
    }
    process = command(*options[name], script=name)
    assert process.returncode == 2
    (line,) = process.stderr.strip().splitlines()
    assert f"{path}: its metadata say num_classes 'many'" in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "engine.trt").exists()


def test_external_data_lie_beside_the_file(model, tmp_path):
    """A file that names another place for its weights is refused; one with weights beside it is read."""
    moved = copy.deepcopy(model)  # saving takes the weights out of it
    onnx.save(moved, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    assert onnx_utils.load(tmp_path / "model.onnx").graph.node
    for place in ("../weights", "/etc/passwd", str(ROOT / "README.md")):
        moved = onnx.load(tmp_path / "model.onnx", load_external_data=False)
        for tensor in moved.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        (tmp_path / "moved.onnx").write_bytes(moved.SerializeToString())
        with pytest.raises(UserError, match="is not a readable ONNX file"):
            onnx_utils.load(tmp_path / "moved.onnx")


@pytest.mark.fuzz
def test_damaged_onnx_files(model, metadata, tmp_path):
    """Bytes changed, cut out and repeated: a graph or one line."""
    onnx_utils.write_metadata(model, metadata)
    whole, rng = model.SerializeToString(), random.Random(23)
    outcomes = {"read": 0, "line": 0}
    for _ in range(variants(100)):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 2000))
            match rng.randrange(3):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at : at + rng.choice([1, 100, 10**5])]
                case 2:
                    data[at:at] = data[at : at + rng.choice([1, 50])]
        (tmp_path / "odd.onnx").write_bytes(data)
        begun = time.process_time()
        try:
            onnx_utils.read_metadata(onnx_utils.load(tmp_path / "odd.onnx"), tmp_path / "odd.onnx")
            outcomes["read"] += 1
        except UserError as error:
            assert "odd.onnx" in str(error) and "\n" not in str(error)
            outcomes["line"] += 1
        assert time.process_time() - begun < 2
    assert min(outcomes.values()) > 10


def test_damaged_calibrations(model, tmp_path):
    """Ranges that are none; each is a UserError, and the file stays."""
    path, names = tmp_path / "calibration", sorted(quantization.measured_tensors(model))
    sound = {name: (-1.0, 1.0) for name in names}
    quantization.write_cache(path, model, sound, [])
    assert quantization.read_cache(path, model) == ((sound, []), None)
    content = json.loads(path.read_text())
    for odd in ([NAN, 1], [1, -1], ["x", 1], [1], [0, float("inf")], None, {}, [10**400, 1], [[1], 2]):
        path.write_text(json.dumps({**content, "ranges": {**content["ranges"], names[0]: odd}}))
        before = path.read_text()
        with pytest.raises(UserError, match="it is not a calibration of"):
            quantization.read_cache(path, model)
        assert path.read_text() == before
    for odd in (5, None, [5], [["x"]]):
        path.write_text(json.dumps({**content, "left": odd}))
        with pytest.raises(UserError, match="it is not a calibration"):
            quantization.read_cache(path, model)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="it is not a calibration"):
        quantization.read_cache(path, model)


def test_whole_numbers_are_whole(metadata):
    """320.0 and True are none."""
    for value in (320.0, True, np.int64(3)):
        with pytest.raises(UserError, match="num_classes"):
            onnx_utils.check_metadata({**metadata, "num_classes": value}, "model")
