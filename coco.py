"""COCO average precision of a detection function, by pycocotools."""

import contextlib
import io

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from image_batcher import load_image


def average_precision(annotations, images, detect, class_offset):
    """detect(RGB image) -> Detections, normalised to the image. Returns (AP, AP50) over the image files, named by their ids."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        results = []
        for path in images:
            image = load_image(path)
            found = detect(image)
            boxes = found.boxes * np.float32(image.shape[:2] * 2)
            sizes = boxes[:, 2:] - boxes[:, :2]
            rows = np.column_stack([boxes[:, 1], boxes[:, 0], sizes[:, 1], sizes[:, 0]]).tolist()
            for box, score, label in zip(rows, found.scores.tolist(), found.classes.tolist(), strict=True):
                entry = {"image_id": int(path.stem), "category_id": label + class_offset, "bbox": box, "score": score}
                results.append(entry)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.imgIds = [int(path.stem) for path in images]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0], evaluation.stats[1]
