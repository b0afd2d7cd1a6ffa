"""Engines on an NVIDIA GPU: run with `pytest -m gpu` where there is one. CI has none; test_engine.py and test_tensorrt.py
test the logic there."""

import concurrent.futures
import functools
import io
import re
import threading
import time

from commandline import UserError

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import DEMO, DEMO_MODEL
from PIL import Image
from resize_cases import SIZES, assert_same, empty_input, make_case, resize_cases

import build_engine
import infer
import onnx_utils
from checks import parity
from images.decoding import decode_image, load_image
from images.resizing import preprocess
from runtimes import nms_by_rounds, open_detector, quantization, standard_graph, trt_graph
from runtimes.detector import detect_image
from runtimes.device_images import IMAGE, DeviceImage, resize_images
from runtimes.gpu_images import SAMPLINGS, GpuDecoder, baseline_frame, choose_decoder, sample_picture
from runtimes.pipeline import Times, batcher_for, detect_files, open_workers
from runtimes.several_gpus import SeveralGpus, job_for
from runtimes.trt_detector import SLOTS, GpuContext, import_tensorrt, make_logger

pytestmark = pytest.mark.gpu
PICTURES = sorted((DEMO / "images").glob("*.jpg"))[:8]
# So many images keep the GPU busy, and INT8 pays: of layers that take microseconds, as with 2 images, TensorRT took
# 8 of 39 in INT8 one day and 2 another.
INT8_BATCH = 64


@pytest.fixture(scope="module")
def model(convert):
    return convert("demo", "--batch_size", "dynamic")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def engine(model, folder):
    """engine(precision) -> (path of an engine of the demo's model, seconds of its first build)."""
    built = {}

    def get(precision):
        if precision not in built:
            path = folder / f"{precision}.trt"
            begun = time.perf_counter()
            usual, most = (INT8_BATCH, INT8_BATCH) if precision == "int8" else (2, 4)
            options = ["--batch", "1", str(usual), str(most), "--no_benchmark"]
            options += ["--calib_input", str(DEMO / "images"), "--calib_num_images", "4"]
            options += ["--typed_onnx", str(path.with_suffix(".onnx"))]
            assert build(model, path, precision, *options) == 0
            built[precision] = path, time.perf_counter() - begun
        return built[precision]

    return get


def build(model, path, precision, *options):
    """Builds with little search for fast kernels: minutes less, and the same network."""
    fixed = ["--onnx", str(model), "--engine", str(path), "--precision", precision, "--builder_optimization_level", "1"]
    return build_engine.main([*fixed, *options])


@pytest.fixture(scope="module")
def batch(model):
    with open_detector(model) as reference:
        resizer = reference.metadata["resizer"]
        return np.stack([preprocess(load_image(path), resizer)[0] for path in PICTURES])


def both_sides(path, batch):
    """The detections of ONNX Runtime, on the same graph in the same precision, and of the engine."""
    with open_detector(path) as detector, open_detector(path.with_suffix(".onnx")) as reference:
        return reference.infer(batch), [d for i in range(0, len(batch), 4) for d in detector.infer(batch[i : i + 4])]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 0.02)])
def test_detections_are_onnx_runtimes(engine, batch, precision, tolerance):
    """TF32 and FP16 round; what is certain must be found all the same."""
    wanted, found = both_sides(engine(precision)[0], batch)
    for a, b in zip(wanted, found, strict=True):
        unmatched = parity.match_by_overlap(a, b, min_iou=0.7, max_score_difference=tolerance)
        assert not (a.scores[unmatched] >= 0.5).any()
    assert sum((a.scores >= 0.5).sum() for a in wanted) >= 10


