"""The TensorFlow side: a TFOD SavedModel as one flat graph, its tensors found by what they compute, and its own results.

TFOD need not be installed. The SavedModel is loaded through TF1's loader: `tf.saved_model.load` rebuilds every function as
a Python object and alone takes as long as loading, freezing and inlining do here (BENCHMARKS.md).
"""

import collections
import os
import warnings
from pathlib import Path

import numpy as np

from commandline import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

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
# Ops that split boxes into their coordinates.
COLUMNS = {"Unpack", "Split", "SplitV"}
# Ops whose result depends on a tensor's shape alone.
SHAPE_ONLY = {"Shape", "ShapeN", "Size", "Rank"}


def find_saved_model(path):
    """Returns the folder that holds saved_model.pb: `path` itself or its saved_model/. Raises UserError if neither."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--saved_model {path}: no such folder")
    for folder in (path, path / "saved_model"):
        if (folder / "saved_model.pb").is_file():
            return folder
    raise UserError(
        f"--saved_model {path}: no saved_model.pb there; give the unpacked export or its saved_model folder"
    )


def find_pipeline_config(saved_model):
    """Returns the pipeline.config beside the folder `saved_model` (as TFOD exports it) or in it; raises UserError if none."""
    for folder in (saved_model.resolve().parent, saved_model):
        if (folder / "pipeline.config").is_file():
            return folder / "pipeline.config"
    raise UserError(f"no pipeline.config beside {saved_model}: name the model's own with --pipeline_config")


class SavedModel:
    """A loaded TFOD SavedModel: `detect` runs it untouched, `graph_def` is its frozen, inlined graph. A context manager."""

    OUTPUTS = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")
    RAW = ("raw_detection_boxes", "raw_detection_scores")

    def __init__(self, folder):
        """folder: what find_saved_model returned. Raises UserError for a SavedModel that is no TFOD detector."""
        tf = import_tensorflow()
        self.folder = Path(folder)
        self._graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=self._graph)
        try:
            with self._graph.as_default():
                meta = tf.compat.v1.saved_model.load(self._session, ["serve"], str(folder))
        except (OSError, RuntimeError, ValueError, tf.errors.OpError) as error:
            self.close()
            raise UserError(
                f"{folder} cannot be loaded as a SavedModel ({_first_line(error)}); export it again"
            ) from error
        try:
            self._find_signature(meta)
        except UserError:
            self.close()
            raise

    def _find_signature(self, meta):
        signature = meta.signature_def.get("serving_default")
        wrong = f"{self.folder} is not a TFOD detection model: "
        if signature is None:
            raise UserError(f"{wrong}it has no signature serving_default; export it with TFOD's exporter_main_v2.py")
        missing = [name for name in self.OUTPUTS + self.RAW if name not in signature.outputs]
        if missing:
            raise UserError(f"{wrong}its signature lacks {', '.join(missing)}; export it with exporter_main_v2.py")
        if len(signature.inputs) != 1:
            raise UserError(f"{wrong}it has {len(signature.inputs)} inputs, not one image tensor; re-export it")
        info = next(iter(signature.inputs.values()))
        self.input = info.name
        self.input_dtype = np.dtype(import_tensorflow().dtypes.as_dtype(info.dtype).as_numpy_dtype)
        if self.input_dtype not in (np.uint8, np.float32) or len(info.tensor_shape.dim) != 4:
            raise UserError(
                f"{wrong}its input is not an image_tensor or float_image_tensor; re-export with --input_type image_tensor"
            )
        self.outputs = {key: value.name for key, value in signature.outputs.items()}

    def detect(self, image):
        """Runs the untouched model on one RGB image [H, W, 3], 0..255 (uint8, or float32 for a float export).

        Returns {output name: array without the batch dimension} for all outputs of the signature: detection_boxes [M, 4]
        yxyx normalised to the image, detection_scores [M], detection_classes [M] (1-based, float), ...
        """
        feed = {self.input: np.asarray(image)[None].astype(self.input_dtype)}
        results = self._session.run(self.outputs, feed)
        return {key: value[0] for key, value in results.items()}

    def flatten(self):
        """Returns the model as a FlatGraph: variables are constants, functions are inlined, outputs keep their keys."""
        tf = import_tensorflow()
        with self._graph.as_default(), quiet():
            keys = [*self.RAW, "detection_boxes", *(["detection_masks"] if "detection_masks" in self.outputs else [])]
            names = {key: f"tfod_output/{key}" for key in keys}
            for key, name in names.items():
                tf.identity(self._graph.get_tensor_by_name(self.outputs[key]), name=name)
            frozen = tf.compat.v1.graph_util.convert_variables_to_constants(
                self._session, self._graph.as_graph_def(), list(names.values())
            )
        return FlatGraph(_inline_functions(frozen, list(names.values())), self.input, names)

    def close(self):
        self._session.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class FlatGraph:
    """A flat GraphDef with the searches that conversion needs. Tensors are named as in TensorFlow ("node" or "node:1")."""

    def __init__(self, graph_def, image, outputs):
        """image: name of the input tensor. outputs: {signature key: node name}."""
        self.graph_def, self.image, self.outputs = graph_def, image, outputs
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

    def static_shape(self, tensor):
        """The shape TensorFlow recorded for a node's first output, -1 where open; [] if it recorded none."""
        shapes = self.nodes[node_name(tensor)].attr["_output_shapes"].list.shape
        return [dim.size for dim in shapes[0].dim] if shapes else []

    def shapes(self, outputs, feed):
        """The shapes that TensorFlow infers for the tensors `outputs` when the tensors in `feed` have the shapes given."""
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


