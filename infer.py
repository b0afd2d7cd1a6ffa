"""Runs a converted model on images: one picture and one tab-separated file of detections for each.

    python infer.py --engine model.onnx --input photos --output results
    python infer.py --engine model.onnx --input photo.jpg --output results --labels labels.txt --nms_threshold 0.5
    python infer.py --engine model.onnx --input cam1 cam2 'more/**/*.png' list.txt --output results
    python infer.py --engine engine.trt --input photos --benchmark --batch_size 8

Each line of NAME.tsv is a detection: xmin, ymin, xmax, ymax (pixels of the original image), score, class (0-based: the
line of a labels file). Results lie in the output folder as the images do in the input folder; those of several inputs, as
seen from the folder that has them all. Exit status 1 if an image could not be read.
"""

import dataclasses
import functools
import itertools
import os
import sys
import time

from commandline import UserError, command, make_folder, progress, run, whole_file
from commandline.inputs import INPUTS, find_images, show_inputs
from commandline.options import (
    add_image_options,
    add_preprocessor,
    check_preprocessor,
    count,
    image_options,
    make_parser,
    score,
)

import numpy as np

from image_batcher import ImageBatcher, decoded
from images.decoding import load_image, simplejpeg
from runtimes import open_detector
from runtimes.pipeline import Later, Times, batcher_for, choose_batch_size, detect_files, open_workers
from runtimes.workers import Workers
from tfod.labels import LABELS_HELP, labels_of
from visualize import draw_detections

# JPEG at this quality takes 1 ms for 640x480; PNG 21 ms at its lowest compression, ten times what decoding took.
JPEG_QUALITY = 92
MAX_JPEG_SIDE = 65_500  # libjpeg's


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the model: model.onnx, or engine.trt from build_engine.py")
    add("-i", "--input", nargs="+", action="extend", required=True, metavar="PATH", help=f"images: {INPUTS}")
    add("-o", "--output", help="folder for the results; created if need be")
    add("-l", "--labels", help=LABELS_HELP)
    add(
        "-t",
        "--nms_threshold",
        type=score,
        default=0.3,
        metavar="SCORE",
        help="leave out detections that score less; 0 keeps all that the model gives; default: 0.3",
    )
    add("-d", "--detection_type", choices=["bbox", "segmentation"], default="bbox", help="draw boxes, or masks too")
    add("--iou_threshold", type=score, default=0.5, help="a pixel belongs to a mask from this value on; default: 0.5")
    add("-b", "--batch_size", type=count, metavar="N", help="images at a time, of a dynamic model; default: 1")
    add(
        "--format",
        choices=["jpg", "png"],
        default="jpg",
        help="of the pictures; png loses nothing and takes 20 times as long",
    )
    add_image_options(parser)
    add("--benchmark", action="store_true", help="write nothing; measure each stage and how they overlap")
    add(
        "--benchmark_images",
        type=count,
        default=500,
        metavar="N",
        help="images of a benchmark, the input repeated; default: 500",
    )
    add_preprocessor(parser)
    return parser.parse_args(argv)


def write_results(path, boxes, scores, classes):
    """Writes detections as lines `xmin ymin xmax ymax score class`, tab-separated. boxes [N, 4] yxyx in pixels."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for (ymin, xmin, ymax, xmax), score, label in zip(boxes, scores, classes, strict=True):
            file.write(f"{xmin:.2f}\t{ymin:.2f}\t{xmax:.2f}\t{ymax:.2f}\t{score:.6f}\t{label}\n")


def write_picture(path, picture):
    """Writes a Pillow image as .jpg or .png."""
    if path.suffix == ".jpg" and max(picture.size) > MAX_JPEG_SIDE:
        raise UserError(f"cannot write {path}: a JPEG has at most {MAX_JPEG_SIDE:,} pixels a side; use --format png")
    with whole_file(path) as temporary:
        if path.suffix != ".jpg":
            picture.save(temporary, compress_level=1)
        elif simplejpeg is None:
            picture.save(temporary, quality=JPEG_QUALITY)
        else:  # the same libjpeg-turbo, twice as fast as through Pillow
            temporary.write_bytes(simplejpeg.encode_jpeg(np.asarray(picture), JPEG_QUALITY, "RGB", "420"))


def main(argv=None):
    args = parse_args(argv)
    images = find_images(args.input, output=args.output)
    if args.benchmark:
        with open_detector(args.engine) as detector:
            return benchmark(detector, images.files, args)
    if not args.output:
        raise UserError("--output: name a folder for the results")
    refuse_to_overwrite(images, args.output)
    with open_detector(args.engine) as detector:
        check_preprocessor(args.preprocessor, detector.metadata)
        if args.detection_type == "segmentation" and not detector.metadata.get("mask_size"):
            raise UserError(f"--detection_type segmentation: {args.engine} gives no masks; use bbox")
        labels = labels_of(args.labels, detector.metadata, args.engine)
        size = choose_batch_size(detector, args.batch_size, 1)
        output = make_folder(args.output)
        return process(detector, images, size, output, labels, args)


def refuse_to_overwrite(images, output):
    """Raises UserError where results would lie in a folder that images are read from."""
    sources = {os.path.realpath(folder) for folder in set(map(os.path.dirname, images.files))}
    targets = {os.path.realpath(os.path.join(output, folder)) for folder in set(map(os.path.dirname, images.names))}
    if shared := sources & targets:
        raise UserError(
            f"--output {output}: results would lie in {min(shared)}, where images are read: choose another folder, so"
            " that none is overwritten"
        )


def write_one(path, image, size, found, output, options):
    """A worker's task: draws and writes one image's results as `output`.tsv and .jpg or .png.

    image: of a Batch. size: Placement.size.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    image = decoded(image, path, options.load)
    boxes = found.boxes * size
    write_results(output.with_name(f"{output.name}.tsv"), boxes, found.scores, found.classes)
    masks = None if options.masks_from is None else found.masks
    picture = draw_detections(image, boxes, found.scores, found.classes, options.labels, masks, options.masks_from)
    write_picture(output.with_name(f"{output.name}.{options.format}"), picture)


