"""Times TensorFlow's SavedModel against the converted model on ONNX Runtime and OpenVINO, on this machine's processor.

    python benchmarks/bench_cpu.py --saved_model MODEL --engine model.onnx --input photos
    taskset -c 0 python benchmarks/bench_cpu.py --saved_model MODEL --engine model.onnx --input photos --rounds 50

From the decoded image to detections, all sides' resizing included; they take turns, image by image, so that whatever else
the machine does slows all. Prints medians and minima, and the least processor time: on one core, where no thread waits
spinning for another, other work disturbs that least (BENCHMARKS.md).
"""

import contextlib
import functools
import importlib.util
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
    runtimes = ["onnxruntime", *(["openvino"] if importlib.util.find_spec("openvino") else [])]
    with contextlib.ExitStack() as stack:
        detectors = [stack.enter_context(open_detector(args.engine, runtime=runtime)) for runtime in runtimes]
        sides = {"TensorFlow": stack.enter_context(SavedModel(find_saved_model(args.saved_model))).detect}
        sides |= {detector.runtime: functools.partial(detect_image, detector) for detector in detectors}
        times, busy = ({name: [] for name in sides} for _ in range(2))
        for image, detect in itertools.product(images[:3], sides.values()):
            detect(image)  # warm up
        for _, image in zip(progress(range(args.rounds)), itertools.cycle(images), strict=False):
            for name, detect in sides.items():
                time.sleep(0.02)  # the threads of the one before wait for more work, spinning, for a while
                begun = time.perf_counter(), time.process_time()
                detect(image)
                times[name].append(1000 * (time.perf_counter() - begun[0]))
                busy[name].append(1000 * (time.process_time() - begun[1]))
    print(f"{detectors[0].metadata['source']}, ms an image, and how many times as fast as TensorFlow")
    columns = {name: (statistics.median(times[name]), min(times[name]), min(busy[name])) for name in sides}
    for name, values in columns.items():
        ratios = (theirs / ours for theirs, ours in zip(columns["TensorFlow"], values, strict=True))
        numbers = "median {:.1f}, minimum {:.1f}, processor {:.1f}; {:.2f}, {:.2f}, {:.2f}".format(*values, *ratios)
        print(f"{name:13} {numbers}")
    return 0


if __name__ == "__main__":
    run(main)
