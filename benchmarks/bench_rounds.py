"""Times forms of suppression on TensorRT, and checks them on ONNX Runtime: the plugin, and rounds (nms_by_rounds.py).

    python benchmarks/bench_rounds.py check --onnx dynamic.onnx --input val2017
    python benchmarks/bench_rounds.py check --onnx dynamic.onnx --input val2017 --forms rounds:rounds=8 rounds:pairs=1536
    python benchmarks/bench_rounds.py part --onnx dynamic.onnx --input val2017 --output build/rounds --node 0
    python benchmarks/bench_rounds.py full --onnx dynamic.onnx --input val2017 --output build/rounds
    python benchmarks/bench_rounds.py compare --onnx dynamic.onnx --input val2017 --output build/rounds

check (needs no GPU): in how many images a form finds other detections than the plugin: where its sizes did not suffice. part:
a suppression and what prepares it as an engine of its own, which builds in half a minute, on what the network gives for the
images; its results are compared with the first form's and ONNX Runtime's. full: whole engines; compare: their detections.
Forms: plugin, rounds, rounds:FIELD=N,... with the fields of nms_by_rounds.Sizes. `dynamic.onnx`: of create_onnx.py
--batch_size dynamic.
"""

import collections
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import UserError, make_folder, progress, run
from commandline.inputs import find_images
from commandline.options import count, make_parser

import build_engine
import onnx_utils
from checks import parity
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import nms_by_rounds, precision, standard_graph, trt_graph
from runtimes.cuda_graph import CudaGraph
from runtimes.detector import detect_image, input_spec, network_inputs
from runtimes.trt_detector import GpuContext, TrtDetector, import_tensorrt, make_logger

RUNS = 200
# How far the results of two forms are the same: the least of these that holds.
ALIKE = ("bit for bit", "but for their order", "to 1e-4, in any order", "not the same")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("mode", choices=["check", "part", "full", "compare"])
    add("--onnx", required=True, help="the model.onnx, made with --batch_size dynamic")
    add("--input", required=True, help="a folder of images")
    add("--output", help="folder for engines and timing caches; not for check")
    add("--forms", nargs="+", type=Form, default=[Form("plugin"), Form("rounds")], help="default: plugin rounds")
    add("--precision", choices=["fp32", "fp16"], default="fp16", help="default: fp16")
    add("--batch", type=int, nargs=3, default=[1, 8, 32], metavar=("MIN", "OPT", "MAX"), help="default: 1 8 32")
    add("--node", type=int, default=0, metavar="N", help="part: which of the suppressions, from 0; default: 0")
    add("--images", type=count, help="check, compare: at most so many; default: all")
    add("--profile", type=count, default=8, metavar="N", help="print the N slowest layers; default: 8")
    args = parser.parse_args(argv)
    if args.mode != "check" and not args.output:
        raise UserError("--output: name a folder for the engines")
    return args


