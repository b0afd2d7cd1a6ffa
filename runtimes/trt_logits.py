"""The best anchors of an SSD (tfod.ssd) for TensorRT: their best class is found where logits lie, and few of these are put in order.

A layer gives its logits class by class, [B, A * C, H, W]; the model puts all maps of them in the order of anchors, [B, N, C], for
the best class of each, and gathers the best anchors' again. TensorRT 8.6 puts them in order element by element (BENCHMARKS.md,
"Kernel by kernel").

Shapes: B images, A anchors a place of a map of H x W places, N of all maps, C columns (classes, perhaps the background before them),
K anchors chosen. Several maps may lie in one tensor (trt_levels): `maps` are pairs, of the tensor [B, A * C, H, W] that a map is in and
of the numbers of its places among H x W.
"""

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utils import OpBuilder, replace_outputs

# Of so many values the largest is found at once, of more in steps.
AT_ONCE = 16


def choose_as_they_lie(graph, parts):
    """Finds the best class of each anchor where its logits lie, and gathers the chosen anchors' logits and boxes there: the same values.
    Only where nothing else reads them. parts: of maps that lie side by side (trt_levels.lay_side_by_side)."""
    for node in [node for node in graph.nodes if node.op == "ReduceMax" and node.attrs.get("axes") == [2]]:
        maps, first, columns = _maps_of(node.inputs[0], graph, parts, besides=node)
        if maps and node.attrs.get("keepdims") == 0:
            ops = OpBuilder(graph, f"{node.name}/maps")
            best = _best_class(ops, maps, first, columns)
            replace_outputs(graph, node, [ops.reshape(best, [0, node.inputs[0].shape[1]])])
            node.inputs.clear()  # it reads the scores no more
    for node in [node for node in graph.nodes if _takes_rows(node)]:
        maps, first, columns = _maps_of(node.inputs[0], graph, parts)
        if maps:
            _gather(OpBuilder(graph, f"{node.name}/maps"), node, maps, first, columns)


def _maps_of(scores, graph, parts, besides=None):
    """(the maps that scores are of, the columns before them, all columns); no maps where anything but gathers of whole rows, and the
    node `besides`, reads the scores."""
    logits, first = _with_background(scores)
    readers = [reader for reader in scores.outputs if reader is not besides]
    if _read_by_others(logits, scores, graph) or not all(map(_takes_rows, readers)):
        return [], first, None
    maps = _maps(logits, parts)
    return maps, first, logits.shape[2] if maps else None


def _gather(ops, node, maps, first, columns):
    """Replaces a GatherND of rows, from column `first` on, by one of the values where they lie."""
    start, step = (ops.add("Gather", x, node.inputs[1], dtype=np.int64, axis=0) for x in _lie(maps, columns)[1:])
    # Column c of anchor i is value start[i] + c * step[i].
    index = ops.add("Add", start, ops.add("Mul", step, np.arange(first, columns)))  # [B, K, C]
    values = ops.add("Concat", *(ops.reshape(x, [0, math.prod(x.shape[1:])]) for x in _tensors(maps)), axis=1)
    found = ops.add("GatherND", values, ops.add("Unsqueeze", index, np.int64([3])), batch_dims=1)
    replace_outputs(ops.graph, node, [found])


def _with_background(scores):
    """(logits [B, N, C], first): scores are their columns from `first` on."""
    node = scores.inputs[0] if scores.inputs else None
    if node is not None and node.op == "Slice" and all(isinstance(x, gs.Constant) for x in node.inputs[1:]):
        logits, (starts, _, *others) = node.inputs[0], [x.values.tolist() for x in node.inputs[1:]]
        whole = _is_known(scores) and _is_known(logits) and scores.shape[2] == logits.shape[2] - starts[0]
        if others in ([[2]], [[2], [1]]) and starts[0] >= 0 and whole:
            return logits, starts[0]
    return scores, 0


def _is_known(tensor):
    """Whether it is [B, N, C] with N and C known."""
    return len(tensor.shape or []) == 3 and all(isinstance(size, int) for size in tensor.shape[1:])


def _read_by_others(logits, scores, graph):
    """Whether the ordered logits are needed for anything but the scores."""
    given = any(tensor is logits or tensor is scores for tensor in graph.outputs)
    return given or (logits is not scores and len(logits.outputs) > 1)


def _takes_rows(node):
    """Whether a node gathers whole rows [B, K, C] of [B, N, C]."""
    by_image = node.op == "GatherND" and node.attrs.get("batch_dims") == 1
    return by_image and list(node.inputs[1].shape or [])[2:] == [1]


