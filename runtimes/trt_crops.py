"""Crops of features (faster_rcnn.crop_features) for TensorRT: pooled before they are put in order, as rows of channels.

Shapes: B images of features [B, C, H, W], `count` crops of size x size of each.
"""

import numpy as np

from onnx_utils import OpBuilder, replace_tensor
from runtimes.precision import REDUCTIONS_OPSET, export, typed_graph


def drop_idle_pools(graph):
    """Max-pools of single pixels, which TFOD puts behind a crop where maxpool_kernel_size is 1, copy it."""
    for node in [node for node in graph.nodes if node.op == "MaxPool" and _unpadded(node)]:
        if {*node.attrs["kernel_shape"], *node.attrs.get("strides", [1])} == {1}:
            take_place(graph, node.outputs[0], node.inputs[0])


def take_place(graph, old, new):
    """Whatever reads `old` reads `new` instead, under its name: a calibration's ranges go by names."""
    replace_tensor(graph, old, new)
    old.name, new.name = f"{old.name}/replaced", old.name


def pool_first(graph):
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
        take_place(graph, pool.outputs[0], crops)


def by_rows(model):
    """Returns (a model in its types in which crops are sums of gathered rows, the names of what finds the rows). One without
    crops is as it was.

    GridSample reads the features channel by channel, in float32 throughout where its places are to be exact, and leaves
    its crops below one another. A row holds a pixel's channels side by side: four of them, weighted, are a sample. What
    finds them stays in float32; the rows have the type of the features.
    """
    if all(node.op_type != "GridSample" for node in model.graph.node):
        return model, set()
    graph, names = typed_graph(model), set()
    for node in [node for node in graph.nodes if node.op == "GridSample"]:
        names |= _sample_rows(graph, node)
    return export(graph, model), names


def _sample_rows(graph, node):
    """Replaces a crop's nodes, from GridSample [B, C, count * size, size] to the crops [B * count, C, size, size] or, where
    they are pooled first, smaller ones. Returns the names of the nodes that find the rows."""
    (following,) = node.outputs[0].outputs
    pool = following if following.op == "MaxPool" else None
    (below,) = pool.outputs[0].outputs if pool else (following,)
    (transposed,) = below.outputs[0].outputs
    (apart,) = transposed.outputs[0].outputs
    _, channels, count, pooled, _ = below.inputs[1].values.tolist()
    window = pool.attrs["kernel_shape"][0] if pool else 1
    features, grid = node.inputs
    find, ops = OpBuilder(graph, f"{node.name}/places"), OpBuilder(graph, f"{node.name}/rows")
    # The samples that are pooled together in an axis of their own [B, window * window, count * pooled * pooled].
    grid = find.reshape(grid, [0, count, pooled, window, pooled, window, 2])
    grid = find.reshape(find.add("Transpose", grid, perm=[0, 3, 5, 1, 2, 4, 6]), [0, -1, 2])
    corners = _corners(find, grid, features.shape[2:], node.attrs["padding_mode"] == "zeros")
    names = {built.name for built in graph.nodes if built.name.startswith(f"{node.name}/places")}
    rows = ops.add("Transpose", features, perm=[0, 2, 3, 1])
    rows = ops.reshape(rows, [0, int(np.prod(features.shape[2:])), channels])
    total = None
    for place, weight in corners:
        if features.dtype != np.float32:
            weight = ops.cast(weight, features.dtype)
        part = ops.add("Mul", ops.gather_rows(rows, place), weight)
        total = part if total is None else ops.add("Add", total, part)
    if pool:
        total = ops.reshape(total, [0, window * window, count * pooled * pooled, channels])
        inputs, attrs = ([np.int64([1])], {}) if graph.opset >= REDUCTIONS_OPSET else ([], {"axes": [1]})
        total = ops.add("ReduceMax", total, *inputs, keepdims=0, **attrs)
    crops = ops.reshape(total, [-1, pooled, pooled, channels])
    take_place(graph, apart.outputs[0], ops.add("Transpose", crops, perm=[0, 3, 1, 2]))
    return names


def _corners(ops, grid, shape, zero_outside):
    """The four pixels that a sample lies between, and how much of each it is: 4 x (rows [B, n] int64, weights [B, n, 1]).

    grid: [B, n, 2], x and y, -1 and 1 the centres of the first and last pixel; beyond 2 it marks what is to be 0
    (crop_features). shape: H, W.
    """
    last = np.float32(shape[::-1]) - 1
    place = ops.add("Mul", ops.add("Add", grid, np.float32(1)), last / 2)
    place = ops.add("Min", ops.add("Max", place, np.float32(0)), last)
    low = ops.add("Min", ops.add("Floor", place), last - 1)
    far = ops.add("Sub", place, low)
    near = ops.add("Sub", np.float32(1), far)
    if zero_outside:
        farthest = ops.add("Max", *(ops.slice(grid, 2, i, i + 1) for i in range(2)))
        inside = ops.add("Less", farthest, np.float32(2), dtype=bool)
        near, far = (ops.add("Where", inside, x, np.float32(0), dtype=np.float32) for x in (near, far))
    row = ops.add("ReduceSum", ops.add("Mul", low, np.float32([1, shape[1]])), np.int64([2]), keepdims=0)
    row = ops.cast(row, np.int64)
    corners = []
    for dy, y in ((0, near), (1, far)):
        for dx, x in ((0, near), (1, far)):
            weight = ops.add("Mul", ops.slice(x, 2, 0, 1), ops.slice(y, 2, 1, 2))
            corners.append((ops.add("Add", row, np.int64([dy * shape[1] + dx])), weight))
    return corners


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
