"""checks/annotations.py and checks/matching.py: files as people's tools write them give the right numbers or one sentence."""

import copy
import gzip
import json
import os
import random

from commandline import UserError

import numpy as np
import pytest
from coco_files import NAMES, SIZES, results_for, some_uuid, sound, write
from conftest import variants
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval_coco
from checks import coco
from checks.annotations import (
    encode_segmentation,
    keep_masks,
    load_annotations,
    open_annotations,
    run_lengths,
)
from checks.matching import id_text, match_categories
from images.aspect import image_size

LIBRARIES = [(coco.COCO, coco.PycocotoolsEvaluation), coco.LIBRARY]


@pytest.fixture(scope="module")
def right():
    """{kind: the twelve numbers} of the sound annotations by pycocotools alone."""
    numbers = {}
    for kind, unused in (("bbox", "segmentation"), ("segmentation", "bbox")):
        truth = COCO()
        truth.dataset = sound()
        truth.createIndex()
        results = results_for({name: i for i, name in enumerate(SIZES, 1)}, {"cat": 1, "dog": 2})
        results = [{key: value for key, value in entry.items() if key != unused} for entry in results]
        evaluation = COCOeval(truth, truth.loadRes(results), kind.removesuffix("entation"))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        numbers[kind] = list(evaluation.stats)
        assert 0.2 < numbers[kind][0] < 0.8
    return numbers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in SIZES.items():
        Image.new("RGB", size, (90, 120, 150)).save(folder / name)
    return folder


def measure(path, pictures, kind="bbox"):
    """The twelve numbers of FOUND, the same of both libraries."""
    truth, known, _, _ = open_annotations(path, sorted(pictures.rglob("*.jpg")))
    if kind == "segmentation":
        keep_masks(path, truth, set(known.values()))
    images = {file.name: key for file, key in known.items()}
    names = {category.get("name", "").casefold(): key for key, category in truth.cats.items()}
    results = results_for(images, names)
    one, other = (coco.evaluate(truth, results, known.values(), kind, library) for library in LIBRARIES)
    assert list(one.numbers.values()) == pytest.approx(list(other.numbers.values()), abs=1e-12)
    for row, same in zip(one.classes, other.classes, strict=True):
        assert (row[:3], pytest.approx(row[3:], abs=1e-12)) == (same[:3], same[3:])
    coco.find_mistakes(truth, results, known.values(), kind)
    return list(one.numbers.values())


def changed(*changes):
    """The sound annotations, changed; changes: (table, function of each entry)."""
    content = sound()
    for table, change in changes:
        for entry in content[table]:
            change(entry)
    return content


def each(table, **values):
    return changed((table, lambda entry: entry.update(values)))


def without(table, *keys):
    return changed((table, lambda entry: [entry.pop(key) for key in keys]))


def other_ids(image=lambda i: i, category=lambda i: i, own_image=None, own_category=None):
    """Ids of another type: image and category make them in the tables, own_image and own_category in the objects."""
    content = sound()
    for table, make in (("images", image), ("categories", category)):
        for entry in content[table]:
            entry["id"] = make(entry["id"])
    for note in content["annotations"]:
        note["image_id"] = (own_image or image)(note["image_id"])
        note["category_id"] = (own_category or category)(note["category_id"])
    return content


def labelme():
    """labelme2coco.py: ids from 0, folders in the names, null fields."""
    content = other_ids(image=lambda i: i - 1, category=lambda i: i - 1)
    for image in content["images"]:
        image |= {"file_name": f"JPEGImages/{image['file_name']}", "url": None, "license": 0, "date_captured": None}
    for note in content["annotations"]:
        note["id"] -= 1
    return {**content, "type": "instances"}


def cvat():
    """CVAT: boxes with an empty segmentation, attributes."""
    content = each("annotations", segmentation=[], attributes={"occluded": False, "rotation": 0.0})
    return {**content, "licenses": [{"name": "", "id": 0, "url": ""}], "info": {"contributor": "", "year": ""}}