def _maps(logits, parts):
    """The maps that logits [B, N, C] are put together of, place by place; [] where they are anything else."""
    if not _is_known(logits) or not logits.inputs:
        return []
    joined = logits.inputs[0]
    if (
        joined.op == "Reshape"
        and joined.inputs[0].inputs
        and list(joined.inputs[0].shape or [])[1:] == logits.shape[1:]
    ):
        joined = joined.inputs[0].inputs[0]  # TFOD's, to the shape that they have
    if joined.op != "Concat" or joined.attrs["axis"] != 1:
        return []
    maps = [_map(part, logits.shape[2]) for part in joined.inputs]
    if any(tensor is None for tensor in maps):
        return []
    return [parts.get(id(x), (x, np.arange(math.prod(x.shape[2:]))))[:2] for x in maps]


def _tensors(maps):
    """The tensors that maps are in, each once."""
    return list({id(tensor): tensor for tensor, _ in maps}.values())


def _map(part, columns):
    """The map [B, A * C, H, W] that [B, H * W * A, C] is; None where it is of anything else."""
    if not part.inputs or part.inputs[0].op != "Reshape":
        return None
    rows, tensor = list(part.shape or [])[1:], part.inputs[0].inputs[0]
    turned = tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op == "Transpose" else None
    if turned is not None and turned.attrs.get("perm") == [0, 2, 3, 1]:
        tensor = turned.inputs[0]
    elif list(tensor.shape or [])[2:] != [1, 1]:  # of one place: nothing to turn
        return None
    if len(tensor.shape or []) != 4 or not all(isinstance(size, int) for size in tensor.shape[1:]):
        return None
    anchors, rest = divmod(tensor.shape[1], columns)
    return tensor if not rest and rows == [math.prod(tensor.shape[2:]) * anchors, columns] else None


def _best_class(ops, maps, first, columns):
    """The largest logit from column `first` on of each anchor of all maps, [B, 1, N].

    Map by map TensorRT 8.6 runs a kernel after another, of which each waits for one value at a time: so only the first step goes map
    by map, the others, of few values, go over all anchors at once (BENCHMARKS.md).
    """
    found = []
    for tensor in _tensors(maps):
        _, channels, height, width = tensor.shape
        anchors, places = channels // columns, height * width
        values, left = _fewer(ops, ops.reshape(tensor, [0, anchors, columns, places]), 2, first, columns)
        found.append(ops.reshape(ops.add("Transpose", values, perm=[0, 2, 3, 1]), [0, left, places * anchors]))
    values = ops.add("Concat", *found, axis=2)
    numbers, _, _ = _lie(maps, columns)
    if not np.array_equal(numbers, np.arange(len(numbers))):  # some lie side by side
        values = ops.add("Gather", values, numbers, axis=2)
    while left > 1:
        values, left = _fewer(ops, values, 1, 0, left)
    return values


def _fewer(ops, values, axis, start, end):
    """(fewer columns, of which each is the largest of some from `start` to before `end` along the axis, their number).

    By Max of slices, which TensorRT 8.6 reads place by place, side by side. Its ReduceMax reads column by column, as far apart as a
    map is large: 0.1 ms more for FPNLite at batch 32 (BENCHMARKS.md).
    """
    count = end - start
    parts = count if count <= AT_ONCE else math.isqrt(count - 1) + 1
    width = -(-count // parts)
    starts = [min(start + i * width, end - width) for i in range(parts)]  # the last ones may overlap
    slices = [ops.slice(values, axis, at, at + width) for at in starts]
    return ops.add("Max", *slices) if len(slices) > 1 else slices[0], width


def _lie(maps, columns):
    """Where each anchor lies in all tensors one behind the other: (its number there [N], its first column's [N], from one column to
    the next [N])."""
    begins, begun = {}, 0
    for tensor in _tensors(maps):
        begins[id(tensor)] = begun
        begun += math.prod(tensor.shape[1:]) // columns
    numbers, starts, steps = [], [], []
    for tensor, places in maps:
        anchors, size, begun = tensor.shape[1] // columns, math.prod(tensor.shape[2:]), begins[id(tensor)]
        place, anchor = np.repeat(places, anchors), np.tile(np.arange(anchors), len(places))
        numbers.append(begun + place * anchors + anchor)
        starts.append((begun + anchor * size) * columns + place)
        steps.append(np.full(len(place), size))
    return tuple(map(np.concatenate, (numbers, starts, steps)))
