"""Compares a converted model with TensorFlow: the untouched SavedModel and the engine on the same images, in numbers and
side by side.

    python compare_tf.py --engine model.onnx --saved_model exported/saved_model --input photos --output comparison
    python compare_tf.py --engine engine.trt --saved_model exported --input val2017 --output comparison \\
        --annotations instances_val2017.json --num_images 200

Both sides take the image as it is in its file: TensorFlow's own resizer there, ours here. Writes comparison.json, a picture
of each image (TensorFlow, the engine and, with --annotations, the ground truth) and report.html. Exit status 0 if the two
agree within --tolerance, 1 if not.
"""

import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path

from commandline import UserError, make_folder, progress, run, warn, whole_file
from commandline.inputs import INPUTS, find_images, show_inputs
from commandline.options import (
    add_gpus,
    add_image_options,
    add_input,
    add_keypoint_threshold,
    add_nms_threshold,
    add_preprocessor,
    add_runtime,
    check_detection_type,
    check_preprocessor,
    count,
    count_from_0,
    image_options,
    make_parser,
    score,
)
from commandline.outputs import output_folder, refuse_to_overwrite

import numpy as np

from checks import coco, parity, report
from checks.annotations import keep_keypoints, keep_masks, open_annotations
from checks.matching import match_categories
from images.aspect import FIT_HELP, choose_fit
from images.decoding import ImageError, load_image
from runtimes import open_detector
from runtimes.detector import Detections, detect_image
from tfod.labels import LABELS_HELP, labels_of
from tfod.saved_model import SavedModel, find_saved_model, model_files
from visualize import PAGE_WIDTH, draw_detections, paste_mask, side_by_side

# How far scores may be apart, and what share of the detections may be unmatched, by the engine's precision. FP32: two
# orders of summation in a two-stage network differ by 0.013 (README); FP16 and INT8 round.
TOLERANCES = {"fp32": 0.02, "fp16": 0.05, "int8": 0.25}
RESULTS = ("comparison.json", "report.html")  # what is written into --output, besides pictures
BANDS = (0.1, 0.3, 0.5, 0.7, 0.9)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the converted model: model.onnx or engine.trt")
    add(
        "-m",
        "--saved_model",
        required=True,
        help="what it was made of: the SavedModel's folder, the export above it, or a frozen_inference_graph.pb of TF1",
    )
    add_input(parser, f"images: {INPUTS}")
    add("-a", "--annotations", help="COCO annotations of the images: adds the ground truth and the AP of both sides")
    add("-o", "--output", required=True, help="folder for the report; created if need be")
    add("-l", "--labels", help=LABELS_HELP)
    add("-n", "--num_images", type=count, metavar="N", help="compare the first N images only")
    add_nms_threshold(parser, "what is compared and drawn; default: 0.3")
    add(
        "--tolerance",
        type=score,
        help="largest difference in score, largest share unmatched; default: 0.02 (fp32), 0.05 (fp16), 0.25 (int8)",
    )
    add(
        "-d",
        "--detection_type",
        choices=list(coco.KINDS),
        help="compare boxes, or masks or keypoints too, and of which the AP is; default: boxes, keypoints too where the model"
        " gives them, and the AP of boxes",
    )
    add_keypoint_threshold(parser)
    add("--iou_threshold", type=score, default=0.5, help="a pixel belongs to a mask from this value on; default: 0.5")
    add("--pictures", type=count_from_0, default=24, metavar="N", help="pictures shown in the report; default: 24")
    add_image_options(parser)
    add("--fit", action="store_true", help=FIT_HELP)
    add_gpus(parser)
    add_runtime(parser)
    add_preprocessor(parser)
    return parser.parse_args(argv)


