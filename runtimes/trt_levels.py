"""Levels of an FPN side by side in one map, for TensorRT: what a head makes of each level, it makes of several at once.

An SSD's heads go over every level with the same convolutions, each followed by a batch normalisation of the level's own (TFOD's
WeightSharedConvolutionalBoxPredictor). A small map does not fill a GPU: a kernel takes its 2 to 8 us however small the map is, and
there are ten or twelve of them a level (BENCHMARKS.md, "Kernel by kernel"). So all levels but the largest lie in one map: the largest
of these on top, the others in a row beneath it, and zeros between any two, as a convolution finds beyond a map's border.

Shapes: B images, C channels, H x W the places of such a map, L maps in it.
"""

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utils import OpBuilder, replace_tensor

# Fewer levels are left apart, and those between which more of the joined map would lie.
FEWEST_LEVELS, MOST_BETWEEN = 3, 0.25


@dataclasses.dataclass(frozen=True)
class Joined:
    """Maps in one: its tensor [B, C, H, W], where each lies, (top, left, height, width), and whether all between them is zero."""

    tensor: gs.Tensor
    where: tuple
    zeros: bool

    @property
    def size(self):
        """(H, W)."""
        return tuple(max(place[i] + place[i + 2] for place in self.where) for i in (0, 1))

    def numbers(self):
        """Of each place [H, W] the number of its map; -1 between them."""
        numbers = np.full(self.size, -1)
        for number, (top, left, height, width) in enumerate(self.where):
            numbers[top : top + height, left : left + width] = number
        return numbers

    def places(self, number):
        """The places of a map, row by row, as numbers of those of [H, W]."""
        return np.flatnonzero(self.numbers() == number)


def lay_side_by_side(graph):
    """Has convolutions with the same weights, and the batch normalisations and activations behind them, go over all their maps but
    the largest at once: the same values, but that a convolution may add up in another order.

    Returns {id of a tensor that is part of a joined map: (the joined map's tensor, the places of the part)}.
    """
    parts = {}  # id of a tensor: (the Joined that it is part of, its number there)
    for convs in _shared_convolutions(graph):
        ops = OpBuilder(graph, f"{convs[0].name}/levels")
        joined = _known(parts, convs) or _join(ops, parts, [node.inputs[0] for node in convs])
        if joined is None or not (joined.zeros or convs[0].attrs["kernel_shape"] == [1, 1]):
            continue
        norms = _alike(convs, _is_norm)
        joined = _convolve(ops, joined, convs[0], norms)
        activated, last = _activate(ops, joined.tensor, norms) if norms else (joined.tensor, convs)
        joined = dataclasses.replace(joined, tensor=activated)
        activated.shape = [*last[0].outputs[0].shape[:2], *joined.size]
        for number, (node, (top, left, height, width)) in enumerate(zip(last, joined.where, strict=True)):
            part = ops.slice(ops.slice(activated, 2, top, top + height), 3, left, left + width)
            part.shape = node.outputs[0].shape
            parts[id(part)] = joined, number
            replace_tensor(graph, node.outputs[0], part)
    return {part: (joined.tensor, joined.places(number)) for part, (joined, number) in parts.items()}


def _shared_convolutions(graph):
    """Lists of convolutions with the same weights over maps that they leave as large as they are: all but that of the largest map,
    the largest first."""
    groups = {}
    for node in graph.nodes:
        if node.op == "Conv" and all(isinstance(x, gs.Constant) for x in node.inputs[1:]):
            groups.setdefault(tuple(id(x) for x in node.inputs[1:]), []).append(node)
    for convs in groups.values():
        sizes = [[list(x.shape or [])[2:] for x in (node.inputs[0], node.outputs[0])] for node in convs]
        known = all(len(size) == 2 and all(isinstance(x, int) for x in size) for both in sizes for size in both)
        alike = all(node.attrs == convs[0].attrs for node in convs)
        if len(convs) >= FEWEST_LEVELS and known and alike and all(before == after for before, after in sizes):
            yield sorted(convs, key=lambda node: -np.prod(node.inputs[0].shape[2:]))[1:]


def _known(parts, convs):
    """The joined map whose parts the convolutions read, all and in order; None where there is none."""
    found = [parts.get(id(node.inputs[0]), (None, 0)) for node in convs]
    joined = found[0][0]
    if joined is None or len(joined.where) != len(convs):
        return None
    return joined if all(part[0] is joined and part[1] == i for i, part in enumerate(found)) else None


