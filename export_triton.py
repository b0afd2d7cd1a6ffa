"""Makes a model repository for Triton Inference Server of a converted model: images in, detections out, over HTTP and gRPC.

    python export_triton.py --engine engine.trt --repository models
    python export_triton.py --engine model.onnx --repository models --name shapes --nms_threshold 0.5
    python export_triton.py --engine model.onnx --repository models --in_process

The repository holds the network itself, NAME, and NAME_images, which takes encoded images and gives what infer.py finds in
them: boxes in pixels, scores, classes, names, masks. Its README.md says how to start a server and how to ask it. An engine
is exported where it runs; what lies in the repository under that name from an earlier export is replaced.
"""

import argparse
import re
from pathlib import Path

from commandline import UserError, make_folder, run
from commandline.options import (
    add_nms_threshold,
    count,
    make_parser,
)

from deploy.triton_config import Network
from deploy.triton_repository import export, standard_form
from images.aspect import FIT_HELP, choose_fit
from onnx_utils import check_batch_size, load
from runtimes import open_detector
from tfod.labels import LABELS_HELP, labels_of

# Images at a time of a model that takes any number or a fixed one.
USUAL_MAX_BATCH = 8
# Processes that decode and ask the network of a model beside them: while one waits for it the other decodes.
INSTANCES = 2


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-e", "--engine", required=True, help="the model: model.onnx, or engine.trt from build_engine.py")
    add("-r", "--repository", required=True, metavar="FOLDER", help="the model repository; created if need be")
    add("-n", "--name", type=model_name, default="detector", help="of the model in Triton; default: detector")
    add("-l", "--labels", help=LABELS_HELP)
    add_nms_threshold(parser, "leave out detections that score less, as infer.py does; default: 0.3")
    add(
        "--max_batch",
        type=count,
        metavar="N",
        help=f"images at a time, at most; default: those that an engine takes, else {USUAL_MAX_BATCH}",
    )
    add(
        "--in_process",
        action="store_true",
        help="run the network within NAME_images, where Triton lacks the backend for it; NAME is left out",
    )
    add(
        "--instances",
        type=count,
        metavar="N",
        help=f"processes of NAME_images; default: {INSTANCES}, and 1 with --in_process, where each holds the network",
    )
    add("--fit", action="store_true", help=FIT_HELP)
    return parser.parse_args(argv)


def model_name(text):
    """An option's value: a name that is a folder's."""
    if not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of letters, digits and _ . -")
    return text


def main(argv=None):
    args = parse_args(argv)
    with open_detector(args.engine) as detector:
        network = Network(
            "model.onnx" if detector.gpu is None else "model.plan",
            detector.metadata,
            max_batch(args.max_batch, detector),
            detector.usual_batch,
        )
        version = detector.version
        choose_fit(detector.metadata, args.fit)
        fit = detector.metadata["resizer"].pop("fit", False)  # what lies in the file does not say it
    names = labels_of(args.labels, network.metadata, args.engine)
    repository = make_folder(args.repository).resolve()
    models = export(
        repository,
        args.name,
        network,
        Path(args.engine).read_bytes() if network.is_engine else standard_form(load(args.engine)),
        names,
        args.engine,
        threshold=args.nms_threshold,
        instances=args.instances or (1 if args.in_process else INSTANCES),
        in_process=args.in_process,
        fit=fit,
        tensorrt=version if network.is_engine else None,
    )
    print(
        f"Wrote {' and '.join(models)} to {args.repository}. Next: start the server as {Path(args.repository) / 'README.md'}"
        " says"
    )


def max_batch(asked, detector):
    """Images that Triton may put together. Raises UserError for more than an engine takes, or than can be meant."""
    most = None if detector.input.batch else detector.max_batch
    if asked and most and asked > most:
        raise UserError(f"--max_batch {asked}: the engine takes at most {most} images at a time")
    if asked:
        spec = detector.input
        check_batch_size(asked, spec.height, spec.width, spec.dtype, "--max_batch")
    return asked or most or USUAL_MAX_BATCH


if __name__ == "__main__":
    run(main)
