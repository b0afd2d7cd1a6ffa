"""A TFOD SavedModel, or a frozen graph of TF1: found, loaded, run untouched for its own results, and frozen to a flat graph.

TFOD need not be installed. The SavedModel is loaded through TF1's loader: `tf.saved_model.load` rebuilds every function as
a Python object and alone takes as long as loading, freezing and inlining do here (BENCHMARKS.md).
"""

import contextlib
import io
import os
import shlex
import traceback
from pathlib import Path

from commandline import UserError, printable

import numpy as np
from PIL import Image

from tfod import tf1
from tfod.graph import FrozenGraph, ModelError
from tfod.tensorflow_import import first_line, import_tensorflow, silenced

# What people give in a SavedModel's place: {end of the name: what it is and what to do}.
NO_SAVED_MODELS = {
    (".tar.gz", ".tgz", ".zip", ".tar"): "an archive: unpack it and give the folder in it",
    (".tflite",): "a TensorFlow Lite model, which cannot be converted back; give the SavedModel it was made of",
    (".pbtxt",): "a text file; give the saved_model folder, or the frozen_inference_graph.pb, of the export",
    (".h5", ".keras"): "a Keras model; give the SavedModel that TFOD's exporter_main_v2.py wrote",
    (".onnx", ".trt", ".engine"): "converted already; infer.py --engine runs it",
    (".config",): "a pipeline.config; give the export that it lies in",
    (".index", ".meta"): "a part of a checkpoint; give the SavedModel exported from it",
}
EXPORT = (
    "python object_detection/exporter_main_v2.py --input_type image_tensor --pipeline_config_path {config}"
    " --trained_checkpoint_dir {folder} --output_directory exported"
)


def find_saved_model(path):
    """Returns the folder that holds saved_model.pb: `path` itself or its saved_model/; or a frozen graph of TF1: `path` itself
    or the frozen_inference_graph.pb in it. Raises UserError if there is none.
    """
    path = Path(path)
    if path.name == "saved_model.pb":
        path = path.parent
    elif path.suffix == ".pb" and path.is_file():
        return path
    for folder in (path, path / "saved_model"):
        if (folder / "saved_model.pb").is_file():
            return folder
    if (path / tf1.FROZEN_GRAPH).is_file():
        return path / tf1.FROZEN_GRAPH
    if not path.exists():
        raise UserError(f"--saved_model {path}: no such folder")
    raise UserError(f"--saved_model {path}: {_what_it_is(path)}")


def model_files(found):
    """The files that TensorFlow reads of what find_saved_model returned: the frozen graph, or of the SavedModel's folder its own,
    as other files may lie there. Raises OSError for a folder that cannot be read. (TensorFlow, "The SavedModel format on disk")
    """
    if found.is_file():
        return [found]
    folders = [found / name for name in ("variables", "assets") if (found / name).is_dir()]
    below = [
        Path(path, name) for folder in folders for path, _, names in os.walk(folder, onerror=_fail) for name in names
    ]
    return [path for path in (found / "saved_model.pb", *below) if path.is_file()]


def _fail(error):
    raise error


def _what_it_is(path):
    """What a path that holds no SavedModel is, and what to do."""
    if path.is_file():
        if not path.stat().st_size:
            return "the file is empty; give the unpacked export, the folder with saved_model/ in it"
        for ends, what in NO_SAVED_MODELS.items():
            if path.name.lower().endswith(ends):
                return f"it is {what}"
        return "it is a file; give the unpacked export, the folder with saved_model/ in it"
    for folder in (path, path / "checkpoint"):
        if (folder / "checkpoint").is_file() or any(folder.glob("ckpt-*.index")):
            config = next(path.glob("*.config"), "pipeline.config")
            command = EXPORT.format(config=shlex.quote(str(config)), folder=shlex.quote(str(folder)))
            return f"it holds checkpoints, no SavedModel; export one with TFOD, where you trained: {command}"
    return "no saved_model.pb there; give the unpacked export or its saved_model folder"


def find_pipeline_config(saved_model):
    """Returns the pipeline.config beside `saved_model` (as TFOD exports it) or in that folder; raises UserError if none."""
    for folder in (saved_model.resolve().parent, saved_model):
        if (folder / "pipeline.config").is_file():
            return folder / "pipeline.config"
    raise UserError(f"no pipeline.config beside {saved_model}: name the model's own with --pipeline_config")


