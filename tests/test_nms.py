"""The plugin's stand-in in standard ONNX ops does what EfficientNMS_TRT does (../shared/notes/tensorrt.md)."""

import functools

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest

import onnx_utils
from runtimes import precision, standard_graph, trt_graph
from tfod import faster_rcnn, nms
from tfod.tensorflow_import import import_tensorflow


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
    model = standard_graph.prepare(trt_graph.prepare(model, most) if most else model, onnx_utils.PLUGIN_MAX_PAIRS)
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
    model = standard_graph.prepare(gs.export_onnx(graph.cleanup().toposort()), onnx_utils.PLUGIN_MAX_PAIRS)
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


def tfod(boxes, scores, settings):
    """TFOD's rule in numpy, for one image: boxes [N, 4] or [N, C, 4], scores [N, C]; lists (box, score, class).

    post_processing.multiclass_non_max_suppression and class_agnostic_non_max_suppression, clipped to [0, 1]; without
    drops_empty, TensorFlow's CombinedNonMaxSuppression. tf.image's suppression of one class is the same on both sides.
    """
    count, classes = scores.shape
    per_class = boxes if boxes.ndim == 3 else np.repeat(boxes[:, None], classes, axis=1)
    chosen = []
    if settings.class_agnostic:
        best = scores.argmax(axis=1)
        own = per_class[np.arange(count), best]
        picked = one_class(own, scores.max(axis=1), settings, settings.max_total)
        chosen = [(own[i], scores[i, best[i]], best[i]) for i in picked]
    else:
        for label in range(classes):
            picked = one_class(per_class[:, label], scores[:, label], settings, settings.max_per_class)
            chosen += [(per_class[i, label], scores[i, label], label) for i in picked]
        chosen.sort(key=lambda found: -found[1])
    chosen = [(box.clip(0, 1), score, label) for box, score, label in chosen]
    if settings.drops_empty:
        chosen = [found for found in chosen if np.prod(found[0][2:] - found[0][:2]) > 0]
    return chosen[: settings.max_total]


def one_class(boxes, scores, settings, most):
    """Rows that are left of one class, best first (tf.image.non_max_suppression)."""
    tf = import_tensorflow()
    limits = most, settings.iou_threshold, max(settings.score_threshold, 1e-30)
    return tf.image.non_max_suppression(boxes, scores, *limits).numpy()


def suppressed(boxes, scores, settings, prepare=standard_graph.prepare):
    """What nms.add_nms finds of boxes [B, N, (C,) 4] and scores [B, N, C] on ONNX Runtime: an NmsResult of arrays."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    a = gs.Variable("boxes", np.float32, ["B", *boxes.shape[1:]])
    b = gs.Variable("scores", np.float32, ["B", *scores.shape[1:]])
    graph.inputs = [a, b]
    a_shaped, b_shaped = (onnx_utils.OpBuilder(graph, f"in_{x.name}").add("Identity", x) for x in (a, b))
    a_shaped.shape, b_shaped.shape = [None, *boxes.shape[1:]], [None, *scores.shape[1:]]
    result = nms.add_nms(onnx_utils.OpBuilder(graph, "test"), a_shaped, b_shaped, settings)
    graph.outputs = list(result)
    for tensor in result:
        tensor.shape = [
            "B",
            1 if tensor is result.number else settings.max_total,
            *([4] if tensor is result.boxes else []),
        ]
    model = gs.export_onnx(graph.cleanup().toposort())
    assert max((len(x.raw_data) for x in model.graph.initializer), default=0) < 1e6, "a matrix of constants"
    model = prepare(model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return nms.NmsResult(*session.run([x.name for x in graph.outputs], {"boxes": boxes, "scores": scores}))


def crowded_case(seed, batch, count, classes, per_class=False, sure=0, spread=1.0):
    """Boxes that overlap, reach over the border and have no area within, here and there.

    sure: a class whose scores are above all of the others; None: they are alike.
    """
    rng = np.random.default_rng(seed)
    shape = (batch, count, classes, 2) if per_class else (batch, count, 2)
    corner = rng.random(shape) * 1.06 - 0.05  # one in fifty begins beyond 1
    boxes = np.concatenate([corner, corner + 0.01 + 0.1 * spread * rng.random(shape)], axis=-1).astype(np.float32)
    scores = rng.random((batch, count, classes)).astype(np.float32) * 0.5
    if sure is not None:
        scores[:, :, sure] += 0.5
    return boxes, scores


LIMITED = {
    "2 of 4": (2, 4, {}),
    "10 of 20": (10, 20, {}),
    "100 of 100": (100, 100, {}),
    "100 of 300": (100, 300, {}),
    "5 of 100": (5, 100, {}),
    "1000 of 1000": (1000, 1000, {}),
    "100 of 1000": (100, 1000, {}),
    "class-agnostic": (3, 60, {"class_agnostic": True}),
    "class-agnostic, many": (1000, 1000, {"class_agnostic": True}),
    "combined": (100, 100, {"drops_empty": False}),
    "combined, 7 of 60": (7, 60, {"drops_empty": False}),
}


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("name", LIMITED)
def test_limits_as_tfod_keeps_them(name, per_class):
    """More boxes of the surest class than the limit, boxes without area among them."""
    most, total, kind = LIMITED[name]
    settings = nms.NmsSettings(1e-8, 0.6, most, total, **kind)
    boxes, scores = crowded_case(3, 2, 3000, 3, per_class, sure=0 if settings.limits_classes else None)
    same_as_tfod(suppressed(boxes, scores, settings), boxes, scores, settings)


def same_as_tfod(found, boxes, scores, settings):
    assert found.boxes.shape == (len(boxes), settings.max_total, 4)
    for i in range(len(boxes)):
        wanted = tfod(boxes[i], scores[i], settings)
        used = found.number[i, 0]
        assert used == len(wanted) > 0
        np.testing.assert_array_equal(found.scores[i, :used], [score for _, score, _ in wanted])
        np.testing.assert_array_equal(found.classes[i, :used], [label for _, _, label in wanted])
        np.testing.assert_array_equal(found.boxes[i, :used], [box for box, _, _ in wanted])
        for rest in (found.boxes, found.scores, found.classes):
            assert not rest[i, used:].any()


def as_tensorrt(model):
    """The graph that TensorRT gets, with the plugin's limit of pairs; nothing in it sorts more than TensorRT does."""
    model = trt_graph.prepare(model, 1)
    sorts = [node for node in gs.import_onnx(model).nodes if node.op == "TopK"]
    assert sorts
    assert max(int(node.inputs[1].values[0]) for node in sorts) <= onnx_utils.TENSORRT_MAX_TOP_K
    return standard_graph.prepare(model, onnx_utils.PLUGIN_MAX_PAIRS)


