"""checks/annotations.py and checks/matching.py: files as people's tools write them give the right numbers or one sentence."""

import copy
import gzip
import json
import os
import random
import shutil
import unicodedata
import uuid

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO, DEMO_MODEL, need_shared
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import compare_tf
import eval_coco
from checks import coco
from checks.annotations import (
    encode_segmentation,
    image_size,
    keep_masks,
    load_annotations,
    open_annotations,
    run_lengths,
)
from checks.matching import id_text, match_categories, match_images

LIBRARIES = [(coco.COCO, coco.PycocotoolsEvaluation), coco.LIBRARY]
SIZES = {"one.jpg": (64, 48), "two.jpg": (50, 80), "three.jpg": (90, 60)}  # width, height
NAMES = ("cat", "dog")


def square(x, y, side):
    """A box, and the polygon that covers it."""
    return [x, y, side, side], [[x, y, x + side, y, x + side, y + side, x, y + side]]


def sound():
    """Annotations with nothing missing: 3 images, 2 categories, 6 objects, one of them a crowd."""
    places = [
        (1, 1, 4, 4, 12),
        (1, 2, 30, 10, 20),
        (2, 1, 5, 20, 30),
        (2, 2, 10, 55, 15),
        (3, 1, 40, 30, 25),
        (3, 2, 5, 5, 30),
    ]
    notes = []
    for image, category, x, y, side in places:
        box, polygons = square(x, y, side)
        crowd = int((image, category) == (3, 2))
        note = {"id": len(notes) + 1, "image_id": image, "category_id": category, "bbox": box, "area": side * side}
        notes.append({**note, "iscrowd": crowd, "segmentation": polygons})
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": i, "file_name": name, "width": width, "height": height}
            for i, (name, (width, height)) in enumerate(SIZES.items(), 1)
        ],
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(NAMES, 1)],
        "annotations": notes,
    }


# What is found: (file, name, x, y, side, score); some right, some beside, one twice, one in the crowd.
FOUND = [
    ("one.jpg", "cat", 4, 5, 12, 0.9),
    ("one.jpg", "dog", 36, 10, 20, 0.8),
    ("two.jpg", "cat", 5, 20, 30, 0.7),
    ("two.jpg", "cat", 7, 20, 30, 0.65),
    ("two.jpg", "dog", 11, 55, 15, 0.95),
    ("three.jpg", "dog", 6, 5, 20, 0.85),
    ("three.jpg", "cat", 0, 0, 9, 0.6),
]


def results_for(images, categories):
    """FOUND as COCO results; images: {file name: id}, categories: {name: id}."""
    results = []
    for file, name, x, y, side, score in FOUND:
        width, height = SIZES[file]
        box, polygons = square(x, y, side)
        mask = rle.frPyObjects(polygons, height, width)[0]
        mask["counts"] = mask["counts"].decode()
        entry = {"image_id": images[file], "category_id": categories[name], "bbox": box, "score": score}
        results.append({**entry, "segmentation": mask})
    return results


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


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


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


def some_uuid(i):
    return str(uuid.UUID(int=i))


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
        image |= {"file_name": f"/home/me/fiftyone/data/{image['file_name']}", "license": None, "coco_url": None}
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
    "area text": lambda: each("annotations", area="12"),
    "area NaN": lambda: each("annotations", area=float("nan")),
    "area zero": lambda: each("annotations", area=0),
    "area huge": lambda: each("annotations", area=10**400),
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


