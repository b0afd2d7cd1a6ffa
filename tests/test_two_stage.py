"""Faster and Mask R-CNN on tiny exports of the project's own: each rule that TFOD's stages follow, against TensorFlow."""

import functools
import re

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import DEMO, EXPORTS
from PIL import Image

import build_engine
import create_onnx
import infer
import onnx_utils
from checks import parity
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector, precision, quantization, standard_graph, trt_crops, trt_graph
from runtimes.detector import detect_image, input_spec, network_inputs
from runtimes.ort_detector import OrtDetector
from tfod import faster_rcnn
from tfod.saved_model import SavedModel
from tfod.tensorflow_import import import_tensorflow
from visualize import draw_detections, paste_mask

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
RNG = np.random.default_rng(3)


def images():
    """Pictures of all shapes, and what tends to break a detector: (RGB image, whether it tells its places apart)."""
    yield from ((load_image(path), True) for path in PICTURES[:4])
    yield RNG.integers(0, 256, (100, 1, 3), dtype=np.uint8), True  # one pixel wide
    yield np.asarray(Image.open(PICTURES[1]).resize((960, 160))), True  # a panorama, 6:1
    # Alike all over, or all along one direction: equal scores in many places, of which rounding chooses.
    yield RNG.integers(0, 256, (1, 50, 3), dtype=np.uint8), False
    yield np.zeros((200, 150, 3), np.uint8), False


@pytest.mark.parametrize("name", [name for name in EXPORTS if EXPORTS[name].pad])  # test_tf1.py has the other
def test_detections_are_tensorflows(name, exported):
    folder, path = exported(name)
    counts = []
    with open_detector(path) as model, SavedModel(folder / "saved_model") as saved_model:
        for image, has_places in images():
            theirs = parity.tensorflow_detections(saved_model, image, model.metadata)
            ours = detect_image(model, image)
            assert (ours.masks is not None) == EXPORTS[name].masks
            counts.append(len(ours.scores))
            if not has_places:
                np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-2)
                continue
            report = parity.match_by_rank(theirs, ours)
            assert report.unmatched == 0, image.shape
            assert report.box_difference <= 1e-4, image.shape
            assert report.score_difference <= 1e-4, image.shape
            assert report.mask_difference <= 1e-3, image.shape
    if name == "no_proposals":
        assert max(counts) == 0
    else:
        assert max(counts) >= 5
    if name == "few_proposals":
        assert min(counts) < EXPORTS[name].total


def test_what_two_heads_compute_alike_is_one_node(exported):
    """By TensorFlow's name, and of several the first by the alphabet."""
    names = [node.name for node in onnx.load(exported("mask")[1]).graph.node]
    heads = [name.split("/")[-2:] for name in names if "_head/" in name]
    both = [["box_head", "AvgPool"], ["box_head", "flatten"]]
    assert heads == [*both, ["class_head", "MatMul"], ["box_head", "MatMul"]]


def test_every_batch_size_layout_and_type_gives_the_same(exported):
    wanted = None
    pictures = [load_image(path) for path in PICTURES[:4]]
    for options in (
        (),
        ("--batch_size", "4"),
        ("--batch_size", "dynamic", "--input_format", "NCHW"),
        ("--batch_size", "3", "--input_type", "uint8"),
    ):
        with open_detector(exported("mask", *options)[1]) as model:
            tensors, places = zip(*(preprocess(x, model.metadata["resizer"]) for x in pictures), strict=True)
            batch, shapes = np.rint(np.stack(tensors)), np.float32([place.true_shape for place in places])
            size = model.input.batch or 4
            found = [d for i in range(0, 4, size) for d in model.infer(batch[i : i + size], shapes[i : i + size])]
        wanted = wanted or found
        for a, b in zip(wanted, found, strict=True):
            report = parity.match_by_rank(a, b)
            assert (report.unmatched, report.compared) == (0, len(a.scores))
            assert max(report.box_difference, report.score_difference, report.mask_difference) < 1e-5


def test_thresholds_and_mistakes(exported, tmp_path):
    full, cut = (exported("mask", *options)[1] for options in ((), ("--second_nms_threshold", "0.4")))
    image = load_image(PICTURES[0])
    with open_detector(full) as a, open_detector(cut) as b:
        assert detect_image(b, image).scores.tolist() == detect_image(a, image).above(0.4).scores.tolist()
    folder = exported("mask")[0]
    text = (folder / "pipeline.config").read_text()
    for old, new, said in (
        ("num_classes: 4", "num_classes: 5", "5 classes, the model predicts 4"),
        ("SOFTMAX", "SIGMOID", "SIGMOID"),
        ("faster_rcnn_inception_resnet_v2_keras", "faster_rcnn_resnet50_keras", "faster_rcnn_resnet50_keras"),
    ):
        config = tmp_path / "pipeline.config"
        config.write_text(text.replace(old, new))
        options = ["--saved_model", str(folder), "--pipeline_config", str(config), "--onnx", str(tmp_path / "m.onnx")]
        with pytest.raises(UserError) as raised:
            create_onnx.main(options)
        assert said in str(raised.value)


