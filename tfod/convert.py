"""A TFOD SavedModel and its config -> the ONNX model: the network through tf2onnx, what surrounds it written anew."""

import collections
import dataclasses
import sys
from pathlib import Path

from commandline import UserError
from commandline.version import VERSION

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import onnx_utils
from tfod import centernet, faster_rcnn, ssd
from tfod.config import describe_resizer, wrong_config
from tfod.fake_quant import drop_transposes, write_fake_quants
from tfod.graph import before_reshaping, detach_weights, merge_equals, node_name, tensor_name
from tfod.nms import find_nms_nodes
from tfod.preprocessing import Colours, add_inputs, check_colours, find_preprocessed_images, probe_preprocessing
from tfod.tensorflow_import import silenced
from tfod.weighted_sums import write_weighted_sums

# Field of the config's `model` message -> module, which has
#   recognise(frozen) -> bool: whether a FrozenGraph is of this kind;
#   find(frozen, images, config, resizer) -> Parts: `inputs` {name: (tensor, shape)} and `outputs` {name: tensor} of the
#       network, and what else add_detections needs of the graph;
#   describe(network, parts, config, options) -> dict: what the metadata says of this kind of model alone;
#   check_config(network, parts, config, folder): raises UserError where the config does not fit the network;
#   add_detections(network, parts, config, metadata, window) -> {output name: tensor}: the post-processing;
#   add_raw_detections(network, parts, config, metadata, window) -> (boxes, scores): what TensorFlow gives as
#       raw_detection_boxes and raw_detection_scores, all that post-processing chooses from; not of a CenterNet, which has none.
META_ARCHITECTURES = {"ssd": ssd, "faster_rcnn": faster_rcnn, "center_net": centernet}
RAW_OUTPUTS = ("raw_detection_boxes", "raw_detection_scores")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user chooses; create_onnx.py's options of these names."""

    batch_size: int | None = 1  # None: any number
    input_type: str = "float32"  # or uint8
    input_format: str = "NHWC"  # or NCHW
    first_nms_threshold: float | None = None  # None: the config's
    second_nms_threshold: float | None = None
    debug: tuple = ()  # names of tensors or nodes to be outputs too
    labels: list | None = None  # the classes' names, None where one has none
    keypoints: tuple | None = None  # the keypoints' names, where a model has those
    skeleton: tuple | None = None  # pairs of keypoints (from 0) to be joined by lines

    @property
    def by_config(self):
        """The same, with the config's own thresholds."""
        return dataclasses.replace(self, first_nms_threshold=None, second_nms_threshold=None)


@dataclasses.dataclass
class Network:
    """The network as a graphsurgeon graph; tensors by the names that a Parts gives them."""

    graph: gs.Graph
    inputs: dict  # {name: tensor}, the images NCHW
    outputs: dict  # {name: tensor}
    shapes: dict  # {name of output: shape for one image}

    def copy(self):
        """A Network whose graph may be changed."""
        graph = self.graph.copy()
        inputs, outputs = (
            dict(zip(self.inputs, graph.inputs, strict=True)),
            dict(zip(self.outputs, graph.outputs, strict=True)),
        )
        return Network(graph, inputs, outputs, self.shapes)


@dataclasses.dataclass(frozen=True)
class Model:
    """A SavedModel that was read and converted: files with any Options may be written of it."""

    kind: str  # of META_ARCHITECTURES
    config: object  # the config message of that kind
    folder: Path  # of the SavedModel
    resizer: dict  # of config.describe_resizer
    colours: Colours
    parts: object  # Parts of the meta-architecture
    network: Network
    class_limit: int | None  # of find_class_limit


def read_model(saved_model, model_config, image_size=None):
    """Converts an open SavedModel with its `model` config message; returns a Model for write_model.

    image_size: (height, width) of the images that a model without a fixed input size is for.

    Raises UserError where the SavedModel and the config do not belong together.
    """
    kind = next(name for name in META_ARCHITECTURES if model_config.HasField(name))
    architecture, config, folder = META_ARCHITECTURES[kind], getattr(model_config, kind), saved_model.folder
    resizer = describe_resizer(config.image_resizer, image_size)
    frozen = saved_model.freeze()
    if not architecture.recognise(frozen):
        found = [name for name, other in META_ARCHITECTURES.items() if other.recognise(frozen)]
        if not found and RAW_OUTPUTS[0] not in frozen.outputs:
            raise UserError(
                f"{folder} gives no {RAW_OUTPUTS[0]}, and is no CenterNet; export it with exporter_main_v2.py"
            )
        raise wrong_config(folder, f"it says {kind}, the model is {found[0] if found else 'something else'}")
    images = find_preprocessed_images(frozen)
    colours = probe_preprocessing(frozen, images, resizer)
    check_colours(config, colours.scale, folder)
    if colours.pad_value is not None:
        resizer["pad_value"] = colours.pad_value
    parts = architecture.find(frozen, images, config, resizer)
    network = convert_network(frozen, parts.inputs, parts.outputs)
    architecture.check_config(network, parts, config, folder)
    return Model(kind, config, folder, resizer, colours, parts, network, find_class_limit(frozen))