def test_int8_detections_are_near(engine, model, batch):
    """As near to FP32 as the layers that were chosen allow, on images of which four were calibrated on."""
    with open_detector(engine("int8")[0]) as detector:
        assert detector.weight_types().get("Int8", 0)
    with open_detector(engine("fp16")[0]) as detector:
        assert not detector.weight_types().get("Int8", 0)
    with open_detector(model) as reference:
        wanted = reference.infer(batch)
    quantized, found = both_sides(engine("int8")[0], batch)
    assert quantization.disagreement(wanted, found) < 5 * quantization.HARMLESS
    assert quantization.disagreement(wanted, found) < quantization.disagreement(wanted, quantized) + 0.05


# Where the op CropAndResize cuts, the last bit of a box decides whether a sample at the image's border is zero
# (faster_rcnn.crop_features): ONNX Runtime itself finds so many other detections when that bit changes.
AT_THE_BORDER = {"mask": 8, "faster": 1, "demo": 0}


@pytest.mark.parametrize("name", ["mask", "faster"])
def test_two_stages_are_onnx_runtimes(name, exported, folder):
    """Proposals, crops, second suppression and masks: without TF32 nothing but the order of sums differs."""
    model = exported(name, "--batch_size", "dynamic")[1]
    engine = folder / f"{name}.trt"
    build_without_tf32(model, engine)
    with open_detector(model) as reference, open_detector(engine) as detector:
        tensors, places = zip(
            *(preprocess(load_image(path), reference.metadata["resizer"]) for path in PICTURES), strict=True
        )
        batch, shapes = np.stack(tensors), np.float32([place.true_shape for place in places])
        pairs = list(zip(reference.infer(batch, shapes), detector.infer(batch, shapes), strict=True))
    assert sum(len(wanted.scores) for wanted, _ in pairs) == 160
    unmatched = [parity.match_by_overlap(*pair, min_iou=0.99, max_score_difference=1e-3) for pair in pairs]
    assert sum(map(len, unmatched)) <= AT_THE_BORDER[name], [
        pair for pair, rows in zip(pairs, unmatched, strict=True) if len(rows)
    ]
    assert max(parity.match_by_rank(*pair, tie=1e-3).mask_difference for pair in pairs) < 1e-2


LIMITS = {
    "2 of 4": "max_detections_per_class: 2 max_total_detections: 4",
    "more than TensorRT sorts": "max_detections_per_class: 4500 max_total_detections: 4500",
    "class-agnostic": "max_total_detections: 100 use_class_agnostic_nms: true",
    "combined": "max_detections_per_class: 30 max_total_detections: 100 use_combined_nms: true",
}
# The weakest scores of a sigmoid are equal by the dozen in float32, and the plugin takes equal ones in any order.
WEAKEST = 1e-5


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_nms_are_onnx_runtimes(name, convert, folder, batch, tmp_path):
    """For batches of 200, five classes as images of their own are more than one plugin takes."""
    text = (DEMO_MODEL / "pipeline.config").read_text()
    text = re.sub(r"max_detections_per_class: 100\s+max_total_detections: 100", LIMITS[name], text)
    assert LIMITS[name] in text
    (tmp_path / "pipeline.config").write_text(text)
    options = ["--batch_size", "dynamic", "--no_check", "--pipeline_config", str(tmp_path / "pipeline.config")]
    model, engine = convert("demo", *options)[0], folder / f"{name.replace(' ', '_')}.trt"
    build_without_tf32(model, engine, "--batch", "1", "4", "200")
    with open_detector(model) as reference, open_detector(engine) as detector:
        for wanted, found in zip(reference.infer(batch), detector.infer(batch), strict=True):
            report = parity.match_by_rank(wanted, found, tie=1e-3)
            assert report.compared >= (wanted.scores > WEAKEST).sum() > 0
            assert max(report.box_difference, report.score_difference) < 1e-3
            for these, others in ((wanted, found), (found, wanted)):
                alone = parity.match_by_overlap(these, others, min_iou=0.99, max_score_difference=1e-3)
                assert not (these.scores[alone] > WEAKEST).any(), these.scores[alone]