def node_name(tensor):
    """'^a', 'a:1' and 'a' are all about the node 'a'."""
    return tensor.lstrip("^").split(":")[0]


def tensor_name(tensor):
    """TensorFlow's full name of a tensor: 'a' is 'a:0'."""
    return tensor if ":" in tensor else f"{tensor}:0"


def is_two_stage(graph):
    """Whether proposals are suppressed before the final boxes are computed, as in Faster and Mask R-CNN."""
    return bool(suppressions(graph, graph.outputs["raw_detection_boxes"]))


def suppressions(graph, tensor):
    """The NonMaxSuppression nodes that `tensor` is computed from."""
    return {name for name, op in graph.ancestors(tensor).items() if op.startswith("NonMaxSuppression")}


def preprocessed_images(graph):
    """The float32 tensor [B, H, W, 3] of resized, normalised images, where the network proper begins.

    TFOD preprocesses image by image in a loop (exporter_lib_v2: tf.map_fn over the batch) and stacks what comes out:
    the stack is the last tensor before the first convolution.
    """
    scores = graph.outputs["raw_detection_scores"]
    found = [
        name
        for name, op in graph.ancestors(scores).items()
        if op == "TensorListStack" and len(graph.static_shape(name)) == 4
    ]
    if len(found) != 1:
        raise UserError(
            "the SavedModel's image preprocessing was not found (no loop over the batch); "
            "export it with TFOD's exporter_main_v2.py as image_tensor or float_image_tensor"
        )
    return found[0]


def score_logits(graph, tensor):
    """Walks back from scores to the class predictions they are made of.

    tensor: raw_detection_scores, say. Returns (tensor [B, anchors, classes (+ background)], converter "SIGMOID" |
    "SOFTMAX" | "IDENTITY", logit scale).
    """
    converter, scale = "IDENTITY", 1.0
    while True:
        op, inputs = graph.op(tensor), graph.inputs(tensor)
        if op in ("Sigmoid", "Softmax"):
            converter = op.upper()
        elif op in ("Mul", "RealDiv"):
            factor = graph.constant(inputs[1])
            if factor is None or factor.size != 1:
                return tensor, converter, scale
            scale *= float(factor) if op == "Mul" else 1.0 / float(factor)
        elif op not in RESHAPING:
            return tensor, converter, scale
        tensor = inputs[0]


