"""Evaluates a model on annotated images: COCO's average precision and recall of boxes, masks or keypoints.

    python eval_coco.py --engine model.onnx --input val2017 --annotations instances_val2017.json
    python eval_coco.py --engine engine.trt --input val2017 --annotations instances_val2017.json --output evaluation
    python eval_coco.py --engine mask.onnx --input train more/test --annotations mine.json --detection_type segmentation
    python eval_coco.py --engine pose.onnx --input val2017 --annotations person_keypoints_val2017.json \\
        --detection_type keypoints

With --output, writes detections.json (COCO results), metrics.json, per_class.csv and report.html, a page to look at.
"""

import contextlib
import csv
import dataclasses
import functools
import itertools
import json
import sys
import time
from pathlib import Path

from commandline import UserError, progress, run, warn, whole_file
from commandline.inputs import INPUTS, find_images, show_inputs
from commandline.options import (
    add_decoder,
    add_gpus,
    add_image_options,
    add_input,
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
    size,
)
from commandline.outputs import output_folder

from PIL import Image

from checks import coco, report
from checks.annotations import keep_keypoints, keep_masks, open_annotations
from checks.matching import match_categories
from images.aspect import FIT_HELP, choose_fit
from images.decoding import load_image
from runtimes import open_detector
from runtimes.gpu_images import choose_decoder
from runtimes.pipeline import choose_batch_size, detect_files, open_workers
from runtimes.processes import processor_count
from runtimes.workers import PROCESSES_FROM_CORES, PROCESSES_FROM_IMAGES, Workers
from tfod.labels import LABELS_HELP, labels_of
from visualize import mark_box