@dataclasses.dataclass
class Comparison:
    """The detections of one image on both sides, and which are of the same object."""

    path: Path
    size: tuple  # of the image: height, width
    theirs: Detections
    ours: Detections
    pairs: list  # [(index in theirs, index in ours, IoU of the boxes)]
    unmatched: tuple  # (indices of theirs, of ours) that are in no pair, from the threshold on
    classes_differ: int  # of those, pairs that overlap but for their class
    mask_ious: list
    # Of the keypoints of the pairs: parity.keypoint_differences; None where there are none.
    keypoints: tuple | None = None

    @property
    def scores(self):
        """The scores of the pairs, [pairs, 2]: theirs, ours."""
        return np.array([(self.theirs.scores[i], self.ours.scores[j]) for i, j, _ in self.pairs]).reshape(-1, 2)

    @property
    def difference(self):
        """How much to look at: the scores of the unmatched, and what the pairs are apart."""
        unmatched = self.theirs.scores[self.unmatched[0]].sum() + self.ours.scores[self.unmatched[1]].sum()
        return float(unmatched + np.abs(np.diff(self.scores, axis=1)).sum() + sum(1 - iou for _, _, iou in self.pairs))

    @property
    def text(self):
        """The same for people: `largest score difference 0.0021, smallest IoU 0.9932, 1 unmatched`."""
        parts = [f"{sum(map(len, self.unmatched))} unmatched"]
        if self.pairs:
            apart, iou = np.abs(np.diff(self.scores, axis=1)).max(), min(iou for _, _, iou in self.pairs)
            parts[:0] = [f"largest score difference {_text(apart)}", f"smallest IoU {iou:.4f}"]
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class GroundTruth:
    """What is annotated, and how it goes with the files and the model."""

    annotations: object  # pycocotools' COCO
    known: dict  # {path: image id}
    categories: dict  # {class + class_offset: category id}


def compare_detections(path, theirs, ours, size, threshold, mask_threshold=None):
    """Matches the detections of an image of `size` (height, width): TensorFlow's surest first, each with the free one of its
    class that overlaps it most, by half at least. What scores less than `threshold` on both sides does not count.
    """
    iou = parity.box_iou(theirs.boxes, ours.boxes)
    possible = iou * (theirs.classes[:, None] == ours.classes[None])
    free, pairs = np.ones(len(ours.scores), bool), []
    for i in range(len(theirs.scores)):
        row = possible[i] * free
        if len(row) and row.max() >= 0.5:
            j = int(row.argmax())
            free[j] = False
            pairs.append((i, j, float(row[j])))
    matched = {i for i, _, _ in pairs}
    unmatched = (
        [i for i, score in enumerate(theirs.scores) if score >= threshold and i not in matched],
        [j for j in np.flatnonzero(free).tolist() if ours.scores[j] >= threshold],
    )
    pairs = [pair for pair in pairs if max(theirs.scores[pair[0]], ours.scores[pair[1]]) >= threshold]
    differ = int((iou[np.ix_(*unmatched)] >= 0.5).any(axis=1).sum()) if all(unmatched) else 0
    masks = []
    if mask_threshold is not None:
        masks = [mask_iou(theirs, i, ours, j, size, mask_threshold) for i, j, _ in pairs]
    points = None
    if theirs.keypoints is not None:
        points = parity.keypoint_differences(theirs, ours, [pair[:2] for pair in pairs])
    return Comparison(Path(path), size, theirs, ours, pairs, unmatched, differ, masks, points)