class Form:
    """A form of suppression, by its text on the command line. Raises UserError for one that there is not."""

    def __init__(self, text):
        self.text = text
        kind, _, fields = text.partition(":")
        known = [field.name for field in dataclasses.fields(nms_by_rounds.Sizes)] if kind == "rounds" else []
        pairs = [field.split("=") for field in fields.split(",") if field]
        if kind not in ("plugin", "rounds") or not all(len(x) == 2 and x[0] in known and x[1].isdigit() for x in pairs):
            names = ", ".join(field.name for field in dataclasses.fields(nms_by_rounds.Sizes))
            raise UserError(f"--forms {text}: give plugin, rounds or rounds:FIELD=N,... with the fields {names}")
        self.sizes = nms_by_rounds.Sizes(**{x: int(value) for x, value in pairs}) if kind == "rounds" else None
        if self.sizes and self.sizes.first < self.sizes.left:
            raise UserError(
                f"--forms {text}: give first={self.sizes.left} or more: what is left of them is no more than they"
            )

    def prepare(self, model, most):
        """The graph that TensorRT gets, before it is given its types. Raises UserError where the form suits no suppression."""
        if self.sizes:
            model = nms_by_rounds.replace(model, self.sizes)
            if not any(node.name.startswith("rounds_") for node in model.graph.node):
                raise UserError(f"--forms {self.text}: the plugin stays everywhere in this model; leave the form out")
        return trt_graph.prepare(model, most)

    def path(self, args, kind):
        """The engine's file."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.text)
        return Path(args.output) / f"{Path(args.onnx).stem}.{kind}.{args.precision}.{name}.trt"


def open_session(model):
    data = standard_graph.prepare(model, onnx_utils.PLUGIN_MAX_PAIRS).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def check(args, files):
    model, metadata = build_engine.read_model(args.onnx)
    spec = input_spec(metadata)
    plugin = open_session(trt_graph.prepare(model, args.batch[2]))
    forms = {form: form.prepare(model, args.batch[2]) for form in args.forms}
    sessions = {form: open_session(made) for form, made in forms.items()}
    found = collections.defaultdict(list)
    for path in progress(files, unit="image"):
        picture, placement = preprocess(load_image(path), metadata["resizer"])
        feeds = network_inputs(picture[None], [placement.true_shape], spec)
        wanted = plugin.run(None, feeds)
        for form, session in sessions.items():
            found[form] += how_alike(wanted, session.run(None, feeds))
    for form, made in forms.items():
        replaced = {node.name.split("/")[0] for node in made.graph.node if node.name.startswith("rounds_")}
        print(f"{form.text}, {len(replaced)} suppressions by rounds, against the plugin: {show_alike(found[form])}")
    return int(any(alike != "bit for bit" for alikes in found.values() for alike in alikes))


def how_alike(theirs, ours, near=1e-4):
    """For each image of two lists of results, arrays [B, 1] or [B, M, ...]: which of ALIKE they are.

    near: in parts of the largest number of its kind where that is over 1.
    """
    return [_how_alike(*([x[i] for x in side] for side in (theirs, ours)), near) for i in range(len(theirs[0]))]


def _how_alike(theirs, ours, near):
    most = max(map(len, theirs))
    a, b = (np.hstack([x.reshape(most, -1) for x in side if len(x) == most]) for side in (theirs, ours))  # [M, columns]
    if all(map(np.array_equal, theirs, ours)):
        return ALIKE[0]
    if np.array_equal(a[np.lexsort(a.T)], b[np.lexsort(b.T)]):
        return ALIKE[1]
    apart = np.abs(a[:, None] - b[None]) / np.maximum(1, np.abs(a).max(axis=0))
    is_near = apart.max(axis=2) <= near
    return ALIKE[2] if is_near.any(axis=0).all() and is_near.any(axis=1).all() else ALIKE[3]


def show_alike(found):
    numbers = collections.Counter(found)
    return ", ".join(f"{numbers[alike]} {alike}" for alike in ALIKE) + f" of {len(found)} images"


def batch_of_images(args, files, metadata):
    """The first images as a batch of the largest size: (array [B, height, width, 3], true shapes)."""
    files = [files[i % len(files)] for i in range(args.batch[2])]
    pictures = [preprocess(load_image(path), metadata["resizer"]) for path in files]
    return np.stack([x for x, _ in pictures]), [placement.true_shape for _, placement in pictures]


def build(args, model, metadata, told, engine):
    options = ["--onnx", args.onnx, "--engine", str(engine), "--precision", args.precision]
    # One for all forms: the layers that they share get the same tactics, and are timed once.
    cache = Path(args.output) / f"{Path(args.onnx).stem}.{args.precision}.cache"
    options = build_engine.parse_args([*options, "--timing_cache", str(cache)])
    trt, _ = import_tensorrt("bench_rounds.py")
    metadata = {**metadata, "precision": args.precision}
    return build_engine.build(trt, options, model, metadata, tuple(args.batch), told)


def show_table(rows, batch):
    """rows: {form: (build seconds, [ms of each batch])}."""
    print("\n| form | build s | " + " | ".join(f"ms, batch {size}" for size in batch) + " |")
    print("|---" * (len(batch) + 2) + "|")
    for form, (seconds, times) in rows.items():
        print(f"| {form.text} | {seconds:.0f} | " + " | ".join(f"{ms:.3f}" for ms in times) + " |", flush=True)


def show_layers(title, layers, most):
    """layers: {name: ms}, slowest first."""
    print(f"\n{title}: {len(layers)} layers, {sum(layers.values()):.3f} ms with the profiler on")
    for name, ms in list(layers.items())[:most]:
        print(f"  {ms:.4f} ms  {name[:150]}")


def full(args, files):
    trt, cuda = import_tensorrt("bench_rounds.py full")
    model, metadata = build_engine.read_model(args.onnx)
    images, _ = batch_of_images(args, files, metadata)
    rows = {}
    for form in args.forms:
        engine, started = form.path(args, "full"), time.perf_counter()
        prepared = form.prepare(model, args.batch[2])
        told = None if build_engine.is_strongly_typed(trt) else build_engine.layer_types(args.precision, prepared, None)
        typed = build_engine.typed_model(args.precision, prepared, None)
        try:
            with GpuContext(cuda):
                engine.write_bytes(build(args, typed, metadata, told, engine))
        except UserError as error:
            print(f"{form.text}: {error}", flush=True)
            continue
        seconds = time.perf_counter() - started
        with TrtDetector(engine) as detector:
            rows[form] = seconds, [detector.benchmark(images[:size])[0] for size in args.batch]
            for size in args.batch[::2]:
                show_layers(f"{form.text}, batch {size}", detector.profile(images[:size]), args.profile)
        show_table(rows, args.batch)
    return 0


def compare(args, files):
    """Detections of the first form's engine against those of the others, of `full`."""
    found = {}
    for form in args.forms:
        with TrtDetector(form.path(args, "full")) as detector:
            found[form] = [detect_image(detector, load_image(path)) for path in files]
    first, *others = args.forms
    for form in others:
        same = unmatched = 0
        for theirs, ours in zip(found[first], found[form], strict=True):
            same += all(np.array_equal(getattr(theirs, x), getattr(ours, x)) for x in ("boxes", "scores", "classes"))
            unmatched += parity.match_by_rank(theirs, ours).unmatched
        print(
            f"{form.text} against {first.text}: the same bit for bit in {same} of {len(files)} images, {unmatched} unmatched"
        )
    return 0


