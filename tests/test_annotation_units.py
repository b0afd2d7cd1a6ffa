"""Annotations in other units or of another form, which would give wrong numbers without a word: each is said in one line."""

import json
import shutil

import numpy as np
import pytest
from coco_files import SIZES, sound, write
from conftest import DEMO, need_shared
from PIL import Image
from test_annotations_in_scripts import evaluated

from checks.annotations import keep_keypoints, keep_masks, load_annotations, open_annotations

TRUTH = DEMO / "instances_shapes.json"
PICTURES = sorted((DEMO / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def small_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in SIZES.items():
        Image.new("RGB", size).save(folder / name)
    return sorted(folder.glob("*.jpg"))


def changed(change):
    """The demo's annotations, changed; change: function of (number, object, its image)."""
    content = json.loads(TRUTH.read_text())
    images = {image["id"]: image for image in content["images"]}
    for i, note in enumerate(content["annotations"]):
        change(i, note, images[note["image_id"]])
    return content


def said_of(content, folder, capsys, files=PICTURES):
    """(pycocotools' COCO, the lines warned of) of an opened file, which they name."""
    path = write(folder / "a.json", content)
    capsys.readouterr()
    truth, *_ = open_annotations(path, files)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"warning: --annotations {path}: ") for line in lines)
    return truth, lines


def average_precision(model, images, annotations, capsys, *options):
    """(AP, what was said) of eval_coco.py."""
    metrics, _, said = evaluated(
        capsys, model, images, annotations, annotations.parent / "out", "--pictures", "0", *options
    )
    return metrics["AP"], said


def in_shares(_, note, image):
    x, y, w, h = note["bbox"]
    note["bbox"] = [x / image["width"], y / image["height"], w / image["width"], h / image["height"]]


def in_percents(i, note, image):
    in_shares(i, note, image)
    note["bbox"] = [100 * value for value in note["bbox"]]
    note.pop("area")


# ---- sound files


def test_sound_files_are_not_warned_about(tmp_path, capsys):
    assert said_of(json.loads(TRUTH.read_text()), tmp_path, capsys)[1] == []
    folder = need_shared("coco")
    path = folder / "instances_val2017_subset.json"
    files = sorted((folder / "val2017").glob("*.jpg"))
    truth, known, _, _ = open_annotations(path, files)
    assert len(known) > 100
    keep_masks(path, truth, set(known.values()))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["full", "centred", "one place", "other sizes"])
def test_large_objects_are_not_taken_for_corners(kind, tmp_path, capsys):
    """Each is wider and higher than what is left of and above it, as corners are."""
    rng = np.random.default_rng(3)

    def fill(_, note, image):
        size = np.float64([image["width"], image["height"]])
        if kind == "full":
            start, end = size * 0, size
        elif kind == "centred":
            share = rng.uniform(0.36, 0.95, 2)
            start, end = size * (1 - share) / 2, size * (1 + share) / 2
        elif kind == "one place":
            start, end = size * 0.3 + rng.uniform(-4, 4, 2), size * 0.65 + rng.uniform(-4, 4, 2)
        else:
            start, end = size * 0.3, size * 0.7
        note["bbox"] = [*start, *(end - start)]
        note["area"] = float(np.prod(end - start))

    content = changed(fill)
    for i, note in enumerate(content["annotations"]):
        note["bbox"][0] += i / 1000  # no two are the same
    assert said_of(content, tmp_path, capsys)[1] == []


# ---- boxes


def test_boxes_in_shares_are_said_of_a_part_of_the_file(demo_model, tmp_path, capsys):
    path = write(tmp_path / "a.json", changed(lambda i, note, image: i >= 20 and in_shares(i, note, image)))
    ap, said = average_precision(demo_model, DEMO / "images", path, capsys)
    assert ap < 0.8
    assert said.count("\n") == 1
    assert "10 of 30 boxes lie within one pixel; COCO's are in pixels, not in shares of the image" in said


def test_a_box_or_two_in_the_corner_are_none_in_shares(tmp_path, capsys):
    def click(i, note, _):
        if i in (3, 9):
            note |= {"bbox": [0, 0, 1, 1], "area": 1}

    assert said_of(changed(click), tmp_path, capsys)[1] == []


