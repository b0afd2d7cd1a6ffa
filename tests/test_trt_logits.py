"""runtimes/trt_logits.py: the best class of each anchor, and the logits of the best anchors, are what they were."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import need_shared

import onnx_utils
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import standard_graph, trt_graph, trt_logits
from runtimes.detector import input_spec, network_inputs

ANCHORS, SIZES = (3, 2, 4), ((4, 5), (2, 3), (1, 1))  # of three maps
MAPS = [f"map_{i}" for i in range(len(SIZES))]
COLUMNS = 21


def ssd_tail(columns=COLUMNS, first=1, **changed):
    """(model, feeds) of what an SSD does with its maps of logits: the best class of each anchor, and the logits of the best
    7 anchors. changed: what is other than tfod.ssd does it."""
    usual = {"turn": [0, 2, 3, 1], "axis": 2, "last": None, "width": None, "fold": 1, "keep": 0, "take": "rows"}
    how = SimpleNamespace(**usual | {"of_rows": None, "of_scores": None, "given": None} | changed)
    shapes = [[2, anchors * columns, *size] for anchors, size in zip(ANCHORS, SIZES, strict=True)]
    maps = [gs.Variable(name, np.float32, ["b", *shape[1:]]) for name, shape in zip(MAPS, shapes, strict=True)]
    maps[0].shape[3] = how.width or maps[0].shape[3]
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=maps)
    ops, rows = onnx_utils.OpBuilder(graph, "test"), []
    for tensor, (_, channels, height, width) in zip(maps, shapes, strict=True):
        if (height, width) != (1, 1):  # where tf2onnx drops the Transpose
            tensor = ops.add("Transpose", tensor, perm=how.turn)
        places = height * width * channels // columns
        rows.append(ops.reshape(tensor, [0 if how.fold == 1 else -1, places // how.fold, columns]))
    logits = ops.add("Concat", *rows, axis=1)
    others = [ops.add(how.of_rows, logits)] if how.of_rows else []
    everything = logits
    if first or how.axis != 2:
        logits = ops.slice(logits, how.axis, first, how.last or columns)
        if not how.axis:  # which is what ONNX takes where axes are not given
            logits.inputs[0].inputs = list(logits.inputs[0].inputs)[:3]
    best = ops.add("ReduceMax", logits, axes=[2], keepdims=how.keep)
    _, index = ops.top_k(ops.reshape(best, [0, -1]), 7)
    if how.take == "rows":
        taken = ops.gather_rows(logits, index)
    elif how.take == "images":
        images = ops.add("Unsqueeze", ops.add("Mul", index, np.int64([0])), np.int64([2]))
        taken = ops.add("GatherND", logits, images, batch_dims=0)
    else:  # an element of each row
        places = ops.add("Concat", *[ops.add("Unsqueeze", index, np.int64([1, 3]))] * 2, axis=3)
        places = ops.add("Mul", places, np.int64([1, 0]))
        taken = ops.add("GatherND", logits, places, batch_dims=1)
    graph.outputs = [best, taken, *others]
    if how.of_scores:
        graph.outputs.append(ops.add(how.of_scores, logits))
    if how.given:
        graph.outputs.append({"logits": everything, "scores": logits}[how.given])
    model = gs.export_onnx(graph)
    model.ir_version = 8
    rng = np.random.default_rng(columns)
    # To one digit: some are equal.
    return model, {name: rng.normal(size=x).round(1).astype(np.float32) for name, x in zip(MAPS, shapes, strict=True)}


def same(model, prepared, feeds):
    onnx.checker.check_model(prepared)
    for a, b in zip(
        *(onnxruntime.InferenceSession(x.SerializeToString()).run(None, feeds) for x in (model, prepared)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def ops_of(model):
    return [node.op_type for node in model.graph.node]


def turned(model):
    """The maps that are put place by place."""
    return [node.input[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in MAPS]


@pytest.mark.parametrize("first", [0, 1], ids=["classes", "with background"])
@pytest.mark.parametrize("columns", [2, 3, 16, 17, 21, 92, 301])
def test_maps_of_logits_stay_as_they_lie(columns, first):
    model, feeds = ssd_tail(columns, first)
    prepared = trt_graph.prepare(model, 1)
    assert "ReduceMax" not in ops_of(prepared)
    chosen_from = columns - first
    steps = (chosen_from > 16) + (chosen_from > 272)  # of all maps together, behind the first of each
    assert ops_of(prepared).count("Max") == (len(MAPS) + steps if chosen_from > 1 else 0)
    assert len(turned(model)) == 2
    assert not turned(prepared)
    same(model, prepared, feeds)


@pytest.mark.parametrize(
    "changed",
    [
        {"turn": [0, 3, 2, 1]},
        {"of_scores": "Neg"},
        {"of_rows": "Neg"},
        {"given": "logits"},
        {"given": "scores"},
        {"axis": 1, "last": 30},
        {"axis": 1, "first": 0, "last": 30},
        {"axis": 0, "last": 2, "first": 0},
        {"width": "w"},
        {"last": COLUMNS - 1},
        {"fold": 2},
        {"keep": 1},
        {"take": "elements"},
        {"take": "images"},
    ],
    ids=str,
)
def test_anything_else_is_left(changed):
    model, feeds = ssd_tail(**changed)
    prepared = trt_graph.prepare(model, 1)
    assert "ReduceMax" in ops_of(prepared)
    same(model, prepared, feeds)


def test_a_transpose_of_all_axes_is_left():
    """ONNX takes them in reverse where none are given."""
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("x", np.float32, [3, 4, 2 * COLUMNS, 2])])
    ops = onnx_utils.OpBuilder(graph, "test")
    rows = ops.reshape(ops.add("Transpose", graph.inputs[0]), [0, 24, COLUMNS])
    graph.outputs = [ops.add("ReduceMax", ops.add("Concat", rows, rows, axis=1), axes=[2], keepdims=0)]
    model = gs.export_onnx(graph)
    prepared = trt_graph.prepare(model, 1)
    assert "ReduceMax" in ops_of(prepared)
    assert ops_of(prepared).count("Max") == 0


@pytest.mark.parametrize("shape", [None, ["b", "n", "c"], ["b", 7]], ids=str)
@pytest.mark.parametrize("background", [False, True])
def test_logits_of_unknown_shape_are_left(background, shape):
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("x", np.float32, ["b", 6, 4, 5])])
    ops = onnx_utils.OpBuilder(graph, "test")
    rows = ops.reshape(ops.add("Transpose", graph.inputs[0], perm=[0, 2, 3, 1]), [0, -1, 3])
    logits = ops.add("Concat", rows, axis=1)
    rows.shape = logits.shape = shape
    scores = ops.slice(logits, 2, 1, 3) if background else logits
    graph.outputs = [ops.add("ReduceMax", scores, axes=[2], keepdims=0)]
    before = [node.op for node in graph.nodes]
    trt_logits.choose_as_they_lie(graph, {})
    assert [node.op for node in graph.nodes] == before


def test_a_model_finds_the_same(convert):
    path, _ = convert("fpnlite", "--batch_size", "dynamic")
    model = onnx_utils.load(path)
    metadata = onnx_utils.read_metadata(model, path)
    prepared = trt_graph.prepare(model, 2)
    assert "ReduceMax" in ops_of(model)
    assert "ReduceMax" not in ops_of(prepared)
    maps = {node.output[0] for node in model.graph.node if node.op_type == "Conv"}  # of logits and of boxes
    in_order = [[x for x in y.graph.node if x.op_type == "Transpose" and x.input[0] in maps] for y in (model, prepared)]
    assert [len(nodes) for nodes in in_order] == [10, 0]
    pictures = [
        preprocess(load_image(x), metadata["resizer"]) for x in sorted(need_shared("coco", "val2017").glob("*.jpg"))[:2]
    ]
    shapes = [placement.true_shape for _, placement in pictures]
    feeds = network_inputs(np.stack([x for x, _ in pictures]), shapes, input_spec(metadata))
    theirs, ours = (
        onnxruntime.InferenceSession(standard_graph.prepare(x, onnx_utils.PLUGIN_MAX_PAIRS).SerializeToString())
        for x in (model, prepared)
    )
    theirs, ours = theirs.run(None, feeds), ours.run(None, feeds)
    assert max(x.max() for x in theirs) > 0
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)


def test_the_largest_of_any_number_of_columns():
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("x", np.float32, ["b", 2, 300, 6])])
    ops, spans = onnx_utils.OpBuilder(graph, "test"), [(0, n) for n in range(1, 60)] + [(1, 92), (7, 300), (299, 300)]
    values = np.random.default_rng(0).normal(size=(1, 2, 300, 6)).astype(np.float32)
    for start, end in spans:
        found, left = trt_logits._fewer(ops, graph.inputs[0], 2, start, end)
        assert left <= max(1, (end - start) // 2)
        while left > 1:
            found, left = trt_logits._fewer(ops, found, 2, 0, left)
        graph.outputs.append(found)
    session = onnxruntime.InferenceSession(gs.export_onnx(graph).SerializeToString())
    for found, (start, end) in zip(session.run(None, {"x": values}), spans, strict=True):
        np.testing.assert_array_equal(found, values[:, :, start:end].max(axis=2, keepdims=True))
