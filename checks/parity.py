"""How far the detections of a converted model are from TensorFlow's, on one image.

Boxes are [N, 4] yxyx, normalised; classes are 0-based; both sides are sorted by falling score.
"""

import dataclasses

import numpy as np

from images.resizing import resize_image
from runtimes.detector import Detections, detect_image
from tfod.boxes import box_iou


@dataclasses.dataclass(frozen=True)
class Report:
    compared: int  # pairs of detections
    unmatched: int  # detections of either side that match none of the other
    box_difference: float  # largest, over coordinates and pairs
    score_difference: float  # largest, over pairs
    # Mean over pixels, largest over pairs, without boxes that end at the image's bottom or right: their crop's last
    # samples are zero or not by the last bit of the box (faster_rcnn.crop_features), in TensorFlow itself.
    mask_difference: float = 0.0
    keypoint_difference: float = (
        0.0  # largest, over coordinates and scores of keypoints and pairs, but for those elsewhere
    )
    keypoints: int = 0  # of the pairs, scores above 0 on either side
    # Keypoints that moved to another candidate, or on one side only: of two that are as near, the last bit decides.
    keypoints_elsewhere: int = 0
    # Of TensorFlow's detections, without the zeros that lists are filled up with: those below the config's threshold show that
    # the config is another model's.
    lowest_score: float = float("inf")


LARGEST = ("box_difference", "score_difference", "mask_difference", "keypoint_difference")
SUMMED = ("compared", "unmatched", "keypoints", "keypoints_elsewhere")
# A box or keypoint farther off than this in any coordinate (normalised) is another one, not a less exact one.
FAR = 0.01


def compare(saved_model, detector, image, tie=1e-4):
    """Runs an open SavedModel and an open detector on the same network input; returns a Report.

    image: RGB [H, W, 3], brought to a size first that TensorFlow's own resizer leaves as it is, so that both sides see the
    same tensor. tie: see match_by_rank.
    """
    pixels = network_pixels(image, detector.metadata["resizer"])
    theirs = tensorflow_detections(saved_model, pixels, detector.metadata)
    lowest = float(theirs.scores.min(where=theirs.scores > 0, initial=np.inf))
    # An overridden threshold leaves one side with more than the other has to compare.
    least = max(detector.metadata["score_threshold"], detector.metadata["config_score_threshold"])
    report = match_by_rank(theirs.above(least), detect_image(detector, pixels).above(least), tie)
    return dataclasses.replace(report, lowest_score=lowest)


def network_pixels(image, resizer):
    """RGB [H, W, 3] resized, and rounded, to a size that the model's resizer leaves as it is."""
    height, width = resizer["height"], resizer["width"]
    if resizer["kind"] == "keep_aspect_ratio" and "image_size" not in resizer:
        height = resizer["min_dimension"]
    return np.rint(resize_image(image, height, width)).astype(np.uint8)


def join(reports):
    """One Report of several pictures' reports."""
    sums = {name: sum(getattr(report, name) for report in reports) for name in SUMMED}
    largest = {name: max(getattr(report, name) for report in reports) for name in LARGEST}
    return Report(**sums, **largest, lowest_score=min(report.lowest_score for report in reports))


def allowed_unmatched(metadata):
    """How many detections, of both sides together, may be unmatched in a right conversion: 2 % or none.

    Where the op CropAndResize cuts at proposals, one that ends at the image's border has its last samples zero or not by
    the last bit of the box (faster_rcnn.crop_features), and a score that differs by 0.01. TensorFlow does not repeat
    this itself: two runs of a graph that fetch different tensors differ in it (BENCHMARKS.md).
    """
    return metadata["max_detections"] // 25 if metadata.get("zero_outside") else 0


def allowed_elsewhere(report):
    """How many keypoints of a Report may be elsewhere in a right conversion: 0.5 %."""
    return report.keypoints // 200


def tensorflow_detections(saved_model, pixels, metadata):
    """Runs the untouched SavedModel on RGB [H, W, 3]; returns Detections, boxes normalised to that image."""
    result = saved_model.detect(pixels)
    count = int(result["num_detections"])
    classes = result["detection_classes"][:count].astype(np.int32) - metadata["class_offset"]
    more = ["masks"] if metadata.get("mask_size") else []
    more += ["keypoints", "keypoint_scores"] if metadata.get("keypoints") else []
    parts = {part: result[f"detection_{part}"][:count] for part in ("boxes", "scores", *more)}
    return Detections(classes=classes, **parts)


