"""COCO annotation files as people's tools write them, made into what the metric needs.

labelme, CVAT, Label Studio, Roboflow, voc2coco and FiftyOne each leave out or bend something of the format
(cocodataset.org/#format-data). What can be filled in is; what cannot be used is left out, counted and said in one line.
Boxes are [x, y, width, height] in pixels.
"""

import collections
import contextlib
import io
import json
import math
import warnings
from pathlib import Path

from commandline import UserError, warn

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from checks.matching import id_text, match_images

TABLES = ("images", "annotations", "categories")
# A box may reach past the edge by a labeller's carelessness; from this share of the image on it is another format's box.
CARELESS = 0.1
# Pixels of a side that no image has more of: a width, height or box beyond is taken for none.
LONGEST = 1_000_000
# What `iscrowd` says of a crowd, as text; COCO's is 1.
CROWD = ("1", "1.0", "true", "yes")
# What a zip (as CVAT and Roboflow export) and a gzip begin with.
COMPRESSED = (b"PK\x03\x04", b"\x1f\x8b")
ORIENTATION = 0x0112  # EXIF's tag; from 5 on the picture is stored lying on its side


def open_annotations(path, files, exif_rotate=False):
    """The annotations of `path` as they go with the image files: repaired, matched, checked; all before anything is run.

    exif_rotate: the files are turned as their EXIF says. For masks keep_masks goes on from here.
    Returns (pycocotools' COCO, {file: image id}, files that it does not know, ids of its images without a file). Warns of
    what is left out or does not fit, a line each; raises UserError, naming the file, where nothing can be measured.
    """
    truth = load_annotations(path)
    known, unknown, absent = match_images(truth, files)
    fit_sizes(path, truth, known, exif_rotate)
    return truth, known, unknown, absent


