"""Faster and Mask R-CNN (TFOD's meta-architecture `faster_rcnn`): found in the TensorFlow graph, both stages' ends and the
crops between them written in ONNX.

Shapes: B images, N anchors, P proposals, C classes, M detections. Boxes are [ymin, xmin, ymax, xmax], normalised to the
network's input; windows: see boxes.
"""

import dataclasses

import numpy as np

from onnx_utils import PLUGIN_MAX_PAIRS, OpBuilder, replace_tensor
from tfod.boxes import centre_and_size, clip_boxes, decode_boxes, find_box_decoder, to_window
from tfod.config import wrong_config
from tfod.graph import ModelError, before_reshaping, node_name, run_by_shape
from tfod.heads import ScoreHead, check_converter, find_score_head
from tfod.nms import CANDIDATES_EACH, NmsSettings, add_nms, among_largest, find_nms_nodes, nms_settings
from tfod.tf1 import clip_candidates, clips_first

# The option that overrides the detections' score threshold.
THRESHOLD_OPTION = "second_nms_threshold"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is found of a Faster or Mask R-CNN in the TensorFlow graph."""

    inputs: dict  # {"images", "crops" at proposals, and of a Mask R-CNN "mask_crops" at detections: (tensor, shape)}
    # {"features" that are cropped, "objectness" logits, "proposal_encodings", "logits", "encodings", of a Mask R-CNN "masks"}
    outputs: dict
    score_head: ScoreHead
    box_scales: tuple  # of the second stage's box coder: y, x, height, width
    anchors: np.ndarray  # [N, 4] yxyx
    proposal_scales: tuple  # of the first stage's box coder
    mask_size: list | None  # height, width
    zero_outside: bool  # see crop_features
    clip_first: bool  # see tf1.clips_first


def recognise(frozen):
    """Whether the graph has two stages: proposals are suppressed before the final boxes are computed."""
    boxes = frozen.outputs.get("raw_detection_boxes")
    return boxes is not None and bool(find_nms_nodes(frozen, boxes))


def find(frozen, images, config, resizer):
    """Returns the Parts. images: the tensor where the network begins. Raises UserError where a part is not found."""
    boxes = frozen.outputs["raw_detection_boxes"]
    first_nms = find_nms_nodes(frozen, boxes)
    head = find_score_head(frozen, frozen.outputs["raw_detection_scores"])
    second = find_box_decoder(frozen, boxes)
    first = find_box_decoder(frozen, second.references)
    crops = _find_pooled_crops(frozen, second.encodings, first_nms)
    features = _find_cropped_features(frozen, crops, images, first_nms)
    shape = {images: [1, resizer["height"], resizer["width"], 3]}
    (feature_shape,) = frozen.shapes([features], shape)
    size = config.initial_crop_size
    inputs = {
        "images": (images, shape[images]),
        "crops": (crops, [config.first_stage_max_proposals, size, size, feature_shape[3]]),
    }
    outputs = {
        "features": features,
        "objectness": _find_objectness(frozen, first_nms),
        "proposal_encodings": first.encodings,
        "logits": head.logits,
        "encodings": second.encodings,
    }
    mask_size = None
    second_nms = find_nms_nodes(frozen, frozen.outputs["detection_boxes"]) - first_nms
    if "detection_masks" in frozen.outputs:
        outputs["masks"] = masks = _find_mask_logits(frozen)
        count = config.second_stage_post_processing.batch_non_max_suppression.max_total_detections
        mask_crops = _find_pooled_crops(frozen, masks, second_nms)
        inputs["mask_crops"] = (mask_crops, [count, size, size, feature_shape[3]])
        mask_size = list(frozen.shapes([masks], dict(inputs.values()))[0][1:3])
    pixels = np.float32([resizer["height"], resizer["width"]] * 2)
    anchors = run_by_shape(frozen, first.references, shape).reshape(-1, 4) / pixels
    zero_outside = _crops_with_op(frozen, crops, features)
    clip_first = clips_first(frozen, second.encodings, second_nms)
    return Parts(inputs, outputs, head, second.scales, anchors, first.scales, mask_size, zero_outside, clip_first)


def _find_objectness(frozen, first_nms):
    """The logits [B, ...] (background, object) that the first stage's NMS is about."""
    (node,) = first_nms
    softmax = next(name for name, op in frozen.ancestors(frozen.inputs(node)[1]).items() if op == "Softmax")
    return before_reshaping(frozen, frozen.inputs(softmax)[0])


