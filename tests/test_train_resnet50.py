"""benchmarks/train_resnet50.py, as far as it needs neither PyTorch nor a GPU."""

import argparse
import json
import re

from commandline import UserError

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DEMO, EXPORTS, model_folder

from benchmarks import train_resnet50 as training
from benchmarks import trainable
from demo import tiny_mask_rcnn as tiny
from demo import train_demo_ssd as demo
from images.decoding import load_image
from images.resizing import resize_image
from tfod.saved_model import SavedModel, find_saved_model
from tfod.tensorflow_import import import_tensorflow

PICTURE = DEMO / "images" / "shapes_01.jpg"


def iou(a, b):
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inter = np.prod(sides.clip(min=0))
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


def expected_match(boxes, anchors):
    """Written out box by box: the object of most overlap from 0.5 on, but an object's best anchor is its own."""
    table = np.array([[iou(box, anchor) for anchor in anchors] for box in boxes]).reshape(len(boxes), len(anchors))
    rows = [int(column.argmax()) if len(boxes) and column.max() >= 0.5 else -1 for column in table.T]
    for row in reversed(range(len(boxes))):  # of two with the same best anchor the first has it
        rows[int(table[row].argmax())] = row
    return rows


def test_each_anchor_is_to_find_one_object_or_none():
    anchors = demo.make_anchors()
    scenes = [training.draw_picture(number, side=160)[1] for number in range(3)]
    scenes.append(
        np.array([[0.4, 0.4, 0.402, 0.402], [0.4, 0.4, 0.403, 0.403]])
    )  # tiny: the same best anchor, hardly met
    scenes.append(np.zeros((0, 4)))
    boxes, real = np.zeros((5, 20, 4), np.float32), np.zeros((5, 20), bool)
    for i, scene in enumerate(scenes):
        boxes[i, : len(scene)], real[i, : len(scene)] = scene, True
    found = training.match(np, boxes, real, anchors)
    expected = [expected_match(boxes[i, : len(scene)], anchors) for i, scene in enumerate(scenes)]
    np.testing.assert_array_equal(found, expected)
    assert (found[:3] >= 0).sum() > 50 and sorted(set(found[3])) == [-1, 0] and (found[4] == -1).all()


def decode(codes, anchors):
    """Boxes [N, 4] yxyx of what anchors [N, 4] predict (TFOD: FasterRcnnBoxCoder._decode)."""
    codes, size = codes / np.float32(demo.BOX_SCALES), anchors[:, 2:] - anchors[:, :2]
    centre, half = (anchors[:, :2] + anchors[:, 2:]) / 2 + codes[:, :2] * size, np.exp(codes[:, 2:]) * size / 2
    return np.hstack([centre - half, centre + half])


def test_what_an_anchor_is_to_predict_decodes_to_its_object():
    """Codes and classes are those that the demo's own training has."""
    anchors = demo.make_anchors()
    _, boxes, classes = training.draw_picture(5, side=160)
    boxes = boxes.astype(np.float32)
    rows = training.match(np, boxes[None], np.ones((1, len(boxes)), bool), anchors)[0]
    matched = rows >= 0
    codes = training.encode(np, boxes[rows[matched]], anchors[matched])
    np.testing.assert_allclose(decode(codes, anchors[matched]), boxes[rows[matched]], atol=1e-6)
    demo_codes, demo_classes, demo_matched, _ = demo.encode(boxes, classes, anchors)
    np.testing.assert_array_equal(matched, demo_matched == 1)
    np.testing.assert_allclose(codes, demo_codes[matched], atol=1e-5)
    np.testing.assert_array_equal(classes[rows[matched]], demo_classes[matched].argmax(1))


def test_pictures_are_drawn_once_for_each_number(tmp_path):
    """In whatever process: training.npy holds what draw_picture gives, the held-out pictures are others, and annotated."""
    count = training.BLOCK + 1
    training.draw(argparse.Namespace(folder=tmp_path, pictures=count, held_out=2, calibration=1, processes=1))
    pixels, objects = np.load(tmp_path / "training.npy", mmap_mode="r"), np.load(tmp_path / "objects.npz")
    assert pixels.shape == (count, 640, 640, 3)
    for number in (0, count - 1):
        picture, boxes, classes = training.draw_picture(number)
        np.testing.assert_array_equal(pixels[number], picture)
        np.testing.assert_array_equal(objects["boxes"][number, : len(boxes)], boxes.astype(np.float32))
        assert objects["classes"][number].tolist() == [*classes, *[-1] * (training.PLACES - len(classes))]
        assert len(classes) and (boxes >= 0).all() and (boxes[:, 2:] <= 1).all()
    truth = json.loads((tmp_path / "held_out" / "instances_shapes.json").read_text())
    assert [image["file_name"] for image in truth["images"]] == ["shapes_01.jpg", "shapes_02.jpg"]
    assert {x["category_id"] for x in truth["annotations"]} <= {1, 2, 3, 4, 5} and len(truth["annotations"]) > 4
    first = [next((tmp_path / name / "images").glob("*_01.jpg")).read_bytes() for name in ("held_out", "calibration")]
    assert first[0] != first[1]
    assert not list(tmp_path.rglob("*.part*"))


