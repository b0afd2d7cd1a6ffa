"""eval_coco.py and compare_tf.py on annotation files of people's tools."""

import json
import shutil

from commandline import UserError

import pytest
from coco_files import some_uuid, write
from conftest import DEMO, DEMO_MODEL, need_shared

import compare_tf
import eval_coco
from checks import coco
from checks.annotations import (
    load_annotations,
)


def evaluated(capsys, model, images, annotations, output, *options, status=0):
    """Runs eval_coco.py; returns (metrics, results, what it warned)."""
    options = ["--engine", model, "--input", images, "--annotations", annotations, "--output", output, *options]
    assert eval_coco.main(list(map(str, options))) == status
    said = capsys.readouterr().err
    return *(json.loads((output / f"{name}.json").read_text()) for name in ("metrics", "detections")), said


def demo_truth():
    return json.loads((DEMO / "instances_shapes.json").read_text())


def test_detections_have_the_files_own_ids(demo_model, tmp_path, capsys):
    """Ids that are text, categories in another order and known by their names alone, `$` in a name."""
    whole, _, _ = evaluated(capsys, demo_model, DEMO / "images", DEMO / "instances_shapes.json", tmp_path / "whole")
    content = demo_truth()
    keys = {category["id"]: f"{category['id']}-x" for category in content["categories"]}
    for category in content["categories"]:
        category["id"] = keys[category["id"]]
    content["categories"].reverse()
    for image in content["images"]:
        image["id"] = some_uuid(image["id"])
    for note in content["annotations"]:
        note |= {"image_id": some_uuid(note["image_id"]), "category_id": keys[note["category_id"]]}
    content["categories"].append({"id": None, "name": "lost"})
    content["categories"].append({"id": "", "name": "lost"})
    path = write(tmp_path / "a.json", content)
    metrics, results, said = evaluated(capsys, demo_model, DEMO / "images", path, tmp_path / "o")
    for key in coco.NUMBERS:
        assert metrics[key] == pytest.approx(whole[key], abs=1e-9)
    assert {entry["image_id"] for entry in results} == {some_uuid(i) for i in range(1, 9)}
    assert {entry["category_id"] for entry in results} == set(keys.values())
    assert said == f"warning: --annotations {path}: 2 of 7 categories left out: 2 without an id\n"
    truth = load_annotations(path)
    assert coco.evaluate(truth, results, truth.imgs).numbers["AP"] == pytest.approx(whole["AP"])
    # By other names, and no number to go by, no class can be one of these.
    (tmp_path / "labels.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    with pytest.raises(UserError, match="none of its categories is one of the model's"):
        evaluated(capsys, demo_model, DEMO / "images", path, tmp_path / "none", "--labels", tmp_path / "labels.txt")
    assert not (tmp_path / "none").exists()


def test_numbers_that_are_not_whole_are_said(demo_model, tmp_path, capsys):
    """A file that cannot be read, one that a list names in vain, nothing but crowds: status 1. Objects twice: a warning."""
    shutil.copytree(DEMO / "images", tmp_path / "images")
    (tmp_path / "images" / "shapes_01.jpg").write_bytes(b"")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{DEMO / 'images' / f'shapes_0{i}.jpg'}\n" for i in range(1, 9)) + "absent.jpg\n")
    for images in (tmp_path / "images", listed):
        _, _, said = evaluated(capsys, demo_model, images, DEMO / "instances_shapes.json", tmp_path / "o", status=1)
        assert f"--input {images}: 1 images were skipped: they are not in the numbers" in said
    whole, _, _ = evaluated(capsys, demo_model, DEMO / "images", DEMO / "instances_shapes.json", tmp_path / "whole")
    content = demo_truth()
    count = len(content["annotations"])
    path = write(tmp_path / "twice.json", content | {"annotations": content["annotations"] * 2})
    metrics, _, said = evaluated(capsys, demo_model, DEMO / "images", path, tmp_path / "twice")
    assert f"{count} of {2 * count} objects have the box and the category of another one" in said
    assert metrics["AP"] < 0.6 * whole["AP"]
    for note in content["annotations"]:
        note["iscrowd"] = "true"
    path = write(tmp_path / "crowds.json", content)
    metrics, _, said = evaluated(capsys, demo_model, DEMO / "images", path, tmp_path / "crowds", status=1)
    assert (metrics["AP"], f"--annotations {path}: nothing to measure" in said) == (-1, True)


def test_names_that_are_no_mathematics(demo_model, tmp_path, capsys):
    """Between two $ matplotlib reads a formula; half of a surrogate pair can be written to no file."""
    content = demo_truth()
    for category, name in zip(content["categories"], ("$x^$", "\ud800", "_under", "<b>", "a\nb"), strict=True):
        category["name"] = name
    path = write(tmp_path / "a.json", content)
    evaluated(capsys, demo_model, DEMO / "images", path, tmp_path / "o")
    assert "$x^$" in (tmp_path / "o" / "report.html").read_text(encoding="utf-8")


def test_subfolders_are_searched(demo_model, tmp_path, capsys):
    """cam1/0001.jpg and cam2/0001.jpg, of which a file in one folder could be either."""
    content = demo_truth()
    for image in content["images"]:
        camera, number = divmod(image["id"] - 1, 4)
        name = f"cam{camera}/{number:04}.jpg"
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DEMO / "images" / image["file_name"], tmp_path / "in" / name)
        image["file_name"] = name.replace("/", "\\")
    path = write(tmp_path / "a.json", content)
    whole, _, _ = evaluated(capsys, demo_model, DEMO / "images", DEMO / "instances_shapes.json", tmp_path / "whole")
    metrics, _, said = evaluated(capsys, demo_model, tmp_path / "in", path, tmp_path / "o")
    assert metrics["AP"] == pytest.approx(whole["AP"])
    assert (metrics["images"], said) == (8, "")