def _find_pooled_crops(frozen, tensor, after):
    """The crops of features that a later stage begins with: the input of the first max-pool behind the crop.

    TFOD pools right behind each crop (faster_rcnn_meta_arch: maxpool_kernel_size, 1 too). tensor: a result of that stage;
    after: the NMS nodes whose boxes it crops at. Returns a tensor name [boxes, size, size, channels].
    """
    behind = frozen.descendants(after)
    pools = [name for name, op in frozen.ancestors(tensor).items() if op == "MaxPool" and name in behind]
    for name in pools:
        upstream = set(frozen.ancestors(name)) - {name}
        if not upstream.intersection(pools):
            return frozen.inputs(name)[0]
    raise ModelError("the SavedModel's second stage was not found (no max-pool behind a crop of features)")


def _find_cropped_features(frozen, crops, images, after):
    """The features [B, H, W, channels] that `crops` are cut from: the last map of the images that no box has a say in."""
    free = frozen.descendants([images]) - frozen.descendants(after)
    frontier = [name for name in frozen.ancestors(crops, stop=free) if name in free]
    # Nearest first: the boxes' own way back to the images is longer. As matmuls the crop works on a flattened map.
    for name in frozen.ancestors(frontier[0]) if frontier else ():
        shape = frozen.static_shape(name)
        if name in free and len(shape) == 4 and shape[-1] > 4:
            return name
    raise ModelError("the SavedModel's crop of features was not found; is it a TFOD Faster or Mask R-CNN?")


def _crops_with_op(frozen, crops, features):
    """Whether the op CropAndResize cuts `crops` from `features`, and not matmuls or gathers in its stead."""
    return "CropAndResize" in frozen.ancestors(crops, stop={node_name(features)}).values()


def _find_mask_logits(frozen):
    """Walks back from detection_masks, through the sigmoid and the choice of the class, to the mask head's output."""
    for name, op in frozen.ancestors(frozen.outputs["detection_masks"]).items():
        if op == "Sigmoid":
            choice = next(n for n, o in frozen.ancestors(name).items() if o in ("GatherV2", "GatherNd"))
            return before_reshaping(frozen, frozen.inputs(choice)[0])
    raise ModelError("the SavedModel's mask head was not found behind detection_masks")


def describe(network, parts, config, options):
    """What the file's metadata says of a two-stage model alone."""
    nms = config.second_stage_post_processing.batch_non_max_suppression
    first, second = options.first_nms_threshold, getattr(options, THRESHOLD_OPTION)
    return {
        "score_threshold": nms.score_threshold if second is None else second,
        "config_score_threshold": nms.score_threshold,
        "iou_threshold": nms.iou_threshold,
        "max_detections": nms.max_total_detections,
        "mask_size": parts.mask_size,
        "zero_outside": parts.zero_outside,
        "proposal_score_threshold": config.first_stage_nms_score_threshold if first is None else first,
    }


def check_config(network, parts, config, folder):
    """Raises UserError where the config does not fit a convert.Network of the Parts."""
    columns = network.shapes["logits"][-1]
    if columns != config.num_classes + 1:
        raise wrong_config(folder, f"it says {config.num_classes} classes, the model predicts {columns - 1}")
    check_converter(parts.score_head, config.second_stage_post_processing, folder)


def add_raw_detections(network, parts, config, metadata, window):
    """Boxes [B, P, 4] of each proposal's best class, clipped, and scores [B, P, columns], background included.

    (faster_rcnn_meta_arch._postprocess_box_classifier: raw_detection_boxes.)
    """
    ops = OpBuilder(network.graph, "postprocessing")
    proposals, _, _ = _add_first_stage(ops, network, parts, config, metadata, window)
    columns = network.shapes["logits"][-1]
    scores = parts.score_head.convert(
        ops, ops.reshape(network.outputs["logits"], [-1, config.first_stage_max_proposals, columns])
    )
    boxes = _refined_boxes(ops, network, proposals, parts.box_scales, config)
    if len(boxes.shape) == 4:
        best = ops.add("ArgMax", ops.slice(scores, 2, 1, columns), dtype=np.int64, axis=2, keepdims=1)  # [B, P, 1]
        boxes = ops.add("GatherND", boxes, best, batch_dims=2)
    return to_window(ops, clip_boxes(ops, boxes, window), window), scores


