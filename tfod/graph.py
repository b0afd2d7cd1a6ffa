"""A frozen, inlined TensorFlow graph, and the searches by what its tensors compute that conversion needs."""

import collections

from commandline import UserError

import numpy as np

from tfod.tensorflow_import import import_tensorflow

# Ops that hand one tensor's values on in another shape or type.
RESHAPING = {
    "Identity",
    "Reshape",
    "Squeeze",
    "ExpandDims",
    "StopGradient",
    "Transpose",
    "Tile",
    "PlaceholderWithDefault",
}
# Ops that pick rows by their index: in CenterNets of July 2020 (the zoo's) GatherV2, in later ones GatherNd.
PICKING = {"GatherNd", "GatherV2"}
# Ops whose result depends on a tensor's shape alone.
SHAPE_ONLY = {"Shape", "ShapeN", "Size", "Rank"}


class ModelError(UserError):
    """What a search through a model's graph does not find. It does not know the model's name: saved_model.naming_model does."""


class FrozenGraph:
    """A GraphDef without variables and function calls. Tensors are named as in TensorFlow ("node" or "node:1")."""

    def __init__(self, graph_def, image, outputs, feed):
        """image: name of the input tensor. outputs: {signature key: node name}. feed(RGB [H, W, 3]) -> the input's value."""
        self.graph_def, self.image, self.outputs, self.feed = graph_def, image, outputs, feed
        self.nodes = {node.name: node for node in graph_def.node}
        self._consumers = None

    def op(self, tensor):
        return self.nodes[node_name(tensor)].op

    def inputs(self, tensor):
        """Names of the data inputs (control inputs left out) of the node that makes `tensor`."""
        return [name for name in self.nodes[node_name(tensor)].input if not name.startswith("^")]

    def constant(self, tensor):
        """The value of a tensor that is a constant, seen through Identity; None for any other."""
        while self.op(tensor) == "Identity":
            tensor = self.inputs(tensor)[0]
        if self.op(tensor) != "Const":
            return None
        return import_tensorflow().make_ndarray(self.nodes[node_name(tensor)].attr["value"].tensor)

    def ancestors(self, tensor, through=None, stop=frozenset()):
        """The nodes that `tensor`'s values come from, itself included, breadth first.

        through: follow only nodes of these ops, the others are listed but not entered. stop: node names likewise.
        A tensor's shape is no value of it: ops like Shape are not entered.
        """
        seen, todo = {}, collections.deque([node_name(tensor)])
        while todo:
            name = todo.popleft()
            if name in seen:
                continue
            seen[name] = op = self.nodes[name].op
            if name in stop or op in SHAPE_ONLY or (through is not None and op not in through):
                continue
            todo.extend(node_name(source) for source in self.inputs(name))
        return seen

    def consumers(self, name):
        """Names of the nodes that read an output of the node `name`."""
        if self._consumers is None:
            self._consumers = collections.defaultdict(set)
            for node in self.graph_def.node:
                for source in self.inputs(node.name):
                    self._consumers[node_name(source)].add(node.name)
        return self._consumers[name]

    def descendants(self, names):
        """The nodes whose values depend on those of the nodes `names`, themselves included."""
        seen, todo = set(), list(names)
        while todo:
            name = todo.pop()
            if name not in seen and self.nodes[name].op not in SHAPE_ONLY:
                seen.add(name)
                todo.extend(self.consumers(name))
        return seen

    def is_float(self, tensor, attribute="dtype"):
        """Whether an attribute of the node that makes `tensor` is the type float32."""
        return self.nodes[node_name(tensor)].attr[attribute].type == import_tensorflow().float32.as_datatype_enum

    def static_shape(self, tensor):
        """The shape TensorFlow recorded for a node's first output, -1 where open; [] if it recorded none."""
        shapes = self.nodes[node_name(tensor)].attr["_output_shapes"].list.shape
        return [dim.size for dim in shapes[0].dim] if shapes else []

    def shapes(self, outputs, feed):
        """The shapes that TensorFlow infers for the tensors `outputs` when the tensors in `feed` have those shapes."""
        tf = import_tensorflow()
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(self.extract(outputs, feed), name="")
            return [graph.get_tensor_by_name(tensor_name(name)).shape.as_list() for name in outputs]

    def extract(self, outputs, feed=(), control=False):
        """A GraphDef of what the tensors `outputs` need. feed: {tensor: shape} of float32 tensors to be placeholders.

        control: keep control inputs; loops need them, straight-line code is faster to import and convert without them.
        """
        tf = import_tensorflow()
        nodes = dict(self.nodes)
        for tensor, shape in dict(feed).items():
            dims = [tf.compat.v1.TensorShape(shape).as_proto()]
            nodes[node_name(tensor)] = node = tf.compat.v1.NodeDef(name=node_name(tensor), op="Placeholder")
            node.attr["dtype"].type = tf.float32.as_datatype_enum
            node.attr["shape"].shape.CopyFrom(dims[0])
        result, seen, todo = (
            tf.compat.v1.GraphDef(versions=self.graph_def.versions),
            set(),
            list(map(node_name, outputs)),
        )
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            node = result.node.add()
            node.CopyFrom(nodes[name])
            node.attr.pop("_output_shapes", None)
            node.attr.pop("_class", None)  # where to place it: beside a node that may be left out
            if not control:
                data = [source for source in node.input if not source.startswith("^")]
                del node.input[:]
                node.input.extend(data)
            todo.extend(node_name(source) for source in node.input)
        return result

    def run(self, outputs, graph_def, feeds):
        """Evaluates the tensors `outputs` of a GraphDef made by `extract`; feeds: {tensor: array}."""
        tf = import_tensorflow()
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(graph_def, name="")
            with tf.compat.v1.Session(graph=graph) as session:
                return session.run(
                    [tensor_name(name) for name in outputs], {tensor_name(name): value for name, value in feeds.items()}
                )