def test_a_written_model_has_the_given_weights_and_all_others(tmp_path):
    """The class predictors' biases raised by 1: every logit of TensorFlow's is higher by 1, every box the same."""
    folder = find_saved_model(model_folder("demo"))
    reader = import_tensorflow().train.load_checkpoint(str(folder / trainable.BUNDLE))
    keys = trainable.checkpoint_keys(folder)
    biases = {name: reader.get_tensor(keys[name]) + 1 for name in keys if re.fullmatch(r"class_\d/bias", name)}
    assert len(biases) == len(demo.GRIDS)
    trainable.write_saved_model(folder, biases, tmp_path)
    found = []
    for path in (folder, find_saved_model(tmp_path)):
        with SavedModel(path) as saved_model:
            found.append(saved_model.detect(load_image(PICTURE)))
    before, after = (result["raw_detection_scores"].astype(np.float64) for result in found)
    likely = before > 1e-3  # of the others float32 leaves too little
    np.testing.assert_allclose(after[likely], 1 / (1 + np.exp(-1) * (1 / before[likely] - 1)), rtol=1e-4)
    np.testing.assert_array_equal(*(result["raw_detection_boxes"] for result in found))


@pytest.mark.zoo
@pytest.mark.parametrize("key", ["demo", "resnet50_fpn"])
def test_the_exported_network_with_changed_weights_is_the_written_model(key, tmp_path):
    """TensorFlow's results of the written SavedModel are those of the exported network with the same changed weights."""
    folder = model_folder(key)
    network, anchors = trainable.export_network(folder)
    side = network.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    image = np.rint(resize_image(load_image(PICTURE), side, side)).astype(np.uint8)
    before = scores_and_codes(network, image)
    names, rng, weights = trainable.checkpoint_keys(find_saved_model(folder)), np.random.default_rng(0), {}
    for tensor in network.graph.initializer:
        if tensor.name in names:
            values = onnx.numpy_helper.to_array(tensor)
            weights[tensor.name] = (values * rng.uniform(0.95, 1.05, values.shape)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    assert weights.keys() == names.keys()
    trainable.write_saved_model(folder, weights, tmp_path)
    for name in ("saved_model/saved_model.pb", "pipeline.config"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    scores, codes = scores_and_codes(network, image)
    assert np.abs(before[0] - scores).max() > 0.02
    with SavedModel(find_saved_model(tmp_path)) as saved_model:
        wanted = saved_model.detect(image)
    assert np.abs(scores - wanted["raw_detection_scores"]).max() < 1e-3
    assert np.abs(decode(codes, anchors) - wanted["raw_detection_boxes"]).max() < 1e-3


def scores_and_codes(network, image):
    """What an exported network gives for an image [H, W, 3]: the second of a batch, so that any batch is seen to go."""
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.stack([image[::-1], image]).astype(np.float32)
    logits, codes = session.run(["logits", "encodings"], {"input_tensor": images})
    return 1 / (1 + np.exp(-logits[1])), codes[1].reshape(-1, 4)


def test_weights_of_another_model_are_refused(tmp_path):
    name = min(trainable.checkpoint_keys(find_saved_model(demo_folder := model_folder("demo"))))
    for weights in ({"no/such": np.zeros(3)}, {name: np.zeros((1, 2, 3, 5))}):
        with pytest.raises(UserError, match="it is of another model"):
            trainable.write_saved_model(demo_folder, weights, tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_a_model_of_two_stages_is_refused(tmp_path):
    (tmp_path / "saved_model.pb").touch()
    (tmp_path / "pipeline.config").write_text(tiny.pipeline_config(EXPORTS["faster"]))
    with pytest.raises(UserError, match="it is no SSD"):
        trainable.export_network(tmp_path)


def test_a_stage_names_the_stage_before_it(tmp_path):
    with pytest.raises(UserError, match=r"trained\.onnx is missing: the stage train writes it"):
        training.main(["write", "--folder", str(tmp_path), "--saved_model", str(model_folder("demo"))])
    assert not list(tmp_path.iterdir())
