"""Runs a converted model on more images than one machine can take, with Ray Data: a Parquet file for every few hundred.

    python infer_ray.py --engine model.onnx --input photos --output results
    python infer_ray.py --engine model.onnx --input photos --output results --resume
    python infer_ray.py --engine engine.trt --input s3://bucket/photos --output s3://bucket/results --address auto --gpus 8

Each row of OUTPUT/detections is an image: path, boxes (xmin ymin xmax ymax, pixels of the image), scores, classes (from
0), names, masks (run-length encoded), keypoints (x, y in pixels, score), error (why it cannot be read).
pandas.read_parquet reads that folder. Without --address it runs on this machine; on a cluster, an actor on each GPU, or for
model.onnx on all processors of each machine. What an actor that dies had begun runs again. Exit status 1 if an image could
not be read.
"""

import dataclasses
import hashlib
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

from commandline import ROOT, UserError, make_folder, progress, run
from commandline.inputs import Images, find_images
from commandline.options import (
    add_decoder,
    add_image_options,
    add_input,
    add_nms_threshold,
    count,
    image_options,
    make_parser,
    score,
)
from commandline.outputs import refuse_to_overwrite

import pyarrow as pa

from deploy.closure import copy_needed
from deploy.ray_detector import DETECTIONS, PICTURES, Job, RayDetector, images_done
from deploy.storage import Folder, beginnings, find_remote, is_remote, shown
from images.aspect import FIT_HELP, warn_of_turned
from onnx_utils import load, read_metadata
from results import Summary
from runtimes import is_onnx
from tfod.labels import LABELS_HELP, label_files

