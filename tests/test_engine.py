"""What build_engine.py does before and around TensorRT, without a GPU: graph forms, calibration, mistakes. What it asks of
TensorRT: test_tensorrt.py."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import DEMO, EXPORTS, ROOT, need_shared

import build_engine
import onnx_utils
from benchmarks import bench_rounds
from checks import coco
from images.decoding import load_image
from runtimes import open_detector, precision, quantization, trt_detector, trt_graph
from runtimes.detector import Detections, detect_image
from runtimes.ort_detector import OrtDetector

KEYS = ["demo", "fpnlite", pytest.param("faster_rcnn_640", marks=pytest.mark.zoo)]


def types_by_op(model):
    """{op: types of the float tensors that go into its nodes}."""
    graph = precision.typed_graph(model)
    types = {}
    for node in graph.nodes:
        types.setdefault(node.op, set()).update(np.dtype(x.dtype).name for x in node.inputs[:1] if x.dtype is not None)
    return types


@pytest.mark.parametrize("key", KEYS)
def test_only_the_network_is_half(key, convert):
    model = onnx_utils.load(convert(key, "--batch_size", "dynamic")[0])
    half = build_engine.typed_model("fp16", model, None)
    onnx.checker.check_model(half)
    types = types_by_op(half)
    assert types["Conv"] == {"float16"}
    for op in ("Exp", "EfficientNMS_TRT", "Sigmoid", "Softmax", "Floor", "TopK"):
        assert types.get(op, {"float32"}) == {"float32"}, op
    assert half.ByteSize() < 0.6 * model.ByteSize()
    for before, after in zip(model.graph.output, half.graph.output, strict=True):
        assert before == after
    assert onnx_utils.read_metadata(half, "half") == onnx_utils.read_metadata(model, "model")


def test_skip_connections_behind_a_crop_are_half(exported):
    """No layer with weights lies between the crops and what reads them, and it is features all the same."""
    model = onnx_utils.load(exported("skip", "--batch_size", "dynamic")[1])
    types = types_by_op(build_engine.typed_model("fp16", model, None))
    assert types["Floor"] == {"float32"}  # what finds a crop's pixels
    for op in ("MaxPool", "GlobalAveragePool", "MatMul", "Resize"):
        assert types[op] == {"float16"}, op


def test_what_tensorrt_8_is_told_of_each_layer(int8_demo):
    """Which layers are FP32 and FP16, and for INT8 the ranges of all that a convolution takes in and gives."""
    _, model, ranges, _, _ = int8_demo
    graph = gs.import_onnx(model)
    convolutions = {node.name: node for node in graph.nodes if node.op == "Conv"}
    assert len(convolutions) > 30
    told = build_engine.layer_types("fp16", model, None)
    assert (told.half, told.ranges) == (set(convolutions), {})
    assert told.float32 == precision.float32_names(model)
    assert not told.half & told.float32

    some = sorted(convolutions)[:9]
    told = build_engine.layer_types("int8", model, (ranges, some))
    assert told.half == set(some)
    for node in convolutions.values():
        assert {node.inputs[0].name, node.outputs[0].name} <= told.ranges.keys()
    assert all(low < high for low, high in told.ranges.values())
    assert build_engine.layer_types("fp32", model, None) is None
    assert types_by_op(build_engine.typed_model("int8", model, (ranges, some)))["Conv"] == {"float16"}


class Recorder:
    """A layer, tensor or configuration of TensorRT 8.6, that keeps what it is told; attributes are what is given."""

    def __init__(self, **attributes):
        self.told = []
        vars(self).update(attributes)

    def __getattr__(self, name):
        if name.startswith("set_"):
            return lambda *arguments: self.told.append((name, *arguments))
        raise AttributeError(name)


def layer_of(name, *outputs):
    return Recorder(name=name, num_outputs=len(outputs), get_output=lambda i: outputs[i])


@pytest.mark.parametrize("int8", [False, True])
def test_tensorrt_8_is_told_so(int8):
    """Of TensorRT only the names are stood in for; that it has them, the real bindings say (above)."""
    names = ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
    trt = SimpleNamespace(
        BuilderFlag=SimpleNamespace(**{name: name for name in names}),
        DataType=SimpleNamespace(FLOAT="FLOAT", HALF="HALF", INT32="INT32"),
    )
    boxes, number, features, other = (
        Recorder(name=name, dtype=dtype, is_execution_tensor=True)
        for name, dtype in (("boxes", "FLOAT"), ("number", "INT32"), ("features", "FLOAT"), ("other", "FLOAT"))
    )
    layers = [layer_of("nms", number, boxes), layer_of("conv", features), layer_of("free", other)]
    network = SimpleNamespace(num_layers=3, get_layer=lambda i: layers[i])
    ranges = {"features": (-2.0, 5.0), "other": (-7.0, 1.0)} if int8 else {}
    config = Recorder()
    build_engine.allow_precisions(trt, config, network, build_engine.LayerTypes({"nms"}, {"conv"}, ranges))
    flags = [flag for _, flag in config.told]
    assert flags == ["FP16", "INT8", names[3]] if int8 else flags == ["FP16", names[2]]
    assert (layers[0].precision, layers[0].told) == (
        "FLOAT",
        [("set_output_type", 1, "FLOAT")],
    )  # the number is no float
    assert (layers[1].precision, layers[1].told) == ("HALF", [("set_output_type", 0, "HALF")])
    assert not hasattr(layers[2], "precision")
    assert layers[2].told == []
    assert features.told == ([("set_dynamic_range", -5.0, 5.0)] if int8 else [])
    assert other.told == ([("set_dynamic_range", -7.0, 7.0)] if int8 else [])
    assert boxes.told == number.told == []


def test_what_is_clipped_away_needs_no_range(int8_demo):
    """Before a Clip the range of what it lets through, elsewhere the measured one."""
    _, model, ranges, _, _ = int8_demo
    known = quantization.implicit_ranges(model, ranges)
    clips = [node for node in gs.import_onnx(model).nodes if node.op == "Clip" and node.outputs[0].name in ranges]
    assert len(clips) > 10
    before = {node.inputs[0].name for node in clips}
    for node in clips:
        assert known[node.inputs[0].name] == ranges[node.outputs[0].name]
        assert 0 < known[node.inputs[0].name][1] <= 6.5
    assert {name: pair for name, pair in known.items() if name not in before} == {
        name: pair for name, pair in ranges.items() if name not in before
    }
    silent = {**ranges, clips[0].outputs[0].name: (0.0, 0.0)}
    assert clips[0].outputs[0].name not in quantization.implicit_ranges(model, silent)


@pytest.mark.parametrize("key", KEYS)
def test_a_calibration_serves_the_graph_that_tensorrt_gets(key, convert):
    """What trt_graph.py changes keeps the names of the tensors that are quantized."""
    model = onnx_utils.load(convert(key, "--batch_size", "dynamic")[0])
    prepared = trt_graph.prepare(model, BATCH)
    assert len(prepared.graph.node) != len(model.graph.node)
    assert quantization.measured_tensors(prepared) == quantization.measured_tensors(model)
    assert quantization.layers(prepared).keys() == quantization.layers(model).keys()


def test_tensorrt_8_is_told_that_places_of_crops_are_float32(exported):
    """It may take FP16 for whatever it is not told of, and then the wrong pixels."""
    prepared = trt_graph.prepare(onnx_utils.load(exported("faster", "--batch_size", "dynamic")[1]), BATCH)
    told = build_engine.layer_types("fp16", prepared, None)
    graph = gs.import_onnx(build_engine.typed_model("fp16", prepared, None))
    (floor,) = (node for node in graph.nodes if node.op == "Floor")
    after, todo = set(), [floor]
    while todo:  # up to the rows and the type that they have
        node = todo.pop()
        if node.op != "Cast" and node.name not in after:
            after.add(node.name)
            todo.extend(reader for tensor in node.outputs for reader in tensor.outputs)
    assert len(after) > 10
    assert after <= told.float32


def test_a_calibration_serves_crops_as_rows(exported):
    """TensorRT 8.6 is told of ranges by the names of tensors, in the graph that has no GridSample any more."""
    model = onnx_utils.load(exported("faster", "--batch_size", "dynamic")[1])
    typed = build_engine.typed_model("fp32", trt_graph.prepare(model, BATCH), None)
    assert len(quantization.measured_tensors(model)) > 10
    assert set(quantization.measured_tensors(model)) <= {name for node in typed.graph.node for name in node.output} | {
        tensor.name for tensor in typed.graph.input
    }


def test_half_precision_keeps_the_average_precision(convert, detector, coco_images):
    """AP loss of FPNLite coco17 in FP16 at most 0.002 on the 188 images."""
    annotations = need_shared("coco", "instances_val2017_subset.json")
    path = convert("fpnlite", "--batch_size", "dynamic")[0]
    scores = []
    with OrtDetector(path, precision.to_half(onnx_utils.load(path))) as half:
        for model in (detector("fpnlite", "--batch_size", "dynamic"), half):
            ap, _ = coco.average_precision(annotations, coco_images, lambda x, model=model: detect_image(model, x), 1)
            scores.append(ap)
    print(f"AP {scores[0]:.4f}, in FP16 {scores[1]:.4f}")
    assert scores[1] >= scores[0] - 0.002


def arguments(model, engine, *options):
    return build_engine.parse_args(["--onnx", str(model), "--engine", str(engine), "--precision", "int8", *options])


def calibrated(model, folder, images, *options):
    """Calibrates the file `model` as build_engine.py does; returns (its contents, ranges, names of layers left, arguments)."""
    args = arguments(model, folder / "engine.trt", "--calib_input", str(images), *options)
    content = onnx_utils.load(model)
    assert build_engine.find_calibration(args, content) is None
    return content, *build_engine.calibrate(args, content, onnx_utils.read_metadata(content, model)), args


@pytest.fixture(scope="module")
def int8_demo(convert, tmp_path_factory):
    model = convert("demo", "--batch_size", "dynamic")[0]
    folder = tmp_path_factory.mktemp("int8")
    return model, *calibrated(model, folder, DEMO / "images", "--calib_num_images", "4", "--calib_batch_size", "3")


def test_quantized_detections_are_near(int8_demo):
    path, model, ranges, left, _ = int8_demo
    quantized = quantization.quantize(model, ranges, left)
    kinds = [node.op_type for node in quantized.graph.node]
    assert kinds.count("QuantizeLinear") >= 20
    onnx.checker.check_model(quantized)
    pictures = sorted((DEMO / "images").glob("*.jpg"))[4:]  # not those of the calibration
    results = {}
    for name, content in {"fp32": model, "int8": quantized, "half": precision.to_half(quantized)}.items():
        with OrtDetector(path, content) as detector:
            results[name] = [detect_image(detector, load_image(picture)) for picture in pictures]
    assert quantization.disagreement(results["fp32"], results["fp32"]) == 0
    for name in ("int8", "half"):
        assert 0 < quantization.disagreement(results["fp32"], results[name]) < 2 * quantization.HARMLESS


def test_the_cache_belongs_to_one_network(int8_demo, convert, tmp_path, capsys, monkeypatch):
    _, model, ranges, left, args = int8_demo
    assert build_engine.find_calibration(args, model) == (ranges, left)
    assert "Using the calibration" in capsys.readouterr().out

    for options in (("--batch_size", "4"), ("--input_format", "NCHW", "--input_type", "uint8")):
        same = onnx_utils.load(convert("demo", *options)[0])
        assert build_engine.find_calibration(args, same) == (ranges, left)

    other = other_weights(convert("demo")[0], tmp_path / "other.onnx")
    again = arguments(other, tmp_path / "e.trt", "--calib_cache", args.calib_cache)
    with pytest.raises(UserError, match="belongs to another network"):
        build_engine.find_calibration(again, onnx_utils.load(other))
    again = arguments(
        other, tmp_path / "e.trt", "--calib_cache", args.calib_cache, "--calib_input", str(DEMO / "images")
    )
    assert build_engine.find_calibration(again, onnx_utils.load(other)) is None
    assert "calibrating anew" in capsys.readouterr().err

    content = json.loads(Path(args.calib_cache).read_text())
    (tmp_path / "cache").write_text(json.dumps({**content, "ranges": dict(list(ranges.items())[1:])}))
    found, why = quantization.read_cache(tmp_path / "cache", model)
    assert found is None
    assert "another version of build_engine.py" in why


@pytest.mark.parametrize(
    "text", ["TRT-8600-EntropyCalibration2\ninput_tensor: 3c010a14\n", "[1, 2]", '{"ranges": null}', "\x00\xff", ""]
)
def test_a_file_that_is_no_calibration_is_not_overwritten(text, convert, tmp_path):
    """What --calib_cache names may be the older tool's cache, or anything: it stays, and one line says so."""
    cache = tmp_path / "cache"
    cache.write_bytes(text.encode("latin-1"))
    status, printed = command(
        *("--onnx", convert("demo")[0], "--engine", tmp_path / "e.trt", "--precision", "int8"),
        *("--calib_cache", cache, "--calib_input", DEMO / "images"),
    )
    assert (status, len(printed.splitlines())) == (2, 1), printed
    assert "not a calibration of build_engine.py" in printed
    assert cache.read_bytes() == text.encode("latin-1")
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def other_weights(path, target):
    """The same network with one weight of one layer changed."""
    model = onnx_utils.load(path)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weights.raw_data = weights.raw_data[:-4] + np.float32(1.5).tobytes()
    onnx.save(model, target)
    return target