def load_annotations(path):
    """Reads a COCO file with boxes; returns pycocotools' COCO of its images, categories and usable objects.

    Images and categories keep their ids, whatever their type, and objects refer to them by these; `imgs` have file_name,
    width and height, and `cats` have a name, where the file tells them. Each object has an id from 1 on (to pycocotools 0
    is "no match"), a bbox, area (else the box's), iscrowd (else 0), its segmentation and keypoints as they are. Raises UserError.
    """
    content = read_json(path)
    images, without = _images(content["images"], path)
    _say_left_out(path, without, len(content["images"]), "images")
    categories, without = _categories(content["categories"], path)
    _say_left_out(path, without, len(content["categories"]), "categories")
    if not images or not categories:
        raise UserError(f"--annotations {path}: no images or no categories with an id in it; give an instances_*.json")
    notes, without = _objects(content["annotations"], images, categories)
    if not notes:
        raise UserError(f"--annotations {path}: no object in it can be used ({_reasons(without) or 'it has none'})")
    _say_left_out(path, without, len(content["annotations"]), "objects")
    _say_twice(path, notes)
    truth = COCO()
    truth.dataset = {"images": list(images.values()), "categories": list(categories.values()), "annotations": notes}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def read_json(path):
    """The content of a COCO file, a dict with lists of images, annotations and categories; raises UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--annotations {path}: no such file")
    if not path.is_file():
        raise UserError(f"--annotations {path}: not a file; give an instances_*.json")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--annotations {path}: cannot be read: {error.strerror}") from error
    if data.startswith(COMPRESSED):
        raise UserError(f"--annotations {path}: a compressed file; unpack it and give the instances_*.json in it")
    try:
        content = json.loads(data)  # tells UTF-8, -16 and -32 apart, and takes a byte order mark
    except UnicodeDecodeError as error:
        if b"\0" in data[:1024]:
            raise UserError(f"--annotations {path}: no text, so no JSON; give an instances_*.json") from error
        raise UserError(f"--annotations {path}: its text is not UTF-8; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        why = "the file is empty" if not data.strip() else f"no JSON: {str(error)[:100]}"
        raise UserError(
            f"--annotations {path}: not a COCO annotation file ({why}); give an instances_*.json"
        ) from error
    if isinstance(content, list):
        raise UserError(f"--annotations {path}: a list, as of results; give the annotations, an instances_*.json")
    if not isinstance(content, dict):
        raise UserError(f"--annotations {path}: not a COCO annotation file; give an instances_*.json")
    notes = content.get("annotations")
    for key, kind in (("segments_info", "panoptic annotations"), ("caption", "captions")):
        if isinstance(notes, list) and any(isinstance(note, dict) and key in note for note in notes[:1]):
            raise UserError(f"--annotations {path}: {kind}, which have no boxes; give an instances_*.json")
    missing = [key for key in TABLES if not isinstance(content.get(key), list) or not content[key]]
    if missing:
        raise UserError(f"--annotations {path}: no {' and no '.join(missing)} in it; give an instances_*.json")
    return content


def _images(entries, path):
    """({id as text: image}, Counter of reasons to leave entries out)."""
    images, without = {}, collections.Counter()
    for entry in entries:
        key = id_text(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            without["without an id"] += 1
            continue
        image = {"id": entry["id"]}
        if entry.get("file_name") not in (None, ""):
            image["file_name"] = str(entry["file_name"])
        size = [entry.get(side) for side in ("width", "height")]
        if all(_is_number(side) and 1 <= side <= LONGEST for side in size):
            image["width"], image["height"] = map(int, size)
        if key not in images:
            images[key] = image
        elif images[key].get("file_name") == image.get("file_name"):
            without["there twice"] += 1
        else:
            both = " and ".join(str(each.get("file_name")) for each in (images[key], image))
            raise UserError(f"--annotations {path}: two images have the id {_shown(key)}: {both}; give each its own")
    return images, without


def _categories(entries, path):
    """({id as text: category}, Counter of reasons to leave entries out)."""
    categories, without = {}, collections.Counter()
    for entry in entries:
        key = id_text(entry.get("id")) if isinstance(entry, dict) else None
        if key is None:
            without["without an id"] += 1
            continue
        category = {"id": entry["id"]}
        if name := id_text(entry.get("name")):
            category["name"] = " ".join(name.split())
        if key not in categories:
            categories[key] = category
        elif categories[key].get("name") == category.get("name"):
            without["there twice"] += 1
        else:
            both = " and ".join(str(each.get("name")) for each in (categories[key], category))
            raise UserError(
                f"--annotations {path}: two categories have the id {_shown(key)}: {both}; give each its own"
            )
    return categories, without


def _objects(entries, images, categories):
    """(usable objects, Counter of reasons to leave entries out)."""
    notes, without = [], collections.Counter()
    for entry in entries:
        if not isinstance(entry, dict):
            without["that are no annotations"] += 1
            continue
        image, category = id_text(entry.get("image_id")), id_text(entry.get("category_id"))
        if image not in images:
            without["without an image id" if image is None else ("image", image)] += 1
        elif category not in categories:
            without["without a category id" if category is None else ("category", category)] += 1
        elif fault := _box_fault(entry.get("bbox")):
            without[fault] += 1
        else:
            box, area = [float(value) for value in entry["bbox"]], entry.get("area")
            note = {
                "id": len(notes) + 1,
                "image_id": images[image]["id"],
                "category_id": categories[category]["id"],
                "bbox": box,
                "area": float(area) if _is_number(area) and area > 0 else box[2] * box[3],
                "iscrowd": int(str(entry.get("iscrowd")).lower() in CROWD),
            }
            if entry.get("segmentation"):
                note["segmentation"] = entry["segmentation"]
            if entry.get("keypoints"):
                note["keypoints"] = entry["keypoints"]
            notes.append(note)
    return notes, without


def _is_number(value):
    """A real number that a float can hold; JSON's NaN, Infinity and 10^400 are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _box_fault(box):
    """Why a value is no box that can be found, or None."""
    if box is None or box == []:
        return "without a box"
    if not isinstance(box, list) or len(box) != 4:
        return "with a box that is not four numbers"
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in box):
        return "with a box that is not four numbers"
    if not all(map(_is_number, box)):
        return "with a box that is not finite"
    if any(abs(value) > LONGEST for value in box):
        return "with a box larger than any image"
    return None if box[2] > 0 and box[3] > 0 else "with a box without area"


def _shown(text):
    return text if len(text) <= 40 else f"{text[:37]}..."


