"""What follows a detector's heads, in ONNX: box decoder, suppression, crops of features, as TFOD computes them.

Shapes: B images, N anchors, K candidates, P proposals, C classes, M detections. Boxes are [ymin, xmin, ymax, xmax],
normalised to the network's input unless it says otherwise. A window [B, 2] is the height and width of the true image in
the network's input, normalised; None: the image fills it.
"""

import dataclasses
import math

import numpy as np

import onnx_utils

# Of an SSD's anchors, only the best by their best class go into NMS: the 1,500 best (box, class) pairs are certainly
# among theirs, and the 100 detections of an image come from far fewer (README, "How many candidates").
CANDIDATES = 1500
# Detections taken from the plugin beyond max_total_detections, in place of those that finish_nms drops: boxes without
# area after clipping (at most 2 an image were seen), and those over max_detections_per_class where it limits.
SPARE = 28
SPARE_WITH_CLASS_LIMIT = 900
# EfficientNMS: below this threshold it takes all scores to its sort, above it only those that pass.
DENSE_BELOW = 0.007
# Levels that `among_most` tells apart at a time, and how far below the largest they reach.
STEPS = 64
WIDEST = 40.0


@dataclasses.dataclass(frozen=True)
class Suppression:
    """The settings of one non-maximum suppression."""

    score_threshold: float
    iou_threshold: float
    per_class: int  # detections of one class, at most
    total: int  # detections in all, at most

    @property
    def given(self):
        """How many detections to take from the plugin so that, of them, finish_nms finds `total` to keep."""
        spare = SPARE if self.per_class >= self.total else SPARE_WITH_CLASS_LIMIT
        return self.total + spare


def add_ssd_detections(graph, heads, anchors, columns, settings, window):
    """Adds TFOD's SSD post-processing (ssd_meta_arch.postprocess) behind the graph's outputs: logits, box encodings.

    heads: a Heads; anchors: array [N, 4]; columns: classes, with the background where there is one. Replaces the outputs.
    """
    build = onnx_utils.Builder(graph, "postprocessing")
    # The plain predictors hold boxes as [B, N, 1, 4]. -> [B, N, columns], [B, N, 4]
    logits, encodings = (build.reshape(x, [0, -1, size]) for x, size in zip(graph.outputs, (columns, 4), strict=True))
    # A sigmoid rises with its logit: the best logits are the best scores, and only theirs need to be computed.
    scores = logits if heads.converter == "SIGMOID" else heads.convert(build, logits)
    scores = heads.without_background(build, scores, 2, columns)
    candidates = min(CANDIDATES, len(anchors))
    best, rows = build.top_k(build.add("ReduceMax", scores, axes=[2], keepdims=0), candidates)  # [B, K]
    scores = build.gather_rows(scores, rows)  # [B, K, C]
    # What scores less than the last of these anchors does in its best class is not among the K best pairs: no need to
    # sort it.
    last = build.add("Unsqueeze", build.slice(best, 1, candidates - 1, candidates), np.int64([2]))
    among_best = build.add("GreaterOrEqual", scores, last, dtype=bool)
    if heads.converter == "SIGMOID":
        scores = heads.convert(build, scores)
    scores = build.add("Where", among_best, scores, np.float32(0), dtype=np.float32)
    reference = build.add("Gather", centre_and_size(anchors), rows, axis=0)  # [B, K, 4]
    boxes = decode_boxes(build, build.gather_rows(encodings, rows), reference, heads.box_scales)
    boxes.shape = [None, candidates, 4]
    number, boxes, scores, classes = suppress(build, boxes, scores, settings, window, few=True)
    graph.outputs = [number, to_window(build, boxes, window), scores, classes]


@dataclasses.dataclass(frozen=True)
class Heads:
    """How a head's raw outputs are to be read."""

    converter: str  # SIGMOID, SOFTMAX or IDENTITY
    logit_scale: float
    background: bool  # column 0 of the scores is the background
    box_scales: tuple  # of the box coder: y, x, height, width

    def convert(self, build, logits):
        """Logits [..., C] -> scores."""
        if self.logit_scale != 1:
            logits = build.add("Mul", logits, np.float32(self.logit_scale))
        if self.converter == "SOFTMAX":
            return build.add("Softmax", logits, axis=-1)
        return build.add("Sigmoid", logits) if self.converter == "SIGMOID" else logits

    def without_background(self, build, scores, axis, columns):
        return build.slice(scores, axis, 1, columns) if self.background else scores


