"""The plugin's stand-in in standard ONNX ops does what EfficientNMS_TRT does (../shared/notes/tensorrt.md)."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

import onnx_utils
from runtimes import standard_graph, trt_graph
from tfod import faster_rcnn, nms


def plugin(boxes, scores, score_threshold, iou_threshold, kept):
    """The plugin's rule in numpy, for one image: boxes [N, 4] or [N, C, 4], scores [N, C]; lists (box, score, class)."""
    count, classes = scores.shape
    per_class = boxes if boxes.ndim == 3 else np.repeat(boxes[:, None], classes, axis=1)
    order = np.argsort(-scores, axis=None, kind="stable")[: onnx_utils.PLUGIN_MAX_PAIRS]
    chosen = []
    for row, label in zip(*np.unravel_index(order, (count, classes)), strict=True):
        if scores[row, label] < score_threshold or len(chosen) == kept:
            break
        box = per_class[row, label]
        if all(label != other or overlap(box, b) < iou_threshold for b, _, other in chosen):
            chosen.append((box, scores[row, label], label))
    return chosen


def overlap(a, b):
    inter = (np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])).clip(min=0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inter
    return inter / union if union > 0 else 0.0


def run(boxes, scores, most=None, **settings):
    """Runs the node's replacement on ONNX Runtime; boxes [B, N, (C,) 4], scores [B, N, C].

    most: first as trt_graph.prepare arranges it for batches of up to that.
    """
    graph = gs.Graph(opset=onnx_utils.OPSET)
    a = gs.Variable("boxes", np.float32, ["B", *boxes.shape[1:]])
    b = gs.Variable("scores", np.float32, ["B", *scores.shape[1:]])
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.inputs, graph.outputs = [a, b], onnx_utils.efficient_nms(ops, a, b, **settings)
    model = gs.export_onnx(graph)
    model = standard_graph.prepare(trt_graph.prepare(model, most) if most else model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"boxes": boxes, "scores": scores})


def random_case(rng, batch, count, classes, per_class):
    shape = (batch, count, classes, 2) if per_class else (batch, count, 2)
    corner = rng.random(shape) * 0.6
    boxes = np.concatenate([corner, corner + 0.05 + 0.3 * rng.random(shape)], axis=-1).astype(np.float32)
    return boxes, (rng.random((batch, count, classes)) ** 3).astype(np.float32)


# For batches of up to `most`, TensorRT gets the classes: all together (960), each by itself (8), in two groups or up to four
# (400, 250), which do not come out even.
@pytest.mark.parametrize("most", [None, 960, 8, 400, 240])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(("batch", "count", "classes"), [(1, 60, 5), (3, 40, 7), (2, 900, 9), (2, 3, 2)])
def test_same_as_the_plugin(most, per_class, batch, count, classes):
    boxes, scores = random_case(np.random.default_rng(count), batch, count, classes, per_class)
    settings = {"score_threshold": 0.02, "iou_threshold": 0.5}
    if most and count * classes > onnx_utils.PLUGIN_MAX_PAIRS:
        settings["score_threshold"] = 0.5  # in groups it looks at more pairs: leave fewer
    number, found, values, labels = run(boxes, scores, most, max_output_boxes=100, **settings)
    assert found.shape == (batch, 100, 4)
    for i in range(batch):
        wanted = plugin(boxes[i], scores[i], kept=100, **settings)
        assert number[i, 0] == len(wanted)
        np.testing.assert_array_equal(found[i, : len(wanted)], [box for box, _, _ in wanted])
        np.testing.assert_array_equal(values[i, : len(wanted)], [score for _, score, _ in wanted])
        np.testing.assert_array_equal(labels[i, : len(wanted)], [label for _, _, label in wanted])
        assert not found[i, len(wanted) :].any()
        assert not values[i, len(wanted) :].any()


def test_only_the_best_4096_pairs_are_looked_at():
    """All boxes alike: NMS leaves one a class, and a class whose pairs are not among the best 4,096 is never seen."""
    boxes = np.tile(np.float32([0, 0, 1, 1]), (1, 2048, 1))
    scores = np.stack([np.full(2048, s, np.float32) for s in (0.9, 0.8, 0.7)], axis=1)[None]
    number, _, values, labels = run(boxes, scores, score_threshold=0.1, iou_threshold=0.5, max_output_boxes=10)
    assert number[0, 0] == 2
    assert labels[0, :2].tolist() == [0, 1]
    assert values[0, 2] == 0


