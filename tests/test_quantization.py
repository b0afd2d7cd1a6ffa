"""INT8: the ranges that calibration measures, and which layers it leaves. See test_engine.py for the graphs."""

import contextlib
import io
import json
import re
from types import SimpleNamespace

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import DEMO

import build_engine
import onnx_utils
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import quantization, standard_graph
from runtimes.detector import Detections, input_spec, network_inputs
from runtimes.ort_detector import OrtDetector

BOX = np.float32([[0.1, 0.2, 0.5, 0.6]])


@pytest.fixture(scope="module")
def demo(convert):
    """The demo's model, its ranges on four of its images, and a `detect` for choose_layers on the other four."""
    path = convert("demo", "--batch_size", "dynamic")[0]
    model = onnx_utils.load(path)
    metadata = onnx_utils.read_metadata(model, path)
    images = [preprocess(load_image(x), metadata["resizer"]) for x in sorted((DEMO / "images").glob("*.jpg"))]
    tensors, shapes = [image for image, _ in images], [placement.true_shape for _, placement in images]
    spec = input_spec(metadata)
    feeds = [network_inputs(tensors[part], shapes[part], spec) for part in (slice(3), slice(3, 4))]

    def detect(candidate, mirrored):
        judged = quantization.mirror(tensors[4:], shapes[4:]) if mirrored else tensors[4:]
        with OrtDetector(path, candidate) as detector:
            return detector.infer(judged, shapes[4:])

    ranges = quantization.calibrate(model, iter(feeds))
    return SimpleNamespace(path=path, model=model, feeds=feeds, ranges=ranges, detect=detect)


def values_of(demo, names):
    """What tensors of the demo's model hold for its calibration images: {name: array [N]}."""
    graph = standard_graph.prepare(demo.model)
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    parts = [session.run(names, feed) for feed in demo.feeds]
    return {name: np.concatenate([part[i].ravel() for part in parts]) for i, name in enumerate(names)}


def test_ranges_hold_all_but_a_few_values(demo):
    """Half of the rest is left out on either side, to a bin of the histogram, over all the batches."""
    assert demo.ranges.keys() == quantization.measured_tensors(demo.model)
    names = sorted(demo.ranges)[::6]
    for name, values in values_of(demo, names).items():
        low, high = demo.ranges[name]
        rest = (100 - quantization.PERCENTILE) / 2
        wanted = np.percentile(values, [rest, 100 - rest], method="inverted_cdf")
        width = 2 * np.abs(values).max() / quantization.HISTOGRAM_BINS
        np.testing.assert_allclose((low, high), wanted, atol=1.01 * width)


def test_ranges_of_a_sample_are_near(demo, monkeypatch):
    """Of large tensors not every value is counted, but values from all places are."""
    counted = []
    histogram = np.histogram

    def counting(values, *args, **options):
        counted.append(len(values))
        return histogram(values, *args, **options)

    monkeypatch.setattr(quantization, "SAMPLED", 10_000)
    monkeypatch.setattr(np, "histogram", counting)
    ranges = quantization.calibrate(demo.model, demo.feeds)
    assert 9_000 < max(counted) <= 10_000
    for name, values in values_of(demo, sorted(ranges)).items():
        low, high = ranges[name]
        width = 2 * np.abs(values).max() / quantization.HISTOGRAM_BINS
        assert values.min() <= low <= np.percentile(values, 1) + width
        assert np.percentile(values, 99) - width <= high <= values.max()


def test_a_tensor_of_few_values_has_the_range_of_all(demo):
    """Where one value in 307,200 is not 0, and then 1 (127.5 is 0 to the network): a percentile would leave nothing."""
    feeds = [{key: np.full_like(value, 127.5) for key, value in feed.items()} for feed in demo.feeds]
    feeds[0]["input_tensor"][0, 0, 0, 0] = 255
    image = next(iter(quantization.measured_inputs(demo.model).values()))
    assert quantization.calibrate(demo.model, feeds)[image] == pytest.approx((0, 1), abs=1e-6)