@pytest.mark.parametrize(
    "move",
    [
        lambda x, y, w, h: (-x - w, y, w, h),
        lambda x, y, w, h: (x, -y - h - 1, w, h),
        lambda x, y, w, h: (x - 5000, y - 5000, w, h),
        lambda x, y, w, h: (-200, y, x + w + 200, h),
        lambda x, y, w, h: (700, y, 5, 5),
    ],
)
def test_boxes_beside_or_before_their_image_reach_beyond_it(move, tmp_path, capsys):
    _, lines = said_of(changed(lambda i, note, _: note.update(bbox=move(*note["bbox"]), area=None)), tmp_path, capsys)
    assert len(lines) == 1
    assert "boxes reach far beyond their image" in lines[0]
    careless = changed(lambda i, note, _: i or note.update(bbox=[-20, -20, 100, 100], area=None))
    assert said_of(careless, tmp_path, capsys)[1] == []


def test_percents_are_said(demo_model, tmp_path, capsys):
    ap, said = average_precision(demo_model, DEMO / "images", write(tmp_path / "a.json", changed(in_percents)), capsys)
    assert ap < 0.1
    assert said.count("\n") == 1
    assert "all boxes lie within the upper left 100 x 100 pixels of larger images: percents?" in said

    def near_one_place(i, note, _):  # as before a camera that does not move
        note |= {"bbox": [50 + i % 5, 60, 45, 38], "area": None}

    assert said_of(changed(near_one_place), tmp_path, capsys)[1] == []


def test_corners_that_fit_into_the_image_are_said(tmp_path, capsys):
    rng = np.random.default_rng(5)

    def to_corners(_, note, image):
        size = np.float64([image["width"], image["height"]])
        start = size * rng.uniform(0, 0.42, 2)
        note["bbox"] = [*start, *(start + size * rng.uniform(0.04, 0.12, 2))]
        note["area"] = None

    _, lines = said_of(changed(to_corners), tmp_path, capsys)
    assert len(lines) == 1
    assert "COCO's boxes are [x, y, width, height]: these look like corners" in lines[0]


# ---- area, iscrowd, sizes


@pytest.mark.parametrize(
    "area, reason",
    [
        (lambda area: area * 4, "30 larger than the box"),
        (lambda area: area / 480 / 640, "30 of less than a 500th of the box"),
        (lambda area: str(area), "30 that are none, for which the box's are taken"),
        (lambda area: 0, "30 that are none"),
        (lambda area: float("nan"), "30 that are none"),
        (lambda area: 10**400, "30 that are none"),
        (lambda area: 1e300, "30 that are none"),
    ],
)
def test_areas_of_another_unit_are_said(area, reason, tmp_path, capsys):
    right, _ = said_of(json.loads(TRUTH.read_text()), tmp_path, capsys)
    truth, lines = said_of(changed(lambda _, note, __: note.update(area=area(note["area"]))), tmp_path, capsys)
    assert len(lines) == 1
    assert f"`area` of 30 of 30 objects does not fit their box in pixels: {reason}" in lines[0]
    assert lines[0].endswith("; sizes small, medium and large are judged by it")
    if "none" in reason:
        assert [x["area"] for x in truth.dataset["annotations"]] == pytest.approx(
            [x["area"] for x in right.dataset["annotations"]], rel=1e-3
        )


def test_single_areas_that_do_not_fit_are_slips(tmp_path, capsys):
    few = changed(lambda i, note, _: note.update(area=[9e9, 1, None, 0, note["area"]][min(i, 4)]))
    _, lines = said_of(few, tmp_path, capsys)
    assert len(lines) == 1
    assert "`area` of 1 of 30 objects" in lines[0]
    tiny = changed(lambda i, note, _: note.update(bbox=[9, 9, 1, 1], area=4))  # from pixel 9 to pixel 10, both counted
    tiny["annotations"] = tiny["annotations"][:1]
    assert said_of(tiny, tmp_path, capsys)[1] == []