def test_a_config_with_another_threshold_fails(exported, tmp_path, capsys):
    folder = exported("thresholds")[0]
    text = (folder / "pipeline.config").read_text()
    assert text.count(" score_threshold: 0.3") == 1
    (tmp_path / "p.config").write_text(text.replace(" score_threshold: 0.3", " score_threshold: 0.99"))
    options = ["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")]
    assert create_onnx.main([*options, "--pipeline_config", str(tmp_path / "p.config")]) == 1
    assert re.search(r"its score_threshold is 0\.99,.* --second_nms_threshold 0\.99\n", capsys.readouterr().out)


def test_segmentation_draws_masks(exported, tmp_path):
    _, path = exported("mask")
    common = ["--engine", str(path), "--input", str(PICTURES[0]), "--nms_threshold", "0.1", "--output"]
    infer.main([*common, str(tmp_path / "boxes")])
    infer.main([*common, str(tmp_path / "masks"), "--detection_type", "segmentation"])
    infer.main([*common, str(tmp_path / "full"), "--detection_type", "segmentation", "--iou_threshold", "0"])
    name = f"{PICTURES[0].stem}.jpg"
    boxes, masks, full = (
        np.asarray(Image.open(tmp_path / kind / name)).astype(int) for kind in ("boxes", "masks", "full")
    )
    changed = [(x != boxes).any(axis=2).sum() for x in (masks, full)]
    assert 0 < changed[0] < changed[1]


def test_a_mask_is_resized_to_its_box_and_thresholded_after():
    ramp = np.tile(np.linspace(0, 1, 16, dtype=np.float32), (16, 1))  # rises from left to right
    mask, top, left = paste_mask(ramp, (10, 20, 42, 84), 100, 200, 0.5)
    assert (top, left, *mask.shape) == (10, 20, 32, 64)
    assert mask[:, :32].sum() == 0
    assert mask[:, 32:].all()
    corner, top, left = paste_mask(np.ones((4, 4), np.float32), (-5.5, 90.2, 5, 130), 50, 100, 0.5)
    assert (top, left) == (0, 90)
    assert corner.shape == (5, 10)
    assert corner[:, 0].sum() == 5  # the centre of pixel 90 is inside the box
    thin, *_ = paste_mask(np.ones((4, 4), np.float32), (3.6, 3.6, 4.4, 4.4), 9, 9, 0.5)
    assert not thin.any()  # no pixel's centre is inside


def test_masks_have_a_clean_edge():
    grey = np.full((60, 60, 3), 128, np.uint8)
    box = np.float32([[10, 10, 50, 50]])
    disc = (np.hypot(*np.mgrid[-1:1:33j, -1:1:33j]) < 0.8).astype(np.float32)
    drawn = np.asarray(draw_detections(grey, box, np.float32([0.9]), np.array([1]), ["a", "b"], disc[None]))
    row = drawn[30].astype(int)
    tinted = [tuple(v) for v in row if tuple(v) != (128, 128, 128)]
    assert len(set(tinted)) >= 3  # the frame, the opaque edge, the tint within
    assert tuple(row[30]) != (128, 128, 128)
    assert tuple(drawn[12, 45]) == (128, 128, 128)  # inside the box, outside the mask