def suppress(build, boxes, scores, settings, window=None, few=False):
    """Non-maximum suppression of boxes [B, K, 4] or [B, K, C, 4] with scores [B, K, C], as TFOD does it.

    few: most scores are 0. Returns (num_detections [B, 1], boxes [B, M, 4], scores [B, M], classes [B, M]); see finish_nms.
    """
    # TensorFlow keeps what scores more than the threshold, the plugin what scores as much: a score of 0 is none.
    threshold = max(settings.score_threshold, float(np.finfo(np.float32).tiny))
    # Below DENSE_BELOW the plugin sorts all scores, also those under the threshold. A power of two changes no digit of them.
    factor = 2.0 ** max(0, math.ceil(math.log2(DENSE_BELOW / threshold))) if few else 1.0
    if factor > 1:
        scores, threshold = build.add("Mul", scores, np.float32(factor)), threshold * factor
    _, boxes, scores, classes = onnx_utils.efficient_nms(
        build,
        boxes,
        scores,
        score_threshold=threshold,
        iou_threshold=settings.iou_threshold,
        max_output_boxes=settings.given,
    )
    if factor > 1:
        scores = build.add("Mul", scores, np.float32(1 / factor))
    return finish_nms(build, boxes, scores, classes, settings, window)


def finish_nms(build, boxes, scores, classes, settings, window=None):
    """What TFOD does after suppression (post_processing.multiclass_non_max_suppression) and the plugin does not.

    boxes [B, L, 4], scores and classes [B, L], best first, unused slots zero. At most `per_class` of a class; clip to the
    window; drop the boxes that clipping left without area; the best M.
    Returns (num_detections [B, 1], boxes [B, M, 4], scores [B, M], classes [B, M]) with zeros in unused slots.
    """
    boxes = clip_boxes(build, boxes, window)
    size = build.add("Sub", build.slice(boxes, 2, 2, 4), build.slice(boxes, 2, 0, 2))
    valid = build.add("Greater", build.add("ReduceProd", size, axes=[2], keepdims=0), np.float32(0), dtype=bool)
    if settings.per_class < settings.given:
        within = _within_class_limit(build, classes, settings.given, settings.per_class)
        valid = build.add("And", valid, within, dtype=bool)
    # The valid ones to the front, in their order: a key that falls with the place, 0 for the invalid.
    places = np.arange(settings.given, 0, -1, dtype=np.float32)[None]
    key, rows = build.top_k(build.add("Where", valid, places, np.float32(0), dtype=np.float32), settings.total)
    used = build.add("Greater", key, np.float32(0), dtype=bool)
    boxes, scores, classes = (build.gather_rows(x, rows) for x in (boxes, scores, classes))
    boxes = build.add("Where", build.add("Unsqueeze", used, np.int64([2])), boxes, np.float32(0), dtype=np.float32)
    scores = build.add("Where", used, scores, np.float32(0), dtype=np.float32)
    classes = build.add("Where", used, classes, np.int32(0), dtype=np.int32)
    number = build.add("ReduceSum", build.cast(used, np.int32), np.int64([1]), keepdims=1)
    return number, boxes, scores, classes


def _within_class_limit(build, classes, given, limit):
    """classes [B, L] -> [B, L] bool: fewer than `limit` of the same class stand before this one."""
    rows, columns = (build.add("Unsqueeze", classes, np.int64([axis])) for axis in (2, 1))
    same = build.cast(build.add("Equal", rows, columns, dtype=bool), np.float32)  # [B, L, L]
    before = build.add("Mul", same, np.tri(given, k=-1, dtype=np.float32)[None])
    return build.add("Less", build.add("ReduceSum", before, np.int64([2]), keepdims=0), np.float32(limit), dtype=bool)


def clip_boxes(build, boxes, window):
    """boxes [B, N, 4] clipped to the window [B, 2], or to the whole input."""
    if window is None:
        return build.add("Clip", boxes, np.float32(0), np.float32(1))
    return build.add("Min", build.add("Max", boxes, np.float32(0)), _twice(build, window))


def to_window(build, boxes, window):
    """boxes [B, N, 4] normalised to the input -> normalised to the true image."""
    return boxes if window is None else build.add("Div", boxes, _twice(build, window))


def _twice(build, window):
    """window [B, 2] -> [B, 1, 4]: a bound for each coordinate of a box."""
    return build.add("Unsqueeze", build.add("Concat", window, window, axis=1), np.int64([1]))


