"""Non-maximum suppression (NMS) as TFOD does it, around the plugin EfficientNMS_TRT.

Shapes: B images, K candidates, C classes, M detections. Boxes are [ymin, xmin, ymax, xmax].
"""

import dataclasses
import math
import typing

import numpy as np

import onnx_utils
from tfod.boxes import clip_boxes

# Detections taken from the plugin beyond max_total_detections, in place of those that finish_nms drops: boxes without
# area after clipping (at most 2 an image were seen), and those over max_detections_per_class where it limits.
SPARE = 28
SPARE_WITH_CLASS_LIMIT = 900
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
    max_per_class: int  # detections of one class
    max_total: int  # detections of all classes together

    @property
    def plugin_outputs(self):
        """How many boxes to take from the plugin so that, of them, finish_nms finds `max_total` to keep."""
        spare = SPARE if self.max_per_class >= self.max_total else SPARE_WITH_CLASS_LIMIT
        return self.max_total + spare


class NmsResult(typing.NamedTuple):
    """ONNX tensors; unused slots hold zeros."""

    number: object  # [B, 1] int32
    boxes: object  # [B, M, 4]
    scores: object  # [B, M], falling
    classes: object  # [B, M] int32, 0-based


def nms_settings(post_processing, score_threshold):
    """The NmsSettings of a config's post_processing message, with that score threshold."""
    nms = post_processing.batch_non_max_suppression
    return NmsSettings(score_threshold, nms.iou_threshold, nms.max_detections_per_class, nms.max_total_detections)


def find_nms_nodes(frozen, tensor):
    """Names of the TensorFlow nodes NonMaxSuppression that `tensor` is computed from."""
    return {name for name, op in frozen.ancestors(tensor).items() if op.startswith("NonMaxSuppression")}


def add_nms(ops, boxes, scores, settings, window=None, mostly_zero=False):
    """Non-maximum suppression of boxes [B, K, 4] or [B, K, C, 4] with scores [B, K, C], as TFOD does it.

    mostly_zero: whether most scores are 0. Returns an NmsResult; see finish_nms.
    """
    # TensorFlow keeps what scores more than the threshold, the plugin what scores as much: a score of 0 is none.
    threshold = max(settings.score_threshold, float(np.finfo(np.float32).tiny))
    # Below DENSE_BELOW the plugin sorts all scores, also those under the threshold. A power of two changes no digit of them.
    factor = 2.0 ** max(0, math.ceil(math.log2(DENSE_BELOW / threshold))) if mostly_zero else 1.0
    if factor > 1:
        scores, threshold = ops.add("Mul", scores, np.float32(factor)), threshold * factor
    _, boxes, scores, classes = onnx_utils.efficient_nms(
        ops,
        boxes,
        scores,
        score_threshold=threshold,
        iou_threshold=settings.iou_threshold,
        max_output_boxes=settings.plugin_outputs,
    )
    if factor > 1:
        scores = ops.add("Mul", scores, np.float32(1 / factor))
    return finish_nms(ops, boxes, scores, classes, settings, window)


def finish_nms(ops, boxes, scores, classes, settings, window=None):
    """What TFOD does after suppression (post_processing.multiclass_non_max_suppression) and the plugin does not.

    boxes [B, L, 4], scores and classes [B, L], best first, unused slots zero. At most `max_per_class` of a class; clip to the
    window; drop the boxes that clipping left without area; the best M. Returns an NmsResult.
    """
    boxes = clip_boxes(ops, boxes, window)
    size = ops.add("Sub", ops.slice(boxes, 2, 2, 4), ops.slice(boxes, 2, 0, 2))
    valid = ops.add("Greater", ops.add("ReduceProd", size, axes=[2], keepdims=0), np.float32(0), dtype=bool)
    if settings.max_per_class < settings.plugin_outputs:
        within = _within_class_limit(ops, classes, settings.plugin_outputs, settings.max_per_class)
        valid = ops.add("And", valid, within, dtype=bool)
    # The valid ones to the front, in their order: a key that falls with the place, 0 for the invalid.
    places = np.arange(settings.plugin_outputs, 0, -1, dtype=np.float32)[None]
    key, rows = ops.top_k(ops.add("Where", valid, places, np.float32(0), dtype=np.float32), settings.max_total)
    used = ops.add("Greater", key, np.float32(0), dtype=bool)
    boxes, scores, classes = (ops.gather_rows(x, rows) for x in (boxes, scores, classes))
    boxes = ops.add("Where", ops.add("Unsqueeze", used, np.int64([2])), boxes, np.float32(0), dtype=np.float32)
    scores = ops.add("Where", used, scores, np.float32(0), dtype=np.float32)
    classes = ops.add("Where", used, classes, np.int32(0), dtype=np.int32)
    number = ops.add("ReduceSum", ops.cast(used, np.int32), np.int64([1]), keepdims=1)
    return NmsResult(number, boxes, scores, classes)


def _within_class_limit(ops, classes, slots, limit):
    """classes [B, L] -> [B, L] bool: fewer than `limit` of the same class stand before this one."""
    rows, columns = (ops.add("Unsqueeze", classes, np.int64([axis])) for axis in (2, 1))
    same = ops.cast(ops.add("Equal", rows, columns, dtype=bool), np.float32)  # [B, L, L]
    before = ops.add("Mul", same, np.tri(slots, k=-1, dtype=np.float32)[None])
    return ops.add("Less", ops.add("ReduceSum", before, np.int64([2]), keepdims=0), np.float32(limit), dtype=bool)


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