@pytest.mark.parametrize("zero_outside", [True, False])
def test_crops_are_tensorflows_in_all_forms(zero_outside):
    """GridSample, as the file has it, RoiAlign, as ONNX Runtime gets it, and rows, as TensorRT does, against crop_and_resize: 2
    images, 6x9 pixels."""
    rng = np.random.default_rng(3)
    features = rng.normal(size=(2, 5, 6, 9)).astype(np.float32)
    low, high = rng.uniform(0, 0.5, (2, 40, 2)), rng.uniform(0.5, 0.98, (2, 40, 2))
    boxes = np.concatenate([low, high], axis=2).astype(np.float32)
    boxes[:, 0], boxes[:, 1] = 0, [0, 0, 1, 1]  # an empty box; the whole image, whose last sample is the last pixel
    graph = gs.Graph(opset=onnx_utils.OPSET)
    inputs = [gs.Variable("features", np.float32, ["b", 5, 6, 9]), gs.Variable("boxes", np.float32, ["b", 40, 4])]
    graph.inputs = inputs
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = [faster_rcnn.crop_features(ops, *inputs, 40, 7, (6, 9, 5), zero_outside)]
    model = gs.export_onnx(graph.cleanup().toposort())
    model.ir_version = 8
    tf = import_tensorflow()
    image = np.repeat([0, 1], 40)
    wanted = tf.image.crop_and_resize(features.transpose(0, 2, 3, 1), boxes.reshape(-1, 4), image, [7, 7]).numpy()
    prepared = standard_graph.prepare(model)
    assert {node.op_type for node in prepared.graph.node} & {"GridSample", "RoiAlign"} == {"RoiAlign"}
    rows, _ = trt_crops.by_rows(model)
    assert not {node.op_type for node in rows.graph.node} & {"GridSample", "RoiAlign"}
    for form in (model, prepared, rows):
        session = onnxruntime.InferenceSession(form.SerializeToString(), providers=["CPUExecutionProvider"])
        (crops,) = session.run(None, {"features": features, "boxes": boxes})
        np.testing.assert_allclose(crops.transpose(0, 2, 3, 1), wanted, atol=1e-5)