def test_areas_beyond_all_images_do_not_empty_the_numbers(demo_model, tmp_path, capsys):
    path = write(tmp_path / "a.json", changed(lambda _, note, __: note.update(area=1e300)))
    ap, said = average_precision(demo_model, DEMO / "images", path, capsys)
    assert ap == pytest.approx(0.901, abs=2e-3)
    assert "crowds alone" not in said


@pytest.mark.parametrize("value", [2, 2.5, "crowd", [0], float("nan")])
def test_other_values_of_iscrowd_are_crowds_as_in_pycocotools(value, tmp_path, capsys):
    truth, lines = said_of(changed(lambda i, note, _: i < 7 and note.update(iscrowd=value)), tmp_path, capsys)
    assert sum(note["iscrowd"] for note in truth.dataset["annotations"]) == 7
    assert len(lines) == 1
    assert "`iscrowd` of 7 of 30 objects is neither 0 nor 1: they are taken for crowds" in lines[0]


@pytest.mark.parametrize(
    "value, crowd", [("0", 0), ("False", 0), (" no ", 0), ("", 0), (True, 1), ("True", 1), (1.0, 1)]
)
def test_plain_words_of_iscrowd_are_not_said(value, crowd, tmp_path, capsys):
    truth, lines = said_of(changed(lambda i, note, _: note.update(iscrowd=value)), tmp_path, capsys)
    assert {note["iscrowd"] for note in truth.dataset["annotations"]} == {crowd}
    assert lines == []


def test_sizes_as_text_are_numbers(tmp_path, capsys, small_pictures):
    content = sound()
    for image in content["images"]:
        image |= {"width": str(image["width"]), "height": f" {image['height']}.0"}
    truth = load_annotations(write(tmp_path / "a.json", content))
    assert [(image["width"], image["height"]) for image in truth.imgs.values()] == list(SIZES.values())
    content["images"][0]["width"] = "640"
    path = write(tmp_path / "a.json", content)
    open_annotations(path, small_pictures)
    assert "one.jpg is 64 x 48, annotated as 640 x 48" in capsys.readouterr().err


# ---- masks and keypoints


def scaled(points, width, height):
    return [value / (height if i % 2 else width) for i, value in enumerate(points)]


def swapped(points, width, height):
    return [value for x, y in zip(points[::2], points[1::2], strict=True) for value in (y, x)]


@pytest.mark.parametrize(
    "move, count", [(scaled, 4), (swapped, 3), (lambda points, w, h: [value + 25 for value in points], 4)]
)
def test_masks_outside_their_boxes_are_said(move, count, tmp_path, capsys, small_pictures):
    content = sound()
    images = {image["id"]: image for image in content["images"]}
    for note in content["annotations"]:
        image = images[note["image_id"]]
        note["segmentation"] = [move(part, image["width"], image["height"]) for part in note["segmentation"]]
    path = write(tmp_path / "a.json", content)
    truth, known, _, _ = open_annotations(path, small_pictures)
    assert capsys.readouterr().err == ""
    keep_masks(path, truth, set(known.values()))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert int(said.split(": of ")[1].split()[0]) >= count
    assert " of 6 objects the mask lies outside their own box for the most part" in said


def test_run_lengths_outside_their_box_are_said(tmp_path, capsys, small_pictures):
    content = sound()
    runs = [48 * 50, 48 * 3, 48 * 11]  # columns 50 to 52 of one.jpg; its first object is in columns 4 to 15
    content["annotations"][0]["segmentation"] = {"size": [48, 64], "counts": runs}
    path = write(tmp_path / "a.json", content)
    truth, known, _, _ = open_annotations(path, small_pictures)
    keep_masks(path, truth, set(known.values()))
    assert "of 1 of 6 objects the mask lies outside" in capsys.readouterr().err


def with_keypoints(make):
    """The demo's annotations with three keypoints of each object: make(x, y, w, h, width, height)."""

    def change(_, note, image):
        note["keypoints"] = make(*note["bbox"], image["width"], image["height"])

    return changed(change)


def three_points(x, y, w, h, *_):
    return [x + w / 2, y, 2, x, y + h, 2, x + 1.2 * w, y + 1.1 * h, 1]