def box_decoder(graph, boxes):
    """Walks back from decoded boxes to the box decoder that made them: the nearest one (TFOD: FasterRcnnBoxCoder._decode).

    A decoder has two exponentials, of the columns th and tw of its encodings; each multiplies a side of an anchor.
    Returns (encodings [..., 4]: ty, tx, th, tw; anchors [..., 4] yxyx) as tensor names, and the scales (y, x, height,
    width) that the encodings are divided by.
    """
    exponentials = [name for name, op in graph.ancestors(boxes).items() if op == "Exp"][:2]
    sources, references = set(), set()
    for name in exponentials:
        sources.add(_before_reshaping(graph, _column_source(graph, name)))
        for product in graph.consumers(name):
            sides = [x for x in graph.inputs(product) if node_name(x) != name]
            references.update(_before_reshaping(graph, _column_source(graph, side)) for side in sides)
    if len(exponentials) != 2 or len(sources) != 1 or len(references) != 1:
        raise UserError("the SavedModel's box decoder was not found behind its boxes; is it a TFOD detection model?")
    return sources.pop(), references.pop(), _box_scales(graph, exponentials[0])


def _box_scales(graph, exponential):
    """The constants that the four columns of the encodings are divided by; 1 where there is no division."""
    tensor = exponential
    while graph.op(tensor) not in COLUMNS:
        tensor = graph.inputs(tensor)[0]
    scales = [1.0] * 4
    for reader in graph.consumers(node_name(tensor)):
        column, divisor = [*graph.inputs(reader), None, None][:2]
        if graph.op(reader) == "RealDiv" and graph.constant(divisor) is not None:
            scales[int(column.split(":")[1]) if ":" in column else 0] = float(graph.constant(divisor))
    return tuple(scales)


def _column_source(graph, tensor):
    """Back through arithmetic to the node that split a [..., 4] tensor into columns; returns what it split."""
    while graph.op(tensor) not in COLUMNS:
        tensor = graph.inputs(tensor)[0]
    return graph.inputs(tensor)[1 if graph.op(tensor) == "Split" else 0]


def _before_reshaping(graph, tensor):
    while graph.op(tensor) in RESHAPING:
        tensor = graph.inputs(tensor)[0]
    return tensor


def proposal_scores(graph):
    """The logits [B, ...] (background, object) that the first stage's suppression is about."""
    (first,) = suppressions(graph, graph.outputs["raw_detection_boxes"])
    softmax = next(name for name, op in graph.ancestors(graph.inputs(first)[1]).items() if op == "Softmax")
    return _before_reshaping(graph, graph.inputs(softmax)[0])


def pooled_crops(graph, tensor, after):
    """The crops of features that a later stage begins with: the input of the first max-pool behind the crop.

    TFOD pools right behind each crop (faster_rcnn_meta_arch: maxpool_kernel_size, 1 too). tensor: a result of that stage;
    after: the suppressions whose boxes it crops at. Returns a tensor name [boxes, size, size, channels].
    """
    behind = graph.descendants(after)
    pools = [name for name, op in graph.ancestors(tensor).items() if op == "MaxPool" and name in behind]
    for name in pools:
        upstream = set(graph.ancestors(name)) - {name}
        if not upstream.intersection(pools):
            return graph.inputs(name)[0]
    raise UserError("the SavedModel's second stage was not found (no max-pool behind a crop of features)")


def cropped_features(graph, crops, images, after):
    """The features [B, H, W, channels] that `crops` are cut from: the last map of the images that no box has a say in."""
    free = graph.descendants([images]) - graph.descendants(after)
    frontier = [name for name in graph.ancestors(crops, stop=free) if name in free]
    # Nearest first: the boxes' own way back to the images is longer. As matmuls the crop works on a flattened map.
    for name in graph.ancestors(frontier[0]) if frontier else ():
        shape = graph.static_shape(name)
        if name in free and len(shape) == 4 and shape[-1] > 4:
            return name
    raise UserError("the SavedModel's crop of features was not found; is it a TFOD Faster or Mask R-CNN?")


