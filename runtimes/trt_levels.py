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

from onnx_utils import OpBuilder, factor_and_term
from runtimes.trt_crops import take_place

# Levels stay apart where they are fewer than this, the largest counted, or where more than this share of a joined map would lie between
# them. Larger ones than fit into so many places, as many as were measured, fill a GPU by themselves.
FEWEST_LEVELS, MOST_BETWEEN, MOST_PLACES = 3, 0.25, 2500


@dataclasses.dataclass(frozen=True)
class Joined:
    """Maps in one: its tensor [B, C, H, W], where each lies, (top, left, height, width), and whether all between them is zero, so that a
    kernel of 3 x 3 may go over it."""

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
    """Has convolutions with the same weights that keep the sizes of maps, and the batch normalisations and activations behind them, go
    over all their maps but the largest at once: the same values, but that a convolution may add up in another order.

    Returns {id of a tensor that is part of a joined map: (the joined map's tensor, the places of the part, the part itself)}.
    """
    parts = {}  # id of a tensor: (the Joined that it is part of, its number there, the tensor)
    for convs in _shared_convolutions(graph):
        if _feed_one_another(convs):
            continue
        ops = OpBuilder(graph, f"{convs[0].name}/levels")
        joined = _known(parts, convs)
        if joined is None or not (joined.zeros or convs[0].inputs[1].shape[2:] == [1, 1]):
            joined = _join(ops, parts, [node.inputs[0] for node in convs])
        norms = _alike(convs, _is_norm)
        joined = _convolve(ops, joined, convs[0], norms)
        activated, last = _activate(ops, joined.tensor, norms or convs)
        activated.shape = [*convs[0].outputs[0].shape[:2], *joined.size]
        joined = dataclasses.replace(joined, tensor=activated)
        for number, (node, (top, left, height, width)) in enumerate(zip(last, joined.where, strict=True)):
            part = ops.slice(ops.slice(activated, 2, top, top + height), 3, left, left + width)
            part.shape = [*activated.shape[:2], height, width]
            parts[id(part)] = joined, number, part
            take_place(graph, node.outputs[0], part)
    return {key: (joined.tensor, joined.places(number), part) for key, (joined, number, part) in parts.items()}


def _shared_convolutions(graph):
    """Lists of convolutions with the same weights over maps whose sizes they keep, of those maps that are to be joined, the largest
    first."""
    groups = {}
    for node in graph.nodes:
        if node.op == "Conv" and all(isinstance(x, gs.Constant) for x in node.inputs[1:]):
            groups.setdefault(tuple(id(x) for x in node.inputs[1:]), []).append(node)
    for convs in groups.values():
        shapes = [list(x.shape or []) for node in convs for x in (node.inputs[0], node.outputs[0])]
        if not all(len(shape) == 4 and all(isinstance(x, int) for x in shape[1:]) for shape in shapes):
            continue
        batches = {shape[0] for shape in shapes if isinstance(shape[0], int)}
        kept = all(before[2:] == after[2:] for before, after in zip(shapes[::2], shapes[1::2], strict=True))
        alike = len(batches) <= 1 and all(node.attrs == convs[0].attrs for node in convs)
        if len(convs) < FEWEST_LEVELS or not (kept and alike and _reaches_one_place(convs[0])):
            continue
        convs = _fitting(sorted(convs, key=lambda node: -np.prod(node.inputs[0].shape[2:]))[1:])
        if convs:
            yield convs


def _fitting(convs):
    """The convolutions, those over the largest maps first, without the first ones whose maps do not fit; [] where none do."""
    while len(convs) > 1:
        numbers = Joined(None, _places([node.inputs[0].shape[2:] for node in convs]), True).numbers()
        if numbers.size <= MOST_PLACES:
            return convs if np.mean(numbers < 0) <= MOST_BETWEEN else []
        convs = convs[1:]
    return []


def _reaches_one_place(conv):
    """Whether a convolution that keeps a map's size reads no further than one place over its border."""
    attrs, kernel = conv.attrs, np.array(conv.inputs[1].shape[2:])
    reach = (kernel - 1) * attrs.get("dilations", [1, 1])
    return reach.max() <= 2 and max(attrs.get("pads", [0])) <= 1 and max(attrs.get("strides", [1])) == 1


