"""An experiment: suppression for TensorRT without a plugin, in standard ops (BENCHMARKS.md, "Suppression by rounds").

A box is kept if no kept box of its class that comes before it in the order of scores overlaps it too much: keep = relu(alive
- S keep), S[i, j] being 1 where j would suppress i. From all alive on, each round of that makes right what ends a chain of at
most so many suppressions; what an odd number of rounds keeps is kept for sure, what an even number leaves out is suppressed
for sure. So it goes in two steps (Sizes): a few rounds among the first pairs tell which of all pairs are suppressed for sure;
the others, few, are put together, and among them it takes as many rounds as chains are long.

Shapes: B images, N boxes, C classes, K pairs of box and class, P of them in a matrix, M boxes kept. Boxes are [ymin, xmin,
ymax, xmax]; a pool [B, K, 5 or 6] holds pairs: box, score and, where there are several classes, the class.
"""

import copy
import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utils import TENSORRT_MAX_TOP_K, OpBuilder, replace_tensor
from runtimes import trt_graph
from runtimes.precision import typed_graph

TINY = np.finfo(np.float32).tiny
# What a plugin is called while trt_graph.prepare shall not see it.
ASIDE = "EfficientNMS_TRT_aside"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed. How much was ever needed: BENCHMARKS.md."""

    parts: int = 20  # of the boxes, whose best pairs are found side by side
    each: int = 256  # pairs of each part
    pairs: int = 2048  # K, the best of those
    first: int = 1024  # of them, those that tell which are suppressed for sure
    sure: int = 3  # rounds for that; odd
    left: int = 512  # the first of the others, among which the kept are found
    rounds: int = 20  # for that
    topk: int = 0  # 1: the chosen are put together by TopK; 0: by counting those before each

    def fitted(self, most, available):
        """For `most` boxes to be kept out of so many pairs."""
        left = max(self.left, min(-(-4 * most // 256) * 256, self.first))
        return dataclasses.replace(self, pairs=min(self.pairs, available, TENSORRT_MAX_TOP_K), left=left)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What suppression is to find."""

    score_threshold: float  # of this score and more
    iou_threshold: float  # so much overlap suppresses, and more
    most: int  # M
    labels: bool  # whether there are several classes
    one_class: bool  # a box suppresses those of all classes


def suits(node, sizes):
    """Whether suppression by rounds can take the place of an onnx.NodeProto: of a plugin, for not many hundreds of boxes."""
    most = next((attribute.i for attribute in node.attribute if attribute.name == "max_output_boxes"), 0)
    return node.op_type == "EfficientNMS_TRT" and 2 * most <= sizes.fitted(most, sizes.pairs).left


def prepare(model, most, sizes):
    """trt_graph.prepare, but for the plugins that rounds suit: `replace` wants them as they are."""
    model = copy.deepcopy(model)
    for node in model.graph.node:
        if suits(node, sizes):
            node.op_type = ASIDE
    model = trt_graph.prepare(model, most)
    for node in model.graph.node:
        if node.op_type == ASIDE:
            node.op_type = "EfficientNMS_TRT"
    return model


def replace(model, sizes, half, check=False):
    """Puts rounds in the place of the plugins that they suit: (the changed copy of the model, names of its new nodes that
    compute in FP32). To be done last: what stays in FP32 is found by the plugins (precision.float32_nodes).

    half: whether the matrices are FP16, in which 0, 1 and their sums here are exact. check: adds the outputs exact_0, ...,
    int32 [B, 1]: whether the result is exact for an image, 1 or 0.
    """
    graph, names = typed_graph(model), set()
    suited = {node.name for node in model.graph.node if suits(node, sizes)}
    for number, node in enumerate([node for node in graph.nodes if node.name in suited]):
        ops, old = OpBuilder(graph, f"rounds_{number}"), len(graph.nodes)
        exact = _replace(ops, node, sizes, half)
        if check:
            exact.name, exact.shape = f"exact_{number}", ["B", 1]
            graph.outputs.append(exact)
        names.update(x.name for x in graph.nodes[old:] if x.op != "Cast" and x.outputs[0].dtype == np.float32)
        node.outputs.clear()
    result = gs.export_onnx(graph.cleanup().toposort())
    result.metadata_props.extend(model.metadata_props)
    result.producer_name = model.producer_name
    return result, names


