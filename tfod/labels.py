"""Class names: TFOD's label maps (.pbtxt) and text files with one name a line.

Names are lists by class, counted from 0; None where a class has no name.
"""

import collections
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
# Of files beside a model, so many bytes are read to see whether they are label maps: many pages of a licence may come first.
GLANCE = 1 << 20
# What a user calls a label map: one of such a name that is not taken is told of.
LABEL_MAP_NAME = re.compile(r"label.*map.*\.(pbtxt|txt)\Z", re.IGNORECASE)
# What the lists of TF-slim and TFLite begin with, in the place of class 0; ??? also stands where no class is.
BACKGROUND = {"background", "???"}
COMMENT = re.compile(r"#(?:[\s#]|\Z)")  # "#1" may be a name
# Lines that are more than a name: a number before it, or behind it, where a space proves nothing ("class 1").
NUMBER_FIRST = re.compile(r"(\d{1,6})(\s*[:;,=|\t.)]\s*|\s+)(\S.*)")
NUMBER_LAST = re.compile(r"(\S.*?)\s*[:;,=|\t]\s*(\d{1,6})")


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
    if Path(path).suffix.lower() == ".pbtxt" or LABEL_MAP.match(text):
        names = _label_map_names(path, text, num_classes)
    else:
        names = _list_names(path, text, num_classes)
    repeated = sorted(name for name, count in collections.Counter(filter(None, names)).items() if count > 1)
    if repeated:
        more = f" (and {len(repeated) - 1} more such)" if repeated[1:] else ""
        warn(f"{path}: {repeated[0]!r} is the name of {names.count(repeated[0])} classes{more}; give each its own")
    return names


def _list_names(path, text, num_classes):
    """The names of a text file with one name a line."""
    every = [line.strip() for line in text.splitlines()]
    while every and not every[-1]:
        every.pop()
    lines = [line for line in every if not COMMENT.match(line)]
    used, comments = [line for line in lines if line], len(every) - len(lines)
    # A heading (`names:`, `id,name`) makes one line too many.
    form = _form(used) or (_form(used[1:]) if len(used) > num_classes else None)
    if form:
        raise UserError(f"--labels {path}: {form}; give one bare name a line, or a label_map.pbtxt")
    background = bool(lines) and lines[0].lower() in BACKGROUND
    if background and len(lines) == num_classes:
        raise UserError(
            f"--labels {path}: its first line, {lines[0]!r}, takes the place of a class: {num_classes - 1} names for"
            f" {num_classes} classes; give the names of all, in class order, without a background"
        )
    if background and len(lines) == num_classes + 1:
        warn(f"{path}: its first line, {lines[0]!r}, is left out: the model's classes are counted without a background")
        lines = lines[1:]
    if len(lines) != num_classes:
        apart = f" ({comments} more are comments, # ...)" if comments else ""
        raise UserError(
            f"--labels {path}: {len(lines)} lines for {num_classes} classes{apart}; one name a line, in class order,"
            " without a background"
        )
    if comments:
        warn(f"{path}: lines that begin with # are left out as comments: {comments}")
    names = [None if line in ("", "???") else line for line in lines]
    if None in names:
        warn(f"{path}: {names.count(None)} of {num_classes} classes are without a name: blank lines, or ???")
    return names


def _form(lines):
    """What lines seem to be that are no bare names, else None. lines: without blank ones."""
    if not lines:
        return None
    if (lines[0][0], lines[-1][-1]) in (("[", "]"), ("{", "}")):
        return "it seems to be JSON"
    if all(line.startswith("- ") for line in lines):
        return "it seems to be YAML"
    first, last = ([pattern.fullmatch(line) for line in lines] for pattern in (NUMBER_FIRST, NUMBER_LAST))
    if all(first) and _runs(match[1] for match in first):
        # "1 euro" and "2 euro" are names, as are "1 finger" and "2 fingers": what is numbered differs throughout.
        apart = len({match[3] for match in first}) == len(lines) > 1
        if apart or all(match[2].strip() for match in first):
            return "its lines are numbered"
    return "its lines are numbered" if all(last) and _runs(match[2] for match in last) else None


def _runs(numbers):
    """Whether texts of numbers count from 0 or from 1."""
    numbers = [int(number) for number in numbers]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] in (0, 1)


def _label_map_names(path, text, num_classes):
    label_map = _message_class()()
    try:
        text_format.Parse(text, label_map, allow_unknown_field=True)
    except text_format.ParseError as error:
        raise UserError(f'--labels {path}: line {error}; an item is `item {{ id: 1 name: "cat" }}`') from error
    names, twice = {}, []
    for item in label_map.item:
        name = item.display_name or item.name or None
        # TFOD's label_map_util asks for the name, whatever is displayed.
        if item.id == 0 and "background" in (item.name, name):
            continue
        if item.id in names and names[item.id] != name:
            raise UserError(
                f"--labels {path}: two items have the id {item.id} ({names[item.id]!r}, {name!r}); give each class its own"
            )
        if not 1 <= item.id <= num_classes:
            raise UserError(f"--labels {path}: {name!r} has the id {item.id}, the model's ids are 1 to {num_classes}")
        twice += [item.id] if item.id in names else []
        names[item.id] = name
    if num_classes not in names:
        raise UserError(
            f"--labels {path}: its ids end at {max(names, default=0)}, the model has {num_classes} classes; give its own"
        )
    nameless = list(names.values()).count(None)
    if nameless == len(names):
        raise UserError(f'--labels {path}: no item has a name; an item is `item {{ id: 1 name: "cat" }}`')
    if nameless:
        warn(f"{path}: {nameless} of its {len(names)} items are without a name: they are shown by number")
    if twice:
        warn(f"{path}: items that stand there twice, the same both times: id {', '.join(map(str, twice[:9]))}")
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
    """The paths of the label maps and the labels.txt that lie in a folder. Warns of what is called a label map and is none."""
    paths = [path for path in Path(folder).glob("*") if path.suffix.lower() == ".pbtxt" or _is_list(path)]
    paths = sorted(filter(Path.is_file, paths), key=lambda path: (_is_list(path), path))  # lists of names last
    found = [path for path in paths if _holds_names(path)]
    for path in paths:
        if path not in found and LABEL_MAP_NAME.search(path.name):
            warn(f'{path} is not taken: a label map begins with `item {{ id: 1 name: "cat" }}`, comments with #')
    return found


def _is_list(path):
    """Whether a file may be a list of names, by its own name."""
    return path.name == "labels.txt" or (path.suffix.lower() == ".txt" and bool(LABEL_MAP_NAME.search(path.name)))


def _holds_names(path):
    """Whether a file beside a model is a label map, or may be a list of names."""
    with open(path, "rb") as file:
        data = file.read(GLANCE)
    try:
        return _is_list(path) or bool(LABEL_MAP.match(decode_text(data, errors="replace")))
    except ValueError:
        return False


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
