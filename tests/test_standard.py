"""create_onnx.py --ops standard: a file for any runtime; and --runtime, what runs an ONNX file here."""

import concurrent.futures
import json

from commandline import UserError

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DEMO, ROOT
from test_install import run_without

import build_engine
import compare_tf
import eval_coco
import infer
import onnx_utils
from checks import parity
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector, open_first
from runtimes.detector import network_inputs, split_detections
from runtimes.openvino_detector import OpenVinoDetector
from runtimes.ort_detector import OrtDetector

PICTURES = sorted((DEMO / "images").glob("*.jpg"))[:4]
STANDARD = ("--ops", "standard")
DYNAMIC = ("--batch_size", "dynamic")
OTHER_INPUT = (*DYNAMIC, "--input_format", "NCHW", "--input_type", "uint8")
# Each by the fixture that converts it, its name, the options besides --ops, and how near OpenVINO must be: it adds up in
# another order, which made-up weights amplify (BENCHMARKS.md).
MODELS = {
    "SSD": ("convert", "demo", (), 1e-5),
    "SSD, any batch": ("convert", "demo", DYNAMIC, 1e-5),
    "SSD, any batch, NCHW, uint8": ("convert", "demo", OTHER_INPUT, 1e-5),
    "Mask R-CNN, any batch": ("exported", "mask", DYNAMIC, 1e-5),
    "Faster R-CNN": ("exported", "faster", (), 1e-5),
    "FPNLite": ("convert", "fpnlite", DYNAMIC, 1e-5),
    "Faster R-CNN 640": ("convert", "faster_rcnn_640", (), 1e-3),
}
LARGE = {"FPNLite", "Faster R-CNN 640"}
NAMES = [pytest.param(name, marks=[pytest.mark.zoo] if name in LARGE else []) for name in MODELS]


@pytest.fixture
def both_files(request):
    """both_files(name of MODELS) -> (the file in TensorRT's ops, the file in standard ops)."""

    def files(name):
        fixture, key, options, _ = MODELS[name]
        convert = request.getfixturevalue(fixture)
        paths = [convert(key, *options, *ops) for ops in ((), STANDARD)]
        return [path[-1] if fixture == "exported" else path[0] for path in paths]

    return files


def run_onnxruntime(path, feed):
    return onnxruntime.InferenceSession(path).run(None, feed)


def run_openvino(path, feed):
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = compiled(feed)
    return [results[output] for output in compiled.outputs]


@pytest.mark.parametrize("name", NAMES)
def test_any_runtime_loads_the_file_and_finds_the_same(name, both_files):
    """Nothing of this project between the file and the runtimes."""
    ours, standard = both_files(name)
    with open_detector(ours, runtime="onnxruntime") as detector:
        spec, resizer = detector.input, detector.metadata["resizer"]
        images, places = zip(*(preprocess(load_image(path), resizer) for path in PICTURES), strict=True)
        size = 3 if spec.batch is None else spec.batch
        batch, shapes = np.rint(np.stack(images))[:size], np.float32([place.true_shape for place in places])[:size]
        wanted = detector.infer(batch, shapes)
    feed, outputs = network_inputs(batch, shapes, spec), [output.name for output in onnx.load(ours).graph.output]
    assert all(len(found.scores) >= 3 for found in wanted)
    # Crops at the image's border go by the last bit of a box (faster_rcnn.crop_features), which differs from runtime to runtime.
    may_differ = 0.1 if detector.metadata.get("zero_outside") else 0
    for run, tolerance in ((run_onnxruntime, 1e-6), (run_openvino, MODELS[name][-1])):
        found = split_detections(dict(zip(outputs, run(str(standard), feed), strict=True)), size)
        reports = [parity.match_by_rank(*sides, tolerance) for sides in zip(wanted, found, strict=True)]
        report, total = parity.join(reports), sum(len(image.scores) for image in wanted)
        assert report.unmatched <= (2 * total * may_differ if run is run_openvino else 0), run
        assert report.compared >= total * (1 - may_differ), run
        assert max(report.box_difference, report.score_difference, report.mask_difference) <= tolerance, run


