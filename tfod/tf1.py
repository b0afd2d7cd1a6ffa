"""Exports of TF1 (TFOD's exporter.py, 2017 to 2021): what differs in them from TF2's.

Weights are constants, loops are v1 control flow (Enter, Merge, Switch, TensorArrayV3), colours may be normalised behind the
loop that resizes. Exports of 2018 give no raw_detection_boxes and no raw_detection_scores, and clip boxes to the window
before they suppress, not after. B images, N anchors, P proposals, C classes.
"""

from commandline import UserError

import numpy as np
from google.protobuf.message import DecodeError

from tfod.boxes import clip_boxes
from tfod.graph import SHAPE_ONLY, before_reshaping
from tfod.tensorflow_import import first_line, import_tensorflow

FROZEN_GRAPH = "frozen_inference_graph.pb"
# What a frozen graph may take in: the names that TFOD's exporter.py gives, of its --input_type.
INPUTS = ("image_tensor", "encoded_image_string_tensor", "tf_example")
# The graphs of export_tflite_ssd_graph.py have this node in place of a post-processing.
TFLITE_NODE = "TFLite_Detection_PostProcess"

STACK = "TensorArrayGatherV3"
RESIZES = {"ResizeBilinear", "ResizeBicubic", "ResizeNearestNeighbor", "ResizeArea"}
CONVOLUTIONS = {"Conv2D", "DepthwiseConv2dNative"}
ARITHMETIC = {"Add", "AddV2", "Sub", "Mul", "RealDiv"}
CLIPPING = {"Minimum", "Maximum"}
# Ops that hand values on, some of them clipped or some of them left out: {op: which input has them}.
FIRST = "Gather GatherV2 ConcatV2 Unpack SplitV Slice StridedSlice Minimum Maximum Identity Enter Reshape Squeeze ExpandDims"
HANDED_ON = dict.fromkeys(FIRST.split(), 0)
HANDED_ON |= {"Split": 1, "TensorArrayReadV3": 2, "TensorArrayScatterV3": 2}


def read_frozen_graph(path, outputs):
    """Imports a frozen graph into TensorFlow's default graph.

    outputs: names that it may give. Returns (names of its input tensors, {output: tensor name}). Raises UserError for a
    file that is no frozen graph of a TFOD detector.
    """
    tf = import_tensorflow()
    graph_def = tf.compat.v1.GraphDef()
    try:
        graph_def.ParseFromString(path.read_bytes())
        if not graph_def.node:
            raise ValueError("it has no nodes")
        tf.import_graph_def(graph_def, name="")
    except (DecodeError, ValueError, tf.errors.OpError) as error:
        raise UserError(
            f"--saved_model {path}: not a frozen graph ({first_line(error)[:200]}); give the {FROZEN_GRAPH} of the export"
        ) from error
    names = {node.name for node in graph_def.node}
    if TFLITE_NODE in names:
        raise UserError(
            f"--saved_model {path}: a graph for TensorFlow Lite (it ends in {TFLITE_NODE}); give the {FROZEN_GRAPH}"
            " that export_inference_graph.py wrote"
        )
    inputs = [f"{name}:0" for name in INPUTS if name in names]
    if not inputs:
        raise UserError(
            f"--saved_model {path}: it has no input {INPUTS[0]}; give the {FROZEN_GRAPH} that export_inference_graph.py wrote"
        )
    return inputs, {name: f"{name}:0" for name in outputs if name in names}


def find_image_stacks(frozen, scores):
    """The stacks of images that were resized one by one in a loop, among what `scores` come from: usually one tensor name."""

    def is_resized(name):
        ops = set(frozen.ancestors(name).values())
        return bool(ops & RESIZES) and not ops & CONVOLUTIONS

    return [name for name, op in frozen.ancestors(scores).items() if op == STACK and is_resized(name)]


def behind_colours(frozen, images):
    """The tensor behind the arithmetic with constants that normalises the colours of `images`, where there is any."""
    while True:
        readers = [name for name in frozen.consumers(images) if frozen.op(name) not in SHAPE_ONLY]
        if len(readers) != 1 or frozen.op(readers[0]) not in ARITHMETIC:
            return images
        if not any(frozen.constant(source) is not None for source in frozen.inputs(readers[0])):
            return images
        images = readers[0]


def find_raw_outputs(frozen):
    """Where an export of 2018 has what later ones give: {"raw_detection_boxes": tensor [B, N, 1 or C, 4], not clipped,
    "raw_detection_scores": tensor [B, N, C], with the background where there is one}.

    Found from the per-class NMS back, along the values alone, to what enters its loop over the images.
    """
    nearest = (name for name, op in frozen.ancestors("tfod_output/detection_boxes").items() if "NonMaxSup" in op)
    nms = next(nearest, None)
    if nms is None:
        raise UserError(
            "the graph has no raw_detection_boxes and no NonMaxSuppression; is it a TFOD SSD or Faster R-CNN?"
        )
    boxes, scores = (_entering(frozen, source) for source in frozen.inputs(nms)[:2])
    source = before_reshaping(frozen, scores)
    if frozen.op(source) in ("Slice", "StridedSlice"):  # the background left out
        scores = frozen.inputs(source)[0]
    return {"raw_detection_boxes": boxes, "raw_detection_scores": scores}


def _entering(frozen, tensor):
    """Walks back from an NMS's boxes or scores to the tensor that holds them for all images."""
    while (op := frozen.op(tensor)) in HANDED_ON:
        tensor = frozen.inputs(tensor)[HANDED_ON[op]]
        if op == "TensorArrayScatterV3":
            break
    return tensor


def clips_first(frozen, encodings, nms_nodes):
    """Whether boxes decoded from the tensor `encodings` are clipped before the NMS nodes suppress them.

    So did TFOD until 2018 (post_processing.multiclass_non_max_suppression): overlaps were those of what the window shows.
    """
    decoded = frozen.descendants([encodings])
    return any(
        op in CLIPPING and name in decoded
        for node in list(nms_nodes)[:1]
        for name, op in frozen.ancestors(frozen.inputs(node)[0]).items()
    )


def clip_candidates(ops, boxes, scores, window):
    """What those exports do before suppression: clip boxes to the window (see boxes), drop those that have no area then.

    boxes [B, N, 4] or [B, N, C, 4] with their shape known but for B, scores [B, N, C]. Returns both; dropped ones score 0.
    """
    shape = list(boxes.shape)
    flat = clip_boxes(ops, ops.reshape(boxes, [0, -1, 4]), window)  # [B, N * C, 4]
    size = ops.add("Sub", ops.slice(flat, 2, 2, 4), ops.slice(flat, 2, 0, 2))
    solid = ops.add("Greater", ops.add("ReduceProd", size, axes=[2], keepdims=0), np.float32(0), dtype=bool)
    solid = ops.reshape(solid, [0, shape[1], -1])  # [B, N, 1 or C]
    clipped = ops.reshape(flat, [0, *shape[1:]])
    clipped.shape = shape
    kept = ops.add("Where", solid, scores, np.float32(0), dtype=np.float32)
    kept.shape = scores.shape
    return clipped, kept