def _join(ops, parts, maps):
    """Lays maps, the largest first, side by side; None where too much would lie between them.

    By one Gather, for which TensorRT 8.6 has one kernel; by Pads and Concats it copies each map several times.
    """
    where, left = [(0, 0, *maps[0].shape[2:])], 0
    for x in maps[1:]:
        where.append((maps[0].shape[2] + 1, left, *x.shape[2:]))
        left += x.shape[3] + 1
    joined = Joined(None, tuple(where), zeros=True)
    inside = joined.numbers() >= 0
    if np.mean(inside) < 1 - MOST_BETWEEN:
        return None
    index, begun = np.zeros(joined.size, np.int64), 0
    for number, x in enumerate(maps):
        index.flat[joined.places(number)] = begun + np.arange(np.prod(x.shape[2:]))
        begun += int(np.prod(x.shape[2:]))
    values = ops.add("Concat", *(ops.reshape(x, [0, 0, int(np.prod(x.shape[2:]))]) for x in maps), axis=2)
    tensor = ops.add("Mul", ops.add("Gather", values, index, axis=2), inside.astype(np.float32))
    joined = dataclasses.replace(joined, tensor=tensor)
    parts.update((id(x), (joined, number)) for number, x in enumerate(maps))
    return joined


def _convolve(ops, joined, conv, norms):
    """The joined map behind a convolution and the batch normalisations of its parts, if any.

    These are a factor and a term for each place, zeros between the maps. The largest factor of each channel goes into the weights, as
    TensorRT would have it for one map: so what the convolution gives stays in the range of FP16.
    """
    if not norms:
        tensor = ops.add("Conv", joined.tensor, *conv.inputs[1:], **conv.attrs)
        return dataclasses.replace(joined, tensor=tensor, zeros=False)
    factors, terms = (np.array(x) for x in zip(*map(_factor_and_term, norms), strict=True))  # [L, C] each
    largest = np.take_along_axis(factors, np.abs(factors).argmax(0)[None], 0)[0]
    largest[largest == 0] = 1
    scaled = [x.values * largest.reshape(-1, *[1] * (x.values.ndim - 1)) for x in conv.inputs[1:]]  # weights, bias
    tensor = ops.add("Conv", joined.tensor, *(x.astype(np.float32) for x in scaled), **conv.attrs)
    numbers, nothing = joined.numbers(), np.zeros((1, len(largest)))
    factor, term = (  # [1, C, H, W]; between the maps the last row, nothing
        np.concatenate([x, nothing])[numbers].transpose(2, 0, 1)[None].astype(np.float32)
        for x in (factors / largest, terms)
    )
    # Of products with constants TensorRT 8.6 makes a layer of another layout, with copies before and behind it. Of what is computed, if
    # only as the larger of a constant and the least value, it does not: product, sum and activation are one kernel.
    factor, term = (
        ops.add("Max", x, np.finfo(np.float16).min.astype(np.float32), dtype=x.dtype) for x in (factor, term)
    )
    tensor = ops.add("Add", ops.add("Mul", tensor, factor), term)
    return dataclasses.replace(joined, tensor=tensor, zeros=True)


def _factor_and_term(norm):
    """What a BatchNormalization multiplies each channel by, and what it adds then: float64 [C] each."""
    gamma, beta, mean, variance = (x.values.astype(np.float64) for x in norm.inputs[1:])
    factor = gamma / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    return factor, beta - mean * factor


def _activate(ops, tensor, norms):
    """(the joined map behind the activation that follows all of the nodes, the activation's nodes); the tensor and these nodes where
    none does that makes zero of zero."""
    if clips := _alike(norms, _clips_around_zero):
        low, high = clips[0].inputs[1:]
        return ops.add("Min", ops.add("Max", tensor, low), high), clips
    if relus := _alike(norms, lambda node: node.op == "Relu"):
        return ops.add("Relu", tensor), relus
    if products := _swishes(norms):
        return ops.add("Mul", tensor, ops.add("Sigmoid", tensor)), products
    return tensor, norms


def _alike(nodes, test):
    """What reads the nodes' outputs, one node each and nothing else, all alike but for what they read, where `test` holds; else []."""
    readers = [list(node.outputs[0].outputs) for node in nodes]
    if any(len(found) != 1 for found in readers):
        return []
    readers = [node for (node,) in readers]
    return readers if all(node.op == readers[0].op and test(node) for node in readers) else []


def _is_norm(node):
    return node.op == "BatchNormalization" and all(isinstance(x, gs.Constant) for x in node.inputs[1:])


def _clips_around_zero(node):
    limits = [x.values for x in node.inputs[1:] if isinstance(x, gs.Constant)]
    return node.op == "Clip" and len(limits) == 2 and limits[0] <= 0 <= limits[1]


def _swishes(nodes):
    """The products x * sigmoid(x) of what the nodes give, where nothing else reads it; else []."""
    products = []
    for (x,) in (node.outputs for node in nodes):
        readers = {reader.op: reader for reader in x.outputs}
        if len(x.outputs) != 2 or readers.keys() != {"Sigmoid", "Mul"}:
            return []
        sigmoid = readers["Sigmoid"].outputs[0]
        if len(sigmoid.outputs) != 1 or {id(tensor) for tensor in readers["Mul"].inputs} != {id(x), id(sigmoid)}:
            return []
        products.append(readers["Mul"])
    return products