@pytest.mark.zoo  # two minutes
def test_a_fixed_batch_calibrates_too(convert, tmp_path):
    """Six images in batches of four: the last is filled up."""
    model = convert("demo", "--batch_size", "4", "--input_type", "uint8")[0]
    _, ranges, _, _ = calibrated(model, tmp_path, DEMO / "images", "--calib_num_images", "6")
    assert len(ranges) >= 10
    assert all(low < high for low, high in ranges.values())


def test_disagreement():
    box = np.float32([[0.1, 0.1, 0.5, 0.5]])
    one = Detections(box, np.float32([0.8]), np.int32([1]))
    for other, expected in (
        (one, 0.0),
        (Detections(box, np.float32([0.4]), np.int32([1])), 0.5),
        (Detections(box, np.float32([0.8]), np.int32([2])), 1.0),
        (Detections(box + np.float32([0, 0, 0, -0.1]), np.float32([0.8]), np.int32([1])), 0.25),
        (Detections(box[:0], np.float32([]), np.int32([])), 1.0),
    ):
        assert quantization.disagreement([one], [other]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.zoo
def test_int8_keeps_the_average_precision(convert, detector, coco_images, tmp_path):
    """AP loss of FPNLite coco17 in INT8 at most 0.010, calibrated on the 96 images; both typed forms."""
    annotations = need_shared("coco", "instances_val2017_subset.json")
    path = convert("fpnlite", "--batch_size", "dynamic")[0]
    model, ranges, left, _ = calibrated(path, tmp_path, need_shared("coco", "calibration"))
    quantized = quantization.quantize(model, ranges, left)

    def average_precision(detector):
        return coco.average_precision(annotations, coco_images, lambda image: detect_image(detector, image), 1)[0]

    reference = average_precision(detector("fpnlite", "--batch_size", "dynamic"))
    for form in (quantized, precision.to_half(quantized)):
        with OrtDetector(path, form) as int8:
            found = average_precision(int8)
        print(f"AP {reference:.4f}, in INT8 {found:.4f}")
        assert found >= reference - 0.010


BATCH = 2  # of the parts that TensorRT-RTX builds


def cut_at_nms(model):
    """The parts of a converted model before, between and behind its NMS, which TensorRT-RTX has no plugin for."""
    count = sum(node.op_type == "EfficientNMS_TRT" for node in model.graph.node)
    for part in range(count + 1):
        graph = gs.import_onnx(model)
        plugins = [node for node in graph.toposort().nodes if node.op == "EfficientNMS_TRT"]
        if part < count:
            graph.outputs = [tensor for tensor in plugins[part].inputs if isinstance(tensor, gs.Variable)]
        for tensor in graph.inputs if part else ():  # the first part's batch stays open
            tensor.shape = [BATCH, *tensor.shape[1:]]
        for node in plugins:
            for tensor in list(node.outputs):
                tensor.shape = [BATCH * groups(node), *tensor.shape[1:]]
                graph.inputs.append(tensor)
            node.outputs.clear()
        graph.cleanup(remove_unused_graph_inputs=True).toposort()
        graph.import_domains = [domain for domain in graph.import_domains if domain.domain != onnx_utils.PLUGIN_DOMAIN]
        yield gs.export_onnx(graph)


def groups(plugin):
    """How many images of the plugin each image is (trt_graph.py): the Reshape behind it puts them together again."""
    boxes = plugin.outputs[1]
    (reader, *_) = boxes.outputs
    return int(reader.inputs[1].values[1]) // boxes.shape[1] if reader.op == "Reshape" else 1


def parse_with_rtx(model):
    """(tensorrt, logger, builder, network, parser, which the network lives by) of TensorRT-RTX, strongly typed; needs no GPU."""
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is for Linux on x86-64")
    logger = trt_detector.make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(build_engine.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return trt, logger, builder, network, parser


def build_with_rtx(model):
    """Size of the engine that its builder makes for compute capability 8.0."""
    trt, logger, builder, network, _parser = parse_with_rtx(model)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    if -1 in network.get_input(0).shape:
        build_engine.add_profile(builder, config, network, (1, BATCH, 4))
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, logger.errors
    return engine.nbytes


def test_for_one_batch_size_an_engine_is_fixed(convert):
    """TensorRT 8.6 fixes it by itself, and what the engine's metadata say must be so."""
    part = next(cut_at_nms(onnx_utils.load(convert("demo", "--batch_size", "dynamic")[0])))
    _, _, builder, network, _parser = parse_with_rtx(part)
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for batch, size in (((1, 2, 3), -1), ((3, 3, 3), 3)):
        build_engine.add_profile(builder, builder.create_builder_config(), network, batch)
        assert {tensor.shape[0] for tensor in (network.get_input(0), *outputs)} == {size}


@pytest.mark.parametrize("key", [*KEYS, "mask", "faster"])
def test_the_half_form_builds_strongly_typed(key, convert, exported):
    """Everything but the NMS: of an SSD two parts, of a Faster R-CNN three, with the crop in the middle."""
    made = exported if key in EXPORTS else convert
    path = next(x for x in made(key, "--batch_size", "dynamic") if str(x).endswith(".onnx"))
    model = trt_graph.prepare(onnx_utils.load(path), BATCH)
    assert [groups(node) for node in gs.import_onnx(model).nodes if node.op == "EfficientNMS_TRT"][-1] > 1
    forms = (build_engine.typed_model(wanted, model, None) for wanted in ("fp32", "fp16"))
    sizes = [[build_with_rtx(part) for part in cut_at_nms(form)] for form in forms]
    assert len(sizes[0]) == len(sizes[1]) == (2 if key in ("demo", "fpnlite") else 3)
    assert min(map(min, sizes)) > 0
    if key not in EXPORTS:  # those are hardly any weights
        assert sizes[1][0] < 0.8 * sizes[0][0]
        assert sum(sizes[1]) < 0.8 * sum(sizes[0])


def test_suppression_by_rounds_finds_the_same_without_a_plugin(convert, coco_images, capsys):
    """By benchmarks/bench_rounds.py, bit for bit on photos; in FP16 the whole builds, suppression in FP32."""
    path, _ = convert("fpnlite", "--batch_size", "dynamic")
    args = ["check", "--onnx", str(path), "--input", str(coco_images[0].parent), "--images", "3"]
    assert bench_rounds.main([*args, "--forms", "rounds", "rounds:pairs=512"]) == 1
    enough, too_few = capsys.readouterr().out.splitlines()
    assert enough.startswith("rounds, 1 suppressions by rounds, against the plugin: 3 bit for bit")
    assert too_few.endswith("2 not the same of 3 images")
    plain = trt_graph.prepare(onnx_utils.load(path), BATCH)
    model = bench_rounds.Form("rounds").prepare(onnx_utils.load(path), BATCH)
    rounds = {node.name for node in model.graph.node if node.name.startswith("rounds_")}
    before = {name for name in precision.float32_names(plain) if not name.startswith("suppression_")}
    parts = {node.name for node in model.graph.node if node.op_type == "TopK" and "/parts/" in node.name}
    (chosen,) = {name.split("/parts/")[0] for name in parts}  # the TopK that these stand for
    assert precision.float32_names(model) >= before - {chosen} | rounds | parts
    assert build_with_rtx(precision.to_half(model)) > 0


@pytest.mark.parametrize(
    ("turns", "replaced"), [((0, 3, 4, 5, 1, 2), True), ((0, 4, 3, 1, 5, 2), False)], ids=["upsampling", "tiles"]
)
def test_upsampling_is_two_gathers(turns, replaced):
    """As TFOD's ops.nearest_neighbor_upsampling is exported: copies put side by side, then in order."""
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("maps", np.float32, ["b", 3, 4, 5])])
    ops = onnx_utils.OpBuilder(graph, "test")
    maps = ops.add("Unsqueeze", graph.inputs[0], np.int64([1]))
    maps = ops.add("Unsqueeze", ops.add("Concat", maps, maps, axis=1), np.int64([4]))
    maps = ops.add("Transpose", ops.add("Concat", maps, maps, maps, axis=4), perm=list(turns))  # [b, 2, 3, 4, 3, 5]
    maps = ops.add("Transpose", ops.reshape(maps, [0, 12, 10, 3]), perm=[0, 3, 1, 2])
    graph.outputs = [ops.add("Neg", maps)]
    model = gs.export_onnx(graph)
    model.ir_version = 8
    prepared = trt_graph.prepare(model, 1)
    onnx.checker.check_model(prepared)
    assert ([node.op_type for node in prepared.graph.node] == ["Gather", "Gather", "Neg"]) == replaced
    given = {"maps": np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)}
    a, b = (onnxruntime.InferenceSession(x.SerializeToString()).run(None, given)[0] for x in (model, prepared))
    np.testing.assert_array_equal(a, b)
    if replaced:
        np.testing.assert_array_equal(a, -given["maps"].repeat(3, axis=2).repeat(2, axis=3))


