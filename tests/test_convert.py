"""create_onnx.py as a command: what it takes, what it writes, what it says of mistakes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from commandline import UserError

import numpy as np
import onnx
import pytest
from conftest import DEMO, DEMO_MODEL, ROOT, model_folder

import compare_tf
import create_onnx
import onnx_utils
from checks import parity
from checks.conversion import check_conversion
from demo import train_demo_ssd as demo
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector
from runtimes.detector import detect_image
from tfod.config import read_pipeline_config
from tfod.convert import Options, read_model, write_model
from tfod.graph import first_of_equals
from tfod.saved_model import SavedModel, find_saved_model
from tfod.tensorflow_import import import_tensorflow

PICTURES = sorted((DEMO / "images").glob("*.jpg"))


# Runs a script and prints its peak memory (of this program alone: getrusage counts what it was forked from) and its
# processor time.
MEASURED = """
import atexit, runpy, sys, time
atexit.register(lambda: print(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")), time.process_time(), sep=""))
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(*options, script="create_onnx.py"):
    """Runs a script as a user does; returns the finished process."""
    return subprocess.run([sys.executable, ROOT / script, *map(str, options)], capture_output=True, text=True)


def test_a_whole_command(tmp_path):
    """The unpacked archive alone is enough; the file is checked, described and self-contained."""
    process = command("--saved_model", DEMO_MODEL, "--onnx", tmp_path / "model.onnx")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[-2].startswith("PASSED: ")
    assert re.search(r"box difference \d\.\de-\d+, score difference \d\.\de-\d+", lines[-2])
    assert lines[-1].startswith(f"Wrote {tmp_path / 'model.onnx'}")
    assert "python infer.py --engine" in lines[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]

    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    ops = {node.op_type for node in model.graph.node}
    assert [n.domain for n in model.graph.node if n.op_type == "EfficientNMS_TRT"] == ["TRT"]
    assert not {op for op in ops if not onnx.defs.has(op)} - {"EfficientNMS_TRT"}
    outputs = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    assert outputs == {
        "num_detections": [1, 1],
        "detection_boxes": [1, 100, 4],
        "detection_scores": [1, 100],
        "detection_classes": [1, 100],
    }
    types = {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    assert types["num_detections"] == types["detection_classes"] == onnx.TensorProto.INT32
    metadata = onnx_utils.read_metadata(model, "model.onnx")
    assert metadata["architecture"] == "ssd_mobilenet_v1_keras"
    assert metadata["source"] == "ssd_mobilenet_v1_shapes"
    assert (metadata["num_classes"], metadata["class_offset"], metadata["max_detections"]) == (5, 1, 100)
    assert metadata["resizer"] == {"kind": "fixed_shape", "height": 160, "width": 160}
    assert metadata["score_threshold"] == pytest.approx(1e-8)


@pytest.mark.parametrize(
    ("key", "seconds", "gigabytes"),
    [
        ("fpnlite", 60, 4),  # 30 alone; `make test` has another test beside it
        pytest.param("efficientdet", 120, 4, marks=pytest.mark.zoo),
        pytest.param("resnet50_fpn", 65, 4, marks=pytest.mark.zoo),
        pytest.param("faster_rcnn_640", 95, 8, marks=pytest.mark.zoo),
        pytest.param("mask_rcnn", 190, 8, marks=pytest.mark.zoo),
    ],
)
def test_conversion_is_fast_and_small(key, seconds, gigabytes, tmp_path):
    """The whole command without the check: 30 s for FPNLite 320, 60 s for SSD ResNet50, 120 s for EfficientDet D0, in 4 GB;
    90 s for Faster R-CNN ResNet50 640 and 180 s for Mask R-CNN, in 8 GB."""
    options = ["create_onnx.py", "--saved_model", model_folder(key), "--onnx", tmp_path / "m.onnx", "--no_check"]
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, options)], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert "PASSED" not in process.stdout
    kilobytes, processor = re.search(r"VmHWM:\s+(\d+) kB\n([\d.]+)$", process.stdout.strip()).groups()
    assert 0.2 < int(kilobytes) / 1e6 < gigabytes
    # Processor time, which another job on the machine does not stretch: it had 2 cores, but hardly used the second.
    assert 1 < float(processor) < seconds


def test_layouts_types_and_thresholds(convert):
    path, _ = convert("demo", "--input_format", "NCHW", "--input_type", "uint8", "--batch_size", "2")
    model = onnx.load(path)
    (image,) = model.graph.input
    assert image.name == "input_tensor"
    assert [d.dim_value for d in image.type.tensor_type.shape.dim] == [2, 3, 160, 160]
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8

    model = open_detector(convert("demo", "--first_nms_threshold", "0.25")[0])
    full = open_detector(convert("demo")[0])
    tensor, _ = preprocess(load_image(PICTURES[0]), full.metadata["resizer"])
    cut, all_of_them = model.infer(tensor[None])[0], full.infer(tensor[None])[0]
    expected = all_of_them.scores[all_of_them.scores >= 0.25]
    assert 1 <= len(cut.scores) == len(expected) < len(all_of_them.scores)
    np.testing.assert_allclose(cut.scores, expected, rtol=1e-5)


def test_debug_outputs_and_the_intermediate_file(tmp_path):
    intermediate, path = tmp_path / "network.onnx", tmp_path / "m.onnx"
    options = ["--saved_model", str(DEMO_MODEL), "--onnx", str(path), "--no_check"]
    create_onnx.main([*options, "--tf2onnx", str(intermediate)])
    network = onnx.load(intermediate)
    assert [len(o.type.tensor_type.shape.dim) for o in network.graph.output] == [3, 4]
    logits = network.graph.output[0].name
    create_onnx.main([*options, "--debug", logits])
    names = [o.name for o in onnx.load(path).graph.output]
    assert names == ["num_detections", "detection_boxes", "detection_scores", "detection_classes", logits]
    assert open_detector(path).infer(np.zeros((1, 160, 160, 3), np.float32))
    with pytest.raises(UserError, match="--debug no_such_tensor"):
        create_onnx.main([*options, "--debug", "no_such_tensor"])


VARIANTS = {
    "float": demo.Export(input_type="float_image_tensor"),
    "encoded": demo.Export(input_type="encoded_image_string_tensor"),
    "tf_example": demo.Export(input_type="tf_example", keep_aspect=True),
    "softmax": demo.Export(converter="SOFTMAX", scales=(8.0, 12.0, 4.0, 6.0)),
    "identity": demo.Export(converter="IDENTITY", score_threshold=0.05),
    "keep_aspect": demo.Export(keep_aspect=True),
    "per_class": demo.Export(per_class=7, score_threshold=1e-4),
    "2 of 4": demo.Export(per_class=2, total=4),
    "10 of 20": demo.Export(per_class=10, total=20),
    "400 of 400": demo.Export(per_class=400, total=400),
    "150 of 500": demo.Export(per_class=150, total=500),
    "class-agnostic": demo.Export(rule="use_class_agnostic_nms", per_class=7),
    "nearest": demo.Export(method="NEAREST_NEIGHBOR"),
    "bicubic": demo.Export(method="BICUBIC", keep_aspect=True),
    "area": demo.Export(method="AREA"),
}


@pytest.fixture(scope="module")
def network():
    """The demo's network with made-up weights that spread its outputs."""
    tf = import_tensorflow()
    tf.keras.utils.set_random_seed(5)
    network = demo.build_network(tf)
    rng = np.random.default_rng(5)
    for variable in network.variables:
        if variable.path.startswith(("box_", "class_")):
            variable.assign(rng.normal(0, 0.35, variable.shape))
    return tf, network


@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_config_says_is_what_is_computed(name, network, tmp_path):
    """Exports that differ in one rule each: the whole chain from the picture against TensorFlow."""
    tf, net = network
    folder = tmp_path / "export"
    demo.save_export(tf, folder, net, demo.make_anchors(), VARIANTS[name])
    status = create_onnx.main(["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")])
    assert status == 0
    model = open_detector(tmp_path / "m.onnx")
    seen, variant = 0, VARIANTS[name]
    with SavedModel(folder / "saved_model") as saved_model:
        for path in PICTURES:
            image = load_image(path)
            ours = detect_image(model, image)
            theirs = parity.tensorflow_detections(saved_model, image, model.metadata)
            report = parity.match_by_rank(theirs, ours)
            assert report.unmatched == 0
            assert report.box_difference <= 1e-4
            assert report.score_difference <= 1e-4
            seen += report.compared
            if not variant.rule:
                assert np.bincount(ours.classes).max() <= variant.per_class
    assert seen >= min(30, variant.total) * len(PICTURES)