def _replace(ops, node, sizes, half):
    """Puts rounds in an EfficientNMS_TRT node's place; returns whether they are exact [B, 1] int32."""
    boxes, scores = node.inputs  # [B, N, 4] or [B, N, C, 4]; [B, N, C]
    (count, classes), per_class, attrs = scores.shape[1:], len(boxes.shape) == 4, node.attrs
    most = attrs["max_output_boxes"]
    sizes = sizes.fitted(most, count * classes)
    best, index, *others = _best_pairs(ops, scores, count, classes, sizes)
    labels, rows = None, index
    if classes > 1:
        labels = ops.add("Div", index, np.int64([count]))
        rows = ops.add("Sub", index, ops.add("Mul", labels, np.int64([count])))
    if per_class:
        rows = ops.add("Add", ops.add("Mul", rows, np.int64([classes])), labels) if classes > 1 else rows
        boxes = ops.reshape(boxes, [0, count * classes, 4])
    columns = [best] if labels is None else [best, ops.cast(labels, np.float32)]
    columns = [ops.add("Unsqueeze", column, np.int64([2])) for column in columns]
    pool = ops.add("Concat", ops.gather_rows(boxes, rows), *columns, axis=2)
    one_class = classes == 1 or bool(attrs["class_agnostic"])
    wanted = Wanted(attrs["score_threshold"], attrs["iou_threshold"], most, classes > 1, one_class)
    *results, exact = _suppress(ops, pool, sizes, wanted, half, *others)
    for old, new in zip(list(node.outputs), results, strict=True):
        new.shape = old.shape
        replace_tensor(ops.graph, old, new)
        old.name, new.name = f"{old.name}/replaced", old.name
    return exact


def _best_pairs(ops, scores, count, classes, sizes):
    """The best K of scores [B, N, C]: (scores [B, K], falling, places in [B, C * N] [B, K], what others score at most [B, 1,
    1], the best that was left out of each part [B, parts, 1]).

    By TopKs of parts, which take every so many-th box: of the same score, the lower class, then the lower box in a part.
    """
    parts = max(number for number in range(1, sizes.parts + 1) if count % number == 0)
    each, size = sizes.each, count // parts
    if parts * each < sizes.pairs or each > size * classes:
        parts, each, size = 1, sizes.pairs, count
    scores = ops.add("Transpose", ops.reshape(scores, [0, size, parts, classes]), perm=[0, 2, 3, 1])
    best, index = ops.top_k(ops.reshape(scores, [0, parts, classes * size]), each)
    left_out = ops.slice(best, 2, each - 1, each)
    if parts == 1:
        everything = sizes.pairs == count * classes
        worst = np.zeros((1, 1, 1), np.float32) if everything else left_out
        return ops.reshape(best, [0, each]), ops.reshape(index, [0, each]), worst, worst
    label = ops.add("Div", index, np.int64([size]))
    row = ops.add("Sub", index, ops.add("Mul", label, np.int64([size])))
    row = ops.add("Add", ops.add("Mul", row, np.int64([parts])), np.arange(parts, dtype=np.int64)[None, :, None])
    index = ops.reshape(ops.add("Add", ops.add("Mul", label, np.int64([count])), row), [0, parts * each])
    best, rows = ops.top_k(ops.reshape(best, [0, parts * each]), sizes.pairs)
    worst = ops.reshape(ops.slice(best, 1, sizes.pairs - 1, sizes.pairs), [0, 1, 1])
    return best, ops.gather_rows(index, rows), worst, left_out


def _suppress(ops, pool, sizes, wanted, half, worst, left_out):
    """Of pairs in falling order of their scores those that are kept: (number [B, 1] int32, boxes [B, M, 4], scores [B, M],
    labels [B, M] int32, whether that is exact [B, 1] int32). worst, left_out: see _best_pairs."""
    pairs, small = sizes.pairs, sizes.pairs <= sizes.first
    if small:  # one step does; a row more, for what _square leaves out
        pool = ops.add("Pad", pool, np.int64([0, 0, 0, 0, 1, 0]), np.float32(0))
    least = np.nextafter(np.float32(wanted.score_threshold), np.float32(-1))
    alive = _above(ops, ops.slice(pool, 2, 4, 5), least)  # [B, K, 1]
    unseen = [_above(ops, worst, least)]  # of what was not looked at [B, 1, 1]
    count = pairs + 1
    if not small:
        count = sizes.left
        alive = _not_surely_suppressed(ops, pool, alive, sizes, wanted, half)
        number = ops.add("ReduceSum", alive, np.int64([1]), keepdims=1)
        unseen.append(ops.cast(ops.add("Greater", number, np.float32(count - 1), dtype=bool), np.float32))
        rows, alive = _put_together(ops, alive, pairs, count, sizes.topk)
        pool = ops.gather_rows(pool, rows)
    matrix, keep = _square(ops, pool, alive, count, wanted, half)
    keep = _rounds(ops, matrix, keep, sizes.rounds)
    found = [_chosen(ops, flags, count, wanted.most, sizes) for flags in (keep, _rounds(ops, matrix, keep, 1))]
    hidden = ops.add("Greater", left_out, ops.add("Max", worst, least), dtype=bool)
    exact, (rows, used) = _is_exact(ops, found, unseen, hidden, wanted.most), found[0]
    is_used = ops.add("Greater", used, np.float32(0), dtype=bool)
    chosen = ops.add("Where", is_used, ops.gather_rows(pool, rows), np.float32(0), dtype=np.float32)
    number = ops.cast(ops.add("ReduceSum", used, np.int64([1]), keepdims=0), np.int32)
    scores = ops.reshape(ops.slice(chosen, 2, 4, 5), [0, wanted.most])
    if wanted.labels:
        labels = ops.reshape(ops.slice(chosen, 2, 5, 6), [0, wanted.most])
    else:
        labels = ops.add("Mul", scores, np.float32(0))
    return number, ops.slice(chosen, 2, 0, 4), scores, ops.cast(labels, np.int32), exact


