"""Exports of TF1: what is read of them, what is refused, and models whose input's size follows the image's."""

import json

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import DEMO, DEMO_MODEL
from PIL import Image

import build_engine
import compare_tf
import create_onnx
import eval_coco
import infer
import onnx_utils
from checks import parity
from images.aspect import choose_fit
from images.decoding import ImageError, load_image
from images.resizing import keep_aspect_size, placement_of, preprocess
from runtimes import open_detector
from runtimes.detector import detect_image, network_inputs, split_detections
from runtimes.ort_detector import OrtDetector
from runtimes.quantization import quantize
from runtimes.trained_ranges import read_trained_ranges
from tfod import tf1
from tfod.boxes import box_iou
from tfod.saved_model import SavedModel, _inline_functions, find_saved_model
from tfod.tensorflow_import import import_tensorflow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with two pictures of 2:1, in two sizes, and one of 1:2."""
    folder = tmp_path_factory.mktemp("pictures")
    source = load_image(sorted((DEMO / "images").glob("*.jpg"))[0])
    for name, size in {"a": (128, 64), "b": (640, 320), "tall": (64, 128)}.items():
        Image.fromarray(source).resize(size).save(folder / f"{name}.png")
    return folder


def test_a_model_without_padding_is_tensorflows_for_images_of_its_aspect(exported, pictures):
    folder, path = exported("no_padding", "--batch_size", "dynamic")
    with SavedModel(find_saved_model(folder)) as theirs, open_detector(path) as ours:
        assert (ours.input.height, ours.input.width) == (64, 128)
        for name in ("a", "b"):
            image = load_image(pictures / f"{name}.png")
            wanted = parity.tensorflow_detections(theirs, image, ours.metadata)
            report = parity.match_by_rank(wanted, detect_image(ours, image))
            assert report.compared >= 15
            assert report.unmatched <= parity.allowed_unmatched(ours.metadata) * 2
            assert max(report.box_difference, report.score_difference) < 1e-3


def test_a_model_without_padding_in_standard_ops(exported, pictures):
    """Of a fixed size and batch, on ONNX Runtime alone: what the file in TensorRT's ops finds."""
    _, path = exported("no_padding", "--batch_size", "dynamic")
    _, standard = exported("no_padding", "--ops", "standard")
    image = load_image(pictures / "b.png")
    with open_detector(path) as detector:
        pixels, place = preprocess(image, detector.metadata["resizer"])
        batch, shapes = np.rint(pixels)[None], np.float32([place.true_shape])
        wanted = detector.infer(batch, shapes)[0]
        feed = network_inputs(batch, shapes, detector.input)
    session = onnxruntime.InferenceSession(standard)
    assert session.get_inputs()[0].shape == [1, 64, 128, 3]
    outputs = [output.name for output in session.get_outputs()]
    found = split_detections(dict(zip(outputs, session.run(None, feed), strict=True)), 1)[0]
    report = parity.match_by_rank(wanted, found)
    assert (report.unmatched, report.compared) == (0, len(wanted.scores))
    assert report.compared >= 10
    assert max(report.box_difference, report.score_difference) < 1e-6


def test_images_of_another_aspect_are_refused_or_fitted(exported, pictures, tmp_path, capsys):
    _, path = exported("no_padding", "--batch_size", "dynamic")
    args = ["--engine", str(path), "--input", str(pictures), "--output", str(tmp_path / "results")]
    with pytest.raises(
        UserError,
        match=r"1 of 3 images have another aspect ratio than 128 x 64.*tall.png: 64 x 128.*--image_size 128x64 \(height first\), or --fit",
    ):
        infer.main(args)
    assert not list(tmp_path.rglob("*.tsv"))
    assert infer.main([*args, "--fit", "--nms_threshold", "0"]) == 0
    assert "results differ from TensorFlow's" in capsys.readouterr().err
    assert len(list(tmp_path.rglob("*.tsv"))) == 3
    with open_detector(path) as detector:
        tall = load_image(pictures / "tall.png")
        with pytest.raises(ImageError, match="--fit"):
            detect_image(detector, tall)
        choose_fit(detector.metadata, True)
        assert placement_of(128, 64, detector.metadata["resizer"]).true_shape == (64, 32)
        boxes = detect_image(detector, tall).boxes
        assert len(boxes) >= 10
        assert boxes.max() <= 1
        assert (boxes[:, 3] > 0.8).any()  # they reach across the image, not across its part of the input


