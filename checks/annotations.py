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
from pathlib import Path

from commandline import UserError, warn

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from checks.matching import id_text, match_images
from images.aspect import LOOKED_AT, image_size, stored_orientation, warn_of_turned

TABLES = ("images", "annotations", "categories")
# A box may reach past the edge by a labeller's carelessness; from this share of the image on it is another format's box.
CARELESS = 0.1
# Pixels of a side that no image has more of: a width, height or box beyond is taken for none.
LONGEST = 1_000_000
# Square pixels of the largest object that pycocotools counts; no image has as many.
LARGEST = 1e5**2
# What `iscrowd` says of a crowd and of none, as text; COCO's are 1 and 0. Of anything else pycocotools makes a crowd.
CROWD, NO_CROWD = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
# What a zip (as CVAT and Roboflow export) and a gzip begin with.
COMPRESSED = (b"PK\x03\x04", b"\x1f\x8b")


def open_annotations(path, files, exif_rotate=False):
    """The annotations of `path` as they go with the image files: repaired, matched, checked; all before anything is run.

    exif_rotate: the files are turned as their EXIF says. For masks keep_masks goes on from here.
    Returns (pycocotools' COCO, {file: image id}, files that it does not know, ids of its images without a file). Warns of
    what is left out or does not fit, a line each; raises UserError, naming the file, where nothing can be measured.
    """
    truth = load_annotations(path)
    known, unknown, absent = match_images(truth, files, path)
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
    notes, without, areas, crowds = _objects(content["annotations"], images, categories)
    if not notes:
        raise UserError(f"--annotations {path}: no object in it can be used ({_reasons(without) or 'it has none'})")
    _say_left_out(path, without, len(content["annotations"]), "objects")
    _say_twice(path, notes)
    _say_areas(path, areas, len(notes))
    if crowds:
        warn(
            f"--annotations {path}: `iscrowd` of {crowds:,} of {len(notes):,} objects is neither 0 nor 1: they are taken for"
            " crowds, which need not be found"
        )
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
        size = [_number_of(entry.get(side)) for side in ("width", "height")]
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
    """(usable objects, Counter of reasons to leave entries out, Counter of what is odd about areas, crowds not told by 0 or 1)."""
    notes, without, areas, crowds = [], collections.Counter(), collections.Counter(), 0
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
            box = [float(value) for value in entry["bbox"]]
            area, odd = _area(entry.get("area"), box)
            areas.update([odd] if odd else ())
            crowd, told = _crowd(entry.get("iscrowd"))
            crowds += not told
            note = {
                "id": len(notes) + 1,
                "image_id": images[image]["id"],
                "category_id": categories[category]["id"],
                "bbox": box,
                "area": area,
                "iscrowd": crowd,
            }
            if entry.get("segmentation"):
                note["segmentation"] = entry["segmentation"]
            if entry.get("keypoints"):
                note["keypoints"] = entry["keypoints"]
            notes.append(note)
    return notes, without, areas, crowds


NO_AREA = "that are none, for which the box's are taken"


def _area(value, box):
    """(the area of an object, what is odd about it or None); the box's where the file tells none."""
    whole = box[2] * box[3]
    if value is None:
        return whole, None
    if not _is_number(value) or not 0 < value <= LARGEST:
        return whole, NO_AREA
    if value > 1.1 * (box[2] + 1) * (box[3] + 1):  # some count a box's pixels from its first to its last
        return float(value), "larger than the box"
    # A crack or a cable across its box covers more of it; shares and percents of the image are less.
    return float(value), "of less than a 500th of the box" if value < whole / 500 else None


def _crowd(value):
    """(1 for a crowd, else 0; whether that is what the value says)."""
    text = str(value).strip().lower()
    if not value or text in NO_CROWD:
        return 0, True
    return 1, text in CROWD