def centre_and_size(boxes):
    """Array [N, 4] yxyx -> [N, 4] float32: centre y, centre x, height, width."""
    size = boxes[:, 2:] - boxes[:, :2]
    return np.concatenate([boxes[:, :2] + size / 2, size], axis=1).astype(np.float32)


def decode_boxes(build, encodings, reference, scales):
    """encodings [..., 4] (ty, tx, th, tw) and reference boxes [..., 4] (centre y, x, height, width) -> boxes yxyx.

    TFOD's FasterRcnnBoxCoder: y = ty / y_scale * ha + ya, h = exp(th / height_scale) * ha (Ren et al., 2015).
    scales: y, x, height, width.
    """
    centre, size = (build.add("Slice", reference, *_last_axis(i), dtype=np.float32) for i in (0, 2))
    encodings = build.add("Div", encodings, np.float32(scales))
    shift, stretch = (build.add("Slice", encodings, *_last_axis(i), dtype=np.float32) for i in (0, 2))
    centre = build.add("Add", build.add("Mul", shift, size), centre)
    half = build.add("Mul", build.add("Mul", build.add("Exp", stretch), size), np.float32(0.5))
    return build.add("Concat", build.add("Sub", centre, half), build.add("Add", centre, half), axis=-1)


def _last_axis(start):
    """Slice inputs for two columns of the last axis."""
    return np.int64([start]), np.int64([start + 2]), np.int64([-1])


def add_proposals(build, objectness, encodings, anchors, scales, settings, window):
    """The first stage's end (faster_rcnn_meta_arch._postprocess_rpn).

    objectness [B, N, 2] and encodings [B, N, 4], logits and codes for anchors (array [N, 4]).
    Returns (proposals [B, P, 4], clipped to the window and zero-padded, and valid [B, P] bool).
    """
    background, foreground = (build.slice(objectness, 2, i, i + 1) for i in (0, 1))
    logits = build.add("Sub", foreground, background)  # [B, N, 1]
    scores = build.add("Sigmoid", logits)  # a softmax of two
    few = len(anchors) > 2 * onnx_utils.PLUGIN_MAX_PAIRS
    if few:
        among_best = among_most(build, logits, onnx_utils.PLUGIN_MAX_PAIRS)
        scores = build.add("Where", among_best, scores, np.float32(0), dtype=np.float32)
    boxes = decode_boxes(build, encodings, centre_and_size(anchors)[None], scales)
    boxes.shape, scores.shape = [None, len(anchors), 4], [None, len(anchors), 1]
    _, proposals, scores, _ = suppress(build, boxes, scores, settings, window, few)
    return proposals, build.add("Greater", scores, np.float32(0), dtype=bool)


def among_most(build, values, count):
    """values [B, N, 1] -> [B, N, 1] bool: the `count` largest of each image and few more, without sorting them.

    Of STEPS levels between the least value and the largest, the highest that so many reach; then of as many between that
    and the next. All of the first `count` are among them: what comes of more is for the sort to choose.
    """
    high = build.add("ReduceMax", values, axes=[1, 2], keepdims=1)
    # Values far below the largest must not widen the levels.
    values = build.add("Max", values, build.add("Sub", high, np.float32(WIDEST)))
    low = build.add("ReduceMin", values, axes=[1, 2], keepdims=1)
    fractions = (np.arange(STEPS, dtype=np.float32) / STEPS)[None, None]
    for _ in range(2):
        width = build.add("Sub", high, low)
        levels = build.add("Add", build.add("Mul", width, fractions), low)  # [B, 1, STEPS]
        reaching = build.cast(build.add("GreaterOrEqual", values, levels, dtype=bool), np.float32)
        number = build.add("ReduceSum", reaching, np.int64([1]), keepdims=1)
        enough = build.add("GreaterOrEqual", number, np.float32(count), dtype=bool)
        # Enough reach the first level, which is `low` itself.
        low = build.add("ReduceMax", build.add("Where", enough, levels, low, dtype=np.float32), axes=[2], keepdims=1)
        high = build.add("Add", low, build.add("Mul", width, np.float32(1 / STEPS)))
    return build.add("GreaterOrEqual", values, low, dtype=bool)


