"""export_triton.py: the repository, and the real Triton server on it."""

import concurrent.futures
import contextlib
import io
import itertools
import os
import re
import shutil
import sys

from commandline import UserError
from commandline.version import VERSION

import numpy as np
import onnx
import pytest
from conftest import DEMO
from PIL import Image
from test_install import run_without
from triton_server import triton_server

import export_triton
import infer
from deploy import triton_config
from images.decoding import load_image
from onnx_utils import load, read_metadata
from runtimes import open_detector
from runtimes.detector import detect_image

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


def ask(client, contents, model="detector_images"):
    """The response of a server to encoded images, {output name: array}; client: of tritonclient.http or .grpc."""
    module = sys.modules[type(client).__module__.removesuffix("._client")]
    images = module.InferInput("images", [len(contents), 1], "BYTES")
    images.set_data_from_numpy(np.array([[content] for content in contents], object))
    response = client.infer(model, [images])
    return {name: response.as_numpy(name) for name in ("num_detections", "boxes", "scores", "classes", "names")} | (
        {"masks": masks} if (masks := response.as_numpy("masks")) is not None else {}
    )


def tables(response):
    """infer.py's table of each image of a response, as text."""
    for row, (count,) in enumerate(response["num_detections"]):
        boxes = response["boxes"][row, :count, [1, 0, 3, 2]].T  # result_rows takes them as the network gives them
        yield "".join(infer.result_rows(boxes, response["scores"][row, :count], response["classes"][row, :count]))


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
    http = pytest.importorskip("tritonclient.http")
    grpc = pytest.importorskip("tritonclient.grpc")
    export(tmp_path / "models", convert("demo", "--batch_size", "dynamic")[0], "--in_process")
    contents = itertools.cycle(found_by_infer)
    requests = [list(itertools.islice(contents, 1 + number % 4)) for number in range(REQUESTS)]
    broken = set(range(3, REQUESTS, 10))
    for number in broken:
        requests[number][-1] = requests[number][-1][:2000] if number % 20 == 3 else b"no image"

    def ask_all(thread):
        module, address = (http, server.http) if thread % 2 else (grpc, server.grpc)
        with module.InferenceServerClient(address) as client:
            for number in range(thread, REQUESTS, THREADS):
                if number in broken:
                    last = len(requests[number]) - 1
                    with pytest.raises(
                        Exception, match=rf"image {last} of the request \(from 0\) cannot be read: (it is|.*truncated)"
                    ):
                        ask(client, requests[number])
                else:
                    response = ask(client, requests[number])
                    assert list(tables(response)) == [found_by_infer[content] for content in requests[number]]
        return True

    with triton_server(tmp_path / "models", tmp_path) as server:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            assert sum(pool.map(ask_all, range(THREADS))) == THREADS
        with http.InferenceServerClient(server.http) as client:
            response = ask(
                client, [PICTURES[0].read_bytes(), *(content for content, t in found_by_infer.items() if not t)]
            )
            assert response["num_detections"][-1] == 0
            names = (DEMO / "ssd_mobilenet_v1_shapes" / "labels.txt").read_text().split()
            count = response["num_detections"][0, 0]
            assert [names[label].encode() for label in response["classes"][0, :count]] == response["names"][
                0, :count
            ].tolist()
            (statistics,) = client.get_inference_statistics("detector_images")["model_stats"]
            # One call of the Python model for several requests: what they have in common is computed once.
            assert statistics["execution_count"] < statistics["inference_count"] / 2
            run_readme(tmp_path, server.http)