def test_a_renamed_model_converts(tmp_path):
    """No scope name matters: the same export with every scope of the post-processing and heads called otherwise."""
    folder = tmp_path / "renamed"
    shutil.copytree(model_folder("hands"), folder)
    data = (folder / "saved_model" / "saved_model.pb").read_bytes()
    for old in (
        b"Postprocessor",
        b"Preprocessor",
        b"BoxPredictor",
        b"Decode",
        b"MultiscaleGridAnchorGenerator",
        b"map/",
    ):
        assert old in data
        data = data.replace(old, bytes(reversed(old.replace(b"/", b"p"))) if old != b"map/" else b"pam/")
    (folder / "saved_model" / "saved_model.pb").write_bytes(data)
    assert create_onnx.main(["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")]) == 0


def other_classes(folder):
    text = (folder / "pipeline.config").read_text()
    (folder / "pipeline.config").write_text(text.replace("num_classes: 5", "num_classes: 6"))


def other_architecture(folder):
    text = (folder / "pipeline.config").read_text()
    (folder / "pipeline.config").write_text(text.replace("ssd_mobilenet_v1_keras", "ssd_resnet50_v1_fpn_keras"))


def other_size(folder):
    text = (folder / "pipeline.config").read_text()
    (folder / "pipeline.config").write_text(text.replace("160", "320"))


