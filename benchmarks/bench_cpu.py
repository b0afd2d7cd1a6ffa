"""Times TensorFlow's SavedModel against the converted model on ONNX Runtime, on this machine's processor.

    python benchmarks/bench_cpu.py --saved_model MODEL --engine model.onnx --input photos
    python benchmarks/bench_cpu.py --saved_model MODEL --engine model.onnx --input photos --rounds 50

From the decoded image to detections, both sides' resizing included; the two take turns, image by image, so that whatever
else the machine does slows both. Prints the medians and their ratio (BENCHMARKS.md).
"""

import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import progress, run
from commandline.inputs import find_images
from commandline.options import count, make_parser

from images.decoding import load_image
from runtimes import open_detector
from runtimes.detector import detect_image
from tfod.saved_model import SavedModel, find_saved_model


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument(
        "--saved_model", required=True, help="folder of the SavedModel, or the unpacked export above it"
    )
    parser.add_argument("--engine", required=True, help="the model.onnx made of it")
    parser.add_argument("--input", required=True, help="an image or a folder of images")
    parser.add_argument("--rounds", type=count, default=30, help="images to time on either side; default: 30")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    images = [load_image(path) for path in find_images(args.input).files[: args.rounds]]
    times = {"TensorFlow": [], "ONNX Runtime": []}
    with (
        open_detector(args.engine) as detector,
        SavedModel(find_saved_model(args.saved_model)) as model,
    ):
        sides = {
            "TensorFlow": model.detect,
            "ONNX Runtime": lambda image: detect_image(detector, image),
        }
        for image, detect in itertools.product(images[:3], sides.values()):
            detect(image)  # warm up
        for _, image in zip(progress(range(args.rounds)), itertools.cycle(images), strict=False):
            for name, detect in sides.items():
                begun = time.perf_counter()
                detect(image)
                times[name].append(1000 * (time.perf_counter() - begun))
        source = detector.metadata["source"]
    theirs, ours = (statistics.median(values) for values in times.values())
    print(
        f"{source}: TensorFlow {theirs:.1f} ms, ONNX Runtime {ours:.1f} ms an image: {theirs / ours:.1f} times as fast"
    )
    return 0


if __name__ == "__main__":
    run(main)
