"""FPNLite with the limits and the forms of NMS that users set, against TensorFlow, which has them in its graph."""

import json
import re

import numpy as np
import onnx
import pytest
from conftest import DEMO, USERS, model_folder
from test_nms import tfod

import compare_tf
import create_onnx
from checks import parity
from checks.conversion import plugin_shortfall
from demo import train_demo_ssd as demo
from images.decoding import load_image
from runtimes import open_detector
from runtimes.detector import Detections, detect_image
from tfod import nms
from tfod.tensorflow_import import import_tensorflow

zoo = pytest.mark.zoo
FEW, ALL = 24, 188


@pytest.mark.parametrize(
    ("key", "count"),
    [
        ("limit_2_of_4", 12),
        pytest.param("limit_2_of_4", ALL, marks=zoo),
        pytest.param("total_1000", ALL, marks=zoo),
        *(pytest.param(key, FEW, marks=zoo) for key in ("class_agnostic", "combined_nms", "static_shapes", "encoded")),
    ],
)
def test_all_of_tensorflows_detections(key, count, convert, detector, saved_model, coco_images):
    """Each of TensorFlow's detections is found, and nothing else; so says the converter's own check."""
    printed = convert(key)[1]
    assert "PASSED: " in printed
    assert " 0 unmatched" in printed
    model = detector(key)
    reports = [parity.compare(saved_model(key), model, load_image(path)) for path in coco_images[:count]]
    found = parity.join(reports)
    limit = model.metadata["max_detections"]
    # Of 188,000, one overlap was on the other side of 0.6 by its last bit: a detection of either side.
    assert found.unmatched <= 2 * (limit * count // 100_000)
    assert 0.9 * limit * count <= found.compared <= limit * count
    assert found.box_difference <= 1e-4
    assert found.score_difference <= 1e-4


@zoo
@pytest.mark.parametrize("key", USERS)
def test_files_are_not_larger_than_the_network(key, convert):
    """No matrix of constants: it was 92 MB for 4,500 detections."""
    assert convert(key)[0].stat().st_size < 12e6


def config_with(folder, source, most, total):
    """The path of a copy of the pipeline.config in `source` with these limits."""
    text = (source / "pipeline.config").read_text()
    for name, value in (("max_detections_per_class", most), ("max_total_detections", total)):
        text, changed = re.subn(rf"{name}: \d+", f"{name}: {value}", text)
        assert changed == 1
    (folder / "pipeline.config").write_text(text)
    return str(folder / "pipeline.config")


@zoo
@pytest.mark.parametrize(
    ("key", "most", "total"),
    [("fpnlite", 10, 20), ("fpnlite", 2, 100), ("fpnlite", 300, 300), ("hands", 30, 300), ("total_1000", 2000, 2000)],
)
def test_other_limits_on_tensorflows_own_boxes(key, most, total, convert, saved_model, coco_images, tmp_path):
    """Of what TensorFlow's graph gives before its NMS, TFOD's rule with other limits leaves what the file finds."""
    config = config_with(tmp_path, model_folder(key), most, total)
    model = open_detector(convert(key, "--pipeline_config", config, "--no_check")[0])
    settings = nms.NmsSettings(1e-8, 0.6, most, total)
    for path in coco_images[:: ALL // 8]:
        same_as_tensorflow(saved_model(key), model, load_image(path), settings)


def same_as_tensorflow(saved_model, model, image, settings):
    pixels = parity.network_pixels(image, model.metadata["resizer"])
    raw = saved_model.detect(pixels)
    wanted = tfod(raw["raw_detection_boxes"], raw["raw_detection_scores"][:, 1:], settings)
    boxes, scores, classes = (np.array(values) for values in zip(*wanted, strict=True))
    report = parity.match_by_rank(Detections(boxes, scores, classes), detect_image(model, pixels))
    # Of thousands, an overlap may be on the other side of 0.6 by its last bit, and what it decides on with it.
    assert report.unmatched <= len(wanted) // 500
    assert report.compared >= len(wanted) - report.unmatched > 0
    assert max(report.box_difference, report.score_difference) < 1e-4


@zoo
def test_thousands_are_found_and_what_tensorrt_leaves_out_is_said(convert, saved_model, coco_images, tmp_path):
    config = config_with(tmp_path, model_folder("total_1000"), 4500, 4500)
    path, _ = convert("total_1000", "--pipeline_config", config, "--no_check")
    model = open_detector(path)
    for image in coco_images[:2]:
        same_as_tensorflow(saved_model("total_1000"), model, load_image(image), nms.NmsSettings(1e-8, 0.6, 4500, 4500))
    pictures = [load_image(image) for image in coco_images[:2]]
    said = plugin_shortfall(path, onnx.load(path), 1, pictures, "2 pictures")
    missing, everything = re.search(r"leaves out ([\d,]+) of the ([\d,]+) detections in 2 pictures", said).groups()
    assert 0 < int(missing.replace(",", "")) < int(everything.replace(",", "")) <= 9000


def test_what_tensorrt_leaves_out_is_said(convert, tmp_path):
    """The demo's model with more detections than a plugin of 100 pairs would find: which, and from which score down."""
    path = convert("demo", "--pipeline_config", config_with(tmp_path, model_folder("demo"), 500, 500), "--no_check")[0]
    model, pictures = onnx.load(path), [load_image(sorted((DEMO / "images").glob("*.jpg"))[0])]
    assert plugin_shortfall(path, model, 1, pictures) is None
    everything = detect_image(open_detector(path), pictures[0])
    # An engine for one image has each class in a plugin of its own.
    left = np.concatenate([np.flatnonzero(everything.classes == label)[:100] for label in range(5)])
    said = plugin_shortfall(path, model, 1, pictures, "a picture", pairs=100)
    missing, count, score = re.search(
        r"leaves out (\d+) of the (\d+) detections .* from a score of (\S+) down", said
    ).groups()
    assert int(count) == len(everything.scores)
    assert int(count) - len(left) <= int(missing) < int(count)
    assert float(score) < everything.scores[10]


def test_an_unchecked_file_says_that_much(capsys, tmp_path):
    for total, said in ((500, True), (400, False)):
        config = config_with(tmp_path, model_folder("demo"), total, total)
        options = ["--saved_model", str(model_folder("demo")), "--onnx", str(tmp_path / "m.onnx"), "--no_check"]
        assert create_onnx.main([*options, "--pipeline_config", config]) == 0
        assert ("an engine may leave out the weakest" in capsys.readouterr().err) == said


@pytest.mark.parametrize("key", ["demo", "fpnlite", "limit_2_of_4", pytest.param("total_1000", marks=zoo)])
def test_the_graph_tells_its_own_limit_of_a_class(key, tmp_path, capsys):
    """The config's is checked against it: the pictures need not have so many of one class."""
    folder = model_folder(key)
    options = ["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")]
    text = (folder / "pipeline.config").read_text()
    most, total = (
        int(re.search(rf"max_{name}: (\d+)", text)[1]) for name in ("detections_per_class", "total_detections")
    )
    config = config_with(tmp_path, folder, most // 2, total)
    assert create_onnx.main([*options, "--pipeline_config", config]) == 1
    assert (
        "FAILED: the pipeline.config is not that of the export: its max_detections_per_class is"
        f" {most // 2}, the graph's {most}; give the export's own\n" in capsys.readouterr().out
    )
    assert create_onnx.main([*options, "--pipeline_config", config, "--no_check"]) == 0


def test_a_limit_beyond_the_total_changes_nothing(tmp_path):
    config = config_with(tmp_path, model_folder("demo"), 200, 100)
    options = ["--saved_model", str(model_folder("demo")), "--onnx", str(tmp_path / "m.onnx")]
    assert create_onnx.main([*options, "--pipeline_config", config]) == 0


@pytest.fixture(scope="module")
def trained():
    """The demo's network with its weights."""
    tf = import_tensorflow()
    network = demo.build_network(tf)
    weights = tf.train.load_checkpoint(str(model_folder("demo") / "saved_model" / "variables" / "variables"))
    for i, variable in enumerate(network.variables):
        variable.assign(weights.get_tensor(f"parameters/{i}/.ATTRIBUTES/VARIABLE_VALUE"))
    return tf, network


def test_combined_suppression(trained, tmp_path, capsys):
    """TensorFlow's op, which keeps to the limit of a class, and keeps what has no area."""
    tf, network = trained
    export = demo.Export(rule="use_combined_nms", per_class=15, total=60)
    demo.save_export(tf, tmp_path / "export", network, demo.make_anchors(), export)
    options = ["--saved_model", str(tmp_path / "export"), "--onnx", str(tmp_path / "m.onnx")]
    assert create_onnx.main([*options, "--check_image", str(DEMO / "images")]) == 0
    printed = capsys.readouterr().out
    assert "PASSED: 480 detections" in printed
    assert " 0 unmatched" in printed
    config = config_with(tmp_path, tmp_path / "export", 14, 60)
    assert create_onnx.main([*options, "--pipeline_config", config]) == 1
    assert "its max_detections_per_class is 14, the graph's 15" in capsys.readouterr().out


def test_an_export_that_decodes_is_compared(trained, tmp_path):
    """create_onnx.py and compare_tf.py: TensorFlow decodes a PNG of the pixels that the file's own side has."""
    tf, network = trained
    export = demo.Export(input_type="encoded_image_string_tensor")
    demo.save_export(tf, tmp_path / "export", network, demo.make_anchors(), export)
    options = ["--saved_model", str(tmp_path / "export")]
    assert create_onnx.main([*options, "--onnx", str(tmp_path / "m.onnx"), "--batch_size", "dynamic"]) == 0
    options += ["--engine", str(tmp_path / "m.onnx"), "--input", str(DEMO / "images"), "--num_images", "2"]
    assert compare_tf.main([*options, "--nms_threshold", "0", "--output", str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers["matched"] == 200
    assert numbers["largest_score_difference"] < 1e-5