def find_class_limit(frozen):
    """How many detections of one class the graph's last suppression gives at most: its max_output_size (_per_class of the
    combined one). None where there is none, or the number is not plain: as a loop (use_static_shapes), say.
    """
    nodes = frozen.ancestors(frozen.outputs["detection_boxes"])
    found = {name for name, op in nodes.items() if op.startswith(("NonMaxSuppression", "CombinedNonMaxSuppression"))}
    if RAW_OUTPUTS[0] in frozen.outputs:
        found -= find_nms_nodes(frozen, frozen.outputs[RAW_OUTPUTS[0]])  # the proposals'
    limits = {_constant_limit(frozen, frozen.inputs(name)[2]) for name in found}
    return limits.pop() if len(limits) == 1 else None


def _constant_limit(frozen, tensor):
    """The number of a limit that is a constant, or the lesser of one and the number of boxes (TFOD); None else."""
    tensor = before_reshaping(frozen, tensor)
    if frozen.op(tensor) != "Minimum":
        value = frozen.constant(tensor)
        return None if value is None or value.size != 1 else int(value.item())
    limit, boxes = frozen.inputs(tensor)
    return _constant_limit(frozen, limit) if frozen.op(boxes) == "StridedSlice" else None


def other_class_limit(model):
    """(max_detections_per_class of the config, that of the graph) where they differ to any effect; None else."""
    if model.class_limit is None:
        return None
    two_stages = model.kind == "faster_rcnn"
    post = model.config.second_stage_post_processing if two_stages else model.config.post_processing
    nms = post.batch_non_max_suppression
    boxes = model.config.first_stage_max_proposals if two_stages else len(model.parts.anchors)
    most = min(nms.max_total_detections, boxes)
    ours, theirs = nms.max_detections_per_class, model.class_limit
    return None if nms.use_class_agnostic_nms or min(ours, most) == min(theirs, most) else (ours, theirs)


def write_model(model, options, raw=False):
    """Returns the ONNX model of a Model.

    raw: its outputs are raw_detection_boxes and raw_detection_scores, for a comparison with TensorFlow's.
    """
    architecture, network = META_ARCHITECTURES[model.kind], model.network.copy()
    metadata = describe(model, options) | architecture.describe(network, model.parts, model.config, options)
    make_batch_free(network.graph, {shape[0] for _, shape in model.parts.inputs.values()})
    window = add_inputs(network.graph, network.inputs["images"], model.colours, model.resizer, options)
    if raw:
        boxes, scores = architecture.add_raw_detections(network, model.parts, model.config, metadata, window)
        network.graph.outputs = [boxes, scores]
        boxes.name, scores.name = RAW_OUTPUTS
    else:
        detections = architecture.add_detections(network, model.parts, model.config, metadata, window)
        name_outputs(network.graph, detections, options.batch_size or "batch", metadata)
    network.graph.cleanup().toposort()
    if options.debug:
        add_debug_outputs(network.graph, options.debug)
    written = gs.export_onnx(network.graph)
    written.producer_name = "create_onnx.py"
    onnx_utils.write_metadata(written, metadata)
    return written


def describe(model, options):
    """Returns what the metadata says of every model, for those who run the file."""
    folder = model.folder
    return {
        "architecture": model.config.feature_extractor.type,
        "meta_architecture": model.kind,
        "version": VERSION,
        "ops": "tensorrt",  # of onnx_utils.OPS
        "source": folder.resolve().parent.name if folder.name == "saved_model" or folder.is_file() else folder.name,
        "num_classes": model.config.num_classes,
        "labels": options.labels,
        # detection_classes + class_offset = the id in the label map (TFOD counts from 1, EfficientNMS from 0).
        "class_offset": 1,
        "batch_size": options.batch_size,
        "input_format": options.input_format,
        "input_type": options.input_type,
        "resizer": model.resizer,
    }


