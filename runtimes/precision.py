"""The FP16 and INT8 forms of a converted model, made in the ONNX graph: one way for every TensorRT version.

Strongly typed TensorRT (10 and 11) takes precision from the file, so the file says it: FP16 tensors, QuantizeLinear and
DequantizeLinear pairs. Box decoder, softmax, score filter, suppression and the places of crops stay in FP32; they are
found by their place in the graph (`float32_nodes`), not by name.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import onnx_utils

# The layers with weights: what FP16 and INT8 are for. What lies before, between and behind them and an NMS is arithmetic
# on coordinates and scores.
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Ops that move values and compute none: no precision is lost in them, so they take whatever type is at hand.
MOVING = {"Concat", "Expand", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
MOVING |= {"MaxPool", "Relu", "QuantizeLinear", "DequantizeLinear"}  # choices among values; what INT8 itself costs
# Ops that choose by values that may be close: in FP16 many are equal.
CHOOSING = {"TopK", "ArgMax", "ArgMin"}
# Inputs in float32 whatever the type of the op: the region and scales of Resize, which ONNX wants so; the places of GridSample,
# which are to be exact (trt_crops.by_rows).
ALWAYS_FLOAT32 = {"Resize": (1, 2), "GridSample": (1,)}
# QuantizeLinear takes FP16 from this opset on.
HALF_QUANTIZE_OPSET = 19
LEAST_SCALE = 2.0**-20
# ReduceMax and its like take their axes as an input from this opset on.
REDUCTIONS_OPSET = 18
REDUCTIONS = {"ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd", "ReduceL2"}


def float32_nodes(graph):
    """The ids of the nodes of a graphsurgeon graph that compute in float32 in every form.

    All that lies between the inputs and the first layer with weights, before an NMS back to the layers with weights, and
    behind an NMS up to its crops, the next ones or the outputs; without the ops at its edges that only move values. A
    CenterNet, and suppression by rounds, have TopKs in an NMS's place; an ArgMax is a choice among scores too.
    """
    plugins = [node for node in graph.nodes if node.op == "EfficientNMS_TRT"]
    suppressions = plugins + [node for node in graph.nodes if node.op in CHOOSING]
    found = {id(node) for node in suppressions}
    _spread(found, suppressions, lambda node: [x.inputs[0] for x in node.inputs if x.inputs])
    readers = [reader for tensor in graph.inputs for reader in tensor.outputs]
    _spread(found, [*suppressions, *readers], _readers)
    graph.toposort()
    for node in graph.nodes:  # at the near edge: movers of what a layer with weights made
        sources = [tensor.inputs[0] for tensor in _moved(node) if tensor.inputs]
        if node.op in MOVING and sources and not any(id(source) in found for source in sources):
            found.discard(id(node))
    for node in reversed(graph.nodes):  # at the far edge: movers that feed only layers with weights
        readers = [reader for tensor in node.outputs for reader in tensor.outputs]
        if node.op in MOVING and readers and not any(id(reader) in found for reader in readers):
            found.discard(id(node))
    # A crop hands on features; its places stay in `found`.
    found -= {id(node) for node in graph.nodes if node.op == "GridSample"}
    if not plugins:
        pools = [node for node in graph.nodes if node.op == "MaxPool" and id(node) in found]
        found.update(id(node) for pool in pools for node in _heatmap(pool))
    return found


def _heatmap(pool):
    """The nodes from a layer with weights to a max-pool that finds the peaks of what it makes (centernet.best_peaks).

    That layer too: in FP16 a peak's neighbours would often be as high as the peak.
    """
    chain = [pool]
    while chain[-1].op not in WEIGHTED and chain[-1].inputs[0].inputs:
        chain.append(chain[-1].inputs[0].inputs[0])
    return chain


def float32_names(model):
    """The names of those nodes of an ONNX model."""
    graph = gs.import_onnx(model)
    wide = float32_nodes(graph)
    return {node.name for node in graph.nodes if id(node) in wide}


def half_convolutions(model):
    """The names of the convolutions that are FP16 in `to_half`'s form."""
    graph = gs.import_onnx(model)
    wide = float32_nodes(graph)
    return {node.name for node in graph.nodes if node.op == "Conv" and id(node) not in wide}


