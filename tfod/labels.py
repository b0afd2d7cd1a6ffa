"""Class names: TFOD's label maps (.pbtxt) and text files with one name a line.

Names are lists by class, counted from 0; None where a class has no name.
"""

import functools
import re
from pathlib import Path

from commandline import UserError, decode_text, warn

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from fonts import label_font

COCO_LABELS = Path(__file__).resolve().parent.parent / "labels_coco.txt"
COCO_CLASSES = 90  # a model of so many that has no names of its own is taken for COCO's
LABELS_HELP = (
    "class names: a label_map.pbtxt, or a text file with one name a line; default: those in the model, else of a label map"
    " or labels.txt beside it, else COCO's for a model of 90 classes"
)
# The keypoints of COCO's people, in the order of its annotations, and the lines between them (person_keypoints_*.json).
COCO_KEYPOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee"),
    *("left_ankle", "right_ankle"),
)
COCO_SKELETON = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9))
COCO_SKELETON += ((8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))
# How a label map begins, comments apart.
LABEL_MAP = re.compile(r"\A(?:\s|#.*\n)*item\s*:?\s*[{<]")
# Of files beside a model, so much is read to see whether they are label maps.
GLANCE = 4096


def read_labels(path, num_classes):
    """Reads the names of a model's classes. Raises UserError, in one line, where the file does not fit the model.

    path: a label map (`item { id: 1 name: "..." display_name: "..." }` in any order, ids from 1, gaps allowed), or a text
    file with one name a line.
    """
    try:
        text = decode_text(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"--labels {path}: {error.strerror}; give a label_map.pbtxt or a text file with one class name a line"
        ) from error
    except ValueError as error:
        raise UserError(f"--labels {path}: it is not text; give a label_map.pbtxt or a text file") from error
    if Path(path).suffix == ".pbtxt" or LABEL_MAP.match(text):
        return _label_map_names(path, text, num_classes)
    names = [line.strip() or None for line in text.splitlines()]
    while names and names[-1] is None:
        names.pop()
    if len(names) != num_classes:
        raise UserError(
            f"--labels {path}: {len(names)} lines for {num_classes} classes; one name a line, in class order,"
            " without a background"
        )
    return names


def _label_map_names(path, text, num_classes):
    label_map = _message_class()()
    try:
        text_format.Parse(text, label_map, allow_unknown_field=True)
    except text_format.ParseError as error:
        raise UserError(f'--labels {path}: line {error}; an item is `item {{ id: 1 name: "cat" }}`') from error
    names = {}
    for item in label_map.item:
        name = item.display_name or item.name or None
        if item.id == 0 and name == "background":
            continue
        if item.id in names:
            raise UserError(f"--labels {path}: two items have the id {item.id} ({names[item.id]!r}, {name!r})")
        if not 1 <= item.id <= num_classes:
            raise UserError(f"--labels {path}: {name!r} has the id {item.id}, the model's ids are 1 to {num_classes}")
        names[item.id] = name
    if num_classes not in names:
        raise UserError(
            f"--labels {path}: its ids end at {max(names, default=0)}, the model has {num_classes} classes; give its own"
        )
    return [names.get(number) for number in range(1, num_classes + 1)]


def keypoint_names(path, tasks, count):
    """(names of a model's `count` keypoints or None, pairs of them to be joined or None).

    path: a label map whose items may have `keypoints { id: 0 label: "nose" }`, or None. tasks: the config's
    keypoint_estimation_task. Names that are COCO's (17 in the config's keypoint_label_to_std, whose order is not theirs) are
    in COCO's order.
    """
    names = _label_map_keypoints(path, {task.keypoint_class_name for task in tasks}) if path else None
    if not names and {entry.key for task in tasks for entry in task.keypoint_label_to_std} == set(COCO_KEYPOINTS):
        names = COCO_KEYPOINTS
    if names and len(names) != count:
        warn(f"{path}: {len(names)} keypoints, the model has {count}: they are without names")
        names = None
    return names, COCO_SKELETON if names == COCO_KEYPOINTS else None


