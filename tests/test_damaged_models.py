"""SavedModels that were damaged: a file that passes its check, or one line that names the model."""

import random
import shutil

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO_MODEL, variants
from test_convert import command

from tfod.graph import FrozenGraph
from tfod.preprocessing import find_preprocessed_images
from tfod.saved_model import SavedModel, find_saved_model, naming_model
from tfod.tensorflow_import import import_tensorflow


def damage(rng, saved_model):
    """Changes one thing in a SavedModel's proto: a node, its inputs, an attribute, a constant or the signature."""
    meta = saved_model.meta_graphs[0]
    graphs = [meta.graph_def.node, *(function.node_def for function in meta.graph_def.library.function)]
    nodes = rng.choice([graph for graph in graphs if len(graph) > 3] + [max(graphs, key=len)] * 3)
    node = rng.choice(nodes)
    signature = meta.signature_def["serving_default"]
    output = signature.outputs[rng.choice(sorted(signature.outputs))]
    match rng.randrange(9):
        case 0:
            nodes.remove(node)
        case 1:
            node.op = rng.choice(["Unheard", "Relu", "Conv2D", "Identity", "NoOp", ""])
        case 2 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice([rng.choice(nodes).name, "unheard:0", "", "^x"])
        case 3 if node.attr:
            del node.attr[rng.choice(sorted(node.attr))]
        case 4 if node.attr:
            values = [value for other in nodes for value in other.attr.values()]
            node.attr[rng.choice(sorted(node.attr))].CopyFrom(rng.choice(values))
        case 5:
            constants = [n for n in nodes if n.op == "Const"] or [node]
            value = rng.choice(constants).attr["value"].tensor
            value.tensor_content = value.tensor_content[: len(value.tensor_content) // 2]
            del value.int_val[:], value.float_val[:]
        case 6:
            name = rng.choice(meta.graph_def.node).name
            output.name = rng.choice(["unheard:0", "", f"{name}:0", output.name[:-1] + "9"])
        case 7:
            del signature.outputs[rng.choice(sorted(signature.outputs))]
        case _:
            entry = signature.inputs[next(iter(signature.inputs))]
            entry.name, entry.dtype = rng.choice(
                [(entry.name, 7), (entry.name, 999), ("unheard:0", entry.dtype), ("", 0), (output.name, 1)]
            )


@pytest.mark.fuzz
@pytest.mark.zoo
@pytest.mark.parametrize("seed", range(variants(10)))
def test_a_damaged_saved_model_is_one_line(tmp_path, seed):
    """Or a file whose check passed, or failed and says so. Some make TensorFlow itself abort, which no Python code can catch."""
    import_tensorflow()
    from tensorflow.core.protobuf import saved_model_pb2

    export = tmp_path / "export"
    shutil.copytree(DEMO_MODEL, export)
    path = export / "saved_model" / "saved_model.pb"
    proto = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    damage(random.Random(seed), proto)
    path.write_bytes(proto.SerializeToString())
    done = command("--saved_model", export, "--onnx", tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.part*"))
    if done.returncode < 0:
        assert "Check failed" in done.stderr and "tensorflow::" in done.stderr
        return
    assert "Traceback" not in done.stderr
    if done.returncode == 2:
        line = done.stderr.strip().splitlines()[-1]
        assert line.startswith("create_onnx.py: ")
        assert str(export) in line
    else:
        assert ("FAILED" if done.returncode else "PASSED") in done.stdout
        assert done.returncode in (0, 1)


def test_a_search_that_finds_nothing_names_the_model():
    tf = import_tensorflow()
    with tf.Graph().as_default() as graph:
        tf.identity(tf.compat.v1.placeholder(tf.float32, [1, None, None, 3], name="image"), name="boxes")
    frozen = FrozenGraph(graph.as_graph_def(), "image:0", {"detection_boxes": "boxes"}, None)
    at_fault = pytest.raises(UserError, match=r"^exported/saved_model: the SavedModel's")
    with at_fault, naming_model("exported/saved_model", "cannot be converted"):
        find_preprocessed_images(frozen)


def test_outputs_of_other_shapes_are_refused():
    """Seed 110 of `make fuzz`."""
    with SavedModel(find_saved_model(DEMO_MODEL)) as model:
        outputs = dict(model.outputs)
        for name in model.OUTPUTS:
            model.outputs = {**outputs, name: outputs["raw_detection_boxes"]}
            with pytest.raises(UserError, match=r"its \w+ are no such thing"):
                model.detect(np.zeros((9, 9, 3), np.uint8))
        model.outputs = outputs
        model.detect(np.zeros((9, 9, 3), np.uint8))