def match_by_rank(theirs, ours, tie=1e-4):
    """Pairs detections of equal rank; those whose scores are closer than `tie` may have changed places: two roundings of
    the same sums order them differently.

    A detection is unmatched if no detection of its class with its score is left; at the end of a full list, where a tie
    decides who is still in, both sides' last ones are not counted.
    """
    free = np.ones(len(ours.scores), bool)
    box_difference = score_difference = mask_difference = 0.0
    pairs, unmatched = [], []
    for rank, (box, score, label) in enumerate(zip(theirs.boxes, theirs.scores, theirs.classes, strict=True)):
        near = np.flatnonzero(free & (ours.classes == label) & (np.abs(ours.scores - score) < tie))
        if rank < len(free) and free[rank] and ours.classes[rank] == label:
            near = np.append(near, rank)
        if not len(near):
            unmatched.append(score)
            continue
        distance = np.abs(ours.boxes[near] - box).max(axis=1)
        if distance.min() > FAR:
            unmatched.append(score)
            continue
        chosen = near[distance.argmin()]
        free[chosen] = False
        pairs.append((rank, chosen))
        box_difference = max(box_difference, float(distance.min()))
        score_difference = max(score_difference, float(abs(ours.scores[chosen] - score)))
        if theirs.masks is not None and box[2:].max() < 1 - 1e-6:
            apart = np.abs(theirs.masks[rank] - ours.masks[chosen]).mean()
            mask_difference = max(mask_difference, float(apart))
    unmatched.extend(ours.scores[free])
    if len(theirs.scores) == len(ours.scores) and unmatched:
        last = min(theirs.scores[-1], ours.scores[-1])
        unmatched = [score for score in unmatched if score - last >= tie]
    differences = box_difference, score_difference, mask_difference
    return Report(len(pairs), len(unmatched), *differences, **_compare_keypoints(theirs, ours, pairs))


def _compare_keypoints(theirs, ours, pairs):
    """What a Report says of the keypoints of `pairs` [(index in theirs, index in ours)]."""
    if theirs.keypoints is None or not pairs:
        return {}
    places, scores = keypoint_differences(theirs, ours, pairs)
    apart = np.maximum(places, scores)
    elsewhere = apart > FAR
    return {
        "keypoint_difference": float(apart[~elsewhere].max(initial=0)),
        "keypoints": len(apart),
        "keypoints_elsewhere": int(elsewhere.sum()),
    }


def keypoint_differences(theirs, ours, pairs):
    """How far the keypoints of pairs [(index in theirs, index in ours)] are apart: (largest difference of their coordinates,
    normalised, of their scores), [keypoints] each, of those that either side has."""
    a, b = (side.where([pair[i] for pair in pairs]) for i, side in enumerate((theirs, ours)))
    found = np.maximum(a.keypoint_scores, b.keypoint_scores) > 0
    places = np.abs(a.keypoints - b.keypoints).max(axis=2)
    return places[found], np.abs(a.keypoint_scores - b.keypoint_scores)[found]


def has_equal(these, others, far=1e-4):
    """Which of the Detections `these` are among `others`: [N] bool."""
    equal = these.classes[:, None] == others.classes[None]
    sides = [(these.scores, others.scores), *zip(these.boxes.T, others.boxes.T, strict=True)]
    for this, other in sides:  # one after the other: there may be thousands on both sides
        equal &= np.abs(this[:, None] - other[None]) <= far
    return equal.any(axis=1)


def match_raw(theirs, ours, far):
    """A Report on all (boxes [N, 4], scores [N, columns]) that detections are chosen from, before NMS.

    Rows that differ by more than `far` in their place may have changed it: proposals of nearly equal score. Boxes reach far beyond
    the image, so their difference counts in parts of their own size where that is over 1.
    """
    scale = np.maximum(1, np.abs(theirs[0]).max(axis=1))  # [N]

    def apart(i, j):  # rows of theirs and ours -> difference of boxes, of scores
        boxes = np.abs(theirs[0][i] - ours[0][j]).max(axis=-1) / scale[i]
        return boxes, np.abs(theirs[1][i] - ours[1][j]).max(axis=-1)

    partner = np.arange(len(scale))
    moved = np.flatnonzero(np.maximum(*apart(partner, partner)) > far)
    free = set(moved.tolist())
    unmatched = []
    for row in moved:
        choice = np.array(sorted(free))
        distance = np.maximum(*apart(np.full(len(choice), row), choice))
        if distance.min() > far:
            unmatched.append(row)
        else:
            partner[row] = choice[distance.argmin()]
            free.discard(int(partner[row]))
    rows = np.setdiff1d(np.arange(len(scale)), unmatched)
    boxes, scores = apart(rows, partner[rows])
    return Report(len(rows), len(unmatched), float(boxes.max(initial=0)), float(scores.max(initial=0)))


def match_by_overlap(theirs, ours, min_iou, max_score_difference):
    """The indices of `theirs` that match none of `ours`: same class, IoU and score as close as asked.

    Where both lists are full, those that score hardly more than the last of `ours` are not counted: they may just have
    been cut off there.
    """
    iou = box_iou(theirs.boxes, ours.boxes)
    close = np.abs(theirs.scores[:, None] - ours.scores[None]) <= max_score_difference
    match = (iou >= min_iou) & close & (theirs.classes[:, None] == ours.classes[None])
    unmatched = ~match.any(axis=1)
    if len(theirs.scores) == len(ours.scores) > 0:
        unmatched &= theirs.scores > ours.scores[-1] + max_score_difference
    return np.flatnonzero(unmatched)