@pytest.mark.parametrize(
    ("most", "images"), [(1, 90), (8, 90), (10, 90), (11, 45), (32, 30), (64, 15), (480, 2), (960, 1)]
)
def test_tensorrt_gets_as_many_groups_as_it_can_take(most, images):
    graph = gs.Graph(opset=onnx_utils.OPSET)
    boxes = gs.Variable("boxes", np.float32, ["B", 20, 4])
    scores = gs.Variable("scores", np.float32, ["B", 20, 90])
    settings = {"score_threshold": 0.1, "iou_threshold": 0.5, "max_output_boxes": 10}
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.inputs, graph.outputs = [boxes, scores], onnx_utils.efficient_nms(ops, boxes, scores, **settings)
    model = trt_graph.prepare(gs.export_onnx(graph), most)
    onnx.checker.check_model(model)
    (node,) = [node for node in gs.import_onnx(model).nodes if node.op == "EfficientNMS_TRT"]
    assert node.inputs[1].shape[1:] == [20, -(-90 // images)]
    assert most * images <= trt_graph.PLUGIN_MAX_IMAGES


def test_thresholds_are_inclusive():
    boxes = np.float32([[[0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0, 1, 0.49]]])
    scores = np.float32([[[0.9], [0.5], [0.25]]])
    number, found, *_ = run(boxes, scores, score_threshold=0.25, iou_threshold=0.5, max_output_boxes=5)
    assert number[0, 0] == 2  # IoU 0.5 is suppressed, score 0.25 is kept
    np.testing.assert_array_equal(found[0, 1], boxes[0, 2])


def test_nothing_above_the_threshold():
    boxes, scores = random_case(np.random.default_rng(1), 2, 20, 3, False)
    number, found, values, _ = run(boxes, scores * 0.01, score_threshold=0.5, iou_threshold=0.5, max_output_boxes=10)
    assert number.tolist() == [[0], [0]]
    assert not found.any()
    assert not values.any()


def evaluate(graph, **feeds):
    """The outputs of a graphsurgeon graph on ONNX Runtime."""
    model = standard_graph.prepare(gs.export_onnx(graph.cleanup().toposort()))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


RNG = np.random.default_rng(11)
LOGITS = {
    "spread": RNG.normal(-8, 4, (2, 9000)),
    "far off": np.concatenate([np.full((2, 1), -80.0), RNG.normal(-8, 2, (2, 8998)), np.full((2, 1), 30)], axis=1),
    "alike": np.full((2, 9000), -3.0),
    "many ties": RNG.integers(-3, 3, (2, 9000)),
    "few high": np.concatenate([RNG.normal(5, 1, (2, 50)), np.full((2, 8950), -15.0)], axis=1),
}


@pytest.mark.parametrize("name", LOGITS)
def test_the_largest_without_sorting(name):
    logits = LOGITS[name].astype(np.float32)[..., None]
    graph = gs.Graph(opset=onnx_utils.OPSET)
    values = gs.Variable("values", np.float32, ["B", 9000, 1])
    graph.inputs = [values]
    graph.outputs = [nms.among_largest(onnx_utils.OpBuilder(graph, "test"), values, 4096)]
    (found,) = evaluate(graph, values=logits)
    for image, chosen in zip(logits, found, strict=True):
        assert chosen[image >= np.sort(image[:, 0])[-4096]].all()
    if name in ("spread", "far off"):
        assert found.sum(axis=1).max() < 4150


@pytest.mark.parametrize("name", LOGITS)
def test_proposals_are_those_of_all_anchors(name):
    """Much is left out before the plugin sorts, and nothing that it would have looked at."""
    rng = np.random.default_rng(2)
    logits = LOGITS[name].astype(np.float32)
    corner = rng.random((9000, 2)) * 0.8
    anchors = np.concatenate([corner, corner + 0.02 + 0.18 * rng.random((9000, 2))], axis=1).astype(np.float32)
    graph = gs.Graph(opset=onnx_utils.OPSET)
    objectness = gs.Variable("objectness", np.float32, ["B", 9000, 2])
    encodings = gs.Variable("encodings", np.float32, ["B", 9000, 4])
    graph.inputs = [objectness, encodings]
    settings = nms.NmsSettings(0.0, 0.7, 300, 300)
    ops = onnx_utils.OpBuilder(graph, "test")
    scales = (10.0, 10.0, 5.0, 5.0)
    proposals = faster_rcnn.add_proposals(ops, objectness, encodings, anchors, scales, settings, None)
    (sorted_scores,) = [node.inputs[1] for node in graph.nodes if node.op == "EfficientNMS_TRT"]
    graph.outputs = [*proposals, sorted_scores]
    pairs = np.stack([np.zeros_like(logits), logits], axis=2)
    found, valid, sorted_scores = evaluate(graph, objectness=pairs, encodings=np.zeros((2, 9000, 4), np.float32))
    if name in ("spread", "far off"):
        assert np.count_nonzero(sorted_scores, axis=1).max() < 4150
    for i in range(2):
        scores = (1 / (1 + np.exp(-logits[i]))).astype(np.float32)
        tiny = np.finfo(np.float32).tiny
        wanted = [box for box, _, _ in plugin(anchors, scores[:, None], tiny, 0.7, 300)]
        assert valid[i].sum() == len(wanted) > 200
        np.testing.assert_allclose(found[i, : len(wanted)], wanted, atol=1e-6)