# Of a proposal network so small that the usual sizes do not suit.
FORMS = {"plugin": None, "rounds": nms_by_rounds.Sizes(pairs=288, first=160, left=128)}


@pytest.mark.parametrize("suppression", FORMS)
@pytest.mark.parametrize("name", ["demo", "faster"])
def test_either_suppression_is_onnx_runtimes(name, suppression, convert, exported, folder):
    """Of many classes, and of a proposal network's one."""
    model = (
        convert(name, "--batch_size", "dynamic")[0] if name == "demo" else exported(name, "--batch_size", "dynamic")[1]
    )
    engine, sizes = folder / f"{name}.{suppression}.trt", FORMS[suppression]
    content = nms_by_rounds.replace(onnx_utils.load(model), sizes) if sizes else onnx_utils.load(model)
    assert any(node.name.startswith("rounds_") for node in content.graph.node) == (suppression == "rounds")
    build_without_tf32(model, engine, content=content)
    with open_detector(model) as reference, open_detector(engine) as detector:
        pairs = [[detect_image(x, load_image(path)) for x in (reference, detector)] for path in PICTURES]
    reports = [parity.match_by_rank(*pair, tie=1e-3) for pair in pairs]
    missing = sum(len(wanted.scores) - report.compared for (wanted, _), report in zip(pairs, reports, strict=True))
    assert missing <= AT_THE_BORDER[name]
    assert sum(report.unmatched for report in reports) <= 2 * AT_THE_BORDER[name]
    assert min(report.compared for report in reports) > 0
    assert max(max(report.box_difference, report.score_difference) for report in reports) < 1e-3


def test_heads_over_several_levels_are_onnx_runtimes(convert, folder):
    """FPNLite's, which have the same weights for all levels."""
    model, engine = convert("fpnlite", "--batch_size", "dynamic")[0], folder / "levels.trt"
    build_without_tf32(model, engine, few_images=True)
    certain = 0
    with open_detector(model) as reference, open_detector(engine) as detector:
        for image in map(load_image, PICTURES):
            wanted, found = (detect_image(x, image) for x in (reference, detector))
            for these, others in ((wanted, found), (found, wanted)):
                alone = parity.match_by_overlap(these, others, min_iou=0.99, max_score_difference=1e-3)
                assert not (these.scores[alone] > 0.05).any(), these.scores[alone]
            certain += (wanted.scores > 0.05).sum()
    assert certain >= 8


def build_without_tf32(model, path, *more, content=None, few_images=False):
    """content: what is built instead of what the file `model` holds."""
    import tensorrt as trt

    options = ["--onnx", str(model), "--engine", str(path), "--precision", "fp32", "--builder_optimization_level", "1"]
    options += more
    args = build_engine.parse_args(options)
    content = content or onnx_utils.load(model)
    metadata = onnx_utils.read_metadata(content, model)
    batch = build_engine.batch_range(args, metadata)
    _, cuda = import_tensorrt("--engine")
    with GpuContext(cuda):
        plan = build_engine.build(
            trt,
            args,
            build_engine.typed_model("fp32", trt_graph.prepare(content, batch[-1], few_images), None),
            {**metadata, "precision": "fp32"},
            batch,
            configure=lambda builder, config, network: config.clear_flag(trt.BuilderFlag.TF32),
        )
    path.write_bytes(plan)


def test_every_batch_size_gives_the_same_again_and_again(engine, batch):
    """A CUDA graph for each size, taking turns: none may see another's shapes or buffers."""
    with open_detector(engine("fp32")[0]) as detector:
        wanted = [detector.infer(image[None])[0] for image in batch[:4]]
        for size in (4, 2, 3, 1, 4, 2, 1, 3):
            for a, b in zip(wanted, detector.infer(batch[:size]), strict=False):
                report = parity.match_by_rank(a, b, tie=1e-3)
                assert report.unmatched == 0
                assert max(report.box_difference, report.score_difference) < 1e-3
        with pytest.raises(ValueError, match="at most 4"):
            detector.infer(batch[:5])
        median, worst, captured = detector.benchmark(batch[:2])
        assert 0 < median <= worst < 50
        assert captured
        plain, _, captured = detector.benchmark(batch[:2], cuda_graph=False)
        assert plain >= 0.8 * median
        assert not captured
        layers = detector.profile(batch[:1])
        assert len(layers) > 5 and 0 < sum(layers.values()) < 50