def label_studio():
    """Label Studio: backslashes, sizes null, ignore, categories from 0."""
    content = other_ids(image=lambda i: i - 1, category=lambda i: i - 1)
    for image in content["images"]:
        image |= {"file_name": f"images\\8\\{image['file_name']}", "width": None, "height": None}
    for note in content["annotations"]:
        note |= {"segmentation": [], "ignore": 0}
    return content


def roboflow():
    """Roboflow: a category 0 for the project, which may have the name of a class; texts in info."""
    content = sound()
    content["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    return {
        **content,
        "info": {"year": "2023", "version": "1"},
        "licenses": [{"id": 1, "url": "https://x", "name": "CC"}],
    }


def voc2coco():
    """voc2coco: Windows paths, stems as ids, no info, empty segmentation."""
    content = sound()
    stems = {image["id"]: image["file_name"][:-4] for image in content["images"]}
    for image in content["images"]:
        image |= {"file_name": f"C:\\Users\\me\\VOC\\{image['file_name']}", "id": stems[image["id"]]}
    for note in content["annotations"]:
        note |= {"image_id": stems[note["image_id"]], "segmentation": [], "ignore": 0}
    return {key: content[key] for key in ("images", "categories", "annotations")}


def fifty_one():
    """FiftyOne: absolute names, no segmentation, null supercategories, an id of each thing that is text."""
    content = other_ids(image=some_uuid, category=lambda i: i - 1)
    for image in content["images"]:
        image |= {"file_name": f"/data/fiftyone/{image['file_name']}", "license": None, "coco_url": None}
    for category in content["categories"]:
        category["supercategory"] = None
    for note in content["annotations"]:
        note["id"] = str(note["id"])
        del note["segmentation"]
    return {**content, "info": {"description": None}}


def boxes_only(content):
    """Without iscrowd no object is a crowd: not there, then."""
    content["annotations"] = [note for note in content["annotations"] if not note.get("iscrowd")]
    return content


SAME = {
    "labelme": labelme,
    "CVAT": cvat,
    "Label Studio": label_studio,
    "Roboflow": roboflow,
    "voc2coco": voc2coco,
    "FiftyOne": fifty_one,
    "no info": lambda: {key: value for key, value in sound().items() if key not in ("info", "licenses")},
    "info null": lambda: {**sound(), "info": None, "licenses": None},
    "no annotation ids": lambda: without("annotations", "id"),
    "annotation ids alike": lambda: each("annotations", id=7),
    "annotation ids null": lambda: each("annotations", id=None),
    "annotation ids from 0": lambda: changed(("annotations", lambda note: note.update(id=note["id"] - 1))),
    "no area": lambda: without("annotations", "area"),
    "area null": lambda: each("annotations", area=None),
    "crowds true": lambda: changed(("annotations", lambda note: note.update(iscrowd=bool(note["iscrowd"])))),
    "crowds text": lambda: changed(("annotations", lambda note: note.update(iscrowd=str(note["iscrowd"])))),
    "no sizes": lambda: without("images", "width", "height"),
    "sizes text": lambda: each("images", width="many", height=[]),
    "sizes not finite": lambda: each("images", width=float("inf"), height=10**400),
    "no supercategory": lambda: without("categories", "supercategory"),
    "ids text": lambda: other_ids(str, str),
    "ids uuid": lambda: other_ids(some_uuid, some_uuid),
    "ids text, in objects numbers": lambda: other_ids(str, str, int, int),
    "ids numbers, in objects text": lambda: other_ids(int, int, str, str),
    "ids float": lambda: other_ids(float, float),
    "category_id float": lambda: other_ids(own_category=float),
    "ids 10^30": lambda: other_ids(lambda i: 10**30 + i, lambda i: 10**30 - i),
    "ids negative": lambda: other_ids(lambda i: -i, lambda i: -i),
    "byte order mark": lambda: b"\xef\xbb\xbf" + json.dumps(sound()).encode(),
    "UTF-16": lambda: json.dumps(sound()).encode("utf-16"),
    "keypoints": lambda: each("annotations", keypoints=[1, 2, 2] * 17, num_keypoints=17),
    "segmentation text": lambda: each("annotations", segmentation="none"),
    "segmentation null": lambda: each("annotations", segmentation=None),
}