def mask_iou(theirs, i, ours, j, size, threshold):
    """Intersection over union of two pasted masks; 1 where both are empty."""
    pasted = []
    for side, index in ((theirs, i), (ours, j)):
        canvas = np.zeros(size, bool)
        inside, top, left = paste_mask(side.masks[index], side.boxes[index] * (size * 2), *size, threshold)
        canvas[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        pasted.append(canvas)
    union = (pasted[0] | pasted[1]).sum()
    return float((pasted[0] & pasted[1]).sum() / union) if union else 1.0


def summarise(comparisons, threshold, tolerance):
    """The numbers of all images as a dict; its `verdict` is PASSED where both sides agree within the tolerance, and
    NOT COMPARED where neither side has a detection of `threshold` and more."""
    scores = np.concatenate([np.zeros((0, 2)), *(comparison.scores for comparison in comparisons)])
    apart = np.abs(scores[:, 0] - scores[:, 1])
    ious = np.array([iou for comparison in comparisons for _, _, iou in comparison.pairs])
    unmatched = [sum(len(comparison.unmatched[side]) for comparison in comparisons) for side in (0, 1)]
    masks = [iou for comparison in comparisons for iou in comparison.mask_ious]
    total = 2 * len(scores) + sum(unmatched)
    share = sum(unmatched) / total if total else 0.0
    edges = [threshold, *(edge for edge in BANDS if edge > threshold), 1.0]
    if (scores[:, 0] < threshold).any():  # and the engine's not
        edges.insert(0, 0.0)
    bands = []
    for low, high in itertools.pairwise(edges):
        last = high == 1.0
        inside = (scores[:, 0] >= low) & ((scores[:, 0] < high) | last)
        missed = sum(
            low <= score and (score < high or last)
            for comparison in comparisons
            for score in comparison.theirs.scores[comparison.unmatched[0]]
        )
        bands.append(
            {
                "from": low,
                "to": high,
                "matched": int(inside.sum()),
                "unmatched": int(missed),
                **_spread(apart[inside]),
            }
        )
    numbers = {
        "images": len(comparisons),
        "matched": len(scores),
        "unmatched_in_tensorflow": unmatched[0],
        "unmatched_in_engine": unmatched[1],
        "share_unmatched": share,
        "class_disagreements": sum(comparison.classes_differ for comparison in comparisons),
        **_spread(apart),
        "smallest_iou": float(ious.min()) if len(ious) else None,
        "median_iou": float(np.median(ious)) if len(ious) else None,
        "bands": bands,
        "tolerance": tolerance,
    }
    if masks:
        numbers |= {"smallest_mask_iou": min(masks), "median_mask_iou": float(np.median(masks))}
    if comparisons and comparisons[0].keypoints is not None:
        numbers |= summarise_keypoints(comparisons)
    agree = total and (apart.max() if len(apart) else 0) <= tolerance and share <= tolerance
    agree = agree and numbers.get("share_keypoints_elsewhere", 0) <= tolerance
    numbers["verdict"] = "PASSED" if agree else "FAILED" if total else "NOT COMPARED"
    return numbers


def summarise_keypoints(comparisons):
    """The numbers of the matched detections' keypoints. Elsewhere: 1 % of the image's height or width away, or on one side
    moved to a peak of the heatmap."""
    places, scores = (np.concatenate(parts) for parts in zip(*(each.keypoints for each in comparisons), strict=True))
    elsewhere = np.maximum(places, scores) > parity.FAR
    largest = (float(x[~elsewhere].max(initial=0)) if len(x) else None for x in (places, scores))
    return {
        "keypoints": len(places),
        "share_keypoints_elsewhere": float(elsewhere.mean()) if len(places) else 0.0,
        **dict(zip(("largest_keypoint_distance", "largest_keypoint_score_difference"), largest, strict=True)),
    }


def _spread(differences):
    return {
        "largest_score_difference": float(differences.max()) if len(differences) else None,
        "median_score_difference": float(np.median(differences)) if len(differences) else None,
    }


def main(argv=None):
    args = parse_args(argv)
    images = find_images(args.input, output=args.output)
    refuse_to_overwrite(images, args.input, args.output, "pictures")
    files = images.files[: args.num_images]
    folder = find_saved_model(args.saved_model)
    with open_detector(args.engine, args.gpus, args.runtime) as detector:
        metadata = detector.metadata
        check_preprocessor(args.preprocessor, metadata)
        choose_fit(metadata, args.fit, files, args.exif_rotate)
        check_detection_type(args.detection_type, metadata, args.engine)
        names = labels_of(args.labels, metadata, args.engine)
        truth = read_truth(args, files, names, metadata) if args.annotations else None
        # What scores less the engine was told to leave out.
        args.least = max(args.nms_threshold, metadata["score_threshold"])
        args.with_keypoints = bool(metadata.get("keypoints")) and args.detection_type in (None, "keypoints")
        args.skeleton = metadata.get("skeleton") or ()
        args.ran_on = detector.runtime
        with SavedModel(folder) as saved_model:
            refuse_other_model(saved_model, metadata, args)
            output = output_folder(args, RESULTS, files, {"--saved_model": model_files(folder)})
            try:
                comparisons, times = run_both(saved_model, detector, files, args)
            except KeyboardInterrupt:
                print("stopped: nothing was compared, nothing was written", file=sys.stderr)
                return 130
    if not comparisons:
        raise UserError(f"--input {show_inputs(args.input)}: none of the {len(files)} images could be read")
    tolerance = args.tolerance if args.tolerance is not None else TOLERANCES[metadata.get("precision", "fp32")]
    numbers = summarise(comparisons, args.least, tolerance)
    numbers["milliseconds"] = {name: float(np.median(values)) for name, values in times.items()}
    if truth:
        numbers["average_precision"] = both_average_precisions(truth, comparisons, metadata, args)
    text = verdict(numbers, args)
    pictures = {Path(file): f"{name}.jpg" for file, name in zip(images.files, images.names, strict=True)}
    numbers["pictures"] = sorted(pictures[comparison.path] for comparison in comparisons)
    remove_earlier(output, numbers["pictures"])
    draw_all(comparisons, pictures, truth, names, metadata, args, output / "pictures")
    with whole_file(output / "comparison.json") as path:
        path.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    write_report(output / "report.html", args, metadata, numbers, comparisons, output / "pictures", pictures, text)
    print_numbers(numbers)
    print(text)
    print(
        f"Wrote comparison.json, {len(comparisons)} pictures and report.html to {output}. Next: open {output / 'report.html'}"
    )
    enough = args.num_images and len(files) == args.num_images  # whatever else a list names
    skipped = (0 if enough else images.missing) + len(files) - len(comparisons)
    if skipped:
        warn(f"--input {show_inputs(args.input)}: {skipped} images were skipped: not compared")
    return 0 if numbers["verdict"] == "PASSED" and not skipped else 1


def refuse_other_model(saved_model, metadata, args):
    """Raises UserError where the two sides tell different numbers of classes apart: nothing would match, whoever converted."""
    theirs, ours = saved_model.possible_classes, metadata["num_classes"]
    if theirs and ours not in theirs:
        raise UserError(
            f"{args.engine} has {ours} class{'es' * (ours != 1)}, --saved_model {args.saved_model} {' or '.join(map(str, theirs))}: not the same"
            " model; give the one that it was converted from"
        )


def remove_earlier(output, pictures):
    """Removes the pictures of the run before, which its comparison.json names, but for those that are written anew."""
    try:
        earlier = json.loads((output / "comparison.json").read_text(encoding="utf-8"))["pictures"]
        stale = [output / "pictures" / name for name in earlier if name not in pictures]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for path in stale:
        if path.resolve().is_relative_to((output / "pictures").resolve()):
            path.unlink(missing_ok=True)


def run_both(saved_model, detector, files, args):
    """Runs both sides on each file; returns ([Comparison], {side: milliseconds of each image})."""
    comparisons, times = [], {"TensorFlow": [], "engine": []}
    load = functools.partial(load_image, **image_options(args))
    mask_threshold = args.iou_threshold if args.detection_type == "segmentation" else None
    metadata = detector.metadata if args.with_keypoints else {**detector.metadata, "keypoints": None}
    sides = {
        "TensorFlow": lambda image: parity.tensorflow_detections(saved_model, image, metadata),
        "engine": lambda image: detect_image(detector, image),
    }
    for path in progress(files, unit="image"):
        try:
            image = load(path)
            if not comparisons:
                for detect in sides.values():
                    detect(image)  # the first run sets things up
            found = {}
            for name, detect in sides.items():
                begun = time.perf_counter()
                found[name] = detect(image)
                times[name].append(1000 * (time.perf_counter() - begun))
        except ImageError as error:
            warn(f"{path}: skipped, {error}")
            continue
        size = image.shape[:2]
        comparisons.append(compare_detections(path, *found.values(), size, args.least, mask_threshold))
    return comparisons, times


def read_truth(args, files, names, metadata):
    """The GroundTruth of the files, or None, with a warning, where the annotations know none of them."""
    annotations, known, _, _ = open_annotations(args.annotations, files, args.exif_rotate)
    if not known:
        warn(f"--annotations {args.annotations} knows none of the images: no AP")
        return None
    if args.detection_type == "segmentation":
        keep_masks(args.annotations, annotations, set(known.values()))
    if args.detection_type == "keypoints":
        keep_keypoints(args.annotations, annotations, set(known.values()), len(metadata["keypoints"]))
    categories = match_categories(args.annotations, annotations, names, metadata)
    return GroundTruth(annotations, known, categories)


def both_average_precisions(truth, comparisons, metadata, args):
    """COCO's AP and AP50 of either side over the annotated images, or None where none of them could be read."""
    known = {
        comparison.path: truth.known[comparison.path] for comparison in comparisons if comparison.path in truth.known
    }
    if not known:
        return None
    threshold = args.iou_threshold if args.detection_type == "segmentation" else None
    result = {}
    for side, name in (("theirs", "TensorFlow"), ("ours", "engine")):
        results = []
        for comparison in comparisons:
            if comparison.path in known:
                image_id = known[comparison.path]
                found = getattr(comparison, side)
                results += coco.results_of(found, image_id, comparison.size, metadata["class_offset"], threshold)
        results = coco.in_categories(results, truth.categories)
        sigmas = coco.sigmas_of(len(metadata["keypoints"])) if args.detection_type == "keypoints" else None
        kind = args.detection_type or "bbox"
        numbers = coco.evaluate(truth.annotations, results, known.values(), kind, sigmas=sigmas).numbers
        result[name] = {key: numbers[key] for key in ("AP", "AP50")}
    return result


def verdict(numbers, args):
    """The verdict as a sentence."""
    if numbers["verdict"] == "NOT COMPARED":
        advice = "name images with objects in them, or a lower --nms_threshold"
        if args.least > args.nms_threshold:
            advice = f"{args.engine} was made to leave out what scores less: name images with objects in them"
        return f"NOT COMPARED: no detection of {args.least:g} and more in {numbers['images']} images; {advice}"
    raised = ""
    if args.least > args.nms_threshold:
        raised = f"; from {args.least:g} on, which {args.engine} was made for, not {args.nms_threshold:g}"
    return (
        f"{numbers['verdict']}: {numbers['matched']} detections in {numbers['images']} images matched,"
        f" {numbers['unmatched_in_tensorflow']} of TensorFlow's and {numbers['unmatched_in_engine']} of the engine's"
        f" unmatched ({100 * numbers['share_unmatched']:.1f} %; {100 * numbers['tolerance']:g} % allowed), largest score difference"
        f" {_text(numbers['largest_score_difference'])} (tolerance {numbers['tolerance']:g}){raised}"
    )


def _text(value, digits="{:.2g}"):
    return "-" if value is None else digits.format(value)


def _share(value):
    """A share as text: COCO's -1 is nothing to measure."""
    return "-" if value < 0 else f"{value:.4f}"


def rows(numbers):
    """The numbers as (text, value) lines."""
    ms = numbers["milliseconds"]
    lines = [
        ("images", str(numbers["images"])),
        ("matched detections", str(numbers["matched"])),
        ("unmatched in TensorFlow", str(numbers["unmatched_in_tensorflow"])),
        ("unmatched in the engine", str(numbers["unmatched_in_engine"])),
        ("class disagreements", str(numbers["class_disagreements"])),
        ("largest score difference", _text(numbers["largest_score_difference"])),
        ("median score difference", _text(numbers["median_score_difference"])),
        ("smallest IoU of a match", _text(numbers["smallest_iou"], "{:.4f}")),
        ("median IoU of a match", _text(numbers["median_iou"], "{:.4f}")),
    ]
    if "median_mask_iou" in numbers:
        lines.append(("smallest IoU of masks", f"{numbers['smallest_mask_iou']:.4f}"))
        lines.append(("median IoU of masks", f"{numbers['median_mask_iou']:.4f}"))
    if "keypoints" in numbers:
        lines.append(("keypoints of matches", str(numbers["keypoints"])))
        lines.append(("keypoints elsewhere", f"{100 * numbers['share_keypoints_elsewhere']:.2g} %"))
        lines.append(("others: largest distance", _text(numbers["largest_keypoint_distance"])))
        lines.append(("others: largest difference", _text(numbers["largest_keypoint_score_difference"])))
    for side, result in (numbers.get("average_precision") or {}).items():
        lines.append((f"{side}: AP, AP50", ", ".join(_share(result[key]) for key in ("AP", "AP50"))))
    lines += [(f"{side}: ms an image, median", f"{value:.1f}") for side, value in ms.items()]
    return lines


def print_numbers(numbers):
    for text, value in rows(numbers):
        print(f"{text:28} {value}")


def draw_all(comparisons, pictures, truth, names, metadata, args, folder):
    """Writes folder / pictures[path] of every image: the sides next to each other, unmatched detections in a dashed frame."""
    load = functools.partial(load_image, **image_options(args))
    for comparison in progress(comparisons, unit="picture"):
        image = load(comparison.path)
        annotated = truth and comparison.path in truth.known
        panels, seen_width = {}, PAGE_WIDTH / (3 if annotated else 2)
        for side, found, unmatched in zip(
            ("TensorFlow", args.ran_on), (comparison.theirs, comparison.ours), comparison.unmatched, strict=True
        ):
            count = int((found.scores >= args.least).sum())
            title = f"{side}: {count} detection{'s' if count != 1 else ''}" + (
                f", {len(unmatched)} unmatched" if unmatched else ""
            )
            panels[title] = draw_side(image, found, unmatched, names, args, seen_width)
        if annotated:
            offset = metadata["class_offset"]
            panels["ground truth"] = draw_truth(image, truth, comparison.path, names, offset, seen_width)
        picture = side_by_side(panels)
        target = folder / pictures[comparison.path]
        make_folder(target.parent)
        with whole_file(target) as path:
            picture.save(path, quality=88)


def draw_side(image, found, unmatched, names, args, seen_width):
    shown, pixels = found.above(args.least), np.float32(image.shape[:2] * 2)
    masks = shown.masks if args.detection_type == "segmentation" else None
    return draw_detections(
        image,
        shown.boxes * pixels,
        shown.scores,
        shown.classes,
        names,
        masks,
        args.iou_threshold,
        dashed=found.boxes[unmatched] * pixels,
        seen_width=seen_width,
        points=shown.points(image.shape[:2], args.keypoint_threshold) if args.with_keypoints else None,
        skeleton=args.skeleton,
    )


def draw_truth(image, truth, path, names, class_offset, seen_width):
    """The annotated objects in the colours and names of the model's classes; other categories have names of their own."""
    labels = {key: number - class_offset for number, key in reversed(truth.categories.items())}
    others = [key for key in truth.annotations.cats if key not in labels]
    labels |= {key: len(names) + i for i, key in enumerate(others)}
    names = [*names, *(truth.annotations.cats[key].get("name", str(key)) for key in others)]
    notes = truth.annotations.imgToAnns[truth.known[path]]
    boxes = np.float32([note["bbox"] for note in notes]).reshape(-1, 4)
    corners = np.column_stack([boxes[:, 1], boxes[:, 0], boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]])
    classes = np.int64([labels[note["category_id"]] for note in notes])
    scores = np.ones(len(notes))
    return draw_detections(image, corners, scores, classes, names, with_scores=False, seen_width=seen_width)


