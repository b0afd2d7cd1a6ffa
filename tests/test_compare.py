"""compare_tf.py: what matches what, what counts as agreement, and what the pages and pictures show."""

import json
import re
import shutil

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from browser import open_page
from conftest import DEMO, DEMO_MODEL, model_folder, need_shared
from PIL import Image
from test_coco import TRUTH, tiny_masks  # noqa: F401  (a fixture)

import compare_tf
import eval_coco
from image_batcher import load_image
from onnx_utils import OpBuilder
from runtimes import open_detector
from runtimes.detector import Detections, detect_image
from visualize import PAGE_WIDTH, draw_detections


def detections(*rows, masks=None):
    """rows: (ymin, xmin, ymax, xmax, score, class)."""
    rows = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int32), masks)


BOX = (0.1, 0.1, 0.5, 0.5)
NEAR = (0.1, 0.1, 0.5, 0.52)
FAR = (0.6, 0.6, 0.9, 0.9)


def compared(theirs, ours, **options):
    return compare_tf.compare_detections("a.jpg", theirs, ours, (100, 200), 0.3, **options)


def test_matches_are_of_one_class_and_overlap():
    theirs = detections((*BOX, 0.9, 1), (*FAR, 0.8, 2), (*BOX, 0.5, 3), (*FAR, 0.1, 4))
    ours = detections((*NEAR, 0.85, 1), (*FAR, 0.8, 5), (*BOX, 0.28, 3), (*FAR, 0.2, 6))
    found = compared(theirs, ours)
    assert [(i, j) for i, j, _ in found.pairs] == [(0, 0), (2, 2)]  # 0.5 against 0.28: one side passes the threshold
    assert found.pairs[0][2] == pytest.approx(0.4 * 0.4 / (0.4 * 0.42), abs=1e-4)
    assert found.unmatched == ([1], [1])
    assert found.classes_differ == 1
    assert found.difference > compared(theirs, theirs).difference == 0


def test_each_matches_one():
    """Two detections on one object do not both match the same one; the surer chooses first."""
    theirs = detections((*BOX, 0.9, 1), (*NEAR, 0.8, 1))
    found = compared(theirs, detections((*NEAR, 0.9, 1)))
    assert [(i, j) for i, j, _ in found.pairs] == [(0, 0)]
    assert found.unmatched == ([1], [])
    nothing = compared(detections(), detections())
    assert (nothing.pairs, nothing.unmatched, nothing.difference) == ([], ([], []), 0)


def test_masks_are_compared_as_they_are_pasted():
    full, half = np.ones((1, 4, 4), np.float32), np.zeros((1, 4, 4), np.float32)
    half[:, :, :2] = 1
    pair = [detections((*BOX, 0.9, 1), masks=masks) for masks in (full, half)]
    (iou,) = compared(*pair, mask_threshold=0.5).mask_ious
    assert iou == pytest.approx(0.5, abs=0.03)
    assert compared(pair[0], pair[0], mask_threshold=0.5).mask_ious == [1.0]


def test_the_summary_and_its_verdict():
    theirs = detections((*BOX, 0.95, 1), (*FAR, 0.45, 2))
    near = detections((*BOX, 0.94, 1), (*FAR, 0.46, 2))
    numbers = compare_tf.summarise([compared(theirs, near)] * 3, 0.3, 0.02)
    assert numbers["verdict"] == "PASSED"
    assert (numbers["matched"], numbers["unmatched_in_tensorflow"], numbers["images"]) == (6, 0, 3)
    assert numbers["largest_score_difference"] == pytest.approx(0.01, abs=1e-6)
    assert [(band["from"], band["to"], band["matched"]) for band in numbers["bands"]] == [
        (0.3, 0.5, 3),
        (0.5, 0.7, 0),
        (0.7, 0.9, 0),
        (0.9, 1.0, 3),
    ]
    above = detections((*BOX, 0.29, 1)), detections((*BOX, 0.31, 1))
    bands = compare_tf.summarise([compared(*above)], 0.3, 0.05)["bands"]
    assert [(band["from"], band["to"], band["matched"]) for band in bands][:2] == [(0.0, 0.3, 1), (0.3, 0.5, 0)]
    assert compare_tf.summarise([compared(theirs, near)], 0.3, 0.005)["verdict"] == "FAILED"
    missed = compare_tf.summarise([compared(theirs, near), compared(theirs, detections())], 0.3, 0.02)
    assert missed["verdict"] == "FAILED"
    assert missed["share_unmatched"] == pytest.approx(2 / 6)
    assert missed["bands"][0]["unmatched"] == 1
    nothing = compare_tf.summarise([compared(detections(), detections())], 0.3, 0.02)
    assert nothing["verdict"] == "NOT COMPARED"


