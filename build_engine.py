"""Builds a TensorRT engine from a model.onnx of create_onnx.py, for the GPU and the TensorRT version of this machine.

    python build_engine.py --onnx model.onnx --engine engine.trt
    python build_engine.py --onnx model.onnx --engine engine.trt --precision int8 --calib_input photos 'more/*.png'
    python build_engine.py --onnx dynamic.onnx --engine engine.trt --batch 1 8 32
    python build_engine.py --onnx model.onnx --typed_onnx half.onnx --precision fp16

FP16 and INT8 are made in the ONNX graph, but for INT8 on TensorRT 8.6, which is given ranges
and chooses; box decoder, score filter and NMS stay in FP32. The engine holds the model's metadata and needs no companion
file. Written for TensorRT 8.5, 8.6, 10 and 11; run with 8.6. With --typed_onnx alone the graph is written, for which no
TensorRT is needed.
"""

import dataclasses
import functools
import json
import time
from pathlib import Path

from commandline import UserError, command, leaving_at_once, progress, run, warn, whole_file
from commandline.inputs import INPUTS, find_images, show_inputs
from commandline.options import add_gpus, add_image_options, count, image_options, make_parser, size
from commandline.outputs import check_outputs

import numpy as np

import onnx_utils
from image_batcher import ImageBatcher
from images.decoding import load_image
from runtimes import nms_by_rounds, precision, quantization, trt_crops, trt_graph
from runtimes.detector import input_spec, network_inputs
from runtimes.ort_detector import OrtDetector
from runtimes.trained_ranges import read_trained_ranges
from runtimes.trt_detector import GpuContext, TrtDetector, import_tensorrt, make_logger
from runtimes.workers import Workers

