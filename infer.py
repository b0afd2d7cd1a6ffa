"""Runs a converted model on images or videos: pictures with boxes, and tab-separated tables of detections.

    python infer.py --engine model.onnx --input photos --output results
    python infer.py --engine model.onnx --input photo.jpg --output results --labels labels.txt --nms_threshold 0.5
    python infer.py --engine model.onnx --input cam1 cam2 'more/**/*.png' list.txt --output results
    python infer.py --engine engine.trt --input photos 'more/**/*.jpg' list.txt --output results --json detections.json
    python infer.py --engine engine.trt --input clip.mp4 --output results
    python infer.py --engine engine.trt --input camera:0 --output results
    python infer.py --engine engine.trt --input photos --benchmark --batch_size 8

Each line of NAME.tsv is a detection: xmin, ymin, xmax, ymax (pixels of the original image), score, class (0-based: the
line of a labels file), then x, y and score of each keypoint where the model gives keypoints, empty where the class has none. Results lie in the output folder as the images do in the input folder; those of several inputs, as
seen from the folder that has them all. Exit status 1 if an image could not be read.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

from commandline import (
    UserError,
    command,
    make_folder,
    progress,
    remove_parts,
    run,
    warn,
    whole_file,
)
from commandline.inputs import INPUTS, Images, find_images, show_inputs
from commandline.options import (
    add_decoder,
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
    image_options,
    make_parser,
    score,
)
from commandline.outputs import check_outputs, check_results, read_by, refuse_to_overwrite

import numpy as np

from checks import coco
from images.aspect import FIT_HELP, choose_fit, warn_of_turned
from images.decoding import ImageError, load_image
from results import Summary, result_rows, write_picture, write_results
from runtimes import open_first
from runtimes.gpu_images import choose_decoder
from runtimes.pipeline import (
    Times,
    batcher_for,
    choose_batch_size,
    detect_files,
    naming_results_of,
    open_workers,
)
from runtimes.several_gpus import SeveralGpus, job_for
from runtimes.stream import detect_stream
from runtimes.video import VideoReader, VideoWriter, is_video
from runtimes.workers import Workers
from tfod.labels import LABELS_HELP, labels_of
from visualize import draw_detections


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the model: model.onnx, or engine.trt from build_engine.py")
    add_input(parser, f"images: {INPUTS}; videos (clip.mp4, ...), a camera (camera:0) or a stream (rtsp://...)")
    add("-o", "--output", help="folder for pictures and tables; created if need be")
    add(
        "--json",
        metavar="FILE",
        help="also write the detections that --nms_threshold keeps in COCO's results format, masks run-length encoded, keypoints"
        " too; image_id is the number that is a file's name, else its path, of a video the frame's number; a metric needs all,"
        " --nms_threshold 0, and the ids of its annotations: eval_coco.py's detections.json has both",
    )
    add("--frames", type=count, metavar="N", help="stop a video or camera after N frames")
    add_gpus(parser, several=True)
    add_runtime(parser)
    add_decoder(parser)
    add("-l", "--labels", help=LABELS_HELP)
    add_nms_threshold(parser, "leave out detections that score less; 0 keeps all that the model gives; default: 0.3")
    add(
        "-d",
        "--detection_type",
        choices=["bbox", "segmentation", "keypoints"],
        help="what is drawn and written: boxes, or masks or keypoints too; default: keypoints where the model gives them, else bbox",
    )
    add_keypoint_threshold(parser)
    add("--iou_threshold", type=score, default=0.5, help="a pixel belongs to a mask from this value on; default: 0.5")
    add("-b", "--batch_size", type=count, metavar="N", help="images at a time, of a dynamic model; default: 1")
    add(
        "--format",
        choices=["jpg", "png"],
        default="jpg",
        help="of the pictures; png loses nothing and takes 20 times as long",
    )
    add_image_options(parser)
    add("--fit", action="store_true", help=FIT_HELP)
    add(
        "--benchmark",
        action="store_true",
        help="measure each stage and how they overlap; nothing is kept but what --output asks for",
    )
    add(
        "--benchmark_images",
        type=count,
        default=500,
        metavar="N",
        help="images of a benchmark, the input repeated; default: 500",
    )
    add_preprocessor(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    videos, inputs = ([x for x in args.input if is_video(x) == wanted] for wanted in (True, False))
    images = find_images(inputs, output=args.output) if inputs else Images([], [], 0)
    if args.benchmark and not inputs:
        raise UserError("--benchmark: name images with --input; it does not measure videos")
    if args.benchmark and args.json:
        raise UserError("--json: --benchmark keeps no results; leave one of them out")
    if not (args.output or args.json or args.benchmark):
        raise UserError("--output: name a folder for the results, or a file with --json")
    check_files(args, images, videos)
    with contextlib.ExitStack() as stack:
        detector, gpus = open_first(args.engine, args.gpus, args.runtime)
        stack.enter_context(detector)
        check_preprocessor(args.preprocessor, detector.metadata)
        choose_fit(detector.metadata, args.fit, images.files, args.exif_rotate)
        warn_of_turned(images.files, args.exif_rotate)
        check_detection_type(args.detection_type, detector.metadata, args.engine)
        args.batch_size = choose_batch_size(detector, args.batch_size, 1, args.engine)
        options = make_options(detector, args)
        if args.benchmark:
            return benchmark(detector, gpus, images, options, args)
        return process_all(detector, gpus, images, videos, options, args)


def check_files(args, images, videos):
    """Raises UserError where something would be written over what is read, or over another result."""
    made = []
    if args.output and not args.benchmark:
        names = map(video_name, videos)
        made = [os.path.join(args.output, name + ending) for name in names for ending in (".mp4", ".tsv")]
    if args.output:
        refuse_to_overwrite(images, args.input, args.output)
        few = {**read_by(args), "--json": [args.json], "a video": made}
        check_results(args.output, images.names, (".tsv", f".{args.format}"), few)
    check_outputs({"--output": made, "--json": [args.json]}, read_by(args, images.files))


def video_name(source):
    """What the results of a video or a camera are called."""
    return Path(source).stem if Path(source).is_file() else re.sub(r"\W+", "_", source).strip("_")


def make_options(detector, args):
    """The Options of a command line for an open detector; makes the output folder."""
    labels = labels_of(args.labels, detector.metadata, args.engine)
    with_points = args.detection_type in (None, "keypoints") and bool(detector.metadata.get("keypoints"))
    return Options(
        make_folder(args.output) if args.output else None,
        labels,
        args.nms_threshold,
        detector.metadata["score_threshold"],
        args.iou_threshold if args.detection_type == "segmentation" else None,
        args.format,
        detector.metadata["class_offset"] if args.json else None,
        functools.partial(load_image, **image_options(args)),
        args.keypoint_threshold if with_points else None,
        detector.metadata.get("skeleton") or (),
    )


def process_all(detector, gpus, images, videos, options, args):
    """Runs an open detector on the Images, with those of more GPUs, and on the videos; returns the highest status."""
    size, status = args.batch_size, 0
    with results_file(args.json) as results:
        if images.files:
            with open_source(detector, gpus, images.files, size, options, args) as source:
                status = process(source, images, options, results)
        for video in videos:
            status = max(status, process_video(detector, video, size, options, results, args.frames))
    if args.json:
        measure = command(
            "eval_coco.py", "--engine", args.engine, "--input", *args.input, "--annotations", "ANNOTATIONS"
        )
        following = f"with annotations, {measure}" if images.files else f"look at {shlex.quote(args.json)}"
        print(f"Wrote {args.json} (COCO's results format). Next: {following}")
    return status


@dataclasses.dataclass(frozen=True)
class Options:
    """What is written, and how."""

    folder: Path | None  # for pictures and tables
    labels: list
    threshold: float  # what scores less is left out
    least: float  # what scores less the model itself leaves out
    masks_from: float | None  # a pixel belongs to a mask from this value on; None: boxes only
    format: str
    class_offset: int | None  # of COCO results; None: they are not wanted
    load: functools.partial  # of load_image
    points_from: float | None  # score of the keypoints that are drawn; None: they are not wanted
    skeleton: list  # pairs of keypoints

    def chosen(self, found):
        """Of Detections, those that are written."""
        kept, left_out = found.above(self.threshold), {}
        if kept.masks is not None and self.masks_from is None:
            left_out["masks"] = None
        if kept.keypoints is not None and self.points_from is None:
            left_out |= {"keypoints": None, "keypoint_scores": None}
        return dataclasses.replace(kept, **left_out) if left_out else kept

    def draw(self, image, found):
        """The image [H, W, 3] with Detections on it, as a Pillow image."""
        boxes = found.boxes * np.float32(image.shape[:2] * 2)
        return draw_detections(
            image,
            boxes,
            found.scores,
            found.classes,
            self.labels,
            found.masks,
            self.masks_from or 0.0,
            points=found.points(image.shape[:2], self.points_from),
            skeleton=self.skeleton,
        )

    def coco_results(self, found, image_id, file_name, size):
        """Detections of an image of `size` (height, width) as COCO results; [] where they are not wanted."""
        if self.class_offset is None:
            return []
        results = coco.results_of(found, image_id, size, self.class_offset, self.masks_from)
        return [{**entry, "file_name": file_name} for entry in results]


class ResultsFile:
    """COCO's results format, written as the results come."""

    def __init__(self, file):
        self._file, self._first = file, True

    def add(self, results):
        for entry in results:
            self._file.write(("[\n" if self._first else ",\n") + json.dumps(entry))
            self._first = False

    def end(self):
        self._file.write("[]\n" if self._first else "\n]\n")


