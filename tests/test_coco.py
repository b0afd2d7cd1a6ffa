"""eval_coco.py: COCO's numbers are right, whatever the annotations and images are like, and the report shows them."""

import csv
import datetime
import json
import multiprocessing
import os
import shutil

from commandline import UserError
from commandline.version import VERSION

import numpy as np
import pytest
from browser import open_page
from conftest import DEMO, need_shared
from PIL import Image

import create_onnx
import eval_coco
from checks import coco, parity
from demo import tiny_mask_rcnn as tiny
from images.decoding import load_image
from runtimes import open_detector, workers
from runtimes.detector import Detections, detect_image
from tfod.saved_model import SavedModel, find_saved_model

LIBRARIES = [(coco.COCO, coco.PycocotoolsEvaluation), coco.LIBRARY]
TRUTH = DEMO / "instances_shapes.json"


def write_annotations(path, images, notes, categories=(1, 2)):
    """images: {id: (file name, height, width)}; notes: dicts of annotations without id."""
    content = {
        "images": [{"id": key, "file_name": name, "height": h, "width": w} for key, (name, h, w) in images.items()],
        "categories": [{"id": key, "name": f"thing {key}"} for key in categories],
        "annotations": [{"id": i, "iscrowd": 0, **note} for i, note in enumerate(notes)],  # the first id is 0
    }
    path.write_text(json.dumps(content))
    return path


def ellipse(height, width):
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return y**2 + x**2 <= 1.05


def perfect_case(folder):
    """Annotations with boxes and masks of 3 images, and Detections that hold exactly these."""
    rng = np.random.default_rng(0)
    images, notes, found = {}, [], {}
    for image_id in (11, 12, 13):
        height, width = (int(v) for v in rng.integers(150, 300, 2))
        images[image_id] = f"{image_id}.png", height, width
        h, w = (int(v) for v in rng.integers(20, 60, 2))  # one size an image, as a network's masks have
        inside = ellipse(h, w)
        boxes, classes = [], []
        for place in range(4):
            top, left = place * (height - h) // 4, int(rng.integers(0, width - w))
            canvas = np.zeros((height, width), np.uint8, order="F")
            canvas[top : top + h, left : left + w] = inside
            encoded = coco.rle.encode(canvas)
            encoded["counts"] = encoded["counts"].decode()
            category = 1 + place % 2
            area = int(inside.sum())
            note = {"image_id": image_id, "category_id": category, "bbox": [left, top, w, h], "area": area}
            notes.append({**note, "segmentation": encoded})
            boxes.append([top / height, left / width, (top + h) / height, (left + w) / width])
            classes.append(category - 1)
        masks = np.repeat(inside[None].astype(np.float32), 4, axis=0)
        found[image_id] = Detections(np.float32(boxes), np.float32([0.9, 0.8, 0.7, 0.6]), np.int32(classes), masks)
    return write_annotations(folder / "perfect.json", images, notes), images, found


@pytest.mark.parametrize("kind", ["bbox", "segmentation"])
def test_a_perfect_detector_scores_one(kind, tmp_path):
    path, images, found = perfect_case(tmp_path)
    truth = coco.load_annotations(path)
    results = []
    for key, (_, height, width) in images.items():
        results += coco.results_of(found[key], key, (height, width), 1, 0.5 if kind == "segmentation" else None)
    for library in LIBRARIES:
        evaluation = coco.evaluate(truth, results, images, kind, library)
        assert evaluation.numbers["AP"] == pytest.approx(1)
    assert evaluation.numbers["AR_100"] == pytest.approx(1)
    assert coco.find_mistakes(truth, results, images, kind) == ([], [])
    assert [row[2:] for row in evaluation.classes] == [(6, pytest.approx(1), pytest.approx(1))] * 2

    swapped = [{**entry, "category_id": 3 - entry["category_id"]} for entry in results]
    evaluation = coco.evaluate(truth, swapped, images, kind)
    assert evaluation.numbers["AP"] < 0.05
    missed, false_alarms = coco.find_mistakes(truth, swapped, images, kind)
    assert len(missed) == len(false_alarms) == 12
    assert false_alarms[0].weight == pytest.approx(0.9)
    assert [mistake.weight for mistake in missed] == sorted((mistake.weight for mistake in missed), reverse=True)