def _label_map_keypoints(path, classes):
    """The keypoints' labels, by their ids, of the item of one of the classes, else of the only one that has some; or None."""
    label_map = _message_class()()
    try:
        text_format.Parse(decode_text(Path(path).read_bytes()), label_map, allow_unknown_field=True)
    except (OSError, ValueError, text_format.ParseError):
        return None  # a list of names
    items = [item for item in label_map.item if item.keypoints]
    items = [item for item in items if item.name in classes] or items
    points = sorted(items[0].keypoints, key=lambda point: point.id) if len(items) == 1 else []
    return tuple(point.label for point in points) or None


def _message_class():
    """The class of a label map (object_detection/protos/string_int_label_map.proto; only what is read)."""
    Field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="label_map.proto", package="label_map", syntax="proto2")
    item = file.message_type.add(name="Item")
    for number, (name, kind) in enumerate({"name": "STRING", "id": "INT32", "display_name": "STRING"}.items(), 1):
        item.field.add(name=name, number=number, type=getattr(Field, f"TYPE_{kind}"), label=Field.LABEL_OPTIONAL)
    items = file.message_type.add(name="LabelMap")
    items.field.add(
        name="item", number=1, type=Field.TYPE_MESSAGE, type_name=".label_map.Item", label=Field.LABEL_REPEATED
    )
    point = file.message_type.add(name="KeypointMap")
    for number, (name, kind) in enumerate({"id": "INT32", "label": "STRING"}.items(), 1):
        point.field.add(name=name, number=number, type=getattr(Field, f"TYPE_{kind}"), label=Field.LABEL_OPTIONAL)
    item.field.add(
        name="keypoints",
        number=5,
        type=Field.TYPE_MESSAGE,
        type_name=".label_map.KeypointMap",
        label=Field.LABEL_REPEATED,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("label_map.LabelMap"))


def find_labels(folders, num_classes):
    """(path, names) of the label map or labels.txt that lies in one of the folders and fits; (None, None) if none does.

    One that does not fit, or two that differ, are warned about; OSError is raised for one that cannot be read.
    """
    found = {}
    for path in (path for folder in folders for path in label_files(folder)):
        try:
            found[path] = read_labels(path, num_classes)
        except UserError as error:
            warn(f"class names beside the model are left out: {str(error).removeprefix('--labels ')}")
    path = next(iter(found), None)
    if any(names != found[path] for names in found.values()):
        warn(f"{' and '.join(map(str, found))} differ: neither is taken; choose with --labels")
        return None, None
    return path, found.get(path)


def label_files(folder):
    """The paths of the label maps and the labels.txt that lie in a folder."""
    paths = [*sorted(Path(folder).glob("*.pbtxt")), Path(folder, "labels.txt")]
    return [path for path in paths if path.is_file() and _holds_names(path)]


def _holds_names(path):
    """Whether a file beside a model is a label map, or a text file, which labels.txt alone can be."""
    with open(path, "rb") as file:
        return path.suffix == ".txt" or bool(LABEL_MAP.match(file.read(GLANCE).decode("utf-8-sig", errors="replace")))


def labels_of(path, metadata, engine):
    """The names to show a model's classes by: of --labels (`path`), else of its metadata, else of a file beside `engine`,
    else COCO's for a model of 90 classes, else none. Says which file nobody named, and warns of names that pictures cannot show."""
    count, found = metadata["num_classes"], None
    names = read_labels(path, count) if path else metadata.get("labels")
    if not names:
        found, names = find_labels([Path(engine).parent], count)
    if found:
        print(f"Class names: {count}, of {found.name} beside the model; --labels names others")
    names = names or default_labels(count)
    label_font.warn_of_undrawable(names)
    return names


@functools.cache
def default_labels(count):
    """The names of a model's classes that has none of its own: COCO's where there are 90, else None each."""
    return read_labels(COCO_LABELS, count) if count == COCO_CLASSES else [None] * count