def add_detections(network, parts, config, metadata, window):
    """Joins the stages of a convert.Network of the Parts: proposals, crops, second stage, detections, masks.

    Returns {output name: tensor}.
    """
    ops = OpBuilder(network.graph, "postprocessing")
    proposals, valid, crop = _add_first_stage(ops, network, parts, config, metadata, window)
    settings = nms_settings(config.second_stage_post_processing, metadata["score_threshold"])
    scores = _class_scores(ops, network, valid, parts.score_head, config)
    boxes = _refined_boxes(ops, network, proposals, parts.box_scales, config)
    if parts.clip_first:
        boxes, scores = clip_candidates(ops, boxes, scores, window)
    found = add_nms(ops, boxes, scores, settings, window)
    results = {
        "num_detections": found.number,
        "detection_boxes": to_window(ops, found.boxes, window),
        "detection_scores": found.scores,
        "detection_classes": found.classes,
    }
    if parts.mask_size:
        crop("mask_crops", found.boxes, settings.max_total)
        logits = ops.add("Transpose", network.outputs["masks"], perm=[0, 3, 1, 2])  # [B * M, C, h, w]
        shape = (settings.max_total, network.shapes["masks"][-1], *parts.mask_size)
        results["detection_masks"] = add_masks(ops, logits, found.classes, shape)
    return results


def _add_first_stage(ops, network, parts, config, metadata, window):
    """Adds proposals and the second stage's crops at them.

    Returns (proposals [B, P, 4], valid [B, P] bool, crop(name of an input of the network, boxes [B, n, 4], n)).
    """
    features = ops.add("Transpose", network.outputs["features"], perm=[0, 3, 1, 2])
    size, feature_shape = config.initial_crop_size, network.shapes["features"][1:]
    count = config.first_stage_max_proposals

    def crop(at, boxes, number):
        crops = crop_features(ops, features, boxes, number, size, feature_shape, parts.zero_outside)
        replace_tensor(network.graph, network.inputs[at], crops)

    threshold, overlap = metadata["proposal_score_threshold"], config.first_stage_nms_iou_threshold
    proposals, valid = add_proposals(
        ops,
        ops.reshape(network.outputs["objectness"], [0, -1, 2]),
        ops.reshape(network.outputs["proposal_encodings"], [0, -1, 4]),
        parts.anchors,
        parts.proposal_scales,
        NmsSettings(threshold, overlap, count, count),
        window,
        parts.clip_first,
    )
    crop("crops", proposals, count)
    return proposals, valid, crop


def add_proposals(ops, objectness, encodings, anchors, scales, settings, window, clip_first=False):
    """The first stage's end (faster_rcnn_meta_arch._postprocess_rpn).

    objectness [B, N, 2] and encodings [B, N, 4], logits and codes for anchors (array [N, 4]). clip_first: see tf1.
    Returns (proposals [B, P, 4], clipped to the window and zero-padded, and valid [B, P] bool).
    """
    background, foreground = (ops.slice(objectness, 2, i, i + 1) for i in (0, 1))
    logits = ops.add("Sub", foreground, background)  # [B, N, 1]
    # A softmax of two, rounded as TensorFlow rounds it: close to 1 many anchors score the same, and their order decides.
    scores = ops.add("Add", ops.add("Exp", ops.add("Neg", logits)), np.float32(1))
    scores = ops.add("Reciprocal", scores)
    seen = max(PLUGIN_MAX_PAIRS, CANDIDATES_EACH * settings.max_total)
    left_out = len(anchors) > 2 * seen
    if left_out:
        among_best = among_largest(ops, logits, seen)
        scores = ops.add("Where", among_best, scores, np.float32(0), dtype=np.float32)
    boxes = decode_boxes(ops, encodings, centre_and_size(anchors)[None], scales)
    boxes.shape, scores.shape = [None, len(anchors), 4], [None, len(anchors), 1]
    if clip_first:
        boxes, scores = clip_candidates(ops, boxes, scores, window)
    found = add_nms(ops, boxes, scores, settings, window, mostly_zero=left_out)
    return found.boxes, ops.add("Greater", found.scores, np.float32(0), dtype=bool)