@contextlib.contextmanager
def naming_model(folder, what):
    """Whatever a damaged model, or one of an unknown kind, makes TensorFlow, tf2onnx or the search through its graph raise
    becomes a UserError: `folder` `what`, why, and where in the code it came up."""
    try:
        yield
    except ModelError as error:
        raise UserError(f"{folder}: {error}") from error
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {first_line(error)[:200]}; {Path(place.filename).name}:{place.lineno}"
        raise UserError(
            f"{folder} {what} ({reason}): it is damaged, or not what TFOD exports; export it again"
        ) from error


class SavedModel:
    """A loaded TFOD SavedModel: `detect` runs it untouched, `graph_def` is its frozen, inlined graph. A context manager."""

    OUTPUTS = ("detection_boxes", "detection_scores", "detection_classes", "num_detections")
    RAW = ("raw_detection_boxes", "raw_detection_scores")
    MORE = ("detection_masks", "detection_keypoints", "detection_keypoint_scores")

    def __init__(self, folder):
        """folder: what find_saved_model returned, a frozen graph too. Raises UserError for what is no TFOD detector, OSError
        for what cannot be read."""
        tf = import_tensorflow()
        self.folder = Path(folder)
        _check_readable(self.folder)
        self._graph = tf.Graph()
        self._session = tf.compat.v1.Session(graph=self._graph)
        try:
            with naming_model(folder, "cannot be loaded"), self._graph.as_default():
                if self.folder.is_file():
                    outputs = (*self.OUTPUTS, *self.RAW, "detection_masks")
                    self._set_signature(*tf1.read_frozen_graph(self.folder, outputs))
                else:
                    self._find_signature(_load(self._session, folder))
        except BaseException:
            self.close()
            raise

    def _find_signature(self, meta):
        signature = meta.signature_def.get("serving_default")
        wrong = f"{self.folder} is not a TFOD detection model: "
        if signature is None:
            raise UserError(f"{wrong}it has no signature serving_default; export it with TFOD's exporter_main_v2.py")
        self._set_signature(
            [info.name for info in signature.inputs.values()],
            {key: info.name for key, info in signature.outputs.items()},
        )

    def _set_signature(self, inputs, outputs):
        """inputs: names of tensors in the graph; outputs: {key: such a name}."""
        wrong = f"{self.folder} is not a TFOD detection model: "
        # TF1's graphs have everything in themselves, TF2's exporter writes functions.
        self._is_tf1 = not self._graph.as_graph_def().library.function
        missing = [name for name in self.OUTPUTS if name not in outputs]
        if missing:
            raise UserError(f"{wrong}its signature lacks {', '.join(missing)}; export it with exporter_main_v2.py")
        if len(inputs) != 1:
            raise UserError(f"{wrong}it has {len(inputs)} inputs, not one image tensor; re-export it")
        image = self._graph.get_tensor_by_name(inputs[0])
        self.input, self.outputs = inputs[0], outputs
        self.input_dtype = np.dtype(image.dtype.as_numpy_dtype)
        if self.input_dtype.kind == "O" and image.shape.rank == 1:
            self._encode = _encode_example if self._parses_examples() else encode_png
        elif self.input_dtype in (np.uint8, np.float32) and image.shape.rank == 4:
            self._encode = None
        else:
            raise UserError(
                f"{wrong}its input is neither an image nor encoded images; re-export with --input_type image_tensor"
            )

    @property
    def possible_classes(self):
        """How many classes it may tell apart, by its outputs: one score of each box is the background's, unless its config has
        add_background_class: false. () where they do not say it: a CenterNet's, exports of 2018."""
        if not self.has_raw_outputs:
            return ()
        shape = self._graph.get_tensor_by_name(self.outputs["raw_detection_scores"]).shape
        return (shape[-1] - 1, shape[-1]) if shape.rank and shape[-1] else ()

    @property
    def has_raw_outputs(self):
        """Whether it gives raw_detection_boxes and raw_detection_scores; CenterNet does not."""
        return self.outputs.keys() >= set(self.RAW)

    def _parses_examples(self):
        """Whether the export's input is a tf.train.Example (--input_type tf_example), not an encoded image."""
        graph = self._graph.as_graph_def()
        nodes = [graph.node, *(function.node_def for function in graph.library.function)]
        return any(node.op.startswith("Parse") and "Example" in node.op for part in nodes for node in part)

    def feed(self, image):
        """The value of the input for one RGB image [H, W, 3], 0..255: the pixels, or their encoded form, without loss."""
        if self._encode:
            return np.array([self._encode(np.asarray(image).astype(np.uint8))], object)
        return np.asarray(image)[None].astype(self.input_dtype)

    def detect(self, image):
        """Runs the untouched model on one RGB image [H, W, 3], 0..255 (uint8, or float32 for a float export; an export
        that decodes images gets it as a PNG).

        Returns {output name: array without the batch dimension} for all outputs of the signature: detection_boxes [M, 4]
        yxyx normalised to the image, detection_scores [M], detection_classes [M] (1-based, float), ...
        """
        with naming_model(self.folder, "cannot be run by TensorFlow"):
            results = self._session.run(self.outputs, {self.input: self.feed(image)})
            results = {key: value[0] for key, value in results.items()}
        count = np.shape(results["detection_scores"])[:1]
        for name, shape in zip(self.OUTPUTS, ((*count, 4), count, count, ()), strict=True):
            if np.shape(results[name]) != shape:
                raise UserError(
                    f"{self.folder} is not a TFOD detection model: its {name} are no such thing; re-export it"
                )
        return results

    def freeze(self):
        """Returns the model as a FrozenGraph: variables are constants, functions are inlined, outputs keep their keys."""
        tf = import_tensorflow()
        with self._graph.as_default(), silenced():
            keys = [key for key in (*self.RAW, "detection_boxes", *self.MORE) if key in self.outputs]
            names = {key: f"tfod_output/{key}" for key in keys}
            for key, name in names.items():
                tf.identity(self._graph.get_tensor_by_name(self.outputs[key]), name=name)
            graph_def = tf.compat.v1.graph_util.extract_sub_graph(
                self._graph.as_graph_def(add_shapes=self._is_tf1), list(names.values())
            )
            _drop_uncalled(graph_def)  # what saves and restores variables
            frozen = tf.compat.v1.graph_util.convert_variables_to_constants(
                self._session, graph_def, list(names.values())
            )
        if not self._is_tf1:
            return FrozenGraph(_inline_functions(frozen, list(names.values())), self.input, names, self.feed)
        result = FrozenGraph(frozen, self.input, names, self.feed)
        if not self.has_raw_outputs:
            result.outputs |= tf1.find_raw_outputs(result)
        return result

    def close(self):
        self._session.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _check_readable(found):
    """Raises OSError or UserError for what TensorFlow could not read, though it is not damaged: it would be taken for that."""
    for path in model_files(found):
        open(path, "rb").close()
    if found.is_dir() and printable(str(found)) != str(found):
        raise UserError(f"--saved_model {found}: TensorFlow opens no folder whose name is not UTF-8; rename it")