def test_more_than_tensorrt_sorts_of_many_classes():
    """Of 1,000 of each of six classes TensorRT sorts 3,840: the best, and none of them twice."""
    settings = nms.NmsSettings(1e-8, 0.6, 1000, 4500)
    boxes, scores = crowded_case(6, 1, 3000, 6, sure=None, spread=0.1)
    boxes = boxes * np.float32(0.92) + np.float32(0.05)  # within the image
    boxes[:, ::100] += 2  # but for these
    found, cut = (suppressed(boxes, scores, settings, *form) for form in ((), (as_tensorrt,)))
    same_as_tfod(found, boxes, scores, settings)
    used = cut.number[0, 0]
    assert 3000 < used <= onnx_utils.TENSORRT_MAX_TOP_K
    np.testing.assert_array_equal(cut.boxes[0, :used], found.boxes[0, :used])


def test_where_all_suppress_all_suppression_sees_one_class():
    """The plugin of TensorRT 8.6 has a switch for that, and does nothing of it."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    scores = gs.Variable("scores", np.float32, ["B", 50, 4])
    graph.inputs, graph.outputs = [scores], []
    settings = nms.NmsSettings(1e-8, 0.6, 9, 9, class_agnostic=True)
    boxes = onnx_utils.OpBuilder(graph, "boxes").add("Slice", scores, np.int64([0]), np.int64([4]), np.int64([2]))
    boxes.shape = [None, 50, 4]
    nms.add_nms(onnx_utils.OpBuilder(graph, "test"), boxes, scores, settings)
    (node,) = [node for node in graph.nodes if node.op == "EfficientNMS_TRT"]
    assert "class_agnostic" not in node.attrs
    assert node.inputs[1].shape == [None, 50, 1]
    graph.outputs = [node.inputs[1]]
    values = np.random.default_rng(0).random((2, 50, 4)).astype(np.float32)
    (seen,) = evaluate(graph, scores=values)
    np.testing.assert_array_equal(seen[..., 0], values.max(axis=2))


def test_the_class_of_a_box_is_found_in_float32():
    """Behind a convolution, as in a model: in FP16 classes that score about the same would be one."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    images = gs.Variable("images", np.float32, ["B", 3, 50, 1])
    ops = onnx_utils.OpBuilder(graph, "test")
    found = ops.add("Conv", images, np.ones((8, 3, 1, 1), np.float32))
    found = ops.add("Transpose", ops.reshape(found, [0, 8, 50]), perm=[0, 2, 1])
    boxes, scores = ops.slice(found, 2, 0, 4), ops.slice(found, 2, 4, 8)
    boxes.shape, scores.shape = [None, 50, 4], [None, 50, 4]
    result = nms.add_nms(ops, boxes, scores, nms.NmsSettings(1e-8, 0.6, 9, 9, class_agnostic=True))
    graph.inputs, graph.outputs = [images], [result.boxes, result.scores, result.classes]
    wide = precision.float32_nodes(graph)
    assert [node.op for node in graph.nodes if id(node) not in wide and node.op not in precision.MOVING] == ["Conv"]
    assert {node.op for node in graph.nodes if id(node) in wide} >= {"ArgMax", "ReduceMax", "Abs", "ArgMin"}


