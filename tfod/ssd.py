"""SSD and RetinaNet (TFOD's meta-architecture `ssd`): found in the TensorFlow graph, post-processing written in ONNX.

Shapes: B images, N anchors, K candidates, C classes, M detections. Boxes are [ymin, xmin, ymax, xmax], normalised to the
network's input; windows: see boxes.
"""

import dataclasses

import numpy as np

from onnx_utils import OpBuilder
from tfod.boxes import centre_and_size, decode_boxes, find_box_decoder, to_window
from tfod.config import wrong_config
from tfod.graph import run_by_shape
from tfod.heads import ScoreHead, check_converter, find_score_head
from tfod.nms import add_nms, candidates, find_nms_nodes, nms_settings
from tfod.tf1 import clip_candidates, clips_first

# The option that overrides the detections' score threshold.
THRESHOLD_OPTION = "first_nms_threshold"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is found of an SSD in the TensorFlow graph."""

    inputs: dict  # {"images": (tensor, shape)}
    outputs: dict  # {"logits": tensor [B, N, columns], "encodings": tensor [B, N, (1,) 4]}
    score_head: ScoreHead
    anchors: np.ndarray  # [N, 4] yxyx
    clip_first: bool  # see tf1.clips_first


def recognise(frozen):
    """Whether the graph has one stage: nothing is suppressed before the final boxes are computed."""
    boxes = frozen.outputs.get("raw_detection_boxes")
    return boxes is not None and not find_nms_nodes(frozen, boxes)


def find(frozen, images, config, resizer):
    """Returns the Parts. images: the tensor where the network begins. Raises UserError where a part is not found."""
    head = find_score_head(frozen, frozen.outputs["raw_detection_scores"])
    decoder = find_box_decoder(frozen, frozen.outputs["raw_detection_boxes"])
    shape = [1, resizer["height"], resizer["width"], 3]
    anchors = run_by_shape(frozen, decoder.references, {images: shape}).reshape(-1, 4)
    clip_first = clips_first(frozen, decoder.encodings, find_nms_nodes(frozen, frozen.outputs["detection_boxes"]))
    outputs = {"logits": head.logits, "encodings": decoder.encodings}
    return Parts({"images": (images, shape)}, outputs, head, anchors, clip_first)


def describe(network, parts, config, options):
    """What the file's metadata says of an SSD alone."""
    nms = config.post_processing.batch_non_max_suppression
    override = getattr(options, THRESHOLD_OPTION)
    return {
        "score_threshold": nms.score_threshold if override is None else override,
        "config_score_threshold": nms.score_threshold,
        "iou_threshold": nms.iou_threshold,
        "max_detections": nms.max_total_detections,
        "mask_size": None,
    }


def check_config(network, parts, config, folder):
    """Raises UserError where the config does not fit a convert.Network of the Parts."""
    boxes, columns = network.shapes["logits"][1:]
    background = bool(config.add_background_class)
    if columns != config.num_classes + background:
        raise wrong_config(folder, f"it says {config.num_classes} classes, the model predicts {columns - background}")
    if boxes != len(parts.anchors):
        what = f"the model predicts {boxes} boxes for {len(parts.anchors)} anchors at the config's input size"
        raise wrong_config(folder, what)
    check_converter(parts.score_head, config.post_processing, folder)


def _predictions(ops, network):
    """The head's (logits [B, N, columns], encodings [B, N, 4]); the plain predictors hold boxes as [B, N, 1, 4]."""
    columns = network.shapes["logits"][-1]
    return ops.reshape(network.outputs["logits"], [0, -1, columns]), ops.reshape(
        network.outputs["encodings"], [0, -1, 4]
    )


def _box_scales(config):
    coder = config.box_coder.faster_rcnn_box_coder
    return coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale


def add_raw_detections(network, parts, config, metadata, window):
    """Boxes [B, N, 4] and scores [B, N, columns] of all anchors."""
    ops = OpBuilder(network.graph, "postprocessing")
    logits, encodings = _predictions(ops, network)
    boxes = decode_boxes(ops, encodings, centre_and_size(parts.anchors)[None], _box_scales(config))
    return boxes, parts.score_head.convert(ops, logits)


def add_detections(network, parts, config, metadata, window):
    """Adds TFOD's post-processing (ssd_meta_arch.postprocess) behind a convert.Network of the Parts.

    Returns {output name: tensor}.
    """
    settings = nms_settings(config.post_processing, metadata["score_threshold"])
    ops = OpBuilder(network.graph, "postprocessing")
    logits, encodings = _predictions(ops, network)
    columns = network.shapes["logits"][-1] if config.add_background_class else None
    reference, count = centre_and_size(parts.anchors), len(parts.anchors)
    kept = count if settings.limits_classes else candidates(settings.max_total, count)
    if kept < count:
        scores, rows = _best_anchors(ops, logits, columns, parts, kept)
        encodings, reference = ops.gather_rows(encodings, rows), ops.add("Gather", reference, rows, axis=0)  # [B, K, 4]
    else:
        reference = reference[None]
        scores = parts.score_head.convert(ops, logits)
        scores = ops.slice(scores, 2, 1, columns) if columns else scores
    boxes = decode_boxes(ops, encodings, reference, _box_scales(config))
    boxes.shape, scores.shape = [None, kept, 4], [None, kept, config.num_classes]
    if parts.clip_first:
        boxes, scores = clip_candidates(ops, boxes, scores, window)
    found = add_nms(ops, boxes, scores, settings, window, mostly_zero=kept < count)
    return {
        "num_detections": found.number,
        "detection_boxes": to_window(ops, found.boxes, window),
        "detection_scores": found.scores,
        "detection_classes": found.classes,
    }


def _best_anchors(ops, logits, columns, parts, candidates):
    """The K best anchors by their best class: (scores [B, K, C], rows [B, K]). The K best (box, class) pairs are theirs.

    logits: [B, N, columns]. columns: their number where the first is the background, else None. candidates: K.
    """
    head = parts.score_head
    # A sigmoid rises with its logit: the best logits are the best scores, and only theirs need to be computed.
    scores = logits if head.converter == "SIGMOID" else head.convert(ops, logits)
    if columns:
        scores = ops.slice(scores, 2, 1, columns)
    best, rows = ops.top_k(ops.add("ReduceMax", scores, axes=[2], keepdims=0), candidates)  # [B, K]
    scores = ops.gather_rows(scores, rows)
    # What scores less than the last of these anchors does in its best class is not among the K best pairs: no need to
    # sort it.
    last = ops.add("Unsqueeze", ops.slice(best, 1, candidates - 1, candidates), np.int64([2]))
    among_best = ops.add("GreaterOrEqual", scores, last, dtype=bool)
    if head.converter == "SIGMOID":
        scores = head.convert(ops, scores)
    return ops.add("Where", among_best, scores, np.float32(0), dtype=np.float32), rows
