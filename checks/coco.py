"""COCO: detections as COCO results, and COCO's numbers of them.

Boxes are [ymin, xmin, ymax, xmax] in Detections and [x, y, width, height] in pixels in COCO's files.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import io

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval as PycocotoolsEvaluation
from pycocotools.cocoeval import Params

from checks.annotations import load_annotations
from checks.matching import match_images
from images.decoding import load_image
from runtimes.processes import processor_count
from runtimes.workers import Workers
from visualize import paste_mask

PYCOCOTOOLS = COCO, PycocotoolsEvaluation
try:
    import faster_coco_eval

    LIBRARY = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
except ImportError:
    LIBRARY = PYCOCOTOOLS

# The twelve numbers of COCOeval.summarize, in its order (cocodataset.org/#detection-eval).
NUMBERS = {
    "AP": "AP, IoU 0.50:0.95",
    "AP50": "AP, IoU 0.50",
    "AP75": "AP, IoU 0.75",
    "AP_small": "AP, small objects",
    "AP_medium": "AP, medium objects",
    "AP_large": "AP, large objects",
    "AR_1": "AR, 1 detection an image",
    "AR_10": "AR, 10 detections an image",
    "AR_100": "AR, 100 detections an image",
    "AR_small": "AR, small objects",
    "AR_medium": "AR, medium objects",
    "AR_large": "AR, large objects",
}
# The ten of keypoints (cocodataset.org/#keypoints-eval); OKS, the similarity of an object's keypoints, is in an IoU's place.
KEYPOINT_NUMBERS = {
    "AP": "AP, OKS 0.50:0.95",
    "AP50": "AP, OKS 0.50",
    "AP75": "AP, OKS 0.75",
    "AP_medium": "AP, medium objects",
    "AP_large": "AP, large objects",
    "AR": "AR, OKS 0.50:0.95",
    "AR50": "AR, OKS 0.50",
    "AR75": "AR, OKS 0.75",
    "AR_medium": "AR, medium objects",
    "AR_large": "AR, large objects",
}
# --detection_type -> pycocotools' iouType, the key of the annotations and results that is compared.
KINDS = {"bbox": ("bbox", "bbox"), "segmentation": ("segm", "segmentation"), "keypoints": ("keypoints", "keypoints")}
# How far a keypoint may be off, in parts of the object's size, where it is none of COCO's.
USUAL_SIGMA = 0.05
# From this score on a detection is one that a user would see: an object that only weaker ones find counts as missed.
SEEN = 0.3
# From so many results on they are shared out to processes. Fewer take one process two seconds, and to start others takes one.
SHARED_OUT_FROM = 200_000


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A missed object or a false alarm; the ids are the annotations' own."""

    image_id: int | str | float
    category_id: int | str | float
    box: list  # [x, y, width, height] in pixels
    weight: float  # of a false alarm its score, of a missed object its share of the image's area
    instead: dict | None = None  # for a missed object: the surest COCO result that overlaps it by half, of any class


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """COCO's numbers; shares are 0..1, and -1 where there is nothing to measure."""

    numbers: dict  # {key of numbers_of(detection_type): value}
    classes: list  # [(category id, name, objects, AP, AP50)]
    curves: dict  # {IoU: precision [101] at recall 0, 0.01, ... 1, mean over the classes}
    class_curves: dict  # {category id: precision [101]} at IoU 0.50


def numbers_of(detection_type):
    """{key of Evaluation.numbers: what it is}."""
    return KEYPOINT_NUMBERS if detection_type == "keypoints" else NUMBERS


def results_of(detections, image_id, size, class_offset, mask_threshold=None):
    """Detections of an image of `size` (height, width) as a list of COCO results; their category_id is the model's.

    mask_threshold: adds each mask, pasted into its box and cut off there, run-length encoded; one at a time. Keypoints, where
    there are some, are x, y, 1 each, or 0, 0, 0 where the class has none; their scores stand beside.
    """
    height, width = size
    points = detections.points(size, 0)
    boxes = detections.boxes * np.float32([height, width, height, width])
    corners = np.column_stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]])
    results = []
    for i, (box, score, label) in enumerate(
        zip(corners.tolist(), detections.scores.tolist(), detections.classes.tolist(), strict=True)
    ):
        entry = {"image_id": image_id, "category_id": label + class_offset, "bbox": box, "score": score}
        if mask_threshold is not None:
            entry["segmentation"] = encode_mask(detections.masks[i], boxes[i], height, width, mask_threshold)
        if points is not None:
            shown = np.nan_to_num(np.column_stack([points[i, :, ::-1], np.isfinite(points[i, :, 0])]))
            entry["keypoints"] = shown.ravel().tolist()
            entry["keypoint_scores"] = detections.keypoint_scores[i].tolist()
        results.append(entry)
    return results


def in_categories(results, categories):
    """The results with the category ids of the annotations; those of classes that are not annotated are left out.

    categories: {class + class_offset: category id} of match_categories.
    """
    return [
        {**entry, "category_id": categories[entry["category_id"]]}
        for entry in results
        if entry["category_id"] in categories
    ]