@pytest.mark.parametrize("kind", ["bbox", "segmentation"])
@pytest.mark.parametrize("classes", [2, 7])
def test_classes_shared_out_to_processes_give_the_same(kind, classes, tmp_path, monkeypatch):
    """Detections of which some are right, in as many classes as there are processes or in more."""
    path, images, found = perfect_case(tmp_path)
    content = json.loads(path.read_text())
    rng = np.random.default_rng(4)
    for note in content["annotations"]:
        note["category_id"] = int(rng.integers(1, classes + 1))
    content["categories"] = [{"id": key, "name": f"class {key}"} for key in (9, *range(1, classes + 1))]
    path.write_text(json.dumps(content))
    truth = coco.load_annotations(path)
    results = []
    for key, (_, height, width) in images.items():
        results += coco.results_of(found[key], key, (height, width), 1, 0.5 if kind == "segmentation" else None)
    results = [
        {**entry, "category_id": int(rng.integers(1, classes + 2)), "score": rng.random()} for entry in results * 18
    ]
    alone = coco.evaluate(truth, results, images, kind)
    assert len(results) >= workers.PROCESSES_FROM_IMAGES
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(coco, "SHARED_OUT_FROM", len(results))
    monkeypatch.setattr(coco, "_indexed", lambda *_: pytest.fail("it is measured in this process"))
    shared = coco.evaluate(truth, results, images, kind)
    assert 0.1 < alone.numbers["AP"] < 0.9
    assert shared.numbers == alone.numbers
    assert shared.classes == alone.classes
    for one, other in ((shared.curves, alone.curves), (shared.class_curves, alone.class_curves)):
        assert list(one) == list(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize(("more", "categories"), [(1, 8), (0, 2)], ids=["few results", "few classes"])
def test_few_are_measured_in_this_process(more, categories, tmp_path, monkeypatch):
    path, images, found = perfect_case(tmp_path)
    content = json.loads(path.read_text())
    content["categories"] = [{"id": key} for key in range(1, categories + 1)]
    content["annotations"] = [{**note, "category_id": 1} for note in content["annotations"]]
    path.write_text(json.dumps(content))
    truth = coco.load_annotations(path)
    results = [entry for key, (_, *size) in images.items() for entry in coco.results_of(found[key], key, size, 1)]
    results = [{**entry, "category_id": 1} for entry in results] * 18
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(coco, "SHARED_OUT_FROM", len(results) + more)
    monkeypatch.setattr(coco, "_share_out", lambda *_: pytest.fail("processes were started"))
    assert coco.evaluate(truth, results, images).numbers["AR_100"] == 1


def test_nothing_found_scores_zero(tmp_path):
    path, images, _ = perfect_case(tmp_path)
    truth = coco.load_annotations(path)
    for library in LIBRARIES:
        assert coco.evaluate(truth, [], images, "segmentation", library).numbers["AP"] == 0
    missed, false_alarms = coco.find_mistakes(truth, [], images, "segmentation")
    assert (len(missed), len(false_alarms)) == (12, 0)


def test_a_crowd_is_neither_missed_nor_a_false_alarm(tmp_path):
    whole = {"size": [100, 100], "counts": [0, 10000]}
    crowd = {
        "image_id": 1,
        "category_id": 1,
        "bbox": [0, 0, 100, 100],
        "area": 10000,
        "iscrowd": 1,
        "segmentation": whole,
    }
    single = {"image_id": 1, "category_id": 2, "bbox": [10, 10, 20, 20], "area": 400}
    truth = coco.load_annotations(write_annotations(tmp_path / "a.json", {1: ("a.png", 100, 100)}, [crowd, single]))
    boxes = np.float32([[0.5, 0.5, 0.7, 0.7], [0.1, 0.1, 0.3, 0.3]])
    found = Detections(boxes, np.float32([0.9, 0.8]), np.int32([0, 1]))
    results = coco.results_of(found, 1, (100, 100), 1)
    evaluation = coco.evaluate(truth, results, [1])
    assert evaluation.numbers["AP"] == pytest.approx(1)  # of the class that has an object that is not a crowd
    assert coco.find_mistakes(truth, results, [1]) == ([], [])
    assert [row[2] for row in evaluation.classes] == [0, 1]


def test_detections_that_are_kept_hold_nothing_of_their_batch():
    """eval_coco.py keeps all of them until the end; a detector gives views of what its network gave for a batch."""
    batch = np.arange(4000, dtype=np.float32)
    views = Detections(batch[:8].reshape(2, 4), batch[8:10], np.int32([0, 1]))
    kept = views.alone()
    assert not any(
        np.shares_memory(batch, part) or part.base is not None for part in (kept.boxes, kept.scores, kept.classes)
    )
    np.testing.assert_array_equal(kept.boxes, views.boxes)
    assert kept.masks is None


def test_a_miss_says_what_is_there_instead(tmp_path):
    """Another class, the right one with a low score, or nothing."""
    path = write_annotations(
        tmp_path / "a.json",
        {1: ("a.jpg", 100, 100)},
        [{"image_id": 1, "category_id": 1, "bbox": [x, 0, 20, 20], "area": 400} for x in (0, 30, 60)],
        categories=(1, 2),
    )
    truth = coco.load_annotations(path)
    found = [(0, 2, 0.8), (0, 2, 0.9), (30, 1, 0.1)]
    results = [{"image_id": 1, "category_id": c, "bbox": [x, 1, 20, 20], "score": s} for x, c, s in found]
    missed, _ = coco.find_mistakes(truth, results, [1])
    texts = {mistake.box[0]: eval_coco.found_instead(mistake, truth) for mistake in missed}
    assert texts == {0: "found there: thing 2 0.90", 30: "found, but with 0.10", 60: "nothing found there"}


def test_files_are_matched_by_name_then_by_number(tmp_path):
    images = {7: ("folder/a photo.jpg", 10, 10), 8: ("8.jpg", 10, 10), 139: ("", 10, 10)}
    note = {"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "area": 1}
    truth = coco.load_annotations(write_annotations(tmp_path / "a.json", images, [note]))
    known, unknown, absent = coco.match_images(
        truth, ["x/a photo.jpg", "x/000000000139.png", "x/other.jpg", "x/99.jpg"]
    )
    assert {path.name: key for path, key in known.items()} == {"a photo.jpg": 7, "000000000139.png": 139}
    assert [path.name for path in unknown] == ["other.jpg", "99.jpg"]
    assert absent == [8]


def evaluate(capsys, *options):
    """Runs the script; returns (what it printed, what it warned)."""
    assert eval_coco.main([str(option) for option in options]) == 0
    return capsys.readouterr()


def test_the_demo_in_numbers_and_files(demo_model, tmp_path, capsys):
    printed = evaluate(
        capsys, "--engine", demo_model, "--input", DEMO / "images", "--annotations", TRUTH, "--output", tmp_path / "out"
    )
    assert printed.out.startswith("8 annotated images; left out: 0 files")
    assert str(tmp_path / "out" / "report.html") in printed.out.splitlines()[-1]
    assert not printed.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    with open_detector(demo_model) as detector:
        files = sorted((DEMO / "images").glob("*.jpg"))
        ap, ap50 = coco.average_precision(TRUTH, files, lambda image: detect_image(detector, image), 1)
    assert (metrics["AP"], metrics["AP50"], metrics["images"]) == (pytest.approx(ap), pytest.approx(ap50), 8)
    assert ap50 > 0.8
    with open(tmp_path / "out" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert np.mean([float(row["AP"]) for row in rows]) == pytest.approx(ap, abs=1e-3)
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {entry["image_id"] for entry in results} == set(range(1, 9))
    truth = coco.load_annotations(TRUTH)
    assert coco.evaluate(truth, results, range(1, 9)).numbers["AP"] == pytest.approx(ap)

    text, pictures, broken, outside, wide = open_page(tmp_path / "out" / "report.html")
    assert f"AP, IoU 0.50:0.95 {ap:.3f}" in text
    assert f"AP, IoU 0.50 {ap50:.3f}" in text
    assert "recall" in text  # the plot's text is text
    assert (broken, outside, wide) == (0, 0, False)
    assert pictures == (tmp_path / "out" / "report.html").read_text().count("<img")
    assert all(name in text for name in ("circle", "square", "triangle", "star", "ring"))
    assert f"version {VERSION}" in text
    assert "onnxruntime" in text
    assert f"{datetime.date.today()}" in text
    _, _, _, outside, wide = open_page(tmp_path / "out" / "report.html", width=500)  # a phone
    assert (outside, wide) == (0, False)


def end(*_):
    assert multiprocessing.parent_process(), "it is measured in this process"
    os._exit(1)


def test_a_process_that_ends_while_it_measures_is_one_line(tmp_path, monkeypatch):
    path, images, found = perfect_case(tmp_path)
    content = json.loads(path.read_text())
    content["categories"] += [{"id": key} for key in (98, 99)]
    path.write_text(json.dumps(content))
    truth = coco.load_annotations(path)
    results = [entry for key, (_, *size) in images.items() for entry in coco.results_of(found[key], key, size, 1)] * 18
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(coco, "SHARED_OUT_FROM", len(results))
    monkeypatch.setattr(coco, "_measure", end)
    with pytest.raises(UserError, match="the system ended a process of this one; if memory is short, free some"):
        coco.evaluate(truth, results, images)


@pytest.mark.parametrize(("decoder", "processes"), [(None, True), ("the GPU's", False)])
def test_no_process_starts_to_decode_where_the_gpu_does(decoder, processes, demo_model, monkeypatch):
    """It would take processors from the threads that feed the GPU. (Ctrl-C before the first image: here no GPU decodes.)"""
    seen = []

    def stop(*given):
        seen.append(given[3].processes)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    monkeypatch.setattr(workers, "PROCESSES_FROM_IMAGES", 8)
    monkeypatch.setattr(eval_coco, "choose_decoder", lambda *_: decoder)
    monkeypatch.setattr(eval_coco, "detect", stop)
    options = ["--engine", str(demo_model), "--input", str(DEMO / "images"), "--annotations", str(TRUTH)]
    assert eval_coco.main(options) == 130
    assert seen == [processes]


def test_turned_photos_in_several_folders(demo_model, turned_demo, tmp_path, capsys):
    """--exif_rotate gives the numbers, and the report's pictures, of the same photos stored upright."""
    common = ("--engine", demo_model, "--annotations", TRUTH)
    upright = evaluate(capsys, *common, "--input", DEMO / "images").out.splitlines()
    turned = evaluate(capsys, *common, "--input", *turned_demo, "--exif_rotate", "--output", tmp_path).out.splitlines()
    assert turned[0] == upright[0].replace(str(DEMO / "images"), f"{turned_demo[0]} and 1 more")
    assert turned[2:14] == upright[2:14]
    lain = evaluate(capsys, *common, "--input", *turned_demo).out.splitlines()
    assert lain[2] != upright[2]


def test_images_and_annotations_that_do_not_meet(demo_model, tmp_path, capsys):
    """A file nobody knows, images without a file, names without numbers, ids with gaps, an image with nothing to find."""
    folder = tmp_path / "images"
    folder.mkdir()
    for old, new in (("shapes_01.jpg", "first picture.jpg"), ("shapes_02.jpg", "unknown.jpg")):
        shutil.copy(DEMO / "images" / old, folder / new)
    Image.new("RGB", (300, 200)).save(folder / "nothing.png")
    content = json.loads(TRUTH.read_text())
    notes = [{**note, "image_id": 900} for note in content["annotations"] if note["image_id"] == 1]
    notes = [{**note, "category_id": {2: 40}.get(note["category_id"], note["category_id"])} for note in notes]
    images = {900: ("first picture.jpg", 640, 480), 5: ("nothing.png", 200, 300), 77: ("absent.jpg", 10, 10)}
    path = write_annotations(tmp_path / "a.json", images, notes, categories=(1, 3, 4, 5, 40))
    printed = evaluate(
        capsys, "--engine", demo_model, "--input", folder, "--annotations", path, "--output", tmp_path / "o"
    )
    assert printed.out.startswith(
        f"2 annotated images; left out: 1 files that the annotations do not know, 1 annotated images that are not in {folder}"
    )
    assert "1 categories of" in printed.err
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics["images"] == 2
    assert metrics["AP50"] > 0
    assert {entry["image_id"] for entry in json.loads((tmp_path / "o" / "detections.json").read_text())} <= {900, 5}


def test_a_high_threshold_is_warned_about(demo_model, convert, capsys):
    common = ("--input", DEMO / "images", "--annotations", TRUTH)
    assert (
        "--nms_threshold leaves out" in evaluate(capsys, "--engine", demo_model, *common, "--nms_threshold", "0.3").err
    )
    cut = convert("demo", "--first_nms_threshold", "0.25")[0]
    assert "the NMS in" in evaluate(capsys, "--engine", cut, *common).err


def test_mistakes_are_named(demo_model, tmp_path):
    def fails(match, **changes):
        options = {"engine": demo_model, "input": DEMO / "images", "annotations": TRUTH, **changes}
        with pytest.raises(UserError, match=match):
            eval_coco.main([text for key, value in options.items() for text in (f"--{key}", str(value))])

    (tmp_path / "empty").mkdir()
    (tmp_path / "no.json").write_text("{}")
    (tmp_path / "text.json").write_text("not json")
    fails("no.json", annotations=tmp_path / "no.json")
    fails("text.json: not a COCO", annotations=tmp_path / "text.json")
    fails("missing.json: no such file", annotations=tmp_path / "missing.json")
    fails("empty", input=tmp_path / "empty")
    fails("gives no masks", detection_type="segmentation")
    shutil.copy(DEMO / "images" / "shapes_01.jpg", tmp_path / "empty" / "other.jpg")
    fails("knows none of the 1 images", input=tmp_path / "empty")
    (tmp_path / "empty" / "shapes_01.jpg").write_bytes(b"broken")
    fails("none of the 1 annotated images could be read", input=tmp_path / "empty")


@pytest.fixture(scope="module")
def tiny_masks(tmp_path_factory):
    """A tiny Mask R-CNN, its ONNX file, and annotations: what TensorFlow finds surest in each picture of the demo."""
    folder = tmp_path_factory.mktemp("masks")
    export = tiny.Export(score_threshold=0.05)
    tiny.save_export(folder / "model", export)
    model = folder / "model.onnx"
    assert create_onnx.main(["--saved_model", str(folder / "model"), "--onnx", str(model)]) == 0
    images, notes = {}, []
    with open_detector(model) as detector, SavedModel(find_saved_model(folder / "model")) as theirs:
        for key, path in enumerate(sorted((DEMO / "images").glob("*.jpg"))):
            image = load_image(path)
            images[key] = path.name, *image.shape[:2]
            found = parity.tensorflow_detections(theirs, image, detector.metadata).where(slice(0, 6))
            for entry in coco.results_of(found, key, image.shape[:2], 1, 0.5):
                area = float(coco.rle.area(entry["segmentation"]))
                notes.append({**{k: v for k, v in entry.items() if k != "score"}, "area": area})
    return folder / "model", model, write_annotations(folder / "a.json", images, notes, categories=(1, 2, 3, 4))


def test_masks_of_the_tiny_model(tiny_masks, tmp_path, capsys):
    """The ground truth is TensorFlow's six surest: the converted model must find them, box and mask."""
    _, model, annotations = tiny_masks
    scores = {}
    for kind in ("bbox", "segmentation"):
        options = (
            "--engine",
            model,
            "--input",
            DEMO / "images",
            "--annotations",
            annotations,
            "--detection_type",
            kind,
        )
        evaluate(capsys, *options, "--output", tmp_path / kind)
        scores[kind] = json.loads((tmp_path / kind / "metrics.json").read_text())
    assert scores["bbox"]["AR_10"] > 0.95
    assert scores["segmentation"]["AR_10"] > 0.95
    results = json.loads((tmp_path / "segmentation" / "detections.json").read_text())
    assert all(entry["segmentation"]["size"] for entry in results)


def test_coco17_is_tensorflows_to_the_third_digit(convert, coco_images, tmp_path, capsys):
    """TensorFlow's AP is 0.250 and its AP50 0.407 on the 188 images (../shared; test_compare.py measures it)."""
    annotations = need_shared("coco", "instances_val2017_subset.json")
    model = convert("fpnlite", "--batch_size", "dynamic")[0]
    printed = evaluate(
        capsys, "--engine", model, "--input", coco_images[0].parent, "--annotations", annotations, "--output", tmp_path
    )
    assert printed.out.startswith("188 annotated images")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["AP"] == pytest.approx(0.250, abs=0.001)
    assert metrics["AP50"] == pytest.approx(0.407, abs=0.001)
    results = json.loads((tmp_path / "detections.json").read_text())
    truth = coco.load_annotations(annotations)
    assert LIBRARIES[0] != LIBRARIES[1], "faster-coco-eval is not installed"
    both = [coco.evaluate(truth, results, truth.imgs, library=library) for library in LIBRARIES]
    assert both[0].numbers == pytest.approx(both[1].numbers, abs=1e-9)
    assert both[0].classes == [(*row[:3], pytest.approx(row[3]), pytest.approx(row[4])) for row in both[1].classes]
    assert both[0].numbers["AP"] == pytest.approx(metrics["AP"])
    text, *_, wide = open_page(tmp_path / "report.html")
    assert f"AP, IoU 0.50:0.95 {metrics['AP']:.3f}" in text
    assert not wide


@pytest.mark.zoo
def test_mask_rcnn_gives_masks_to_evaluate(convert, coco_images, tmp_path, capsys):
    """Made-up weights find nothing; the masks must go through evaluation all the same."""
    annotations = need_shared("coco", "instances_val2017_subset.json")
    for path in coco_images[:2]:
        shutil.copy(path, tmp_path)
    model = convert("mask_rcnn", "--batch_size", "dynamic")[0]
    options = ("--engine", model, "--input", tmp_path, "--annotations", annotations, "--batch_size", 1)
    evaluate(capsys, *options, "--detection_type", "segmentation", "--output", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(results) == 200
    for entry in results:
        x, y, width, height = coco.rle.toBbox(entry["segmentation"])
        left, top, w, h = entry["bbox"]
        assert not width or (x >= left - 1 and y >= top - 1 and x + width <= left + w + 1 and y + height <= top + h + 1)
