"""A converted model in standard ops, for every runtime but TensorRT: EfficientNMS_TRT by ONNX's own, crops by RoiAlign.

Shapes: B batch, N boxes, C classes or channels, M detections kept. Boxes are [ymin, xmin, ymax, xmax].
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_utils import PLUGIN_DOMAIN, OpBuilder, read_metadata, replace_tensor, write_metadata


def is_half_quantized(model):
    """Whether the model has QuantizeLinear nodes in FP16 (precision.to_half)."""
    quantized = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    half = onnx.TensorProto.FLOAT16
    return any(tensor.name in quantized and tensor.data_type == half for tensor in model.graph.initializer)


def standard_file(model):
    """Returns a converted model in standard ops as a file of its own (create_onnx.py --ops standard): metadata included."""
    result = prepare(model)
    result.producer_name = model.producer_name
    write_metadata(result, {**read_metadata(model, "the model"), "ops": "standard"})
    return result


def prepare(model, pairs=None):
    """Returns a copy of a converted model in standard ops: the same inputs, outputs and results, without metadata.

    pairs: of box and class, the best of each image, that suppression looks at; None: all. PLUGIN_MAX_PAIRS: what TensorRT
    finds.
    """
    graph = gs.import_onnx(model)
    _replace_plugins(graph, pairs)
    _replace_crops(graph)
    graph.cleanup().toposort()
    graph.import_domains = [domain for domain in graph.import_domains or [] if domain.domain != PLUGIN_DOMAIN]
    return gs.export_onnx(graph)


def _replace_plugins(graph, pairs):
    """Every EfficientNMS_TRT node in standard ops, with the plugin's semantics; pairs: see prepare."""
    for number, node in enumerate([n for n in graph.nodes if n.op == "EfficientNMS_TRT"]):
        results = _standard_nms(OpBuilder(graph, f"nms_{number}"), node, pairs)
        for old, new in zip(list(node.outputs), results, strict=True):
            new.shape = old.shape
            _take_place(graph, old, new)
        node.outputs.clear()


def _replace_crops(graph):
    """Every crop of features (faster_rcnn.crop_features) by RoiAlign instead of GridSample.

    TensorRT has GridSample built in, RoiAlign only in a library that its Python wheels leave out. ONNX Runtime's RoiAlign
    writes the crops in their order, GridSample leaves a transposition of them all: 0.10 s against 0.6 s for 300 crops of
    14x14x1024 on 2 cores.
    """
    for number, node in enumerate([n for n in graph.nodes if n.op == "GridSample"]):
        (reshape,) = node.outputs[0].outputs
        if reshape.op != "Reshape":  # trt_crops.py pools first
            continue
        (transpose,) = reshape.outputs[0].outputs
        (crops,) = transpose.outputs[0].outputs  # the Reshape to [B * count, C, size, size]
        count, size = reshape.inputs[1].values[2:4]
        result = _roi_align(OpBuilder(graph, f"crop_{number}"), node, int(count), int(size))
        _take_place(graph, crops.outputs[0], result)


def _take_place(graph, old, new):
    """Whatever reads `old` reads `new` instead, under its name, which --debug may have made an output's."""
    replace_tensor(graph, old, new)
    old.name, new.name = f"{old.name}/replaced", old.name


def _roi_align(ops, node, count, size):
    """GridSample of `count` regular grids of size x size an image -> RoiAlign: [B * count, C, size, size].

    A sample in the middle of each of RoiAlign's bins lies at start + (i + 0.5) bin - 0.5 pixels (ONNX, half_pixel).
    """
    features, grid = node.inputs
    grid = ops.reshape(grid, [-1, size, size, 2])  # [B * count, y, x, (x, y)], -1..1
    pixels = ops.slice(ops.add("Shape", features, dtype=np.int64), 0, 2, 4)  # H, W
    last = ops.cast(ops.add("Sub", pixels, np.int64([1])), np.float32)
    last = ops.add("Gather", last, np.int64([1, 0]), axis=0)  # W - 1, H - 1

    def sample(i):  # the place in pixels, x and y, of the i-th sample in both directions [B * count, 2]
        place = ops.slice(ops.slice(grid, 1, i, i + 1), 2, i, i + 1)
        place = ops.reshape(place, [-1, 2])
        return ops.add("Mul", ops.add("Add", place, np.float32(1)), ops.add("Mul", last, np.float32(0.5)))

    first = sample(0)
    # Not the last sample, which may be marked as outside by a value that is no place.
    step = ops.add("Div", ops.add("Sub", sample(size - 2), first), np.float32(size - 2))
    start = ops.add("Add", ops.add("Sub", first, ops.add("Mul", step, np.float32(0.5))), np.float32(0.5))
    rois = ops.add("Concat", start, ops.add("Add", start, ops.add("Mul", step, np.float32(size))), axis=1)
    crops = ops.add(
        "RoiAlign",
        features,
        rois,
        _image_of_each(ops, features, count),
        mode="avg",
        sampling_ratio=1,
        output_height=size,
        output_width=size,
        coordinate_transformation_mode="half_pixel",
    )
    if node.attrs["padding_mode"] != "zeros":
        return crops
    # crop_features marks what lies outside with 3; what rounds to 1.0000001 is the last pixel.
    inside = ops.add("Less", ops.add("ReduceMax", grid, axes=[3], keepdims=0), np.float32(2), dtype=bool)
    inside = ops.add("Unsqueeze", ops.cast(inside, np.float32), np.int64([1]))
    return ops.add("Mul", crops, inside)  # faster there than Where


