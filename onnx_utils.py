"""ONNX helpers: building blocks for graph surgery, metadata in the file.

Shapes: B batch, N boxes, C classes, M detections kept. Boxes are [ymin, xmin, ymax, xmax].
"""

import json
import re

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

G_LOGGER.severity = G_LOGGER.ERROR
OPSET = 17
METADATA_KEY = "tfod_tensorrt"
# What a file is made of: TensorRT's plugin for NMS besides ONNX's own ops, or those alone.
OPS = ("tensorrt", "standard")
# What tf2onnx adds to names.
COUNTER = re.compile(r"__\d+")
# The ONNX checker skips nodes of a domain that the file declares and does not know; TensorRT's parser finds plugins by
# name in any domain.
PLUGIN_DOMAIN = "TRT"
# EfficientNMS_TRT sorts all (box, class) pairs and walks the best 4,096 only (EfficientNMS plugin, NmsImpl parameters).
PLUGIN_MAX_PAIRS = 4096
# TensorRT's TopK gives so many at most (its operator reference).
TENSORRT_MAX_TOP_K = 3840


class OpBuilder:
    """Appends nodes to a graphsurgeon graph: `add` returns the first output of the node it makes."""

    def __init__(self, graph, scope):
        self.graph, self.scope, self.count = graph, scope, 0

    def add(self, op, *inputs, dtype=None, outputs=1, shapes=None, domain=None, **attributes):
        """Adds a node `op`; inputs are tensors or arrays (which become constants). Returns its output tensor(s).

        dtype: of the output, or one for each of several; default: that of the first input.
        """
        dtype = inputs[0].dtype if dtype is None else dtype
        self.count += 1
        name = f"{self.scope}/{op}_{self.count}"
        tensors = [
            x if isinstance(x, gs.Tensor) else gs.Constant(f"{name}/input_{i}", np.asarray(x, order="C"))
            for i, x in enumerate(inputs)
        ]
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * outputs
        results = [gs.Variable(f"{name}:{i}", dtype=dtypes[i], shape=shapes and shapes[i]) for i in range(outputs)]
        node = gs.Node(op, name, attributes, tensors, results, domain=domain)
        self.graph.nodes.append(node)
        return results[0] if outputs == 1 else results

    def cast(self, x, dtype):
        return self.add("Cast", x, dtype=dtype, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reshape(self, x, shape):
        return self.add("Reshape", x, np.array(shape, np.int64))

    def slice(self, x, axis, start, end):
        indices = [np.array([value], np.int64) for value in (start, end, axis)]
        return self.add("Slice", x, *indices)

    def gather_rows(self, x, rows):
        """x [B, N, ...] and rows [B, K] int64 -> [B, K, ...]."""
        rows = self.add("Unsqueeze", rows, np.array([2], np.int64))
        return self.add("GatherND", x, rows, batch_dims=1)

    def top_k(self, x, k):
        """The k largest of x along the last axis, in falling order: (values, indices int64)."""
        return self.add("TopK", x, np.array([k], np.int64), outputs=2, dtype=(x.dtype, np.int64), axis=-1, sorted=1)


def save(model, path):
    """Writes an ONNX model to `path` (a path that the caller renames: see commandline.whole_file), whatever its name: by
    some, onnx would choose a text format, which no runtime reads."""
    onnx.save(model, str(path), format="protobuf")


def load(path):
    """Reads an ONNX file. Raises UserError, naming it, if it is missing or broken."""
    try:
        model = onnx.load(str(path), format="protobuf")
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}; make it with create_onnx.py") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a file that can be read") from error
    except Exception as error:  # protobuf's DecodeError has no public home
        raise UserError(f"{path} is not a readable ONNX file; make it again with create_onnx.py") from error
    if not model.graph.node:
        raise UserError(f"{path} is not a readable ONNX file (no nodes); make it again with create_onnx.py")
    return model