@dataclasses.dataclass(frozen=True)
class Options:
    """How results are drawn and written."""

    labels: list
    masks_from: float | None  # a pixel belongs to a mask from this value on; None: boxes only
    format: str
    load: functools.partial  # of load_image


def process(detector, images, batch_size, output, labels, args):
    """Runs `detector` on the Images, writes the results into the folder `output`, prints the rates; returns the
    status."""
    files, names = images.files, dict(zip(images.files, images.names, strict=True))
    segmentation = args.detection_type == "segmentation"
    load = functools.partial(load_image, **image_options(args))
    options = Options(labels, args.iou_threshold if segmentation else None, args.format, load)
    times, written = Times(), []

    def note():
        written.append(True)

    with open_workers(detector, len(files)) as workers, progress(files, unit="image") as bar:

        def work(path, image, placement, found):
            found = found.above(args.nms_threshold)
            found = found if segmentation else dataclasses.replace(found, masks=None)
            task = write_one, path, image, placement.size, found, output / names[path], options
            return Later(workers, *task, then=note)

        started = time.perf_counter()
        done = detect_files(detector, files, batch_size, work, workers, times, True, load)
        try:
            for _ in done:
                bar.update()
        except KeyboardInterrupt:
            done.close()
            workers.close()
            print(f"stopped: the results of {len(written)} of {len(files)} images are in {output}", file=sys.stderr)
            return 130
        seconds = time.perf_counter() - started
    if not times.images:
        raise UserError(f"none of the {len(files)} images could be read; nothing was written")
    print(
        f"{times.images} images in {seconds:.1f} s: {times.images / seconds:.1f} images/s; per image: {stages(times)}"
    )
    if times.skipped:
        print(f"{times.skipped} of {len(files)} images were skipped (see the warnings)")
    first = output / f"{names[files[0]]}.{args.format}"
    print(f"Wrote {times.images} pictures (.{args.format}) and tables (.tsv) to {output}. Next: look at {first}")
    return 1 if times.skipped or images.missing else 0


def stages(times):
    """Milliseconds per image of each stage; they overlap."""
    ms = {
        "decode": times.decode,
        "resize": times.resize,
        "copy": times.copy,
        "network": times.network,
        "postprocess": times.postprocess,
        "results": times.work,
    }
    return ", ".join(f"{name} {1000 * value / times.images:.2f} ms" for name, value in ms.items())


def benchmark(detector, files, args):
    """Prints what each stage takes, what it could do alone, and how near the whole comes to the slowest of them."""
    size = choose_batch_size(detector, args.batch_size, 1)
    repeated = list(itertools.islice(itertools.cycle(files), max(size, args.benchmark_images)))
    with open_workers(detector, len(repeated)) as workers:
        workers.warm_up()
        load = functools.partial(load_image, **image_options(args))
        decoder = decoder_limit(detector, repeated, size, workers, load)
        network = network_limit(detector, repeated, size, load)
        times, begun = Times(), time.perf_counter()

        def work(path, image, placement, found):
            return found.above(args.nms_threshold)

        for _ in detect_files(detector, repeated, size, work, workers, times, load=load):
            pass
        seconds = time.perf_counter() - begun
    if not times.images:
        raise UserError(f"none of the {len(files)} images could be read")
    whole, lower = times.images / seconds, min(decoder, network)
    busy = times.decode + times.resize + times.copy + times.network + times.postprocess + times.work
    print(f"{times.images} images of {show_inputs(args.input)}, {size} at a time, {args.engine} on {detector.runtime}")
    kind = "processes" if workers.processes else "threads"
    print(f"per image: {stages(times)}; {busy / seconds:.2f} stages at work at a time; {workers.count} {kind}")
    print(f"end to end            {whole:8.1f} images/s")
    print(f"network alone         {network:8.1f} images/s")
    print(f"decode and resize     {decoder:8.1f} images/s")
    following = command("infer.py", "--engine", args.engine, "--input", args.input, "--output", "results")
    print(f"{100 * whole / lower:.0f} % of the lower limit. Nothing was written. Next: {following}")
    return 0


def decoder_limit(detector, files, size, workers, load):
    """Images per second that are decoded, resized and put into batches, with nothing else to do."""
    batcher, count, begun = batcher_for(detector, files, size, workers, load=load), 0, time.perf_counter()
    for batch in batcher:
        count += len(batch.paths)
        batcher.reuse(batch)
    seconds = time.perf_counter() - begun
    batcher.close()
    return count / seconds


def network_limit(detector, files, size, load):
    """Images per second of the network alone on one batch again and again; on a GPU without copies and all else."""
    with Workers(0) as workers:
        batcher = ImageBatcher(files[: 4 * size], detector.metadata["resizer"], size, workers, load=load)
        batch = next(iter(batcher), None)
    if batch is None:
        return float("inf")
    return detector.images_per_second(batch.tensor, batch.true_shapes, len(files))


if __name__ == "__main__":
    run(main)