def test_evaluation_refuses_and_fits_too(exported, pictures, tmp_path):
    _, path = exported("no_padding", "--batch_size", "dynamic")
    names = sorted(file.name for file in pictures.iterdir())
    truth = {
        "images": [{"id": i, "file_name": name, "width": 4, "height": 3} for i, name in enumerate(names)],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 5)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    args = ["--engine", str(path), "--input", str(pictures), "--annotations", str(tmp_path / "truth.json")]
    with pytest.raises(UserError, match="1 of 3 images"):
        eval_coco.main(args)
    assert eval_coco.main([*args, "--fit"]) == 0


def test_without_a_size_the_message_names_the_option(exported, tmp_path):
    folder, _ = exported("no_padding", "--batch_size", "dynamic")
    with pytest.raises(
        UserError, match=r"\(128/128\) does not pad.*--image_size 1080x1920 for example \(72 x 128 input\)"
    ):
        create_onnx.main(["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1080", "x", "0x100", "1080*1920", "-1x5"])
def test_a_size_that_is_none(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        create_onnx.parse_args(["--saved_model", "x", "--onnx", "y", f"--image_size={text}"])
    assert "is no height and width" in capsys.readouterr().err


def test_a_size_of_the_input_is_a_size_that_stays():
    """The same tensor on both sides: TensorFlow's resizer leaves images of the input's size as they are."""
    rng = np.random.default_rng(0)
    for height, width in rng.integers(200, 4000, (500, 2)):
        size = keep_aspect_size(height, width, 600, 1024)
        assert keep_aspect_size(*size, 600, 1024) == size


# Frozen graphs.


@pytest.fixture(scope="module")
def demo_graph():
    """The demo's model as a frozen graph, a GraphDef with the names of TF1's exporter."""
    tf = import_tensorflow()
    keys = ("detection_boxes", "detection_scores", "detection_classes", "num_detections", *SavedModel.RAW)
    with SavedModel(DEMO_MODEL / "saved_model") as model:
        model_outputs = dict(model.outputs)
        with model._graph.as_default():
            for key in keys:
                tf.identity(model._graph.get_tensor_by_name(model_outputs[key]), name=f"given/{key}")
        variables = tf.compat.v1.graph_util.convert_variables_to_constants(
            model._session, model._graph.as_graph_def(), [f"given/{key}" for key in keys]
        )
        flat = _inline_functions(variables, [f"given/{key}" for key in keys])
        image = model.input.split(":")[0]
    names = {image: tf1.INPUTS[0]} | {f"given/{key}": key for key in keys}
    for node in flat.node:
        node.name = names.get(node.name, node.name)
        for i, source in enumerate(node.input):
            bare = source.lstrip("^").split(":")[0]
            node.input[i] = source.replace(bare, names[bare]) if bare in names else source
    return flat


def with_fake_quants(graph_def):
    """Puts a fake quantisation behind each Relu6 and each convolution's weights, as the graph rewriter of TF1 does."""
    tf = import_tensorflow()
    constants = {node.name: node for node in graph_def.node if node.op == "Const"}
    graph = {node.name: node for node in graph_def.node}

    def add(name, source, low, high):
        for part, value in (("min", low), ("max", high)):
            node = graph_def.node.add(name=f"{name}/{part}", op="Const")
            node.attr["dtype"].type = tf.float32.as_datatype_enum
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.float32(value)))
        node = graph_def.node.add(name=name, op="FakeQuantWithMinMaxVars")
        node.input.extend([source, f"{name}/min", f"{name}/max"])
        node.attr["num_bits"].i, node.attr["narrow_range"].b = 8, "weights" in name

    def constant_of(source):
        while source in graph and graph[source].op == "Identity":
            source = graph[source].input[0].split(":")[0]
        return constants.get(source)

    activations = [node.name for node in graph_def.node if node.op == "Relu6"]
    for node in list(graph_def.node):
        for i, source in enumerate(node.input):
            if source.split(":")[0] in activations:
                node.input[i] = f"{source.split(':')[0]}/act_quant"
        if node.op in ("Conv2D", "DepthwiseConv2dNative"):
            weights = constant_of(node.input[1].split(":")[0])
            values = tf.make_ndarray(weights.attr["value"].tensor)
            add(f"{node.name}/weights_quant", node.input[1], values.min(), values.max())
            node.input[1] = f"{node.name}/weights_quant"
    for name in activations:
        add(f"{name}/act_quant", name, 0.0, 6.0)