def _number_of(value):
    """A text that is a number as this number; all else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


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


def _say_areas(path, odd, total):
    """Warns of areas that are none, and where most are not in pixels; a single one that does not fit its box is a slip."""
    misfits = odd.total() - odd[NO_AREA]
    said = {reason: count for reason, count in odd.items() if count and (reason == NO_AREA or misfits > total / 2)}
    if said:
        warn(
            f"--annotations {path}: `area` of {sum(said.values()):,} of {total:,} objects does not fit their box in pixels:"
            f" {_reasons(said)}; sizes small, medium and large are judged by it"
        )


def _say_left_out(path, without, total, what):
    if without:
        count = sum(without.values())
        warn(f"--annotations {path}: {count:,} of {total:,} {what} left out: {_reasons(without)}")


def fit_sizes(path, truth, known, exif_rotate=False):
    """Sets the width and height of the images of `known` {file: id} to the files' own; warns where the annotations' differ, of
    photos that are stored turned where sizes do not tell, and of boxes that cannot be [x, y, width, height] in pixels."""
    differ, told, boxes = [], set(), []
    for number, (file, image_id) in enumerate(known.items()):
        image, size = truth.imgs[image_id], image_size(file, exif_rotate)
        if size is None:
            continue
        annotated = image.get("width"), image.get("height")
        image["width"], image["height"] = size
        if None not in annotated and annotated != size:
            differ.append((file, size, annotated))
            continue
        if annotated == size and size[0] != size[1]:
            told.add(file)
        boxes += [(*note["bbox"], *size, number) for note in truth.imgToAnns[image_id]]
    turned = 0 if exif_rotate else sum(image_size(each, True) == wanted for each, _, wanted in differ)
    if differ:
        file, size, annotated = differ[0]
        mend = f"; with --exif_rotate {turned} of them are" if turned else ""
        warn(
            f"{len(differ)} of {len(known)} images are not as wide and high as --annotations {path} says, so their boxes are"
            f" of a turned or scaled image: {file.name} is {size[0]} x {size[1]}, annotated as"
            f" {annotated[0]} x {annotated[1]}{mend}"
        )
    if not turned and not exif_rotate:
        # What lies on its side and has the size that it is stored in is annotated as it is stored.
        turns = {file: stored_orientation(file) for file in list(known)[:LOOKED_AT]}
        if any(turn != 1 and (turn < 5 or file not in told) for file, turn in turns.items()):
            warn_of_turned(list(known), exif_rotate)
    if boxes:
        _say_strange_boxes(path, np.float64(boxes).T)


def _say_strange_boxes(path, boxes):
    """Warns of boxes that cannot be in pixels of their image, a line each kind. boxes: [x, y, w, h, width, height, image], many."""
    left, top, w, h, width, height, image = boxes
    right, bottom, count = left + w, top + h, len(left)
    beyond = (right > (1 + CARELESS) * width) | (bottom > (1 + CARELESS) * height) | (left >= width) | (top >= height)
    before = (left < -CARELESS * width) | (top < -CARELESS * height) | (right <= 0) | (bottom <= 0)
    outside = beyond | before
    shares = ~outside & (np.maximum(right, bottom) <= 1 + CARELESS) & (np.minimum(width, height) > 1)
    shares &= np.minimum(left, top) >= -CARELESS
    if shares.sum() >= min(3, count):  # one or two among others may be a labeller's slip in the corner
        warn(
            f"--annotations {path}: {shares.sum()} of {count} boxes lie within one pixel; COCO's are in pixels, not in"
            " shares of the image"
        )
    if outside.any():
        warn(
            f"--annotations {path}: {outside.sum()} of {count} boxes reach far beyond their image; COCO's are"
            " [x, y, width, height] in pixels"
        )
    elif _are_percents(left, top, right, bottom, image[np.minimum(width, height) >= 200]):
        warn(
            f"--annotations {path}: all boxes lie within the upper left 100 x 100 pixels of larger images: percents?"
            " COCO's are in pixels"
        )
    elif count >= 10 and _are_ends(left / width, w / width) and _are_ends(top / height, h / height):
        warn(
            f"--annotations {path}: COCO's boxes are [x, y, width, height]: these look like corners, [left, top, right,"
            " bottom], as each is wider and higher than what is left of and above it, and the more so the farther in"
        )


def _are_percents(left, top, right, bottom, large):
    """Whether boxes fill 100 x 100 in the corner of larger images. large: the image of each box in one twice as large."""
    if len(large) < 10 or len(set(large)) < 3:
        return False
    nearest, farthest = max(left.min(), top.min()), np.array([right.max(), bottom.max()])
    return nearest <= 20 and farthest.min() >= 90 and farthest.max() <= 101


def _are_ends(starts, lengths):
    """Whether the lengths of boxes look like their ends, in shares of the image.

    Ends are greater than the starts, all of them; so are lengths of objects that fill their images. But those are the shorter
    the farther in they start, or all alike, and ends follow the starts.
    """
    alike = min(starts.std(), lengths.std()) < 0.03
    return not alike and (lengths > starts).all() and np.corrcoef(starts, lengths)[0, 1] > 0.7


def keep_masks(path, truth, image_ids):
    """Makes the objects' masks on those images run-length encoded, and drops the objects without one, counted.

    A polygon may have several parts; those of fewer than three points are dropped. Raises UserError if no mask is left.
    """
    without, dropped, elsewhere, kept, total = collections.Counter(), 0, 0, [], 0
    for note in truth.dataset["annotations"]:
        if note["image_id"] not in image_ids:
            continue
        total += 1
        encoded, fault = encode_segmentation(note.get("segmentation"), truth.imgs[note["image_id"]])
        if encoded is None:
            without[fault] += 1
        else:
            dropped += fault
            elsewhere += _is_elsewhere(note["bbox"], _mask_box(note["segmentation"], encoded))
            kept.append({**note, "segmentation": encoded})
    if total and not kept:
        raise UserError(
            f"--annotations {path}: no object has a mask that can be used ({_reasons(without)}); use --detection_type bbox"
        )
    _say_left_out(path, without, total, "objects")
    if dropped:
        warn(f"--annotations {path}: {dropped} parts of masks left out: a polygon needs three points or more")
    _say_elsewhere(path, elsewhere, len(kept), "mask lies")
    truth.dataset["annotations"] = kept
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()


def keep_keypoints(path, truth, image_ids, count):
    """Gives each object on those images `keypoints` [x, y, v, ...] of `count`, and num_keypoints, those with v above 0.

    Objects without labelled keypoints are neither to be found nor false alarms (pycocotools ignores them). Raises UserError
    if no object has any.
    """
    without, kept = collections.Counter(), [x for x in truth.dataset["annotations"] if x["image_id"] in image_ids]
    elsewhere = 0
    for note in kept:
        points, fault = note.get("keypoints"), None
        if not isinstance(points, list) or not all(map(_is_number, points)):
            fault = "without keypoints"
        elif len(points) % 3:
            fault = f"with {len(points)} numbers, the model has {count} keypoints ({3 * count})"
        elif len(points) != 3 * count:
            fault = f"with {len(points) / 3:g} keypoints, the model has {count}"
        if fault:
            without[fault] += 1
            points = [0] * (3 * count)
        note |= {"keypoints": points, "num_keypoints": sum(seen > 0 for seen in points[2::3])}
        elsewhere += _points_elsewhere(note["bbox"], points)
    if not any(note["num_keypoints"] for note in kept):
        why = f" ({_reasons(without)})" if without else ""
        raise UserError(f"--annotations {path}: no object has labelled keypoints{why}; give a person_keypoints_*.json")
    if without:
        warn(
            f"--annotations {path}: {sum(without.values()):,} of {len(kept):,} objects do not count: {_reasons(without)}"
        )
    _say_elsewhere(path, elsewhere, sum(note["num_keypoints"] > 0 for note in kept), "keypoints lie")
    truth.dataset["annotations"] = kept
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()


def _say_elsewhere(path, count, total, what):
    if count > total / 100:  # fewer are slips of a labeller, and hardly in the numbers
        warn(
            f"--annotations {path}: of {count:,} of {total:,} objects the {what} outside their own box for the most part;"
            " COCO's are x, y, ... in pixels of the image"
        )


def _is_elsewhere(box, other):
    """Whether most of the other box, [left, top, right, bottom], lies outside an object's box and two pixels about it."""
    x, y, w, h = box
    left, top, right, bottom = other
    width, height = min(right, x + w + 2) - max(left, x - 2), min(bottom, y + h + 2) - max(top, y - 2)
    return max(width, 0) * max(height, 0) < (right - left) * (bottom - top) / 2