@contextlib.contextmanager
def results_file(path):
    """A ResultsFile that becomes `path` at the end; None: one that keeps nothing."""
    if not path:
        yield ResultsFile(io.StringIO())
        return
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        results = ResultsFile(file)
        yield results
        results.end()


def write_one(detected, name, image_id, options):
    """A worker's task: draws and writes one image's results as folder/NAME.tsv and .jpg or .png; returns COCO results.

    detected: a pipeline.Detected. name: for the results. image_id: see image_ids.
    """
    path, placement, found = detected.path, detected.placement, detected.found
    with naming_results_of(path):
        if options.folder:
            output = options.folder / name
            output.parent.mkdir(parents=True, exist_ok=True)
            write_results(output.with_name(f"{output.name}.tsv"), found, (placement.height, placement.width))
            image = options.load(path) if detected.image is None else detected.image
            write_picture(output.with_name(f"{output.name}.{options.format}"), options.draw(image, found))
        return options.coco_results(found, image_id, str(path), (placement.height, placement.width))


def image_ids(files):
    """{file: its image_id in COCO's results}: the number that is its name, as COCO names its images; where it has none, or another
    has the same, its path."""
    stems = {
        file: os.path.splitext(os.path.basename(file))[0] for file in files
    }  # a Path each would take a second for 200,000
    numbers = {file: int(stem) for file, stem in stems.items() if stem.isascii() and stem.isdigit()}
    counts = collections.Counter(numbers.values())
    return {file: numbers[file] if counts[numbers.get(file)] == 1 else str(file) for file in files}