def run_by_shape(frozen, output, shapes):
    """The value of a tensor that depends on the shapes of others alone: {tensor: shape}."""
    subgraph = frozen.extract([output], shapes)
    needed = {node.name for node in subgraph.node}
    feeds = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if node_name(name) in needed}
    return frozen.run([output], subgraph, feeds)[0]


def detach_weights(graph_def, larger_than=4096):
    """Turns the float32 constants of more values than that into placeholders; returns {node name: array}."""
    tf = import_tensorflow()
    weights = {}
    for node in graph_def.node:
        if node.op == "Const" and node.attr["dtype"].type == tf.float32.as_datatype_enum:
            value = node.attr["value"].tensor
            shape = [dim.size for dim in value.tensor_shape.dim]
            if np.prod(shape, dtype=np.int64) > larger_than:
                weights[node.name] = tf.make_ndarray(value)
                node.op = "Placeholder"
                del node.attr["value"]
                node.attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())
    return weights


def merge_equals(graph_def, outputs):
    """Lets what reads one of several nodes that compute the same, two heads' averages of the same features say, read the first.

    tf2onnx would merge them later: which of the names stayed, and whether it met them all, followed addresses in memory.
    outputs: names of nodes that nothing is to take the place of.
    """
    first = first_of_equals(graph_def, outputs)
    for node in graph_def.node:
        node.input[:] = [_renamed(source, first) for source in node.input]


def first_of_equals(graph_def, outputs):
    """{node name: name of the first node of the same op, attributes and inputs}: the output among them, else by the alphabet.

    Placeholders, and what has a state (random numbers, the arrays of loops), are equal to none.
    """
    tf = import_tensorflow()
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
    apart = {op.name for op in graph.get_operations() if op.type == "Placeholder" or op.op_def.is_stateful}
    nodes = sorted(graph_def.node, key=lambda node: (node.name not in outputs, node.name))
    attributes = [[(key, value.SerializeToString()) for key, value in sorted(node.attr.items())] for node in nodes]
    first, found = None, {}
    while found != first:  # what reads equal nodes may be equal in turn
        first, found, known = found, {}, {}
        for node, values in zip(nodes, attributes, strict=True):
            inputs = [_renamed(source, first) for source in node.input]
            itself = node.name if node.name in apart else None
            found[node.name] = known.setdefault((node.op, itself, *inputs, *values), node.name)
    return found


def _renamed(tensor, names):
    """The tensor 'a' or 'a:1' by another name of its node: {old: new}."""
    name, *output = tensor.split(":")
    return ":".join([names.get(name, name), *output])


def node_name(tensor):
    """'^a', 'a:1' and 'a' are all about the node 'a'."""
    return tensor.lstrip("^").split(":")[0]


def tensor_name(tensor):
    """TensorFlow's full name of a tensor: 'a' is 'a:0'."""
    return tensor if ":" in tensor else f"{tensor}:0"


def reading_op(frozen, name):
    """The op that reads what the node `name` makes, in whatever shape or type; None where there are several or none."""
    while True:
        readers = frozen.consumers(name)
        if len(readers) != 1:
            return None
        (name,) = readers
        if frozen.op(name) not in RESHAPING:
            return frozen.op(name)


def before_reshaping(frozen, tensor):
    """The tensor whose values `tensor` hands on in another shape or type."""
    while frozen.op(tensor) in RESHAPING:
        tensor = frozen.inputs(tensor)[0]
    return tensor