def test_an_engine_for_one_batch_size(model, batch, folder):
    """Of a model that takes any number: fewer images are filled up, as with a model that was converted so."""
    path = folder / "three.trt"
    build_without_tf32(model, path, "--batch", "3", "3", "3")
    with open_detector(model) as reference, open_detector(path) as detector:
        assert detector.input.batch == 3
        for size in (3, 2):
            for wanted, found in zip(reference.infer(batch[:size]), detector.infer(batch[:size]), strict=True):
                assert parity.match_by_rank(wanted, found, tie=1e-3).unmatched == 0


def test_the_plugin_takes_so_many_images():
    """What trt_graph.py counts on: suppression in as many images as it says, each with its own boxes."""
    import tensorrt as trt

    most = trt_graph.PLUGIN_MAX_IMAGES
    graph = gs.Graph(opset=onnx_utils.OPSET)
    boxes = gs.Variable("boxes", np.float32, [most, 3, 4])
    scores = gs.Variable("scores", np.float32, [most, 3, 1])
    graph.inputs = [boxes, scores]
    settings = {"score_threshold": 0.1, "iou_threshold": 0.5, "max_output_boxes": 2}
    graph.outputs = onnx_utils.efficient_nms(onnx_utils.OpBuilder(graph, "nms"), boxes, scores, **settings)
    logger = make_logger(trt)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(build_engine.network_flags(trt))
    assert trt.OnnxParser(network, logger).parse(gs.export_onnx(graph).SerializeToString())
    config = builder.create_builder_config()
    config.set_tactic_sources(build_engine.tactic_sources(trt))
    plan = builder.build_serialized_network(network, config)
    assert plan, logger.errors
    rng = np.random.default_rng(0)
    corner = rng.random((most, 3, 2))
    feed = {
        "boxes": np.concatenate([corner, corner + 0.3], axis=2).astype(np.float32),
        "scores": rng.random((most, 3, 1)).astype(np.float32),
    }
    session = onnxruntime.InferenceSession(standard_graph.prepare(gs.export_onnx(graph)).SerializeToString())
    found = run_plan(trt, logger, plan, feed)
    for tensor, wanted in zip(graph.outputs, session.run(None, feed), strict=True):
        np.testing.assert_allclose(found[tensor.name], wanted, atol=1e-6, err_msg=tensor.name)


def run_plan(trt, logger, plan, feed):
    """Runs an engine of fixed shapes; returns {output: array}."""
    import pycuda.driver as cuda

    cuda.init()
    with GpuContext(cuda):
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
        context, stream, results, memory = engine.create_execution_context(), cuda.Stream(), {}, {}
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            dtype = trt.nptype(engine.get_tensor_dtype(name))
            array = feed.get(name, np.empty(tuple(engine.get_tensor_shape(name)), dtype))
            memory[name] = cuda.mem_alloc(array.nbytes)
            if name in feed:
                cuda.memcpy_htod(memory[name], array)
            else:
                results[name] = array
            context.set_tensor_address(name, int(memory[name]))
        assert context.execute_async_v3(stream.handle), logger.last()
        stream.synchronize()
        for name, array in results.items():
            cuda.memcpy_dtoh(array, memory[name])
        for allocation in memory.values():
            allocation.free()
        return results