def encode_mask(mask, box, height, width, threshold):
    """A mask [h, w] over its box (yxyx, pixels) as COCO's run-length encoding of the whole image."""
    inside, top, left = paste_mask(mask, box, height, width, threshold)
    canvas = np.zeros((height, width), np.uint8, order="F")
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    encoded = rle.encode(canvas)
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def sigmas_of(count, given=None):
    """OKS's constants [count] of keypoints: those given, COCO's of its 17, else the usual one."""
    if given is not None:
        return np.float64(given)
    usual = Params("keypoints").kpt_oks_sigmas
    return usual if len(usual) == count else np.full(count, USUAL_SIGMA)


def evaluate(truth, results, image_ids, detection_type="bbox", library=None, sigmas=None):
    """COCO's numbers of `results` (of in_categories) on those images. detection_type: of KINDS; sigmas: of keypoints (see
    sigmas_of), which pycocotools measures.

    library: of the evaluation's COCO and COCOeval; default: faster-coco-eval where it is installed (five times as fast on
    5,000 images, BENCHMARKS.md), else pycocotools. Their numbers are the same. From SHARED_OUT_FROM results on, classes,
    which have no say in one another's numbers, are shared out to processes, where Workers are such. Raises UserError where one
    of these ends.
    """
    kind, _ = KINDS[detection_type]
    image_ids = set(image_ids)
    library = library or (PYCOCOTOOLS if kind == "keypoints" else LIBRARY)
    cores = min(processor_count(), 1 + len(truth.cats))  # for this process, and for those with a class to measure
    with Workers(len(results) if len(results) >= SHARED_OUT_FROM else 0, cores=cores) as workers:
        dataset, results = _numbered(truth, results, image_ids, detection_type)  # while they start
        if workers.processes:
            parts = _share_out(dataset, results, workers.count)
            begin = functools.partial(workers.submit, _measure)
            measured = list(workers.in_order(lambda part: begin(*part, kind, library, sigmas), parts))
        else:
            measured = [_measure(dataset, results, kind, library, sigmas)]
    keys, precision, recall = zip(*measured, strict=True)
    order = np.argsort(np.concatenate(keys))
    precision = np.concatenate(precision, axis=2)[:, :, order]  # [IoU, recall, class, size, most]
    recall = np.concatenate(recall, axis=1)[:, order]  # [IoU, class, size, most]
    summary = library[1](iouType=kind)
    summary.eval = {"precision": precision, "recall": recall}
    with contextlib.redirect_stdout(io.StringIO()):
        summary.summarize()
    precision = precision[:, :, :, 0, -1]  # all sizes, most detections
    return Evaluation(
        dict(zip(numbers_of(detection_type), map(float, summary.stats), strict=False)),
        _per_class(truth, image_ids, precision),
        _curves(precision),
        {key: precision[0, :, k] for k, key in enumerate(truth.cats) if (precision[0, :, k] > -1).all()},
    )


def _numbered(truth, results, image_ids, detection_type):
    """(dataset, results) of those images as both libraries take them, whatever the annotations are like.

    Both need a dataset of every key that either reads, and ids that are whole numbers from 1 on: here the places among the
    annotations' images and categories. Sizes come from a box where there is one, so masks go without.
    """
    images, categories = ({key: number for number, key in enumerate(each, 1)} for each in (truth.imgs, truth.cats))
    shape = KINDS[detection_type][1]
    copied = ["id", "bbox", "area", "iscrowd", shape] + (["num_keypoints"] if shape == "keypoints" else [])
    dataset = {
        "info": {},
        "licenses": [],
        "images": [
            {"id": images[key], **{side: truth.imgs[key].get(side) for side in ("height", "width")}}
            for key in image_ids
        ],
        "categories": [{"id": number} for number in categories.values()],
        "annotations": [
            {
                **{key: note[key] for key in copied},
                "image_id": images[note["image_id"]],
                "category_id": categories[note["category_id"]],
            }
            for note in truth.dataset["annotations"]
            if note["image_id"] in image_ids
        ],
    }
    results = [
        {
            "image_id": images[entry["image_id"]],
            "category_id": categories[entry["category_id"]],
            "score": entry["score"],
            shape: entry[shape],
        }
        for entry in results
        if entry["image_id"] in image_ids and entry["category_id"] in categories
    ]
    return dataset, results


def _measure(dataset, results, kind, library, sigmas=None):
    """(class ids, precision [IoU, recall, class, size, most], recall [IoU, class, size, most]) of what _numbered gives."""
    truth_class, evaluation_class = library
    with contextlib.redirect_stdout(io.StringIO()), without_garbage_collection():
        truth = _indexed(truth_class, dataset)
        evaluation = evaluation_class(truth, _load_results(truth, results), kind)
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.evaluate()
        evaluation.accumulate()
    return list(evaluation.params.catIds), evaluation.eval["precision"], evaluation.eval["recall"]


def _indexed(truth_class, dataset):
    truth = truth_class()
    truth.dataset = dataset
    truth.createIndex()
    return truth