@pytest.mark.parametrize("kind", SAME)
def test_what_can_be_filled_in_gives_the_same_numbers(kind, tmp_path, pictures, right, capsys):
    assert measure(write(tmp_path / "a.json", SAME[kind]()), pictures) == pytest.approx(right["bbox"], abs=1e-12)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["absent", None, "no", [], 0.0])
def test_an_object_without_iscrowd_is_none(value, tmp_path, pictures, capsys):
    whole = boxes_only(sound())
    expected = measure(write(tmp_path / "a.json", whole), pictures)
    for note in whole["annotations"]:
        note.pop("iscrowd") if value == "absent" else note.update(iscrowd=value)
    assert measure(write(tmp_path / "a.json", whole), pictures) == expected


# A broken object, and what is said of it.
LEFT_OUT = {
    "null box": ({"bbox": None}, "1 without a box"),
    "no box": ({"bbox": "absent"}, "1 without a box"),
    "empty box": ({"bbox": []}, "1 without a box"),
    "text box": ({"bbox": ["1", "2", "3", "4"]}, "1 with a box that is not four numbers"),
    "three numbers": ({"bbox": [1, 2, 3]}, "1 with a box that is not four numbers"),
    "a dict": ({"bbox": {"x": 1}}, "1 with a box that is not four numbers"),
    "a text": ({"bbox": "1 2 3 4"}, "1 with a box that is not four numbers"),
    "true": ({"bbox": [True, 1, 2, 2]}, "1 with a box that is not four numbers"),
    "lists": ({"bbox": [[1], [2], [3], [4]]}, "1 with a box that is not four numbers"),
    "NaN": ({"bbox": [float("nan"), 1, 2, 3]}, "1 with a box that is not finite"),
    "infinity": ({"bbox": [1, 1, float("inf"), 3]}, "1 with a box that is not finite"),
    "10^400": ({"bbox": [1, 1, 10**400, 3]}, "1 with a box that is not finite"),
    "area not finite": ({"bbox": [1, 1, 1e200, 1e200]}, "1 with a box larger than any image"),
    "far away": ({"bbox": [-1e9, 1, 5, 5]}, "1 with a box larger than any image"),
    "no width": ({"bbox": [1, 1, 0, 3]}, "1 with a box without area"),
    "negative": ({"bbox": [1, 1, 5, -3]}, "1 with a box without area"),
    "category": ({"category_id": 777}, "1 of category 777, which the file does not define"),
    "category text": ({"category_id": "dog"}, "1 of category dog, which the file does not define"),
    "category null": ({"category_id": None}, "1 without a category id"),
    "category list": ({"category_id": [1]}, "1 without a category id"),
    "category NaN": ({"category_id": float("nan")}, "1 without a category id"),
    "image": ({"image_id": 10**30}, f"1 of image {10**30}, which the file does not define"),
    "image null": ({"image_id": None}, "1 without an image id"),
    "image absent": ({"image_id": "absent"}, "1 without an image id"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_cannot_be_used_is_left_out_and_said(kind, tmp_path, pictures, right, capsys):
    values, said = LEFT_OUT[kind]
    content = sound()
    broken = {**content["annotations"][0], **values}
    content["annotations"].insert(0, {key: value for key, value in broken.items() if value != "absent"})
    path = write(tmp_path / "a.json", content)
    assert measure(path, pictures) == pytest.approx(right["bbox"], abs=1e-12)
    assert capsys.readouterr().err == f"warning: --annotations {path}: 1 of 7 objects left out: {said}\n"


def test_all_reasons_are_in_one_line(tmp_path, pictures, right, capsys):
    content = sound()
    first = content["annotations"][0]
    content["annotations"] += [{**first, "bbox": None}] * 7 + [{**first, "category_id": 777}] * 1005
    content["annotations"] += [{**first, "image_id": i} for i in range(11, 16)] + [None, 5, "note", []]
    content["images"] += [None, {"file_name": "x.jpg"}, {"id": None}, content["images"][0]]
    content["categories"] += [{"name": "bird"}, 3, content["categories"][0]]
    path = write(tmp_path / "a.json", content)
    assert measure(path, pictures) == pytest.approx(right["bbox"], abs=1e-12)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: --annotations {path}: 4 of 7 images left out: 3 without an id, 1 there twice",
        f"warning: --annotations {path}: 3 of 5 categories left out: 2 without an id, 1 there twice",
        f"warning: --annotations {path}: 1,021 of 1,027 objects left out: 7 without a box, 4 that are no annotations,"
        " 5 of images 11, 12, 13 and 2 more, which the file does not define,"
        " 1005 of category 777, which the file does not define",
    ]


def with_objects(**values):
    return {"annotations": [{**note, **values} for note in sound()["annotations"]]}


REFUSED = {
    "empty": (b"", "the file is empty"),
    "spaces": (b" \n", "the file is empty"),
    "text": (b"id,x,y\n1,2,3\n", "not a COCO annotation file"),
    "cut off": (json.dumps(sound()).encode()[:-40], "not a COCO annotation file"),
    "gzip": (gzip.compress(json.dumps(sound()).encode()), "a compressed file"),
    "zip": (b"PK\x03\x04\x14\x00", "a compressed file"),
    "cp1252": (json.dumps({"a": "é"}, ensure_ascii=False).encode("cp1252"), "not UTF-8"),
    "binary": (b"\x08\x0a\x00\xff" * 50, "no text, so no JSON; give an instances"),
    "deep": (b'{"images":' + b"[" * 100_000, "not a COCO annotation file"),
    "long number": (b'{"images": ' + b"9" * 5000 + b"}", "not a COCO annotation file"),
    "number": (b"5", "not a COCO annotation file"),
    "null": (b"null", "not a COCO annotation file"),
    "results": ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "a list, as of results"),
    "nothing": ({}, "no images and no annotations and no categories"),
    "tables null": ({**sound(), "annotations": None}, "no annotations"),
    "tables of text": ({**sound(), "images": "here"}, "no images"),
    "no categories": ({**sound(), "categories": []}, "no categories"),
    "categories without id": ({**sound(), "categories": ["cat", "dog"]}, "no images or no categories with an id"),
    "captions": ({"annotations": [{"id": 1, "image_id": 1, "caption": "A cat."}]}, "captions, which have no boxes"),
    "panoptic": ({**sound(), "annotations": [{"image_id": 1, "segments_info": []}]}, "panoptic annotations"),
    "no box": ({**sound(), **with_objects(bbox=None)}, r"no object in it can be used \(6 without a box\)"),
    "all text": ({**sound(), **with_objects(bbox=["1", "2", "3", "4"])}, "6 with a box that is not four numbers"),
    "image ids twice": (each("images", id=1), "two images have the id 1: one.jpg and two.jpg"),
    "category ids twice": (each("categories", id=1), "two categories have the id 1: cat and dog"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_coco_file_is_refused_in_one_sentence(kind, tmp_path):
    content, match = REFUSED[kind]
    path = write(tmp_path / "odd.json", content)
    with pytest.raises(UserError, match=match) as raised:
        load_annotations(path)
    assert str(path) in str(raised.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name, match in ((".", "not a file"), ("pipe.json", "not a file"), ("a.json", "no such file")):
        with pytest.raises(UserError, match=match):
            load_annotations(tmp_path / name)


def test_ids_that_are_one():
    assert id_text(7) == id_text(7.0) == id_text("7") == id_text(" 7 ") == "7"
    assert {id_text(value) for value in (None, True, "", [], {}, float("nan"), float("inf"))} == {None}
    assert id_text(1.5) == "1.5"


def runs_of(polygons, width, height):
    """The run lengths of polygons, counted pixel by pixel."""
    canvas = rle.decode(rle.merge(rle.frPyObjects(polygons, height, width)))
    runs, value = [0], 0
    for pixel in canvas.flatten(order="F").tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def as_masks(make):
    """The sound annotations with each polygon made another mask: make(polygons, width, height)."""
    content = sound()
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for note in content["annotations"]:
        note["segmentation"] = make(note["segmentation"], *sizes[note["image_id"]])
    return content


def compressed(polygons, width, height):
    encoded = rle.merge(rle.frPyObjects(polygons, height, width))
    return {"size": [height, width], "counts": encoded["counts"].decode()}


MASKS = {
    "polygons": sound,
    "run lengths": lambda: as_masks(lambda p, w, h: {"size": [h, w], "counts": runs_of(p, w, h)}),
    "text": lambda: as_masks(compressed),
    "one flat polygon": lambda: as_masks(lambda p, w, h: p[0]),
    "closed": lambda: as_masks(lambda p, w, h: [p[0] + p[0][:2]]),
    "ids uuid": lambda: other_ids(some_uuid, some_uuid),
    "no sizes": lambda: without("images", "width", "height"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_all_forms_give_the_same_numbers(kind, tmp_path, pictures, right, capsys):
    path = write(tmp_path / "a.json", MASKS[kind]())
    assert measure(path, pictures, "segmentation") == pytest.approx(right["segmentation"], abs=1e-12)
    assert capsys.readouterr().err == ""


OUTLINE = "with a polygon that encloses nothing"
PAIRS = "with a polygon of pairs, not [x, y, x, y, ...]"
SIZE = "with a mask of another size than the image"
BROKEN_MASKS = {
    "null": (None, "without a mask"),
    "empty": ([], "without a mask"),
    "text": ("polygon", "without a mask"),
    "number": (5, "without a mask"),
    "empty dict": ({}, "without a mask"),
    "empty part": ([[]], OUTLINE),
    "odd": ([[1, 1, 5, 1, 5, 5, 3]], "with a polygon of an odd number of values"),
    "two points": ([[1, 1, 5, 5]], OUTLINE),
    "pairs": ([[1, 1], [5, 1], [5, 5]], PAIRS),
    "pairs in a polygon": ([[[1, 1], [5, 1], [5, 5]]], PAIRS),
    "texts": ([["1", "1", "5", "1", "5", "5"]], "with a polygon of text"),
    "run lengths in a list": ([{"size": [48, 64], "counts": [0, 64 * 48]}], "with run lengths in a list"),
    "not finite": ([[1, 1, 5, 1, 5, float("nan")]], OUTLINE),
    "10^400": ([[1, 1, 5, 1, 5, 10**400]], OUTLINE),
    "far away": ([[1e9, 1e9, 1e9 + 5, 1e9, 1e9 + 5, 1e9 + 5]], OUTLINE),
    "endless": ([[0, 0, 60, 0, 0, 1] * 5000], OUTLINE),
    "null part": ([None], OUTLINE),
    "no size": ({"counts": [0, 64 * 48]}, "with run lengths without a size"),
    "turned": ({"size": [64, 48], "counts": [0, 64 * 48]}, SIZE),
    "size of text": ({"size": ["48", "64"], "counts": [0, 64 * 48]}, SIZE),
    "short": ({"size": [48, 64], "counts": [0, 50]}, "with broken run lengths"),
    "long": ({"size": [48, 64], "counts": [0, 64 * 48 + 1]}, "with broken run lengths"),
    "negative": ({"size": [48, 64], "counts": [-1, 64 * 48 + 1]}, "with broken run lengths"),
    "halves": ({"size": [48, 64], "counts": [0.5, 64 * 48 - 0.5]}, "with broken run lengths"),
    "counts null": ({"size": [48, 64], "counts": None}, "with broken run lengths"),
    "counts odd text": ({"size": [48, 64], "counts": "hello, world"}, "with broken run lengths"),
    "counts cut off": ({"size": [48, 64], "counts": "PPPPPPP"}, "with broken run lengths"),
    "counts no ASCII": ({"size": [48, 64], "counts": "ä€"}, "with broken run lengths"),
    "counts too short": ({"size": [48, 64], "counts": "04"}, "with broken run lengths"),
    "counts empty": ({"size": [48, 64], "counts": ""}, "with broken run lengths"),
}


@pytest.mark.parametrize("kind", BROKEN_MASKS)
def test_broken_masks_are_left_out_of_masks_only(kind, tmp_path, pictures, right, capsys):
    segmentation, said = BROKEN_MASKS[kind]
    content = sound()
    crowd = {**content["annotations"][0], "bbox": [0, 0, 64, 48], "iscrowd": 1, "segmentation": segmentation}
    content["annotations"].append(crowd)
    path = write(tmp_path / "a.json", content)
    assert measure(path, pictures, "segmentation") == pytest.approx(right["segmentation"], abs=1e-12)
    assert capsys.readouterr().err == f"warning: --annotations {path}: 1 of 7 objects left out: 1 {said}\n"
    measure(path, pictures)
    assert capsys.readouterr().err == ""  # a box is all that boxes need


def test_parts_of_a_mask_that_enclose_nothing_are_dropped(tmp_path, pictures, right, capsys):
    content = sound()
    content["annotations"][0]["segmentation"] += [[1, 1, 3, 3], [], [9, 9]]
    path = write(tmp_path / "a.json", content)
    assert measure(path, pictures, "segmentation") == pytest.approx(right["segmentation"], abs=1e-12)
    assert "3 parts of masks left out" in capsys.readouterr().err


def test_annotations_without_masks_are_refused_for_masks(tmp_path, pictures):
    path = write(tmp_path / "a.json", cvat())
    with pytest.raises(UserError, match=r"no object has a mask .* \(6 without a mask\); use --detection_type bbox"):
        measure(path, pictures, "segmentation")


def test_run_lengths_are_pycocotools():
    rng = np.random.default_rng(3)
    for density in (0, 0.01, 0.3, 0.97, 1):
        for size in ((1, 1), (7, 90), (300, 200)):
            canvas = np.asfortranarray(rng.random(size) < density).astype(np.uint8)
            encoded = rle.encode(canvas)
            runs = run_lengths(encoded["counts"].decode())
            assert sum(runs) == canvas.size
            values = np.repeat(np.arange(len(runs)) % 2, runs)
            np.testing.assert_array_equal(values, canvas.flatten(order="F"))
            again, _ = encode_segmentation({"size": list(size), "counts": runs}, {"height": size[0], "width": size[1]})
            assert again["counts"] == encoded["counts"].decode()


# Values of all types, to put anywhere.
ODD = [
    None,
    True,
    0,
    -1,
    5,
    2.5,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "7",
    "\ud800",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
]


def damage(rng, content):
    """Puts an odd value in the place of one to three parts of the content, wherever they are."""
    for _ in range(rng.randint(1, 3)):
        place, key = content, rng.choice(list(content))
        while isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.85:
            place = place[key]
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        if rng.random() < 0.2 and isinstance(place, dict):
            del place[key]
        else:
            place[key] = copy.deepcopy(rng.choice(ODD))
        if not content:
            return


@pytest.mark.fuzz
def test_damaged_annotations_give_numbers_or_one_sentence(tmp_path, pictures, capsys):
    """250 seeded variants, boxes and masks: the same numbers of both libraries, or a UserError; never anything else."""
    rng = random.Random(18)
    outcomes = {"numbers": 0, "sentence": 0}
    files = sorted(pictures.glob("*.jpg"))
    found = results_for({name: i for i, name in enumerate(SIZES, 1)}, {"cat": 1, "dog": 2})
    model = {"num_classes": 2, "class_offset": 1}
    for variant in range(variants(250)):
        content = as_masks(compressed) if variant % 3 else sound()
        damage(rng, content)
        path, kind = write(tmp_path / "a.json", content), ("bbox", "segmentation")[variant % 2]
        try:
            truth, known, _, _ = open_annotations(path, files)
            if kind == "segmentation":
                keep_masks(path, truth, set(known.values()))
            categories = match_categories(path, truth, list(NAMES), model)
            by_number = {i: known.get(pictures / name) for i, name in enumerate(SIZES, 1)}
            results = [{**entry, "image_id": by_number[entry["image_id"]]} for entry in found]
            results = coco.in_categories([entry for entry in results if entry["image_id"] is not None], categories)
            one, other = (coco.evaluate(truth, results, known.values(), kind, library) for library in LIBRARIES)
            coco.find_mistakes(truth, results, known.values(), kind)
            json.dumps(results).encode("utf-8")
            str(one.classes).encode("utf-8")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["sentence"] += 1
            continue
        assert list(one.numbers.values()) == pytest.approx(list(other.numbers.values()), abs=1e-12)
        assert all(value == -1 or 0 <= value <= 1 for value in one.numbers.values())
        outcomes["numbers"] += 1
    assert min(outcomes.values()) > 20
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("warning: ")


def test_a_class_without_objects_has_no_ap(tmp_path, pictures):
    """Not annotated at all, only as a crowd, only in another image: no AP, and none of it in the mean."""
    content = sound()
    content["categories"] += [{"id": 3, "name": "bird"}, {"id": 4, "name": "fish"}, {"id": 5, "name": "cow"}]
    first = content["annotations"][0]
    content["annotations"] += [{**first, "category_id": 4, "iscrowd": 1}, {**first, "category_id": 5, "image_id": 3}]
    path = write(tmp_path / "a.json", content)
    truth, known, _, _ = open_annotations(path, [pictures / "one.jpg", pictures / "two.jpg"])
    results = results_for({name: i for i, name in enumerate(SIZES, 1)}, {"cat": 1, "dog": 3})
    results = [entry for entry in results if entry["image_id"] in known.values()]
    for library in LIBRARIES:
        evaluation = coco.evaluate(truth, results, known.values(), library=library)
        assert [row[3:] for row in evaluation.classes[2:]] == [(-1, -1)] * 3
        assert evaluation.numbers["AP"] == pytest.approx(np.mean([row[3] for row in evaluation.classes[:2]]))
        assert eval_coco.show(evaluation.classes[2][3]) == "-"
        assert list(evaluation.class_curves) == [1, 2]


def test_sizes_that_disagree_are_said_once(tmp_path, capsys):
    """A photo stored on its side, one scaled down; with exif_rotate the first is right."""
    for name, size, orientation in (("one.jpg", (48, 64), 6), ("two.jpg", (25, 40), 1), ("three.jpg", (90, 60), 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", size).save(tmp_path / name, exif=exif)
    path, files = write(tmp_path / "a.json", sound()), sorted(tmp_path.glob("*.jpg"))
    truth, *_ = open_annotations(path, files)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 of 3 images are not as wide and high as" in said
    assert "one.jpg is 48 x 64, annotated as 64 x 48; with --exif_rotate 1 of them are\n" in said
    assert [(image["width"], image["height"]) for image in truth.imgs.values()] == [(48, 64), (25, 40), (90, 60)]
    open_annotations(path, files, exif_rotate=True)
    said = capsys.readouterr().err
    assert "1 of 3 images" in said
    assert "exif_rotate" not in said
    assert image_size(tmp_path / "one.jpg", exif_rotate=True) == (64, 48)
    assert image_size(path) is None


def test_boxes_of_another_format_are_said(tmp_path, pictures, capsys):
    """[left, top, right, bottom], and shares of the image."""
    content = sound()
    for note in content["annotations"]:
        x, y, width, height = note["bbox"]
        note["bbox"] = [x, y, x + width, y + height]
    files = sorted(pictures.glob("*.jpg"))
    open_annotations(write(tmp_path / "corners.json", content), files)
    assert "boxes reach far beyond their image; COCO's are [x, y, width, height]" in capsys.readouterr().err
    content = sound()
    for note in content["annotations"]:
        note["bbox"] = [value / 100 for value in note["bbox"]]
    open_annotations(write(tmp_path / "shares.json", content), files)
    assert "6 of 6 boxes lie within one pixel" in capsys.readouterr().err