def test_a_second_build_uses_the_timing_cache(model, folder):
    """With the plugin: what TensorRT compiles rounds to is no kernel that it times, and is compiled anew each time."""
    seconds = []
    for name in ("first", "again"):
        begun = time.perf_counter()
        options = ["--batch", "1", "2", "4", "--no_benchmark", "--suppression", "plugin"]
        build(model, folder / f"{name}.trt", "fp32", *options, "--timing_cache", str(folder / "plugin.cache"))
        seconds.append(time.perf_counter() - begun)
    assert seconds[1] < 0.8 * seconds[0]  # both begin with ten seconds that load TensorRT's kernels


def test_int8_uses_its_cache_and_refuses_another_models(model, folder, engine, exported, capsys):
    path, _ = engine("int8")
    cache = f"{path}.calib"
    build(model, folder / "cached.trt", "int8", "--batch", "1", "2", "4", "--no_benchmark", "--calib_cache", cache)
    assert "Using the calibration" in capsys.readouterr().out
    other = exported("mask", "--batch_size", "dynamic")[1]
    with pytest.raises(UserError, match="belongs to another"):
        build(other, folder / "other.trt", "int8", "--calib_cache", cache)
    assert not (folder / "other.trt").exists()


def test_infer_writes_the_same_table(engine, model, tmp_path):
    for name, file in (("onnx", model), ("trt", engine("fp32")[0])):
        argv = ["--engine", str(file), "--input", str(DEMO / "images"), "--output", str(tmp_path / name)]
        assert infer.main(argv) == 0
    for table in (tmp_path / "onnx").glob("*.tsv"):
        a, b = (np.loadtxt(x, ndmin=2) for x in (table, tmp_path / "trt" / table.name))
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=0.3)


def test_batches_beside_one_another_do_not_disturb(engine, batch):
    """Each has an execution context of its own, which share the engine's profile."""
    with open_detector(engine("fp32")[0]) as detector:
        assert len({id(slot.context) for slot in detector._slots}) == SLOTS > 1
        parts = [batch[i : i + 2] for i in range(0, 2 * SLOTS, 2)]
        wanted = [detector.infer(part) for part in parts]
        for _ in range(20):
            tickets = [detector.start(part) for part in parts]
            for alone, ticket in zip(wanted, tickets, strict=True):
                for a, b in zip(alone, detector.finish(ticket), strict=True):
                    report = parity.match_by_rank(a, b, tie=1e-3)
                    assert report.unmatched == 0
                    assert max(report.box_difference, report.score_difference) < 1e-3


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_pipeline_gives_each_image_its_own(engine, size):
    """Copies, network and results of several batches at once, from memory that processes write to."""
    files = PICTURES * 30
    with open_detector(engine("fp32")[0]) as detector, open_workers(detector, 10_000, size) as workers:
        assert workers.processes
        wanted = {path: detect_image(detector, load_image(path)) for path in PICTURES}
        results = list(detect_files(detector, files, size, workers))
    assert [item.path for item in results] == files
    for item in results:
        report = parity.match_by_rank(wanted[item.path], item.found, tie=1e-3)
        assert report.unmatched == 0
        assert max(report.box_difference, report.score_difference) < 1e-3


def test_nothing_stays_on_the_gpu(engine):
    import pycuda.driver as cuda

    path, _ = engine("fp32")
    free = []
    with GpuContext(cuda):
        for _ in range(4):
            with open_detector(path) as detector:
                detector.infer(np.zeros((1, detector.input.height, detector.input.width, 3), np.float32))
            free.append(cuda.mem_get_info()[0])
    assert free[-1] >= free[0] - 2**20