def crop_features(build, features, boxes, count, size, shape, zero_outside):
    """TF's crop_and_resize, bilinear: features [B, C, H, W] and boxes [B, count, 4] -> [B * count, C, size, size].

    shape: (H, W, C). Sample i of a row lies at y = ymin (H - 1) + i (ymax - ymin) (H - 1) / (size - 1), which is
    GridSample with align_corners: -1 and 1 are the centres of the first and last pixel.

    zero_outside: as the op CropAndResize does it, where what lies outside is 0. By TensorFlow's own rounding a box that
    ends at the border may lie outside with its last samples: the arithmetic is the kernel's
    (tensorflow/core/kernels/image/crop_and_resize_op.cc), step by step in float32. Without: as the forms made of matmuls
    or gathers do it, where such a sample is the border's pixel.
    """
    height, width, channels = shape
    corners = (build.slice(boxes, 2, i, i + 1) for i in range(4))
    ymin, xmin, ymax, xmax = (build.add("Unsqueeze", corner, np.int64([3])) for corner in corners)  # [B, count, 1, 1]

    def axis(low, high, pixels, shape):
        last, steps = np.float32(pixels - 1), np.arange(size, dtype=np.float32).reshape(shape)
        step = build.add("Div", build.add("Mul", build.add("Sub", high, low), last), np.float32(size - 1))
        place = build.add("Add", build.add("Mul", low, last), build.add("Mul", step, steps))
        outside = build.add("Greater", place, last, dtype=bool) if zero_outside else None
        place = build.add("Sub", build.add("Mul", place, np.float32(2 / last)), np.float32(1))
        if zero_outside:
            place = build.add("Where", outside, np.float32(3), place, dtype=np.float32)
        return build.add("Unsqueeze", build.add("Mul", place, np.ones((1, 1, size, size), np.float32)), np.int64([4]))

    y, x = axis(ymin, ymax, height, (1, 1, size, 1)), axis(xmin, xmax, width, (1, 1, 1, size))
    grid = build.reshape(build.add("Concat", x, y, axis=4), [0, count * size, size, 2])
    padding = "zeros" if zero_outside else "border"
    crops = build.add("GridSample", features, grid, align_corners=1, mode="bilinear", padding_mode=padding)
    crops = build.reshape(crops, [0, channels, count, size, size])
    crops = build.add("Transpose", crops, perm=[0, 2, 1, 3, 4])
    return build.reshape(crops, [-1, channels, size, size])


def add_second_stage(build, logits, encodings, proposals, valid, heads, settings, classes, window):
    """The second stage's end (faster_rcnn_meta_arch._postprocess_box_classifier).

    logits [B * P, columns], encodings [B * P, 4 or C * 4], proposals [B, P, 4], valid [B, P].
    Returns what `suppress` does; a padded proposal never becomes a detection.
    """
    count = settings.proposals
    columns = classes + int(heads.background)
    scores = heads.convert(build, build.reshape(logits, [-1, count, columns]))
    scores = heads.without_background(build, scores, 2, columns)
    valid = build.add("Unsqueeze", valid, np.int64([2]))
    scores = build.add("Where", valid, scores, np.float32(0), dtype=np.float32)
    low, high = build.slice(proposals, 2, 0, 2), build.slice(proposals, 2, 2, 4)
    size = build.add("Sub", high, low)
    reference = build.add("Concat", build.add("Add", low, build.add("Mul", size, np.float32(0.5))), size, axis=2)
    if settings.share_box:
        boxes = decode_boxes(build, build.reshape(encodings, [-1, count, 4]), reference, heads.box_scales)
        boxes.shape = [None, count, 4]
    else:
        reference = build.add("Unsqueeze", reference, np.int64([2]))
        encodings = build.reshape(encodings, [-1, count, classes, 4])
        boxes = decode_boxes(build, encodings, reference, heads.box_scales)
        boxes.shape = [None, count, classes, 4]
    return suppress(build, boxes, scores, settings.suppression, window)


@dataclasses.dataclass(frozen=True)
class SecondStage:
    """What the second stage takes and keeps."""

    proposals: int
    share_box: bool  # one box for all classes
    suppression: Suppression


def add_masks(build, logits, classes, count, shape):
    """Mask logits [B * M, C, h, w] -> [B, M, h, w]: those of each detection's class [B, M], as probabilities."""
    channels, height, width = shape
    logits = build.reshape(logits, [-1, count, channels, height, width])
    if channels == 1:  # class-agnostic
        chosen = build.add("Squeeze", logits, np.int64([2]))
    else:
        index = build.add("Unsqueeze", build.cast(classes, np.int64), np.int64([2]))  # [B, M, 1]
        chosen = build.add("GatherND", logits, index, batch_dims=2)
    return build.add("Sigmoid", chosen)