def write_report(path, args, metadata, numbers, comparisons, folder, pictures, text):
    """report.html: the numbers, score against score, the overlaps, the pictures that differ most."""
    bands = [
        (
            f"{band['from']:g} to {band['to']:g}",
            band["matched"],
            band["unmatched"],
            _text(band["largest_score_difference"]),
            _text(band["median_score_difference"]),
        )
        for band in numbers["bands"]
    ]
    order = sorted(range(len(comparisons)), key=lambda i: -comparisons[i].difference)[: args.pictures]
    figures = []
    for i in order:
        picture = report.shrink(report.Image.open(folder / pictures[comparisons[i].path]), 1400)
        figures.append((picture, f"{comparisons[i].path.name}: {comparisons[i].text}"))
    columns = ("TensorFlow's score", "matched", "unmatched", "largest score difference", "median")
    side_by_side_part = report.section(
        "Side by side",
        report.pictures(figures, 1),
        note=f"Most difference first, {len(figures)} of {len(comparisons)}; a dashed frame marks an unmatched detection."
        f" All {len(comparisons)} are in the folder pictures.",
    )
    parts = [
        report.verdict(numbers["verdict"] == "PASSED", text),
        report.section("Numbers", report.table(("", ""), rows(numbers), "numbers")),
        report.section("By score", report.table(columns, bands, "bands")),
        report.section("Score and overlap", report.plots(scatter(comparisons, args.ran_on), histogram(comparisons))),
        *([side_by_side_part] if figures else []),
    ]
    subtitle = f"{metadata['source']}: {args.saved_model} against {args.engine} on {show_inputs(args.input)}"
    report.write_page(path, "TensorFlow against the converted model", subtitle, parts)


def scatter(comparisons, runtime):
    scores = np.concatenate([np.zeros((0, 2)), *(comparison.scores for comparison in comparisons)])

    def draw(axes):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        axes.scatter(scores[:, 0], scores[:, 1], s=9, alpha=0.5, linewidths=0)
        axes.set(xlabel="score, TensorFlow", ylabel=f"score, {runtime}", xlim=(0, 1.01), ylim=(0, 1.01), aspect="equal")

    return report.plot(draw)


def histogram(comparisons):
    ious = [iou for comparison in comparisons for _, _, iou in comparison.pairs]

    def draw(axes):
        axes.hist(ious, bins=np.linspace(0.5, 1, 51))
        axes.set(xlabel="IoU of matched boxes", ylabel="detections")
        if ious:  # a few far apart must show beside thousands that agree
            axes.set(yscale="log", ylim=(0.8, None))
            # The usual ones write powers as formulas, which are not drawn as such here.
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")

    return report.plot(draw)


if __name__ == "__main__":
    run(main)