def run(tmp_path, capsys, **changes):
    """Runs the script on the demo; returns (status, what it printed, its numbers)."""
    options = {"saved_model": DEMO_MODEL, "input": DEMO / "images", "output": tmp_path, **changes}
    status = compare_tf.main([text for key, value in options.items() for text in (f"--{key}", str(value))])
    return status, capsys.readouterr().out, json.loads((tmp_path / "comparison.json").read_text())


def red_pixels(path):
    """Pixels of the dashed frame's red, a wide margin for JPEG."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(picture - [230, 0, 0]).max(axis=2) < 30).sum())


def test_the_demo_agrees_with_tensorflow(convert, tmp_path, capsys):
    model = convert("demo", "--batch_size", "dynamic")[0]
    status, printed, numbers = run(
        tmp_path, capsys, engine=model, annotations=TRUTH, labels=DEMO_MODEL / "labels.txt", num_images=5
    )
    assert status == 0
    assert "\nPASSED: " in printed
    assert printed.splitlines()[-1].endswith(f"open {tmp_path / 'report.html'}")
    assert numbers["images"] == 5
    assert numbers["matched"] >= 10
    assert numbers["largest_score_difference"] < 1e-4
    both = numbers["average_precision"]
    assert both["TensorFlow"]["AP"] == pytest.approx(both["engine"]["AP"], abs=0.001)
    assert both["engine"]["AP50"] > 0.7
    assert len(list((tmp_path / "pictures").glob("*.jpg"))) == 5
    sheet = Image.open(tmp_path / "pictures" / "shapes_01.jpg")
    assert sheet.width > 3 * 480  # TensorFlow, the engine, the ground truth
    assert sheet.height > 640
    assert_letters_fit_the_page(sheet, DEMO / "images" / "shapes_01.jpg", model)
    text, pictures, broken, collapsed, too_wide = open_page(tmp_path / "report.html")
    assert "PASSED" in text
    assert f"matched detections {numbers['matched']}" in text
    assert f"TensorFlow: AP, AP50 {both['TensorFlow']['AP']:.4f}" in text
    assert "score, ONNX Runtime" in text  # the axis of the scatter plot
    assert re.search(r"shapes_0\d\.jpg: largest score difference \S+, smallest IoU (1\.0|0\.99)\d+, 0 unmatched", text)
    assert "mathdefault" not in (tmp_path / "report.html").read_text()  # a power as a formula, on the logarithmic axis
    assert (pictures, broken, collapsed, too_wide) == (5, 0, 0, False)


def test_html_in_names_is_text(convert, tmp_path):
    """Of classes, files and models, in both kinds of reports."""
    model = shutil.copy(convert("demo", "--batch_size", "dynamic")[0], tmp_path / "<u>model.onnx")
    content = json.loads(TRUTH.read_text())
    (tmp_path / "in").mkdir()
    for image in content["images"]:
        name = f"<b>{image['id']}&lt;.jpg"
        shutil.copy(DEMO / "images" / image["file_name"], tmp_path / "in" / name)
        image["file_name"] = name
    for category in content["categories"]:
        category["name"] = f"<i>{category['name']}</i><script>document.body.remove()</script>"
    names = [category["name"] for category in content["categories"]]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    (tmp_path / "labels.txt").write_text("".join(f"{name}\n" for name in names))
    options = ["--engine", model, "--input", tmp_path / "in", "--annotations", tmp_path / "truth.json"]
    options += ["--labels", tmp_path / "labels.txt"]
    saved = tmp_path / "<s>saved"
    shutil.copytree(DEMO_MODEL, saved)
    assert eval_coco.main([*map(str, options), "--output", str(tmp_path / "evaluation")]) == 0
    assert (
        compare_tf.main([*map(str, options), "--saved_model", str(saved), "--output", str(tmp_path / "comparison")])
        == 0
    )
    for name, shown in (("evaluation", names), ("comparison", [str(saved), "<b>1&lt;.jpg"])):
        text = open_page(tmp_path / name / "report.html")[0]
        for part in (*shown, "<u>model.onnx"):
            assert part in text, (name, part)


def test_turned_photos_in_subfolders(convert, turned_demo, tmp_path, capsys):
    """Both sides get the turned pixels; pictures lie as the images do."""
    model = convert("demo", "--batch_size", "dynamic")[0]
    options = ["--engine", model, "--saved_model", DEMO_MODEL, "--input", turned_demo[0].parent, "--output", tmp_path]
    assert compare_tf.main([*map(str, options), "--exif_rotate", "--num_images", "5"]) == 0
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert numbers["matched"] >= 10
    pictures = sorted(str(path.relative_to(tmp_path / "pictures")) for path in (tmp_path / "pictures").rglob("*.jpg"))
    assert pictures == ["a/shapes_01.jpg", "a/shapes_03.jpg", "a/shapes_05.jpg", "a/shapes_07.jpg", "b/shapes_02.jpg"]
    with Image.open(DEMO / "images" / "shapes_01.jpg") as image:
        wide, high = image.size
    with Image.open(tmp_path / "pictures" / "a" / "shapes_01.jpg") as picture:
        assert picture.width > 2 * wide
        assert picture.height - high == pytest.approx(0, abs=60)
    assert str(turned_demo[0].parent) in (tmp_path / "report.html").read_text()


def half_blind(model, path):
    """The model with scores of all but two classes set to 0, as a wrong conversion might; its threshold is unchanged."""
    graph = gs.import_onnx(onnx.load(model))
    (nms,) = [node for node in graph.nodes if node.op == "EfficientNMS_TRT"]
    seen = np.float32([1, 1, 0, 0, 0])
    nms.inputs[1] = OpBuilder(graph, "blind").add("Mul", nms.inputs[1], seen)
    blind = gs.export_onnx(graph.toposort())
    blind.metadata_props.extend(onnx.load(model).metadata_props)
    onnx.save(blind, path)
    return path


def assert_letters_fit_the_page(sheet, path, model):
    """The first of three panels is drawn for a third of the page's width."""
    image = load_image(path)
    height, width = image.shape[:2]
    panel = np.asarray(sheet.crop((0, sheet.height - height, width, sheet.height))).astype(int)
    with open_detector(model) as detector:
        found = detect_image(detector, image).above(0.3)
    assert len(found.scores)
    boxes, names = found.boxes * np.float32([height, width] * 2), (DEMO_MODEL / "labels.txt").read_text().split()
    as_seen, as_large = (
        # JPEG moves a pixel by so much at edges of colour only.
        (
            np.abs(panel - draw_detections(image, boxes, found.scores, found.classes, names, seen_width=seen)) > 100
        ).mean()
        for seen in (PAGE_WIDTH / 3, None)
    )
    assert as_seen < as_large / 10