def other_converter(folder):
    text = (folder / "pipeline.config").read_text()
    (folder / "pipeline.config").write_text(text.replace("SIGMOID", "SOFTMAX"))


def other_method(folder):
    text = (folder / "pipeline.config").read_text()
    (folder / "pipeline.config").write_text(text.replace("width: 160", "width: 160 resize_method: BICUBIC"))


def no_config(folder):
    (folder / "pipeline.config").unlink()


def no_model(folder):
    (folder / "saved_model" / "saved_model.pb").unlink()


def broken_model(folder):
    (folder / "saved_model" / "saved_model.pb").write_bytes(b"\x00 not a protobuf")


def truncated_variables(folder):
    data = folder / "saved_model" / "variables" / "variables.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:1000])


def no_raw_boxes(folder):
    import_tensorflow()
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    path = folder / "saved_model" / "saved_model.pb"
    model = SavedModel.FromString(path.read_bytes())
    del model.meta_graphs[0].signature_def["serving_default"].outputs["raw_detection_boxes"]
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_classes, "6 classes, the model predicts 5"),
        (other_architecture, "ssd_resnet50_v1_fpn_keras"),
        (other_size, "config"),
        (other_converter, "SOFTMAX"),
        (other_method, "does not resize images as the config's image_resizer says (fixed_shape, bicubic)"),
        (no_config, "--pipeline_config"),
        (no_model, "no saved_model.pb"),
        (broken_model, "cannot be loaded"),
        (truncated_variables, "cannot be loaded"),
        (no_raw_boxes, "gives no raw_detection_boxes, and is no CenterNet"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, change, said):
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    change(folder)
    with pytest.raises(UserError) as raised:
        create_onnx.main(["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")])
    assert said in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"], "something half-written was left"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: (p / "x.tar.gz").write_bytes(b"x") and p / "x.tar.gz", "it is an archive: unpack it"),
        (lambda p: (p / "model.tflite").write_bytes(b"x") and p / "model.tflite", "TensorFlow Lite"),
        (
            lambda p: (p / "graph.pbtxt").write_bytes(b"x") and p / "graph.pbtxt",
            "it is a text file; give the saved_model",
        ),
        (lambda p: (p / "weights.h5").write_bytes(b"x") and p / "weights.h5", "a Keras model"),
        (lambda p: (p / "ckpt-0.index").write_bytes(b"x") and p / "ckpt-0.index", "a part of a checkpoint"),
        (lambda p: (p / "ckpt-0.index").write_bytes(b"") or p, "exporter_main_v2.py --input_type image_tensor"),
        (lambda p: (p / "checkpoint").mkdir() or (p / "checkpoint" / "checkpoint").write_text("") or p, "--trained_ch"),
        (lambda p: (p / "model.onnx").write_bytes(b"x") and p / "model.onnx", "converted already"),
        (
            lambda p: (p / "model.onnx").write_bytes(b"") or p / "model.onnx",
            "the file is empty; give the unpacked export",
        ),
        (lambda p: p, "no saved_model.pb there"),
    ],
)
def test_what_is_no_saved_model_is_called_what_it_is(tmp_path, make, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        find_saved_model(make(tmp_path))
    assert str(raised.value).startswith("--saved_model ")


def test_the_file_itself_names_its_saved_model():
    folder = DEMO_MODEL / "saved_model"
    assert find_saved_model(folder / "saved_model.pb") == find_saved_model(DEMO_MODEL) == folder


def test_a_folder_that_is_not_there_is_made(tmp_path):
    target = tmp_path / "some" / "where" / "m.onnx"
    assert create_onnx.main(["--saved_model", str(DEMO_MODEL), "--onnx", str(target), "--no_check"]) == 0
    assert [path.name for path in target.parent.iterdir()] == ["m.onnx"]


def test_ctrl_c_during_the_check(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(create_onnx, "check_conversion", interrupt)
    assert create_onnx.main(["--saved_model", str(DEMO_MODEL), "--onnx", str(tmp_path / "m.onnx")]) == 130
    assert f"{tmp_path / 'm.onnx'} is written, but not checked" in capsys.readouterr().err
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))