@dataclasses.dataclass(frozen=True)
class Source:
    """What finds the detections in files: an open detector, or the same on several GPUs."""

    detector: object
    batch_size: int
    load: functools.partial  # of load_image
    decoder: object  # a GpuDecoder, or None where processors decode
    several: SeveralGpus | None

    def detected(self, files, workers, times, keep_images=False):
        """Yields a pipeline.Detected for each file."""
        if self.several:
            return self.several.detected(files, times)
        return detect_files(self.detector, files, self.batch_size, workers, times, keep_images, self.load, self.decoder)

    def text(self, workers):
        """Where it runs and who decodes, in words."""
        several = f" on {len(self.several.gpus)} GPUs" if self.several else ""
        by = f"in {workers.count} {'processes' if workers.processes else 'threads'}"
        by = f"by {self.decoder.name}" if self.decoder else by
        return f"{self.detector.runtime}{several}, decoded {by}"


@contextlib.contextmanager
def open_source(detector, gpus, files, size, options, args):
    """Yields the Source for files, `size` at a time."""
    decoder = choose_decoder(args.decoder, detector, files, args.exif_rotate)
    several = None
    with contextlib.ExitStack() as stack:
        if len(gpus) > 1:
            choice = args.decoder if decoder else "cpu"
            job = job_for(args.engine, detector, files, gpus, size, options.load, choice, args.exif_rotate)
            several = stack.enter_context(SeveralGpus(job, gpus))
        yield Source(detector, size, options.load, decoder, several)