@pytest.fixture(scope="module")
def quantised(demo_graph, tmp_path_factory):
    """(frozen graph, ONNX file) of the demo's model with fake quantisation."""
    folder = tmp_path_factory.mktemp("quantised")
    path = folder / tf1.FROZEN_GRAPH
    graph_def = type(demo_graph).FromString(demo_graph.SerializeToString())
    with_fake_quants(graph_def)
    path.write_bytes(graph_def.SerializeToString())
    (folder / "pipeline.config").write_text((DEMO_MODEL / "pipeline.config").read_text())
    assert create_onnx.main(["--saved_model", str(folder), "--onnx", str(folder / "m.onnx"), "--no_check"]) == 0
    return path, folder / "m.onnx"


def test_fake_quantisation_stays(quantised, detector):
    """In FP32 the results are those of TensorFlow with it, which differ from those without."""
    frozen, path = quantised
    changed = 0.0
    with SavedModel(frozen) as theirs, open_detector(path) as ours:
        for file in sorted((DEMO / "images").glob("*.jpg"))[:4]:
            image = load_image(file)
            report = parity.compare(theirs, ours, image, 2e-2)
            assert report.compared >= 90
            assert report.unmatched <= 2
            # One level of an activation, where rounding falls to the other side.
            assert max(report.box_difference, report.score_difference) < 2e-2
            plain = detect_image(detector("demo"), image)
            changed = max(changed, float(abs(plain.scores[:10] - detect_image(ours, image).scores[:10]).max()))
    assert changed > 1e-3


def test_int8_takes_the_trained_ranges(quantised):
    model = onnx_utils.load(quantised[1])
    plain, (ranges, left) = read_trained_ranges(model)
    assert not any(node.op_type == "Floor" for node in plain.graph.node)
    assert {tuple(np.round(pair, 4)) for pair in ranges.values()} == {(0.0, 6.0)}
    typed = quantize(plain, ranges, left)
    graph = gs.import_onnx(typed)
    scales = [
        float(node.inputs[1].values)
        for node in graph.nodes
        if node.op == "QuantizeLinear" and node.inputs[1].values.ndim == 0
    ]
    assert len(scales) >= 20
    np.testing.assert_allclose(scales, 6 / 127, rtol=1e-2)
    assert len(left) <= 1  # the first layer, which takes in the image
    truth = json.loads((DEMO / "instances_shapes.json").read_text())
    found = wanted = 0
    with OrtDetector(quantised[1], typed) as ours, open_detector(quantised[1]) as reference:
        for entry in truth["images"]:
            image = load_image(DEMO / "images" / entry["file_name"])
            a, b = (detect_image(x, image).above(0.3) for x in (reference, ours))
            overlap = box_iou(a.boxes, b.boxes) * (a.classes[:, None] == b.classes[None])
            wanted, found = wanted + len(a.scores), found + int((overlap > 0.7).any(axis=1).sum())
    assert wanted >= 10
    assert found >= 0.8 * wanted


def test_build_engine_needs_no_calibration_then(quantised, tmp_path, capsys):
    args = build_engine.parse_args(
        ["--onnx", str(quantised[1]), "--engine", str(tmp_path / "e.trt"), "--precision", "int8"]
    )
    model, calibration = build_engine.find_ranges(args, onnx_utils.load(quantised[1]))
    assert len(calibration[0]) >= 20
    assert "ranges that the model was trained with" in capsys.readouterr().out
    onnx.checker.check_model(model)


