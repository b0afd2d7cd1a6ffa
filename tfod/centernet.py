"""CenterNet (TFOD's meta-architecture `center_net`, Zhou et al., "Objects as Points", 2019): found in the TensorFlow graph,
post-processing written in ONNX, without NMS and without plugins.

Shapes: B images, h x w places of the heatmap, C classes, M detections. Boxes are [ymin, xmin, ymax, xmax]; windows: see boxes.
"""

import dataclasses

import numpy as np

from onnx_utils import OpBuilder
from tfod import keypoints
from tfod.boxes import to_window
from tfod.config import wrong_config
from tfod.graph import PICKING, ModelError, before_reshaping, node_name, reading_op
from tfod.peaks import Peaks, find_peaks, grid_of, peak_scores

# The option that overrides the detections' score threshold.
THRESHOLD_OPTION = "first_nms_threshold"


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is found of a CenterNet in the TensorFlow graph."""

    inputs: dict  # {"images": (tensor, shape)}
    # {"centres": logits [B, h, w, C], "sizes" and "offsets": [B, h, w, 2] y and x, in places}; keypoints.HEADS where there
    # are keypoints
    outputs: dict
    peaks: Peaks
    task: keypoints.Task | None = None  # None: no keypoints

    @property
    def detections(self):
        """M."""
        return self.peaks.count


def _find_peaks(frozen):
    """The Peaks that detection_boxes are chosen by, or None."""
    top_ks = (name for name, op in frozen.ancestors(frozen.outputs["detection_boxes"]).items() if op == "TopKV2")
    return next(filter(None, (find_peaks(frozen, name) for name in top_ks)), None)


def recognise(frozen):
    """Whether the detections are the peaks of a heatmap."""
    return _find_peaks(frozen) is not None


def find(frozen, images, config, resizer):
    """Returns the Parts. images: the tensor where the network begins. Raises UserError where a part is not found.

    Of the heads, of which an hourglass network has several, those count that the boxes are made of.
    """
    peaks = _find_peaks(frozen)
    chosen = frozen.descendants([node_name(peaks.top_k)])
    heads = {}
    for name, op in frozen.ancestors(frozen.outputs["detection_boxes"]).items():
        if op in PICKING and name in chosen:
            # A size is at least 0 (prediction_tensors_to_boxes: tf.maximum); an offset is added as it is.
            part = "sizes" if reading_op(frozen, name) == "Maximum" else "offsets"
            heads.setdefault(part, set()).add(before_reshaping(frozen, frozen.inputs(name)[0]))
    if heads.keys() != {"sizes", "offsets"} or any(len(found) != 1 for found in heads.values()):
        raise ModelError("the SavedModel's heads for sizes and offsets were not found behind detection_boxes")
    outputs = {"centres": peaks.logits, **{part: found.pop() for part, found in sorted(heads.items())}}
    task = keypoints.find(frozen, peaks.top_k)
    shape = [1, resizer["height"], resizer["width"], 3]
    return Parts({"images": (images, shape)}, outputs | (task.heads if task else {}), peaks, task)


def describe(network, parts, config, options):
    """What the file's metadata says of a CenterNet alone."""
    override = getattr(options, THRESHOLD_OPTION)
    names = None
    if parts.task:
        count = network.shapes["joint_logits"][-1]
        names = list(options.keypoints or [None] * count)
    return {
        "score_threshold": 0.0 if override is None else override,
        "config_score_threshold": 0.0,
        "iou_threshold": None,
        "max_detections": parts.detections,
        "mask_size": None,
        "keypoints": names,
        "skeleton": [list(edge) for edge in options.skeleton or ()] if names else None,
    }


def check_config(network, parts, config, folder):
    """Raises UserError where the config does not fit a convert.Network of the Parts."""
    classes, count = network.shapes["centres"][-1], config.object_center_params.max_box_predictions
    if classes != config.num_classes:
        raise wrong_config(folder, f"it says {config.num_classes} classes, the model predicts {classes}")
    if count != parts.detections:
        raise wrong_config(folder, f"it says max_box_predictions {count}, the model gives {parts.detections}")


