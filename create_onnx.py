"""Converts a TensorFlow Object Detection API SavedModel to model.onnx, for TensorRT and ONNX Runtime.

    python create_onnx.py --saved_model ssd_mobilenet_v2_fpnlite_320x320_coco17_tpu-8 --onnx model.onnx
    python create_onnx.py --saved_model exported/saved_model --onnx model.onnx --batch_size dynamic --input_type uint8

The stock export is enough: no re-export, no TFOD. What the network computes after its heads (box decoder, score
converter, non-maximum suppression) is written anew from pipeline.config, then checked against TensorFlow.
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

import onnx

import onnx_utils
from checks import parity
from commandline import UserError, check_writable, run, warn, whole_file
from runtimes import open_detector
from tfod.config import read_pipeline_config
from tfod.convert import Options, convert
from tfod.saved_model import SavedModel, find_pipeline_config, find_saved_model

# The check's bound on normalised coordinates and scores. Float32 rounding alone reaches 1.2e-3 in a two-stage network
# (TensorFlow's two sets of CPU kernels differ by as much); a wrong conversion is off by orders of magnitude more.
TOLERANCE = 2e-3


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--saved_model", required=True, help="folder of the SavedModel, or the unpacked export above it")
    add("-o", "--onnx", required=True, help="the ONNX file to write")
    add("-p", "--pipeline_config", help="the model's pipeline.config; default: the one beside saved_model/")
    add(
        "-b",
        "--batch_size",
        type=batch_size,
        default=1,
        metavar="N",
        help="images per batch, or 'dynamic': any number, chosen when the engine runs; default: 1",
    )
    add(
        "--input_type",
        choices=["float32", "uint8"],
        default="float32",
        help="type of the input, RGB 0..255 either way; uint8 moves a quarter of the bytes and rounds resized pixels",
    )
    add(
        "-f",
        "--input_format",
        choices=["NHWC", "NCHW"],
        default="NHWC",
        help="layout of the input tensor; NHWC is what image decoders give; default: NHWC",
    )
    add(
        "--first_nms_threshold",
        type=score,
        metavar="SCORE",
        help="score threshold of the first NMS: an SSD's detections, a two-stage model's proposals; default: the config's",
    )
    add(
        "--second_nms_threshold",
        type=score,
        metavar="SCORE",
        help="score threshold of a two-stage model's detections; SSD models have none; default: the config's",
    )
    add(
        "--debug",
        action="append",
        default=[],
        metavar="TENSOR",
        help="make this tensor of the ONNX graph (or the first output of this node) an output too; may be repeated",
    )
    add("--tf2onnx", metavar="FILE", help="also write the network without post-processing, as tf2onnx converted it")
    add("--check_image", metavar="FILE", help="the image for the check; default: a built-in one")
    add("--no_check", action="store_true", help="do not compare the file with TensorFlow after writing it")
    return parser.parse_args(argv)


def batch_size(text):
    if text == "dynamic":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'dynamic'")


def score(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a score between 0 and 1")
    return value


def main(argv=None):
    args = parse_args(argv)
    started = time.perf_counter()
    folder = find_saved_model(args.saved_model)
    config_path = args.pipeline_config or find_pipeline_config(folder)
    config = read_pipeline_config(config_path)
    for path in filter(None, (args.onnx, args.tf2onnx)):
        check_writable(path)
    if args.check_image and not os.path.isfile(args.check_image):
        raise UserError(f"--check_image {args.check_image}: no such file")
    if args.second_nms_threshold is not None and config.HasField("ssd"):
        warn("--second_nms_threshold has no effect: an SSD model has one NMS, set with --first_nms_threshold")
    with SavedModel(folder) as saved_model:
        options = {field.name: getattr(args, field.name) for field in dataclasses.fields(Options)}
        model = convert(saved_model, config, Options(**options))
        onnx.checker.check_model(model)
        with whole_file(args.onnx) as path:
            onnx_utils.save(model, path)
        print(f"Converted in {time.perf_counter() - started:.1f} s: {len(model.graph.node)} nodes")
        passed = args.no_check or check(saved_model, args)
    size = Path(args.onnx).stat().st_size / 1e6
    print(
        f"Wrote {args.onnx} ({size:.1f} MB). Next: python infer.py --engine {args.onnx} --input IMAGES --output results"
    )
    return 0 if passed else 1


def check(saved_model, args):
    """Compares args.onnx on ONNX Runtime with TensorFlow on one image, prints the verdict, returns whether it passed."""
    with open_detector(args.onnx) as detector:
        report = parity.compare(saved_model, detector, args.check_image, TOLERANCE)
    largest = max(report.box_difference, report.score_difference, report.mask_difference)
    passed = largest <= TOLERANCE and report.unmatched <= parity.allowed_unmatched(detector.metadata)
    masks = f", mask difference {report.mask_difference:.1e}" if detector.metadata["mask_size"] else ""
    print(
        f"{'PASSED' if passed else 'FAILED'}: {report.compared} detections of TensorFlow and ONNX Runtime on"
        f" {args.check_image or 'the built-in image'}: largest box difference {report.box_difference:.1e},"
        f" score difference {report.score_difference:.1e}{masks} (tolerance {TOLERANCE:.0e}), {report.unmatched} unmatched"
    )
    return passed


if __name__ == "__main__":
    run(main)