def test_comparison_takes_the_same_files(demo_model, tmp_path, capsys):
    """String ids, categories from 0 in another order, folders: the AP of both sides, and a picture of each image."""
    content = demo_truth()
    for image in content["images"]:
        name = f"cam{image['id'] % 2}/{(image['id'] - 1) // 2:04}.jpg"
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DEMO / "images" / image["file_name"], tmp_path / "in" / name)
        image["file_name"] = name
    order = [category["id"] for category in content["categories"]][::-1]
    for category in content["categories"]:
        category["id"] = order.index(category["id"])
    content["images"] = [{"id": str(image["id"]), "file_name": image["file_name"]} for image in content["images"]]
    names = [image["file_name"] for image in content["images"]]
    for note in content["annotations"]:
        note |= {"image_id": str(note["image_id"]), "category_id": order.index(note["category_id"]), "area": None}
    content["annotations"].append({**content["annotations"][0], "bbox": None})
    objects = len(content["annotations"])
    whole, _, _ = evaluated(capsys, demo_model, DEMO / "images", DEMO / "instances_shapes.json", tmp_path / "whole")
    options = {
        "engine": demo_model,
        "saved_model": DEMO_MODEL,
        "input": tmp_path / "in",
        "annotations": write(tmp_path / "a.json", content),
        "output": tmp_path / "out",
    }
    assert compare_tf.main([str(text) for key, value in options.items() for text in (f"--{key}", value)]) == 0
    said = capsys.readouterr().err
    assert f"1 of {objects} objects left out: 1 without a box" in said
    assert "are matched by name" in said
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())["average_precision"]
    for side in ("TensorFlow", "engine"):
        assert numbers[side]["AP"] == pytest.approx(whole["AP"], abs=1e-3)
    folder = tmp_path / "out" / "pictures"
    pictures = [path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")]
    assert sorted(pictures) == sorted(names)


def test_comparison_refuses_before_it_runs(demo_model, tmp_path, monkeypatch):
    """Two images that fit one file, no masks, no category of the model: said before TensorFlow has run."""
    monkeypatch.setattr(compare_tf, "run_both", lambda *_: pytest.fail("ran"))
    twice, strange = demo_truth(), demo_truth()
    twice["images"].append({"id": 99, "file_name": "shapes_01.jpg"})
    for table, key in (("categories", "id"), ("annotations", "category_id")):
        for entry in strange[table]:
            entry[key] = f"u{entry[key]}"
            entry.pop("name", None)
    for content, match in ((twice, "fits two images"), (strange, "none of its categories")):
        path = write(tmp_path / "a.json", content)
        options = [
            "--engine",
            demo_model,
            "--saved_model",
            DEMO_MODEL,
            "--input",
            DEMO / "images",
            "--annotations",
            path,
        ]
        with pytest.raises(UserError, match=match):
            compare_tf.main([*map(str, options), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


CASES = ("base", "bom", "categories_1_to_80", "no_area", "no_info", "null_bbox", "string_image_id")


@pytest.mark.parametrize("case", CASES)
def test_shared_cases_give_the_ap_of_the_sound_file(case, convert, tmp_path, capsys):
    folder = need_shared("cases")
    model = convert("fpnlite", "--batch_size", "dynamic")[0]
    path = folder / "annotations" / f"{case}.json"
    metrics, results, said = evaluated(capsys, model, folder / "imgs", path, tmp_path)
    assert metrics["AP"] == pytest.approx(0.1065, abs=5e-5)
    known = {json.dumps(image["id"]) for image in json.loads(path.read_text(encoding="utf-8-sig"))["images"]}
    assert {json.dumps(entry["image_id"]) for entry in results} == known
    if case == "categories_1_to_80":
        assert "69 categories" in said
        assert "12 'stop sign' is the model's 13 'stop sign', 13 'parking meter' is the model's 14" in said
    elif case == "null_bbox":
        assert "1 of 157 objects left out: 1 without a box" in said
    else:
        assert said == ""


@pytest.mark.parametrize("first", [0, 1])
def test_shared_cases_with_other_category_ids(first, convert, tmp_path, capsys):
    """Ids counted on, from 0 or 1, instead of COCO's 90 with gaps: by name they are right all the same."""
    folder = need_shared("cases")
    content = json.loads((folder / "annotations" / "base.json").read_text())
    ids = {category["id"]: i for i, category in enumerate(content["categories"], first)}
    for table, key in (("categories", "id"), ("annotations", "category_id")):
        for entry in content[table]:
            entry[key] = ids[entry[key]]
    path = write(tmp_path / "a.json", content)
    model = convert("fpnlite", "--batch_size", "dynamic")[0]
    metrics, _, said = evaluated(capsys, model, folder / "imgs", path, tmp_path / "o")
    assert metrics["AP"] == pytest.approx(0.1065, abs=5e-5)
    assert said.count("' is the model's ") == 3


def test_shared_photos_on_their_side_are_warned_about(convert, tmp_path, capsys):
    folder = need_shared("cases")
    model = convert("fpnlite", "--batch_size", "dynamic")[0]
    path = folder / "annotations" / "base.json"
    _, _, said = evaluated(capsys, model, folder / "imgs_exif", path, tmp_path)
    assert said.count("\n") == 1
    assert "4 of 4 images are not as wide and high" in said
    assert said.endswith("; with --exif_rotate 4 of them are\n")