def test_a_saved_model_of_something_else(tmp_path):
    tf = import_tensorflow()
    module = tf.Module()
    module.f = tf.function(lambda x: {"y": x + 1}, input_signature=[tf.TensorSpec([1], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "saved_model"), signatures={"serving_default": module.f})
    shutil.copy(DEMO_MODEL / "pipeline.config", tmp_path)
    with pytest.raises(UserError, match="not a TFOD detection model"):
        create_onnx.main(["--saved_model", str(tmp_path), "--onnx", str(tmp_path / "m.onnx")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--saved_model", "/no/such/model", "--onnx", "m.onnx"], "--saved_model /no/such/model"),
        (["--saved_model", str(DEMO_MODEL), "--onnx", str(ROOT / "README.md" / "m.onnx")], "cannot create the folder"),
        (["--saved_model", str(DEMO_MODEL), "--onnx", str(ROOT)], "is a folder"),
        (["--saved_model", str(DEMO_MODEL), "--onnx", "m.onnx", "--check_image", "/no/image.jpg"], "--check_image"),
        (["--saved_model", str(DEMO_MODEL), "--onnx", "m.onnx", "--batch_size", "0"], "--batch_size"),
        (["--saved_model", str(DEMO_MODEL), "--onnx", "m.onnx", "--batch_size", "100000"], "--batch_size"),
        (["--saved_model", str(DEMO_MODEL), "--onnx", "m.onnx", "--first_nms_threshold", "2"], "--first_nms_threshold"),
    ],
)
def test_mistakes_are_told_in_one_line(options, said):
    process = command(*options)
    assert process.returncode == 2
    assert said in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    "meta", ["center_net { post_processing { } }", "ssd { num_classes: 3 box_coder { keypoint_box_coder { } } }"]
)
def test_unsupported_models_are_named_at_once(tmp_path, meta):
    """Before TensorFlow is imported: within 5 seconds."""
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model" / "saved_model.pb").write_bytes(b"")
    (tmp_path / "pipeline.config").write_text(f"model {{ {meta} }}")
    process = subprocess.run(
        [sys.executable, ROOT / "create_onnx.py", "--saved_model", tmp_path, "--onnx", tmp_path / "m.onnx"],
        capture_output=True,
        text=True,
        timeout=5,
    )
    assert process.returncode == 2
    assert re.search("CenterNet|keypoint", process.stderr)
    assert len(process.stderr.splitlines()) == 1


def test_a_failed_check_exits_1(tmp_path, capsys, monkeypatch):
    """A wrong decoder is caught: box scales other than the config's (which the graph's own decoder has). What the last line
    names shows it too."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    text = (folder / "pipeline.config").read_text()
    (folder / "pipeline.config").write_text(text.replace("y_scale: 10.0", "y_scale: 9.0"))
    status = create_onnx.main(["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")])
    assert status == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed
    words = shlex.split(printed.splitlines()[-1].partition("compare_tf.py ")[2])
    monkeypatch.chdir(tmp_path)
    assert compare_tf.main(words) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("threshold", ["0.4", "0.9999"])
def test_an_override_is_not_what_is_checked(threshold, convert):
    """The check compares at the config's threshold, then what the override leaves, were it nothing."""
    printed = convert("demo", "--first_nms_threshold", threshold)[1].splitlines()
    compared = int(re.match(r"PASSED: (\d+) detections", printed[-3])[1])
    assert compared >= 100
    left = re.match(rf"PASSED: --first_nms_threshold {threshold} leaves (\d+) of these (\d+) detections", printed[-2])
    assert int(left[2]) == compared
    assert (int(left[1]) == 0) == (threshold == "0.9999")