@pytest.mark.parametrize("shape", [[0, -1], [-1, 60], [0, 0, 0, -1], [0, 5, 4, 3], [0, 3, 20]], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_what_is_no_upsampling_is_left(axis, shape):
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("maps", np.float32, ["b", 3, 4, 5])])
    ops = onnx_utils.OpBuilder(graph, "test")
    maps = ops.add("Unsqueeze", graph.inputs[0], np.int64([1]))
    graph.outputs = [ops.add("Neg", ops.reshape(ops.add("Concat", maps, maps, axis=axis), shape))]
    prepared = trt_graph.prepare(gs.export_onnx(graph), 1)
    assert [node.op_type for node in prepared.graph.node] == ["Unsqueeze", "Concat", "Reshape", "Neg"]


def test_the_quantized_form_builds_strongly_typed(int8_demo):
    _, model, ranges, _, _ = int8_demo
    model = trt_graph.prepare(model, BATCH)
    for part in cut_at_nms(build_engine.typed_model("int8", model, (ranges, []))):
        assert build_with_rtx(part) > 0


def test_the_metadata_travels_in_the_engines_name(convert):
    metadata = open_detector(convert("demo")[0]).metadata
    name = build_engine.engine_name(metadata)
    assert len(name.encode()) < build_engine.LONGEST_NAME
    assert json.loads(name)[onnx_utils.METADATA_KEY] == metadata
    with pytest.raises(UserError, match="too long for an engine"):
        build_engine.engine_name({**metadata, "source": "x" * 5000})