def _not_surely_suppressed(ops, pool, alive, sizes, wanted, half):
    """alive [B, K, 1] without the pairs that the first of the pool suppress for sure."""
    first, pairs = sizes.first, sizes.pairs
    head, tail = ops.slice(pool, 1, 0, first), ops.slice(pool, 1, first - 1, pairs)
    matrix, keep = _square(ops, head, ops.slice(alive, 1, 0, first), first, wanted, half)
    sure = _rounds(ops, matrix, keep, sizes.sure)
    head_left = ops.slice(_rounds(ops, matrix, sure, 1), 1, 0, first - 1)
    bounds = np.full(pairs - first + 1, first - 1)
    matrix = _matrix(ops, tail, head, ops.slice(alive, 1, first - 1, pairs), bounds, first, wanted)
    tail_left = _rounds(ops, _halved(ops, matrix, half), sure, 1)
    left = ops.add("Concat", head_left, tail_left, axis=1)
    return ops.cast(left, np.float32) if half else left


def _square(ops, pool, alive, count, wanted, half):
    """The matrix [B, P, P] of a pool with itself, and the flags [B, P, 1] to start with. Its last pair is left out: what
    stands there is always 1."""
    last = np.zeros((1, count, 1), np.float32)
    last[0, -1] = 1
    alive = ops.add("Max", alive, last)
    bounds = np.append(np.arange(count - 1), 0)
    return tuple(_halved(ops, x, half) for x in (_matrix(ops, pool, pool, alive, bounds, count, wanted), alive))


def _halved(ops, x, half):
    return ops.cast(x, np.float16) if half else x


def _matrix(ops, rows, columns, alive, bounds, count, wanted):
    """What a round multiplies by flags [B, P, 1] whose last is 1, for alive - S keep: float32 [B, R, P].

    -1 where a pair of the pool `columns`, before bounds [R] and of the same class, suppresses one of the pool `rows`; `alive`
    [B, R, 1] in the last column.
    """
    across = ops.add("Transpose", columns, perm=[0, 2, 1])

    def of_both(i):  # [B, R, 1], [B, 1, P]
        return ops.slice(rows, 2, i, i + 1), ops.slice(across, 1, i, i + 1)

    def lengths(low, high):  # of what both share, and of each
        low, high = of_both(low), of_both(high)
        shared = ops.add("Sub", ops.add("Min", *high), ops.add("Max", *low))
        return ops.add("Max", shared, np.float32(0)), *(ops.add("Sub", *ends) for ends in zip(high, low, strict=True))

    shared, *areas = (ops.add("Mul", *sides) for sides in zip(lengths(0, 2), lengths(1, 3), strict=True))
    union = ops.add("Max", ops.add("Sub", ops.add("Add", *areas), shared), TINY)
    below = np.nextafter(np.maximum(np.float32(wanted.iou_threshold), TINY), np.float32(0))
    overlaps = _above(ops, ops.add("Div", shared, union), below)
    place = np.arange(count, dtype=np.int32)[None, None]
    before = ops.add("Less", place, bounds.astype(np.int32)[None, :, None], dtype=bool)
    if not wanted.one_class:
        same = ops.add("Equal", *(ops.cast(x, np.int32) for x in of_both(5)), dtype=bool)
        before = ops.add("And", before, same, dtype=bool)
    otherwise = ops.add("Mul", alive, (place == count - 1).astype(np.float32))
    return ops.add("Where", before, ops.add("Neg", overlaps), otherwise, dtype=np.float32)


def _above(ops, x, limit):
    """1 where x is more than `limit`, a float32, else 0. By arithmetic: TensorRT 8.6 may compare in FP16, as a comparison's
    result has no type of its own to demand. By Max and Min: a Clip stands apart from what TensorRT compiles to one kernel."""
    factor = np.float32(min(1 / float(np.spacing(np.abs(np.float32(limit)))), 2.0**126))
    steep = ops.add("Mul", ops.add("Sub", x, limit, dtype=np.float32), factor)
    return ops.add("Min", ops.add("Max", steep, np.float32(0)), np.float32(1))