def write_metadata(model, metadata):
    """Stores the dict `metadata` as JSON in the model's metadata_props."""
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def read_metadata(model, path):
    """Returns the metadata dict of an ONNX model (METADATA). Raises UserError, naming `path`, if create_onnx.py did not
    make the file, or if they are not what it writes or not of this graph."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            try:
                found = json.loads(entry.value)
            except (ValueError, RecursionError):
                found = None
            metadata = check_metadata(found, path)
            check_inputs(metadata, {tensor.name: _type_and_shape(tensor) for tensor in model.graph.input}, path)
            if any(
                switch.name == "class_agnostic" and switch.i for node in model.graph.node for switch in node.attribute
            ):
                raise UserError(
                    f"{path}: TensorRT 8.6 suppresses class by class in it, as an older create_onnx.py made its class-agnostic"
                    " NMS; convert the SavedModel again"
                )
            return metadata
    raise UserError(
        f"{path} was not made by this tool's create_onnx.py (no metadata in it); convert the SavedModel with it"
    )


def _whole(low, high):
    return lambda x: type(x) is int and low <= x <= high


def _number(low, high):
    return lambda x: type(x) in (int, float) and low <= x <= high


def _one_of(*values):
    return lambda x: isinstance(x, str) and x in values


def _list(test, length=None):
    return lambda x: isinstance(x, list) and (length is None or len(x) == length) and all(map(test, x))


def _or_none(test):
    return lambda x: x is None or test(x)


def _text(x):
    return isinstance(x, str)


def _flag(x):
    return isinstance(x, bool)


def _nothing(_):
    return False


def _resizer(x):
    """What tfod.config.describe_resizer gives."""
    if not isinstance(x, dict) or x.keys() - RESIZER.keys() or not all(RESIZER[key](x[key]) for key in x):
        return False
    padded = x.get("kind") == "keep_aspect_ratio"
    needed = {"kind", "height", "width"} | ({"min_dimension", "max_dimension", "pad_value"} if padded else set())
    return needed <= x.keys()


# What metadata say, and what each of it can be. They come with a file, and decide how much memory is asked for.
LARGEST_SIDE, MOST_CLASSES, MOST_DETECTIONS, MOST_IMAGES = 16_384, 100_000, 100_000, 4096
MOST_KEYPOINTS = 10_000
# What a batch's input may be. Its activations take some ten times as much.
MOST_INPUT_BYTES = 2e9
RESIZER = {
    "kind": _one_of("fixed_shape", "keep_aspect_ratio"),
    "height": _whole(1, LARGEST_SIDE),
    "width": _whole(1, LARGEST_SIDE),
    "method": _one_of("bilinear", "nearest_neighbor", "bicubic", "area"),
    "min_dimension": _whole(1, LARGEST_SIDE),
    "max_dimension": _whole(1, LARGEST_SIDE),
    "pad_value": _list(_number(-1e6, 1e6), 3),
    "image_size": _list(_whole(1, 99_999), 2),
}
METADATA = {
    "architecture": _text,
    "meta_architecture": _one_of("ssd", "faster_rcnn", "center_net"),
    "version": _text,
    "ops": _one_of(*OPS),
    "source": _text,
    "num_classes": _whole(1, MOST_CLASSES),
    "labels": _or_none(_list(_or_none(_text))),
    "class_offset": _whole(0, 1),
    "batch_size": _or_none(_whole(1, MOST_IMAGES)),
    "input_format": _one_of("NHWC", "NCHW"),
    "input_type": _one_of("uint8", "float32"),
    "resizer": _resizer,
    "score_threshold": _number(0, 1),
    "config_score_threshold": _number(0, 1),
    "iou_threshold": _or_none(_number(0, 1)),  # None: without suppression
    "max_detections": _whole(1, MOST_DETECTIONS),
    "mask_size": _or_none(_list(_whole(1, LARGEST_SIDE), 2)),
    "keypoints": _or_none(_list(_or_none(_text))),  # their names; None: the model gives none
    "skeleton": _or_none(_list(_list(_whole(0, MOST_KEYPOINTS - 1), 2))),  # pairs of them
    "zero_outside": _flag,
    "proposal_score_threshold": _number(0, 1),
    "precision": _one_of("fp32", "fp16", "int8"),
}
# Not in the metadata of every file.
OPTIONAL = {"zero_outside", "proposal_score_threshold", "precision", "keypoints", "skeleton"}


def check_metadata(found, path):
    """The metadata dict of what a file holds under METADATA_KEY, any JSON value. Raises UserError, naming `path`, where it
    is not what write_metadata writes (METADATA)."""
    if not isinstance(found, dict):
        raise UserError(f"{path}: its metadata are damaged (no JSON object); make the file again")
    metadata = {"ops": "tensorrt", **found}  # older files do not say
    missing = METADATA.keys() - metadata.keys() - OPTIONAL
    if missing:
        raise UserError(f"{path}: its metadata lack {min(missing)}: an older version made it; make the file again")
    for key, value in metadata.items():
        if not METADATA.get(key, _nothing)(value):
            shown = f"{value!r:.60}" if type(value) in (str, int, float, bool) else type(value).__name__
            raise UserError(
                f"{path}: its metadata say {key:.60} {shown}: a newer version made it, or they are damaged; make the file"
                " again with this version"
            )
    if metadata["labels"] is not None and len(metadata["labels"]) != metadata["num_classes"]:
        names = len(metadata["labels"])
        raise UserError(f"{path}: its metadata have {names} names for {metadata['num_classes']} classes; make it again")
    ends = [end for edge in metadata.get("skeleton") or () for end in edge]
    if ends and max(ends) >= len(metadata.get("keypoints") or ()):
        raise UserError(f"{path}: its metadata join keypoint {max(ends)}, which there is not; make it again")
    return metadata


def check_inputs(metadata, inputs, path):
    """Raises UserError where a graph's inputs are not those that its metadata tell of.

    inputs: {name: (numpy dtype, shape)}, dimensions that are free as None.
    """
    resizer, batch = metadata["resizer"], metadata["batch_size"]
    height, width = resizer["height"], resizer["width"]
    image = [batch, height, width, 3] if metadata["input_format"] == "NHWC" else [batch, 3, height, width]
    wanted = {"input_tensor": (np.dtype(metadata["input_type"]), image)}
    if resizer["kind"] == "keep_aspect_ratio":
        wanted["true_shape"] = (np.dtype(np.float32), [batch, 2])
    for name in sorted(wanted.keys() | inputs.keys()):
        if wanted.get(name) != inputs.get(name):
            says, has = (_show_input(found.get(name)) for found in (wanted, inputs))
            raise UserError(f"{path}: its metadata say that input {name} is {says}, it is {has}; make the file again")


def check_batch_size(images, height, width, dtype, option="--batch_size"):
    """Raises UserError for an `option` that cannot be meant. height, width, dtype: of the network's input."""
    image_bytes = height * width * 3 * np.dtype(dtype).itemsize
    if images * image_bytes > MOST_INPUT_BYTES:
        raise UserError(
            f"{option} {images}: {images * image_bytes / 1e9:.1f} GB of input; of {height} x {width} pixels"
            f" {int(MOST_INPUT_BYTES // image_bytes)} images are the most"
        )


