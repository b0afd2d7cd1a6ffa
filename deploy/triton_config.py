"""config.pbtxt of Triton's models, from what a model file says of itself.

(https://docs.nvidia.com/deeplearning/triton-inference-server, "Model Configuration")
"""

import dataclasses
import json

from runtimes.detector import input_spec

# A request waits for others so long, at most, before a smaller batch than preferred is computed: a millisecond, about what
# FPNLite 320 takes on a GPU.
QUEUE_MICROSECONDS = 1000
TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}


@dataclasses.dataclass(frozen=True)
class Network:
    """A model file, as Triton is told of it."""

    file_name: str  # of the file in the repository: model.plan or model.onnx, what Triton's backends look for
    metadata: dict  # of the model file
    max_batch: int  # images at a time, at most
    usual_batch: int | None  # that it was optimised for; None: no particular

    @property
    def is_engine(self):
        return self.file_name.endswith(".plan")

    @property
    def preferred(self):
        """Batch sizes that are not made to wait for more images, in rising order."""
        return sorted({self.usual_batch, self.max_batch}) if self.usual_batch else []


def network_config(name, network):
    """config.pbtxt of the network itself, on TensorRT or ONNX Runtime. A fixed batch is part of the shapes there."""
    metadata, fixed = network.metadata, network.metadata["batch_size"]
    spec, kept = input_spec(metadata), metadata["max_detections"]
    image = [spec.height, spec.width, 3] if spec.layout == "NHWC" else [3, spec.height, spec.width]
    inputs = [(spec.name, TYPES[spec.dtype.name], image)]
    inputs += [(spec.true_shape, "TYPE_FP32", [2])] if spec.true_shape else []
    outputs = [
        ("num_detections", "TYPE_INT32", [1]),
        ("detection_boxes", "TYPE_FP32", [kept, 4]),
        ("detection_scores", "TYPE_FP32", [kept]),
        ("detection_classes", "TYPE_INT32", [kept]),
    ]
    if metadata.get("mask_size"):
        outputs.append(("detection_masks", "TYPE_FP32", [kept, *metadata["mask_size"]]))
    if points := len(metadata.get("keypoints") or ()):
        outputs.append(("detection_keypoints", "TYPE_FP32", [kept, points, 2]))
        outputs.append(("detection_keypoint_scores", "TYPE_FP32", [kept, points]))
    if fixed:
        inputs, outputs = ([(n, kind, [fixed, *dims]) for n, kind, dims in tensors] for tensors in (inputs, outputs))
    lines = [
        f"name: {quoted(name)}",
        'platform: "tensorrt_plan"' if network.is_engine else 'backend: "onnxruntime"',
        f"max_batch_size: {0 if fixed else network.max_batch}",
        *tensors("input", inputs),
        *tensors("output", outputs),
        *([] if fixed else [dynamic_batching(network.preferred)]),
        "instance_group [ { count: 1, kind: KIND_GPU } ]" if network.is_engine else "instance_group [ { count: 1 } ]",
    ]
    return "\n".join(lines) + "\n"


def images_config(name, network, network_name, threshold, instances, fit=False):
    """config.pbtxt of the model that takes encoded images (deploy/triton_model.py).

    network_name: of the network's model in Triton; None: the network runs within. fit: see images.aspect.
    """
    outputs = [
        ("num_detections", "TYPE_INT32", [1]),
        ("boxes", "TYPE_FP32", [-1, 4]),
        ("scores", "TYPE_FP32", [-1]),
        ("classes", "TYPE_INT32", [-1]),
        ("names", "TYPE_STRING", [-1]),
    ]
    if network.metadata.get("mask_size"):
        outputs.append(("masks", "TYPE_FP32", [-1, *network.metadata["mask_size"]]))
    if points := len(network.metadata.get("keypoints") or ()):
        outputs.append(("keypoints", "TYPE_FP32", [-1, points, 3]))
    kind = "KIND_GPU" if network.is_engine and not network_name else "KIND_CPU"
    parameters = {
        "network": network_name or "in_process",
        "network_file": network.file_name,
        "nms_threshold": f"{threshold:g}",
        "fit": "true" if fit else "false",
    }
    lines = [
        "# images: N x 1 encoded images (JPEG, PNG, ...). boxes: xmin ymin xmax ymax in pixels of the image.",
        "# classes: counted from 0. num_detections: how many of an image's slots hold a detection, best first.",
        f"name: {quoted(name)}",
        'backend: "python"',
        f"max_batch_size: {network.max_batch}",
        *tensors("input", [("images", "TYPE_STRING", [1])]),
        *tensors("output", outputs),
        dynamic_batching([]),
        f"instance_group [ {{ count: {instances}, kind: {kind} }} ]",
        *(
            f"parameters {{ key: {quoted(key)}, value: {{ string_value: {quoted(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def tensors(field, described):
    """Lines of config.pbtxt for inputs or outputs (name, type, dims)."""
    return [f"{field} [ {{ name: {quoted(n)}, data_type: {kind}, dims: {dims} }} ]" for n, kind, dims in described]


def dynamic_batching(preferred):
    """The line that lets Triton compute requests together."""
    sizes = f"preferred_batch_size: {preferred}, " if preferred else ""
    return f"dynamic_batching {{ {sizes}max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}"


def quoted(text):
    """A string of config.pbtxt."""
    return json.dumps(text, ensure_ascii=False)
