"""Suppression for TensorRT without a plugin, in standard ops: for few images the faster (BENCHMARKS.md, "Suppression by rounds").

A box is kept if no kept box of its class that comes before it in the order of scores overlaps it too much. From all boxes kept
on, each round keeps those that none kept suppresses: after so many rounds, all is right that ends a chain of at most so many
suppressions. What an odd number of rounds keeps is kept for sure, as too many suppressed it.

So it goes in two steps (Sizes). A few rounds among the first pairs of box and class tell, of all pairs, which are suppressed for
sure. The others, few, are put together; among them it takes as many rounds as chains are long.

Shapes: B images, N boxes, C classes, K pairs of box and class, P and Q of them in a matrix, M boxes kept. Boxes are [ymin, xmin,
ymax, xmax]; a pool [B, K, 7] holds pairs: box, score, class, rank. All is float32, so that precision.py finds it as it finds the
plugin.
"""

import dataclasses
import itertools
import math

import numpy as np

from onnx_utils import TENSORRT_MAX_TOP_K, OpBuilder, replace_outputs
from runtimes.precision import WEIGHTED, export, typed_graph
from runtimes.trt_graph import images_of_classes, top_ks

TINY = np.finfo(np.float32).tiny
# For so many images at a time it was measured to be faster than the plugin, of which more cost less; and so many were tried.
FEW_IMAGES, MOST_IMAGES = 8, 32
# Of so many of the best a part, twice as many is margin enough.
LEAST_OF_A_PART = 25
FEWEST_LONG = 4  # parts, where their rows are long
# Of what is drawn by lot a part may give so many standard deviations more than its share, instead of twice that. In one of 40,000
# images a part has more by chance (FPNLite: 186 of 1,500), and the last of these are missing then.
DEVIATIONS = 4
MOST_LEFT = 768  # `left`, at most; no model at hand needs more


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is computed. How much was ever needed: BENCHMARKS.md."""

    row: int = 2048  # values that a TopK looks at where it can be so few: of fewer it is no faster
    pairs: int = 2048  # K, the best
    first: int = 512  # of them, those that tell which are suppressed for sure; at least as many as `left`
    sure: int = 3  # rounds for that; odd
    left: int = 512  # the first of the others, at least, among which the kept are found
    rounds: int = 16  # for that

    def fitted(self, node):
        """For an EfficientNMS_TRT node. `left` is at least twice the boxes to be kept."""
        _, count, classes = node.inputs[1].shape
        left = max(self.left, 2 * node.attrs["max_output_boxes"])
        pairs = min(self.pairs, count * classes, TENSORRT_MAX_TOP_K)
        return dataclasses.replace(self, pairs=pairs, first=min(max(self.first, left), pairs), left=left)


def replace(model, sizes=None):
    """Returns a copy of a converted model with rounds in the place of its plugins, where they suit: the same results, but that of
    equal scores others may come first."""
    graph, sizes = typed_graph(model), sizes or Sizes()
    for number, node in enumerate([node for node in graph.nodes if node.op == "EfficientNMS_TRT"]):
        if suits(node, sizes):
            choice = _choice(graph, node.inputs[1])
            if choice:
                _choose_in_parts(graph, choice, sizes.row)
            results = _suppress(
                OpBuilder(graph, f"rounds_{number}"), node, sizes.fitted(node), in_order=choice is not None
            )
            replace_outputs(graph, node, results)
    return export(graph, model)


def suits(node, sizes):
    """Whether rounds can take the place of an EfficientNMS_TRT node: of many boxes few are kept, of all classes together."""
    fitted = sizes.fitted(node)
    return fitted.left <= min(fitted.first, MOST_LEFT) and images_of_classes(node) == 1


def _suppress(ops, node, sizes, in_order):
    """What EfficientNMS_TRT gives: number [B, 1] int32, boxes [B, M, 4], scores [B, M], classes [B, M] int32. in_order: see
    _best_pairs."""
    attrs, most = node.attrs, node.attrs["max_output_boxes"]
    one_class = node.inputs[1].shape[2] == 1

    def suppressing(these, others):
        return _suppressing(ops, these, others, attrs["iou_threshold"], one_class)

    columns = _best_pairs(ops, *node.inputs, sizes, in_order)
    pool, _ = _pool(ops, columns, columns[1], sizes.pairs)
    alive = _above(ops, ops.slice(pool, 2, 4, 5), np.nextafter(np.float32(attrs["score_threshold"]), np.float32(-1)))
    columns = [ops.slice(x, 1, 0, sizes.first) for x in columns]
    head, others = _pool(ops, columns, columns[1], sizes.first)
    head_alive = ops.slice(alive, 1, 0, sizes.first)
    sure = _rounds(ops, suppressing(head, others), head_alive, sizes.sure)
    rows, alive = _first(ops, _round(ops, suppressing(pool, others), alive, sure), sizes.pairs, sizes.left)
    pairs = ops.gather_rows(ops.slice(pool, 2, 0, 6), rows)
    pool, turned = _pool(ops, [pairs], ops.slice(pairs, 2, 4, 5), sizes.left)
    kept = _rounds(ops, suppressing(pool, turned), alive, sizes.rounds)
    rows, used = _first(ops, kept, sizes.left, most)
    used = ops.add("Greater", used, np.float32(0), dtype=bool)
    found = ops.add("Where", used, ops.gather_rows(pool, rows), np.float32(0), dtype=np.float32)
    number = ops.add("ReduceSum", ops.cast(used, np.int32), np.int64([1]), keepdims=0)
    scores, labels = (ops.reshape(ops.slice(found, 2, i, i + 1), [0, most]) for i in (4, 5))
    return number, ops.slice(found, 2, 0, 4), scores, ops.cast(labels, np.int32)


def _best_pairs(ops, boxes, scores, sizes, in_order):
    """The best pairs, best first, of boxes [B, N, 4] or [B, N, C, 4] and scores [B, N, C]: boxes [B, K, 4], scores and classes
    [B, K, 1]. in_order: whether the boxes come best first."""
    count, classes = scores.shape[1:]
    best, row, label = _largest(ops, scores, sizes.pairs, sizes.row, in_order)
    if len(boxes.shape) == 4:
        boxes = ops.reshape(boxes, [0, count * classes, 4])
        row = ops.add("Add", ops.add("Mul", row, np.int64([classes])), label)
    columns = (ops.add("Unsqueeze", x, np.int64([2])) for x in (best, ops.cast(label, np.float32)))
    return ops.gather_rows(boxes, row), *columns


def _largest(ops, values, number, row, in_order):
    """The `number` largest of values [B, N, C], in falling order: (values, their first and their second index), each [B, number].

    By TopKs of parts, which TensorRT runs side by side, twice its share of every part (fewer: DEVIATIONS), and one of what they find:
    what a TopK takes goes by the values of a row. A part has every so many-th value. With columns added until their number has no
    factor in common with that of parts, each row of values is spread over as many parts as it can be, and each column over all. Of
    rows that come best first, in_order, that is enough. Others are drawn by lot: whatever a picture shows, and however anchors
    lie, no part has many more of the best.
    """
    count, columns = values.shape[1:]
    parts = parts_of(count, columns, number, row)
    lots = None if in_order or parts == 1 else np.random.default_rng(count).permutation(count)
    if lots is not None:
        values = ops.add("Gather", values, lots, axis=1)
    wide = _prime_to(parts, columns)
    if wide > columns:
        # Never among those that a part gives: each part has as many others, and gives no more than these. By a Concat, as TensorRT 8.6
        # copies all values for a Pad.
        none = ops.add("Mul", ops.slice(values, 2, 0, 1), np.float32(0))
        none = ops.add("Add", none, np.full(wide - columns, np.finfo(np.float32).min))
        values = ops.add("Concat", values, none, axis=2)
    values = ops.reshape(values, [0, count * wide])
    if parts == 1:
        best, index = ops.top_k(values, number)
    else:
        each = min(2 * number // parts, count // parts * columns)
        share = number / parts
        if lots is not None and share + DEVIATIONS * math.sqrt(share) <= row // parts:
            each = min(each, row // parts)  # so that the second TopK looks at no more than `row` values
        values = ops.add("Transpose", ops.reshape(values, [0, count * wide // parts, parts]), perm=[0, 2, 1])
        best, place = (ops.reshape(x, [0, parts * each]) for x in ops.top_k(values, each))
        best, index = ops.top_k(best, number)
        part = ops.add("Div", index, np.int64([each]))
        index = ops.add("Add", ops.add("Mul", ops.gather_rows(place, index), np.int64([parts])), part)
    first = ops.add("Div", index, np.int64([wide]))
    second = ops.add("Sub", index, ops.add("Mul", first, np.int64([wide])))
    return best, first if lots is None else ops.add("Gather", lots, first, dtype=np.int64, axis=0), second


def parts_of(count, columns, number, row):
    """In how many parts the `number` largest of values [B, count, columns] are looked for: as few as have rows of at most `row`
    values, and no more than have enough of the best each. 1 where they had to give all that there is, or would be few and long."""
    if 2 * number >= count * columns:
        return 1
    able = [parts for parts in range(1, number // LEAST_OF_A_PART + 1) if count % parts == 0]
    most = max(able, default=1)
    short = (parts for parts in able if count // parts * _prime_to(parts, columns) <= row)
    return next(short, most if most >= FEWEST_LONG else 1)


def _prime_to(parts, columns):
    """The least number, of columns or more, that has no factor in common with parts."""
    return next(wide for wide in itertools.count(columns) if math.gcd(wide, parts) == 1)


def _choose_in_parts(graph, top_k, row):
    """Has boxes that a TopK [B, N] chose of many more (tfod.ssd) chosen by TopKs of parts."""
    count, chosen = top_k.inputs[0].shape[1], int(top_k.inputs[1].values[0])
    if parts_of(count, 1, chosen, row) == 1:
        return
    ops = OpBuilder(graph, f"{top_k.name}/parts")
    values = ops.add("Unsqueeze", top_k.inputs[0], np.int64([2]))
    values.shape = [None, count, 1]
    best, rows, _ = _largest(ops, values, chosen, row, in_order=False)
    replace_outputs(graph, top_k, (best, rows))


def _choice(graph, scores):
    """The TopK [B, N] that chose the boxes of scores [B, K, C], best first; None where none did."""
    known = {id(node) for node in top_ks(graph) if len(node.inputs[0].shape or []) == 2}
    todo, seen = list(scores.inputs), set()
    for node in todo:
        if id(node) in known and int(node.inputs[1].values[0]) == scores.shape[1]:
            return node if isinstance(node.inputs[0].shape[1], int) else None
        if node.op not in WEIGHTED and id(node) not in seen:
            seen.add(id(node))
            todo += [before for tensor in node.inputs for before in tensor.inputs]
    return None


def _pool(ops, columns, scores, count):
    """Pools [B, K, 7] and [B, 7, K] of K = count pairs, in their order, of their boxes, scores [B, K, 1] and classes, in `columns`
    [B, K, ...].

    Each in one Concat: so TensorRT 8.6 has it in memory. Of pairs that it only gathers, or puts together in two steps, it makes each
    anew for each element of a matrix, and of those that it turns there it reads each where it lay.
    """
    rank = ops.add("Add", ops.add("Mul", scores, np.float32(0)), np.arange(count, dtype=np.float32)[None, :, None])
    rows = [ops.add("Transpose", x, perm=[0, 2, 1]) for x in (*columns, rank)]
    return ops.add("Concat", *columns, rank, axis=2), ops.add("Concat", *rows, axis=1)


def _suppressing(ops, these, others, threshold, one_class):
    """Of two pools [B, P, 7] and [B, 7, Q], [B, P, Q]: 1 where one of the others would suppress one of these, else 0."""
    this = [ops.slice(these, 2, i, i + 1) for i in range(7)]  # [B, P, 1]
    other = [ops.slice(others, 1, i, i + 1) for i in range(7)]  # [B, 1, Q]

    def shared(i):  # how high, how wide what both cover is
        side = ops.add("Sub", ops.add("Min", this[i + 2], other[i + 2]), ops.add("Max", this[i], other[i]))
        return ops.add("Max", side, np.float32(0))

    def area(box):
        return ops.add("Mul", ops.add("Sub", box[2], box[0]), ops.add("Sub", box[3], box[1]))

    both = ops.add("Mul", shared(0), shared(1))
    union = ops.add("Sub", ops.add("Add", area(this), area(other)), both)
    iou = ops.add("Div", both, ops.add("Max", union, TINY))
    overlaps = _above(ops, iou, np.nextafter(np.maximum(np.float32(threshold), TINY), np.float32(0)))
    counts = ops.add("Less", *(ops.cast(x[6], np.int32) for x in (other, this)), dtype=bool)
    if not one_class:
        same = ops.add("Equal", *(ops.cast(x[5], np.int32) for x in (other, this)), dtype=bool)
        counts = ops.add("And", counts, same, dtype=bool)
    return ops.add("Where", counts, overlaps, np.float32(0), dtype=np.float32)


def _above(ops, x, limit):
    """1 where x is more than `limit`, a float32, else 0. By arithmetic: TensorRT 8.6 may compare in FP16, as a comparison's
    result has no type of its own to demand. By Max and Min: a Clip stands apart from what TensorRT compiles to one kernel."""
    factor = np.float32(min(1 / float(np.spacing(np.abs(np.float32(limit)))), 2.0**126))
    steep = ops.add("Mul", ops.add("Sub", x, limit, dtype=np.float32), factor)
    return ops.add("Min", ops.add("Max", steep, np.float32(0)), np.float32(1))


def _rounds(ops, suppressing, alive, number):
    """Flags [B, P, 1] of what is kept after so many rounds among `alive`, by the matrix [B, P, P]."""
    kept = alive
    for _ in range(number):
        kept = _round(ops, suppressing, alive, kept)
    return kept


def _round(ops, suppressing, alive, kept):
    """`alive` [B, P, 1] without what `kept` [B, Q, 1] suppress, by the matrix [B, P, Q].

    As products and their sums: a MatMul takes four times as long on TensorRT 8.6.
    """
    products = ops.add("Mul", suppressing, ops.add("Transpose", kept, perm=[0, 2, 1]))
    number = ops.add("ReduceSum", products, np.int64([2]), keepdims=1)
    return ops.add("Relu", ops.add("Sub", alive, number))


def _first(ops, flags, count, slots):
    """The first of flags [B, P = count, 1] that are 1: (their rows [B, slots] int64, whether there are so many [B, slots, 1])."""
    falling = np.arange(count, 0, -1, dtype=np.float32)[None]
    key, rows = ops.top_k(ops.add("Mul", ops.reshape(flags, [0, count]), falling), slots)
    return rows, ops.add("Unsqueeze", ops.add("Min", key, np.float32(1)), np.int64([2]))