def run_readme(folder, address):
    """Runs the client of the repository's README as it stands, but for the address."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "models" / "README.md").read_text(), re.DOTALL)
    shutil.copy(PICTURES[1], folder / "photo.jpg")
    printed, before = io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code.replace("localhost:8000", address), "README.md", "exec"), {})
    finally:
        os.chdir(before)
    assert printed.getvalue().split()[0] in ("circle", "square", "triangle", "star", "ring")


def test_the_network_as_a_model_of_its_own(convert, exported, tmp_path):
    """A Mask R-CNN that keeps the aspect, and an SSD of a fixed batch: NAME_images asks NAME, all batched by the server.

    The wheel has no backend for ONNX Runtime: the network runs in the Python backend, by its own config.pbtxt but for that.
    """
    tritonclient = pytest.importorskip("tritonclient.grpc")
    models = {"masks": exported("mask", "--batch_size", "dynamic")[1], "fixed": convert("demo", "--batch_size", "4")[0]}
    for name, model in models.items():
        export(tmp_path / "models", model, "--name", name, "--nms_threshold", "0.2", "--max_batch", "4")
        config = tmp_path / "models" / name / "config.pbtxt"
        config.write_text(config.read_text().replace("onnxruntime", "python"))
        (config.parent / "1" / "model.py").write_text(PYTHON_NETWORK)
    contents = [path.read_bytes() for path in PICTURES[:3]]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(triton_server(tmp_path / "models", tmp_path))
        with tritonclient.InferenceServerClient(server.grpc) as client:
            for name, model in models.items():
                response = ask(client, contents, f"{name}_images")
                with open_detector(model) as detector:
                    wanted = [detect_image(detector, load_image(path)).above(0.2) for path in PICTURES[:3]]
                assert sum(len(found.scores) for found in wanted) > 5
                for row, (found, path) in enumerate(zip(wanted, PICTURES, strict=False)):
                    (count,) = response["num_detections"][row]
                    assert count == len(found.scores)
                    pixels = found.boxes * np.float32(load_image(path).shape[:2] * 2)
                    np.testing.assert_allclose(response["boxes"][row, :count][:, [1, 0, 3, 2]], pixels, atol=1e-3)
                    np.testing.assert_allclose(response["scores"][row, :count], found.scores, atol=1e-6)
                    assert response["classes"][row, :count].tolist() == found.classes.tolist()
                    if name == "masks":
                        np.testing.assert_allclose(response["masks"][row, :count], found.masks, atol=1e-5)
                assert ("masks" in response) == (name == "masks")
            with pytest.raises(Exception, match="batch-size must be <= 4"):
                ask(client, contents * 2, "masks_images")


def config_of(text):
    """config.pbtxt as Triton reads it."""
    pytest.importorskip("tritonclient.grpc")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors_of(described):
    return {
        tensor.name: (
            type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name,
            list(tensor.dims),
        )
        for tensor in described
    }


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_what_an_engine_is_told_of(exported, layout):
    """config.pbtxt of a Mask R-CNN's engine: a profile of 1, 4, 16 images; no GPU needed to write or to read it."""
    metadata = read_metadata(load(exported("mask", "--batch_size", "dynamic")[1]), "model.onnx")
    metadata |= {"input_format": layout, "input_type": "uint8"}
    network = triton_config.Network("model.plan", metadata, 16, 4)
    config = config_of(triton_config.network_config("photos", network))
    assert (config.name, config.platform, config.backend) == ("photos", "tensorrt_plan", "")
    assert config.max_batch_size == 16
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, type(group).KIND_GPU)
    side, most, mask = metadata["resizer"]["height"], metadata["max_detections"], metadata["mask_size"]
    image = [side, side, 3] if layout == "NHWC" else [3, side, side]
    assert tensors_of(config.input) == {"input_tensor": ("TYPE_UINT8", image), "true_shape": ("TYPE_FP32", [2])}
    assert tensors_of(config.output) == {
        "num_detections": ("TYPE_INT32", [1]),
        "detection_boxes": ("TYPE_FP32", [most, 4]),
        "detection_scores": ("TYPE_FP32", [most]),
        "detection_classes": ("TYPE_INT32", [most]),
        "detection_masks": ("TYPE_FP32", [most, *mask]),
    }
    config = config_of(triton_config.images_config("photos_images", network, "photos", 0.3, 2))
    assert (config.backend, config.max_batch_size) == ("python", 16)
    assert config.parameters["network"].string_value == "photos"
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (2, type(group).KIND_CPU)
    within = config_of(triton_config.images_config("photos_images", network, None, 0.3, 1))
    assert within.instance_group[0].kind == type(group).KIND_GPU


def test_the_network_is_in_standard_ops_and_a_fixed_batch_in_its_shapes(convert, tmp_path):
    export(tmp_path / "models", convert("demo", "--batch_size", "4")[0], "--name", "shapes")
    model = onnx.load(tmp_path / "models" / "shapes" / "1" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    config = config_of((tmp_path / "models" / "shapes" / "config.pbtxt").read_text())
    assert (config.backend, config.max_batch_size, config.HasField("dynamic_batching")) == ("onnxruntime", 0, False)
    shapes = {tensor.name: [d.dim_value for d in tensor.type.tensor_type.shape.dim] for tensor in model.graph.output}
    assert {name: dims for name, (_, dims) in tensors_of(config.output).items()} == shapes
    assert (tmp_path / "models" / "shapes" / "labels.txt").read_text().split()[0] == "circle"


def test_an_export_is_replaced_whole_and_nothing_else_is(convert, tmp_path, monkeypatch):
    model, models = convert("demo")[0], tmp_path / "models"
    export(models, model)
    assert sorted(path.name for path in models.iterdir()) == ["README.md", "detector", "detector_images"]
    assert (models / "detector_images" / "1" / "VERSION").read_text() == f"{VERSION}\n"
    export(models, model, "--in_process")  # a server would not start with a model that has no backend there
    assert sorted(path.name for path in models.iterdir()) == ["README.md", "detector_images"]
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


def test_what_lies_in_the_repository_needs_nothing_else(convert, tmp_path):
    """Without the project and the packages that only in-process networks need, model.py can be imported."""
    export(tmp_path / "models", convert("demo")[0])
    folder = tmp_path / "models" / "detector_images" / "1"
    (tmp_path / "triton_python_backend_utils.py").touch()
    code = "import sys; sys.path[:0] = sys.argv[1:]; import model, runtimes; print(runtimes.__file__)"
    program = tmp_path / "program.py"
    program.write_text(code)
    missing = ["onnx", "onnx_graphsurgeon", "onnxruntime", "tensorflow", "pycocotools", "matplotlib"]
    status, printed, errors = run_without(missing, tmp_path / "block", program, folder, tmp_path)
    assert (status, printed.strip(), errors) == (0, str(folder / "runtimes" / "__init__.py"), "")


def test_mistakes(convert, tmp_path):
    model = str(convert("demo")[0])
    for options, said in (
        (["--engine", "absent.onnx"], "absent.onnx: no such file"),
        (["--engine", str(PICTURES[0])], "a JPEG image"),
        (["--engine", model, "--labels", "absent.txt"], "--labels absent.txt"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            export_triton.main([*options, "--repository", str(tmp_path / "models")])
    assert not (tmp_path / "models").exists()