def _rounds(ops, matrix, keep, number):
    """Flags [B, P, 1] -> [B, R, 1]. As products and their sums: a MatMul takes four times as long on TensorRT 8.6."""
    for _ in range(number):
        products = ops.add("Mul", matrix, ops.add("Transpose", keep, perm=[0, 2, 1]))
        keep = ops.add("Relu", ops.add("ReduceSum", products, np.int64([2]), keepdims=1))
    return keep


def _chosen(ops, keep, count, most, sizes):
    """The first `most` of the pairs that flags [B, P, 1] keep: see _put_together."""
    keep = ops.slice(keep, 1, 0, count - 1)
    keep = ops.cast(keep, np.float32) if keep.dtype == np.float16 else keep
    return _put_together(ops, keep, count - 1, most, sizes.topk)


def _put_together(ops, flags, count, slots, topk):
    """The first of flags [B, count, 1] that are 1: (rows [B, slots] int64, used [B, slots, 1] float32, 1 or 0)."""
    if topk and slots <= count:
        falling = np.arange(count, 0, -1, dtype=np.float32)[None]
        key, rows = ops.top_k(ops.add("Mul", ops.reshape(flags, [0, count]), falling), slots)
        used = ops.cast(ops.add("Greater", key, np.float32(0), dtype=bool), np.float32)
        return rows, ops.add("Unsqueeze", used, np.int64([2]))
    place, slot = np.arange(count, dtype=np.float32)[None, None], np.arange(slots, dtype=np.float32)[None, :, None]
    number = ops.add("Add", _number_before(ops, flags, count), np.float32(1))
    number = ops.add("Mul", number, ops.reshape(flags, [0, 1, count]))  # from 1 on; 0: not chosen
    here = ops.add("Equal", number, slot + 1, dtype=bool)  # [B, slots, count]
    rows = ops.add(
        "ReduceSum", ops.add("Where", here, place, np.float32(0), dtype=np.float32), np.int64([2]), keepdims=0
    )
    total = ops.add("ReduceSum", flags, np.int64([1]), keepdims=1)
    return ops.cast(rows, np.int64), ops.cast(ops.add("Less", slot, total, dtype=bool), np.float32)


def _number_before(ops, flags, count, width=64):
    """How many of flags [B, count, 1] are 1 before each: [B, 1, count]. In lines of so many, and line by line."""
    lines = -(-count // width)
    flags = ops.reshape(flags, [0, count])
    if lines * width > count:
        flags = ops.add("Pad", flags, np.int64([0, 0, 0, lines * width - count]), np.float32(0))
    flags = ops.reshape(flags, [0, lines, width])
    within = ops.add("MatMul", flags, np.triu(np.ones((width, width), np.float32), 1)[None])
    lengths = ops.add("ReduceSum", flags, np.int64([2]), keepdims=1)
    before = ops.add("MatMul", np.tril(np.ones((lines, lines), np.float32), -1)[None], lengths, dtype=np.float32)
    number = ops.reshape(ops.add("Add", within, before), [0, 1, lines * width])
    return ops.slice(number, 2, 0, count) if lines * width > count else number


def _is_exact(ops, found, unseen, hidden, most):
    """[B, 1] int32: 1 where one round more chooses the same (of the two one has too many, the other too few: the same is
    right), and where all slots are used or no pair was left `unseen`, each [B, 1, 1], and none `hidden` before the last of
    the pairs [B, parts, 1].

    found: what _chosen gives for both.
    """
    keys = (
        ops.add("Mul", ops.add("Unsqueeze", ops.cast(rows, np.float32), np.int64([2])), used) for rows, used in found
    )
    same = ops.cast(ops.add("Equal", *keys, dtype=bool), np.float32)
    counts = (ops.add("ReduceSum", x, np.int64([1]), keepdims=0) for x in (same, found[0][1]))
    converged, full = (ops.add("Greater", x, np.float32(most - 1), dtype=bool) for x in counts)
    unseen = unseen[0] if len(unseen) == 1 else ops.add("Max", *unseen)
    hidden = ops.add("ReduceSum", ops.cast(hidden, np.float32), np.int64([1]), keepdims=1)
    unseen = ops.add("Squeeze", ops.add("Add", unseen, ops.add("Mul", hidden, np.float32(2))), np.int64([2]))
    complete = ops.add("Less", ops.add("Sub", unseen, ops.cast(full, np.float32)), np.float32(1), dtype=bool)
    return ops.cast(ops.add("And", converged, complete, dtype=bool), np.int32)