def crop_features(ops, features, boxes, count, size, shape, zero_outside):
    """TF's crop_and_resize, bilinear: features [B, C, H, W] and boxes [B, count, 4] -> [B * count, C, size, size].

    shape: (H, W, C). Sample i of a row lies at y = ymin (H - 1) + i (ymax - ymin) (H - 1) / (size - 1), which is
    GridSample with align_corners: -1 and 1 are the centres of the first and last pixel.

    zero_outside: as the op CropAndResize does it, where what lies outside is 0. By TensorFlow's own rounding a box that
    ends at the border may lie outside with its last samples: the arithmetic is the kernel's
    (tensorflow/core/kernels/image/crop_and_resize_op.cc), step by step in float32. Without: as the forms made of matmuls
    or gathers do it, where such a sample is the border's pixel.
    """
    height, width, channels = shape
    corners = (ops.slice(boxes, 2, i, i + 1) for i in range(4))
    ymin, xmin, ymax, xmax = (ops.add("Unsqueeze", corner, np.int64([3])) for corner in corners)  # [B, count, 1, 1]

    def axis(low, high, pixels, shape):
        last, steps = np.float32(pixels - 1), np.arange(size, dtype=np.float32).reshape(shape)
        step = ops.add("Div", ops.add("Mul", ops.add("Sub", high, low), last), np.float32(size - 1))
        place = ops.add("Add", ops.add("Mul", low, last), ops.add("Mul", step, steps))
        outside = ops.add("Greater", place, last, dtype=bool) if zero_outside else None
        place = ops.add("Sub", ops.add("Mul", place, np.float32(2 / last)), np.float32(1))
        if zero_outside:
            place = ops.add("Where", outside, np.float32(3), place, dtype=np.float32)
        return ops.add("Unsqueeze", ops.add("Mul", place, np.ones((1, 1, size, size), np.float32)), np.int64([4]))

    y, x = axis(ymin, ymax, height, (1, 1, size, 1)), axis(xmin, xmax, width, (1, 1, 1, size))
    grid = ops.reshape(ops.add("Concat", x, y, axis=4), [0, count * size, size, 2])
    padding = "zeros" if zero_outside else "border"
    crops = ops.add("GridSample", features, grid, align_corners=1, mode="bilinear", padding_mode=padding)
    crops = ops.reshape(crops, [0, channels, count, size, size])
    crops = ops.add("Transpose", crops, perm=[0, 2, 1, 3, 4])
    return ops.reshape(crops, [-1, channels, size, size])


def _class_scores(ops, network, valid, head, config):
    """Scores [B, P, C] of the second stage's logits and valid [B, P]: a padded proposal never becomes a detection."""
    count, columns = config.first_stage_max_proposals, network.shapes["logits"][-1]
    scores = head.convert(ops, ops.reshape(network.outputs["logits"], [-1, count, columns]))
    scores = ops.slice(scores, 2, 1, columns)  # without the background
    valid = ops.add("Unsqueeze", valid, np.int64([2]))
    scores = ops.add("Where", valid, scores, np.float32(0), dtype=np.float32)
    scores.shape = [None, count, columns - 1]
    return scores


def _refined_boxes(ops, network, proposals, scales, config):
    """Boxes [B, P, 4], shared by the classes, or [B, P, C, 4], of the second stage's encodings and its proposals [B, P, 4].

    (faster_rcnn_meta_arch._postprocess_box_classifier.)
    """
    low, high = ops.slice(proposals, 2, 0, 2), ops.slice(proposals, 2, 2, 4)
    size = ops.add("Sub", high, low)
    reference = ops.add("Concat", ops.add("Add", low, ops.add("Mul", size, np.float32(0.5))), size, axis=2)
    shape = [config.first_stage_max_proposals, 4]
    if network.shapes["encodings"][-1] != 4:
        shape.insert(1, config.num_classes)
        reference = ops.add("Unsqueeze", reference, np.int64([2]))
    boxes = decode_boxes(ops, ops.reshape(network.outputs["encodings"], [-1, *shape]), reference, scales)
    boxes.shape = [None, *shape]
    return boxes


def add_masks(ops, logits, classes, shape):
    """Mask logits [B * M, C, h, w] -> [B, M, h, w]: those of each detection's class [B, M], as probabilities.

    shape: (M, C, h, w), C being 1 where the classes share their masks.
    """
    count, channels, height, width = shape
    logits = ops.reshape(logits, [-1, count, channels, height, width])
    if channels == 1:
        chosen = ops.add("Squeeze", logits, np.int64([2]))
    else:
        index = ops.add("Unsqueeze", ops.cast(classes, np.int64), np.int64([2]))  # [B, M, 1]
        chosen = ops.add("GatherND", logits, index, batch_dims=2)
    return ops.add("Sigmoid", chosen)