@pytest.mark.parametrize("name", NAMES)
def test_the_file_differs_in_its_ops_alone(name, both_files):
    ours, standard = map(onnx.load, both_files(name))
    onnx.checker.check_model(standard, full_check=True)
    assert all(onnx.defs.has(node.op_type, node.domain) for node in standard.graph.node)
    assert {node.domain for node in standard.graph.node} == {""}
    assert "TRT" not in {opset.domain for opset in standard.opset_import}
    assert standard.ir_version == ours.ir_version <= 8  # ONNX Runtime's since 1.11
    for side in ("input", "output"):
        assert list(getattr(standard.graph, side)) == list(getattr(ours.graph, side))
    before, after = (onnx_utils.read_metadata(model, "file") for model in (ours, standard))
    assert (before["ops"], after["ops"]) == onnx_utils.OPS
    assert before == {**after, "ops": "tensorrt"}
    assert standard.producer_name == ours.producer_name == "create_onnx.py"


def test_the_check_runs_what_was_written(convert, monkeypatch):
    """Both checks, of a file with another threshold: what they open is in standard ops, and the plugin's form fails them."""
    opened = []
    before = onnxruntime.InferenceSession

    def session(data, *arguments, **options):
        opened.append({node.op_type for node in onnx.load_from_string(data).graph.node})
        return before(data, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    path, printed = convert("demo", *STANDARD, "--first_nms_threshold", "0.5")
    assert printed.count("PASSED") == 2
    model = onnx_utils.load(path)
    assert [ops for ops in opened if len(ops) > 5] == [{node.op_type for node in model.graph.node}] * 3
    plugin = onnx_utils.load(convert("demo")[0])
    onnx_utils.write_metadata(plugin, onnx_utils.read_metadata(model, path))
    with pytest.raises(UserError, match="does not run on ONNX Runtime"):
        OrtDetector(path, plugin)


def test_outputs_of_debug_keep_their_names(convert):
    """Those of the plugin that is no longer there too."""
    (plugin,) = [node for node in onnx.load(convert("demo")[0]).graph.node if node.op_type == "EfficientNMS_TRT"]
    outputs = []
    for ops in ((), STANDARD):
        model = onnx.load(convert("demo", *ops, "--debug", plugin.name, "--no_check")[0])
        outputs.append([output.name for output in model.graph.output])
    assert outputs[0] == outputs[1]
    assert plugin.output[0] in outputs[0]


def test_what_the_metadata_say_of_the_ops(convert, tmp_path):
    """Files from before --ops are in TensorRT's; what is unknown is not run."""
    model = onnx_utils.load(convert("demo")[0])
    metadata = onnx_utils.read_metadata(model, "model")
    del metadata["ops"]
    onnx_utils.write_metadata(model, metadata)
    onnx_utils.save(model, tmp_path / "older.onnx")
    assert onnx_utils.read_metadata(model, "model")["ops"] == "tensorrt"
    with open_detector(tmp_path / "older.onnx") as detector:
        assert len(detector.infer(np.zeros((1, 160, 160, 3), np.float32))) == 1
    onnx_utils.write_metadata(model, {**metadata, "ops": "quantum"})
    onnx_utils.save(model, tmp_path / "newer.onnx")
    with pytest.raises(UserError, match=r"newer\.onnx: .*'quantum'"):
        open_detector(tmp_path / "newer.onnx")


@pytest.mark.parametrize("ops", [(), STANDARD])
@pytest.mark.parametrize(("runtime", "shown"), [("onnxruntime", "ONNX Runtime"), ("openvino", "OpenVINO")])
def test_all_commands_run_either_form_on_either_runtime(ops, runtime, shown, convert, tmp_path, capsys):
    model = convert("demo", *DYNAMIC, *ops)[0]
    common = ["--engine", str(model), "--input", str(DEMO / "images"), "--runtime", runtime]
    annotations = ["--annotations", str(DEMO / "instances_shapes.json")]
    assert infer.main([*common, "--output", str(tmp_path / "out"), "--batch_size", "3"]) == 0
    assert f" on {shown}, decoded" in capsys.readouterr().out
    assert sum(len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("*.tsv")) == 30
    assert eval_coco.main([*common, *annotations, "--output", str(tmp_path / "evaluation")]) == 0
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["AP50"] == pytest.approx(1, abs=1e-6)
    saved_model = ["--saved_model", str(DEMO / "ssd_mobilenet_v1_shapes"), "--num_images", "3"]
    assert compare_tf.main([*common, *saved_model, "--output", str(tmp_path / "comparison")]) == 0
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert comparison["largest_score_difference"] < 1e-5
    capsys.readouterr()


def test_openvino_is_asked_for_float32(convert, monkeypatch):
    """Processors with BF16 or FP16 would compute in it. Those without, as this one may be, show nothing of it."""
    import openvino

    asked, before = [], openvino.Core.compile_model

    def compile_model(core, model, device, settings):
        asked.append(settings)
        return before(core, model, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    with open_detector(convert("demo")[0], runtime="openvino") as detector:
        detector.finish(detector.start(np.zeros((1, 160, 160, 3), np.float32)))
    assert [settings["INFERENCE_PRECISION_HINT"] for settings in asked] == ["f32"] * 2


@pytest.mark.parametrize("kind", [OrtDetector, OpenVinoDetector])
def test_threads_do_not_get_each_others_results(kind, convert):
    """`infer` from several threads, and batches that are started side by side."""
    images = [
        preprocess(load_image(path), {"kind": "fixed_shape", "height": 160, "width": 160})[0] for path in PICTURES
    ]
    with kind(convert("demo")[0]) as detector:
        wanted = [detector.infer(image[None])[0] for image in images]
        assert len({found.scores[0] for found in wanted}) == len(images)
        turns = [i % len(images) for i in range(60)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda i: detector.infer(images[i][None])[0], turns))
        for first in range(0, len(turns), detector.batches_ahead):
            tickets = [detector.start(images[i][None]) for i in turns[first : first + detector.batches_ahead]]
            found += [detector.finish(ticket)[0] for ticket in tickets]
    for i, ours in zip([*turns, *turns], found, strict=True):
        np.testing.assert_allclose(ours.scores, wanted[i].scores, atol=1e-6)


def test_which_runtime_auto_is(convert, exported, tmp_path):
    """The one that was measured to be faster, where it is installed; a missing one is only missed where it is named."""
    model = onnx_utils.load(exported("faster")[1])
    metadata = onnx_utils.read_metadata(model, "model")
    assert metadata["zero_outside"]
    onnx_utils.write_metadata(model, {**metadata, "zero_outside": False})
    onnx_utils.save(model, tmp_path / "model.onnx")
    for path, runtime in (
        (convert("demo")[0], "ONNX Runtime"),
        (exported("faster")[1], "ONNX Runtime"),
        (tmp_path / "model.onnx", "OpenVINO"),
    ):
        with open_detector(path) as detector:
            assert detector.runtime == runtime
    common = ["--engine", tmp_path / "model.onnx", "--input", PICTURES[0], "--output", tmp_path / "out"]
    status, printed, errors = run_without(["openvino"], tmp_path / "block", "infer.py", *common)
    assert (status, errors) == (0, "")
    assert "on ONNX Runtime, decoded" in printed
    status, _, errors = run_without(["openvino"], tmp_path / "block", "infer.py", *common, "--runtime", "openvino")
    assert (status, len(errors.splitlines())) == (2, 1)
    assert "requirements-openvino.txt" in errors


def test_a_runtime_that_cannot_be_is_one_line(convert, tmp_path):
    assert (ROOT / "requirements-openvino.txt").is_file()
    model = convert("demo")[0]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(UserError, match=r"--runtime cuda: .* no CUDA provider; pip install onnxruntime-gpu"):
            open_detector(model, runtime="cuda")
    with pytest.raises(UserError, match=r"--gpus: --runtime cuda runs on one GPU"):
        open_first(model, [0, 1], "cuda")
    engine = tmp_path / "engine.trt"
    engine.write_bytes(b"ftrt" + bytes(100))
    for runtime in ("onnxruntime", "openvino", "cuda"):
        with pytest.raises(UserError, match=rf"--runtime {runtime}: .*engine\.trt is no ONNX file"):
            open_detector(engine, runtime=runtime)


def test_engines_are_not_built_of_it(convert, tmp_path):
    for output in ("--engine", "--typed_onnx"):
        with pytest.raises(UserError, match=r"model\.onnx: it is in standard ops.*create_onnx\.py --ops tensorrt"):
            build_engine.main(["--onnx", str(convert("demo", *STANDARD)[0]), output, str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
