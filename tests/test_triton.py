"""export_triton.py: the repository, and the real Triton server on it."""

import concurrent.futures
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import sys

from commandline import UserError
from commandline.version import VERSION

import numpy as np
import pytest
from conftest import DEMO
from PIL import Image
from test_install import run_without
from triton_server import triton_server

import export_triton
import infer
from deploy import triton_config
from onnx_utils import load, read_metadata

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
                    with pytest.raises(Exception, match=rf"image {last} of the request \(from 0\) cannot be read: it is"):
                        ask(client, requests[number])
                else:
                    response = ask(client, requests[number])
                    assert list(tables(response)) == [found_by_infer[content] for content in requests[number]]
        return True

    with triton_server(tmp_path / "models", tmp_path) as server:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            assert sum(pool.map(ask_all, range(THREADS))) == THREADS
        with http.InferenceServerClient(server.http) as client:
            response = ask(client, [PICTURES[0].read_bytes(), *(content for content, t in found_by_infer.items() if not t)])
            assert response["num_detections"][-1] == 0
            names = (DEMO / "ssd_mobilenet_v1_shapes" / "labels.txt").read_text().split()
            count = response["num_detections"][0, 0]
            assert [names[label].encode() for label in response["classes"][0, :count]] == response["names"][0, :count].tolist()
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