def _reasons(without):
    """A Counter of reasons, texts or (table, id), as one phrase: "7 without a box, 5 of category 777, which ..."."""
    phrases = [f"{count} {reason}" for reason, count in without.items() if isinstance(reason, str)]
    for table, plural in (("image", "images"), ("category", "categories")):
        strange = {reason[1]: count for reason, count in without.items() if reason[0] == table}
        if strange:
            named = ", ".join(_shown(key) for key in list(strange)[:3])
            more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
            name = table if len(strange) == 1 else plural
            phrases.append(f"{sum(strange.values())} of {name} {named}{more}, which the file does not define")
    return ", ".join(phrases)


def _say_twice(path, notes):
    """Warns of objects whose box and category another of the same image has: each is to be found, and one detection finds one."""
    seen = collections.Counter((note["image_id"], note["category_id"], *note["bbox"]) for note in notes)
    if twice := len(notes) - len(seen):
        warn(
            f"--annotations {path}: {twice:,} of {len(notes):,} objects have the box and the category of another one, as when"
            " exports are put together: each counts, so recall and AP come out low"
        )


def _say_left_out(path, without, total, what):
    if without:
        count = sum(without.values())
        warn(f"--annotations {path}: {count:,} of {total:,} {what} left out: {_reasons(without)}")


def fit_sizes(path, truth, known, exif_rotate=False):
    """Sets the width and height of the images of `known` {file: id} to the files' own; warns where the annotations'
    differ, and of boxes that cannot be in pixels."""
    differ, outside, fractions, objects = [], 0, 0, 0
    for file, image_id in known.items():
        image, size = truth.imgs[image_id], image_size(file, exif_rotate)
        if size is None:
            continue
        annotated = image.get("width"), image.get("height")
        image["width"], image["height"] = size
        if None not in annotated and annotated != size:
            differ.append((file, size, annotated))
            continue
        corners = [(x + w, y + h) for x, y, w, h in (note["bbox"] for note in truth.imgToAnns[image_id])]
        objects += len(corners)
        outside += sum(max(x / size[0], y / size[1]) > 1 + CARELESS for x, y in corners)
        fractions += sum(max(corner) <= 1 + CARELESS for corner in corners) if min(size) > 1 else 0
    if differ:
        file, size, annotated = differ[0]
        turned = 0 if exif_rotate else sum(image_size(each, True) == wanted for each, _, wanted in differ)
        mend = f"; with --exif_rotate {turned} of them are" if turned else ""
        warn(
            f"{len(differ)} of {len(known)} images are not as wide and high as --annotations {path} says, so their boxes are"
            f" of a turned or scaled image: {file.name} is {size[0]} x {size[1]}, annotated as"
            f" {annotated[0]} x {annotated[1]}{mend}"
        )
    if objects and fractions == objects:
        warn(f"--annotations {path}: all boxes lie within one pixel; COCO's are in pixels, not in shares of the image")
    elif outside:
        warn(
            f"--annotations {path}: {outside} of {objects} boxes reach far beyond their image; COCO's are"
            " [x, y, width, height] in pixels"
        )


