"""EfficientDet on a tiny export of the project's own: BiFPN's weighted sums, and padding with the mean colour."""

import numpy as np
import onnx
import pytest
from conftest import DEMO
from PIL import Image

import create_onnx
from checks import parity
from demo import tiny_efficientdet as tiny
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector, precision
from runtimes.detector import detect_image
from tfod.config import read_pipeline_config
from tfod.saved_model import SavedModel

PICTURES = sorted((DEMO / "images").glob("*.jpg"))


@pytest.fixture(scope="module", params=["D0 to D5", pytest.param("D6 and D7", marks=pytest.mark.zoo)])
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "efficientdet"
    tiny.save_export(folder, weighted=request.param == "D0 to D5")
    return folder


@pytest.fixture(scope="module")
def converted(exported, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    options = ["--saved_model", str(exported), "--onnx", str(path), "--batch_size", "dynamic"]
    assert create_onnx.main(options) == 0
    return path


def test_detections_are_tensorflows(exported, converted):
    """Also of a panorama and a column, most of whose input is padding."""
    pictures = [load_image(path) for path in PICTURES[:4]]
    pictures += [np.asarray(Image.open(PICTURES[i]).resize(size)) for i, size in ((1, (960, 160)), (2, (60, 400)))]
    with open_detector(converted) as model, SavedModel(exported / "saved_model") as saved_model:
        for image in pictures:
            theirs = parity.tensorflow_detections(saved_model, image, model.metadata)
            ours = detect_image(model, image)
            report = parity.match_by_rank(theirs, ours)
            assert report.compared >= 50
            assert report.unmatched == 0, image.shape
            assert report.box_difference <= 1e-4, image.shape
            assert report.score_difference <= 1e-4, image.shape
        tensors, places = zip(*(preprocess(x, model.metadata["resizer"]) for x in pictures), strict=True)
        together = model.infer(np.stack(tensors), np.float32([place.true_shape for place in places]))
        for image, found in zip(pictures, together, strict=True):
            report = parity.match_by_rank(detect_image(model, image), found)
            assert (report.unmatched, report.box_difference < 1e-5) == (0, True)


def test_the_padding_is_the_mean_colour(converted):
    """Normalised first, padded with zeros after; black, had it been the other way round."""
    with open_detector(converted) as model:
        resizer = model.metadata["resizer"]
        np.testing.assert_allclose(resizer["pad_value"], np.float32(tiny.MEAN) * 255, atol=0.01)
        tensor, _ = preprocess(np.zeros((40, 160, 3), np.uint8), resizer)
        np.testing.assert_allclose(tensor[-1, -1], np.float32(tiny.MEAN) * 255, atol=0.01)


@pytest.mark.parametrize("exported", ["D0 to D5"], indirect=True)
def test_features_are_summed_without_matrix_products(converted):
    ops = [node.op_type for node in onnx.load(converted).graph.node]
    assert not {"MatMul", "Einsum"} & set(ops)
    assert ops.count("Resize") == 2, "upsampling as one op each"


def test_it_is_supported(exported, capsys):
    read_pipeline_config(exported / "pipeline.config")
    assert capsys.readouterr().err == ""


def test_features_are_half_and_boxes_are_not(converted):
    model = precision.to_half(onnx.load(converted))
    types = {x.name: x.type.tensor_type.elem_type for x in onnx.shape_inference.infer_shapes(model).graph.value_info}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert {types[node.output[0]] for node in convolutions} == {onnx.TensorProto.FLOAT16}
    assert {types[node.output[0]] for node in model.graph.node if node.op_type == "Exp"} == {onnx.TensorProto.FLOAT}
