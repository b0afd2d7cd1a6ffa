"""CenterNet on tiny exports of the project's own: what its post-processing and its colours follow, against TensorFlow."""

import re

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import DEMO
from PIL import Image

import create_onnx
import onnx_utils
from checks import parity
from checks.conversion import check_conversion
from demo import tiny_centernet as tiny
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector, precision
from runtimes.detector import Detections, detect_image
from tfod import centernet
from tfod.config import read_pipeline_config
from tfod.convert import Options, write_model
from tfod.peaks import Peaks
from tfod.tensorflow_import import import_tensorflow

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
EXPORTS = {
    "resnet_v1": tiny.Export(),
    "resnet_v2": tiny.Export(backbone="resnet_v2_50", keep_aspect=False, seed=2),
    "hourglass": tiny.Export(backbone="hourglass_20", seed=3),
    # Equal scores in many places; more detections than peaks.
    "ties": tiny.Export(backbone="mobilenet_v2_fpn", levels=4, total=2000, seed=4),
}


STANDARD = {"ops": "standard", "batch_size": 4}


def images():
    """Pictures of all shapes; a panorama and a column, most of whose input is padding."""
    yield from (load_image(path) for path in PICTURES[:3])
    yield np.asarray(Image.open(PICTURES[1]).resize((960, 160)))
    yield np.random.default_rng(3).integers(0, 256, (200, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", EXPORTS)
def test_detections_are_tensorflows(name, models, converted):
    empty = 0
    saved_model = models(name)[0]
    with open_detector(converted(name)) as model:
        for image in images():
            theirs = parity.tensorflow_detections(saved_model, image, model.metadata)
            ours = detect_image(model, image)
            assert len(ours.scores) == len(theirs.scores) >= 40
            np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
            report = parity.match_by_rank(theirs, ours)
            assert report.unmatched == 0, image.shape
            assert report.box_difference <= 1e-5, image.shape
            assert report.score_difference <= 1e-5, image.shape
            assert np.ptp(theirs.scores) > 0.1, "scores that are all alike prove no order"
            empty += int(((ours.boxes[:, 2:] - ours.boxes[:, :2]).min(axis=1) <= 0).sum())
    assert empty >= 5, "boxes without area are detections too: none was seen"
    if name == "ties":
        assert len(ours.scores) < EXPORTS[name].total


@pytest.mark.parametrize("name", EXPORTS)
def test_colours_are_measured(name, models):
    """The order of channels, the mean, and the padding, which CenterNet makes before it normalises."""
    export = EXPORTS[name]
    order, mean, deviation = tiny.BACKBONES[export.backbone]
    colours = models(name)[1].colours
    assert colours.order == order
    np.testing.assert_allclose(colours.scale, 1 / np.float32(deviation), rtol=1e-5)
    np.testing.assert_allclose(colours.offset, -np.float32(mean) / np.float32(deviation), rtol=1e-4)
    assert colours.pad_value == ([0, 0, 0] if export.keep_aspect else None)


def test_every_batch_size_layout_and_type_gives_the_same(converted):
    wanted = None
    pictures = [load_image(path) for path in PICTURES[:4]]
    for options in (
        {},
        STANDARD,
        {"batch_size": None, "input_format": "NCHW"},
        {"batch_size": 3, "input_type": "uint8"},
    ):
        with open_detector(converted("resnet_v1", **options)) as model:
            tensors, places = zip(*(preprocess(x, model.metadata["resizer"]) for x in pictures), strict=True)
            batch, shapes = np.rint(np.stack(tensors)), np.float32([place.true_shape for place in places])
            size = model.input.batch or 4
            found = [d for i in range(0, 4, size) for d in model.infer(batch[i : i + size], shapes[i : i + size])]
        wanted = wanted or found
        for a, b in zip(wanted, found, strict=True):
            report = parity.match_by_rank(a, b)
            assert (report.unmatched, report.compared) == (0, len(a.scores))
            assert max(report.box_difference, report.score_difference) < 1e-5


def test_the_file_needs_no_plugin(converted):
    plain, standard = (onnx.load(converted("resnet_v1", **options)) for options in ({}, STANDARD))
    assert not [node for node in plain.graph.node if node.domain]
    modes = [a.s for node in plain.graph.node for a in node.attribute if a.name == "coordinate_transformation_mode"]
    assert modes == [b"asymmetric"], "runtimes warn of tf_half_pixel_for_nn"
    assert sorted(n.op_type for n in plain.graph.node) == sorted(n.op_type for n in standard.graph.node)
    assert onnx_utils.read_metadata(standard, "")["ops"] == "standard"
    outputs = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in plain.graph.output}
    assert outputs == {
        "num_detections": [1, 1],
        "detection_boxes": [1, 100, 4],
        "detection_scores": [1, 100],
        "detection_classes": [1, 100],
    }
    onnxruntime.InferenceSession(str(converted("resnet_v1")))


@pytest.mark.parametrize("count", [7, 40, 150])  # more than there are places: 10 x 12
@pytest.mark.parametrize("levels", [0.02, 1, 1000])  # almost all alike, many ties, hardly any
def test_best_peaks_are_those_of_the_flattened_map(count, levels):
    """In TensorFlow's order, ties too."""
    tf = import_tensorflow()
    rng = np.random.default_rng(count)
    logits = (np.round(rng.normal(-1, 2, (3, 10, 12, 5)) * levels) / levels).astype(np.float32)
    graph = gs.Graph(opset=onnx_utils.OPSET)
    graph.inputs = [gs.Variable("logits", np.float32, ["b", 10, 12, 5])]
    peaks = Peaks("", "", 3, 1e-6, count)
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = list(centernet.best_peaks(ops, graph.inputs[0], (10, 12, 5), peaks))
    model = gs.export_onnx(graph.cleanup().toposort())
    model.ir_version = 8
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    scores, classes, places = session.run(None, {"logits": logits})
    for image in range(3):
        wanted = [x.numpy() for x in tiny.best_peaks(tf, tf.constant(logits[image : image + 1]), count)]
        found = wanted[0] > 0  # the rest are unused slots
        np.testing.assert_allclose(scores[image], wanted[0], atol=1e-6)
        assert classes[image][found].tolist() == wanted[3][found].tolist()
        assert places[image][found].tolist() == (wanted[1] * 12 + wanted[2])[found].tolist()
        assert found.sum() >= 7


def test_a_threshold_of_the_users_own(centernets, converted, tmp_path, capsys):
    """By the whole command, whose check counts what the threshold leaves."""
    path = tmp_path / "m.onnx"
    options = ["--saved_model", str(centernets("hourglass")), "--onnx", str(path), "--first_nms_threshold", "0.9"]
    assert create_onnx.main(options) == 0
    printed = capsys.readouterr().out
    left = re.search(r"PASSED: --first_nms_threshold 0.9 leaves (\d+) of these (\d+) detections", printed)
    assert 0 < int(left[1]) < int(left[2])
    with open_detector(converted("hourglass")) as a, open_detector(path) as b:
        image = load_image(PICTURES[0])
        some, all_of_them = detect_image(b, image), detect_image(a, image)
        assert 0 < len(some.scores) < len(all_of_them.scores)
        assert some.scores.tolist() == all_of_them.above(0.9).scores.tolist()


def red_as_blue(graph):
    (swap,) = (node for node in graph.nodes if node.op == "Gather" and node.name.startswith("preprocessing"))
    swap.inputs[1].values = swap.inputs[1].values[::-1].copy()


def half_a_place_off(graph):
    (grid,) = (
        x for node in graph.nodes for x in node.inputs if isinstance(x, gs.Constant) and tuple(x.shape) == (576, 2)
    )
    grid.values = grid.values + np.float32(0.5)


def any_place_a_peak(graph):
    (less,) = (node for node in graph.nodes if node.op == "Less")
    less.inputs[1].values = np.float32(2)


@pytest.mark.parametrize("damage", [None, red_as_blue, half_a_place_off, any_place_a_peak])
def test_the_check_sees_a_wrong_conversion(models, damage):
    """Of a model without raw_detection_boxes: 100 detections of each picture are compared."""
    saved_model, model = models("resnet_v1")
    written = write_model(model, Options())
    if damage:
        graph = gs.import_onnx(written)
        damage(graph)
        properties, written = written.metadata_props, gs.export_onnx(graph)
        written.metadata_props.extend(properties)
    verdict = check_conversion(saved_model, "m.onnx", written, None)
    assert verdict.word == ("FAILED" if damage else "PASSED"), str(verdict)
    assert damage or "PASSED: 300 detections" in str(verdict)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_classes: 4", "num_classes: 5", "5 classes, the model predicts 4"),
        ("max_box_predictions: 100", "max_box_predictions: 50", "max_box_predictions 50, the model gives 100"),
        (
            "max_box_predictions: 100",
            "max_box_predictions: 4000",
            "max_box_predictions of object_center_params is 4000",
        ),
        ("resnet_v1_50_fpn", "mobilenet_v2_fpn", "it says mobilenet_v2_fpn, the model does not scale colours"),
        ("object_detection_task { task_loss_weight: 1.0 }", "", "without boxes"),
        ("num_classes: 4", "num_classes: 4 post_processing { }", "NMS in a CenterNet"),
        ("num_classes: 4", "num_classes: 4 keypoint_estimation_task { rescore_instances: true }", "rescore_instances"),
    ],
)
def test_mistakes_and_what_is_not_supported(centernets, tmp_path, old, new, said):
    text = (centernets("resnet_v1") / "pipeline.config").read_text()
    assert old in text
    (tmp_path / "pipeline.config").write_text(text.replace(old, new))
    options = ["--saved_model", str(centernets("resnet_v1")), "--pipeline_config", str(tmp_path / "pipeline.config")]
    with pytest.raises(UserError, match=re.escape(said)):
        create_onnx.main([*options, "--onnx", str(tmp_path / "m.onnx")])