# Unless told otherwise, Ray reports usage to its makers, and what it does to the terminal; started by `uv run`, its workers
# would be too, with packages that they install; and it starts processes ahead that lack the code of this job, to end them.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
ENVIRONMENT |= {"RAY_prestart_worker_first_driver": "0"}
os.environ |= {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
import ray  # noqa: E402


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the model: model.onnx, or engine.trt from build_engine.py")
    add_input(
        parser,
        "images: as of infer.py, or s3://... or gs://... (an image, a folder, a quoted pattern) of one object store;"
        " on a cluster, what all its machines can read",
    )
    add("-o", "--output", required=True, help="folder for the results, s3://... and gs://... too")
    add("--resume", action="store_true", help="do only the images that --output has no row of; broken ones have one")
    add(
        "--address", help="of a Ray cluster, auto for this machine's; default: Ray runs on this machine while this does"
    )
    add("--gpus", type=count, metavar="N", help="GPUs that an engine runs on; default: all that Ray has")
    add("--cpus", type=count, metavar="N", help="processors an actor takes; default: its share of the machine")
    add("--task_images", type=count, default=256, metavar="N", help="images in a task, and in a file; default: 256")
    add("--pictures", action="store_true", help="also draw the detections, to OUTPUT/pictures")
    add("--format", choices=["jpg", "png"], default="jpg", help="of the pictures")
    add("-l", "--labels", help=LABELS_HELP)
    add_nms_threshold(parser, "leave out detections that score less; 0 keeps all that the model gives; default: 0.3")
    add("-d", "--detection_type", choices=["bbox", "segmentation"], default="bbox", help="boxes, or masks too")
    add("--iou_threshold", type=score, default=0.5, help="a pixel belongs to a mask from this value on; default: 0.5")
    add("-b", "--batch_size", type=count, metavar="N", help="images at a time, of a dynamic model; default: 1")
    add_decoder(parser)
    add_image_options(parser)
    add("--fit", action="store_true", help=FIT_HELP)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    onnx = is_onnx(args.engine)
    if onnx and args.gpus:
        raise UserError(f"--gpus {args.gpus}: {args.engine} runs on processors; build an engine with build_engine.py")
    if onnx:
        read_metadata(load(args.engine), args.engine)  # a damaged file is told of before anything starts
    images = find(args.input, args.output)
    if args.pictures and not (is_remote(args.output) or is_remote(args.input[0])):
        refuse_to_overwrite(images, args.input, args.output, PICTURES)
    job = make_job(args)
    output, total = make_output(args), len(images.files)
    images, before = left_to_do(images, output, job, args)
    if not images.files:
        print(f"All {total} images have their rows in {shown(args.output)}: nothing to do")
        return 0
    warn_of_turned(beginnings(images.files, job.store), args.exif_rotate)
    with tempfile.TemporaryDirectory() as folder:
        connect(args.address, Path(folder))
        try:
            return process(images, job, onnx, args, before)
        finally:
            ray.shutdown()


def find(inputs, output):
    """The Images of --input; local paths are made absolute, as the actors run elsewhere."""
    remote = [address for address in inputs if is_remote(address)]
    if remote and len(remote) < len(inputs):
        raise UserError("--input: name images of this machine or of an object store, not both")
    if len({(split.scheme, split.query) for split in map(urllib.parse.urlsplit, remote)}) > 1:
        raise UserError("--input: these are different object stores; name images of one")
    if remote:
        return find_remote(remote)
    images = find_images(inputs, output=None if is_remote(output) else output)
    return Images([os.path.abspath(path) for path in images.files], images.names, images.missing)


def make_job(args):
    """The Job of a command line. Raises UserError for files that cannot be read."""
    try:
        named = (Path(args.labels).name, Path(args.labels).read_bytes()) if args.labels else None
    except OSError as error:
        raise UserError(f"--labels {args.labels}: {error.strerror}") from error
    beside = [] if args.labels else label_files(Path(args.engine).parent)
    model = Path(args.engine).read_bytes()
    return Job(
        engine=args.engine,
        model=model,
        model_digest=hashlib.sha256(model).hexdigest(),
        labels=named,
        beside=tuple((path.name, path.read_bytes()) for path in beside),
        output=args.output if is_remote(args.output) else os.path.abspath(args.output),
        store=args.input[0] if is_remote(args.input[0]) else None,
        threshold=args.nms_threshold,
        masks_from=args.iou_threshold if args.detection_type == "segmentation" else None,
        batch_size=args.batch_size,
        picture_format=args.format if args.pictures else None,
        fit=args.fit,
        decoder=args.decoder,
        cores=args.cpus,
        **image_options(args),
    )


def left_to_do(images, output, job, args):
    """(the Images without a row in the output Folder, how many have one). Raises UserError for results of another run."""
    if not args.resume:
        if output.files(DETECTIONS, ".parquet"):
            raise UserError(f"--output {shown(args.output)}: results lie there; go on with --resume, or choose another")
        return images, 0
    done = images_done(output, job.settings())
    left = [(file, name) for file, name in zip(images.files, images.names, strict=True) if file not in done]
    files, names = map(list, zip(*left, strict=True)) if left else ([], [])
    return Images(files, names, images.missing), len(images.files) - len(files)


def make_output(args):
    """The Folder for results."""
    if not is_remote(args.output):
        make_folder(args.output)
    return Folder(args.output)


def connect(address, folder):
    """Starts Ray here, or joins a cluster; gives its processes the code, by way of `folder`. Raises UserError.

    Here too: they would look for modules in the folder that the command is given in first.
    """
    module = Path("deploy", "ray_detector.py")
    copy_needed(ROOT / module, folder)
    shutil.copyfile(ROOT / module, folder / module)
    where = {"address": address} if address else {"address": "local", "include_dashboard": False}
    environment = {"working_dir": str(folder)}
    if not address:  # Ray gives it to a shell as it is
        environment["py_executable"] = shlex.quote(sys.executable)
    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray takes it for its own
    try:
        ray.init(**where, logging_level="error", runtime_env=environment)
    except Exception as error:  # a bare one where its processes do not start in time
        failed = f"--address {address}" if address else "Ray does not start on this machine"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{failed}: {reason}") from error
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)