def test_files_that_are_no_engines_of_ours(engine, folder, tmp_path):
    import tensorrt as trt

    whole = engine("fp32")[0].read_bytes()
    cases = {"empty": b"", "text": b"not an engine", "truncated": whole[: len(whole) // 2]}
    for name, data in cases.items():
        (tmp_path / f"{name}.trt").write_bytes(data)
        with pytest.raises(UserError, match=rf"{name}\.trt: .*build_engine\.py"):
            open_detector(tmp_path / f"{name}.trt")

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(build_engine.network_flags(trt))
    tensor = network.add_input("x", trt.float32, (1, 4))
    network.mark_output(network.add_identity(tensor).get_output(0))
    config = builder.create_builder_config()
    config.set_tactic_sources(build_engine.tactic_sources(trt))
    (tmp_path / "foreign.trt").write_bytes(bytes(builder.build_serialized_network(network, config)))
    with pytest.raises(UserError, match=r"foreign\.trt: this tool did not make it"):
        open_detector(tmp_path / "foreign.trt")


@resize_cases
def test_images_are_resized_to_the_last_bit(layout, dtype, keep):
    import pycuda.driver as cuda

    resizer, spec, images, shapes, wanted = make_case(layout, dtype, keep)
    cuda.init()
    with GpuContext(cuda):
        pixels = [cuda.to_device(image) for image in images]
        there = [DeviceImage(int(p), 3 * x.shape[1], *x.shape[:2], p) for p, x in zip(pixels, images, strict=True)]
        found = empty_input(spec, len(images))
        table = cuda.pagelocked_empty(len(images) * IMAGE.itemsize, np.uint8).view(IMAGE)
        memory, device_table, stream = cuda.mem_alloc(found.nbytes), cuda.mem_alloc(table.nbytes), cuda.Stream()
        resize_images(there, shapes, resizer, spec, table, device_table, memory, stream)
        stream.synchronize()
        cuda.memcpy_dtoh(found, memory)
        assert_same(found, spec, wanted, images)
        memory.free()
        device_table.free()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_jpegs_have_the_pixels_of_libjpeg_turbo(sampling):
    """Of whatever size; a GPU without JPEG hardware comes near."""
    import pycuda.driver as cuda

    cuda.init()
    gpu = GpuContext(cuda)
    decoder, jpegs = GpuDecoder(gpu), [sample_picture(sampling)]
    for i, (height, width) in enumerate(SIZES):
        buffer = io.BytesIO()
        picture = Image.open(PICTURES[i]).resize((width, height))
        if sampling == "grey":
            picture.convert("L").save(buffer, "JPEG", quality=60 + 5 * i)
        else:
            picture.save(buffer, "JPEG", quality=60 + 5 * i, subsampling=sampling)
        jpegs.append(buffer.getvalue())
    exact = decoder.name == "the JPEG hardware"
    for data, image in zip(jpegs, decoder.decode([(data, baseline_frame(data)) for data in jpegs]), strict=True):
        difference = np.abs(image.download(gpu) - decode_image(data).astype(int)).max()
        assert difference <= (0 if exact else 6), f"{image.height} x {image.width}"
    assert max(decoder.differences.values()) <= (0 if exact else 6)
    mixed = [sample_picture(kind) for kind in SAMPLINGS] * 5  # as they come
    for data, image in zip(mixed, decoder.decode([(data, baseline_frame(data)) for data in mixed]), strict=True):
        difference = np.abs(image.download(gpu) - decode_image(data).astype(int)).max()
        assert difference <= (0 if exact else 6)
    del image
    with gpu:
        decoder.close()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_decoding_on_the_gpu_gives_the_same(engine, size, tmp_path):
    """Files of all kinds, decoded by the GPU where it can, and by processors: the same detections, in order."""
    for i in range(60):
        source, target = PICTURES[i % 8], tmp_path / f"{i:02}.jpg"
        if i % 10 == 4:
            target.write_bytes(source.read_bytes()[:5000])
        elif i % 10 == 7:
            Image.open(source).save(target, "PNG")
        elif i % 10 == 9:
            Image.open(source).save(target, progressive=True)
        else:
            target.symlink_to(source)
    files = sorted(tmp_path.iterdir())
    with open_detector(engine("fp32")[0]) as detector, open_workers(detector, 0, size) as workers:
        decoder = choose_decoder("gpu", detector, files)
        batcher = batcher_for(detector, files, size, workers, decoder=decoder)
        for batch in batcher:
            for path, image in zip(batch.paths, batch.tensors, strict=True):
                assert (image.height, image.width) == load_image(path).shape[:2]
        assert (batcher.skipped, 6 < batcher.by_cpu < 20) == (6, True)
        times = [Times(), Times()]
        wanted = list(detect_files(detector, files, size, workers, times[0]))
        found = list(detect_files(detector, files, size, workers, times[1], keep_images=True, decoder=decoder))
    for item in found:  # whoever draws on them
        np.testing.assert_array_equal(item.image, load_image(item.path))
    assert times[0].skipped == times[1].skipped == 6
    assert [item.path for item in found] == [item.path for item in wanted]
    for a, b in zip(wanted, found, strict=True):
        report = parity.match_by_rank(a.found, b.found, tie=1e-3)
        assert report.unmatched == 0
        assert max(report.box_difference, report.score_difference) < 1e-3


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_processes_share_the_files(engine, decoder):
    """As on several GPUs, here two processes on one."""
    path, files = engine("fp32")[0], PICTURES * 40
    with open_detector(path) as detector, open_workers(detector, 0, 4) as workers:
        wanted = list(detect_files(detector, files, 4, workers))
        job = job_for(path, detector, files, [0, 0], 4, functools.partial(load_image), decoder)
        with SeveralGpus(job, [0, 0]) as processes:
            found = list(processes.detected(files, times := Times()))
    assert [item.path for item in found] == files
    assert times.images == len(files)
    for a, b in zip(wanted, found, strict=True):
        report = parity.match_by_rank(a.found, b.found, tie=1e-3)
        assert report.unmatched == 0
        assert max(report.box_difference, report.score_difference) < 1e-3


def test_any_thread_may_ask(engine, batch):
    """An engine that one thread opened and others use, as a web server does."""
    with open_detector(engine("fp32")[0]) as detector:
        wanted = [detector.infer(image[None])[0] for image in batch]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda image: detector.infer(image[None])[0], [*batch] * 10))
        for i, b in enumerate(found):
            report = parity.match_by_rank(wanted[i % len(batch)], b, tie=1e-3)
            assert (report.unmatched, report.score_difference < 1e-3) == (0, True)
        closing = threading.Thread(target=detector.close)
        closing.start()
        closing.join()