def command(*options):
    process = subprocess.run(
        [sys.executable, ROOT / "build_engine.py", *map(str, options)], capture_output=True, text=True, cwd=ROOT
    )
    return process.returncode, process.stdout + process.stderr


def test_mistakes_are_one_line(convert, tmp_path):
    fixed, free = convert("demo")[0], convert("demo", "--batch_size", "dynamic")[0]
    engine = tmp_path / "engine.trt"
    foreign = tmp_path / "foreign.onnx"
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), foreign)
    for options, said in (
        (("--onnx", tmp_path / "none.onnx", "--engine", engine), "none.onnx"),
        (("--onnx", foreign, "--engine", engine), "was not made by this tool's create_onnx.py"),
        (("--onnx", fixed, "--engine", foreign / "engine.trt"), "cannot create the folder"),
        (("--onnx", fixed, "--engine", engine, "--batch", 1, 2, 4), "--batch_size dynamic"),
        (("--onnx", free, "--engine", engine, "--batch", 4, 2, 8), "--batch 4 2 8"),
        (("--onnx", free), "--engine: name the engine"),
        (("--onnx", free, "--typed_onnx", foreign / "typed.onnx"), "cannot create the folder"),
        (("--onnx", free, "--engine", engine, "--precision", "int8"), "--calib_input"),
        (
            ("--onnx", free, "--engine", engine, "--precision", "int8", "--calib_input", tmp_path / "none"),
            "--calib_input /",
        ),
    ):
        status, text = command(*options)
        assert status == 2, text
        assert len(text.strip().splitlines()) == 1, text
        assert said in text
    assert {path.name for path in tmp_path.iterdir()} == {"foreign.onnx"}