def test_pictures_of_the_run_before_are_not_left(convert, tmp_path, capsys):
    """Fewer images: the folder holds those of this run, and what else was put there."""
    model = convert("demo", "--batch_size", "dynamic")[0]
    run(tmp_path, capsys, engine=model, num_images=3)
    (tmp_path / "pictures" / "mine.jpg").write_bytes(b"mine")
    run(tmp_path, capsys, engine=model, num_images=2)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"shapes_01.jpg", "shapes_02.jpg", "mine.jpg"}
    text = open_page(tmp_path / "report.html", width=500)
    assert "All 2 are in the folder pictures" in text[0]
    assert text[3:] == (0, False)


def test_a_model_that_differs_fails(convert, tmp_path, capsys):
    """An engine that misses what TensorFlow finds: FAILED, and the pictures mark what is unmatched."""
    agreeing = convert("demo", "--batch_size", "dynamic")[0]
    run(tmp_path / "same", capsys, engine=agreeing, num_images=4)
    (tmp_path / "cut").mkdir()
    cut = half_blind(agreeing, tmp_path / "cut.onnx")
    status, printed, numbers = run(tmp_path / "cut", capsys, engine=cut, num_images=4)
    assert status == 1
    assert "\nFAILED: " in printed
    assert numbers["unmatched_in_tensorflow"] > 0
    assert numbers["unmatched_in_engine"] == 0
    names = [path.name for path in (tmp_path / "cut" / "pictures").glob("*.jpg")]
    marked = sum(red_pixels(tmp_path / "cut" / "pictures" / name) for name in names)
    assert marked > 500 + sum(red_pixels(tmp_path / "same" / "pictures" / name) for name in names)
    text = open_page(tmp_path / "cut" / "report.html")[0]
    assert "FAILED" in text
    assert f"unmatched in TensorFlow {numbers['unmatched_in_tensorflow']}" in text


