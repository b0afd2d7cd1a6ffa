"""runtimes/trt_levels.py: heads over several levels at once give what they give level by level."""

import dataclasses

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

import build_engine
import onnx_utils
from checks import parity
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import nms_by_rounds, precision, standard_graph, trt_graph, trt_levels
from runtimes.detector import detect_image, input_spec, network_inputs
from runtimes.ort_detector import OrtDetector

SIZES = (8, 8), (4, 4), (2, 2), (1, 1)
CHANNELS = 5


@dataclasses.dataclass
class Head:
    """How a made-up head differs from one of TFOD's: over maps of `sizes`, each layer a convolution, a normalisation and `activation`."""

    sizes: tuple = SIZES
    layers: int = 2
    kernel: int = 3
    dilation: int = 1
    pads: tuple = ()  # usual: half of the kernel, all around
    stride: int = 1
    bias: bool = False
    normalized: bool = True
    activation: str = "Clip"
    low: float = 0
    high: tuple = (6, 6, 6, 6, 6, 6)  # of each level
    training: int = 0
    gammas: tuple = (-1, 3)
    own_weights: bool = False
    same: bool = False  # by auto_pad
    odd: bool = False  # another dilation of one level
    last_over: int = 9  # maps, the last convolution
    names: bool = False  # sizes by name
    read_between: bool = False  # the first layer's normalisation, by another node