def one_layer():
    """A convolution [B, 3, 8, 8] -> [B, 2, 8, 8] alone."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    images = gs.Variable("images", np.float32, ["B", 3, 8, 8])
    weights = gs.Constant("weights", np.ones((2, 3, 1, 1), np.float32))
    graph.inputs, graph.outputs = [images], [gs.Variable("features", np.float32, ["B", 2, 8, 8])]
    graph.nodes = [gs.Node("Conv", "conv", {}, [images, weights], list(graph.outputs))]
    return gs.export_onnx(graph)


@pytest.mark.parametrize("value", [3.0, -3.0, 0.0])
def test_where_all_values_are_alike_the_range_is_one(value):
    ranges = quantization.calibrate(one_layer(), [{"images": np.full((1, 3, 8, 8), value, np.float32)}])
    assert ranges.keys() == {"images", "features"}
    for name, (low, high) in ranges.items():
        assert low <= (value if name == "images" else 3 * value) <= high


def test_values_that_cannot_be_counted_are_one_line():
    with pytest.raises(UserError, match=r"values of .* in the network cannot be counted"):
        quantization.calibrate(one_layer(), [{"images": np.full((1, 3, 8, 8), np.inf, np.float32)}])


def test_that_nothing_was_found_to_judge_by_is_said(demo, capsys):
    def weak(candidate, mirrored):
        return [Detections(x.boxes, x.scores * 0.05, x.classes) for x in demo.detect(candidate, mirrored)]

    assert quantization.choose_layers(demo.model, demo.ranges, weak).left == []
    assert "nothing of 0.1 and more is found in the calibration images" in capsys.readouterr().err
    quantization.choose_layers(demo.model, demo.ranges, demo.detect)
    assert capsys.readouterr().err == ""


def test_all_layers_in_int8_cost_a_small_ssd_little(demo):
    """By entropy calibration they moved its detections by 0.47."""
    choice = quantization.choose_layers(demo.model, demo.ranges, demo.detect)
    assert choice.left == []
    assert 0 < choice.plain == choice.reached < quantization.HARMLESS < choice.tolerated < 0.05


def test_layers_with_a_bad_range_are_left(demo):
    """Where a tensor is clipped at a twentieth, what reads it stays as it is, and nothing else."""
    inputs = quantization.measured_inputs(demo.model)
    bad = next(tensor for tensor in inputs.values() if list(inputs.values()).count(tensor) == 3)
    ranges = {**demo.ranges, bad: tuple(x / 20 for x in demo.ranges[bad])}
    choice = quantization.choose_layers(demo.model, ranges, demo.detect)
    assert choice.left == sorted(layer for layer, tensor in inputs.items() if tensor == bad)
    assert choice.reached <= choice.tolerated < 0.1 < choice.plain


def test_ranges_chosen_otherwise_are_measured_anew(demo, tmp_path):
    """A calibration of before, whose ranges are by entropy, does not say of which percentile they are."""
    path = tmp_path / "cache"
    quantization.write_cache(path, demo.model, demo.ranges, ["a"])
    assert quantization.read_cache(path, demo.model) == ((demo.ranges, ["a"]), None)
    content = json.loads(path.read_text())
    del content["percentile"]
    path.write_text(json.dumps(content))
    assert quantization.read_cache(path, demo.model) == (None, "it was made by another version of build_engine.py")


def moved(by):
    """What is found in a mirrored image where BOX is found in the image, moved by so much of its width."""
    return Detections(np.float32([[0.1, 0.4 - 0.4 * by, 0.5, 0.8 - 0.4 * by]]), np.float32([0.8]), np.int32([1]))


@pytest.mark.parametrize(
    ("by", "own"), [(0, 0.0), (0.02, 1 - 0.98 / 1.02), (0.2, 1 - 0.8 / 1.2), (0.1, 1 - 0.9 / 1.1), (0.9, 1.0)]
)
def test_what_is_let_pass_follows_how_exact_the_model_is(by, own):
    """A third of how far it is from itself on mirrored images, within bounds."""
    one = Detections(BOX, np.float32([0.8]), np.int32([1]))
    wanted = min(max(own / 3, 0.02), 0.2)
    assert quantization.tolerance([one], [moved(by)]) == pytest.approx(wanted, abs=1e-6)


def test_images_are_mirrored_within_their_padding():
    image = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    before = image.copy()
    whole, part = quantization.mirror([image, image], np.float32([[2, 5], [1, 3]]))
    np.testing.assert_array_equal(whole, before[:, ::-1])
    np.testing.assert_array_equal(part, before[:, [2, 1, 0, 3, 4]])
    np.testing.assert_array_equal(image, before)


def test_the_choice_is_told(demo, tmp_path):
    """Where no layer is left too: how far detections are from FP32's is a line in either case."""
    args = build_engine.parse_args(
        [
            *("--onnx", str(demo.path), "--typed_onnx", str(tmp_path / "int8.onnx"), "--precision", "int8"),
            *("--calib_input", str(DEMO / "images"), "--calib_num_images", "4"),
        ]
    )
    assert build_engine.find_calibration(args, demo.model) is None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        build_engine.calibrate(args, demo.model, onnx_utils.read_metadata(demo.model, demo.path))
    line = r"No layer stays in FP16: with all 39 layers in INT8 the detections disagree with FP32 by 0\.0[12]\d \(.* 0\.0\d\d is let pass\)\n"
    assert re.fullmatch(line, printed.getvalue()), printed.getvalue()
    told = build_engine.describe(quantization.Choice(["a", "b"], 0.1234, 0.0567, 0.07), 39)
    assert told.startswith("2 of 39 layers stay in FP16: with all 39 layers in INT8 ")
    assert "by 0.123, without these by 0.057 (0: the same, 1: nothing alike; 0.070 is let pass)" in told
