"""FakeQuantWithMinMaxVars, which quantisation-aware training (TFOD's graph_rewriter) leaves in a graph: written in plain ops.

So that FP32 and FP16 give TensorFlow's results. runtimes/trained_ranges.py finds them again for INT8.
"""

import numpy as np
import onnx_graphsurgeon as gs

from onnx_utils import OpBuilder, replace_tensor
from tfod.graph import ModelError, node_name
from tfod.tensorflow_import import import_tensorflow

OPS = {"FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel", "FakeQuantWithMinMaxArgs"}


def write_fake_quants(frozen, graph_def):
    """Replaces the fake quantisations in `graph_def`, of frozen.extract, by nodes that compute the same.

    frozen: the FrozenGraph. Raises UserError for a range that is not a constant.
    """
    old = [node for node in graph_def.node if node.op in OPS]
    ranges = _ranges(frozen, old)
    for node in old:
        written = _written(node, *_nudged(node, *ranges[node.name]))
        graph_def.node.remove(node)
        graph_def.node.extend(written)


def _ranges(frozen, nodes):
    """{node name: (min, max) of the range it was trained with}."""
    found, computed = {}, []
    for node in nodes:
        if node.op == "FakeQuantWithMinMaxArgs":
            found[node.name] = np.float32(node.attr["min"].f), np.float32(node.attr["max"].f)
        else:
            computed += node.input[1:3]
    if any(node_name(frozen.image) in frozen.ancestors(tensor) for tensor in computed):
        raise ModelError(
            "the SavedModel measures ranges of quantisation as it runs; export it from an evaluation graph"
        )
    values = iter(frozen.run(computed, frozen.extract(computed), {}) if computed else ())
    return found | {node.name: (next(values), next(values)) for node in nodes if node.name not in found}


def _nudged(node, low, high):
    """(lowest, highest value, step, zero's level) of a fake quantisation: the range moved so that zero is a level of it.

    (TensorFlow: core/kernels/fake_quant_ops_functor.h, Nudge.)
    """
    least = np.float32(node.attr["narrow_range"].b)
    most = np.float32(2 ** (node.attr["num_bits"].i or 8) - 1)
    scale = ((high - low) / (most - least)).astype(np.float32)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)  # an empty range gives zeros
    zero = np.clip(np.floor(least - low / scale + np.float32(0.5)), least, most)
    empty = np.asarray(high <= low)
    lowest = np.where(empty, np.float32(0), (least - zero) * scale).astype(np.float32)
    highest = np.where(empty, np.float32(0), (most - zero) * scale).astype(np.float32)
    return lowest, highest, scale, np.floor(-lowest / scale + np.float32(0.5)).astype(np.float32)


def _written(node, lowest, highest, scale, zero):
    """The nodes in place of a fake quantisation: floor((clip(x) - lowest) / scale - zero + 0.5) * scale."""
    tf = import_tensorflow()
    nodes, last = [], node.input[0]
    inverse = (np.float32(1) / scale).astype(np.float32)
    steps = [("Minimum", highest), ("Maximum", lowest), ("Sub", lowest), ("Mul", inverse), ("Sub", zero)]
    steps += [("Add", np.float32(0.5)), ("Floor", None), ("Mul", scale)]
    for i, (op, value) in enumerate(steps):
        name = node.name if i == len(steps) - 1 else f"{node.name}/step_{i}"
        step = tf.compat.v1.NodeDef(name=name, op=op, input=[last])
        step.attr["T"].type = tf.float32.as_datatype_enum
        if value is not None:
            constant = tf.compat.v1.NodeDef(name=f"{node.name}/value_{i}", op="Const")
            constant.attr["dtype"].type = tf.float32.as_datatype_enum
            constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(np.asarray(value, np.float32)))
            step.input.append(constant.name)
            nodes.append(constant)
        nodes.append(step)
        last = name
    return nodes


def drop_transposes(graph):
    """Moves the Transpose that tf2onnx leaves before the Floor of a fake quantisation, an op that its optimizer does not
    know, behind the Mul that follows. Where a Transpose back comes next, both go. graph: graphsurgeon's.
    """
    for floor in [node for node in graph.nodes if node.op == "Floor"]:
        before, readers = floor.inputs[0].inputs, list(floor.outputs[0].outputs)
        if not before or before[0].op != "Transpose" or [node.op for node in readers] != ["Mul"]:
            continue
        if not any(isinstance(factor, gs.Constant) and factor.values.size == 1 for factor in readers[0].inputs):
            continue
        product, there = readers[0].outputs[0], list(before[0].attrs["perm"])
        back = [there.index(axis) for axis in range(len(there))]
        floor.inputs = [before[0].inputs[0]]
        others = []
        for node in list(product.outputs):
            if node.op == "Transpose" and list(node.attrs["perm"]) == back:
                replace_tensor(graph, node.outputs[0], product)
            else:
                others.append(node)
        if others or any(tensor is product for tensor in graph.outputs):
            turned = OpBuilder(graph, floor.name).add("Transpose", product, perm=there)
            for node in others:
                node.inputs = [turned if tensor is product else tensor for tensor in node.inputs]
            graph.outputs = [turned if tensor is product else tensor for tensor in graph.outputs]
    graph.cleanup().toposort()