def made(how):
    """A model of such heads: inputs map_0 ..., outputs of all."""
    rng = np.random.default_rng(3)
    shapes = [["b", CHANNELS, *(("h", "w") if how.names else size)] for size in how.sizes]
    maps = [gs.Variable(f"map_{i}", np.float32, shape) for i, shape in enumerate(shapes)]
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=maps)
    ops, extra = onnx_utils.OpBuilder(graph, "head"), []
    edge = [how.kernel // 2] * 4
    for layer in range(how.layers):
        shared = constants(rng, how, f"layer_{layer}")
        for i, x in enumerate(maps):
            weights = constants(rng, how, f"layer_{layer}_{i}") if how.own_weights else shared
            far = how.dilation + (how.odd and i == 2)
            pads = {"auto_pad": "SAME_UPPER"} if how.same else {"pads": [far * x for x in how.pads or edge]}
            x = ops.add("Conv", x, *weights, strides=[how.stride] * 2, dilations=[far] * 2, **pads)
            if how.normalized:
                gamma = rng.uniform(*how.gammas, CHANNELS)
                rest = rng.normal(size=(2, CHANNELS)), rng.uniform(0.1, 2, CHANNELS)
                values = [v.astype(np.float32) for v in (gamma, *rest[0], rest[1])]
                outputs = {"training_mode": 1, "outputs": 3} if how.training else {}
                x = ops.add("BatchNormalization", x, *values, **outputs)
                x = x[0] if how.training else x
            if how.read_between and not layer:
                extra.append(ops.add("Neg", x))
            maps[i] = activated(ops, x, how, how.high[i])
    shared = constants(rng, dataclasses.replace(how, bias=True), "last")
    last = {"pads": [how.dilation * x for x in edge], "dilations": [how.dilation] * 2}
    graph.outputs = [ops.add("Conv", x, *shared, **last) for x in maps[: how.last_over]]
    graph.outputs += maps[how.last_over :] + extra
    return onnx.shape_inference.infer_shapes(gs.export_onnx(graph))


def constants(rng, how, name):
    weights = rng.normal(size=(CHANNELS, CHANNELS, how.kernel, how.kernel)) / how.kernel
    values = [weights, rng.normal(size=CHANNELS)][: 1 + how.bias]
    return [gs.Constant(f"{name}/{i}", value.astype(np.float32)) for i, value in enumerate(values)]


def activated(ops, x, how, high):
    if how.activation == "Clip":
        return ops.add("Clip", x, np.float32(how.low), np.float32(high))
    if how.activation == "swish":
        return ops.add("Mul", x, ops.add("Sigmoid", x))
    return ops.add(how.activation, x) if how.activation else x


def joined(model):
    graph = precision.typed_graph(model)
    trt_levels.lay_side_by_side(graph)
    result = precision.export(graph, model)
    onnx.checker.check_model(result)
    return result


def count(model, op="Conv"):
    return [node.op_type for node in model.graph.node].count(op)


def run(model, feeds):
    model.ir_version = 8
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def same(model, changed, sizes):
    rng = np.random.default_rng(5)
    feeds = {f"map_{i}": rng.normal(size=(2, CHANNELS, *size)).astype(np.float32) for i, size in enumerate(sizes)}
    assert [x.name for x in model.graph.output] == [x.name for x in changed.graph.output]
    for a, b in zip(run(model, feeds), run(changed, feeds), strict=True):
        assert a.shape == b.shape and np.abs(a).max() > 0.1
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


@pytest.mark.parametrize(
    "how",
    [
        Head(),
        Head(bias=True),
        Head(activation="Relu"),
        Head(activation="swish"),
        Head(activation=None),
        Head(layers=4, gammas=(-2, -1)),
        Head(gammas=(0, 0)),
        Head(sizes=((9, 12), (6, 7), (3, 6))),
        Head(sizes=((4, 4), (8, 8), (1, 1), (2, 2))),  # in any order
        Head(sizes=((40, 40), (20, 20), (10, 10), (5, 5), (3, 3), (2, 2))),
        Head(kernel=1, normalized=False, activation=None),
        Head(same=True),
    ],
    ids=str,
)
def test_the_largest_level_apart_and_the_others_at_once(how):
    model = made(how)
    changed = joined(model)
    assert count(model) == len(how.sizes) * (how.layers + 1)
    assert count(changed) == 2 * (how.layers + 1)
    same(model, changed, how.sizes)


@pytest.mark.parametrize(
    ("how", "left"),
    [
        (Head(sizes=SIZES[:2]), 6),
        (Head(sizes=((8, 8), (4, 4), (4, 1))), 9),  # 9 of 24 places would be between them
        (Head(sizes=((16, 16), *SIZES[:3]), stride=2, layers=1), 6),  # its first layer; the last is joined
        (Head(own_weights=True), 10),
        (Head(names=True), 12),
        (Head(sizes=((100, 100), (60, 60), (4, 4))), 9),  # of more places than fit
        (Head(kernel=5), 12),
        (Head(kernel=5, same=True), 12),
        (Head(odd=True), 10),  # but for its last layer
        (Head(dilation=2), 12),
        (Head(pads=(0, 0, 2, 2)), 10),  # but for its last layer
    ],
    ids=str,
)
def test_what_is_nothing_to_join_is_left(how, left):
    model = made(how)
    changed = joined(model)
    assert count(changed) == left
    same(model, changed, how.sizes)


@pytest.mark.parametrize(
    "how",
    [
        Head(low=0.5),  # makes half of the zeros between maps
        Head(activation="Sigmoid"),
        Head(read_between=True),
        Head(read_between=True, activation="swish"),
        Head(normalized=False, activation="Relu"),
        Head(normalized=False, bias=True, activation=None),
        Head(high=(6, 6, 1, 6)),
        Head(sizes=((16, 16), (10, 10), (5, 5), (2, 2), (1, 1)), last_over=4),  # without the last map
    ],
    ids=str,
)
def test_where_no_zeros_stay_between_maps_they_are_laid_anew(how):
    model = made(how)
    changed = joined(model)
    assert (count(changed), count(changed, "Concat")) == (6, 2 if how.read_between or how.last_over == 4 else 3)
    same(model, changed, how.sizes)


def test_a_level_too_large_is_left_apart():
    how = Head(sizes=((100, 100), (60, 60), (30, 30), (15, 15)))
    model = made(how)
    changed = joined(model)
    assert count(changed) == 3 * 3  # two apart, two at once
    same(model, changed, how.sizes)


def test_statistics_of_a_batch_are_no_constants():
    model = made(Head(training=1))
    changed = joined(model)
    assert count(changed, "BatchNormalization") == 8
    same(model, changed, SIZES)


def test_maps_of_images_and_of_crops_are_left():
    graph = gs.Graph(opset=onnx_utils.OPSET)
    shapes = [2, CHANNELS, 8, 8], [2, CHANNELS, 4, 4], [8, CHANNELS, 4, 4]
    graph.inputs = [gs.Variable(f"map_{i}", np.float32, shape) for i, shape in enumerate(shapes)]
    ops, weights = onnx_utils.OpBuilder(graph, "head"), constants(np.random.default_rng(0), Head(), "shared")
    graph.outputs = [ops.add("Conv", x, *weights, pads=[1] * 4) for x in graph.inputs]
    assert count(joined(onnx.shape_inference.infer_shapes(gs.export_onnx(graph)))) == 3


def test_what_goes_through_the_same_weights_again_is_left():
    """As in a top-down path with weights of its own for all levels: what a level gives goes into the next."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    graph.inputs = [gs.Variable(f"map_{i}", np.float32, ["b", CHANNELS, *size]) for i, size in enumerate(SIZES)]
    ops, weights = onnx_utils.OpBuilder(graph, "path"), constants(np.random.default_rng(0), Head(), "shared")
    above = ops.add("Conv", graph.inputs[-1], *weights, pads=[1] * 4)
    graph.outputs = [above]
    for x in graph.inputs[-2::-1]:
        above = ops.add("Resize", above, np.float32([]), np.float32([1, 1, 2, 2]), mode="nearest")
        above = ops.add("Conv", ops.add("Add", x, above), *weights, pads=[1] * 4)
        graph.outputs.append(above)
    model = onnx.shape_inference.infer_shapes(gs.export_onnx(graph))
    changed = joined(model)
    assert count(changed) == 4
    same(model, changed, SIZES)


def test_what_the_graph_gives_in_between_it_still_gives():
    graph = gs.import_onnx(made(Head()))
    graph.outputs += [node.outputs[0] for node in graph.nodes if node.op in ("Conv", "Clip")][:6]
    model = onnx.shape_inference.infer_shapes(gs.export_onnx(graph))
    same(model, joined(model), SIZES)


def heads(model):
    """The maps of logits and of boxes."""
    graph = precision.typed_graph(model)
    turns = [node for node in graph.nodes if node.op == "Transpose" and node.attrs["perm"] == [0, 2, 3, 1]]
    graph.outputs = [node.inputs[0] for node in turns if node.inputs[0].inputs[0].op == "Conv"]
    return graph


@pytest.mark.parametrize(
    ("key", "convolutions"),
    [
        ("fpnlite", (123, 87)),
        pytest.param("efficientdet", (214, 166), marks=pytest.mark.zoo),
        pytest.param("resnet50_fpn", (110, 80), marks=pytest.mark.zoo),
    ],
)
def test_real_heads_give_the_same_maps(key, convolutions, convert, coco_images):
    path, _ = convert(key, "--batch_size", "dynamic")
    model = onnx_utils.load(path)
    metadata = onnx_utils.read_metadata(model, path)
    graph = heads(model)
    plain = precision.export(graph, model)
    changed = joined(plain)
    prepared = trt_graph.prepare(model, 1, few_images=True)
    assert (count(model), count(prepared)) == convolutions
    pixels, placed = preprocess(load_image(coco_images[0]), metadata["resizer"])
    feeds = network_inputs(pixels[None], [placed.true_shape], input_spec(metadata))
    feeds = {x.name: feeds[x.name] for x in plain.graph.input}
    maps = [run(x, feeds) for x in (plain, changed)]
    assert len(maps[0]) == 10
    for a, b in zip(*maps, strict=True):
        assert np.abs(a - b).max() <= 2e-6 * np.abs(a).max()


@pytest.mark.parametrize("form", ["plugin", "rounds"])
def test_detections_are_the_same(form, convert, coco_images, tmp_path):
    path, _ = convert("fpnlite", "--batch_size", "dynamic")
    model = onnx_utils.load(path)
    suppressed = nms_by_rounds.replace(model) if form == "rounds" else model
    apart, together = (
        standard_graph.prepare(trt_graph.prepare(suppressed, 1, few_images=x), onnx_utils.PLUGIN_MAX_PAIRS)
        for x in (False, True)
    )
    for prepared in (apart, together):
        prepared.metadata_props.extend(model.metadata_props)
    reports = []
    with OrtDetector(path, apart) as wanted, OrtDetector(path, together) as found:
        for image in map(load_image, coco_images[:6]):
            reports.append(parity.match_by_rank(detect_image(wanted, image), detect_image(found, image), tie=1e-5))
    report = parity.join(reports)
    assert report.compared == 600 and report.unmatched == 0
    assert max(report.box_difference, report.score_difference) < 1e-5


def test_an_engine_for_few_images_has_them_but_for_int8(convert):
    model = onnx_utils.load(convert("fpnlite", "--batch_size", "dynamic")[0])
    for options, batch, built, convolutions, plugins in (
        ([], (1, 8, 32), True, 87, 0),
        ([], (1, 8, 32), False, 123, 1),
        ([], (1, 32, 32), True, 123, 1),
        (["--suppression", "plugin"], (1, 1, 1), True, 87, 1),
        (["--precision", "fp32"], (1, 8, 8), True, 87, 0),
        (["--precision", "int8"], (1, 8, 8), True, 123, 0),
    ):
        args = build_engine.parse_args(["--onnx", "model.onnx", "--engine", "engine.trt", *options])
        prepared = build_engine.prepare(args, model, batch, built)
        assert (count(prepared), count(prepared, "EfficientNMS_TRT")) == (convolutions, plugins)


def test_in_half_precision_what_is_joined_stays_in_range():
    """A channel whose values a batch normalisation makes 1,000 times smaller: in FP16 they would be infinite before it."""
    how = Head(layers=1, gammas=(0.001, 0.001))
    model = made(how)
    rng = np.random.default_rng(0)
    feeds = {f"map_{i}": rng.normal(0, 30_000, (1, CHANNELS, *x)).astype(np.float32) for i, x in enumerate(SIZES)}
    graph = precision.typed_graph(model)
    trt_levels.lay_side_by_side(graph)
    (conv,) = [node for node in graph.nodes if node.op == "Conv" and len(node.inputs) == 2 and "levels" in node.name]
    graph.outputs = [conv.outputs[0]]
    assert np.abs(run(precision.export(graph, model), feeds)[0]).max() < np.finfo(np.float16).max


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_images_are_turned_behind_a_gather(dtype, convert):
    model = onnx_utils.load(convert("demo", "--batch_size", "dynamic", "--input_type", dtype)[0])
    prepared = trt_graph.prepare(model, 1)
    by_output = {name: node for node in prepared.graph.node for name in node.output}
    turn = next(x for x in prepared.graph.node if x.op_type == "Transpose" and x.attribute[0].ints[:] == [0, 3, 1, 2])
    gather = by_output[turn.input[0]]
    images = by_output[gather.input[0]].input[0] if dtype == "uint8" else gather.input[0]
    assert (gather.op_type, images) == ("Gather", "input_tensor")
    assert gather.name in precision.float32_names(prepared)