def convert_network(frozen, inputs, outputs):
    """Converts a part of a FrozenGraph; returns a Network. inputs: {name: (tensor, shape)}; outputs: {name: tensor}.

    With fixed shapes all shape arithmetic folds away.
    """
    graph = import_network(frozen, inputs, outputs)
    graph.fold_constants(size_threshold=sys.maxsize).cleanup()
    drop_transposes(graph)
    onnx_utils.fold_batch_norms(graph)
    onnx_utils.plain_upsampling(graph)
    onnx_utils.name_by_place(graph.cleanup())
    shapes = {name: tensor.shape for name, tensor in zip(outputs, graph.outputs, strict=True)}
    return Network(
        graph, dict(zip(inputs, graph.inputs, strict=True)), dict(zip(outputs, graph.outputs, strict=True)), shapes
    )


def import_network(frozen, inputs, outputs, larger_than=4096):
    """What tf2onnx makes of a part of a FrozenGraph, as a graphsurgeon graph; arguments: see convert_network.

    Weights of more values than larger_than take no part in the conversion, whose every pass would copy them (SSD ResNet50: 44 s
    and 10 GB with, 6 s without): they are inputs to tf2onnx, and put back behind it, as TensorFlow has and names them.
    """
    import tf2onnx

    subgraph = frozen.extract(outputs.values(), dict(inputs.values()))
    write_fake_quants(frozen, subgraph)
    write_weighted_sums(frozen, subgraph)
    weights = detach_weights(subgraph, larger_than)
    merge_equals(subgraph, set(map(node_name, outputs.values())))
    images = [tensor_name(tensor) for tensor, _ in inputs.values()]
    with silenced():
        model, _ = tf2onnx.convert.from_graph_def(
            subgraph,
            input_names=[*images, *map(tensor_name, weights)],
            output_names=[tensor_name(tensor) for tensor in outputs.values()],
            opset=onnx_utils.OPSET,
            inputs_as_nchw=images,
        )
    graph = gs.import_onnx(model)
    by_name = {tensor.name: tensor for tensor in graph.inputs}
    for name, values in weights.items():
        if tensor := by_name.get(tensor_name(name)):
            onnx_utils.replace_tensor(graph, tensor, gs.Constant(name, values))
    graph.inputs = [by_name[name] for name in images]
    return graph


def make_batch_free(graph, counts):
    """Lets a graph that was converted for one image take any batch.

    Every Reshape to a shape that begins with one of the inputs' first dimensions (`counts`: 1 image, 300 crops) has the
    batch there, as has its input: 0 copies that dimension. Weights, where they are not folded, have no batch.
    """
    for node in graph.nodes:
        if node.op == "Reshape" and [isinstance(x, gs.Constant) for x in node.inputs] == [False, True]:
            shape = node.inputs[1].values
            if shape[0] in counts:
                free = np.concatenate([[0], shape[1:]]).astype(np.int64)
                node.inputs[1] = gs.Constant(f"{node.name}/any_batch", free)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable):
            tensor.shape = None  # they hold the 1; TensorRT and ONNX Runtime infer shapes themselves


def name_outputs(graph, detections, batch, metadata):
    """Makes `detections` {name: tensor} the graph's outputs, with their names and shapes."""
    kept, points = metadata["max_detections"], len(metadata.get("keypoints") or ())
    shapes = collections.defaultdict(
        lambda: [batch, kept],
        num_detections=[batch, 1],
        detection_boxes=[batch, kept, 4],
        detection_masks=[batch, kept, *(metadata["mask_size"] or ())],
        detection_keypoints=[batch, kept, points, 2],
        detection_keypoint_scores=[batch, kept, points],
    )
    graph.outputs = list(detections.values())
    for name, tensor in detections.items():
        tensor.name, tensor.shape = name, shapes[name]


def add_debug_outputs(graph, names):
    """Makes the tensors of these names (or the first outputs of the nodes of these names) outputs too."""
    inferred = gs.import_onnx(onnx.shape_inference.infer_shapes(gs.export_onnx(graph))).tensors()
    tensors, nodes = graph.tensors(), {node.name: node for node in graph.nodes}
    for name in names:
        tensor = nodes[name].outputs[0] if name in nodes else tensors.get(name)
        if not isinstance(tensor, gs.Variable) or inferred[tensor.name].shape is None:
            raise UserError(
                f"--debug {name}: no such tensor of known shape in the ONNX graph; --tf2onnx FILE shows the names"
            )
        tensor.dtype, tensor.shape = inferred[tensor.name].dtype, inferred[tensor.name].shape
        graph.outputs.append(tensor)
