"""The converted model gives TensorFlow's detections: on the same tensor, from the same file, for every batch size."""

import json
import re
import time

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import DEMO, ROWS, ZOO_ONLY, need_shared
from PIL import Image

from checks import parity
from images.decoding import load_image
from images.resizing import preprocess
from runtimes.detector import detect_image

pytestmark = pytest.mark.models
zoo = pytest.mark.zoo
ALL = ["demo", "fpnlite", "hands"]
LARGE = [
    "fpnlite_float",
    "mobilenet_v2",
    "mobilenet_v1_fpn",
    "resnet50_fpn",
    "faster_rcnn_640",
    "faster_rcnn_1333",
    "mask_rcnn",
    *ZOO_ONLY,
]
ALL += [pytest.param(key, marks=zoo) for key in LARGE]
ALL += ["tf1_2018_ssd", *(pytest.param(key, marks=zoo) for key in ("tf1_2018_faster_rcnn", "tf1_ssd"))]
# Of which all batch sizes and layouts are run.
ZOO_BATCHES = ("fpnlite", *ZOO_ONLY)
# Pictures to look at, where one takes seconds, or the test is one of `make test`'s longest.
SLOW = {"faster_rcnn_640": 5, "faster_rcnn_1333": 3, "mask_rcnn": 2, "tf1_2018_ssd": 4, "tf1_2018_faster_rcnn": 1}

TRAINED = {"demo", "fpnlite", "fpnlite_float", "hands"}
# Boxes (normalised) and scores. The models with made-up weights are so noisy that TensorFlow with and without oneDNN
# disagrees with itself by 3.1e-4 (mobilenet_v2), 4.6e-5 (mobilenet_v1_fpn) and 3.5e-4 (resnet50_fpn) on these images.
TOLERANCE = {"mobilenet_v2": 1e-3, "mobilenet_v1_fpn": 3e-4, "resnet50_fpn": 1e-3}
TOLERANCE |= {"tf1_ssd": 1e-3, "tf1_2018_ssd": 1e-3, "tf1_2018_faster_rcnn": 2e-3}
# Of EfficientDet D0, whose preprocessed input is moved by 1e-5, TensorFlow's boxes differ by 1.4e-3 and its scores by 1.9e-3.
TOLERANCE |= {"efficientdet": 1e-3}
TOLERANCE |= {"faster_rcnn_640": 2e-3, "faster_rcnn_1333": 2e-3, "mask_rcnn": 2e-3}


def test_images(count, key):
    """Some pictures of the kind that the model was trained on."""
    if key == "demo":
        return sorted((DEMO / "images").glob("*.jpg"))
    files = sorted(need_shared("coco", "val2017").glob("*.jpg"))
    if key == "tf1_2018_faster_rcnn":  # converted for 480x640
        files = [path for path in files if Image.open(path).size == (640, 480)]
    return files[: SLOW.get(key, count)]


test_images.__test__ = False


@pytest.mark.parametrize("key", ALL)
def test_same_tensor(key, convert, detector, saved_model):
    tolerance = TOLERANCE.get(key, 1e-4)
    model, theirs = detector(key, "--batch_size", "dynamic"), saved_model(key)
    reports = []
    for path in test_images(12, key):
        report = parity.compare(theirs, model, load_image(path), tie=tolerance)
        assert report.unmatched <= parity.allowed_unmatched(model.metadata), path
        assert report.compared >= 94, path
        assert report.box_difference <= tolerance, path
        assert report.score_difference <= tolerance, path
        assert report.mask_difference <= 1e-3, path
        assert report.keypoint_difference <= tolerance, path
        assert report.keypoints_elsewhere <= parity.allowed_elsewhere(report), path
        assert report.keypoints or key != "centernet_keypoints"
        reports.append(report)
    record_row(key, convert, reports, model, theirs, load_image(path))


def record_row(key, convert, reports, model, theirs, image):
    """Adds the model to the table that conftest prints."""
    times = []
    for detect in (theirs.detect, lambda image: detect_image(model, image)):
        begun = time.perf_counter()
        detect(image)
        times.append(f"{1000 * (time.perf_counter() - begun):.0f}")
    largest = [max(getattr(r, f"{part}_difference") for r in reports) for part in ("box", "score", "mask")]
    seconds = re.search(r"Converted in ([\d.]+) s", convert(key, "--batch_size", "dynamic")[1])[1]
    ROWS[model.metadata["source"]] = (
        "trained" if key in TRAINED else "made up",
        f"`{model.metadata['architecture']}`",
        str(model.metadata["num_classes"]),
        f"{model.input.height}x{model.input.width}{', keep aspect' if model.input.true_shape else ''}",
        seconds,
        *(f"{value:.1e}" for value in largest[:2]),
        f"{largest[2]:.1e}" if model.metadata["mask_size"] else "-",
        *times,
    )