def plan_actors(machines, onnx, gpus, cpus):
    """(number of actors, processors of each, GPUs of each) for machines, as Ray's {resource: amount} of each.

    An engine has a GPU to itself, and its share of the machine's processors; ONNX Runtime all processors of the smallest
    machine. Raises UserError for more than there is.
    """
    if not onnx:
        shares = [(int(m["GPU"]), int(m.get("CPU", 0) // m["GPU"])) for m in machines if m.get("GPU", 0) >= 1]
        most = sum(number for number, _ in shares)
        if not most or (gpus or 0) > most:
            raise UserError(f"--gpus {gpus or 'all'}: Ray has {most} GPUs here; give --gpus for fewer, or model.onnx")
        return gpus or most, cpus or max(1, min(share for _, share in shares)), 1
    cores = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    cpus = cpus or min(cores, default=1)
    actors = sum(number // cpus for number in cores)
    if not actors:
        raise UserError(f"--cpus {cpus}: Ray has no machine with so many here; the largest has {max(cores, default=0)}")
    return actors, cpus, 0


def process(images, job, onnx, args, before):
    """Runs the job on the Images, prints what was found; returns the status. before: images that had rows already."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    actors, cpus, gpus = plan_actors(machines, onnx, args.gpus, args.cpus)
    tasks = tables(images, args.task_images)
    actors = min(actors, len(tasks))
    summary, skipped, least, started = Summary(), 0, 0.0, time.perf_counter()
    rows = detect_all(tasks, dataclasses.replace(job, cores=cpus), actors, gpus)
    try:
        with progress(None, total=len(images.files), unit="image") as bar:
            for row in rows:
                skipped, least = skipped + row.pop("skipped"), row.pop("least")
                summary.merge(Summary(**row))
                bar.update(summary.images + skipped - bar.n)
    except KeyboardInterrupt:
        print(
            f"stopped: {summary.images + skipped} of {len(images.files)} images and perhaps some more have their rows in"
            f" {shown(args.output)}; --resume does the rest",
            file=sys.stderr,
        )
        return 130
    except ray.exceptions.RayError as error:
        raise UserError(reason_of(error)) from error
    seconds = time.perf_counter() - started
    if not summary.images:
        raise UserError(f"none of the {len(images.files)} images could be read; {shown(args.output)} says why")
    print(summary.text(args.nms_threshold, least=least))
    where = f"{actors} {'GPU' if gpus else 'actor'}{'s' * (actors > 1)}"
    rate = f"{(summary.images + skipped) / seconds:.1f} images/s"
    print(
        f"{summary.images} images in {seconds:.1f} s on Ray, {where}, {cpus} processors each: {rate}, its start included"
    )
    if skipped:
        print(f"{skipped} of {len(images.files)} images were skipped (column error)")
    if before:
        print(f"{before} images had their rows before")
    written = f"{shown(args.output).rstrip('/')}/{DETECTIONS}"
    reading = f"pandas.read_parquet({written!r})"
    print(
        f"Wrote {len(images.files)} rows to {written}. Next: python -c {shlex.quote(f'import pandas; print({reading})')}"
    )
    return 1 if skipped or images.missing else 0


def tables(images, size):
    """The Images as tables of `size` rows, path and name: a task each."""
    files = list(map(os.fsencode, images.files))  # as bytes: names of files need not be text
    names = list(map(os.fsencode, images.names))
    starts = range(0, len(files), size)
    return [pa.table({"path": files[at : at + size], "name": names[at : at + size]}) for at in starts]


def detect_all(tasks, job, actors, gpus):
    """Yields the counts of each task, {name: value}, in whatever order they end."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    found = ray.data.from_arrow(tasks).map_batches(
        RayDetector,
        fn_constructor_args=(job,),
        batch_size=None,  # a task's table as it is
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=job.cores,
        num_gpus=gpus,
    )
    return found.iter_rows()


def reason_of(error):
    """What went wrong in an actor, in a line: the UserError it raised, else the last error that Ray names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if ours := [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]:
        return ours[0]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
    return (named or lines)[-1]


if __name__ == "__main__":
    run(main)
