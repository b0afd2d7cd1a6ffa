"""Encoded images in, detections in pixels out: a model of Triton's Python backend.

export_triton.py copies this file to NAME_images/1/model.py, beside it what it imports of the project. What it takes and gives
stands in NAME_images/config.pbtxt (deploy/triton_config.py). The parameter `network` there says what runs the network: a
model of the same server, by its name, or the file `network_file` in this process.
(https://github.com/triton-inference-server/python_backend)
"""

import concurrent.futures
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from images.decoding import ImageError, decode_image
from images.resizing import preprocess
from runtimes import open_detector
from runtimes.detector import input_spec, network_inputs, output_names, split_detections
from runtimes.processes import processor_count

MAX_THREADS = 8


class TritonPythonModel:
    """The class that Triton looks for, and the methods that it calls."""

    def initialize(self, args):
        """args: Triton's description of the model and this instance of it, all strings."""
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._threshold = float(parameters["nms_threshold"])
        self._network = open_network(folder, parameters, args)
        metadata = self._network.metadata
        self._batch = metadata["batch_size"] or int(config["max_batch_size"])
        self._resizer = {**metadata["resizer"], "fit": parameters["fit"] == "true"}
        self._names = class_names(folder.parent / "labels.txt", metadata["num_classes"])
        self._pool = concurrent.futures.ThreadPoolExecutor(min(processor_count(), MAX_THREADS))

    def execute(self, requests):
        """A response for each request. Their images go through the network together, in batches that it can take."""
        begun = [[self._pool.submit(self._prepare, data) for data in images_of(request)] for request in requests]
        prepared = [[future.result() for future in futures] for futures in begun]
        good = [images for images in prepared if not any(isinstance(image, ImageError) for image in images)]
        found = iter(self._detect([image for images in good for image in images]))
        responses = []
        for images in prepared:
            broken = [(n, image) for n, image in enumerate(images) if isinstance(image, ImageError)]
            if broken:
                text = "; ".join(f"image {n} of the request (from 0) cannot be read: {why}" for n, why in broken)
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(text)))
                continue
            results = [(next(found), placement) for _, placement in images]
            tensors = response_arrays(results, self._names, self._network.metadata)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor(*item) for item in tensors.items()]))
        return responses

    def _prepare(self, data):
        """(network input, Placement) of an encoded image; an ImageError where it cannot be read."""
        try:
            return preprocess(decode_image(data), self._resizer)
        except ImageError as error:
            return error

    def _detect(self, images):
        """Detections that score enough, of (network input, Placement) each."""
        found = []
        for start in range(0, len(images), self._batch):
            tensors, placements = zip(*images[start : start + self._batch], strict=True)
            found += self._network.infer(list(tensors), [placement.true_shape for placement in placements])
        return [detections.above(self._threshold) for detections in found]

    def finalize(self):
        """Called before the process ends."""
        self._pool.shutdown()
        self._network.close()


def images_of(request):
    """The encoded images of a request: a list of bytes."""
    return pb_utils.get_input_tensor_by_name(request, "images").as_numpy().ravel().tolist()


def class_names(path, num_classes):
    """The names in the file that export_triton.py wrote, a class a line, as they stand. Raises ValueError for another number."""
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) != num_classes:
        raise ValueError(f"{path}: {len(names)} lines for {num_classes} classes")
    return names


def open_network(folder, parameters, args):
    """What runs the network: with `metadata`, `infer` and `close` of detector.Detector."""
    if parameters["network"] != "in_process":
        return TritonNetwork(parameters["network"], json.loads((folder / "metadata.json").read_text()))
    gpu = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
    return open_detector(folder / parameters["network_file"], gpu)


class TritonNetwork:
    """A network that is another model of the same server ("business logic scripting", BLS)."""

    def __init__(self, name, metadata):
        self.metadata, self._name, self._spec = metadata, name, input_spec(metadata)
        self._outputs = output_names(metadata)

    def infer(self, batch, true_shapes):
        """As detector.Detector's. Raises TritonModelException, which the requests of this batch get as their error."""
        inputs = network_inputs(batch, true_shapes, self._spec)
        request = pb_utils.InferenceRequest(
            model_name=self._name,
            requested_output_names=self._outputs,
            inputs=[pb_utils.Tensor(*item) for item in inputs.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(f"{self._name}: {response.error().message()}")
        outputs = {name: pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in self._outputs}
        return split_detections(outputs, len(batch))

    def close(self):
        """Nothing is open here."""


def response_arrays(results, names, metadata):
    """{output name: array} of (Detections, Placement) for each of N images. M: of the image with the most, at least 1.

    Boxes are xmin ymin xmax ymax, keypoints x y score in pixels, as in infer.py's tables; x and y are NaN where a class has no
    such keypoint. Slots beyond num_detections hold zeros and no names.
    """
    mask_size, points = metadata.get("mask_size"), len(metadata.get("keypoints") or ())
    images, most = len(results), max(1, *(len(found.scores) for found, _ in results))
    arrays = {
        "num_detections": np.zeros((images, 1), np.int32),
        "boxes": np.zeros((images, most, 4), np.float32),
        "scores": np.zeros((images, most), np.float32),
        "classes": np.zeros((images, most), np.int32),
        "names": np.full((images, most), b"", object),
    }
    if mask_size:
        arrays["masks"] = np.zeros((images, most, *mask_size), np.float32)
    if points:
        arrays["keypoints"] = np.zeros((images, most, points, 3), np.float32)
    for row, (found, placement) in enumerate(results):
        count, size = len(found.scores), (placement.height, placement.width)
        arrays["num_detections"][row] = count
        arrays["boxes"][row, :count] = (found.boxes * np.float32(size * 2))[:, [1, 0, 3, 2]]
        arrays["scores"][row, :count] = found.scores
        arrays["classes"][row, :count] = found.classes
        arrays["names"][row, :count] = [names[label].encode() for label in found.classes]
        if mask_size:
            arrays["masks"][row, :count] = found.masks
        if points:
            arrays["keypoints"][row, :count] = found.points_xy(size)
    return arrays