# TensorRT keeps no longer names.
LONGEST_NAME = 4095


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("-o", "--onnx", required=True, help="the model.onnx that create_onnx.py wrote")
    add("-e", "--engine", help="the engine file to write")
    add("-p", "--precision", choices=["fp32", "fp16", "int8"], default="fp16", help="default: fp16")
    add("-b", "--batch", type=count, nargs=3, metavar=("MIN", "OPT", "MAX"), help="of a dynamic model; default: 1 8 8")
    add("-w", "--workspace", type=size, default=4, metavar="GB", help="memory for the layers' scratch; default: 4")
    add("-v", "--verbose", action="store_true", help="print what TensorRT says")
    add(
        "--calib_input",
        nargs="+",
        action="extend",
        metavar="PATH",
        help=f"int8: about 100 images like those to be detected in: {INPUTS}",
    )
    add_image_options(parser)
    add(
        "--calib_cache",
        help="int8: the calibration, read if it is of this model, else written; default: ENGINE.calib, or that of --typed_onnx",
    )
    add("--calib_num_images", type=count, default=100, metavar="N", help="int8: at most that many images; default: 100")
    add("--calib_batch_size", type=count, default=8, metavar="N", help="int8: images at a time; default: 8")
    add(
        "--timing_cache",
        help="TensorRT's measurements, kept for the next build; default: timing.cache beside the engine",
    )
    add("--builder_optimization_level", type=int, choices=range(6), metavar="0..5", help="default: TensorRT's, 3")
    add(
        "--typed_onnx",
        metavar="FILE",
        help="write the graph in that precision, which infer.py runs on ONNX Runtime; without --engine it needs no TensorRT",
    )
    add(
        "--suppression",
        choices=["auto", "plugin", "rounds"],
        default="auto",
        help="NMS by TensorRT's plugin, or in standard ops where they can take its place: the same on all images measured."
        f" Default: auto, in standard ops where OPT of --batch is at most {nms_by_rounds.FEW_IMAGES} and MAX at most"
        f" {nms_by_rounds.MOST_IMAGES}, which is faster; for --typed_onnx alone the plugin",
    )
    add("--no_benchmark", action="store_true", help="do not measure the engine's latency after building it")
    add_gpus(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if not (args.engine or args.typed_onnx):
        raise UserError("--engine: name the engine to write; or, with --typed_onnx, a graph that needs no TensorRT")
    model, metadata = read_model(args.onnx)
    check_outputs(outputs(args), {"--onnx": [args.onnx], "--calib_input": args.calib_input or ()})
    batch = batch_range(args, metadata)
    model, calibration = find_ranges(args, model) if args.precision == "int8" else (model, None)
    trt, cuda = find_tensorrt(args)
    if args.precision == "int8" and not calibration:
        calibration = calibrate(args, model, metadata)
    prepared = prepare(args, model, batch, built=bool(trt))
    metadata = {**metadata, "precision": args.precision}
    told = layer_types(args.precision, prepared, calibration) if trt and not is_strongly_typed(trt) else None
    by_ranges = bool(told and told.ranges)
    typed = None if by_ranges and not args.typed_onnx else typed_model(args.precision, prepared, calibration)
    if args.typed_onnx:
        onnx_utils.write_metadata(typed, metadata)
        with whole_file(args.typed_onnx) as path:
            onnx_utils.save(typed, path)
        following = command("infer.py", "--engine", args.typed_onnx, "--input", "IMAGES", "--output", "results")
        print(f"Wrote {args.typed_onnx} ({args.precision}, for ONNX Runtime)" + ("" if trt else f". Next: {following}"))
    if not trt:
        return 1 if args.engine else 0
    started = time.perf_counter()
    with GpuContext(cuda, args.gpus), whole_file(args.engine) as path:
        model = typed_model("fp32", prepared, None) if by_ranges else typed
        path.write_bytes(build(trt, args, model, metadata, batch, told))
    seconds = time.perf_counter() - started
    report(args, batch, seconds)
    following = command("infer.py", "--engine", args.engine, "--input", "IMAGES", "--output", "results")
    print(f"Wrote {args.engine}. Next: {following}")
    return 0


def outputs(args):
    """The files that these options name and that are written, for check_outputs."""
    return {f"--{name}": [getattr(args, name)] for name in ("engine", "timing_cache", "calib_cache", "typed_onnx")}


def read_model(path):
    """(contents, metadata) of an ONNX file. Raises UserError for one that engines are not built of."""
    model = onnx_utils.load(path)
    metadata = onnx_utils.read_metadata(model, path)
    if metadata["ops"] == "standard":
        raise UserError(
            f"--onnx {path}: it is in standard ops, without TensorRT's plugin for NMS; convert the SavedModel again with"
            " create_onnx.py --ops tensorrt"
        )
    if "precision" in metadata:
        raise UserError(
            f"--onnx {path}: --typed_onnx made it, in {metadata['precision']}; give what create_onnx.py wrote"
        )
    return model, metadata


def find_tensorrt(args):
    """(tensorrt, pycuda's driver module); (None, None) where --typed_onnx alone is wanted, or possible, which is warned of.

    Raises UserError where there is nothing to write then."""
    if not args.engine:
        return None, None
    try:
        return import_tensorrt(f"--engine {args.engine}")
    except UserError as error:
        if not args.typed_onnx:
            raise
        warn(f"{error}. No engine is built; only {args.typed_onnx} is written")
        return None, None


def batch_range(args, metadata):
    """(least, best, most) images at a time. Raises UserError where --batch does not fit the model."""
    fixed = metadata["batch_size"]
    if fixed is not None:
        if args.batch:
            raise UserError(
                f"--batch: {args.onnx} takes {fixed} at a time; convert it with create_onnx.py --batch_size dynamic"
            )
        return fixed, fixed, fixed
    least, best, most = args.batch or (1, 8, 8)
    if not 1 <= least <= best <= most <= trt_graph.PLUGIN_MAX_IMAGES:
        limit = trt_graph.PLUGIN_MAX_IMAGES
        raise UserError(f"--batch {least} {best} {most}: give three rising numbers from 1 to {limit}, MIN OPT MAX")
    return least, best, most


def prepare(args, model, batch, built=True):
    """The graph that TensorRT gets, as --suppression and --precision of args say. batch: (least, best, most) images at a time; built:
    whether an engine is."""
    few_images = built and for_few_images(batch)
    suppressed = suppress(args.suppression, model, few_images)
    # Maps that lie side by side have no ranges: their layers would be in FP16.
    return trt_graph.prepare(suppressed, batch[-1], few_images and args.precision != "int8")


def for_few_images(batch):
    """Whether an engine for (least, best, most) images at a time is for few: NMS and heads have other forms then."""
    return batch[1] <= nms_by_rounds.FEW_IMAGES and batch[2] <= nms_by_rounds.MOST_IMAGES


def suppress(wanted, model, few_images):
    """The model with its suppression as --suppression says; prints where it is in standard ops. few_images: whether an engine for few
    at a time is built."""
    if wanted == "plugin" or (wanted == "auto" and not few_images):
        return model
    changed = nms_by_rounds.replace(model)
    before, after = (sum(node.op_type == "EfficientNMS_TRT" for node in x.graph.node) for x in (model, changed))
    if after < before:
        print(f"NMS in standard ops instead of TensorRT's plugin in {before - after} of {before} places")
    elif before and wanted == "rounds":
        warn("--suppression rounds: NMS stays TensorRT's plugin: it keeps more boxes, or has limits of classes")
    return changed


def is_strongly_typed(trt):
    """Whether this TensorRT takes every tensor's type from the file (10 and later), or chooses among those allowed."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def typed_model(wanted, model, calibration):
    """The model in the precision wanted, as a strongly typed TensorRT takes it. calibration: (ranges, names), for int8."""
    if wanted == "int8":
        model = quantization.quantize(model, *calibration)
    return trt_crops.by_rows(model if wanted == "fp32" else precision.to_half(model))[0]


@dataclasses.dataclass(frozen=True)
class LayerTypes:
    """What TensorRT 8.6, which chooses among the types allowed, is told: names of layers, and ranges of tensors for INT8."""

    float32: set
    half: set
    ranges: dict  # {tensor: (low, high)}; empty: no INT8


def layer_types(wanted, model, calibration):
    """The LayerTypes of a model; None for fp32. calibration: (ranges, names of what is left in FP16), for int8."""
    if wanted == "fp32":
        return None
    wide = precision.float32_names(model) | trt_crops.by_rows(model)[1]
    if wanted == "fp16":
        return LayerTypes(wide, precision.half_convolutions(model), {})
    ranges, left = calibration
    return LayerTypes(wide, set(left), quantization.implicit_ranges(model, ranges))


def find_ranges(args, model):
    """(model, calibration or None where it is to be made) for int8: the trained ranges of a quantisation-aware model, whose
    fake quantisations they stand for then, else find_calibration."""
    if trained := read_trained_ranges(model):
        if args.calib_input:
            warn("--calib_input is not needed: the model has the ranges that it was trained with")
        model, (ranges, left) = trained
        print(
            f"INT8 by {len(ranges)} ranges that the model was trained with; {len(left)} layers without one stay in FP16"
        )
        return model, (ranges, left)
    return model, find_calibration(args, model)


def find_calibration(args, model):
    """The cached calibration, or None where it is to be made. Raises UserError if that cannot be."""
    args.calib_cache = args.calib_cache or f"{args.engine or args.typed_onnx}.calib"
    found, reason = quantization.read_cache(args.calib_cache, model)
    if found:
        print(f"Using the calibration in {args.calib_cache}")
        return found
    if not args.calib_input:
        raise UserError(f"--calib_cache {args.calib_cache}: {reason}; give calibration images with --calib_input")
    if Path(args.calib_cache).exists():
        warn(f"--calib_cache {args.calib_cache}: {reason}; calibrating anew")
    files = find_images(args.calib_input, "--calib_input").files
    check_outputs(outputs(args), {"--calib_input": files})
    args.calib_files = files[: args.calib_num_images]
    return None


def calibrate(args, model, metadata):
    """Calibrates on --calib_input, finds the layers to leave in FP16, writes --calib_cache; returns (ranges, names)."""
    files = args.calib_files
    spec = input_spec(metadata)
    size = spec.batch or args.calib_batch_size
    with Workers(0) as workers:
        load = functools.partial(load_image, **image_options(args))
        resizer = {**metadata["resizer"], "fit": True}  # images of any aspect ratio do
        batcher = ImageBatcher(files, resizer, size, workers, load=load)
        batches = list(progress(batcher, unit="batch", desc="reading"))
    if not batches:
        raise UserError(f"--calib_input {show_inputs(args.calib_input)}: none of the {len(files)} images could be read")

    def inputs():
        for batch in progress(batches, unit="batch", desc="calibrating"):
            yield network_inputs(batch.tensors, batch.true_shapes, spec)

    def detect(candidate, mirrored):
        found = []
        with OrtDetector(args.onnx, candidate) as detector:
            for batch in batches:
                images = quantization.mirror(batch.tensors, batch.true_shapes) if mirrored else batch.tensors
                found += detector.infer(images, batch.true_shapes)
                if len(found) >= quantization.JUDGED_IMAGES:
                    break
        return found

    ranges = quantization.calibrate(model, inputs())
    choice = quantization.choose_layers(model, ranges, detect)
    print(describe(choice, sum(map(len, quantization.layers(model).values()))))
    quantization.write_cache(args.calib_cache, model, ranges, choice.left)
    return ranges, choice.left


def describe(choice, layers):
    """A line on a quantization.Choice, for a model of so many layers."""
    disagree = f"with all {layers} layers in INT8 the detections disagree with FP32 by {choice.plain:.3f}"
    scale = f"(0: the same, 1: nothing alike; {choice.tolerated:.3f} is let pass)"
    if not choice.left:
        return f"No layer stays in FP16: {disagree} {scale}"
    return (
        f"{len(choice.left)} of {layers} layers stay in FP16: {disagree}, without these by {choice.reached:.3f} {scale}"
    )


def build(trt, args, model, metadata, batch, told=None, configure=None):
    """Builds the engine; returns its bytes. Raises UserError with TensorRT's own reason where it cannot.

    told: LayerTypes, for TensorRT 8.6. configure: called with (builder, config, network) before building, for what a
    measurement varies.
    """
    if batch[0] == batch[-1]:
        metadata = {**metadata, "batch_size": batch[0]}
    logger = make_logger(trt, args.verbose)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    network.name = engine_name(metadata)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise UserError(f"{args.onnx} cannot be parsed by TensorRT {trt.__version__}: {reasons[:400]}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(args.workspace * 2**30))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.set_tactic_sources(tactic_sources(trt))
    if args.builder_optimization_level is not None:
        if not hasattr(config, "builder_optimization_level"):
            raise UserError(f"--builder_optimization_level: TensorRT {trt.__version__} has none; leave it out")
        config.builder_optimization_level = args.builder_optimization_level
    if told:
        allow_precisions(trt, config, network, told)
    add_profile(builder, config, network, batch)
    share_profiles(trt, config)
    if configure:
        configure(builder, config, network)
    cache_path = Path(args.timing_cache or Path(args.engine).with_name("timing.cache"))
    cache = config.create_timing_cache(cache_path.read_bytes() if cache_path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    with leaving_at_once():
        engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{args.onnx}: TensorRT could not build an engine ({logger.last()}); try another --workspace")
    with whole_file(cache_path) as path:
        path.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def network_flags(trt):
    """How a network is created: 8.6 must be told that its batch is explicit, 11 knows nothing else."""
    name = "STRONGLY_TYPED" if is_strongly_typed(trt) else "EXPLICIT_BATCH"
    return 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))


def tactic_sources(trt):
    """No cuBLAS and no cuDNN: they need not be installed, and the convolutions of these networks do not need them."""
    sources = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
    return sum(1 << int(source) for source in sources)


def engine_name(metadata):
    """The metadata as JSON: a network's name comes back as its engine's. Without class names where they are too long."""
    name = json.dumps({onnx_utils.METADATA_KEY: metadata}, sort_keys=True, separators=(",", ":"))
    if len(name.encode()) > LONGEST_NAME and metadata.get("labels"):
        warn("the class names are too long for an engine: give them to infer.py and compare_tf.py with --labels")
        return engine_name({**metadata, "labels": None})
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"the model's metadata is too long for an engine ({len(name)} bytes of {LONGEST_NAME}); "
            "give the SavedModel's folder a shorter name and convert it again"
        )
    return name


def allow_precisions(trt, config, network, told):
    """Tells TensorRT 8.6 which layers have which type, where it matters; the rest is its choice.

    So it need not time convolutions in FP32 too. INT8 goes by the ranges of tensors, not by QuantizeLinear, and only where
    TensorRT finds it faster than FP16. For FPNLite that is nowhere: it takes 0.94 ms so, 1.06 ms with every layer in INT8
    that may be, and 1.43 ms with QuantizeLinear, where it fails if it is also told of FP32 (BENCHMARKS.md).
    """
    config.set_flag(trt.BuilderFlag.FP16)
    if told.ranges:
        config.set_flag(trt.BuilderFlag.INT8)
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)  # what was measured with INT8
    else:
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    floats = (trt.DataType.FLOAT, trt.DataType.HALF)
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        for tensor in outputs:
            if tensor.name in told.ranges:
                most = max(map(abs, told.ranges[tensor.name]))
                tensor.set_dynamic_range(-most, most)
        # The plugin's and TopK's other outputs are integers.
        computed = [i for i, output in enumerate(outputs) if output.dtype in floats and output.is_execution_tensor]
        if layer.name in told.float32 | told.half and computed:
            layer.precision = trt.DataType.FLOAT if layer.name in told.float32 else trt.DataType.HALF
            for i in computed:
                layer.set_output_type(i, layer.precision)


def add_profile(builder, config, network, batch):
    """Which shapes the engine is for: the batch range where the model leaves the batch open; of one size it is fixed."""
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        rest = tuple(tensor.shape)[1:]
        if batch[0] == batch[-1]:
            tensor.shape = (batch[0], *rest)  # as TensorRT 8.6 has it by itself
        profile.set_shape(tensor.name, *((size, *rest) for size in batch))
    config.add_optimization_profile(profile)


def share_profiles(trt, config):
    """Lets several execution contexts use the one profile at a time, as TensorRT does by itself from 10 on."""
    feature = getattr(trt.PreviewFeature, "PROFILE_SHARING_0806", None) if hasattr(trt, "PreviewFeature") else None
    if feature is not None:
        config.set_preview_feature(feature, True)


def report(args, batch, seconds):
    """Prints what was built, and how fast it runs."""
    size = Path(args.engine).stat().st_size / 1e6
    with TrtDetector(args.engine, args.gpus) as detector:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in detector.shapes().items())
        print(f"{args.precision} engine of {size:.1f} MB in {seconds:.0f} s: {shapes}")
        if args.precision == "int8":
            print(int8_used(detector.weight_types()))
        if args.no_benchmark:
            return
        for images in sorted({batch[0], batch[1]}):
            black = np.zeros((images, detector.input.height, detector.input.width, 3), np.float32)
            median, worst, captured = detector.benchmark(black)
            how = "with a CUDA graph" if captured else "without a CUDA graph"
            print(f"GPU latency of {images} black: median {median:.3f} ms, p99 {worst:.3f} ms (200 runs, {how})")


def int8_used(weight_types):
    """A line on how much of an engine runs in INT8, of TrtDetector.weight_types: not all that may, where FP16 is faster."""
    if not weight_types:
        return "TensorRT does not tell which layers run in INT8"
    used = weight_types.get("Int8", 0)
    line = f"{used} of {sum(weight_types.values())} layers with weights run in INT8"
    return line if used else f"{line}: TensorRT found none faster so; --precision fp16 needs no calibration"


if __name__ == "__main__":
    run(main)