def _mask_box(segmentation, encoded):
    """[left, top, right, bottom] of a mask that encode_segmentation took; of polygons by their points: shares fill no pixel."""
    if isinstance(segmentation, dict):
        x, y, w, h = rle.toBbox(encoded)
        return x, y, x + w, y + h
    usable = [part for part in _polygons(segmentation) if is_polygon(part, *encoded["size"])]
    points = np.float64([value for part in usable for value in part]).reshape(-1, 2)
    return *points.min(axis=0), *points.max(axis=0)


def _points_elsewhere(box, points):
    """Whether most labelled keypoints lie outside an object's box, which is grown by half of its longer side."""
    x, y, w, h = box
    around = max(w, h) / 2 + 2
    labelled = [(px, py) for px, py, seen in zip(points[::3], points[1::3], points[2::3], strict=True) if seen > 0]
    inside = sum(abs(px - x - w / 2) <= w / 2 + around and abs(py - y - h / 2) <= h / 2 + around for px, py in labelled)
    return inside < len(labelled) / 2


def encode_segmentation(segmentation, image):
    """COCO's polygons or run lengths as (run-length encoding of the whole image, parts left out), else (None, why)."""
    height, width = image.get("height"), image.get("width")
    if not height or not width:
        return None, "of an image whose size is not known"
    if not segmentation:
        return None, "without a mask"
    if isinstance(segmentation, dict):
        runs = run_lengths(segmentation.get("counts"))
        if segmentation.get("size") is None:
            return None, "with run lengths without a size"
        if segmentation.get("size") != [height, width]:
            return None, "with a mask of another size than the image"
        if runs is None or sum(runs) != height * width:
            return None, "with broken run lengths"
        encoded, parts = rle.frPyObjects({"size": [height, width], "counts": runs}, height, width), 0
    elif isinstance(segmentation, list):
        polygons = _polygons(segmentation)
        usable = [points for points in polygons if is_polygon(points, height, width)]
        if not usable:
            return None, _polygon_fault(polygons)
        encoded, parts = rle.merge(rle.frPyObjects(usable, height, width)), len(polygons) - len(usable)
    else:
        return None, "without a mask"
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}, parts


def _polygons(segmentation):
    """The polygons of a mask, also of one that is a polygon itself."""
    return [segmentation] if _is_number(segmentation[0]) else segmentation


def _polygon_fault(polygons):
    """Why none of those parts of a mask is a polygon, by the first one."""
    first = polygons[0]
    if isinstance(first, dict):
        return "with run lengths in a list"
    values = first if isinstance(first, list) else [first]
    if any(isinstance(value, list) for value in values) or all(isinstance(x, list) and len(x) == 2 for x in polygons):
        return "with a polygon of pairs, not [x, y, x, y, ...]"
    if any(isinstance(value, str) for value in values):
        return "with a polygon of text"
    odd = isinstance(first, list) and len(first) % 2
    return "with a polygon of an odd number of values" if odd else "with a polygon that encloses nothing"


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
