"""Runs a network of convolutions and batch norms, given in ONNX, with PyTorch: to train it.

Of ONNX's operators only those that `trainable.export_network` leaves in such networks.
"""

from commandline import UserError

import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper


class TorchNetwork:
    """An ONNX model's nodes with the weights as tensors: network(images) -> {output name: tensor}.

    weights: {name: tensor to be trained}; averages: {name: tensor} of batch norms' moving means and variances.
    """

    def __init__(self, model, device):
        graph = model.graph
        self.input, self.outputs = graph.input[0].name, [output.name for output in graph.output]
        self.nodes = [(node, {x.name: helper.get_attribute_value(x) for x in node.attribute}) for node in graph.node]
        if unknown := {node.op_type for node in graph.node} - OPS.keys():
            raise UserError(f"the network has operators that are not trained here: {', '.join(sorted(unknown))}")
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self._makers = {node.output[0]: node for node in graph.node}
        moving = {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
        trained = {
            self.source(name) for node in graph.node if node.op_type in WEIGHTS for name in node.input[1:]
        } - moving
        tensors = {name: torch.tensor(arrays[name], device=device) for name in trained | moving}
        self.weights = {name: tensors[name].requires_grad_() for name in sorted(trained)}
        self.averages = {name: tensors[name] for name in sorted(moving)}
        self._constants = {
            name: torch.tensor(array, device=device) if array.ndim and array.dtype.kind == "f" else array.tolist()
            for name, array in arrays.items()
            if name not in tensors
        }

    def source(self, name):
        """The initializer that a node's input is: kernels are turned from TensorFlow's order by a Transpose."""
        while name in self._makers:
            name = self._makers[name].input[0]
        return name

    def before(self, output):
        """The convolutions that make an output, behind which values are only moved."""
        todo, found = [output], []
        while todo:
            node = self._makers[todo.pop()]
            found += [node] if node.op_type == "Conv" else []
            todo += [name for name in node.input if name in self._makers and node.op_type != "Conv"]
        return found

    def kernels(self):
        """Names, always in the same order."""
        return sorted({self.source(node.input[1]) for node, _ in self.nodes if node.op_type == "Conv"})

    def biases(self):
        """Names of the convolutions' biases."""
        return sorted({name for node, _ in self.nodes if node.op_type == "Conv" for name in node.input[2:]})

    def batch_norms(self):
        """[(gamma, beta, moving mean, moving variance)], as tensors."""
        tensors = {**self.weights, **self.averages}
        norms = [node for node, _ in self.nodes if node.op_type == "BatchNormalization"]
        return [tuple(tensors[name] for name in node.input[1:]) for node in norms]

    def __call__(self, images, momentum=None):
        """images: [B, H, W, 3], 0..255. momentum: while training, what a batch counts in the moving averages."""
        values = {**self._constants, **self.weights, **self.averages, self.input: images}
        for node, attributes in self.nodes:
            if node.op_type == "BatchNormalization":
                attributes = {**attributes, "momentum": momentum}
            inputs = [values[name] if name else None for name in node.input]
            values[node.output[0]] = OPS[node.op_type](*inputs, **attributes)
        return {name: values[name] for name in self.outputs}

    def write(self, path, model):
        """Writes an ONNX file: the model with the weights as they are now."""
        model = onnx.ModelProto.FromString(model.SerializeToString())
        for tensor in model.graph.initializer:
            if (value := self.weights.get(tensor.name, self.averages.get(tensor.name))) is not None:
                tensor.CopyFrom(numpy_helper.from_array(value.detach().float().cpu().numpy(), tensor.name))
        onnx.save(model, path)


def _pad(x, pads, value):
    """pads: ONNX's, [top, left, bottom, right]."""
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom), value=value) if any(pads) else x


def conv(x, kernel, bias=None, *, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1), group=1, **_):
    if pads[:2] != pads[2:]:
        x, pads = _pad(x, pads, 0.0), (0, 0)
    kernel = kernel.contiguous(memory_format=torch.channels_last)  # TensorFlow's order, turned, is another
    return F.conv2d(x, kernel, bias, tuple(strides), tuple(pads[:2]), tuple(dilations), group)


def batch_norm(x, gamma, beta, mean, variance, *, epsilon, momentum, **_):
    """The variance of a batch enters the moving average with Bessel's correction, as in TensorFlow's FusedBatchNormV3."""
    return F.batch_norm(x, mean, variance, gamma, beta, momentum is not None, momentum or 0.0, epsilon)


def max_pool(x, *, kernel_shape, strides, pads=(0, 0, 0, 0), **_):
    return F.max_pool2d(_pad(x, pads, -torch.inf), tuple(kernel_shape), tuple(strides))


def reshape(x, shape, **_):
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape)])


def unsqueeze(x, axes):
    for axis in sorted(axes):  # none is negative in such networks
        x = x.unsqueeze(axis)
    return x


# Operators with weights: all inputs but the first.
WEIGHTS = ("Conv", "BatchNormalization")
OPS = {
    "Add": torch.add,
    "BatchNormalization": batch_norm,
    "Clip": torch.clamp,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": conv,
    "MaxPool": max_pool,
    "Reshape": reshape,
    "Transpose": lambda x, perm: x.permute(*perm),
    "Unsqueeze": unsqueeze,
}