@pytest.mark.parametrize("key", ALL)
def test_same_file(key, detector, saved_model):
    """From the image file, TensorFlow's own resizer on one side, ours on the other."""
    model = detector(key, "--batch_size", "dynamic")
    seen = 0
    for path in test_images(16, key):
        image = load_image(path)
        theirs = parity.tensorflow_detections(saved_model(key), image, model.metadata)
        ours = detect_image(model, image)
        for a, b in ((theirs, ours), (ours, theirs)):
            unmatched = parity.match_by_overlap(a, b, min_iou=0.98, max_score_difference=0.01)
            # Of 300, one may be decided by an overlap that the noise of resizing moves across the NMS's threshold.
            allowed = max(parity.allowed_unmatched(model.metadata), len(a.scores) // 200)
            assert sum(a.scores[unmatched] >= 0.1) <= allowed, path
        if theirs.keypoints is not None:
            same_keypoints(theirs, ours, path)
        seen += int((theirs.scores >= 0.1).sum())
    assert seen >= 20, "too few detections to prove anything"


def same_keypoints(theirs, ours, path):
    """Of the same objects, where resized pixels differ: nearly all that found a peak lie at the same one."""
    iou = parity.box_iou(theirs.boxes, ours.boxes) * (np.abs(theirs.scores[:, None] - ours.scores[None]) < 0.01)
    pairs = [(i, int(row.argmax())) for i, row in enumerate(iou) if row.max() >= 0.98]
    places, _ = parity.keypoint_differences(theirs, ours, pairs)
    assert len(places) >= 17 * 50, path
    assert (places > parity.FAR).mean() <= 0.01, path


def test_boxes_of_2018_are_clipped_before_suppression(convert):
    """What goes into the NMS of such an export; later ones clip what comes out."""
    model = gs.import_onnx(onnx.load(convert("tf1_2018_ssd", "--batch_size", "dynamic")[0]))
    (nms,) = [node for node in model.nodes if node.op == "EfficientNMS_TRT"]
    before = nms.inputs[0].inputs[0]
    assert {node.op for node in (before, before.inputs[0].inputs[0])} == {"Reshape", "Clip"}


@pytest.mark.parametrize("key", ["demo", *(pytest.param(key, marks=zoo) for key in ZOO_BATCHES)])
def test_every_batch_size_and_layout_gives_the_same(key, detector):
    pictures = [load_image(path) for path in test_images(4, key)[:4]]
    reference = detector(key, "--batch_size", "dynamic")
    tensors, places = zip(*(preprocess(image, reference.metadata["resizer"]) for image in pictures), strict=True)
    batch, shapes = np.stack(tensors), [place.true_shape for place in places]
    wanted = [reference.infer(image[None], [shape])[0] for image, shape in zip(batch, shapes, strict=True)]
    for options in (
        (),
        ("--batch_size", "4"),
        ("--batch_size", "dynamic"),
        ("--input_format", "NCHW", "--batch_size", "3"),
    ):
        model = detector(key, *options)
        size = model.input.batch or 4
        found = [d for i in range(0, 4, size) for d in model.infer(batch[i : i + size], shapes[i : i + size])]
        for a, b in zip(wanted, found, strict=True):
            report = parity.match_by_rank(a, b)
            assert (report.unmatched, report.compared) == (0, len(a.scores))
            assert max(report.box_difference, report.score_difference, report.keypoint_difference) < 1e-5
            assert report.keypoints_elsewhere == 0


@pytest.mark.parametrize("key", ["demo", *(pytest.param(key, marks=zoo) for key in ZOO_BATCHES)])
def test_uint8_input_takes_rounded_pixels(key, detector):
    wide, narrow = detector(key), detector(key, "--input_type", "uint8")
    assert narrow.input.dtype == np.uint8
    for path in test_images(8, key):
        tensor, place = preprocess(load_image(path), wide.metadata["resizer"])
        shape = [place.true_shape]
        report = parity.match_by_rank(wide.infer(np.rint(tensor)[None], shape)[0], narrow.infer(tensor[None], shape)[0])
        assert (report.unmatched, report.box_difference < 1e-5, report.score_difference < 1e-5) == (0, True, True)


def test_demo_finds_the_shapes(detector):
    """The demo's model is worth showing: from 0.3 on it finds each shape of its pictures, of the right class, and nothing else."""
    truth = json.loads((DEMO / "instances_shapes.json").read_text())
    model = detector("demo")
    for entry in truth["images"]:
        image = load_image(DEMO / "images" / entry["file_name"])
        found = detect_image(model, image).above(0.3)
        notes = [note for note in truth["annotations"] if note["image_id"] == entry["id"]]
        corners = np.float32([note["bbox"] for note in notes]) @ np.float32(
            [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
        )
        iou = parity.box_iou(corners, found.boxes * np.float32(image.shape[:2] * 2))
        wanted = [note["category_id"] - model.metadata["class_offset"] for note in notes]
        assert (iou.max(axis=1) > 0.8).all(), entry["file_name"]
        assert found.classes[iou.argmax(axis=1)].tolist() == wanted, entry["file_name"]
        assert len(found.scores) == len(notes) >= 2, entry["file_name"]
    assert len(truth["images"]) == 8


@pytest.mark.zoo
def test_average_precision_is_tensorflows(detector, saved_model, coco_images):
    """COCO AP on the 188 images: 0.250 and AP50 0.407 with TensorFlow."""
    from checks.coco import average_precision

    annotations = need_shared("coco", "instances_val2017_subset.json")
    model = detector("fpnlite", "--batch_size", "dynamic")

    def ours(image):
        return detect_image(model, image)

    def theirs(image):
        return parity.tensorflow_detections(saved_model("fpnlite"), image, model.metadata)

    a, b = (average_precision(annotations, coco_images, detect, class_offset=1) for detect in (ours, theirs))
    print(f"AP {a[0]:.4f} AP50 {a[1]:.4f}; TensorFlow {b[0]:.4f} {b[1]:.4f}")
    assert abs(a[0] - b[0]) <= 0.001
    assert abs(a[1] - b[1]) <= 0.001
    assert abs(b[0] - 0.250) <= 0.001
