"""Weighted sums of features, as BiFPN's "fast attention" makes them (Tan et al., "EfficientDet", 2020), written as such."""

import numpy as np

from tfod.graph import node_name
from tfod.tensorflow_import import import_tensorflow

# Ops whose values no constant decides: what depends on one of them is not known before the model runs.
UNKNOWN = {"Placeholder", "PlaceholderWithDefault"}


def write_weighted_sums(frozen, subgraph):
    """Rewrites the weighted sums in a GraphDef that `frozen.extract` made: x * 0.3 + y * 0.7, for features x and y.

    TFOD stacks the features and multiplies the stack by a matrix of one column (bifpn_utils.BiFPNCombineLayer), which the
    weights decide alone: 14 ops in place of 3, and transpositions besides, as convolutions take features otherwise. Features
    that were made larger before are made so by one op.
    """
    sums = {node.name: found for node in subgraph.node if (found := _find_weighted_sum(frozen, node))}
    columns = sorted({column for _, column in sums.values()})
    if not columns:
        return
    values = frozen.run(columns, frozen.extract(columns), {})
    values = dict(zip(columns, values, strict=True))
    for node in [node for node in subgraph.node if node.name in sums]:
        features, column = sums[node.name]
        _write_sum(subgraph, node, features, values[column].ravel())
        for feature in features:
            _write_upsampling(frozen, subgraph, feature)


def _find_weighted_sum(frozen, node):
    """(names of the summed tensors, name of their weights [n, 1]) of a Squeeze that ends a weighted sum; None for others.

    Pack along a new last axis -> BatchMatMulV2 with known weights -> Squeeze of that axis.
    """
    if node.op != "Squeeze" or frozen.op(product := frozen.inputs(node.name)[0]) not in (
        "BatchMatMulV2",
        "BatchMatMul",
    ):
        return None
    stack, column = frozen.inputs(product)
    rank, axes = len(frozen.static_shape(product)), list(node.attr["squeeze_dims"].list.i)
    transposed = [frozen.nodes[node_name(product)].attr[side].b for side in ("adj_x", "adj_y")]
    if frozen.op(stack) != "Pack" or axes not in ([-1], [rank - 1]) or any(transposed):
        return None
    axis, shape = frozen.nodes[node_name(stack)].attr["axis"].i, frozen.static_shape(column)
    features = frozen.inputs(stack)
    known = not UNKNOWN & set(frozen.ancestors(column).values())
    return (features, column) if known and axis in (-1, rank - 1) and shape == [len(features), 1] else None


def _write_sum(subgraph, node, features, weights):
    """Makes `node` the sum of the tensors `features`, each times its weight."""
    float32 = import_tensorflow().float32.as_datatype_enum
    total = None
    for i, (feature, weight) in enumerate(zip(features, weights, strict=True)):
        constant = subgraph.node.add(name=f"{node.name}/weight_{i}", op="Const")
        constant.attr["value"].tensor.CopyFrom(import_tensorflow().make_tensor_proto(np.float32(weight)))
        term = subgraph.node.add(name=f"{node.name}/term_{i}", op="Mul", input=[feature, constant.name])
        last = i == len(features) - 1
        result = term
        if total is not None:
            result = node if last else subgraph.node.add(name=f"{node.name}/sum_{i}", op="AddV2")
            result.op = "AddV2"
            del result.input[:]
            result.input.extend([total.name, term.name])
        for made in {id(x): x for x in (constant, term, result)}.values():
            made.attr.pop("squeeze_dims", None)
            made.attr["dtype" if made is constant else "T"].type = float32
        total = result


def _write_upsampling(frozen, subgraph, feature):
    """Makes nearest-neighbour upsampling of stacks and a Reshape (ops.nearest_neighbor_upsampling) the op that it is.

    x [B, H, W, C] -> Pack of itself behind W -> Pack of that behind H -> Reshape.
    """
    if frozen.op(feature) != "Reshape":
        return
    tensor, factors = frozen.inputs(feature)[0], []
    for axis in (2, 3):
        copies = frozen.inputs(tensor) if frozen.op(tensor) == "Pack" else []
        if len(set(copies)) != 1 or frozen.nodes[node_name(tensor)].attr["axis"].i != axis:
            return
        factors.append(len(copies))
        tensor = copies[0]
    before, after = frozen.static_shape(tensor), frozen.static_shape(feature)
    if len(before) != 4 or min(before[1:3]) < 1 or after[1:3] != [before[1] * factors[0], before[2] * factors[1]]:
        return
    tf = import_tensorflow()
    (node,) = (node for node in subgraph.node if node.name == node_name(feature))
    size = subgraph.node.add(name=f"{node.name}/size", op="Const")
    size.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.int32(after[1:3])))
    size.attr["dtype"].type = tf.int32.as_datatype_enum
    node.op = "ResizeNearestNeighbor"
    node.attr.clear()
    node.attr["T"].type = tf.float32.as_datatype_enum
    del node.input[:]
    node.input.extend([tensor, size.name])
