"""The graph that TensorRT gets: suppression of many classes side by side, crops pooled before they are put in order.

Shapes: B batch, K boxes, C classes, G groups of S classes, M detections kept. Boxes are [ymin, xmin, ymax, xmax].
"""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utils import TENSORRT_MAX_TOP_K, OpBuilder, efficient_nms, nms_of_each_class, replace_tensor
from runtimes.precision import typed_graph

# EfficientNMS_TRT takes so many images (tests/test_gpu.py) and fails at 2,880, both measured with TensorRT 8.6.
PLUGIN_MAX_IMAGES = 960


def prepare(model, most):
    """Returns a copy of a converted model for TensorRT and batches of up to `most`: the same results.

    EfficientNMS_TRT walks the boxes of an image one after the other, and the images side by side. Classes do not suppress
    one another: as many groups of them as it can take are given to it as images of their own.
    """
    graph = typed_graph(model)
    together = max(1, PLUGIN_MAX_IMAGES // most)  # images that each of the batch may become
    for number, node in enumerate([node for node in graph.nodes if node.op == "EfficientNMS_TRT"]):
        ops, (_, count, classes) = OpBuilder(graph, f"suppression_{number}"), node.inputs[1].shape
        size = -(-classes // together)
        if images_of_classes(node) > together:
            _in_parts(ops, node, together)
        elif size < classes:
            results = _in_groups(ops, node, count, classes, size)
            for old, new in zip(list(node.outputs), results, strict=True):
                new.shape = old.shape
                replace_tensor(graph, old, new)
            node.outputs.clear()
    _shorten_top_ks(graph)
    _drop_idle_pools(graph)
    _pool_crops_first(graph)
    result = gs.export_onnx(graph.cleanup().toposort())
    result.metadata_props.extend(model.metadata_props)
    return result


def _in_groups(ops, node, count, classes, size):
    """The plugin's outputs, computed for groups of `size` classes: num_detections, boxes, scores, classes."""
    boxes, scores = node.inputs
    groups = -(-classes // size)
    missing = groups * size - classes
    if missing:  # classes that are never found
        scores = ops.add("Pad", scores, np.int64([0, 0, 0, 0, 0, missing]), np.float32(0))
    scores = ops.add("Transpose", ops.reshape(scores, [0, count, groups, size]), perm=[0, 2, 1, 3])
    scores = ops.reshape(scores, [-1, count, size])
    if len(boxes.shape) == 4:
        if missing:
            boxes = ops.add("Pad", boxes, np.int64([0, 0, 0, 0, 0, 0, missing, 0]), np.float32(0))
        boxes = ops.add("Transpose", ops.reshape(boxes, [0, count, groups, size * 4]), perm=[0, 2, 1, 3])
        boxes = ops.reshape(boxes, [-1, count, size, 4])
        boxes.shape = [None, count, size, 4]
    else:
        boxes = ops.add("Expand", ops.add("Unsqueeze", boxes, np.int64([1])), np.int64([1, groups, 1, 1]))
        boxes = ops.reshape(boxes, [-1, count, 4])
        boxes.shape = [None, count, 4]
    scores.shape = [None, count, size]
    kept = node.attrs["max_output_boxes"]
    # No group gives more than it has; all together they must have `kept` slots.
    each = min(kept, count * size) if groups * count * size >= kept else kept
    limits = {name: node.attrs[name] for name in ("score_threshold", "iou_threshold")}
    _, boxes, scores, labels = efficient_nms(ops, boxes, scores, max_output_boxes=each, **limits)
    first = np.repeat(np.arange(groups, dtype=np.int32) * size, each)[None]  # class of each slot's group [1, G * slots]
    labels = ops.add("Add", ops.reshape(labels, [-1, groups * each]), first)
    scores, rows = ops.top_k(ops.reshape(scores, [-1, groups * each]), kept)
    boxes = ops.gather_rows(ops.reshape(boxes, [-1, groups * each, 4]), rows)
    found = ops.add("Greater", scores, np.float32(0), dtype=bool)
    labels = ops.add("Where", found, ops.gather_rows(labels, rows), np.int32(0), dtype=np.int32)
    number = ops.add("ReduceSum", ops.cast(found, np.int32), np.int64([1]), keepdims=1)
    return number, boxes, scores, labels


def images_of_classes(node):
    """How many images nms_of_each_class makes of each for the plugin `node`; 1 where it is not of that."""
    scores = node.inputs[1]
    before = scores.inputs[0].inputs[0].shape if scores.inputs and scores.inputs[0].op == "Reshape" else None
    return before[1] if before and len(before) == 3 and scores.shape[1:] == [before[2], 1] else 1


def _in_parts(ops, node, together):
    """Gives the images that nms_of_each_class makes of classes to several plugins, `together` of a batch's image to each."""
    boxes, scores = (tensor.inputs[0].inputs[0] for tensor in node.inputs)
    (_, classes, count), limit = scores.shape, node.attrs["max_output_boxes"]
    limits = {name: node.attrs[name] for name in ("score_threshold", "iou_threshold")}
    parts = []
    for first in range(0, classes, together):
        last = min(first + together, classes)
        part = (ops.slice(x, 1, first, last) for x in (boxes, scores))
        parts.append(nms_of_each_class(ops, *part, (last - first, count), limit=limit, **limits))
    for old, new in zip(node.outputs[1:3], zip(*parts, strict=True), strict=True):
        (reshape,) = old.outputs
        replace_tensor(ops.graph, reshape.outputs[0], ops.add("Concat", *new, axis=1))
        reshape.inputs.clear()
    node.outputs.clear()


def _shorten_top_ks(graph):
    """TopKs of more than TensorRT takes: what they leave out has the value 0, by which nms knows that nothing is there."""
    for node in [node for node in graph.nodes if node.op == "TopK"]:
        missing = int(node.inputs[1].values[0]) - TENSORRT_MAX_TOP_K
        if missing > 0:
            ops = OpBuilder(graph, f"{node.name}/shortened")
            values, rows = node.outputs
            best, places = ops.top_k(node.inputs[0], TENSORRT_MAX_TOP_K)
            padding = np.zeros(2 * len(values.shape or [0, 0]), np.int64)
            padding[-1] = missing
            places = ops.cast(ops.add("Pad", ops.cast(places, np.float32), padding, np.float32(0)), np.int64)
            replace_tensor(graph, values, ops.add("Pad", best, padding, np.float32(0)))
            replace_tensor(graph, rows, places)
            node.outputs.clear()


def _drop_idle_pools(graph):
    """Max-pools of single pixels, which TFOD puts behind a crop where maxpool_kernel_size is 1, copy it."""
    for node in [node for node in graph.nodes if node.op == "MaxPool" and _unpadded(node)]:
        if {*node.attrs["kernel_shape"], *node.attrs.get("strides", [1])} == {1}:
            _take_place(graph, node.outputs[0], node.inputs[0])


def _take_place(graph, old, new):
    """Whatever reads `old` reads `new` instead, under its name: a calibration's ranges go by names."""
    replace_tensor(graph, old, new)
    old.name, new.name = f"{old.name}/replaced", old.name


def _pool_crops_first(graph):
    """Max-pools crops where GridSample leaves them, below one another, before the transposition that makes each a map of
    its own; and samples only what the pools and the strided convolutions of single pixels behind them (ResNet V1's) read.
    Only where no pool reaches from one crop into the next.
    """
    for node in [node for node in graph.nodes if node.op == "GridSample"]:
        # See faster_rcnn.crop_features: [B, count, size, size, 2] -> [B, C, count * size, size]
        # -> [B * count, C, size, size].
        chain = [node]
        for op in ("Reshape", "Transpose", "Reshape", "MaxPool"):
            (following, *others) = chain[-1].outputs[0].outputs
            if others or following.op != op:
                break
            chain.append(following)
        if len(chain) < 5:
            continue
        _, below, transposed, apart, pool = chain
        _, channels, count, size, _ = below.inputs[1].values.tolist()
        window, strides = pool.attrs["kernel_shape"], pool.attrs.get("strides", [1, 1])
        if window != strides or window[0] != window[1] or size % window[0] or not _unpadded(pool):
            continue
        ops = OpBuilder(graph, f"{pool.name}/first")
        pooled = np.arange(size // window[0])
        if stride := _common_stride(pool.outputs[0].outputs):
            pooled = pooled[::stride]
            samples = (pooled[:, None] * window[0] + np.arange(window[0])).ravel()  # that the pooled are made of
            grid = ops.reshape(node.inputs[1], [0, count, size, size, 2])
            grid = ops.add("Gather", ops.add("Gather", grid, samples, axis=2), samples, axis=3)
            node.inputs[1] = ops.reshape(grid, [0, count * len(samples), len(samples), 2])
            node.outputs[0].shape = [None, channels, count * len(samples), len(samples)]
            for convolution in pool.outputs[0].outputs:
                convolution.attrs["strides"] = [1, 1]
        size = len(pooled)
        crops = ops.add("MaxPool", node.outputs[0], **pool.attrs)
        crops = ops.reshape(crops, [0, channels, count, size, size])
        crops = ops.add("Transpose", crops, **transposed.attrs)
        crops = ops.reshape(crops, [*apart.inputs[1].values[:2].tolist(), size, size])
        _take_place(graph, pool.outputs[0], crops)


def _unpadded(node):
    return not any(node.attrs.get("pads", [])) and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _common_stride(nodes):
    """The stride of `nodes`, where all are convolutions of single pixels with the same; else None."""
    strides = {
        tuple(node.attrs.get("strides", [1, 1]))
        if node.op == "Conv" and node.attrs["kernel_shape"] == [1, 1] and _unpadded(node)
        else None
        for node in nodes
    }
    first = strides.pop() if len(strides) == 1 else None
    return first[0] if first and first[0] == first[1] > 1 else None