def test_what_an_engine_was_made_to_leave_out_is_not_compared(convert, tmp_path, capsys):
    """From the higher of the two thresholds on, and the verdict says so; a page without detections has not passed."""
    cut = convert("demo", "--first_nms_threshold", "0.8")[0]
    status, printed, numbers = run(tmp_path / "cut", capsys, engine=cut, num_images=4)
    assert (status, numbers["verdict"], numbers["unmatched_in_tensorflow"]) == (0, "PASSED", 0)
    assert numbers["matched"] > 0
    assert f"from 0.8 on, which {cut} was made for, not 0.3" in printed
    status, printed, numbers = run(tmp_path / "empty", capsys, engine=cut, num_images=4, nms_threshold=0.9999)
    assert (status, numbers["verdict"], numbers["matched"]) == (1, "NOT COMPARED", 0)
    assert "NOT COMPARED: no detection of 0.9999 and more in 4 images; name images" in printed
    assert "PASSED" not in open_page(tmp_path / "empty" / "report.html")[0]


def test_images_that_are_skipped_are_not_passed_over(convert, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(DEMO / "images" / "shapes_01.jpg", images)
    (images / "empty.jpg").write_bytes(b"")
    model = convert("demo", "--batch_size", "dynamic")[0]
    options = ["--saved_model", DEMO_MODEL, "--engine", model, "--output", tmp_path / "o"]
    assert compare_tf.main(list(map(str, [*options, "--input", images]))) == 1
    said = capsys.readouterr()
    assert "\nPASSED: " in said.out  # of the image that could be read
    assert f"--input {images}: 1 images were skipped: not compared" in said.err
    listed = tmp_path / "list.txt"
    listed.write_text("images/shapes_01.jpg\nabsent.jpg\n")
    for more, status in (([], 1), (["--num_images", "2"], 1), (["--num_images", "1"], 0)):
        assert compare_tf.main(list(map(str, [*options, "--input", listed, *more]))) == status


def test_masks_of_the_tiny_model_agree(tiny_masks, tmp_path, capsys):  # noqa: F811
    saved_model, model, annotations = tiny_masks
    status, _, numbers = run(
        tmp_path,
        capsys,
        engine=model,
        saved_model=saved_model,
        annotations=annotations,
        detection_type="segmentation",
        nms_threshold=0.05,
    )
    assert status == 0
    assert numbers["smallest_mask_iou"] > 0.98
    both = numbers["average_precision"]
    for key in ("AP", "AP50"):
        assert both["TensorFlow"][key] == pytest.approx(both["engine"][key], abs=0.001)


def test_mistakes_are_named(convert, tmp_path, capsys):
    model = convert("demo")[0]
    for match, changes in (
        ("gives no masks", {"detection_type": "segmentation"}),
        ("no_model: no such folder", {"saved_model": tmp_path / "no_model"}),
        ("missing.json: no such file", {"annotations": tmp_path / "missing.json"}),
    ):
        with pytest.raises(UserError, match=match):
            run(tmp_path, capsys, engine=model, **changes)
    assert list(tmp_path.iterdir()) == []


def test_another_models_engine_is_refused(convert, tmp_path, capsys):
    """Whose classes are more or fewer than the SavedModel's: nothing would match."""
    said = f"--saved_model {model_folder('hands')} 7 or 8: not the same model"
    with pytest.raises(UserError, match=f"has 5 classes, {said}"):
        run(tmp_path / "o", capsys, engine=convert("demo")[0], saved_model=model_folder("hands"))
    assert list(tmp_path.iterdir()) == []


def test_coco17_agrees_with_tensorflow(convert, coco_images, tmp_path, capsys):
    """AP and AP50 of both sides on the 188 images, from the files: equal to the third digit, TensorFlow's 0.250 and 0.407."""
    status, _, numbers = run(
        tmp_path,
        capsys,
        engine=convert("fpnlite", "--batch_size", "dynamic")[0],
        saved_model=model_folder("fpnlite"),
        input=coco_images[0].parent,
        annotations=need_shared("coco", "instances_val2017_subset.json"),
    )
    assert status == 0
    assert numbers["matched"] > 1000
    both = numbers["average_precision"]
    for key, known in (("AP", 0.250), ("AP50", 0.407)):
        assert both["TensorFlow"][key] == pytest.approx(known, abs=0.001)
        assert both["engine"][key] == pytest.approx(both["TensorFlow"][key], abs=0.001)