def crop_and_convolve(size, window, pool_stride, kernel, strides):
    """A model of crops of 2 images, pooled and convolved by as many convolutions as there are `strides`."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    graph.inputs = [gs.Variable("features", np.float32, ["b", 5, 6, 9]), gs.Variable("boxes", np.float32, ["b", 10, 4])]
    ops = onnx_utils.OpBuilder(graph, "test")
    crops = faster_rcnn.crop_features(ops, *graph.inputs, 10, size, (6, 9, 5), True)
    pooled = ops.add("MaxPool", crops, kernel_shape=[window] * 2, strides=[pool_stride] * 2)
    rng = np.random.default_rng(1)
    for stride in strides:
        weights = rng.normal(size=(3, 5, kernel, kernel)).astype(np.float32)
        settings = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [kernel // 2] * 4}
        graph.outputs.append(ops.add("Conv", pooled, weights, **settings))
    model = gs.export_onnx(graph.cleanup().toposort())
    model.ir_version = 8
    return model


@pytest.mark.parametrize(
    ("size", "window", "pool_stride", "kernel", "strides", "sampled"),
    [
        (14, 2, 2, 1, (2, 2), 8),  # Faster R-CNN ResNet V1: every other pixel of the pooled crops is read
        (12, 2, 2, 1, (2,), 6),
        (14, 2, 2, 1, (2, 1), 14),
        (14, 2, 2, 3, (2, 2), 14),
        (14, 2, 2, 1, (1,), 14),
        (17, 1, 1, 1, (1, 1), 17),  # Mask R-CNN: a pool of single pixels
        (15, 2, 2, 1, (2,), 15),  # its last row is in no pool: left alone
        (14, 3, 2, 1, (2,), 14),  # pools that overlap: left alone
    ],
)
def test_crops_are_pooled_before_they_are_transposed(size, window, pool_stride, kernel, strides, sampled):
    """The same results, from as few samples as are read."""
    model = crop_and_convolve(size, window, pool_stride, kernel, strides)
    prepared = trt_graph.prepare(model, 8)
    graph = gs.import_onnx(prepared)
    (crop,) = (node for node in graph.nodes if node.op == "GridSample")
    following = crop.outputs[0].outputs[0].op
    assert following == ("MaxPool" if window == pool_stride == 2 and size % 2 == 0 else "Reshape")
    assert ("MaxPool" in {node.op for node in graph.nodes}) == (window > 1)
    rng = np.random.default_rng(3)
    low = rng.uniform(0, 0.5, (2, 10, 2))
    feed = {
        "features": rng.normal(size=(2, 5, 6, 9)).astype(np.float32),
        "boxes": np.concatenate([low, low + 0.4], axis=2).astype(np.float32),
    }
    crop.outputs[0].shape = None
    graph.outputs.append(crop.outputs[0])
    run = functools.partial(onnxruntime.InferenceSession, providers=["CPUExecutionProvider"])
    wanted = run(model.SerializeToString()).run(None, feed)
    *found, samples = run(gs.export_onnx(graph).SerializeToString()).run(None, feed)
    assert samples.shape == (2, 5, 10 * sampled, sampled)
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(wanted, run(standard_graph.prepare(prepared).SerializeToString()).run(None, feed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    rows, names = trt_crops.by_rows(prepared)
    assert "GridSample" not in {node.op_type for node in rows.graph.node}
    for a, b in zip(wanted, run(rows.SerializeToString()).run(None, feed), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # In FP16 what finds the pixels stays in float32, and the pixels do not.
    graph = gs.import_onnx(trt_crops.by_rows(precision.to_half(prepared))[0])
    found = {node.name: node.outputs[0].dtype for node in graph.nodes if node.op != "Cast"}
    assert {np.dtype(found[name]).name for name in names & found.keys()} == {"float32", "int64", "bool"}
    assert {np.dtype(found[x]).name for x in found if "/rows/" in x} == {"float16", "int64"}


@pytest.mark.parametrize("zero_outside", [True, False])
def test_a_sample_beyond_the_border_by_its_last_bit(zero_outside):
    """The last sample of a box that ends at the border is at 5 of 0..5 or at 5.0000005: there the op gives 0."""
    features = np.ones((1, 1, 6, 9), np.float32)
    starts = np.random.default_rng(0).uniform(0, 0.9, 400).astype(np.float32)
    boxes = np.stack([starts, np.zeros(400), np.ones(400), np.full(400, 0.5)], axis=1).astype(np.float32)
    tf = import_tensorflow()
    theirs = tf.image.crop_and_resize(features.transpose(0, 2, 3, 1), boxes, np.zeros(400, int), [7, 7]).numpy()[
        :, -1, 0, 0
    ]
    assert 3 <= (theirs == 0).sum() < 380
    graph = gs.Graph(opset=onnx_utils.OPSET)
    graph.inputs = [
        gs.Variable("features", np.float32, ["b", 1, 6, 9]),
        gs.Variable("boxes", np.float32, ["b", 400, 4]),
    ]
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = [faster_rcnn.crop_features(ops, *graph.inputs, 400, 7, (6, 9, 1), zero_outside)]
    model = gs.export_onnx(graph.cleanup().toposort())
    model.ir_version = 8
    for form in (model, standard_graph.prepare(model), trt_crops.by_rows(model)[0]):
        session = onnxruntime.InferenceSession(form.SerializeToString(), providers=["CPUExecutionProvider"])
        (crops,) = session.run(None, {"features": features, "boxes": boxes[None]})
        np.testing.assert_allclose(crops[:, 0, -1, 0], theirs if zero_outside else 1, atol=1e-5)


def test_an_average_over_the_whole_map_has_its_window(exported):
    """As a pool of a known size TensorRT takes it in any layout."""
    model = onnx_utils.load(exported("skip", "--batch_size", "dynamic")[1])
    assert averages(model) == {"GlobalAveragePool"}
    assert averages(trt_graph.prepare(model, 8)) == {"AveragePool"}


def averages(model):
    return {node.op_type for node in model.graph.node} & {"GlobalAveragePool", "AveragePool"}


@pytest.mark.parametrize(("side", "op"), [(4, "AveragePool"), (320, "GlobalAveragePool")])
def test_large_maps_are_averaged_as_before(side, op):
    """EfficientDet-D1 averages over 320 x 320: TensorRT has no pools of so many pixels."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    graph.inputs = [gs.Variable("maps", np.float32, ["b", 2, side, side])]
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = [ops.add("GlobalAveragePool", graph.inputs[0])]
    model = gs.export_onnx(graph)
    model.ir_version = 8
    prepared = trt_graph.prepare(model, 8)
    assert averages(prepared) == {op}
    maps = np.random.default_rng(0).normal(size=(2, 2, side, side)).astype(np.float32)
    a, b = (onnxruntime.InferenceSession(x.SerializeToString()).run(None, {"maps": maps})[0] for x in (model, prepared))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_quantized_form_crops_rows_too(exported):
    """Of a later opset, in which a reduction's axes are an input; as near to the model as 8 bits allow."""
    model = onnx_utils.load(exported("faster", "--batch_size", "dynamic")[1])
    metadata = onnx_utils.read_metadata(model, "faster")
    pictures = [preprocess(load_image(path), metadata["resizer"]) for path in sorted(DEMO.glob("images/*.jpg"))[:4]]
    tensors, shapes = np.stack([x for x, _ in pictures]), [place.true_shape for _, place in pictures]
    feeds = network_inputs(tensors, shapes, input_spec(metadata))
    ranges = quantization.calibrate(model, [feeds])
    typed = build_engine.typed_model("int8", trt_graph.prepare(model, 4), (ranges, []))
    onnx.checker.check_model(typed)
    assert {"QuantizeLinear", "ReduceMax"} < {node.op_type for node in typed.graph.node}
    with OrtDetector("faster", model) as plain, OrtDetector("faster", typed) as quantized:
        both = plain.infer(tensors, shapes), quantized.infer(tensors, shapes)
    assert 0 < quantization.disagreement(*both) < 0.5
