"""The experiment of benchmarks/nms_by_rounds.py does what EfficientNMS_TRT does, and tells where it does not."""

import dataclasses

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from test_nms import plugin, random_case

import onnx_utils
from benchmarks import nms_by_rounds

SIZES = nms_by_rounds.Sizes()
# Two steps even for few pairs.
SMALL = nms_by_rounds.Sizes(parts=4, each=64, pairs=160, first=64, left=128, rounds=24)
SETTINGS = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_output_boxes": 40}


def run(boxes, scores, sizes, half=False, **settings):
    """(number, boxes, scores, classes, exact) for boxes [B, N, (C,) 4] and scores [B, N, C]."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    a = gs.Variable("boxes", np.float32, ["B", *boxes.shape[1:]])
    b = gs.Variable("scores", np.float32, ["B", *scores.shape[1:]])
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.inputs, graph.outputs = [a, b], onnx_utils.efficient_nms(ops, a, b, **SETTINGS, **settings)
    model, _ = nms_by_rounds.replace(nms_by_rounds.prepare(gs.export_onnx(graph), 8, sizes), sizes, half, check=True)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"boxes": boxes, "scores": scores})


def same_as_plugin(found, boxes, scores):
    number, chosen, values, labels, _ = found
    for i in range(len(boxes)):
        wanted = plugin(boxes[i], scores[i], *SETTINGS.values())
        used = number[i, 0]
        assert used == len(wanted) > 0
        np.testing.assert_array_equal(chosen[i, :used], [box for box, _, _ in wanted])
        np.testing.assert_array_equal(values[i, :used], [score for _, score, _ in wanted])
        np.testing.assert_array_equal(labels[i, :used], [label for _, _, label in wanted])
        assert not chosen[i, used:].any()
        assert not values[i, used:].any()
        assert not labels[i, used:].any()


@pytest.mark.parametrize("sizes", [SIZES, SMALL, dataclasses.replace(SMALL, topk=1)], ids=["one step", "two", "TopK"])
@pytest.mark.parametrize(
    ("batch", "count", "classes", "per_class", "half"),
    [(3, 60, 7, False, True), (3, 60, 7, True, False), (2, 300, 1, False, True), (2, 3, 2, False, False)],
)
def test_same_as_the_plugin(sizes, batch, count, classes, per_class, half):
    boxes, scores = random_case(np.random.default_rng(count), batch, count, classes, per_class)
    boxes[:, ::2] *= 2  # some overlap little
    found = run(boxes, scores, sizes, half)
    same_as_plugin(found, boxes, scores)
    assert found[-1].all()


def chain(length, step=0.25):
    """Boxes each of which overlaps the next by 0.6, and none else by more than 0.33, best first: every other one is kept.

    [1, length, 4], [1, length, 1]. step: of their sides.
    """
    low = step * np.arange(length, dtype=np.float32)
    boxes = np.stack([low * 0, low, low * 0 + 1, low + 1], axis=1)
    return boxes[None], np.linspace(0.9, 0.1, length, dtype=np.float32)[None, :, None]


@pytest.mark.parametrize("sizes", [SIZES, SMALL], ids=["one step", "two"])
def test_it_tells_when_the_rounds_do_not_suffice(sizes):
    """A chain of so many suppressions is right after as many rounds; what comes after the last box kept is of no account."""
    for length, rounds, exact in ((20, 20, 1), (40, 12, 0), (160, 85, 1)):
        boxes, scores = chain(length)
        found = run(boxes, scores, dataclasses.replace(sizes, rounds=rounds))
        assert found[-1].tolist() == [[exact]]
        if exact:
            same_as_plugin(found, boxes, scores)


def test_it_tells_when_the_pairs_do_not_suffice():
    apart = np.arange(60, dtype=np.float32)
    boxes = np.stack([apart, apart * 0, apart + 1, apart * 0 + 1], axis=1)
    crowd = np.concatenate([np.repeat(boxes[:20], 20, axis=0), boxes[20:]])[None]  # the best 400 are 20 boxes
    scores = np.linspace(0.9, 0.1, 440, dtype=np.float32)[None, :, None]
    for sizes, number in ((SMALL, 8), (SIZES, 40)):
        found = run(crowd, scores, sizes)
        assert found[0].tolist() == [[number]]
        assert found[-1].tolist() == [[int(number == 40)]]
    same_as_plugin(found, crowd, scores)


def test_it_tells_when_a_part_has_more_of_the_best_than_it_gives():
    apart = np.arange(400, dtype=np.float32)
    boxes = np.stack([apart, apart * 0, apart + 1, apart * 0 + 1], axis=1)[None]
    scores = np.linspace(0.5, 0.1, 400, dtype=np.float32)[None, :, None]
    found = run(boxes, scores, SMALL)
    assert found[-1].tolist() == [[1]]
    same_as_plugin(found, boxes, scores)
    scores[:, ::4] += 0.4
    assert run(boxes, scores, SMALL)[-1].tolist() == [[0]]


def test_it_tells_when_too_many_are_left_for_the_second_step():
    """Of a chain whose every fourth box is kept, a few rounds suppress hardly any for sure."""
    boxes, scores = chain(200, step=0.1)
    for sizes, exact in ((SMALL, 0), (SIZES, 1)):
        found = run(boxes, scores, dataclasses.replace(sizes, pairs=200, rounds=140))
        assert found[-1].tolist() == [[exact]]
    same_as_plugin(found, boxes, scores)