def _share_out(dataset, results, most):
    """Shares the classes out to at most `most` parts of like numbers of results: [(dataset, results)]."""
    found, wanted = ({category["id"]: [] for category in dataset["categories"]} for _ in range(2))
    for entry in results:
        found[entry["category_id"]].append(entry)
    for note in dataset["annotations"]:
        wanted[note["category_id"]].append(note)
    groups = [[0, []] for _ in range(min(most, len(found)))]
    for key in sorted(found, key=lambda key: -len(found[key])):
        smallest = min(groups, key=lambda group: group[0])
        smallest[0] += len(found[key]) + 1
        smallest[1].append(key)
    for _, keys in groups:
        part = {
            "categories": [{"id": key} for key in keys],
            "annotations": [note for key in keys for note in wanted[key]],
        }
        yield {**dataset, **part}, [entry for key in keys for entry in found[key]]


@contextlib.contextmanager
def without_garbage_collection():
    """Half a million dicts are made, none of them in a cycle: to walk them again and again took a third of the time
    here, two thirds where eval_coco.py makes them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def find_mistakes(truth, results, image_ids, detection_type="bbox", sigmas=None):
    """(missed objects, largest first; false alarms, surest first): lists of Mistake, at IoU (or OKS) 0.5, of detections from SEEN on."""
    kind, _ = KINDS[detection_type]
    seen = [entry for entry in results if entry["score"] >= SEEN]
    dataset, seen = _numbered(truth, seen, set(image_ids), detection_type)
    with contextlib.redirect_stdout(io.StringIO()):
        numbered = _indexed(COCO, dataset)
        evaluation = PycocotoolsEvaluation(numbered, _load_results(numbered, seen), kind)
        evaluation.params.iouThrs = np.array([0.5])
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.params.areaRng, evaluation.params.areaRngLbl = evaluation.params.areaRng[:1], ["all"]
        evaluation.evaluate()
    images, categories = list(truth.imgs), list(truth.cats)
    missed, false_alarms, of_image = [], [], collections.defaultdict(list)
    for entry in results:
        of_image[entry["image_id"]].append(entry)
    for image in filter(None, evaluation.evalImgs):
        key = images[image["image_id"] - 1], categories[image["category_id"] - 1]
        rows = zip(image["dtIds"], image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0], strict=True)
        for found, score, matched, ignored in rows:
            if not matched and not ignored:
                false_alarms.append(Mistake(*key, evaluation.cocoDt.anns[found]["bbox"], score))
        for wanted, matched, ignored in zip(image["gtIds"], image["gtMatches"][0], image["gtIgnore"], strict=True):
            if not ignored and not matched:
                note, size = truth.anns[wanted], truth.imgs[key[0]]
                whole = size.get("width", 1) * size.get("height", 1)
                instead = _surest_on(note["bbox"], of_image[key[0]])
                missed.append(Mistake(*key, note["bbox"], note["bbox"][2] * note["bbox"][3] / whole, instead))
    return tuple(sorted(mistakes, key=lambda mistake: -mistake.weight) for mistakes in (missed, false_alarms))


def _surest_on(box, results):
    """The result of the highest score that overlaps the box [x, y, width, height] by half, or None."""
    if not results:
        return None
    iou = rle.iou(np.float64([entry["bbox"] for entry in results]), np.float64([box]), [0])[:, 0]
    return max((entry for entry, overlap in zip(results, iou, strict=True) if overlap >= 0.5), key=_score, default=None)


def _score(entry):
    return entry["score"]


def _load_results(truth, results):
    """The results as a COCO of the class of `truth`; pycocotools cannot load none."""
    if results:
        return truth.loadRes(results)
    return _indexed(type(truth), {**truth.dataset, "annotations": []})


def _mean(values):
    """Mean of those that are measured; -1 where none is."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _per_class(truth, image_ids, precision):
    images = set(image_ids)
    objects = dict.fromkeys(truth.cats, 0)
    for note in truth.anns.values():
        if note["image_id"] in images and not note.get("iscrowd"):
            objects[note["category_id"]] += 1
    return [
        (key, truth.cats[key].get("name", str(key)), objects[key], _mean(precision[:, :, k]), _mean(precision[0, :, k]))
        for k, key in enumerate(objects)
    ]


def _curves(precision):
    measured = precision[:, :, (precision[0] > -1).all(axis=0)]  # [IoU, recall, classes with objects]
    if not measured.shape[2]:
        return {}
    means = measured.mean(axis=2)
    return {"0.50": means[0], "0.75": means[5], "0.50:0.95": means.mean(axis=0)}


def average_precision(annotations, images, detect, class_offset):
    """detect(RGB image) -> Detections. Returns (AP, AP50) of boxes over those of the image files that are annotated."""
    truth = load_annotations(annotations)
    known, _, _ = match_images(truth, images)
    results = []
    for path, image_id in known.items():
        image = load_image(path)
        results += results_of(detect(image), image_id, image.shape[:2], class_offset)
    numbers = evaluate(truth, results, known.values()).numbers
    return numbers["AP"], numbers["AP50"]