def add_detections(network, parts, config, metadata, window):
    """Adds TFOD's post-processing (center_net_meta_arch.postprocess) behind a convert.Network of the Parts.

    Returns {output name: tensor}.
    """
    ops = OpBuilder(network.graph, "postprocessing")
    _, height, width, _ = network.shapes["centres"]
    scores, classes, places = best_peaks(ops, network.outputs["centres"], network.shapes["centres"][1:], parts.peaks)
    _, pixels_high, pixels_wide, _ = parts.inputs["images"][1]
    # One place in parts of the input; TFOD's stride is a whole number (4).
    unit = np.float32([round(pixels_high / height) / pixels_high, round(pixels_wide / width) / pixels_wide])
    corners = boxes_at(ops, network, places)
    # TFOD clips to the heatmap, padding included, and then to the image, which lies within.
    boxes = to_window(ops, ops.add("Mul", corners, np.tile(unit, 2)), window)
    boxes = ops.add("Clip", boxes, np.float32(0), np.float32(1))
    least = metadata["score_threshold"]
    used = ops.add("Greater", scores, np.float32(0), dtype=bool)  # as num_detections counts
    if least > 0:
        used = ops.add("GreaterOrEqual", scores, np.float32(least), dtype=bool)
    number = ops.add("ReduceSum", ops.cast(used, np.int32), np.int64([1]), keepdims=1)
    boxes = ops.add("Where", ops.add("Unsqueeze", used, np.int64([2])), boxes, np.float32(0), dtype=np.float32)
    detections = {
        "num_detections": number,
        "detection_boxes": boxes,
        "detection_scores": ops.add("Where", used, scores, np.float32(0), dtype=np.float32),
        "detection_classes": ops.add("Where", used, classes, np.int32(0), dtype=np.int32),
    }
    if task := parts.task:
        points, scores = keypoints.add_keypoints(ops, network, task, places, corners)
        points = keypoints.to_image(ops, ops.add("Mul", points, unit), window)
        if task.clips_points:
            points, scores = keypoints.clip_to_image(ops, points, scores)
        if task.class_id is not None:
            of_class = ops.add("Equal", classes, np.int32(task.class_id), dtype=bool)
            used = ops.add("And", used, of_class)
        used = ops.add("Unsqueeze", used, np.int64([2]))
        detections["detection_keypoint_scores"] = ops.add("Where", used, scores, np.float32(0), dtype=np.float32)
        used = ops.add("Unsqueeze", used, np.int64([3]))
        detections["detection_keypoints"] = ops.add("Where", used, points, np.float32(0), dtype=np.float32)
    return detections


def best_peaks(ops, logits, shape, peaks):
    """The best Peaks of a heatmap's logits [B, h, w, C], of all classes together.

    shape: (h, w, C). Returns (scores [B, M], falling, classes [B, M] int32, places [B, M] int64, row by row). Of equal
    scores the first place counts, and its first class, as in TensorFlow's top_k of the flattened heatmap.
    """
    (height, width, classes), count = shape, peaks.count
    scores = peak_scores(ops, logits, peaks)  # [B, C, h, w]
    rows = ops.reshape(ops.add("Transpose", scores, perm=[0, 2, 3, 1]), [0, height * width, classes])
    seen = min(count, height * width)
    # The best pairs of place and class are at the places whose best class is best: no need to sort all pairs.
    best = ops.reshape(ops.add("ReduceMax", scores, axes=[1], keepdims=0), [0, height * width])
    _, places = ops.top_k(best, seen)
    # In the order of the map again, which decides between equal scores.
    backwards, _ = ops.top_k(ops.add("Neg", ops.cast(places, np.float32)), seen)
    places = ops.cast(ops.add("Neg", backwards), np.int64)
    scores, pairs = ops.top_k(ops.reshape(ops.gather_rows(rows, places), [0, seen * classes]), count)
    pair = np.arange(seen * classes)
    ranks = ops.add("Gather", pair // classes, pairs, axis=0)
    labels = ops.add("Gather", (pair % classes).astype(np.int32), pairs, axis=0)
    return scores, labels, ops.gather_rows(places, ranks)


def boxes_at(ops, network, places):
    """Boxes [B, M, 4] around places [B, M] (center_net_meta_arch.prediction_tensors_to_boxes), in places."""
    _, height, width, _ = network.shapes["centres"]

    def at_places(part):
        return ops.gather_rows(ops.reshape(network.outputs[part], [0, height * width, 2]), places)

    centre = ops.add("Add", ops.add("Gather", grid_of(height, width), places, axis=0), at_places("offsets"))
    half = ops.add("Mul", ops.add("Max", at_places("sizes"), np.float32(0)), np.float32(0.5))
    return ops.add("Concat", ops.add("Sub", centre, half), ops.add("Add", centre, half), axis=2)