def _feed_one_another(convs):
    """Whether what one of the nodes gives goes into another."""
    todo, seen = [node.inputs[0] for node in convs], set()
    while todo:
        for node in todo.pop().inputs:
            if id(node) not in seen:
                seen.add(id(node))
                todo += node.inputs
    return any(id(node) in seen for node in convs)


def _known(parts, convs):
    """The joined map whose parts the convolutions read, all and in order; None where there is none."""
    found = [parts.get(id(node.inputs[0]), (None, 0))[:2] for node in convs]
    joined = found[0][0]
    if joined is None or len(joined.where) != len(convs):
        return None
    return joined if all(part[0] is joined and part[1] == i for i, part in enumerate(found)) else None


def _places(sizes):
    """Where maps of such sizes (height, width), the largest first, lie in one: (top, left, height, width) of each."""
    (height, width), *others = sizes
    places, left = [(0, 0, height, width)], 0
    for size in others:
        places.append((height + 1, left, *size))
        left += size[1] + 1
    return tuple(places)


def _join(ops, parts, maps):
    """Lays maps, the largest first, side by side.

    By one Gather, for which TensorRT 8.6 has one kernel; by Pads and Concats it copies each map several times.
    """
    joined = Joined(None, _places([x.shape[2:] for x in maps]), zeros=True)
    index, begun = np.zeros(joined.size, np.int64), 0
    for number, x in enumerate(maps):
        index.flat[joined.places(number)] = begun + np.arange(np.prod(x.shape[2:]))
        begun += int(np.prod(x.shape[2:]))
    values = ops.add("Concat", *(ops.reshape(x, [0, 0, int(np.prod(x.shape[2:]))]) for x in maps), axis=2)
    inside = (joined.numbers() >= 0).astype(np.float32)
    tensor = ops.add("Mul", ops.add("Gather", values, index, axis=2), inside)
    tensor.shape = [*maps[0].shape[:2], *joined.size]
    joined = dataclasses.replace(joined, tensor=tensor)
    parts.update((id(x), (joined, number, x)) for number, x in enumerate(maps))
    return joined


def _convolve(ops, joined, conv, norms):
    """The joined map behind a convolution and the batch normalisations of its parts, if any.

    The normalisations are a factor and a term for each place, zeros between the maps. The largest factor of each channel goes into
    the weights, as TensorRT has it for one map: so what the convolution gives stays in the range of FP16.
    """
    if not norms:
        tensor = ops.add("Conv", joined.tensor, *conv.inputs[1:], **conv.attrs)
        return dataclasses.replace(joined, tensor=tensor, zeros=False)
    factors, terms = (np.array(x) for x in zip(*map(factor_and_term, norms), strict=True))  # [L, C] each
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


def _activate(ops, tensor, nodes):
    """(the joined map behind the activation that follows all of the nodes, the activation's nodes); the tensor and these nodes where
    none does that makes zero of zero."""
    if clips := _alike(nodes, _clips_around_zero):
        low, high = clips[0].inputs[1:]
        return ops.add("Min", ops.add("Max", tensor, low), high), clips
    if relus := _alike(nodes, lambda node: node.op == "Relu"):
        return ops.add("Relu", tensor), relus
    if products := _swishes(nodes):
        return ops.add("Mul", tensor, ops.add("Sigmoid", tensor)), products
    return tensor, nodes


def _alike(nodes, test):
    """What reads the nodes' outputs, one node each and nothing else, of one op and for which `test` gives the same; [] where it gives
    nothing."""
    readers = [list(node.outputs[0].outputs) for node in nodes]
    if any(len(found) != 1 for found in readers):
        return []
    readers = [node for (node,) in readers]
    found = test(readers[0])
    return readers if found and all(node.op == readers[0].op and test(node) == found for node in readers) else []


def _is_norm(node):
    known = all(isinstance(x, gs.Constant) for x in node.inputs[1:])
    return node.op == "BatchNormalization" and known and not node.attrs.get("training_mode")


def _clips_around_zero(node):
    """The limits of a Clip with zero between them; () for anything else."""
    limits = tuple(float(x.values) for x in node.inputs[1:] if isinstance(x, gs.Constant) and node.op == "Clip")
    return limits if len(limits) == 2 and limits[0] <= 0 <= limits[1] else ()


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