@pytest.mark.parametrize("total", [2000, 4500])
def test_thousands_of_detections(total):
    """Rice grains: more than the plugin looks at, and more than TensorRT sorts."""
    settings = nms.NmsSettings(1e-8, 0.6, total, total)
    boxes, scores = crowded_case(5, 1, 9000, 1, spread=0.1)
    found = suppressed(boxes, scores, settings)
    assert found.number[0, 0] > 0.9 * total
    same_as_tfod(found, boxes, scores, settings)
    # In TensorRT: the first are the same, what is cut off is the end.
    cut = suppressed(boxes, scores, settings, as_tensorrt)
    used = cut.number[0, 0]
    assert 1500 < used <= min(total, onnx_utils.TENSORRT_MAX_TOP_K)
    np.testing.assert_array_equal(cut.boxes[0, :used], found.boxes[0, :used])
    assert not cut.boxes[0, used:].any()
    assert not cut.scores[0, used:].any()


# Images that 40 classes of a batch become: in one plugin, in two and in five.
@pytest.mark.parametrize("most", [1, 24, 48, 120])
@pytest.mark.parametrize("name", ["5 of 100", "100 of 100", "class-agnostic", "combined, 7 of 60"])
def test_tensorrt_gets_the_same(name, most):
    limit, total, kind = LIMITED[name]
    settings = nms.NmsSettings(0.1, 0.6, limit, total, **kind)
    boxes, scores = crowded_case(7, 2, 60, 40, sure=0 if settings.limits_classes else None, spread=6)
    boxes[:, 1::2] = boxes[:, ::2] + np.float32(0.002)  # pairs that suppress each other, of whatever class
    graphs = []

    def prepare(model):
        graphs.append(trt_graph.prepare(model, most))
        return standard_graph.prepare(graphs[0], onnx_utils.PLUGIN_MAX_PAIRS)

    same_as_tfod(suppressed(boxes, scores, settings, prepare), boxes, scores, settings)
    plugins = [node for node in gs.import_onnx(graphs[0]).nodes if node.op == "EfficientNMS_TRT"]
    if settings.limits_classes:
        assert len(plugins) == -(-40 // (960 // most))
        # An image of the plugin's is one class, and has no more of it than the limit.
        assert all(node.attrs["max_output_boxes"] == limit for node in plugins)
        assert all(node.inputs[1].shape[1:] == [60, 1] for node in plugins)


def test_a_limit_that_leaves_fewer_than_the_total():
    """One class, 2 of 4: two slots stay empty."""
    settings = nms.NmsSettings(1e-8, 0.6, 2, 4)
    boxes, scores = crowded_case(1, 2, 50, 1)
    found = suppressed(boxes, scores, settings)
    assert found.number.tolist() == [[2], [2]]
    same_as_tfod(found, boxes, scores, settings)


@pytest.mark.parametrize(
    ("detections", "available", "seen"),
    [
        (100, 12804, 1500),
        (100, 900, 900),
        (300, 12804, 3000),
        (384, 12804, 3840),
        (385, 12804, 12804),
        (4500, 51150, 51150),
    ],
)
def test_candidates_follow_from_the_limits(detections, available, seen):
    assert nms.candidates(detections, available) == seen


@pytest.mark.parametrize(
    ("available", "kept", "steps"),
    [
        (51_150, 1_500, 2),  # SSD ResNet50 640
        (12_804, 1_500, 1),  # FPNLite 320: a third less to sort is not worth it
        (51_153, 1_500, 2),
        (51_151, 1_500, 1),  # no parts are alike
    ],
)
def test_the_best_of_very_many_are_found_in_two_steps(available, kept, steps):
    """The same, equal ones too, in the same order."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    graph.inputs = [gs.Variable("values", np.float32, ["b", available])]
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = ops.top_k(graph.inputs[0], kept)
    for tensor in graph.outputs:
        tensor.shape = ["b", kept]
    model = gs.export_onnx(graph)
    model.ir_version = 8
    prepared = trt_graph.prepare(model, 8)
    assert [node.op_type for node in prepared.graph.node].count("TopK") == steps
    values = np.random.default_rng(0).integers(0, 500, (3, available)).astype(np.float32)
    run = functools.partial(onnxruntime.InferenceSession, providers=["CPUExecutionProvider"])
    results = [run(form.SerializeToString()).run(None, {"values": values}) for form in (model, prepared)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