def cut_out(model, number):
    """(graphsurgeon graph, plugin, tensors that it starts from): a suppression and what prepares it, behind the layers with
    weights, what only moves their results, and the suppression before it. The model's own inputs, where it reads them, too."""
    graph = precision.typed_graph(model)
    wide = precision.float32_nodes(graph)
    plugins = [node for node in graph.nodes if node.op == "EfficientNMS_TRT"]
    if number >= len(plugins):
        raise UserError(f"--node {number}: the model has {len(plugins)}, numbered from 0")
    before = {id(node) for node in plugins} - {id(plugins[number])}
    seen, todo, edge = set(), [plugins[number]], {}
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for tensor in node.inputs:
            if tensor.inputs and id(tensor.inputs[0]) in wide - before:
                todo.append(tensor.inputs[0])
            elif isinstance(tensor, gs.Variable):
                edge[tensor.name] = tensor
    return graph, plugins[number], [edge[name] for name in sorted(edge)]


def part_of(model, number, feeds):
    """(the part as a model of its own, {input: what the network gives it}); see cut_out."""
    graph, _, edge = cut_out(model, number)
    own = {tensor.name for tensor in graph.inputs}
    graph.outputs = [tensor for tensor in edge if tensor.name not in own]
    names = [tensor.name for tensor in graph.outputs]
    session = open_session(gs.export_onnx(graph.cleanup().toposort()))
    needed = {tensor.name: feeds[tensor.name] for tensor in session.get_inputs()}
    values = dict(zip(names, session.run(None, needed), strict=True))
    graph, plugin, edge = cut_out(model, number)
    values = {tensor.name: values.get(tensor.name, feeds.get(tensor.name)) for tensor in edge}
    for tensor in edge:
        tensor.inputs.clear()
        tensor.shape, tensor.dtype = ["B", *values[tensor.name].shape[1:]], values[tensor.name].dtype
    graph.inputs, graph.outputs = list(edge), results_of(plugin)
    part = gs.export_onnx(graph.cleanup().toposort())
    onnx.checker.check_model(part)
    return part, values


def results_of(plugin):
    """What is read of a plugin's outputs; where each class is an image of its own to it, of all classes together."""
    read = [tensor for tensor in plugin.outputs if tensor.outputs]
    return [tensor.outputs[0].outputs[0] if tensor.outputs[0].op == "Reshape" else tensor for tensor in read]