def save_sure_export(network, folder, **changes):
    """A demo export whose own threshold leaves next to nothing; changes: {old: new} in its config."""
    tf, net = network
    demo.save_export(tf, folder, net, demo.make_anchors(), demo.Export(score_threshold=0.9999))
    for old, new in changes.items():
        text = (folder / "pipeline.config").read_text()
        assert old in text
        (folder / "pipeline.config").write_text(re.sub(rf"{old}: [\d.]+", f"{old}: {new}", text))


def test_where_little_is_found_all_anchors_are_compared(network, tmp_path, capsys):
    save_sure_export(network, tmp_path / "sure")
    options = ["--saved_model", str(tmp_path / "sure"), "--onnx", str(tmp_path / "m.onnx")]
    assert create_onnx.main(options) == 0
    printed = capsys.readouterr().out
    detections, rows = re.search(r"PASSED: (\d+) detections, and the ([\d,]+) boxes and scores", printed).groups()
    assert int(detections) < 10
    assert int(rows.replace(",", "")) == 3 * len(demo.make_anchors())
    # A wrong box decoder, which no detection would show.
    save_sure_export(network, tmp_path / "wrong", y_scale=9.0)
    options[1] = str(tmp_path / "wrong")
    assert create_onnx.main(options) == 1
    assert "FAILED: " in capsys.readouterr().out


def with_threshold(folder, threshold, path):
    """Writes the pipeline.config of a one-stage export with another score_threshold as `path`."""
    text, changed = re.subn(
        r"score_threshold: [\de.-]+", f"score_threshold: {threshold}", (folder / "pipeline.config").read_text()
    )
    assert changed == 1
    path.write_text(text)
    return str(path)


def test_the_lowest_score_is_that_of_all_pictures():
    reports = [parity.Report(1, 0, 0.0, 0.0, lowest_score=score) for score in (0.5, 0.1, float("inf"))]
    assert parity.join(reports).lowest_score == 0.1


def test_a_config_with_another_threshold_fails(tmp_path, capsys):
    """From its threshold on, both sides agree; an option that sets the same threshold is no such mistake."""
    options = ["--saved_model", str(DEMO_MODEL), "--onnx", str(tmp_path / "m.onnx")]
    for threshold, more in ((0.05, []), (0.5, []), (0.5, ["--first_nms_threshold", "0.7"])):
        config = with_threshold(DEMO_MODEL, threshold, tmp_path / "p.config")
        assert create_onnx.main([*options, "--pipeline_config", config, *more]) == 1
        said = rf"FAILED: the pipeline\.config is not that of the export: its score_threshold is {threshold}, TensorFlow gives scores from"
        printed = capsys.readouterr().out
        lowest = re.search(said + rf" (\S+) on in 3 built-in pictures;.* --first_nms_threshold {threshold}\n", printed)
        assert 0 < float(lowest[1]) < threshold
        assert " --pipeline_config THE_EXPORTS_OWN --onnx " in printed.splitlines()[-1]
    assert create_onnx.main([*options, "--first_nms_threshold", "0.5"]) == 0


def test_a_threshold_of_the_exports_own_passes(network, tmp_path):
    """Whatever float32 makes of it: TensorFlow's scores are compared with that."""
    tf, net = network
    folder = tmp_path / "model"
    demo.save_export(tf, folder, net, demo.make_anchors(), demo.Export(score_threshold=0.3))
    assert create_onnx.main(["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx")]) == 0


def test_nothing_to_compare_is_no_verdict(network, tmp_path):
    save_sure_export(network, tmp_path / "sure")
    with SavedModel(tmp_path / "sure" / "saved_model") as saved_model:
        model = read_model(saved_model, read_pipeline_config(tmp_path / "sure" / "pipeline.config"))
        reference = write_model(model, Options())
        for name in SavedModel.RAW:  # as exports of 2018 are
            del saved_model.outputs[name]
        verdict = check_conversion(saved_model, "m.onnx", reference, None)
    assert verdict.word == "NOT CHECKED"
    assert "--check_image" in str(verdict)


def test_two_stages_compare_what_they_choose_from(exported, capsys):
    """Of a two-stage model: the boxes and scores of all proposals, where few become detections."""
    folder, path = exported("thresholds")
    assert create_onnx.main(["--saved_model", str(folder), "--onnx", str(path), "--check_image", str(PICTURES[0])]) == 0
    printed = capsys.readouterr().out
    rows = re.search(r"boxes and scores they are chosen from, of TensorFlow and ONNX Runtime in 1 picture of", printed)
    assert rows, printed