@pytest.mark.parametrize("value", ["absent", None, "no", [], 2.5])
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
SIZE = "with a mask of another size than the image"
BROKEN_MASKS = {
    "null": (None, "without a mask"),
    "empty": ([], "without a mask"),
    "text": ("polygon", "without a mask"),
    "number": (5, "without a mask"),
    "empty dict": ({}, "without a mask"),
    "empty part": ([[]], OUTLINE),
    "odd": ([[1, 1, 5, 1, 5, 5, 3]], OUTLINE),
    "two points": ([[1, 1, 5, 5]], OUTLINE),
    "pairs": ([[1, 1], [5, 1], [5, 5]], OUTLINE),
    "texts": ([["1", "1", "5", "1", "5", "5"]], OUTLINE),
    "not finite": ([[1, 1, 5, 1, 5, float("nan")]], OUTLINE),
    "10^400": ([[1, 1, 5, 1, 5, 10**400]], OUTLINE),
    "far away": ([[1e9, 1e9, 1e9 + 5, 1e9, 1e9 + 5, 1e9 + 5]], OUTLINE),
    "endless": ([[0, 0, 60, 0, 0, 1] * 5000], OUTLINE),
    "null part": ([None], OUTLINE),
    "no size": ({"counts": [0, 64 * 48]}, SIZE),
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


def test_damaged_annotations_give_numbers_or_one_sentence(tmp_path, pictures, capsys):
    """250 seeded variants, boxes and masks: the same numbers of both libraries, or a UserError; never anything else."""
    rng = random.Random(18)
    outcomes = {"numbers": 0, "sentence": 0}
    files = sorted(pictures.glob("*.jpg"))
    found = results_for({name: i for i, name in enumerate(SIZES, 1)}, {"cat": 1, "dog": 2})
    model = {"num_classes": 2, "class_offset": 1}
    for variant in range(250):
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


# ---- which file is which image


def annotated(*names, ids=None):
    """pycocotools' COCO of images with those names (None: without)."""
    truth = COCO()
    entries = zip(ids or range(1, len(names) + 1), names, strict=True)
    truth.dataset = {"images": [{"id": key, **({"file_name": name} if name else {})} for key, name in entries]}
    truth.dataset |= {"annotations": [], "categories": []}
    truth.createIndex()
    return truth


def matched(truth, *files):
    known, unknown, absent = match_images(truth, files)
    return {str(path): key for path, key in known.items()}, list(map(str, unknown)), absent


def test_files_are_matched_by_their_folders():
    truth = annotated("cam1/0001.jpg", "cam2/0001.jpg", "cam2/0002.jpg")
    assert matched(truth, "data/cam2/0001.jpg", "data/cam1/0001.jpg", "data/cam1/0002.jpg", "data/cam3/0001.jpg") == (
        {"data/cam2/0001.jpg": 2, "data/cam1/0001.jpg": 1},
        ["data/cam1/0002.jpg", "data/cam3/0001.jpg"],
        [3],
    )
    # One folder alone is told by its own name.
    assert matched(truth, "cam2/0001.jpg")[0] == {"cam2/0001.jpg": 2}


@pytest.mark.parametrize(
    "name", ["a\\b\\x.jpg", "/home/me/a/b/x.jpg", "C:\\data\\a\\b\\x.jpg", "./b//x.jpg", "../b/x.jpg"]
)
def test_paths_of_other_systems(name):
    assert matched(annotated(name, "c/x.jpg"), "in/a/b/x.jpg", "in/a/c/x.jpg")[0] == {
        "in/a/b/x.jpg": 1,
        "in/a/c/x.jpg": 2,
    }


def test_names_are_matched_in_any_form_of_unicode():
    composed, apart = (unicodedata.normalize(form, "Größe é.jpg") for form in ("NFC", "NFD"))
    assert composed != apart
    for name, file in ((composed, apart), (apart, composed)):
        assert matched(annotated(name), file)[0] == {file: 1}


def test_case_is_the_last_resort():
    assert matched(annotated("IMG_1.JPG", "b.jpg"), "img_1.jpg", "B.JPG")[0] == {"img_1.jpg": 1, "B.JPG": 2}
    assert matched(annotated("A.jpg", "a.jpg"), "a.jpg", "A.jpg")[0] == {"a.jpg": 2, "A.jpg": 1}
    assert matched(annotated("A.jpg"), "a.jpg", "A.jpg") == ({"A.jpg": 1}, ["a.jpg"], [])


def test_numbers_count_only_without_a_name():
    truth = annotated("77.png", None, None, ids=[5, 139, "12"])
    known, unknown, absent = matched(truth, "5.jpg", "77.jpg", "000000000139.png", "0012.jpg", "²3.jpg")
    assert known == {"000000000139.png": 139, "0012.jpg": "12"}
    assert (unknown, absent) == (["5.jpg", "77.jpg", "²3.jpg"], [5])
    assert matched(annotated(None, ids=["9" * 5000]), "1.jpg")[1] == ["1.jpg"]


@pytest.mark.parametrize(
    "names, files, match",
    [
        (("a.jpg", "a.jpg"), ["a.jpg"], r"a.jpg fits two images, a.jpg \(id 1\) and a.jpg \(id 2\)"),
        (("train/a.jpg", "val/a.jpg"), ["in/a.jpg"], r"train/a.jpg \(id 1\) and val/a.jpg \(id 2\)"),
        (("A.jpg", "A.JPG"), ["a.jpg"], "fits two images"),
        (("a.jpg",), ["x/a.jpg", "y/a.jpg"], "x/a.jpg and y/a.jpg both fit"),
        ((None,), ["1.jpg", "01.png"], "1.jpg and 01.png both fit"),
    ],
)
def test_what_fits_twice_is_refused_by_name(names, files, match):
    with pytest.raises(UserError, match=match):
        matched(annotated(*names), *files)


def test_copies_deeper_down_are_not_taken():
    truth = annotated("a.jpg", "b.jpg")
    known, unknown, _ = matched(truth, "in/a.jpg", "in/results/a.jpg", "in/results/b.jpg")
    assert (known, unknown) == ({"in/a.jpg": 1, "in/results/b.jpg": 2}, ["in/results/a.jpg"])


def test_a_folder_with_another_name_is_said(capsys):
    truth = annotated("JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg")
    assert matched(truth, "in/images/a.jpg", "in/more/b.jpg", "in/more/d.jpg")[0] == {
        "in/images/a.jpg": 1,
        "in/more/b.jpg": 2,
    }
    said = capsys.readouterr().err
    assert "2 images are known by their name alone" in said
    assert "in/images/a.jpg is taken for JPEGImages/a.jpg" in said
    assert matched(truth, "images/a.jpg")[0] == {"images/a.jpg": 1}  # its own folder is all that is named
    assert capsys.readouterr().err == ""


# ---- which category is which class


def categories(*names, ids=None, objects=None):
    """pycocotools' COCO of categories with those names (None: without), each with an object, or those of `objects`."""
    ids = list(ids or range(1, len(names) + 1))
    truth = COCO()
    truth.dataset = {
        "images": [],
        "categories": [{"id": key, **({"name": name} if name else {})} for key, name in zip(ids, names, strict=True)],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": key} for i, key in enumerate(ids if objects is None else objects, 1)
        ],
    }
    truth.createIndex()
    return truth