def part(args, files):
    trt, cuda = import_tensorrt("bench_rounds.py part")
    model, metadata = build_engine.read_model(args.onnx)
    images, shapes = batch_of_images(args, files, metadata)
    cut, values = part_of(model, args.node, network_inputs(images, shapes, input_spec(metadata)))
    print("The part starts from " + ", ".join(f"{name} {list(x.shape)}" for name, x in values.items()), flush=True)
    rows, results = {}, {}
    for form in args.forms:
        prepared = form.prepare(cut, args.batch[2])
        typed = build_engine.is_strongly_typed(trt) or args.precision == "fp32"
        told = None if typed else build_engine.LayerTypes({node.name for node in prepared.graph.node}, set(), {})
        started = time.perf_counter()
        with GpuContext(cuda):
            try:
                data = build(args, prepared, metadata, told, form.path(args, f"part{args.node}"))
            except UserError as error:
                print(f"{form.text}: {error}", flush=True)
                continue
            seconds = time.perf_counter() - started
            times, results[form] = time_part(trt, cuda, data, values, args, form.text)
        rows[form] = seconds, times
        show_table(rows, args.batch)
    on_cpu = _in_order(open_session(trt_graph.prepare(cut, args.batch[2])).run(None, values))
    for form, found in results.items():
        print(f"{form.text} against ONNX Runtime: {show_alike(how_alike(on_cpu, found))}")
        first = next(iter(results))
        print(f"{form.text} against {first.text}: {show_alike(how_alike(results[first], found))}")
    return 0 if results else 1


def _in_order(outputs):
    """Alike for all forms, whatever they are called."""
    return sorted(outputs, key=lambda x: (x.dtype.kind, x.shape))


def time_part(trt, cuda, data, values, args, title):
    """([median ms of each batch], outputs of the largest, ordered alike for all forms) of an engine, with CUDA graphs."""
    logger = make_logger(trt)
    trt.init_libnvinfer_plugins(logger, "")
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(data)
    context, stream, times = engine.create_execution_context(), cuda.Stream(), []
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    for size in args.batch:
        memory, outputs = {}, {}
        for name in filter(values.__contains__, names):
            x = np.ascontiguousarray(values[name][:size])
            memory[name] = cuda.to_device(x)
            context.set_input_shape(name, x.shape)
        for name in set(names) - values.keys():
            kind = trt.nptype(engine.get_tensor_dtype(name))
            outputs[name] = np.empty(tuple(context.get_tensor_shape(name)), kind)
            memory[name] = cuda.mem_alloc(outputs[name].nbytes)
        for name in names:
            context.set_tensor_address(name, int(memory[name]))
        times.append(time_runs(cuda, stream, lambda: context.execute_async_v3(stream.handle)))
    for name, x in outputs.items():
        cuda.memcpy_dtoh(x, memory[name])
    show_layers(f"{title}, batch {size}", profile(trt, context, stream), args.profile)
    return times, _in_order(outputs.values())


def time_runs(cuda, stream, enqueue):
    """Median ms of what `enqueue` puts on the stream, as a CUDA graph where that can be captured."""
    enqueue()
    stream.synchronize()
    captured = CudaGraph.capture(stream, enqueue)
    launch, times = captured.launch if captured else enqueue, []
    for _ in range(RUNS + 20):
        begin, end = cuda.Event(), cuda.Event()
        begin.record(stream)
        launch()
        end.record(stream)
        end.synchronize()
        times.append(end.time_since(begin))
    return float(np.median(times[20:]))


def profile(trt, context, stream, runs=20):
    """{layer name: mean ms}, slowest first, of what the context holds."""
    times = collections.Counter()

    class Profiler(trt.IProfiler):
        def __init__(self):
            trt.IProfiler.__init__(self)

        def report_layer_time(self, name, ms):
            times[name] += ms / runs

    context.profiler = Profiler()
    for _ in range(runs):
        context.execute_async_v3(stream.handle)
        stream.synchronize()
    return dict(times.most_common())


def main(argv=None):
    args = parse_args(argv)
    files = find_images(args.input).files
    files = files if args.mode in ("part", "full") else files[: args.images]
    if args.output:
        make_folder(args.output)
    return {"check": check, "part": part, "full": full, "compare": compare}[args.mode](args, files)


if __name__ == "__main__":
    run(main)