# Above this score threshold detections are missing that average precision counts.
MEANINGLESS_FROM = 0.05
CLASSES_PLOTTED = 6
RESULTS = ("detections.json", "metrics.json", "per_class.csv", "report.html")  # what is written into --output
DASHES = ("solid", "dashed", "dotted", "dashdot")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the model: model.onnx or engine.trt")
    add_input(parser, f"images: {INPUTS}")
    add("-a", "--annotations", required=True, help="COCO annotations of the images, instances_*.json")
    add("-l", "--labels", help=LABELS_HELP)
    add("-o", "--output", help="folder for the results and the report; created if need be; default: print only")
    add(
        "-d",
        "--detection_type",
        choices=list(coco.KINDS),
        default="bbox",
        help="evaluate boxes, masks or keypoints; default: bbox",
    )
    add(
        "--oks_sigmas",
        nargs="+",
        type=size,
        metavar="S",
        help="of keypoints: how far off each may be, in parts of its object's size, one number each;"
        f" default: COCO's of 17 keypoints, else {coco.USUAL_SIGMA:g}",
    )
    add_nms_threshold(parser, "leave out weaker detections; default: 0", default=0.0)
    add("--iou_threshold", type=score, default=0.5, help="a pixel belongs to a mask from this value on; default: 0.5")
    add(
        "-b",
        "--batch_size",
        type=count,
        metavar="N",
        help="images at a time, of a dynamic model; default: 8, of a two-stage model 1",
    )
    add(
        "--pictures",
        type=count_from_0,
        default=12,
        metavar="N",
        help="misses and false alarms shown in the report; default: 12",
    )
    add_image_options(parser)
    add("--fit", action="store_true", help=FIT_HELP)
    add_gpus(parser)
    add_runtime(parser)
    add_decoder(parser)
    add_preprocessor(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    given = find_images(args.input, output=args.output)
    files = given.files
    truth, known, unknown, absent = open_annotations(args.annotations, files, args.exif_rotate)
    print(
        f"{len(known)} annotated images; left out: {len(unknown)} files that the annotations do not know,"
        f" {len(absent)} annotated images that are not in {show_inputs(args.input)}"
    )
    if not known:
        raise UserError(
            f"--annotations {args.annotations} knows none of the {len(files)} images in {show_inputs(args.input)}; give theirs"
        )
    with open_detector(args.engine, args.gpus, args.runtime) as detector:
        metadata = detector.metadata
        sigmas = check_model(metadata, args)
        choose_fit(metadata, args.fit, list(known), args.exif_rotate)
        if args.detection_type == "segmentation":
            keep_masks(args.annotations, truth, set(known.values()))
        if args.detection_type == "keypoints":
            keep_keypoints(args.annotations, truth, set(known.values()), len(metadata["keypoints"]))
        names = labels_of(args.labels, metadata, args.engine)
        categories = match_categories(args.annotations, truth, names, metadata)
        usual = 1 if metadata["meta_architecture"] == "faster_rcnn" else 8  # its crops fill gigabytes at 8 images
        images = choose_batch_size(detector, args.batch_size, usual, args.engine)
        output = output_folder(args, RESULTS, files) if args.output else None
        decoder = choose_decoder(args.decoder, detector, list(known), args.exif_rotate)
        # Processes that have nothing to decode would take processors, as they start, from the threads that feed the GPU.
        with open_workers(detector, len(known), images, cores=1 if decoder else None) as workers:
            try:
                results, evaluated, seconds = detect(detector, known, images, workers, args, decoder)
            except KeyboardInterrupt:
                print("stopped: nothing was evaluated, nothing was written", file=sys.stderr)
                return 130
    if not evaluated:
        raise UserError(f"--input {show_inputs(args.input)}: none of the {len(known)} annotated images could be read")
    begun = time.perf_counter()
    with coco.without_garbage_collection():
        results = coco.in_categories(results, categories)
    kind = args.detection_type
    evaluation = coco.evaluate(truth, results, evaluated.values(), kind, sigmas=sigmas)
    measuring = time.perf_counter() - begun
    print(
        f"{len(evaluated)} images in {seconds:.1f} s: {len(evaluated) / seconds:.1f} images/s;"
        f" the metric took {measuring:.1f} s"
    )
    for key, text in coco.numbers_of(args.detection_type).items():
        print(f"{text:28} {show(evaluation.numbers[key])}")
    status = check_whole(args, len(known) - len(evaluated) + given.missing, evaluation)
    if not output:
        print(f"Evaluated {args.engine}. Next: add --output DIR for a report with curves, classes and pictures")
        return status
    write_results(output, args, metadata, evaluation, results, evaluated)
    worst = coco.find_mistakes(truth, results, evaluated.values(), kind, sigmas) if args.pictures else ()
    write_report(output / "report.html", args, metadata, evaluation, worst, truth, evaluated)
    print(f"Wrote detections.json, metrics.json, per_class.csv and report.html. Next: open {output / 'report.html'}")
    return status


def check_whole(args, skipped, evaluation):
    """Warns where the numbers are not of all images that were named, or of nothing; returns the exit status."""
    if skipped:
        warn(f"--input {show_inputs(args.input)}: {skipped} images were skipped: they are not in the numbers")
    measured = evaluation.numbers["AP"] >= 0
    if not measured:
        warn(
            f"--annotations {args.annotations}: nothing to measure: no object of these images counts, crowds alone do not"
        )
    return 1 if skipped or not measured else 0


def show(value):
    """A share as text: COCO's -1 is nothing to measure."""
    return "-" if value < 0 else f"{value:.3f}"


def check_model(metadata, args):
    """Warns where the numbers will mean little; raises UserError where masks or keypoints are asked of a model that has none.

    Returns the sigmas of keypoints (coco.sigmas_of), None where they are not evaluated.
    """
    check_preprocessor(args.preprocessor, metadata)
    check_detection_type(args.detection_type, metadata, args.engine)
    threshold = max(args.nms_threshold, metadata["score_threshold"])
    if threshold > MEANINGLESS_FROM:
        where = "--nms_threshold" if args.nms_threshold >= threshold else f"the NMS in {args.engine}"
        warn(
            f"{where} leaves out what scores less than {threshold:g}: average precision counts those too and comes out low"
        )
    if args.detection_type != "keypoints":
        return None
    count, given = len(metadata["keypoints"]), args.oks_sigmas
    if given and len(given) != count:
        raise UserError(f"--oks_sigmas: {len(given)} numbers for {count} keypoints; give one for each")
    return coco.sigmas_of(count, given)


def detect(detector, known, batch_size, workers, args, decoder=None):
    """Runs the detector on the files of `known` {path: image id}, batch_size at a time. decoder: a GpuDecoder, or None.

    Returns (COCO results, to be read once, those of `known` that could be read, seconds). Without a decoder the workers decode
    ahead of the network, with one they do nothing; masks are pasted in processes of their own behind it; boxes and keypoints
    become COCO's results when these are read.
    """
    masks = args.detection_type == "segmentation"
    idle = {} if masks else {"masks": None}
    if args.detection_type != "keypoints":
        idle |= {"keypoints": None, "keypoint_scores": None}
    to_results = functools.partial(
        coco.results_of,
        class_offset=detector.metadata["class_offset"],
        mask_threshold=args.iou_threshold if masks else None,
    )
    found, evaluated, started = [], {}, time.perf_counter()
    load = functools.partial(load_image, **image_options(args))
    # To paste masks holds Python's lock: processes do it, on however few cores.
    cores = max(PROCESSES_FROM_CORES, processor_count())
    with (
        Workers(PROCESSES_FROM_IMAGES, cores=cores) if masks else contextlib.nullcontext() as pasting,
        progress(known, unit="image") as bar,
        coco.without_garbage_collection(),
    ):

        def found_in_files():
            for item in detect_files(detector, list(known), batch_size, workers, load=load, decoder=decoder):
                evaluated[item.path] = known[item.path]
                shape = item.placement.height, item.placement.width
                detections = dataclasses.replace(item.found.above(args.nms_threshold), **idle)
                yield detections if masks else detections.alone(), known[item.path], shape

        for made in pasting.map(to_results, found_in_files()) if masks else found_in_files():
            found.append(made)
            bar.update()
    seconds = time.perf_counter() - started
    results = found if masks else (to_results(*item) for item in found)
    return itertools.chain.from_iterable(results), evaluated, seconds


def write_results(output, args, metadata, evaluation, results, evaluated):
    """detections.json, metrics.json and per_class.csv."""
    with whole_file(output / "detections.json") as path:
        path.write_text(json.dumps(results), encoding="utf-8")
    metrics = {
        "engine": str(args.engine),
        "model": metadata["source"],
        "detection_type": args.detection_type,
        "images": len(evaluated),
        "score_threshold": max(args.nms_threshold, metadata["score_threshold"]),
        **evaluation.numbers,
    }
    with whole_file(output / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    with whole_file(output / "per_class.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["category_id", "name", "objects", "AP", "AP50"])
        writer.writerows([key, name, count, show(ap), show(ap50)] for key, name, count, ap, ap50 in evaluation.classes)


def write_report(path, args, metadata, evaluation, worst, truth, evaluated):
    """report.html: the numbers, the classes, precision-recall curves, the worst mistakes as pictures."""
    numbers = [(text, show(evaluation.numbers[key])) for key, text in coco.numbers_of(args.detection_type).items()]
    found = [row for row in evaluation.classes if row[2]]
    rows = [(name, count, show(ap), show(ap50)) for _, name, count, ap, ap50 in sorted(found, key=lambda row: -row[3])]
    files = {image_id: file for file, image_id in evaluated.items()}
    kind = {"bbox": "boxes", "segmentation": "masks"}.get(args.detection_type, "keypoints")
    parts = [
        report.section("COCO numbers", report.table(("", kind), numbers, "numbers")),
        report.section("Precision and recall", report.plots(*curves(evaluation))),
        report.section(
            "Classes",
            report.table(("class", "objects", "AP", "AP50"), rows, "classes"),
            note=f"Best first, all {len(rows)} of them.",
        ),
    ]
    if worst:
        missed, false_alarms = worst
        fits = "matches by an OKS of 0.5" if kind == "keypoints" else "overlaps by half"
        load = functools.partial(load_image, **image_options(args))
        parts += [
            report.section(
                "Worst misses",
                mistakes(missed[: args.pictures], files, truth, "share of the image", load),
                note=f"The largest objects that no detection of their class from {coco.SEEN} on {fits}.",
            ),
            report.section(
                "Worst false alarms",
                mistakes(false_alarms[: args.pictures], files, truth, "score", load),
                note="The surest detections that match no object of their class: "
                + ("OKS below 0.5." if kind == "keypoints" else "they overlap none by half."),
            ),
        ]
    subtitle = f"{metadata['source']}, {args.engine}: {len(evaluated)} images of {show_inputs(args.input)}, {Path(args.annotations).name}"
    report.write_page(path, f"COCO evaluation, {kind}", subtitle, parts)


def curves(evaluation):
    """Two plots: the mean over the classes for several IoUs, and the classes with most objects."""
    recall = [i / 100 for i in range(101)]
    measured = [row for row in evaluation.classes if row[0] in evaluation.class_curves]
    common = sorted(measured, key=lambda row: -row[2])[:CLASSES_PLOTTED]
    lines = {"mean over the classes": {f"IoU {iou}": line for iou, line in evaluation.curves.items()}}
    lines["most frequent classes, IoU 0.50"] = {name: evaluation.class_curves[key] for key, name, *_ in common}

    def draw(axes, title):
        # Lines that coincide are all seen: each is thinner than those below it, and broken in another way.
        for i, (label, precision) in enumerate(lines[title].items()):
            label = label.replace("$", r"\$")  # between two it would read mathematics
            axes.plot(recall, precision, label=label, linewidth=max(1.2, 3.2 - i), linestyle=DASHES[i % len(DASHES)])
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title=title)
        if lines[title]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)  # beside the curves

    return [report.plot(lambda axes, title=title: draw(axes, title)) for title in lines]


def found_instead(mistake, truth):
    """What was found in place of a missed object."""
    if not mistake.instead:
        return "nothing found there"
    score, other = mistake.instead["score"], mistake.instead["category_id"]
    if other == mistake.category_id:
        return f"found, but with {score:.2f}"
    return f"found there: {truth.cats.get(other, {}).get('name', other)} {score:.2f}"


def mistakes(found, files, truth, unit, load):
    """Pictures of the worst mistakes, each with its box marked."""
    figures = []
    for mistake in found:
        x, y, width, height = mistake.box
        picture = mark_box(Image.fromarray(load(files[mistake.image_id])), (y, x, y + height, x + width))
        name = truth.cats.get(mistake.category_id, {}).get("name", mistake.category_id)
        caption = f"{name}: {unit} {mistake.weight:.2f}, {files[mistake.image_id].name}"
        if unit != "score":
            caption += f"; {found_instead(mistake, truth)}"
        figures.append((report.shrink(picture, 480), caption))
    return report.pictures(figures, 4) if figures else "<p>None.</p>"


if __name__ == "__main__":
    run(main)
