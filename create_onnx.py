"""Converts a TensorFlow Object Detection API SavedModel to model.onnx, for TensorRT or for any runtime.

    python create_onnx.py --saved_model ssd_mobilenet_v2_fpnlite_320x320_coco17_tpu-8 --onnx model.onnx
    python create_onnx.py --saved_model exported/saved_model --onnx model.onnx --batch_size dynamic --input_type uint8
    python create_onnx.py --saved_model exported/saved_model --onnx model.onnx --ops standard
    python create_onnx.py --saved_model exported/frozen_inference_graph.pb --onnx model.onnx --image_size 1080x1920

The stock export is enough: no re-export, no TFOD. What the network computes after its heads (box decoder, score
converter, non-maximum suppression) is written anew from pipeline.config, then checked against TensorFlow.
"""

import argparse
import dataclasses
import gc
import re
import sys
import time
from pathlib import Path

from commandline import UserError, command, run, steps, warn, whole_file
from commandline.inputs import find_images
from commandline.options import add_image_options, count, image_options, make_parser, score
from commandline.outputs import check_outputs

import onnx
import onnx_graphsurgeon as gs

import onnx_utils
from checks.conversion import (
    BUILT_IN,
    PHOTOS,
    TOLERANCE,
    check_class_limit,
    check_conversion,
    check_override,
    plugin_may_fall_short,
    plugin_shortfall,
)
from images.decoding import ImageError, load_image
from runtimes import standard_graph
from tfod.config import describe_resizer, read_pipeline_config, read_skeleton
from tfod.convert import META_ARCHITECTURES, Options, read_model, write_model
from tfod.labels import COCO_CLASSES, find_labels, keypoint_names, read_labels
from tfod.saved_model import SavedModel, find_pipeline_config, find_saved_model, model_files, naming_model

UNCHECKED = "an engine may leave out the weakest of so many detections; the check, without --no_check, says which"


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "-m",
        "--saved_model",
        required=True,
        help="folder of the SavedModel, the unpacked export above it, or a frozen_inference_graph.pb of TF1",
    )
    add("-o", "--onnx", required=True, help="the ONNX file to write")
    add("-p", "--pipeline_config", help="the model's pipeline.config; default: the one beside --saved_model")
    add(
        "-b",
        "--batch_size",
        type=batch_size,
        default=1,
        metavar="N",
        help="images per batch, or 'dynamic': any number, chosen when the engine runs; default: 1",
    )
    add(
        "--image_size",
        type=image_size,
        metavar="HxW",
        help="height and width of your images, 1080x1920 say: of a model whose keep_aspect_ratio_resizer does not pad, and"
        " whose input's size so follows the image's; results are TensorFlow's for images of this aspect ratio",
    )
    add(
        "--ops",
        choices=onnx_utils.OPS,
        default="tensorrt",
        help="tensorrt: NMS is TensorRT's plugin EfficientNMS_TRT, which other runtimes do not load, but this project's scripts"
        " do; standard: ONNX's own ops alone, for ONNX Runtime, OpenVINO and others, not for build_engine.py;"
        " default: tensorrt",
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
        "-t1",
        "--first_nms_threshold",
        type=score,
        metavar="SCORE",
        help="score threshold of the first NMS: an SSD's or CenterNet's detections, a two-stage model's proposals; default: the"
        " config's",
    )
    add(
        "-t2",
        "--second_nms_threshold",
        type=score,
        metavar="SCORE",
        help="score threshold of a two-stage model's detections; others have none; default: the config's",
    )
    add(
        "-d",
        "--debug",
        action="append",
        default=[],
        metavar="TENSOR",
        help="make this tensor of the ONNX graph (or the first output of this node) an output too; may be repeated",
    )
    add("--tf2onnx", metavar="FILE", help="also write the network without post-processing, as tf2onnx converted it")
    add(
        "-l",
        "--labels",
        help="class names to put into the file: a label_map.pbtxt, or a text file with one name a line; default: the label"
        " map or labels.txt beside the SavedModel, if there is one",
    )
    add(
        "--check_image",
        metavar="PATH",
        help="image or folder of images for the check; default: three built-in pictures",
    )
    add_image_options(parser)
    add("--no_check", action="store_true", help="do not compare the file with TensorFlow after writing it")
    return parser.parse_args(argv)


