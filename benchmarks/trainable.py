"""An SSD of TFOD as it is trained: its network in ONNX, each weight by its variable's name, and weights put back.

Nothing is folded: batch norms are nodes of their own, kernels that levels share are shared.
"""

import shutil
from pathlib import Path

from commandline import UserError, make_folder, whole_file

import onnx_graphsurgeon as gs

from tfod import ssd
from tfod.config import describe_resizer, read_pipeline_config
from tfod.convert import Options, import_network, make_batch_free
from tfod.preprocessing import add_inputs, find_preprocessed_images, probe_preprocessing
from tfod.saved_model import SavedModel, find_pipeline_config, find_saved_model
from tfod.tensorflow_import import import_tensorflow

BUNDLE = Path("variables", "variables")  # the checkpoint within a SavedModel
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"


def export_network(saved_model):
    """Returns (ONNX model, anchors [N, 4] yxyx, normalised) of an SSD's SavedModel.

    The model takes RGB images "input_tensor" [B, H, W, 3], 0..255, float32, and gives what the network predicts for them:
    "encodings" [B, N, (1,) 4] and "logits" [B, N, columns]. The variables are its initializers,
    by their names. Raises UserError for a model that is no SSD, or whose variables are not all found in it.
    """
    folder = find_saved_model(saved_model)
    config = read_pipeline_config(find_pipeline_config(folder))
    if not config.HasField("ssd"):
        raise UserError(f"--saved_model {saved_model}: it is no SSD; only those are trained here")
    with SavedModel(folder) as model:
        frozen = model.freeze()
        resizer = describe_resizer(config.ssd.image_resizer)
        images = find_preprocessed_images(frozen)
        colours = probe_preprocessing(frozen, images, resizer)
        parts = ssd.find(frozen, images, config.ssd, resizer)
        graph = import_network(frozen, parts.inputs, parts.outputs, larger_than=0)
    for name, tensor in zip(parts.outputs, graph.outputs, strict=True):
        tensor.name = name
    make_batch_free(graph, {1})
    if add_inputs(graph, graph.inputs[0], colours, resizer, Options(batch_size=None)):
        raise UserError(f"--saved_model {saved_model}: its images are padded; give one with a fixed_shape_resizer")
    graph.cleanup().toposort()
    network = gs.export_onnx(graph)
    if missing := checkpoint_keys(folder).keys() - {tensor.name for tensor in network.graph.initializer}:
        raise UserError(
            f"--saved_model {saved_model}: {len(missing)} variables are not in its network: {min(missing)} ..."
        )
    return network, parts.anchors


def checkpoint_keys(folder):
    """{a variable's name: its key in the checkpoint} of a SavedModel's folder (tensorflow: trackable_object_graph.proto)."""
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    objects = TrackableObjectGraph.FromString(_open_bundle(folder).get_tensor(OBJECT_GRAPH))
    return {found.full_name: found.checkpoint_key for node in objects.nodes for found in node.attributes}


def _open_bundle(folder):
    return import_tensorflow().train.load_checkpoint(str(folder / BUNDLE))


def write_saved_model(saved_model, weights, output):
    """Writes OUTPUT/saved_model and OUTPUT/pipeline.config: the model with other values in its variables.

    saved_model.pb stays what it is, byte for byte. weights: {variable's name: array}. Raises UserError for a name or a
    shape that is not the model's.
    """
    tf = import_tensorflow()
    folder = find_saved_model(saved_model)
    reader, keys = _open_bundle(folder), checkpoint_keys(folder)
    values = {key: reader.get_tensor(key) for key in sorted(reader.get_variable_to_shape_map())}
    for name, array in weights.items():
        if name not in keys or values[keys[name]].shape != array.shape:
            raise UserError(f"{folder} has no variable {name} of shape {list(array.shape)}: it is of another model")
        values[keys[name]] = array.astype(values[keys[name]].dtype)
    target = make_folder(output / "saved_model")
    make_folder(target / BUNDLE.parent)
    tf.raw_ops.SaveV2(
        prefix=str(target / BUNDLE),
        tensor_names=list(values),
        shape_and_slices=[""] * len(values),
        tensors=[tf.constant(value) for value in values.values()],
    )
    shutil.copyfile(find_pipeline_config(folder), output / "pipeline.config")
    with whole_file(target / "saved_model.pb") as path:  # last: without it the folder is no SavedModel
        shutil.copyfile(folder / "saved_model.pb", path)