@pytest.mark.parametrize("name", tf1.INPUTS[1:])
def test_frozen_graphs_that_decode_images(name, demo_graph, tmp_path):
    """They are given the pixels in a file without loss, and find what the graph behind finds."""
    tf = import_tensorflow()
    plain, decoding = tmp_path / "plain.pb", tmp_path / "decoding.pb"
    plain.write_bytes(demo_graph.SerializeToString())
    with tf.Graph().as_default() as graph:
        data = tf.compat.v1.placeholder(tf.string, [None], name=name)[0]
        if name == "tf_example":
            data = tf.io.parse_single_example(data, {"image/encoded": tf.io.FixedLenFeature([], tf.string)})[
                "image/encoded"
            ]
        behind = type(demo_graph)()
        behind.node.extend(node for node in demo_graph.node if node.name != tf1.INPUTS[0])
        behind.versions.CopyFrom(demo_graph.versions)
        images = tf.image.decode_png(data, channels=3)[None]
        tf.import_graph_def(behind, {f"{tf1.INPUTS[0]}:0": images}, name="")
        decoding.write_bytes(graph.as_graph_def().SerializeToString())
    image = load_image(sorted((DEMO / "images").glob("*.jpg"))[0])
    with SavedModel(plain) as a, SavedModel(decoding) as b:
        wanted, found = a.detect(image), b.detect(image)
        np.testing.assert_array_equal(wanted["detection_boxes"], found["detection_boxes"])
        assert wanted["detection_scores"][0] > 0.5
        assert b.feed(image).dtype == object


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: None, "not a frozen graph"),
        (lambda g: g.node.add(name="image", op="Placeholder"), "it has no input image_tensor"),
        (lambda g: g.node.add(name="TFLite_Detection_PostProcess", op="NoOp"), "a graph for TensorFlow Lite"),
    ],
)
def test_other_frozen_graphs_are_called_what_they_are(tmp_path, change, said):
    graph_def = import_tensorflow().compat.v1.GraphDef()
    change(graph_def)
    for node in graph_def.node:
        node.attr["dtype"].type = 1
    if graph_def.node and graph_def.node[0].op == "NoOp":
        graph_def.node[0].attr.pop("dtype")
    path = tmp_path / "graph.pb"
    path.write_bytes(graph_def.SerializeToString())
    (tmp_path / "pipeline.config").write_text((DEMO_MODEL / "pipeline.config").read_text())
    with pytest.raises(UserError, match=said):
        create_onnx.main(["--saved_model", str(path), "--onnx", str(tmp_path / "m.onnx")])


def test_clipped_candidates():
    graph = gs.Graph(opset=onnx_utils.OPSET)
    boxes, scores = gs.Variable("boxes", np.float32, ["B", 3, 2, 4]), gs.Variable("scores", np.float32, ["B", 3, 2])
    window = gs.Variable("window", np.float32, ["B", 2])
    graph.inputs = [boxes, scores, window]
    boxes.shape[0] = None
    graph.outputs = list(tf1.clip_candidates(onnx_utils.OpBuilder(graph, "test"), boxes, scores, window))
    for tensor, name in zip(graph.outputs, ("clipped", "kept"), strict=True):
        tensor.name = name
    session = onnxruntime.InferenceSession(gs.export_onnx(graph).SerializeToString())
    given = np.random.default_rng(0).uniform(-0.5, 1.5, (2, 3, 2, 4)).astype(np.float32)
    given[..., 2:] = given[..., :2] + 0.4
    windows = np.float32([[0.5, 1], [1, 0.75]])
    clipped, kept = session.run(None, {"boxes": given, "scores": np.ones((2, 3, 2), np.float32), "window": windows})
    for i in range(2):
        wanted = np.clip(given[i], 0, np.tile(windows[i], 2))
        np.testing.assert_array_equal(clipped[i], wanted)
        np.testing.assert_array_equal(kept[i] > 0, np.prod(wanted[..., 2:] - wanted[..., :2], axis=-1) > 0)
    assert 0 < kept.sum() < 12


def test_comparison_takes_a_frozen_graph(quantised, tmp_path):
    frozen, path = quantised
    args = ["--engine", str(path), "--saved_model", str(frozen), "--input", str(DEMO / "images")]
    assert compare_tf.main([*args, "--output", str(tmp_path), "--num_images", "2", "--tolerance", "0.05"]) == 0