def _moved(node):
    """The tensors whose values a node of MOVING hands on."""
    return node.inputs if node.op == "Concat" else node.inputs[:1]


def _readers(node):
    """The nodes that read a node's outputs. What a crop hands on is features, which skip connections may carry on."""
    return [] if node.op == "GridSample" else [x for tensor in node.outputs for x in tensor.outputs]


def _spread(found, start, neighbours):
    """Adds to `found` the ids of the nodes that are reached from those in `start` without passing a layer with weights."""
    todo, seen = list(start), set()
    while todo:
        node = todo.pop()
        if id(node) in seen or node.op in WEIGHTED:
            continue
        seen.add(id(node))
        found.add(id(node))
        todo.extend(neighbours(node))


def to_half(model):
    """Returns a converted model with all but `float32_nodes` in FP16; inputs and outputs keep their types.

    QuantizeLinear and DequantizeLinear become FP16 too, which raises the file's opset to 19.
    """
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    graph = typed_graph(model)
    if quantized:
        _raise_opset(graph)
    wide = float32_nodes(graph)
    casts = {}

    def cast(tensor, dtype):
        name = f"{tensor.name}/{np.dtype(dtype).name}"
        if name not in casts:
            casts[name] = onnx_utils.OpBuilder(graph, name).cast(tensor, dtype)
        return casts[name]

    nodes = list(graph.nodes)
    for node in nodes:
        half = id(node) not in wide
        kept = ALWAYS_FLOAT32.get(node.op, ())
        for i, tensor in enumerate(node.inputs):
            if tensor.dtype == np.float32 and half and i not in kept:
                constant = isinstance(tensor, gs.Constant)
                node.inputs[i] = _half_constant(tensor, casts) if constant else cast(tensor, np.float16)
            elif tensor.dtype == np.float16 and not half:
                node.inputs[i] = cast(tensor, np.float32)
        for tensor in node.outputs:
            if tensor.dtype == np.float32 and half and node.op != "Cast":
                tensor.dtype = np.float16
    for tensor in [tensor for tensor in graph.outputs if tensor.dtype == np.float16]:
        name, tensor.name = tensor.name, f"{tensor.name}/half"
        wide_tensor = cast(tensor, np.float32)
        wide_tensor.name, wide_tensor.shape = name, tensor.shape
        graph.outputs = [wide_tensor if x is tensor else x for x in graph.outputs]
    return export(graph, model)


def _half_constant(tensor, cache):
    if tensor.name not in cache:
        values = tensor.values
        if any(
            node.op in ("QuantizeLinear", "DequantizeLinear") and node.inputs[1] is tensor for node in tensor.outputs
        ):
            values = np.maximum(values, LEAST_SCALE)  # the scale of a channel whose weights are all but 0 would be 0
        cache[tensor.name] = gs.Constant(f"{tensor.name}/half", np.asarray(values, np.float16))
    return cache[tensor.name]


def typed_graph(model):
    """The model as a graphsurgeon graph whose tensors all know their types."""
    inferred = onnx.shape_inference.infer_shapes(model)
    # Behind a plugin ONNX infers nothing: there, the types that the converter wrote count.
    known = {info.name: info for info in inferred.graph.value_info}
    for info in model.graph.value_info:
        if info.name not in known:
            inferred.graph.value_info.append(info)
    return gs.import_onnx(inferred)


def _raise_opset(graph):
    """Opset 17 -> 19 for the ops that these graphs use."""
    graph.opset = HALF_QUANTIZE_OPSET
    for domain in graph.import_domains or []:
        if domain.domain == "":
            domain.version = HALF_QUANTIZE_OPSET
    for node in graph.nodes:
        if node.op in REDUCTIONS and "axes" in node.attrs:
            axes = np.array(node.attrs.pop("axes"), np.int64)
            node.inputs.append(gs.Constant(f"{node.name}/axes", axes))
        if node.op == "Split" and len(node.inputs) == 1:
            node.attrs["num_outputs"] = len(node.outputs)


def export(graph, model):
    """A graphsurgeon graph, cleaned up and in order, as a ModelProto with the metadata of `model`."""
    result = gs.export_onnx(graph.cleanup().toposort())
    result.metadata_props.extend(model.metadata_props)
    result.producer_name = model.producer_name
    return result
