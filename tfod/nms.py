"""Non-maximum suppression (NMS) as TFOD does it, around the plugin EfficientNMS_TRT.

Shapes: B images, K candidates, C classes, M detections. Boxes are [ymin, xmin, ymax, xmax].
"""

import dataclasses
import math
import typing

import numpy as np

import onnx_utils
from onnx_utils import TENSORRT_MAX_TOP_K
from tfod.boxes import clip_boxes

# Of the boxes that suppression sees, the best by score: so many for each detection, and this many at least (docs/how-it-
# works.md, "How many candidates").
CANDIDATES_EACH, FEWEST_CANDIDATES = 10, 1500
# Detections taken beyond max_total_detections, in place of those that clipping leaves without area (at most 2 of 100 were
# seen): this many at least, and one in so many.
SPARE, SPARE_SHARE = 28, 16
# EfficientNMS: below this threshold it takes all scores to its sort, above it only those that pass.
DENSE_BELOW = 0.007
# Levels that `among_largest` tells apart at a time, and how far below the largest they reach.
STEPS = 64
WIDEST = 40.0


@dataclasses.dataclass(frozen=True)
class NmsSettings:
    """Of one non-maximum suppression."""

    score_threshold: float
    iou_threshold: float
    max_per_class: int  # detections of one class; of no account to class_agnostic
    max_total: int  # detections of all classes together
    class_agnostic: bool = False  # each box has its best class alone, and suppresses boxes of any
    drops_empty: bool = True  # boxes that clipping leaves without area are no detections

    @property
    def limits_classes(self):
        """Whether max_per_class leaves out what max_total would not."""
        return self.max_per_class < self.max_total and not self.class_agnostic

    @property
    def slots(self):
        """How many boxes to take from suppression so that, of them, finish_nms finds `max_total` to keep.

        Class-agnostic TFOD counts to max_total before it drops boxes, and has the fewer.
        """
        spare = self.drops_empty and not self.class_agnostic
        return self.max_total + (max(SPARE, self.max_total // SPARE_SHARE) if spare else 0)


class NmsResult(typing.NamedTuple):
    """ONNX tensors; unused slots hold zeros."""

    number: object  # [B, 1] int32
    boxes: object  # [B, M, 4]
    scores: object  # [B, M], falling
    classes: object  # [B, M] int32, 0-based


def nms_settings(post_processing, score_threshold):
    """The NmsSettings of a config's post_processing message, with that score threshold.

    use_combined_nms: TensorFlow's op CombinedNonMaxSuppression, which keeps boxes without area. use_static_shapes changes
    how TFOD computes the same.
    """
    nms = post_processing.batch_non_max_suppression
    return NmsSettings(
        score_threshold,
        nms.iou_threshold,
        nms.max_detections_per_class,
        nms.max_total_detections,
        class_agnostic=nms.use_class_agnostic_nms,
        drops_empty=not nms.use_combined_nms,
    )


def candidates(detections, available):
    """How many of the `available` boxes, the best, suppression is to see to find so many `detections`.

    All, where they would be more than TensorRT sorts.
    """
    wanted = max(FEWEST_CANDIDATES, CANDIDATES_EACH * detections)
    return min(wanted, available) if wanted <= TENSORRT_MAX_TOP_K else available


def find_nms_nodes(frozen, tensor):
    """Names of the TensorFlow nodes NonMaxSuppression that `tensor` is computed from."""
    return {name for name, op in frozen.ancestors(tensor).items() if op.startswith("NonMaxSuppression")}


def add_nms(ops, boxes, scores, settings, window=None, mostly_zero=False):
    """Non-maximum suppression of boxes [B, K, 4] or [B, K, C, 4] with scores [B, K, C], as TFOD does it.

    mostly_zero: whether most scores are 0. Returns an NmsResult; see finish_nms.
    """
    if settings.class_agnostic:
        boxes, scores, labels = _best_class_alone(ops, boxes, scores)
    # TensorFlow keeps what scores more than the threshold, the plugin what scores as much: a score of 0 is none.
    threshold = max(settings.score_threshold, float(np.finfo(np.float32).tiny))
    # Below DENSE_BELOW the plugin sorts all scores, also those under the threshold. A power of two changes no digit of them.
    factor = 2.0 ** max(0, math.ceil(math.log2(DENSE_BELOW / threshold))) if mostly_zero else 1.0
    if factor > 1:
        shape = scores.shape
        scores, threshold = ops.add("Mul", scores, np.float32(factor)), threshold * factor
        scores.shape = shape
    if settings.limits_classes:
        boxes, scores, classes = _suppress_by_class(ops, boxes, scores, settings, threshold)
    else:
        limits = {"score_threshold": threshold, "iou_threshold": settings.iou_threshold}
        given = boxes, scores
        _, boxes, scores, classes = onnx_utils.efficient_nms(ops, *given, max_output_boxes=settings.slots, **limits)
        if settings.class_agnostic:
            classes = _labels_of(ops, *given, labels, boxes, scores)
    if factor > 1:
        scores = ops.add("Mul", scores, np.float32(1 / factor))
    return finish_nms(ops, boxes, scores, classes, settings, window)


def _best_class_alone(ops, boxes, scores):
    """What class-agnostic suppression sees (post_processing.class_agnostic_non_max_suppression): each box [B, K, 4] with the
    score [B, K, 1] and the class [B, K] int32 of its best class.

    To suppression all are of one class: the plugin of TensorRT 8.6 takes `class_agnostic`, and does nothing of it.
    """
    count = scores.shape[1]
    labels = ops.add("ArgMax", scores, dtype=np.int64, axis=2, keepdims=1)
    if len(boxes.shape) == 4:
        boxes = ops.add("GatherND", boxes, labels, batch_dims=2)
        boxes.shape = [None, count, 4]
    scores = ops.add("ReduceMax", scores, axes=[2], keepdims=1)
    scores.shape = [None, count, 1]
    return boxes, scores, ops.cast(ops.reshape(labels, [0, count]), np.int32)


def _labels_of(ops, boxes, scores, labels, kept_boxes, kept_scores):
    """The labels [B, M] int32 of boxes that suppression kept, [B, M, 4] with scores [B, M], of those it was given: boxes
    [B, K, 4], scores [B, K, 1], labels [B, K]. The plugin does not say which it kept: the first that is the same. Arrays
    [B, M, K] are made: 0.6 MB an image for 100 of 1,500, 205 MB for 1,000 of 51,150.
    """
    kept = ops.add("Concat", kept_boxes, ops.add("Unsqueeze", kept_scores, np.int64([2])), axis=2)  # [B, M, 5]
    given = ops.add("Transpose", ops.add("Concat", boxes, scores, axis=2), perm=[0, 2, 1])  # [B, 5, K]
    apart = np.float32(0)
    for i in range(5):
        difference = ops.add("Sub", ops.slice(kept, 2, i, i + 1), ops.slice(given, 1, i, i + 1))  # [B, M, K]
        apart = ops.add("Add", ops.add("Abs", difference), apart)
    return ops.gather_rows(labels, ops.add("ArgMin", apart, dtype=np.int64, axis=2, keepdims=0))


def _suppress_by_class(ops, boxes, scores, settings, threshold):
    """Suppression of each class by itself: `max_per_class` of each at most, though all the best boxes be of one class.

    The plugin knows no such limit but that of an image: each class is an image of its own to it. Takes what add_nms takes.
    Returns boxes [B, L, 4], scores and classes (int32) [B, L], best first, unused slots zero.
    """
    count, classes = scores.shape[1:]
    limit = min(settings.max_per_class, count)
    scores = ops.add("Transpose", scores, perm=[0, 2, 1])  # [B, C, K]
    kept = candidates(limit, count)
    rows = None
    if kept < count:
        scores, rows = ops.top_k(scores, kept)
    if len(boxes.shape) == 4:
        boxes = ops.add("Transpose", boxes, perm=[0, 2, 1, 3])  # [B, C, K, 4]
        if rows is not None:
            boxes = ops.add("GatherND", boxes, ops.add("Unsqueeze", rows, np.int64([3])), batch_dims=2)
    elif rows is not None:
        boxes = ops.reshape(ops.gather_rows(boxes, ops.reshape(rows, [0, classes * kept])), [0, classes, kept, 4])
    else:
        boxes = ops.add("Expand", ops.add("Unsqueeze", boxes, np.int64([1])), np.int64([1, classes, 1, 1]))
    boxes, scores = onnx_utils.nms_of_each_class(
        ops,
        boxes,
        scores,
        (classes, kept),
        score_threshold=threshold,
        iou_threshold=settings.iou_threshold,
        limit=limit,
    )
    found = classes * limit
    if found < settings.max_total:
        missing = settings.max_total - found
        boxes = ops.add("Pad", boxes, np.int64([0, 0, 0, 0, missing, 0]), np.float32(0))
        scores = ops.add("Pad", scores, np.int64([0, 0, 0, missing]), np.float32(0))
        found = settings.max_total
    scores, slots = ops.top_k(scores, min(found, settings.slots))
    labels = np.minimum(np.arange(found, dtype=np.int32) // limit, classes - 1)
    boxes, labels = ops.gather_rows(boxes, slots), ops.add("Gather", labels, slots, axis=0)
    boxes.shape = [None, min(found, settings.slots), 4]
    return boxes, scores, labels


def finish_nms(ops, boxes, scores, classes, settings, window=None):
    """What TFOD does after suppression (post_processing.multiclass_non_max_suppression) and the plugin does not.

    boxes [B, L, 4], scores and classes [B, L], best first, unused slots zero. At most `max_per_class` of a class; clip to the
    window; drop the boxes that clipping left without area; the best M. Returns an NmsResult.
    """
    slots = boxes.shape[1]
    boxes = clip_boxes(ops, boxes, window)
    if settings.drops_empty:
        boxes, scores, classes, used = _drop_empty(ops, boxes, scores, classes, settings, slots)
    else:
        used = ops.add("Greater", scores, np.float32(0), dtype=bool)
    boxes = ops.add("Where", ops.add("Unsqueeze", used, np.int64([2])), boxes, np.float32(0), dtype=np.float32)
    scores = ops.add("Where", used, scores, np.float32(0), dtype=np.float32)
    classes = ops.add("Where", used, classes, np.int32(0), dtype=np.int32)
    number = ops.add("ReduceSum", ops.cast(used, np.int32), np.int64([1]), keepdims=1)
    return NmsResult(number, boxes, scores, classes)


def _drop_empty(ops, boxes, scores, classes, settings, slots):
    """Of L slots, the first M that hold a box with area, in their order: (boxes, scores, classes, used [B, M] bool).

    Of no class more than max_per_class, counted with those without area, as TFOD does.
    """
    size = ops.add("Sub", ops.slice(boxes, 2, 2, 4), ops.slice(boxes, 2, 0, 2))
    valid = ops.add("Greater", ops.add("ReduceProd", size, axes=[2], keepdims=0), np.float32(0), dtype=bool)
    if settings.max_per_class < slots and not (settings.limits_classes or settings.class_agnostic):
        valid = ops.add("And", valid, _within_class_limit(ops, classes, slots, settings.max_per_class), dtype=bool)
    if slots > TENSORRT_MAX_TOP_K:  # what TensorRT does not sort is without score (trt_graph)
        valid = ops.add("And", valid, ops.add("Greater", scores, np.float32(0), dtype=bool), dtype=bool)
    # The valid ones to the front, in their order: a key that falls with the place, 0 for the invalid.
    places = np.arange(slots, 0, -1, dtype=np.float32)[None]
    key, rows = ops.top_k(ops.add("Where", valid, places, np.float32(0), dtype=np.float32), settings.max_total)
    used = ops.add("Greater", key, np.float32(0), dtype=bool)
    return *(ops.gather_rows(x, rows) for x in (boxes, scores, classes)), used


def _within_class_limit(ops, classes, slots, limit):
    """classes [B, L] -> [B, L] bool: fewer than `limit` of the same class stand before this one.

    The first `limit` are within it, whatever they are: only the rest, the spare ones, are counted.
    """
    spare = ops.add("Unsqueeze", ops.slice(classes, 1, limit, slots), np.int64([2]))  # [B, L - limit, 1]
    same = ops.add("Equal", spare, ops.add("Unsqueeze", classes, np.int64([1])), dtype=bool)
    place = np.arange(slots, dtype=np.int32)
    before = ops.add("Less", place[None, None], place[None, limit:, None], dtype=bool)
    before = ops.cast(ops.add("And", same, before, dtype=bool), np.float32)
    count = ops.add("ReduceSum", before, np.int64([2]), keepdims=0)
    count = ops.add("Pad", count, np.int64([0, limit, 0, 0]), np.float32(0))
    return ops.add("Less", count, np.float32(limit), dtype=bool)


def among_largest(ops, values, count):
    """values [B, N, 1] -> [B, N, 1] bool: the `count` largest of each image and few more, without sorting them.

    Of STEPS levels between the least value and the largest, the highest that so many reach; then of as many between that
    and the next. All of the first `count` are among them: what comes of more is for the sort to choose.
    """
    high = ops.add("ReduceMax", values, axes=[1, 2], keepdims=1)
    # Values far below the largest must not widen the levels.
    values = ops.add("Max", values, ops.add("Sub", high, np.float32(WIDEST)))
    low = ops.add("ReduceMin", values, axes=[1, 2], keepdims=1)
    fractions = (np.arange(STEPS, dtype=np.float32) / STEPS)[None, None]
    for _ in range(2):
        width = ops.add("Sub", high, low)
        levels = ops.add("Add", ops.add("Mul", width, fractions), low)  # [B, 1, STEPS]
        reaching = ops.cast(ops.add("GreaterOrEqual", values, levels, dtype=bool), np.float32)
        number = ops.add("ReduceSum", reaching, np.int64([1]), keepdims=1)
        enough = ops.add("GreaterOrEqual", number, np.float32(count), dtype=bool)
        # Enough reach the first level, which is `low` itself.
        low = ops.add("ReduceMax", ops.add("Where", enough, levels, low, dtype=np.float32), axes=[2], keepdims=1)
        high = ops.add("Add", low, ops.add("Mul", width, np.float32(1 / STEPS)))
    return ops.add("GreaterOrEqual", values, low, dtype=bool)
