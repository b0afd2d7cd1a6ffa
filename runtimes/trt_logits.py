"""The best anchors of an SSD (tfod.ssd) for TensorRT: their best class is found map by map, and few of the logits are put in order.

A layer gives its logits class by class, [B, A * C, H, W]; the model puts all maps of them in the order of anchors, [B, N, C], for
the best class of each, and gathers the best anchors' again. TensorRT 8.6 puts them in order element by element (BENCHMARKS.md,
"Kernel by kernel").

Shapes: B images, A anchors a place of a map of H x W places, N of all maps, C columns (classes, perhaps the background before them),
K anchors chosen.
"""

import math

import numpy as np

from onnx_utils import OpBuilder, replace_outputs

# Of so many values the largest is found at once, of more in two steps.
AT_ONCE = 16


def choose_as_they_lie(graph):
    """Finds the best class of each anchor where its logits lie, and gathers the chosen anchors' logits there: the same values. Only
    where nothing else reads them."""
    for node in [node for node in graph.nodes if node.op == "ReduceMax" and node.attrs.get("axes") == [2]]:
        scores = node.inputs[0]
        gathers = [reader for reader in scores.outputs if reader is not node]
        logits, first = _with_background(scores)
        maps = _maps(logits)
        if not maps or node.attrs.get("keepdims") != 0 or not all(_takes_rows(gather) for gather in gathers):
            continue
        ops, columns = OpBuilder(graph, f"{node.name}/maps"), logits.shape[2]
        best = [_best_class(ops, tensor, columns, first) for tensor in maps]
        replace_outputs(graph, node, [ops.add("Concat", *best, axis=1)])
        values = ops.add("Concat", *(ops.reshape(x, [0, math.prod(x.shape[1:])]) for x in maps), axis=1)
        places = _places(maps, columns)
        for gather in gathers:
            # Of anchor i column c is value places[0, i] + c * places[1, i].
            start, step = (ops.add("Gather", place, gather.inputs[1], dtype=np.int64, axis=0) for place in places)
            index = ops.add("Add", start, ops.add("Mul", step, np.arange(first, columns)))  # [B, K, C]
            index = ops.add("Unsqueeze", index, np.int64([3]))
            replace_outputs(graph, gather, [ops.add("GatherND", values, index, batch_dims=1)])


def _with_background(scores):
    """(logits [B, N, C], first): scores are their columns from `first` on."""
    node = scores.inputs[0] if scores.inputs else None
    if node is not None and node.op == "Slice" and all(hasattr(x, "values") for x in node.inputs[1:]):
        logits, (starts, _, axes, *steps) = node.inputs[0], [x.values.tolist() for x in node.inputs[1:]]
        first = starts[0]
        whole = len(logits.shape or []) == 3 and scores.shape[2] == logits.shape[2] - first
        if len(starts) == 1 and axes == [2] and steps in ([], [[1]]) and first >= 0 and whole:
            return logits, first
    return scores, 0


def _takes_rows(node):
    """Whether a node gathers whole rows [B, K, C] of [B, N, C]."""
    return node.op == "GatherND" and node.attrs.get("batch_dims") == 1 and len(node.outputs[0].shape or []) == 3


def _maps(logits):
    """The maps [B, A * C, H, W] that logits [B, N, C] are put together of, place by place; [] where they are anything else."""
    if len(logits.shape or []) != 3 or not logits.inputs:
        return []
    joined = logits.inputs[0]
    while (
        joined.op == "Reshape"
        and joined.inputs[0].inputs
        and list(joined.inputs[0].shape or [])[1:] == logits.shape[1:]
    ):
        joined = joined.inputs[0].inputs[0]
    if joined.op != "Concat" or joined.attrs["axis"] != 1:
        return []
    maps = [_map(part, logits.shape[2]) for part in joined.inputs]
    return [] if any(tensor is None for tensor in maps) else maps


def _map(part, columns):
    """The map [B, A * C, H, W] that [B, H * W * A, C] is; None where it is of anything else."""
    for op in ("Reshape", "Transpose"):
        if not part.inputs or part.inputs[0].op != op:
            return None
        node, shape = part.inputs[0], part.shape
        if op == "Reshape":
            rows = list(shape or [])[1:]
        part = node.inputs[0]
    known = len(part.shape or []) == 4 and all(isinstance(size, int) for size in part.shape[1:])
    if not known or node.attrs["perm"] != [0, 2, 3, 1] or part.shape[1] % columns:
        return None
    return part if rows == [math.prod(part.shape[1:]) // columns, columns] else None


def _best_class(ops, tensor, columns, first):
    """The largest logit from column `first` on of each anchor of a map, [B, H * W * A]."""
    _, channels, height, width = tensor.shape
    anchors, places = channels // columns, height * width
    best = _largest(ops, ops.reshape(tensor, [0, anchors, columns, places]), first, columns)
    return ops.reshape(ops.add("Transpose", best, perm=[0, 3, 1, 2]), [0, places * anchors])


def _largest(ops, values, start, end):
    """The largest of values [B, A, C, P] from column `start` to before `end`, [B, A, 1, P].

    By Max of slices: TensorRT 8.6 makes one kernel of them, which reads places side by side; its ReduceMax reads columns, as far
    apart as a map is large, and takes four times as long (BENCHMARKS.md).
    """
    count = end - start
    parts = count if count <= AT_ONCE else math.isqrt(count - 1) + 1
    width = -(-count // parts)
    starts = [min(start + i * width, end - width) for i in range(parts)]  # the last ones may overlap
    slices = [ops.slice(values, 2, at, at + width) for at in starts]
    values = ops.add("Max", *slices) if len(slices) > 1 else slices[0]
    return values if width == 1 else _largest(ops, values, 0, width)


def _places(maps, columns):
    """Where the logits of each anchor lie in all maps one behind the other: (of its first column [N], from one to the next [N])."""
    starts, steps, begun = [], [], 0
    for _, channels, height, width in (tensor.shape for tensor in maps):
        anchors, places = channels // columns, height * width
        place, anchor = np.divmod(np.arange(places * anchors), anchors)
        starts.append(begun + anchor * columns * places + place)
        steps.append(np.full(places * anchors, places))
        begun += channels * places
    return np.concatenate(starts), np.concatenate(steps)
