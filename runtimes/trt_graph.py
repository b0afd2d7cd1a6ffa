"""The graph that TensorRT gets: suppression of many classes side by side, maps, logits and crops as TensorRT takes them fast.

Shapes: B batch, K boxes, C classes, G groups of S classes, M detections kept. Boxes are [ymin, xmin, ymax, xmax].
"""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utils import TENSORRT_MAX_TOP_K, OpBuilder, efficient_nms, nms_of_each_class, replace_outputs, replace_tensor
from runtimes import trt_crops, trt_levels, trt_logits
from runtimes.precision import export, typed_graph

# EfficientNMS_TRT takes so many images (tests/test_gpu.py) and fails at 2,880, both measured with TensorRT 8.6.
PLUGIN_MAX_IMAGES = 960
# Of an average over a whole map that becomes a pool.
LARGEST_WINDOW = 32


def prepare(model, most, few_images=False):
    """Returns a copy of a converted model for TensorRT and batches of up to `most`: the same results. few_images: it is for few at
    a time, of which small maps do not fill a GPU, so that they are laid side by side (trt_levels).

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
            replace_outputs(graph, node, _in_groups(ops, node, count, classes, size))
    _turn_at_once(graph)
    _shorten_top_ks(graph)
    _split_top_ks(graph)
    _average_as_it_lies(graph)
    _upsample_at_once(graph)
    trt_logits.choose_as_they_lie(graph, trt_levels.lay_side_by_side(graph) if few_images else {})
    trt_crops.drop_idle_pools(graph)
    trt_crops.pool_first(graph)
    return export(graph, model)


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


def top_ks(graph):
    """The TopKs of OpBuilder.top_k: the largest along the last axis. A network may have others."""
    return [
        node
        for node in graph.nodes
        if node.op == "TopK"
        and node.attrs.get("axis", -1) == -1
        and node.attrs.get("largest", 1)
        and isinstance(node.inputs[1], gs.Constant)
    ]


def _shorten_top_ks(graph):
    """TopKs of more than TensorRT takes: what they leave out has the value 0, by which nms knows that nothing is there."""
    for node in top_ks(graph):
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


def _split_top_ks(graph):
    """TopKs that look at less than half as many values one after the other in two steps: the best of each part, side by side,
    and the best of these. The same, in the same order. So it is for the 51,150 anchors of an SSD ResNet50, for a second stage's pairs
    of box and class, and for the places and pairs of a CenterNet.
    """
    for node in top_ks(graph):
        shape, count = node.inputs[0].shape or [], int(node.inputs[1].values[0])
        if len(shape) != 2 or not isinstance(shape[1], int):
            continue
        divisors = [parts for parts in range(1, shape[1] // count + 1) if shape[1] % parts == 0]
        parts = min(divisors, key=lambda parts: shape[1] // parts + parts * count, default=1)
        size = shape[1] // parts
        if size + parts * count > shape[1] / 2:  # its time goes by the values of a row, step by step
            continue
        ops = OpBuilder(graph, f"{node.name}/split")
        best, places = ops.top_k(ops.reshape(node.inputs[0], [0, parts, size]), count)
        places = ops.add("Add", places, np.arange(parts, dtype=np.int64)[None, :, None] * size)
        best, order = ops.top_k(ops.reshape(best, [0, parts * count]), count)
        rows = ops.reshape(ops.gather_rows(ops.reshape(places, [0, parts * count]), order), [0, count])
        replace_outputs(graph, node, (best, rows))


def _turn_at_once(graph):
    """Images [B, H, W, 3] are turned to [B, 3, H, W] behind a Gather of all channels, which changes nothing but that TensorRT 8.6
    compiles it, the turn and the scaling behind them to one kernel: 0.04 ms less of FPNLite at batch 32 (BENCHMARKS.md).
    """
    for node in [node for node in graph.nodes if node.op == "Transpose" and node.attrs.get("perm") == [0, 3, 1, 2]]:
        (images,) = node.inputs
        cast = images.inputs and images.inputs[0].op == "Cast"  # of bytes
        if any((images.inputs[0].inputs[0] if cast else images) is x for x in graph.inputs):
            ops = OpBuilder(graph, f"{node.name}/turned")
            channels = ops.add("Gather", images, np.arange(images.shape[3]), axis=3)
            channels.shape = images.shape
            node.inputs[0] = channels


def _average_as_it_lies(graph):
    """Global averages of small maps, as a second stage has them, as pools of a known window: those TensorRT takes in any layout,
    others it copies into rows first. It refuses windows of 100,000 pixels, which EfficientDet's maps have.
    """
    for node in [node for node in graph.nodes if node.op == "GlobalAveragePool"]:
        window = list(node.inputs[0].shape or [])[2:]
        if window and all(isinstance(size, int) and size <= LARGEST_WINDOW for size in window):
            node.op, node.attrs["kernel_shape"] = "AveragePool", window


def _upsample_at_once(graph):
    """Nearest-neighbour upsampling of an FPN as two Gathers. TFOD puts it together of Concats and Reshapes (ops.nearest_neighbor_upsampling),
    for which TensorRT 8.6 copies a map four times. A Resize it computes in FP32, with copies before and behind it; Gathers in FP16, in
    one kernel with the Add behind them (BENCHMARKS.md, "Kernel by kernel"). Resizes that a model has itself are left: not measured.
    """
    for node in [node for node in graph.nodes if node.op == "Unsqueeze"]:
        source = node.inputs[0]
        if len(source.shape or []) != 4 or not all(isinstance(size, int) for size in source.shape[1:]):
            continue
        values = np.arange(np.prod(source.shape[1:]), dtype=np.int32).reshape(1, *source.shape[1:])
        for tensor, moved in _moves(node, values):
            if factors := _upsampled(values, moved):
                ops = OpBuilder(graph, f"{node.name}/upsampled")
                rows, columns = (
                    np.arange(n).repeat(factor) for n, factor in zip(source.shape[2:], factors, strict=True)
                )
                larger = ops.add("Gather", ops.add("Gather", source, rows, axis=2), columns, axis=3)
                larger.shape = tensor.shape
                trt_crops.take_place(graph, tensor, larger)
                break


def _moves(node, values):
    """(tensor, what it holds) of `node` and those behind it, each read by the next alone, that repeat the values of one image and put
    them in other places; values: what the first reads."""
    while True:
        constant = node.inputs[-1].values.ravel().tolist() if isinstance(node.inputs[-1], gs.Constant) else []
        if node.op == "Concat" and node.attrs["axis"] and all(tensor is node.inputs[0] for tensor in node.inputs):
            values = np.concatenate([values] * len(node.inputs), axis=node.attrs["axis"])
        elif node.op == "Transpose":
            values = values.transpose(node.attrs["perm"])
        elif node.op == "Unsqueeze" and constant:
            values = np.expand_dims(values, tuple(constant))
        elif node.op == "Reshape" and constant[:1] in ([0], [-1]) and np.prod(constant[1:]) == values.size:
            values = values.reshape(1, *constant[1:])
        else:
            return
        yield node.outputs[0], values
        readers = node.outputs[0].outputs
        if not readers or any(reader is not readers[0] for reader in readers):
            return
        node = readers[0]


def _upsampled(values, moved):
    """How many times as high and as wide an image [1, C, H, W] has become by repeating its values; None where it is anything else."""
    if moved.ndim != 4 or moved.size == values.size:
        return None
    _, channels, height, width = values.shape
    factors = moved.shape[2] // height, moved.shape[3] // width
    if moved.shape != (1, channels, height * factors[0], width * factors[1]):
        return None
    return factors if np.array_equal(moved, values.repeat(factors[0], axis=2).repeat(factors[1], axis=3)) else None