def image_size(path, exif_rotate=False):
    """(width, height) of an image file by its header, or None where it has none: what is wrong the loader says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                turned = exif_rotate and image.getexif().get(ORIENTATION, 1) >= 5
                return image.size[::-1] if turned else image.size
    except Exception:  # Pillow's readers raise whatever a broken file leads them into
        return None


def keep_masks(path, truth, image_ids):
    """Makes the objects' masks on those images run-length encoded, and drops the objects without one, counted.

    A polygon may have several parts; those of fewer than three points are dropped. Raises UserError if no mask is left.
    """
    without, dropped, kept, total = collections.Counter(), 0, [], 0
    for note in truth.dataset["annotations"]:
        if note["image_id"] not in image_ids:
            continue
        total += 1
        encoded, fault = encode_segmentation(note.get("segmentation"), truth.imgs[note["image_id"]])
        if encoded is None:
            without[fault] += 1
        else:
            dropped += fault
            kept.append({**note, "segmentation": encoded})
    if total and not kept:
        raise UserError(
            f"--annotations {path}: no object has a mask that can be used ({_reasons(without)}); use --detection_type bbox"
        )
    _say_left_out(path, without, total, "objects")
    if dropped:
        warn(f"--annotations {path}: {dropped} parts of masks left out: a polygon needs three points or more")
    truth.dataset["annotations"] = kept
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()


def keep_keypoints(path, truth, image_ids, count):
    """Gives each object on those images `keypoints` [x, y, v, ...] of `count`, and num_keypoints, those with v above 0.

    Objects without labelled keypoints are neither to be found nor false alarms (pycocotools ignores them). Raises UserError
    if no object has any.
    """
    without, kept = collections.Counter(), [x for x in truth.dataset["annotations"] if x["image_id"] in image_ids]
    for note in kept:
        points, fault = note.get("keypoints"), None
        if not isinstance(points, list) or not all(map(_is_number, points)):
            fault = "without keypoints"
        elif len(points) != 3 * count:
            fault = f"with {len(points) / 3:g} keypoints, the model has {count}"
        if fault:
            without[fault] += 1
            points = [0] * (3 * count)
        note |= {"keypoints": points, "num_keypoints": sum(seen > 0 for seen in points[2::3])}
    if not any(note["num_keypoints"] for note in kept):
        why = f" ({_reasons(without)})" if without else ""
        raise UserError(f"--annotations {path}: no object has labelled keypoints{why}; give a person_keypoints_*.json")
    if without:
        warn(
            f"--annotations {path}: {sum(without.values()):,} of {len(kept):,} objects do not count: {_reasons(without)}"
        )
    truth.dataset["annotations"] = kept
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()


def encode_segmentation(segmentation, image):
    """COCO's polygons or run lengths as (run-length encoding of the whole image, parts left out), else (None, why)."""
    height, width = image.get("height"), image.get("width")
    if not height or not width:
        return None, "of an image whose size is not known"
    if not segmentation:
        return None, "without a mask"
    if isinstance(segmentation, dict):
        runs = run_lengths(segmentation.get("counts"))
        if segmentation.get("size") != [height, width]:
            return None, "with a mask of another size than the image"
        if runs is None or sum(runs) != height * width:
            return None, "with broken run lengths"
        encoded, parts = rle.frPyObjects({"size": [height, width], "counts": runs}, height, width), 0
    elif isinstance(segmentation, list):
        polygons = [segmentation] if _is_number(segmentation[0]) else segmentation
        usable = [points for points in polygons if is_polygon(points, height, width)]
        if not usable:
            return None, "with a polygon that encloses nothing"
        encoded, parts = rle.merge(rle.frPyObjects(usable, height, width)), len(polygons) - len(usable)
    else:
        return None, "without a mask"
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}, parts


def is_polygon(points, height, width):
    """Whether `points` is [x, y, x, y, ...], three points or more, about an image of that size.

    Of four numbers pycocotools would make a box. It draws each side point by point, so their length must have a limit:
    no outline is longer than the image has pixels.
    """
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2 or not set(map(type, points)) <= {int, float}:
        return False
    try:
        points = np.float64(points).reshape(-1, 2)
    except OverflowError:
        return False
    around = height + width  # NaN is not within anything
    return np.abs(points).max() <= 10 * around and np.abs(np.diff(points, axis=0)).sum() <= height * width + 40 * around


def run_lengths(counts):
    """The runs of a COCO mask, a list of int from 0 on, of its list or its text; None where it is neither.

    The text (rleToString in pycocotools' maskApi.c) has five bits a character, least first, from "0" on; the sixth bit says
    that more follow, the fifth of the last is the sign; from the third run on it is the difference to the run two before.
    """
    if isinstance(counts, list):
        whole = all(isinstance(run, int) and not isinstance(run, bool) and 0 <= run < 2**31 for run in counts)
        return counts if whole else None
    if not isinstance(counts, str):
        return None
    runs, value, shift = [], 0, 0
    for character in counts:
        piece = ord(character) - 48
        if not 0 <= piece < 64 or shift > 30:
            return None
        value |= (piece & 31) << shift
        shift += 5
        if not piece & 32:
            value -= (piece & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            if not 0 <= runs[-1] < 2**31:
                return None
            value = shift = 0
    return runs if not shift else None
