"""Fixtures: the shared models, materialised once; converted files, made once a session and option set."""

import contextlib
import fcntl
import functools
import importlib.util
import io
import os
from pathlib import Path

import pytest
from PIL import Image

import create_onnx
import onnx_utils
from demo import tiny_centernet, tiny_keypoints
from demo import tiny_mask_rcnn as tiny
from runtimes import open_detector
from tfod.config import read_pipeline_config
from tfod.convert import Options, read_model
from tfod.saved_model import SavedModel, find_saved_model

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DEMO = ROOT / "demo"
DEMO_MODEL = DEMO / "ssd_mobilenet_v1_shapes"
MODELS = ROOT / "build" / "models"

# Names of the shared models by what the tests call them.
ZOO = {
    "fpnlite": "ssd_mobilenet_v2_fpnlite_320x320_coco17",
    "fpnlite_float": "ssd_mobilenet_v2_fpnlite_320x320_coco17_float",
    "hands": "ssd_mobilenet_v2_fpnlite_320x320_hands",
    "mobilenet_v2": "ssd_mobilenet_v2_320x320_coco17_tpu-8",
    "mobilenet_v1_fpn": "ssd_mobilenet_v1_fpn_640x640_coco17_tpu-8",
    "resnet50_fpn": "ssd_resnet50_v1_fpn_640x640_coco17_tpu-8",
    "faster_rcnn_640": "faster_rcnn_resnet50_v1_640x640_coco17_tpu-8",
    "faster_rcnn_1333": "faster_rcnn_resnet50_v1_800x1333_coco17_gpu-8",
    "mask_rcnn": "mask_rcnn_inception_resnet_v2_1024x1024_coco17_gpu-8",
    "tf1_ssd": "tf1_ssd_mobilenet_v1_coco",
    "tf1_2018_ssd": "tf1_2018_ssd_mobilenet_v2_coco",
    "tf1_2018_faster_rcnn": "tf1_2018_faster_rcnn_inception_v2_coco",
}
# Those that only `make test-zoo` writes out.
ZOO_ONLY = {
    "efficientdet": "ssd_efficientdet_d0_512x512",
    "centernet_resnet50": "centernet_resnet50_v1_fpn_512x512",
    "centernet_mobilenet": "centernet_mobilenet_v2_fpn_512x512",
    "centernet_hourglass": "centernet_hourglass20_512x512",
    "centernet_keypoints": "centernet_mobilenet_v2_fpn_512x512_kpts_1class",
}
# FPNLite as users export it: other limits of suppression, other forms of it, images that the model decodes itself.
USERS = {
    "limit_2_of_4": "ssd_mobilenet_v2_fpnlite_limit_2_of_4",
    "total_1000": "ssd_mobilenet_v2_fpnlite_total_1000",
    "class_agnostic": "fpnlite_classagnostic",
    "combined_nms": "fpnlite_combined_nms",
    "static_shapes": "fpnlite_static_shapes",
    "encoded": "fpnlite_encoded_image_string_tensor",
}
# What of an export is given, where it is not the whole, and how a model is converted. One takes seconds for an image:
# test_parity.py is its check.
PARTS = {"tf1_2018_ssd": "frozen_inference_graph.pb"}
OPTIONS = {
    "tf1_2018_faster_rcnn": ("--image_size", "480x640", "--no_check"),
    "no_padding": ("--image_size", "64x128"),
}
# Two-stage models of the project's own, by what they vary.
EXPORTS = {
    "mask": tiny.Export(),
    "faster": tiny.Export(masks=False, share_box=True, keep_aspect=False, side=96, crop=8, seed=2),
    "few_proposals": tiny.Export(first_threshold=0.9, seed=3),
    "no_proposals": tiny.Export(first_threshold=0.9999, seed=4),
    "ties": tiny.Export(ties=True, seed=5),
    "thresholds": tiny.Export(masks=False, score_threshold=0.3, per_class=3, total=6, seed=6),
    "skip": tiny.Export(skip=True, seed=7),
    "no_padding": tiny.Export(pad=False, seed=9),
}