def batch_size(text):
    """The value of --batch_size; None: dynamic."""
    if text == "dynamic":
        return None
    try:
        images = count(text)
    except argparse.ArgumentTypeError:
        images = 0
    if not 1 <= images <= onnx_utils.MOST_IMAGES:
        raise argparse.ArgumentTypeError(
            f"{text[:20]!r} is neither a whole number from 1 to {onnx_utils.MOST_IMAGES} nor 'dynamic'"
        )
    return images


def image_size(text):
    """The value of --image_size: (height, width)."""
    found = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not found or not all(map(int, found.groups())):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no height and width as 1080x1920")
    return tuple(map(int, found.groups()))


def main(argv=None):
    args = parse_args(argv)
    # Python looks for garbage at each 700 of the millions of objects that are made here: 3 s of 19, 12 of 36.
    usual = gc.get_threshold()
    gc.set_threshold(100_000)
    try:
        return convert(args)
    finally:
        gc.set_threshold(*usual)  # what was made is garbage now, and holds gigabytes


def convert(args):
    """Converts by the command line's options; returns the status."""
    folder = find_saved_model(args.saved_model)
    config_path = args.pipeline_config or find_pipeline_config(folder)
    config = read_pipeline_config(config_path)
    resizer = describe_resizer(getattr(config, config.WhichOneof("one_of")).image_resizer, args.image_size)
    onnx_utils.check_batch_size(args.batch_size or 1, resizer["height"], resizer["width"], args.input_type)
    if args.image_size and "image_size" not in resizer:
        warn(
            f"--image_size has no effect: the model's input is {resizer['height']} x {resizer['width']} for every image"
        )
    label_file, labels = find_class_names(args.labels, folder, config)
    files = find_images(args.check_image, "--check_image").files if args.check_image else []
    check_outputs(
        {"--onnx": [args.onnx], "--tf2onnx": [args.tf2onnx]},
        {
            "--saved_model": model_files(folder),
            "--pipeline_config": [config_path],
            "--labels": [label_file],
            "--check_image": [*files, args.check_image],
        },
    )
    pictures = read_pictures(files, args) if files else None
    if args.second_nms_threshold is not None and not config.HasField("faster_rcnn"):
        warn("--second_nms_threshold has no effect: the model has one stage; --first_nms_threshold is what it has")
    options = Options(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Options) if hasattr(args, field.name)}
    )
    options = dataclasses.replace(options, labels=labels, skeleton=read_skeleton(config_path))
    with steps() as step:
        return make(folder, config, options, args, pictures, label_file, step)


def make(folder, config, options, args, pictures, label_file, step):
    """Writes the ONNX file of a SavedModel and checks it; prints what came of it; returns the status."""
    started = time.perf_counter()
    step(f"reading {folder}")
    with SavedModel(folder) as saved_model:
        step("converting the network")
        with naming_model(folder, "cannot be converted"):
            model = read_model(saved_model, config, args.image_size)
        options = with_keypoints(options, model, label_file)
        if args.tf2onnx:
            with whole_file(args.tf2onnx) as path:
                onnx_utils.save(gs.export_onnx(model.network.graph), path)
        step("writing the file")
        with naming_model(folder, "cannot be converted"):
            written = write(model, options, args.ops)
            onnx.checker.check_model(written)
        with whole_file(args.onnx) as path:
            onnx_utils.save(written, path)
        step("")
        print(f"Converted in {time.perf_counter() - started:.1f} s: {len(written.graph.node)} nodes")
        step("checking it against TensorFlow")
        try:
            verdicts, remark = check(saved_model, model, written, options, args, pictures)
        except KeyboardInterrupt:
            step("")
            print(f"stopped: {args.onnx} is written, but not checked", file=sys.stderr)
            return 130
    step("")
    for verdict in verdicts:
        print(verdict)
    if remark:
        warn(remark)
    if model.kind == "faster_rcnn" and options.first_nms_threshold is not None:
        first = options.first_nms_threshold
        print(f"--first_nms_threshold {first:g} changes the proposals: that threshold itself is not checked")
    passed = all(verdict.word == "PASSED" for verdict in verdicts)
    size = Path(args.onnx).stat().st_size / 1e6
    print(f"Wrote {args.onnx} ({size:.1f} MB). Next: {next_command(args, verdicts)}")
    return 0 if passed else 1