def test_a_gpu_that_is_not_there(engine):
    with pytest.raises(UserError, match="--gpus 63: there are"):
        open_detector(engine("fp32")[0], 63)


def test_scans_behind_the_last_that_libjpeg_reads_cost_nothing():
    """baseline_frame does not count them: they are not decoded, or the file is left to processors."""
    import pycuda.driver as cuda

    cuda.init()
    gpu = GpuContext(cuda)
    decoder, buffer = GpuDecoder(gpu), io.BytesIO()
    Image.new("RGB", (3900, 3900), (200, 30, 90)).save(buffer, "JPEG", quality=60)
    plain = buffer.getvalue()
    scan = plain[plain.index(b"\xff\xda") : -2]
    trap = plain[:-2] + (14_000_000 - len(plain)) // len(scan) * scan + plain[-2:]
    seconds = []
    for data in (plain, plain, trap):
        begun = time.perf_counter()
        (image,) = decoder.decode([(data, baseline_frame(data))])
        seconds.append(time.perf_counter() - begun)
        assert image is not None or data is trap
        if image is not None:
            difference = np.abs(image.download(gpu) - decode_image(plain).astype(int)).max()
            assert difference <= (0 if decoder.name == "the JPEG hardware" else 6)
    assert seconds[2] < 5 * seconds[1] + 0.1
    del image
    with gpu:
        decoder.close()