def test_another_kind_of_config(centernets, tmp_path):
    config = DEMO / "ssd_mobilenet_v1_shapes" / "pipeline.config"
    options = ["--saved_model", str(centernets("resnet_v1")), "--pipeline_config", str(config)]
    with pytest.raises(UserError, match="it says ssd, the model is center_net"):
        create_onnx.main([*options, "--onnx", str(tmp_path / "m.onnx")])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("mask_estimation_task { } temporal_offset_task { }", "masks, temporal offsets are"),
        ("keypoint_estimation_task { predict_depth: true }", "the depths of keypoints are"),
    ],
)
def test_what_is_left_out_is_said(more, said, centernets, tmp_path, capsys):
    text = (centernets("resnet_v1") / "pipeline.config").read_text()
    (tmp_path / "pipeline.config").write_text(text.replace("num_classes", f"{more} num_classes"))
    read_pipeline_config(tmp_path / "pipeline.config")
    assert f"{said} left out" in capsys.readouterr().err


def test_peaks_and_boxes_stay_in_float32(converted):
    """From the heatmap's last convolution on: in FP16 a peak's neighbours would often be as high as the peak."""
    model = precision.to_half(onnx.load(converted("resnet_v1")))
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {x.name: x.type.tensor_type.elem_type for x in [*inferred.value_info, *inferred.input]}
    makers = {name: node for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    in_half = [node for node in convolutions if types[node.output[0]] == onnx.TensorProto.FLOAT16]
    assert len(in_half) == len(convolutions) - 1
    (sigmoid,) = (node for node in model.graph.node if node.op_type == "Sigmoid")
    node = sigmoid
    while node.op_type != "Conv":
        assert types[node.input[0]] == onnx.TensorProto.FLOAT
        node = makers[node.input[0]]
    for node in model.graph.node:
        if node.op_type in ("MaxPool", "Less", "TopK", "Max", "Clip", "Exp"):
            assert types[node.input[0]] == onnx.TensorProto.FLOAT, node.name


def test_boxes_without_area_are_compared_by_their_corners():
    boxes = np.float32([[0.2, 1, 0.3, 1], [0, 0.5, 0, 0.7], [0.1, 0.1, 0.5, 0.5]])
    moved = boxes + np.float32(1e-5)
    scores, classes = np.float32([0.9, 0.8, 0.7]), np.int32([1, 2, 3])
    theirs, ours, far = (Detections(x, scores, classes) for x in (boxes, moved, boxes + np.float32(0.1)))
    assert parity.match_by_overlap(theirs, ours, 0.98, 0.01).size == 0
    assert parity.match_by_overlap(theirs, far, 0.98, 0.01).tolist() == [0, 1]  # the last one ends a full list
    np.testing.assert_allclose(parity.box_iou(boxes, moved), np.eye(3), atol=1e-3)