def kept(content, folder, capsys, count=3):
    path = write(folder / "a.json", content)
    truth, known, _, _ = open_annotations(path, PICTURES)
    capsys.readouterr()
    keep_keypoints(path, truth, set(known.values()), count)
    return capsys.readouterr().err


def test_keypoints_outside_their_boxes_are_said(tmp_path, capsys):
    assert kept(with_keypoints(three_points), tmp_path, capsys) == ""

    def shares(x, y, w, h, width, height):
        points = three_points(x, y, w, h)
        return [value / (width, height, 1)[i % 3] for i, value in enumerate(points)]

    said = kept(with_keypoints(shares), tmp_path, capsys)
    assert said.count("\n") == 1
    assert " of 30 objects the keypoints lie outside their own box for the most part" in said
    away = with_keypoints(lambda x, y, w, h, *_: [x + 5 * w, y, 2, x + 5 * w, y, 2, x, y, 2])
    assert "of 30 of 30 objects the keypoints lie outside" in kept(away, tmp_path, capsys)
    one_slip = with_keypoints(three_points)
    one_slip["annotations"][0]["keypoints"][2::3] = [0, 0, 0]  # not labelled: wherever it is
    one_slip["annotations"][0]["keypoints"][::3] = [9999, 9999, 9999]
    assert kept(one_slip, tmp_path, capsys) == ""


def test_keypoints_as_pairs_are_named_by_their_numbers(tmp_path, capsys):
    content = with_keypoints(lambda *box: three_points(*box) + [0] * 6)
    content["annotations"][0]["keypoints"] = [5.0] * 10
    said = kept(content, tmp_path, capsys, count=5)
    assert "1 of 30 objects do not count: 1 with 10 numbers, the model has 5 keypoints (15)" in said


# ---- photos that are stored turned


@pytest.fixture
def turned(tmp_path):
    """turned(orientation) -> a folder of the demo's pictures, stored so that they are to be turned to be as they were."""

    def make(orientation):
        steps = {
            2: [Image.Transpose.FLIP_LEFT_RIGHT],
            3: [Image.Transpose.ROTATE_180],
            6: [Image.Transpose.ROTATE_90],
        }
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "images").mkdir()
        for file in PICTURES:
            image = Image.open(file)
            for step in steps[orientation]:
                image = image.transpose(step)
            image.save(tmp_path / "images" / file.name, exif=exif, quality=95)
        return tmp_path / "images"

    return make


@pytest.mark.parametrize("orientation", [2, 3])
def test_photos_stored_turned_are_said_where_sizes_do_not_tell(orientation, demo_model, turned, tmp_path, capsys):
    images = turned(orientation)
    path = shutil.copy(TRUTH, tmp_path / "a.json")
    ap, said = average_precision(demo_model, images, path, capsys)
    assert ap < 0.5
    assert said.count("\n") == 1
    assert "8 of the first 8 images are stored turned (EXIF)" in said
    ap, said = average_precision(demo_model, images, path, capsys, "--exif_rotate")
    assert ap > 0.8
    assert said == ""


def test_photos_on_their_side_are_said_once_or_not_at_all(turned, tmp_path, capsys):
    """By their sizes; without sizes by EXIF; annotated as they are stored, they are right."""
    files = sorted(turned(6).glob("*.jpg"))
    content = json.loads(TRUTH.read_text())
    open_annotations(write(tmp_path / "a.json", content), files)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "with --exif_rotate" in said
    for image in content["images"]:
        image["width"], image["height"] = image["height"], image["width"]
    for i, note in enumerate(content["annotations"]):
        note |= {"bbox": [5 + i, 6, 70, 80], "area": None}
    tall = {image["file_name"] for image in content["images"] if image["width"] != image["height"]}
    assert len(tall) == 6
    path = write(tmp_path / "a.json", content)
    open_annotations(path, [file for file in files if file.name in tall])
    assert capsys.readouterr().err == ""
    open_annotations(path, files)  # of a square nothing tells
    assert "8 of the first 8 images are stored turned (EXIF)" in capsys.readouterr().err