def test_without_tensorrt_it_says_what_to_install(convert, tmp_path):
    status, text = command("--onnx", convert("demo")[0], "--engine", tmp_path / "engine.trt")
    assert (status, len(text.strip().splitlines())) == (2, 1), text
    assert "requirements-gpu.txt" in text or "no NVIDIA GPU" in text
    (tmp_path / "engine.trt").write_bytes(b"not an engine")
    with pytest.raises(UserError, match=r"engine\.trt: "):
        open_detector(tmp_path / "engine.trt")


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_the_typed_graph_needs_no_tensorrt(kind, convert, detector, int8_demo, tmp_path):
    """It alone is written, in the precision that it says of itself, and finds what the model does."""
    path = tmp_path / "typed.onnx"
    options = ["--calib_cache", int8_demo[-1].calib_cache] if kind == "int8" else []
    model = convert("demo", "--batch_size", "dynamic")[0]
    status, text = command("--onnx", model, "--typed_onnx", path, "--precision", kind, *options)
    assert status == 0, text
    assert f"Wrote {path} ({kind}" in text
    assert "infer.py --engine" in text
    assert [file.name for file in tmp_path.iterdir()] == ["typed.onnx"]
    typed = onnx_utils.load(path)
    assert onnx_utils.read_metadata(typed, path)["precision"] == kind
    assert types_by_op(typed)["Conv"] == {"float32" if kind == "fp32" else "float16"}
    assert any(node.op_type == "QuantizeLinear" for node in typed.graph.node) == (kind == "int8")
    pictures = [load_image(picture) for picture in sorted((DEMO / "images").glob("*.jpg"))[4:]]
    reference = [detect_image(detector("demo", "--batch_size", "dynamic"), picture) for picture in pictures]
    with open_detector(path) as opened:
        apart = quantization.disagreement(reference, [detect_image(opened, picture) for picture in pictures])
    least, most = {"fp32": (0, 1e-5), "fp16": (1e-5, 0.02), "int8": (1e-3, 2 * quantization.HARMLESS)}[kind]
    assert least <= apart <= most
    status, text = command("--onnx", path, "--typed_onnx", tmp_path / "again.onnx")
    assert (status, "typed.onnx: --typed_onnx made it" in text) == (2, True), text


def test_without_tensorrt_the_typed_graph_is_written_all_the_same(convert, tmp_path):
    if find_spec("tensorrt"):
        pytest.skip("TensorRT is installed")
    typed, engine = tmp_path / "typed.onnx", tmp_path / "engine.trt"
    status, text = command("--onnx", convert("demo")[0], "--engine", engine, "--typed_onnx", typed)
    warning, wrote = text.strip().splitlines()[::-1]  # stdout comes first here
    assert status == 1
    assert warning.startswith(f"warning: --engine {engine}: TensorRT cannot be imported")
    assert warning.endswith(f"No engine is built; only {typed} is written")
    assert f"Wrote {typed} (fp16" in wrote
    assert [file.name for file in tmp_path.iterdir()] == ["typed.onnx"]


def test_help_has_examples():
    status, text = command("--help")
    assert status == 0
    assert text.count("python build_engine.py") >= 3
