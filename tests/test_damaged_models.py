"""SavedModels that were damaged: a file that passes its check, or one line that names the model."""

import random
import shutil
import time

from commandline import UserError

import pytest
from conftest import DEMO_MODEL, variants

import create_onnx
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
            output.name = rng.choice(
                ["unheard:0", "", rng.choice(meta.graph_def.node).name + ":0", output.name[:-1] + "9"]
            )
        case 7:
            del signature.outputs[rng.choice(sorted(signature.outputs))]
        case _:
            entry = signature.inputs[next(iter(signature.inputs))]
            entry.name, entry.dtype = rng.choice(
                [(entry.name, 7), ("unheard:0", entry.dtype), ("", 0), (output.name, 1)]
            )


@pytest.mark.fuzz
@pytest.mark.zoo
def test_damaged_saved_models_are_one_line(tmp_path, capsys):
    import_tensorflow()
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    rng, outcomes = random.Random(23), {"file": 0, "line": 0}
    export = tmp_path / "export"
    shutil.copytree(DEMO_MODEL, export)
    sound = (export / "saved_model" / "saved_model.pb").read_bytes()
    for number in range(variants(20)):
        proto = SavedModel.FromString(sound)
        damage(rng, proto)
        (export / "saved_model" / "saved_model.pb").write_bytes(proto.SerializeToString())
        onnx = tmp_path / f"{number}.onnx"
        begun = time.monotonic()
        try:
            status = create_onnx.main(["--saved_model", str(export), "--onnx", str(onnx)])
            assert onnx.exists() and status in (0, 1)
            outcomes["file"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            assert str(export) in str(error) or "pipeline.config" in str(error), error
            assert not onnx.exists()
            outcomes["line"] += 1
        assert time.monotonic() - begun < 120
        capsys.readouterr()
    assert min(outcomes.values()) > 2