def _type_and_shape(tensor):
    """(numpy dtype, shape) of an onnx.ValueInfoProto; None for a dimension that is free."""
    kind = tensor.type.tensor_type
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except (KeyError, ValueError, TypeError):
        dtype = None
    return dtype, [size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim]


def _show_input(found):
    return "not there" if found is None else f"{found[0]} {[size or 'batch' for size in found[1]]}".replace("'", "")


def efficient_nms(ops, boxes, scores, *, score_threshold, iou_threshold, max_output_boxes):
    """Adds an EfficientNMS_TRT node (version 1) on boxes [B, N, 4] or [B, N, C, 4] and scores [B, N, C], all float32.

    Returns (num_detections [B, 1] i32, boxes [B, M, 4], scores [B, M], classes [B, M] i32).
    """
    return ops.add(
        "EfficientNMS_TRT",
        boxes,
        scores,
        outputs=4,
        dtype=(np.int32, np.float32, np.float32, np.int32),
        shapes=([None, 1], [None, max_output_boxes, 4], [None, max_output_boxes], [None, max_output_boxes]),
        domain=PLUGIN_DOMAIN,
        plugin_version="1",
        score_threshold=float(score_threshold),
        iou_threshold=float(iou_threshold),
        max_output_boxes=int(max_output_boxes),
        background_class=-1,
        score_activation=0,
        box_coding=0,
    )


def nms_of_each_class(ops, boxes, scores, shape, *, score_threshold, iou_threshold, limit):
    """An EfficientNMS_TRT node that takes each class as an image of its own, and leaves `limit` boxes of it at most.

    boxes [B, C, N, 4] and scores [B, C, N]; shape: (C, N). Returns boxes [B, C * limit, 4] and scores [B, C * limit].
    """
    classes, count = shape
    boxes.shape, scores.shape = [None, classes, count, 4], [None, classes, count]
    boxes, scores = ops.reshape(boxes, [-1, count, 4]), ops.reshape(scores, [-1, count, 1])
    boxes.shape, scores.shape = [None, count, 4], [None, count, 1]
    limits = {"score_threshold": score_threshold, "iou_threshold": iou_threshold, "max_output_boxes": limit}
    _, boxes, scores, _ = efficient_nms(ops, boxes, scores, **limits)
    return ops.reshape(boxes, [-1, classes * limit, 4]), ops.reshape(scores, [-1, classes * limit])


