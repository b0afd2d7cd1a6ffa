"""INT8 of a model from quantisation-aware training: its own ranges in place of a calibration.

create_onnx.py writes a fake quantisation (tfod/fake_quant.py) as clip, shift, scale, round down and back: found again here by
its Floor.
"""

import numpy as np
import onnx_graphsurgeon as gs

from runtimes.precision import MOVING
from runtimes.quantization import measured_inputs

STEPS = {"Add", "Sub", "Mul", "Min", "Max", "Clip"}


def read_trained_ranges(model):
    """(the model without its fake quantisations, (ranges, names of the nodes to leave)), as quantization.quantize takes them;
    None for a model that has none.

    ranges: {tensor name: (low, high)} of what layers with weights take in. To leave: layers that take in something else, the
    image for one. Weights keep the values that fake quantisation gave them; quantize takes their range from these.
    """
    graph = gs.import_onnx(model)
    found = {}
    for node in [node for node in graph.nodes if node.op == "Floor"]:
        if quantised := _fake_quant(node):
            source, result, limits = quantised
            for reader in list(result.outputs):
                reader.inputs = [source if tensor is result else tensor for tensor in reader.inputs]
            found[source.name] = limits
    if not found:
        return None
    graph.cleanup().toposort()
    plain = gs.export_onnx(graph)
    plain.metadata_props.extend(model.metadata_props)
    plain.producer_name = model.producer_name
    ranges = {}
    for name, tensor in graph.tensors().items():
        origin = _origin(tensor)
        if origin.name in found:
            ranges[name] = found[origin.name]
    left = [name for name, taken in measured_inputs(plain).items() if taken not in ranges]
    return plain, (ranges, left)


def _fake_quant(floor):
    """(input, output, (low, high)) of the fake quantisation around a Floor; None where it is another."""
    limits, tensor = {}, floor.inputs[0]
    while tensor.inputs and tensor.inputs[0].op in STEPS and len(limits) < 2:
        node = tensor.inputs[0]
        constants = [x.values for x in node.inputs if isinstance(x, gs.Constant)]
        variables = [x for x in node.inputs if isinstance(x, gs.Variable) and not x.is_empty()]
        if len(variables) != 1 or not constants:
            return None
        if node.op == "Clip" and len(constants) == 2:
            limits = {"Max": constants[0], "Min": constants[1]}
        elif node.op in ("Min", "Max"):
            limits[node.op] = constants[0]
        tensor = variables[0]
    readers = floor.outputs[0].outputs
    if len(limits) != 2 or [node.op for node in readers] != ["Mul"]:
        return None
    return tensor, readers[0].outputs[0], (float(np.min(limits["Max"])), float(np.max(limits["Min"])))


def _origin(tensor):
    """The tensor whose values `tensor` hands on."""
    while tensor.inputs and tensor.inputs[0].op in MOVING | {"Pad"} and tensor.inputs[0].op != "Concat":
        tensor = tensor.inputs[0].inputs[0]
    return tensor