def next_command(args, verdicts):
    """What to run next: where the check failed, what shows how: the check's own pictures, weak detections too, and its tolerance."""
    if any(verdict.other_config for verdict in verdicts):
        wanted = "--saved_model", args.saved_model, "--pipeline_config", "THE_EXPORTS_OWN", "--onnx", args.onnx
        return command("create_onnx.py", *wanted)
    if all(verdict.word == "PASSED" for verdict in verdicts):
        return command("infer.py", "--engine", args.onnx, "--input", "IMAGES", "--output", "results")
    sides = "--engine", args.onnx, "--saved_model", args.saved_model
    failed = any(verdict.word == "FAILED" for verdict in verdicts)
    pictures = args.check_image or (PHOTOS if failed else "IMAGES")
    strictly = "--nms_threshold", "0", "--tolerance", f"{TOLERANCE:g}"
    return command("compare_tf.py", *sides, "--input", pictures, *strictly, "--output", "comparison")


def write(model, options, ops, raw=False):
    """The ONNX model of a Model, as convert.write_model makes it, in `ops` (onnx_utils.OPS)."""
    written = write_model(model, options, raw)
    return standard_graph.standard_file(written) if ops == "standard" else written


def with_keypoints(options, model, label_file):
    """Options with the names of a model's keypoints and what joins them, of the label map and the config; COCO's else."""
    if "joint_logits" not in model.network.outputs:
        return options
    count = model.network.shapes["joint_logits"][-1]
    names, skeleton = keypoint_names(label_file, model.config.keypoint_estimation_task, count)
    skeleton = options.skeleton or skeleton or ()
    known = tuple(edge for edge in skeleton if all(0 <= end < count for end in edge))
    if len(known) < len(skeleton):
        warn(
            f"keypoint_edge of the pipeline.config joins a keypoint that there is not: the model has {count};"
            f" {len(skeleton) - len(known)} of {len(skeleton)} left out"
        )
    return dataclasses.replace(options, keypoints=names, skeleton=known)


def find_class_names(path, folder, config):
    """(file, names) of --labels, or of a file beside the SavedModel; (None, None) where there are none."""
    count = getattr(config, config.WhichOneof("one_of")).num_classes
    if path:
        return path, read_labels(path, count)
    path, names = find_labels([folder.resolve().parent, folder, folder / "assets"], count)
    if path:
        print(f"Class names: {count}, of {path}")
    elif count == COCO_CLASSES:
        print(f"Class names: COCO's {count}")
    else:
        print("No class names found: put a label_map.pbtxt beside saved_model/, or name one with --labels")
    return path, names


def read_pictures(files, args):
    """The images of --check_image, as RGB arrays."""
    pictures = []
    for file in files:
        try:
            pictures.append(load_image(file, **image_options(args)))
        except ImageError as error:
            raise UserError(f"--check_image {file}: {error}; name another image") from error
    return pictures


def check(saved_model, model, written, options, args, pictures):
    """Compares what was written with TensorFlow; returns the Verdicts, and what to know of an engine made of it, or None."""
    short = plugin_may_fall_short(written)
    if args.no_check:
        return [], UNCHECKED if short else None
    if failed := check_class_limit(model):
        return [failed], None
    where = f"{len(pictures)} picture{'s' if len(pictures) > 1 else ''} of {args.check_image}" if pictures else BUILT_IN
    reference = written if options == options.by_config else write(model, options.by_config, args.ops)
    verdicts = [
        check_conversion(
            saved_model, args.onnx, reference, lambda: write(model, options.by_config, args.ops, True), pictures, where
        )
    ]
    metadata = onnx_utils.read_metadata(written, args.onnx)
    threshold = metadata["score_threshold"]
    if threshold != metadata["config_score_threshold"]:
        option = META_ARCHITECTURES[model.kind].THRESHOLD_OPTION
        reference = write(model, dataclasses.replace(options, **{option: None}), args.ops)
        least = max(threshold, metadata["config_score_threshold"])
        text = f"--{option} {threshold:g}"
        verdicts.append(check_override(args.onnx, written, reference, text, least, pictures, where))
    if short:
        return verdicts, plugin_shortfall(args.onnx, written, options.batch_size or 1, pictures, where)
    return verdicts, None


if __name__ == "__main__":
    run(main)
