"""Annotations for tests: a sound file, what is found in it, and how it is written."""

import json
import uuid

from pycocotools import mask as rle

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


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def some_uuid(i):
    return str(uuid.UUID(int=i))