def _load(session, folder):
    """tf.compat.v1.saved_model.load without the functions that the graph does not call: those of Keras, for each layer."""
    from tensorflow.python.saved_model.loader_impl import SavedModelLoader

    loader = SavedModelLoader(str(folder))
    for meta in loader.saved_model.meta_graphs:
        _drop_uncalled(meta.graph_def)
    return loader.load(session, ["serve"])


def _drop_uncalled(graph_def):
    """Leaves the functions that a graph does not call out of it: of EfficientDet D0's 1,552 all but 8."""
    library = graph_def.library
    functions = {function.signature.name: function for function in library.function}
    called, todo = set(), [graph_def.node]
    while todo:
        for node in todo.pop():
            named = [f.name for value in node.attr.values() for f in (value.func, *value.list.func)]
            for name in {node.op, *named} & functions.keys() - called:
                called.add(name)
                todo.append(functions[name].node_def)
    gradients = [gradient for gradient in library.gradient if gradient.function_name in called]
    library.Clear()
    library.function.extend(function for name, function in functions.items() if name in called)
    library.gradient.extend(gradients)


def encode_png(image):
    """RGB [H, W, 3] uint8 as the bytes of a PNG file."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG", compress_level=1)
    return data.getvalue()


def _encode_example(image):
    """RGB [H, W, 3] uint8 as a tf.train.Example, with the fields that TFOD's TfExampleDecoder reads an image from."""
    tf = import_tensorflow()
    fields = {"image/encoded": encode_png(image), "image/format": b"png"}
    feature = {key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])) for key, value in fields.items()}
    return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


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
    meta = tf.compat.v1.MetaGraphDef(graph_def=graph_def)
    meta.collection_def["train_op"].node_list.value.extend(outputs)
    return tf_optimizer.OptimizeGraph(config, meta)