def _image_of_each(ops, features, count):
    """The number of the image that each of `count` crops an image belongs to: [B * count] int64."""
    images = ops.add("Squeeze", ops.slice(ops.add("Shape", features, dtype=np.int64), 0, 0, 1), np.int64([0]))
    numbers = ops.add("Range", np.int64(0), images, np.int64(1), dtype=np.int64)
    numbers = ops.add("Unsqueeze", numbers, np.int64([1]))
    return ops.reshape(ops.add("Expand", numbers, np.int64([1, count])), [-1])


def _standard_nms(ops, node, pairs):
    """EfficientNMS_TRT in standard ops: for any batch, boxes shared by the classes or one per class."""
    boxes, scores = node.inputs  # [B, N, 4] or [B, N, C, 4]; [B, N, C]
    kept, threshold = int(node.attrs["max_output_boxes"]), np.float32(node.attrs["score_threshold"])
    scores = ops.add("Transpose", scores, perm=[0, 2, 1])  # [B, C, N]
    shape = ops.add("Shape", scores, dtype=np.int64)
    flat = ops.reshape(scores, [0, -1])
    if pairs:
        flat = _best_pairs(ops, flat, pairs)
        scores = ops.add("Reshape", flat, shape)

    # ONNX suppresses at IoU > threshold and keeps score > threshold, the plugin at >= both: one step of float32 apart.
    limits = (
        np.array([kept], np.int64),
        np.nextafter(np.float32([node.attrs["iou_threshold"]]), np.float32(0)),
        np.nextafter(np.float32([threshold]), np.float32(-1)),
    )
    per_class = len(boxes.shape) == 4
    if per_class:
        boxes = ops.add("Transpose", boxes, perm=[0, 2, 1, 3])  # [B, C, N, 4]
        columns = ops.slice(shape, 0, 2, 3)
        as_batch = ops.add("Concat", np.array([-1], np.int64), columns, np.array([4], np.int64), axis=0)
        boxes = ops.add("Reshape", boxes, as_batch)  # [B * C, N, 4]
        shape = ops.add("Concat", np.array([-1, 1], np.int64), columns, axis=0)
        scores = ops.add("Reshape", scores, shape)  # [B * C, 1, N]
    picked = ops.add("NonMaxSuppression", boxes, scores, *limits, dtype=np.int64)  # [S, 3]: image, class, box

    nothing = ops.add("Sub", ops.add("Mul", scores, np.float32(0)), np.float32(1))
    picked_scores = ops.add("GatherND", scores, picked)
    survivors = ops.add("ScatterND", nothing, picked, picked_scores)  # -1 but at the survivors
    flat = ops.add("Reshape", survivors, ops.add("Shape", flat, dtype=np.int64))
    padding = np.array([0, 0, 0, kept], np.int64)  # so that there are `kept` columns to choose from
    best, index = ops.top_k(ops.add("Pad", flat, padding, np.float32(-1)), kept)  # [B, M]

    count = ops.slice(ops.add("Shape", node.inputs[0], dtype=np.int64), 0, 1, 2)  # N
    classes, rows = ops.add("Div", index, count), ops.add("Mod", index, count)
    valid = ops.add("GreaterOrEqual", best, threshold, dtype=bool)
    if per_class:
        last = ops.add("Sub", ops.slice(ops.add("Shape", node.inputs[0], dtype=np.int64), 0, 2, 3), np.int64([1]))
        classes = ops.add("Min", classes, last)
        pair = ops.add("Unsqueeze", rows, np.int64([2]))
        pair = ops.add("Concat", pair, ops.add("Unsqueeze", classes, np.int64([2])), axis=2)
        chosen = ops.add("GatherND", node.inputs[0], pair, batch_dims=1)
    else:
        chosen = ops.gather_rows(boxes, rows)
    chosen = ops.add("Where", ops.add("Unsqueeze", valid, np.int64([2])), chosen, np.float32(0), dtype=np.float32)
    number = ops.add("ReduceSum", ops.cast(valid, np.int32), np.int64([1]), keepdims=1)
    scores = ops.add("Where", valid, best, np.float32(0), dtype=np.float32)
    classes = ops.cast(ops.add("Where", valid, classes, np.int64(0), dtype=np.int64), np.int32)
    return number, chosen, scores, classes


def _best_pairs(ops, flat, pairs):
    """flat [B, C * N] with all but the best `pairs` scores of each image set to -1."""
    count = ops.slice(ops.add("Shape", flat, dtype=np.int64), 0, 1, 2)
    most = ops.add("Min", count, np.array([pairs], np.int64))
    best, _ = ops.add("TopK", flat, most, outputs=2, dtype=(np.float32, np.int64), axis=-1, sorted=1)
    least = ops.slice(best, 1, -1, np.iinfo(np.int64).max)  # [B, 1]
    return ops.add("Where", ops.add("GreaterOrEqual", flat, least, dtype=bool), flat, np.float32(-1), dtype=np.float32)