def fold_batch_norms(graph):
    """Merges each BatchNormalization into the convolution before it, where that convolution's weights are its own.

    A head's convolution that all levels share keeps its batch normalisations: each level has another one.
    """
    for norm in [node for node in graph.nodes if node.op == "BatchNormalization"]:
        (conv,) = norm.inputs[0].inputs or (None,)
        if conv is None or conv.op != "Conv" or len(norm.inputs[0].outputs) != 1 or len(conv.inputs[1].outputs) != 1:
            continue
        parameters = [*conv.inputs[1:], *norm.inputs[1:]]
        if not all(isinstance(tensor, gs.Constant) for tensor in parameters):
            continue
        weight = conv.inputs[1].values
        bias = conv.inputs[2].values if len(conv.inputs) > 2 else np.float32(0)
        factor, term = factor_and_term(norm, bias)
        merged = (weight * factor.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.float32)
        conv.inputs = [
            conv.inputs[0],
            gs.Constant(f"{conv.name}/weights", merged),
            gs.Constant(f"{conv.name}/bias", term.astype(np.float32)),
        ]
        conv.outputs = [norm.outputs[0]]
        norm.outputs.clear()


def factor_and_term(norm, bias=0):
    """What a BatchNormalization with constant parameters multiplies each channel by, and what it adds then to a value that lacks `bias`:
    float64 [C] each."""
    gamma, beta, mean, variance = (tensor.values.astype(np.float64) for tensor in norm.inputs[1:])
    factor = gamma / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    return factor, (bias - mean) * factor + beta


def plain_upsampling(graph):
    """Nearest-neighbour upsampling by whole numbers in its plainest form, of the same values.

    tf2onnx writes it with `tf_half_pixel_for_nn`, which ONNX has given up: runtimes warn of it.
    """
    for node in graph.nodes:
        attrs = node.attrs
        if node.op == "Resize" and attrs.get("coordinate_transformation_mode") == "tf_half_pixel_for_nn":
            scales = node.inputs[2]
            whole = isinstance(scales, gs.Constant) and scales.values.size and np.all(scales.values % 1 == 0)
            if whole and (attrs.get("mode"), attrs.get("nearest_mode")) == ("nearest", "floor"):
                attrs["coordinate_transformation_mode"] = "asymmetric"


def name_by_place(graph):
    """Orders a graph's nodes, and names nodes and tensors, by their place in it alone: the same network, the same file.

    tf2onnx numbers on from conversion to conversion, and its order follows addresses in memory, others in every process.
    TensorFlow's names stay, but for those numbers; inputs keep theirs. Of equal nodes, tfod.graph.merge_equals has left one.
    """
    used = {tensor.name for tensor in graph.inputs}

    def unused(name):
        name, number, found = COUNTER.sub("", name), 1, ""
        while not found or found in used:
            found, number = name if number == 1 else f"{name}_{number}", number + 1
        used.add(found)
        return found

    graph.nodes = ordered_nodes(graph)
    named = {id(tensor) for tensor in graph.inputs}
    for node in graph.nodes:
        node.name = unused(node.name)
        tensors = [(tensor, f"{node.name}/input_{i}") for i, tensor in enumerate(node.inputs)]
        tensors += [(tensor, f"{node.name}:{i}") for i, tensor in enumerate(node.outputs)]
        for tensor, name in tensors:
            if id(tensor) not in named and not tensor.is_empty():
                named.add(id(tensor))
                tensor.name = unused(name)


def ordered_nodes(graph):
    """The nodes that the graph's outputs are computed by, each behind those of its inputs, in the order of the inputs."""
    ordered, entered = [], set()
    todo = [(tensor.inputs[0], False) for tensor in reversed(graph.outputs) if tensor.inputs]
    while todo:
        node, left = todo.pop()
        if left:
            ordered.append(node)
        elif id(node) not in entered:
            entered.add(id(node))
            todo.append((node, True))
            todo += [(tensor.inputs[0], False) for tensor in reversed(node.inputs) if tensor.inputs]
    return ordered


def replace_tensor(graph, old, new):
    """Whatever reads `old` reads `new` instead, the graph's outputs too."""
    for consumer in list(old.outputs):
        consumer.inputs = [new if tensor is old else tensor for tensor in consumer.inputs]
    graph.outputs = [new if tensor is old else tensor for tensor in graph.outputs]
    old.inputs.clear()


def replace_outputs(graph, node, results):
    """Whatever reads an output of a node reads the result in its place instead, of the same shape; the node gives nothing more."""
    for old, new in zip(list(node.outputs), results, strict=True):
        new.shape = old.shape
        replace_tensor(graph, old, new)
    node.outputs.clear()
