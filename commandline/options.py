"""Options that several commands have: their values, and the parser itself."""

import argparse
import math

from commandline import UserError
from commandline.version import VERSION

# What the older tool called its resizers, and what a model's metadata calls them.
PREPROCESSORS = {"fixed_shape_resizer": "fixed_shape", "keep_aspect_ratio_resizer": "keep_aspect_ratio"}


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that tells a mistake in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help shows all options\n")


def make_parser(description):
    """A parser with that help text, shown as it is, and --version."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


KEYPOINT_THRESHOLD = 0.3


def add_keypoint_threshold(parser):
    parser.add_argument(
        "--keypoint_threshold",
        type=score,
        default=KEYPOINT_THRESHOLD,
        metavar="SCORE",
        help=f"draw keypoints that score at least that; default: {KEYPOINT_THRESHOLD:g}",
    )


def check_detection_type(chosen, metadata, engine):
    """Raises UserError where --detection_type asks for what the model does not give."""
    for kind, what, given in (("segmentation", "masks", "mask_size"), ("keypoints", "keypoints", "keypoints")):
        if chosen == kind and not metadata.get(given):
            raise UserError(f"--detection_type {kind}: {engine} gives no {what}; use bbox")


def score(text):
    """An option's value: a score or an overlap, 0 to 1."""
    value = _number(text, float)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def count(text):
    """An option's value: a whole number from 1 on."""
    value = _number(text, int)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def count_from_0(text):
    """An option's value: a whole number from 0 on."""
    value = _number(text, int)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return value


def size(text):
    """An option's value: a finite number over 0."""
    value = _number(text, float)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number over 0")
    return value


def _number(text, kind):
    """The number that the text stands for; not a number where it stands for none."""
    try:
        return kind(text)
    except ValueError:
        return math.nan


def add_gpus(parser, several=False):
    """--gpus, which GPU an engine runs on, or which several: args.gpus is a number, or a list of them, or "all"."""
    text = "which GPU an engine runs on, from 0; default: 0"
    if several:
        text = "which GPUs an engine runs on: a number from 0, several (0,1), or 'all'; default: 0"
    parser.add_argument("--gpus", type=gpu_list if several else count_from_0, default=[0] if several else 0, help=text)


def gpu_list(text):
    """An option's value: GPU numbers with commas between them, or "all"."""
    if text == "all":
        return text
    numbers = [count_from_0(part) for part in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a GPU twice")
    return numbers


def add_runtime(parser):
    """--runtime, what runs an ONNX file."""
    parser.add_argument(
        "--runtime",
        choices=["auto", "onnxruntime", "openvino", "cuda"],
        default="auto",
        help="what runs a model.onnx; cuda: ONNX Runtime on the GPU, which the project has never run; default: auto, OpenVINO"
        " where it is installed and measured to be faster for such models, else ONNX Runtime",
    )


def add_input(parser, help):
    """--input, one or more inputs, as often as one likes."""
    parser.add_argument("-i", "--input", nargs="+", action="extend", required=True, metavar="PATH", help=help)


def add_nms_threshold(parser, help, default=0.3):
    """--nms_threshold, the score from which on detections are shown."""
    parser.add_argument("-t", "--nms_threshold", type=score, default=default, metavar="SCORE", help=help)


def add_decoder(parser):
    """--decoder, what decodes images for an engine."""
    parser.add_argument(
        "--decoder",
        choices=["auto", "cpu", "gpu"],
        default="auto",
        help="what decodes and resizes images for an engine; default: the GPU where it can, with the same results",
    )


def add_preprocessor(parser):
    """--preprocessor, which the older tool needed: the model knows its own, and one that is not it is a mistake."""
    parser.add_argument(
        "-p",
        "--preprocessor",
        choices=sorted(PREPROCESSORS),
        help="not needed: the model knows its own; accepted for old command lines",
    )


def check_preprocessor(chosen, metadata):
    """Raises UserError if --preprocessor was given and is not the resizer of the model with this metadata."""
    kind = metadata["resizer"]["kind"]
    if chosen and PREPROCESSORS[chosen] != kind:
        raise UserError(f"--preprocessor {chosen}: the model's is {kind}_resizer; leave the option out")


def add_image_options(parser):
    """The options of images.decoding.load_image."""
    parser.add_argument(
        "--exif_rotate",
        action="store_true",
        help="turn photos as their EXIF data say; default: the pixels as they are stored, as TensorFlow reads them",
    )
    parser.add_argument(
        "--max_pixels",
        type=count,
        metavar="N",
        help="leave out larger images (one takes up to 9 bytes a pixel while it is read); default: 200 million, and"
        " 16 million where the file has less than a byte for 1,500 pixels",
    )


def image_options(args):
    """What these options say, as arguments of load_image."""
    return {"exif_rotate": args.exif_rotate, "max_pixels": args.max_pixels}
