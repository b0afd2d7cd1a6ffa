"""Builds engines of a model in several precisions and prints the table of BENCHMARKS.md: build time, latency, accuracy.

    python benchmarks/bench_gpu.py --onnx dynamic.onnx --output engines --input val2017 --annotations instances_val2017.json
    python benchmarks/bench_gpu.py --onnx dynamic.onnx --output engines --input photos --precision fp32 fp16 --profile 10
    python benchmarks/bench_gpu.py --onnx dynamic.onnx --output engines86 --input val2017 --calib_input photos --flags

Needs an NVIDIA GPU. `dynamic.onnx` is a model of `create_onnx.py --batch_size dynamic`; int8 needs --calib_input, or a
calibration in OUTPUT/dynamic.calib.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import UserError, make_folder, run, whole_file
from commandline.inputs import find_images
from commandline.options import count, make_parser

import build_engine
import onnx_utils
from checks import coco, parity
from image_batcher import ImageBatcher
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector
from runtimes.detector import detect_image, input_spec, network_inputs
from runtimes.trt_detector import GpuContext, import_tensorrt
from runtimes.workers import Workers

CALIBRATION_BATCH = 8

COLUMNS = (
    "build s",
    "MB",
    "ms, batch 1",
    "ms, batch 8",
    "without CUDA graph",
    "box diff",
    "score diff",
    "unmatched",
    "AP",
)


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--onnx", required=True, help="the model.onnx, made with --batch_size dynamic")
    add("--output", required=True, help="folder for the engines, the timing cache and results.jsonl")
    add("--input", required=True, help="a folder of images")
    add("--annotations", help="COCO annotations of the images: adds the AP")
    add("--precision", nargs="+", choices=["fp32", "fp16", "int8"], default=["fp32", "fp16", "int8"])
    add("--calib_input", help="calibration images, for int8")
    add(
        "--flags",
        action="store_true",
        help="TensorRT 8.6's own way, precision flags and its calibrator, to compare with",
    )
    add("--batch", type=int, nargs=3, default=[1, 8, 8], metavar=("MIN", "OPT", "MAX"), help="default: 1 8 8")
    add(
        "--suppression",
        choices=["auto", "plugin", "rounds"],
        default="auto",
        help="as build_engine.py's; default: auto",
    )
    add("--builder_optimization_level", type=int, choices=range(6), metavar="0..5", help="default: TensorRT's, 3")
    add("--images", type=count, default=12, help="images to compare with ONNX Runtime; default: 12")
    add("--profile", type=count, default=8, metavar="N", help="print the N slowest layers; default: 8")
    return parser.parse_args(argv)


def measure(args, wanted, reference):
    """Builds and measures one engine; returns {column: value}."""
    folder = Path(args.output)
    engine = folder / f"{Path(args.onnx).stem}.{wanted}.trt"
    options = ["--onnx", args.onnx, "--engine", str(engine), "--precision", wanted, "--no_benchmark"]
    options += ["--batch", *map(str, args.batch), "--suppression", args.suppression]
    if args.builder_optimization_level is not None:
        options += ["--builder_optimization_level", str(args.builder_optimization_level)]
    if wanted == "int8":
        options += ["--calib_cache", str(folder / f"{Path(args.onnx).stem}.calib")]
        options += ["--calib_input", args.calib_input] if args.calib_input else []
    started = time.perf_counter()
    if args.flags:
        build_by_flags(build_engine.parse_args(options), args.calib_input)
    else:
        build_engine.main(options)
    row = {"build s": f"{time.perf_counter() - started:.0f}", "MB": f"{engine.stat().st_size / 1e6:.1f}"}
    files = find_images(args.input).files
    with open_detector(engine) as detector:
        images = [preprocess(load_image(path), detector.metadata["resizer"])[0] for path in files[:8]]
        batches = [np.stack(images[:size]) for size in (1, 8) if size <= detector.max_batch]
        fast, slow = ([detector.benchmark(batch, cuda_graph=used) for batch in batches] for used in (True, False))
        for batch, (median, worst, _) in zip(batches, fast, strict=True):
            row[f"ms, batch {len(batch)}"] = f"{median:.3f} (p99 {worst:.3f})"
        row["without CUDA graph"] = ", ".join(f"{median:.3f}" for median, _, _ in slow)
        pairs = [(reference[path], detect_image(detector, load_image(path))) for path in files[: args.images]]
        reports = [parity.match_by_rank(theirs, ours, tie=0.02) for theirs, ours in pairs]
        if any(report.compared for report in reports):
            row["box diff"] = f"{max(report.box_difference for report in reports):.1e}"
            row["score diff"] = f"{max(report.score_difference for report in reports):.1e}"
        row["unmatched"] = (
            f"{sum(report.unmatched for report in reports)} of {sum(len(x.scores) for pair in pairs for x in pair)}"
        )
        if args.annotations:
            ap, ap50 = coco.average_precision(
                args.annotations, files, lambda image: detect_image(detector, image), detector.metadata["class_offset"]
            )
            row["AP"] = f"{ap:.4f} (AP50 {ap50:.4f})"
        layers = list(detector.profile(batches[0]).items())
        total = sum(ms for _, ms in layers)
        print(f"{wanted}: {len(layers)} layers, {total:.3f} ms with the profiler on")
        for name, ms in layers[: args.profile]:
            print(f"  {ms:.3f} ms {100 * ms / total:4.1f} %  {name[:150]}")
    return row


def build_by_flags(args, calib_input):
    """Builds args.engine from the FP32 graph: TensorRT 8.6 chooses the layers' types, and calibrates by itself.

    Box decoder, softmax and NMS stay in FP32 here too.
    """
    model = onnx_utils.load(args.onnx)
    metadata = onnx_utils.read_metadata(model, args.onnx)
    trt, cuda = import_tensorrt(f"--engine {args.engine}")

    def configure(builder, config, network):
        if args.precision == "int8":
            config.set_flag(trt.BuilderFlag.INT8)
            config.int8_calibrator = make_calibrator(trt, cuda, metadata, calib_input)
            profile = builder.create_optimization_profile()
            for tensor in (network.get_input(i) for i in range(network.num_inputs)):
                profile.set_shape(tensor.name, *[(CALIBRATION_BATCH, *tuple(tensor.shape)[1:])] * 3)
            config.set_calibration_profile(profile)

    named = {**metadata, "precision": args.precision}
    with GpuContext(cuda), whole_file(args.engine) as path:
        batch = build_engine.batch_range(args, metadata)
        if args.precision == "int8" and batch[0] == batch[-1]:
            raise UserError(
                f"--batch: with --flags INT8 is calibrated {CALIBRATION_BATCH} images at a time; give a range"
            )
        model = build_engine.prepare(args, model, batch)
        told = dataclasses.replace(build_engine.layer_types("fp16", model, None), half=set())
        typed = build_engine.typed_model("fp32", model, None)
        path.write_bytes(build_engine.build(trt, args, typed, named, batch, told, configure))


def make_calibrator(trt, cuda, metadata, calib_input):
    """TensorRT 8.6's entropy calibrator over the images in `calib_input`."""
    spec = input_spec(metadata)
    workers = Workers(0)
    batches = iter(ImageBatcher(find_images(calib_input).files, metadata["resizer"], CALIBRATION_BATCH, workers))

    class Calibrator(trt.IInt8EntropyCalibrator2):
        def __init__(self):
            trt.IInt8EntropyCalibrator2.__init__(self)
            self.buffers = {}

        def get_batch_size(self):
            return CALIBRATION_BATCH

        def get_batch(self, names):
            batch = next(batches, None)
            if batch is None or len(batch.paths) < CALIBRATION_BATCH:
                return None
            inputs = network_inputs(batch.tensors, batch.true_shapes, spec)
            for name in names:
                self.buffers.setdefault(name, cuda.mem_alloc(inputs[name].nbytes))
                cuda.memcpy_htod(self.buffers[name], inputs[name])
            return [int(self.buffers[name]) for name in names]

        def read_calibration_cache(self):
            return None

        def write_calibration_cache(self, cache):
            pass

    return Calibrator()


def main(argv=None):
    args = parse_args(argv)
    folder = make_folder(args.output)
    if not Path(args.onnx).is_file():
        raise UserError(f"--onnx {args.onnx}: no such file; make it with create_onnx.py --batch_size dynamic")
    with open_detector(args.onnx, runtime="onnxruntime") as detector:
        files = find_images(args.input).files[: args.images]
        reference = {path: detect_image(detector, load_image(path)) for path in files}
    rows = {}
    for wanted in args.precision:
        rows[wanted] = measure(args, wanted, reference)
        with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"onnx": args.onnx, "precision": wanted, "flags": args.flags, **rows[wanted]}) + "\n")
    print("| precision | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for wanted, row in rows.items():
        print(f"| {wanted} | " + " | ".join(row.get(column, "") for column in COLUMNS) + " |")
    print(f"Wrote the engines and results.jsonl to {folder}. Next: copy the table into BENCHMARKS.md")
    return 0


if __name__ == "__main__":
    run(main)