def classes_of(truth, names, count=3):
    """names: the model's, or None for a model without."""
    return match_categories("a.json", truth, names or [None] * count, {"num_classes": count, "class_offset": 1})


def test_categories_are_matched_by_name(capsys):
    assert classes_of(categories("cat", "dog", "bird"), ["cat", "dog", "bird"]) == {1: 1, 2: 2, 3: 3}
    assert capsys.readouterr().err == ""
    assert classes_of(categories("bird", "Traffic_Light", ids=[0, 1]), ["bird", "traffic light", "cat"]) == {
        1: 0,
        2: 1,
        3: 3,
    }
    assert capsys.readouterr().err == (
        "warning: 2 categories of a.json have another id than the model's class of their name, and are matched by name:"
        " 0 'bird' is the model's 1 'bird', 1 'Traffic_Light' is the model's 2 'traffic light'\n"
    )
    assert classes_of(categories("dog", "cat", ids=["u", "v"]), ["cat", "dog", "bird"]) == {1: "v", 2: "u"}
    assert capsys.readouterr().err == ""  # ids that are no numbers disagree with nothing


def test_a_mismatch_is_said_with_the_first_three_pairs(capsys):
    names = [f"thing {i}" for i in range(1, 6)]
    shifted = categories(*names, ids=range(5))
    assert classes_of(shifted, names, 5) == {i: i - 1 for i in range(1, 6)}
    assert capsys.readouterr().err.endswith(
        "0 'thing 1' is the model's 1 'thing 1', 1 'thing 2' is the model's 2 'thing 2',"
        " 2 'thing 3' is the model's 3 'thing 3', ...\n"
    )
    assert classes_of(shifted, None, 5) == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}
    said = capsys.readouterr().err
    assert said.startswith(
        "warning: 1 categories of a.json are none of the model's (ids 1 to 5): the AP of 1 of them is 0."
    )
    assert (
        "0 'thing 1' is none of it, 1 'thing 2' is the model's 1, 2 'thing 3' is the model's 2, ...; with --labels"
        in said
    )
    translated = categories("Katze", "Hund", ids=[1, 2])
    assert classes_of(translated, ["cat", "dog", "bird"]) == {1: 1, 2: 2, 3: 3}
    assert "by id, as no name is the same: 1 'Katze' is the model's 1 'cat', 2 'Hund'" in capsys.readouterr().err


def test_categories_of_other_classes(capsys):
    truth = categories("cat", "zebra", "gnu", objects=[1, 2])
    assert classes_of(truth, ["dog", "cat", "zebras"]) == {2: 1}  # 3 is the gnu's id: not the zebras' too
    assert (
        "2 categories of a.json are none of the model's (ids 1 to 3): the AP of 1 of them is 0"
        in capsys.readouterr().err
    )
    roboflow = categories("pets", "cat", ids=[0, 1], objects=[1])
    assert classes_of(roboflow, None) == {1: 1, 2: 2, 3: 3}
    assert "1 categories of a.json are none of the model's (ids 1 to 3), and have no objects" in capsys.readouterr().err
    for strange in (categories("gnu", ids=[7]), categories("gnu", ids=["u"]), categories("gnu", "cat", objects=[1])):
        with pytest.raises(UserError, match=r"none of its categories is one of the model's .* 'gnu' is none"):
            classes_of(strange, ["cat", "dog", "bird"] if len(strange.cats) > 1 else None)


def test_two_categories_of_one_name():
    twice = categories("pets", "pets", ids=[0, 1], objects=[1])
    assert classes_of(twice, ["pets"], 1) == {1: 1}  # the one that has objects
    with pytest.raises(UserError, match="the categories 0 and 1 are both named 'pets', and both have objects"):
        classes_of(categories("pets", "pets", ids=[0, 1]), ["pets"], 1)
    assert classes_of(categories("pets", "pets"), None) == {1: 1, 2: 2, 3: 3}  # by id they are two


# ---- sizes


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
    assert "all boxes lie within one pixel" in capsys.readouterr().err


# ---- the scripts


@pytest.fixture(scope="module")
def demo_model(convert):
    return convert("demo", "--batch_size", "dynamic")[0]


def evaluated(capsys, model, images, annotations, output, *options):
    """Runs eval_coco.py; returns (metrics, results, what it warned)."""
    options = ["--engine", model, "--input", images, "--annotations", annotations, "--output", output, *options]
    assert eval_coco.main(list(map(str, options))) == 0
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
