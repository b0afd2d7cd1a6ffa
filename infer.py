"""Runs a converted model on images: one picture and one tab-separated file of detections for each.

    python infer.py --engine model.onnx --input photos --output results
    python infer.py --engine model.onnx --input photo.jpg --output results --labels labels.txt --nms_threshold 0.5

Each line of NAME.tsv is a detection: xmin, ymin, xmax, ymax (pixels of the original image), score, class (0-based: the
line of the labels file). Exit status 1 if an image could not be read.
"""

import argparse
import time
from pathlib import Path

from cli import UserError, make_folder, progress, run, whole_file
from detector import open_detector
from image_batcher import ImageBatcher, find_images, result_names
from visualize import draw_detections, read_labels


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the model: model.onnx, or engine.trt from build_engine.py")
    add("-i", "--input", required=True, help="an image or a folder of images (jpg, jpeg, png, bmp)")
    add("-o", "--output", required=True, help="folder for the results; created if need be")
    add("-l", "--labels", help="text file, one class name a line; default: COCO's names for a model of 90 classes")
    add(
        "-t",
        "--nms_threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="leave out detections that score less; 0 keeps all that the model gives; default: 0.3",
    )
    add("--detection_type", choices=["bbox", "segmentation"], default="bbox", help="draw boxes, or masks too")
    add("--iou_threshold", type=float, default=0.5, help="a pixel belongs to a mask from this value on; default: 0.5")
    add("--preprocessor", help="not needed: the model file knows its own; accepted for old command lines")
    return parser.parse_args(argv)


def write_results(path, boxes, scores, classes):
    """Writes detections as lines `xmin ymin xmax ymax score class`, tab-separated. boxes [N, 4] yxyx in pixels."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for (ymin, xmin, ymax, xmax), score, label in zip(boxes, scores, classes, strict=True):
            file.write(f"{xmin:.2f}\t{ymin:.2f}\t{xmax:.2f}\t{ymax:.2f}\t{score:.6f}\t{label}\n")


def write_picture(path, picture):
    with whole_file(path) as temporary:
        picture.save(temporary, compress_level=1)  # a photo packs hardly better at higher levels, only slower


def main(argv=None):
    args = parse_args(argv)
    files = find_images(args.input)
    source = Path(args.input) if Path(args.input).is_dir() else Path(args.input).parent
    if Path(args.output).resolve() == source.resolve():
        raise UserError(
            f"--output {args.output} is where the input lies: choose another folder, so that none is overwritten"
        )
    with open_detector(args.engine) as detector:
        if args.detection_type == "segmentation" and not detector.metadata.get("mask_size"):
            raise UserError(f"--detection_type segmentation: {args.engine} gives no masks; use bbox")
        labels = read_labels(args.labels, detector.metadata["num_classes"])
        output = make_folder(args.output)
        mask_threshold = args.iou_threshold if args.detection_type == "segmentation" else None
        return process(detector, files, output, labels, args.nms_threshold, mask_threshold)


def process(detector, files, output, labels, threshold, mask_threshold):
    """Runs `detector` on `files`, writes their results into the folder `output`, prints the rates; returns the status.

    threshold: detections that score less are left out. mask_threshold: draw masks from this value on; None: no masks.
    """
    names = dict(zip(files, result_names(files), strict=True))
    batcher = ImageBatcher(files, detector.metadata["resizer"], detector.input.batch or 1)
    done, inference, drawing, started = 0, 0.0, 0.0, time.perf_counter()
    bar = progress(files, unit="image")
    for batch in batcher:
        begun = time.perf_counter()
        results = detector.infer(batch.tensor, batch.true_shapes)
        inferred = time.perf_counter()
        for path, image, placement, found in zip(batch.paths, batch.images, batch.placements, results, strict=True):
            found = found.above(threshold)
            boxes = found.boxes * placement.size
            write_results(output / f"{names[path]}.tsv", boxes, found.scores, found.classes)
            masks = None if mask_threshold is None else found.masks
            picture = draw_detections(image, boxes, found.scores, found.classes, labels, masks, mask_threshold)
            write_picture(output / f"{names[path]}.png", picture)
            bar.update()
        inference += inferred - begun
        drawing += time.perf_counter() - inferred
        done += len(batch.paths)
    bar.close()
    seconds = time.perf_counter() - started
    if not done:
        raise UserError(f"none of the {len(files)} images could be read; nothing was written")
    ms = {"decode": batcher.decode_seconds, "inference": inference, "drawing": drawing}
    stages = ", ".join(f"{name} {1000 * value / done:.1f} ms" for name, value in ms.items())
    print(f"{done} images in {seconds:.1f} s: {done / seconds:.1f} images/s; per image: {stages}")
    if batcher.skipped:
        print(f"{batcher.skipped} of {len(files)} images were skipped (see the warnings)")
    print(f"Wrote {done} pictures (.png) and tables (.tsv) to {output}. Next: look at {output / names[files[0]]}.png")
    return 1 if batcher.skipped else 0


if __name__ == "__main__":
    run(main)
