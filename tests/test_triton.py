"""export_triton.py: the repository, and the real Triton server on it."""

import itertools
import json
import re
import shutil
import subprocess
import urllib.request

from commandline import UserError
from commandline.version import VERSION

import numpy as np
import onnx
import pytest
from conftest import DEMO, made_for_one_size
from PIL import Image
from servers import PYTHON, read_configs, triton_server
from test_install import run_without

import export_triton
import infer
from deploy import triton_config, triton_repository
from images.aspect import choose_fit
from images.decoding import load_image
from onnx_utils import load, read_metadata
from runtimes import open_detector
from runtimes.detector import Detections, detect_image

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
THREADS, REQUESTS = 8, 200
# A network's model in the Python backend, in the place of ONNX Runtime's, which the wheel does not have.
PYTHON_NETWORK = """
import numpy, onnxruntime, os
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"))

    def execute(self, requests):
        responses, names = [], [output.name for output in self.session.get_outputs()]
        for request in requests:
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            results = zip(names, self.session.run(names, inputs))
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(*result) for result in results]))
        return responses
"""


def export(repository, model, *options):
    assert export_triton.main(["--engine", str(model), "--repository", str(repository), *options]) is None


def tables(response):
    """infer.py's table of each image of a response, as text."""
    for row, (count,) in enumerate(response["num_detections"]):
        boxes = response["boxes"][row, :count, [1, 0, 3, 2]].T  # result_rows takes them as the network gives them
        found = Detections(boxes, response["scores"][row, :count], response["classes"][row, :count])
        yield "".join(infer.result_rows(found, (1, 1)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Encoded images of several kinds: the demo's, one as PNG, one in grey, one that shows nothing."""
    folder = tmp_path_factory.mktemp("photos")
    for path in PICTURES[:5]:
        shutil.copy(path, folder)
    Image.open(PICTURES[5]).save(folder / "a.png")
    Image.open(PICTURES[6]).convert("L").save(folder / "grey.jpg")
    Image.new("RGB", (300, 200)).save(folder / "nothing.jpg")
    return folder


@pytest.fixture(scope="module")
def found_by_infer(convert, photos, tmp_path_factory):
    """{content of a photo: infer.py's table}."""
    folder = tmp_path_factory.mktemp("tables")
    model = convert("demo", "--batch_size", "dynamic")[0]
    assert infer.main(["--engine", str(model), "--input", str(photos), "--output", str(folder)]) == 0
    found = {path.read_bytes(): (folder / f"{path.stem}.tsv").read_text() for path in photos.iterdir()}
    assert sum(bool(table) for table in found.values()) >= 6 and "" in found.values()
    return found


def test_detections_are_those_of_infer(convert, found_by_infer, tmp_path):
    """200 requests of 1 to 4 photos from 8 threads over HTTP and gRPC; every tenth has an image that is none."""
    export(tmp_path / "models", convert("demo", "--batch_size", "dynamic")[0], "--in_process")
    contents = itertools.cycle(found_by_infer)
    requests = [list(itertools.islice(contents, 1 + number % 4)) for number in range(REQUESTS)]
    broken = range(3, REQUESTS, 10)
    for number in broken:
        requests[number][-1] = requests[number][-1][:2000] if number % 20 == 3 else b"no image"
    with triton_server(tmp_path / "models", tmp_path) as server:
        answers = server.ask([("detector_images", photos) for photos in requests], THREADS)
        for number, (photos, answer) in enumerate(zip(requests, answers, strict=True)):
            if number in broken:
                assert f"image {len(photos) - 1} of the request (from 0) cannot be read: " in answer
            else:
                assert list(tables(answer)) == [found_by_infer[content] for content in photos]
                check_names(answer)
        with urllib.request.urlopen(f"http://{server.http}/v2/models/detector_images/stats") as response:
            (statistics,) = json.load(response)["model_stats"]
        # One call of the Python model for several requests: what they have in common is computed once.
        assert statistics["execution_count"] < statistics["inference_count"] / 2
        run_readme(tmp_path, server.http)


def check_names(answer):
    """Each detection has its class's name, each slot beyond none."""
    names = (DEMO / "ssd_mobilenet_v1_shapes" / "labels.txt").read_text().split()
    for row, (count,) in enumerate(answer["num_detections"]):
        wanted = [names[label].encode() for label in answer["classes"][row, :count]]
        assert answer["names"][row].tolist() == wanted + [b""] * (answer["names"].shape[1] - count)


def run_readme(folder, address):
    """Runs the client of the repository's README as it stands, but for the address."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "models" / "README.md").read_text(), re.DOTALL)
    shutil.copy(PICTURES[1], folder / "photo.jpg")
    command = [PYTHON, "-c", code.replace("localhost:8000", address)]
    printed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    assert printed.split()[0] in ("circle", "square", "triangle", "star", "ring")


def test_the_network_as_a_model_of_its_own(convert, exported, keypoint_model, tmp_path):
    """A Mask R-CNN that keeps the aspect, an SSD of a fixed batch, a CenterNet with keypoints: NAME_images asks NAME, all
    batched by the server.

    The wheel has no backend for ONNX Runtime: the network runs in the Python backend, by its own config.pbtxt but for that.
    """
    models = {"masks": exported("mask", "--batch_size", "dynamic")[1], "fixed": convert("demo", "--batch_size", "4")[0]}
    models["points"] = keypoint_model
    models["fit"] = made_for_one_size(models["masks"], tmp_path / "fit.onnx")
    for name, model in models.items():
        options = ["--nms_threshold", "0.2", "--max_batch", "4", *(["--fit"] if name == "fit" else [])]
        export(tmp_path / "models", model, "--name", name, *options)
        config = tmp_path / "models" / name / "config.pbtxt"
        config.write_text(config.read_text().replace("onnxruntime", "python"))
        (config.parent / "1" / "model.py").write_text(PYTHON_NETWORK)
    contents = [path.read_bytes() for path in PICTURES[:3]]
    requests = [*((f"{name}_images", contents) for name in models), ("masks_images", contents * 2)]
    with triton_server(tmp_path / "models", tmp_path) as server:
        *answers, refused = server.ask(requests)
    assert "batch-size must be <= 4" in refused
    for (name, model), answer in zip(models.items(), answers, strict=True):
        with open_detector(model, runtime="onnxruntime") as detector:
            choose_fit(detector.metadata, name == "fit")
            wanted = [detect_image(detector, load_image(path)).above(0.2) for path in PICTURES[:3]]
        assert sum(len(found.scores) for found in wanted) > 5
        assert ("masks" in answer) == (name in ("masks", "fit"))
        assert ("keypoints" in answer) == (name == "points")
        for row, (found, path) in enumerate(zip(wanted, PICTURES, strict=False)):
            (count,) = answer["num_detections"][row]
            assert count == len(found.scores)
            pixels = found.boxes * np.float32(load_image(path).shape[:2] * 2)
            np.testing.assert_allclose(answer["boxes"][row, :count][:, [1, 0, 3, 2]], pixels, atol=1e-3)
            np.testing.assert_allclose(answer["scores"][row, :count], found.scores, atol=1e-6)
            assert answer["classes"][row, :count].tolist() == found.classes.tolist()
            if name == "masks":
                np.testing.assert_allclose(answer["masks"][row, :count], found.masks, atol=1e-5)
            if name == "points":
                points = answer["keypoints"][row, :count]
                np.testing.assert_allclose(points[..., 1::-1], found.points(load_image(path).shape[:2], 0), atol=1e-2)
                np.testing.assert_allclose(points[..., 2], found.keypoint_scores, atol=1e-5)


def tensors_of(described):
    """{name: (type, dims)} of a config's inputs or outputs."""
    return {tensor["name"]: (tensor["data_type"], list(map(int, tensor["dims"]))) for tensor in described}


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_what_an_engine_is_told_of(exported, layout):
    """config.pbtxt of a Mask R-CNN's engine: a profile of 1, 4, 16 images; no GPU needed to write or to read it."""
    metadata = read_metadata(load(exported("mask", "--batch_size", "dynamic")[1]), "model.onnx")
    metadata |= {"input_format": layout, "input_type": "uint8"}
    network = triton_config.Network("model.plan", metadata, 16, 4)
    config, images, within = read_configs(
        [
            triton_config.network_config("photos", network),
            triton_config.images_config("photos_images", network, "photos", 0.3, 2),
            triton_config.images_config("photos_images", network, None, 0.3, 1),
        ]
    )
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("photos", "tensorrt_plan", 16)
    assert config["dynamic_batching"]["preferred_batch_size"] == [4, 16]
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    side, most, mask = metadata["resizer"]["height"], metadata["max_detections"], metadata["mask_size"]
    image = [side, side, 3] if layout == "NHWC" else [3, side, side]
    assert tensors_of(config["input"]) == {"input_tensor": ("TYPE_UINT8", image), "true_shape": ("TYPE_FP32", [2])}
    assert tensors_of(config["output"]) == {
        "num_detections": ("TYPE_INT32", [1]),
        "detection_boxes": ("TYPE_FP32", [most, 4]),
        "detection_scores": ("TYPE_FP32", [most]),
        "detection_classes": ("TYPE_INT32", [most]),
        "detection_masks": ("TYPE_FP32", [most, *mask]),
    }
    assert (images["backend"], images["max_batch_size"]) == ("python", 16)
    assert images["parameters"]["network"] == {"string_value": "photos"}
    assert images["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
    assert within["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]


def test_the_network_is_in_standard_ops_and_a_fixed_batch_in_its_shapes(convert, tmp_path):
    export(tmp_path / "models", convert("demo", "--batch_size", "4")[0], "--name", "shapes")
    model = onnx.load(tmp_path / "models" / "shapes" / "1" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert read_metadata(model, "model.onnx")["ops"] == "standard"
    export(tmp_path / "again", tmp_path / "models" / "shapes" / "1" / "model.onnx", "--name", "shapes")
    assert (tmp_path / "again" / "shapes" / "1" / "model.onnx").read_bytes() == model.SerializeToString()
    (config,) = read_configs([(tmp_path / "models" / "shapes" / "config.pbtxt").read_text()])
    assert config["backend"] == "onnxruntime"
    assert not {"max_batch_size", "dynamic_batching"} & config.keys()
    shapes = {tensor.name: [d.dim_value for d in tensor.type.tensor_type.shape.dim] for tensor in model.graph.output}
    assert {name: dims for name, (_, dims) in tensors_of(config["output"]).items()} == shapes
    assert (tmp_path / "models" / "shapes" / "labels.txt").read_text().split()[0] == "circle"


def test_an_export_is_replaced_whole_and_nothing_else_is(convert, tmp_path, monkeypatch):
    model, models = convert("demo", "--batch_size", "dynamic")[0], tmp_path / "models"
    export(models, model)
    assert sorted(path.name for path in models.iterdir()) == ["README.md", "detector", "detector_images"]
    assert (models / "detector_images" / "1" / "VERSION").read_text() == f"{VERSION}\n"
    export(models, model, "--in_process")  # a server would not start with a model that has no backend there
    assert sorted(path.name for path in models.iterdir()) == ["README.md", "detector_images"]
    ours = (models / "README.md").read_text()
    (models / "README.md").write_text("# Of our team\n")
    with pytest.raises(UserError, match=r"its README\.md is not of export_triton\.py; choose another folder"):
        export(models, model)
    (models / "README.md").write_text(ours)
    (models / "detector").mkdir()
    (models / "detector" / "config.pbtxt").write_text('name: "detector"')
    before = (models / "detector_images" / "config.pbtxt").read_text()
    with pytest.raises(UserError, match="did not make it; choose another name"):
        export(models, model, "--nms_threshold", "0.9")
    assert (models / "detector_images" / "config.pbtxt").read_text() == before
    monkeypatch.setattr("deploy.triton_repository.copy_needed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(models, model, "--name", "other")
    assert sorted(path.name for path in models.iterdir()) == ["README.md", "detector", "detector_images"]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


@pytest.mark.parametrize("kind", ["beside", "in process", "engine in process"])
def test_what_lies_in_the_repository_needs_nothing_else(convert, tmp_path, kind):
    """Without the project, with the packages of its requirements.txt alone, model.py and what runs a network are imported."""
    export(
        tmp_path / "models",
        convert("demo", "--batch_size", "dynamic")[0],
        *([] if kind == "beside" else ["--in_process"]),
    )
    folder = tmp_path / "models" / "detector_images" / "1"
    needed = (folder.parent / "requirements.txt").read_text().splitlines()
    if kind == "engine in process":
        needed = triton_repository.packages(triton_config.Network("model.plan", {}, 8, 8), True, "10.9.0.34")
        assert "tensorrt==10.9.0.34" in needed
    (tmp_path / "triton_python_backend_utils.py").touch()
    runs = {"beside": "runtimes", "in process": "runtimes.ort_detector", "engine in process": "runtimes.trt_detector"}
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path[:0] = sys.argv[1:]; import model, {runs[kind]}; print(runtimes.__file__)")
    named = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in needed}
    packages = {"onnx", "onnx_graphsurgeon", "onnxruntime", "tensorflow", "pycocotools", "matplotlib", "openvino"}
    status, printed, errors = run_without(packages - named, tmp_path / "block", program, folder, tmp_path)
    assert (status, printed.strip(), errors) == (0, str(folder / "runtimes" / "__init__.py"), "")


def test_mistakes(convert, tmp_path):
    model = str(convert("demo", "--batch_size", "dynamic")[0])
    for options, said in (
        (["--engine", "absent.onnx"], "absent.onnx: no such file"),
        (["--engine", str(PICTURES[0])], "a JPEG image"),
        (["--engine", model, "--labels", "absent.txt"], "--labels absent.txt"),
        (["--engine", model, "--max_batch", "1000000"], "--max_batch 1000000: "),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            export_triton.main([*options, "--repository", str(tmp_path / "models")])
    assert not (tmp_path / "models").exists()