def process(source, images, options, results):
    """Runs a Source on the Images, writes the results, prints what was found and the rates; returns the status."""
    files, names = images.files, dict(zip(images.files, images.names, strict=True))
    ids = {} if options.class_offset is None else image_ids(files)
    times, summary, keep = Times(), Summary(), bool(options.folder)

    def chosen(workers):
        for item in source.detected(files, workers, times, keep):
            found = options.chosen(item.found)
            summary.add(item.path, found)
            yield dataclasses.replace(item, found=found), names[item.path], ids.get(item.path), options

    opened = open_workers(source.detector, len(files), source.batch_size)
    with opened as workers, progress(files, unit="image") as bar:
        started, items = time.perf_counter(), chosen(workers)
        written = workers.map(write_one, items, through_memory=bool(source.decoder))
        try:
            for entries in written:
                results.add(entries)
                bar.update()
        except (KeyboardInterrupt, UserError) as error:
            written.close()
            workers.close()  # what was being written is
            if options.folder and workers.processes:  # a thread that ends leaves nothing
                remove_parts(options.folder)
            if isinstance(error, UserError):
                raise
            where = f"are in {options.folder}" if options.folder else "were found"
            print(f"stopped: the results of {workers.finished} of {len(files)} images {where}", file=sys.stderr)
            return 130
        seconds = time.perf_counter() - started
    if not times.images:
        raise UserError(f"none of the {len(files)} images could be read; nothing was written")
    print(summary.text(options.threshold, least=options.least))
    print(
        f"{times.images} images in {seconds:.1f} s on {source.text(workers)}:"
        f" {times.images / seconds:.1f} images/s; per image: {stages(times, workers.seconds)}"
    )
    if times.skipped:
        print(f"{times.skipped} of {len(files)} images were skipped (see the warnings)")
    if options.folder:
        example = options.folder / f"{names[summary.example]}.{options.format}"
        what = f"{times.images} pictures (.{options.format}) and tables (.tsv)"
        print(f"Wrote {what} to {options.folder}. Next: look at {shlex.quote(str(example))}")
    return 1 if times.skipped or images.missing else 0


def process_video(detector, source, batch_size, options, results, frames):
    """Runs `detector` on a video or a camera: an annotated video, a table with the frame's number first, what was found.

    frames: stop after so many; None: at the end, of a camera at Ctrl-C. Returns the status.
    """
    summary, status, started = Summary(), 0, time.perf_counter()
    name = video_name(source)
    with contextlib.ExitStack() as stack:
        video = stack.enter_context(VideoReader(source))
        output = stack.enter_context(VideoResults(options.folder, name, video.rate)) if options.folder else None
        total = min(filter(None, (frames, video.frames)), default=None)
        bar = stack.enter_context(progress(None, total=total, unit="frame"))
        workers = stack.enter_context(Workers(0, cores=1))

        def finish(number, image, found):
            if output:
                output.add(number, options.draw(image, found), found, image.shape[:2])
            return options.coco_results(found, number, source, image.shape[:2])

        def found_in_frames():
            detected = detect_stream(detector, itertools.islice(video, frames), batch_size)
            for number, (image, found) in enumerate(detected):
                found = options.chosen(found)
                summary.add(number, found)
                yield number, image, found

        try:
            for entries in workers.map(finish, found_in_frames()):
                results.add(entries)
                bar.update()
        except ImageError as error:  # frames of another aspect ratio than the model was converted for
            raise UserError(f"{source}: {error}") from error
        except KeyboardInterrupt:
            status = 0 if video.is_live else 130
            workers.close()
            print(f"stopped after {output.frames if output else summary.images} frames", file=sys.stderr)
    seconds = time.perf_counter() - started
    if not summary.images:
        raise UserError(f"--input {source}: no frame could be read; nothing was written")
    if video.broken:
        warn(f"{source}: {video.broken}")
        status = status or 1
    print(summary.text(options.threshold, "frame", options.least))
    rate = f"{summary.images / seconds:.1f} frames/s"
    print(f"{source}: {summary.images} frames in {seconds:.1f} s on {detector.runtime}: {rate}")
    if options.folder:
        target = options.folder / f"{name}.mp4"
        print(f"Wrote {name}.mp4 and {name}.tsv to {options.folder}. Next: look at {shlex.quote(str(target))}")
    return status