def crops_with_op(graph, crops, features):
    """Whether the op CropAndResize cuts `crops` from `features`, and not matmuls or gathers in its stead."""
    return "CropAndResize" in graph.ancestors(crops, stop={node_name(features)}).values()


def mask_logits(graph):
    """Walks back from detection_masks, through the sigmoid and the choice of the class, to the mask head's output."""
    for name, op in graph.ancestors(graph.outputs["detection_masks"]).items():
        if op == "Sigmoid":
            choice = next(n for n, o in graph.ancestors(name).items() if o in ("GatherV2", "GatherNd"))
            return _before_reshaping(graph, graph.inputs(choice)[0])
    raise UserError("the SavedModel's mask head was not found behind detection_masks")


def probe_preprocessing(graph, images, resizer):
    """Measures what the model's preprocessing does to colours, on images that its resizer leaves at their size.

    resizer: the dict of tfod_config.describe_resizer. Returns (scale [3], offset [3], pad_value [3] or None): normalised
    = raw * scale + offset per RGB channel, pad_value in raw colours. (SSD pads after normalising: its 0 is the raw
    127.5 of a MobileNet; Faster R-CNN before.) Raises UserError if the preprocessing is not of that form.
    """
    dtype = graph.nodes[node_name(graph.image)].attr["dtype"].type
    dtype = import_tensorflow().dtypes.as_dtype(dtype).as_numpy_dtype
    part = graph.extract([images], control=True)
    padded = resizer["kind"] == "keep_aspect_ratio"
    height = resizer["min_dimension"] if padded else resizer["height"]
    width = resizer["width"]

    def preprocess(image):
        return graph.run([images], part, {graph.image: image[None].astype(dtype)})[0][0].astype(np.float64)

    shape = (height, width, 3)
    offset = preprocess(np.zeros(shape))[0, 0]
    scale = (preprocess(np.full(shape, 255.0))[0, 0] - offset) / 255
    image = np.random.default_rng(0).integers(0, 256, shape)
    result = preprocess(image)
    if result.shape[:2] != (resizer["height"], width) or np.abs(image * scale + offset - result[:height]).max() > 1e-3:
        raise UserError(
            "the SavedModel's preprocessing is not the config's resizer and a scale per channel; "
            "is the pipeline.config the model's own?"
        )
    pad_value = None
    if padded:  # a panorama leaves the bottom right corner empty
        pad_value = (preprocess(np.zeros((max(1, width // 4), width, 3)))[-1, -1] - offset) / scale
        pad_value = pad_value.round(3).tolist()
    return scale.astype(np.float32), offset.astype(np.float32), pad_value


def import_tensorflow():
    """Imports TensorFlow at the first call (5 s) with its start-up chatter off; raises UserError if it is not installed."""
    try:
        with quiet():
            import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"TensorFlow cannot be imported ({_first_line(error)}): pip install -r requirements.txt"
        ) from error
    tf.get_logger().setLevel("ERROR")
    return tf


def _inline_functions(graph_def, outputs):
    """Returns `graph_def` with every function call replaced by the function's body (TensorFlow's own graph optimizer)."""
    tf = import_tensorflow()
    from tensorflow.python.grappler import tf_optimizer

    config = tf.compat.v1.ConfigProto()
    rewrite = config.graph_options.rewrite_options
    rewrite.min_graph_nodes = -1
    rewrite.meta_optimizer_iterations = rewrite.ONE
    rewrite.optimizers.append("function")
    # Without AGGRESSIVE, a call of a stateful function is specialised but stays a call.
    rewrite.function_optimization = rewrite.AGGRESSIVE
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        meta = tf.compat.v1.train.export_meta_graph(graph_def=graph_def, graph=graph)
    meta.collection_def["train_op"].node_list.value.extend(outputs)
    return tf_optimizer.OptimizeGraph(config, meta)


class quiet(warnings.catch_warnings):
    """Silences Python warnings and the C++ start-up lines that ignore TF_CPP_MIN_LOG_LEVEL."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        self._stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *exception):
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        super().__exit__(*exception)


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