# Files of few tests that take minutes, and mostly wait: first, so that the other process has work beside them to the end.
FIRST = ("test_triton.py", "test_ray.py", "test_faults.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def variants(count):
    """How many damaged inputs a test tries: `count`, FUZZ times as many in `make fuzz`."""
    return count * int(os.environ.get("FUZZ", "1"))


def need_shared(*parts):
    """The path ../shared/PARTS; skips the test, saying so, where ../shared is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED}, which is not part of the project")
    return SHARED.joinpath(*parts)


@functools.cache
def model_folder(key):
    """The folder of a model: the demo's own, or a shared one, written out under build/models at first use."""
    if key == "demo":
        return DEMO_MODEL
    script = need_shared("models", "materialize.py")
    name = {**ZOO, **ZOO_ONLY, **USERS}[key]
    folder = MODELS / name
    made = "frozen_inference_graph.pb" if key.startswith("tf1_") else "saved_model/variables/variables.index"
    MODELS.mkdir(parents=True, exist_ok=True)
    with open(MODELS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of pytest-xdist may be at it
        if not (folder / made).exists():
            spec = importlib.util.spec_from_file_location("materialize", script)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.materialize(name, folder)
    return folder / PARTS.get(key, "")


@pytest.fixture(scope="session")
def convert(tmp_path_factory):
    """convert(key, *options) -> (path of the ONNX file, what create_onnx.py printed); each option set once a session."""

    @functools.cache
    def run(key, *options):
        path = tmp_path_factory.mktemp("onnx") / "model.onnx"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            args = ["--saved_model", str(model_folder(key)), "--onnx", str(path), *OPTIONS.get(key, ()), *options]
            status = create_onnx.main(args)
        assert status == 0, printed.getvalue()
        return path, printed.getvalue()

    return run


@pytest.fixture(scope="session")
def demo_model(convert):
    """The ONNX file of the demo's model, for any number of images."""
    return convert("demo", "--batch_size", "dynamic")[0]


def made_for_one_size(model, path):
    """Writes a model that pads its images as `path`, told that it was made for images of 64 x 128 alone; returns that."""
    changed = onnx_utils.load(model)
    metadata = onnx_utils.read_metadata(changed, model)
    resizer = {**metadata["resizer"], "image_size": [128, 64]}
    onnx_utils.write_metadata(changed, {**metadata, "resizer": resizer})
    onnx_utils.save(changed, path)
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """exported(name, *options) -> (folder of the export, path of its ONNX file)."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp("tiny") / name
        tiny.save_export(folder, EXPORTS[name])
        return folder

    @functools.cache
    def convert(name, *options):
        path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        args = ["--saved_model", str(save(name)), "--onnx", str(path), *OPTIONS.get(name, ()), *options]
        status = create_onnx.main(args)
        assert status == 0
        return save(name), path

    return convert


@pytest.fixture(scope="module")
def centernets(request, tmp_path_factory):
    """centernets(name) -> the folder of a tiny export, of EXPORTS of the test's module."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp("tiny") / name
        tiny_centernet.save_export(folder, request.module.EXPORTS[name])
        return folder

    return save


@pytest.fixture(scope="module")
def models(centernets):
    """models(name) -> (open SavedModel, convert.Model)."""

    @functools.cache
    def read(name):
        saved_model = SavedModel(centernets(name) / "saved_model")
        return saved_model, read_model(saved_model, read_pipeline_config(centernets(name) / "pipeline.config"))

    return read


@pytest.fixture(scope="module")
def converted(models, tmp_path_factory):
    """converted(name, ops, **options) -> path of the ONNX file. options: of convert.Options."""

    @functools.cache
    def convert(name, ops="tensorrt", **options):
        path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
        onnx_utils.save(create_onnx.write(models(name)[1], Options(**options), ops), path)
        return path

    return convert


@pytest.fixture(scope="session")
def keypoint_model(tmp_path_factory):
    """The ONNX file of a tiny CenterNet whose objects have five keypoints."""
    folder = tmp_path_factory.mktemp("keypoints")
    tiny_centernet.save_export(folder, tiny_centernet.Export(classes=1, size=9.0, joints=tiny_keypoints.Joints()))
    path = folder / "model.onnx"
    assert create_onnx.main(["--saved_model", str(folder), "--onnx", str(path), "--batch_size", "dynamic"]) == 0
    return path


@pytest.fixture(scope="session")
def detector(convert):
    """detector(key, *options) -> the converted model, open on ONNX Runtime."""

    @functools.cache
    def run(key, *options):
        return open_detector(convert(key, *options)[0], runtime="onnxruntime")

    return run


@pytest.fixture(scope="session")
def saved_model():
    """saved_model(key) -> the open SavedModel; the last two stay open."""

    @functools.lru_cache(maxsize=2)
    def run(key):
        return SavedModel(find_saved_model(model_folder(key)))

    return run


@pytest.fixture(scope="session")
def turned_demo(tmp_path_factory):
    """Folders a and b with the demo's images between them, stored turned, with the EXIF tag that says so."""
    root, exif = tmp_path_factory.mktemp("turned"), Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    for i, path in enumerate(sorted((DEMO / "images").glob("*.jpg"))):
        folder = root / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        with Image.open(path) as image:  # PNG, which loses nothing
            image.transpose(Image.Transpose.ROTATE_90).save(folder / path.name, "PNG", exif=exif)
    return root / "a", root / "b"


@pytest.fixture(scope="session")
def coco_images():
    return sorted(need_shared("coco", "val2017").glob("*.jpg"))


# Rows of the table at the end of `make test-zoo`, {model: values of COLUMNS}.
ROWS = {}
COLUMNS = (
    "weights",
    "`feature_extractor.type`",
    "classes",
    "input",
    "conversion s",
    "box diff",
    "score diff",
    "mask diff",
)
COLUMNS += ("TensorFlow ms", "ONNX Runtime ms")
MODELS_PAGE = ROOT / "docs" / "models.md"


def pytest_addoption(parser):
    parser.addoption("--update-models", action="store_true", help="put the table of models into docs/models.md")


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {model} | " + " | ".join(row) + " |" for model, row in ROWS.items()]
    terminalreporter.section("models against TensorFlow")
    for line in lines:
        terminalreporter.write_line(line)
    if config.getoption("--update-models"):
        begin, end = "<!-- models: make models-table -->\n", "<!-- end -->"
        before, rest = MODELS_PAGE.read_text(encoding="utf-8").split(begin)
        table = "\n".join(lines)
        MODELS_PAGE.write_text(f"{before}{begin}{table}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