class VideoResults:
    """An annotated video NAME.mp4 and a table NAME.tsv, whole or not at all. A context manager."""

    def __init__(self, folder, name, rate):
        self._files, self.frames = contextlib.ExitStack(), 0
        try:
            self._writer = self._files.enter_context(
                VideoWriter(self._files.enter_context(whole_file(folder / f"{name}.mp4")), rate)
            )
            table = self._files.enter_context(whole_file(folder / f"{name}.tsv"))
            self._table = self._files.enter_context(table.open("w", encoding="utf-8"))
        except BaseException:
            self._files.close()
            raise

    def add(self, number, picture, found, size):
        """Adds a frame: a Pillow image, and its Detections as lines `frame xmin ymin xmax ymax score class ...`."""
        self._writer.add(picture)
        self.frames += 1
        for row in result_rows(found, size):
            self._table.write(f"{number}\t{row}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self._files.__exit__(*exception)


def stages(times, work=0.0):
    """Milliseconds per image of each stage; they overlap. work: seconds of drawing and writing."""
    ms = {
        "decode": times.decode,
        "resize": times.resize,
        "copy": times.copy,
        "network": times.network,
        "postprocess": times.postprocess,
        "results": work,
    }
    return ", ".join(f"{name} {1000 * value / times.images:.2f} ms" for name, value in ms.items())


def benchmark(detector, gpus, images, options, args):
    """Prints what each stage takes, what it could do alone, and how near the whole comes to the slowest of them.

    With options.folder pictures and tables are drawn and written there, the same ones again and again.
    """
    size = args.batch_size
    names = dict(zip(images.files, images.names, strict=True))
    repeated = list(itertools.islice(itertools.cycle(images.files), max(size, args.benchmark_images)))
    with (
        open_source(detector, gpus, repeated, size, options, args) as source,
        open_workers(detector, len(repeated), size) as workers,
    ):
        workers.warm_up()
        limits = {
            "network alone": len(gpus) * network_limit(detector, repeated, size, options.load),
            "decode and resize": decoder_limit(detector, repeated, size, workers, options.load, source.decoder),
        }
        if source.decoder:
            limits["decode and resize"] *= len(gpus)
        times, begun = Times(), time.perf_counter()
        detected = source.detected(repeated, workers, times, bool(options.folder))
        chosen = (dataclasses.replace(item, found=options.chosen(item.found)) for item in detected)
        done = ((item, names[item.path], None, options) for item in chosen)
        for _ in workers.map(write_one, done, through_memory=bool(source.decoder)) if options.folder else done:
            pass
        seconds = time.perf_counter() - begun
    if not times.images:
        raise UserError(f"none of the {len(images.files)} images could be read")
    if options.folder:
        limits["draw and write"] = workers.count * times.images / workers.seconds
    whole, slowest = times.images / seconds, min(limits, key=limits.get)
    print(
        f"{times.images} images of {show_inputs(args.input)}, {size} at a time, {args.engine} on {source.text(workers)}"
    )
    print(f"per image: {stages(times, workers.seconds)}")
    for name, rate in {"end to end": whole, **limits}.items():
        print(f"{name:20}  {rate:8.1f} images/s")
    following = command("infer.py", "--engine", args.engine, "--input", *args.input, "--output", "results")
    written = f"Wrote pictures and tables to {options.folder}" if options.folder else "Nothing was written"
    share = f"End to end is {100 * whole / limits[slowest]:.0f} % of the slowest part, {slowest}"
    print(f"{share}. {written}. Next: {following}")
    return 1 if times.skipped or images.missing else 0


def decoder_limit(detector, files, size, workers, load, decoder):
    """Images per second that are decoded, resized and put into batches, with nothing else to do."""
    batcher, begun = batcher_for(detector, files, size, workers, False, load, decoder), time.perf_counter()
    count = sum(len(batch.paths) for batch in batcher)
    return max(count, 1) / (time.perf_counter() - begun)


def network_limit(detector, files, size, load):
    """Images per second of the network alone on one batch again and again; on a GPU without copies and all else."""
    with Workers(0) as workers:
        batch = next(iter(batcher_for(detector, files[: 4 * size], size, workers, load=load)), None)
        if batch is None:
            raise UserError(f"none of the {min(len(files), 4 * size)} first images could be read")
        return detector.images_per_second(batch.tensors, batch.true_shapes, len(files))


if __name__ == "__main__":
    run(main)