@pytest.mark.parametrize(
    ("classes", "said"),
    [(5, "No class names found: put a label_map.pbtxt beside saved_model/"), (90, "Class names: COCO's 90\n")],
)
def test_a_model_without_names_says_so(tmp_path, capsys, classes, said):
    """Before anything is converted; where there are names, it says whose."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    (folder / "labels.txt").unlink()
    config = read_pipeline_config(folder / "pipeline.config")
    config.ssd.num_classes = classes
    assert create_onnx.find_class_names(None, folder / "saved_model", config) == (None, None)
    assert capsys.readouterr().out.startswith(said)
    assert create_onnx.find_class_names(
        DEMO_MODEL / "labels.txt", folder, read_pipeline_config(folder / "pipeline.config")
    )[1]
    assert capsys.readouterr().out == ""


def test_pictures_of_the_users_own(tmp_path, capsys):
    options = ["--saved_model", str(DEMO_MODEL), "--onnx", str(tmp_path / "m.onnx"), "--check_image"]
    assert create_onnx.main([*options, str(DEMO / "images")]) == 0
    assert "PASSED: 800 detections of TensorFlow and ONNX Runtime in 8 pictures of" in capsys.readouterr().out
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"--check_image .*text\.jpg: "):
        create_onnx.main([*options, str(tmp_path / "text.jpg")])


# tf2onnx hands its nodes on as a set, in the order of their addresses in memory. Here they follow hashes of their names, which
# PYTHONHASHSEED decides: without tfod.graph.merge_equals these two give files that differ, in names and in a node.
IN_ANOTHER_ORDER = """
import sys, create_onnx
from tf2onnx.graph import Graph
found = Graph.extract_sub_graph_nodes
Graph.extract_sub_graph_nodes = lambda *args, **options: sorted(found(*args, **options), key=lambda node: hash(node.name))
sys.exit(create_onnx.main(sys.argv[1:]))
"""
HASH_SEEDS = ("0", "123")


def test_a_conversion_repeats(convert, exported, tmp_path):
    """The same bytes, in one process and in others with other hashes and orders, for both kinds of model."""
    for first, folder in ((convert("demo")[0], DEMO_MODEL), (exported("mask")[1], exported("mask")[0])):
        options = ["--saved_model", str(folder), "--onnx", str(tmp_path / "again.onnx"), "--no_check"]
        assert create_onnx.main(options) == 0
        assert (tmp_path / "again.onnx").read_bytes() == first.read_bytes()
        for seed in HASH_SEEDS:
            environment = {**os.environ, "PYTHONHASHSEED": seed}
            subprocess.run([sys.executable, "-c", IN_ANOTHER_ORDER, *options], cwd=ROOT, env=environment, check=True)
            assert (tmp_path / "again.onnx").read_bytes() == first.read_bytes(), seed


def test_what_has_a_state_is_equal_to_nothing():
    tf = import_tensorflow()
    with tf.Graph().as_default() as graph:
        for name in "ba":
            fed = tf.compat.v1.placeholder("float32", [2], f"{name}/fed")
            tf.nn.relu(tf.constant([1.0, -1.0], name=f"{name}/constant"), f"{name}/relu")
            tf.nn.relu(fed, f"{name}/of_fed")
            for number, part in enumerate(
                tf.split(tf.constant([1.0, -1.0], name=f"{name}/split/of"), 2, name=f"{name}/split")
            ):
                tf.nn.relu(part, f"{name}/part{number}")
                tf.nn.relu6(part, f"{name}/part{number}_6")
            tf.raw_ops.RandomUniform(shape=[2], dtype="float32", name=f"{name}/random")
            tf.raw_ops.TensorArrayV3(size=2, dtype="float32", name=f"{name}/array")
    apart = ("fed", "of_fed", "random", "array")
    parts = ("part0", "part1", "part0_6", "part1_6")  # of one Split, by two ops: equal to their like alone
    first = first_of_equals(graph.as_graph_def(), {"b/relu"})  # an output
    alike = {"constant": "a", "relu": "b"} | dict.fromkeys(parts, "a")
    names = [f"{name}/{what}" for name in "ab" for what in (*apart, *alike)]
    expected = {
        f"{name}/{what}": f"{alike.get(what, name)}/{what}" for name, _, what in (x.partition("/") for x in names)
    }
    assert {name: first[name] for name in names} == expected


def test_metadata_is_json_in_the_file(convert):
    (entry,) = onnx.load(convert("demo")[0]).metadata_props
    assert json.loads(entry.value)["meta_architecture"] == "ssd"
