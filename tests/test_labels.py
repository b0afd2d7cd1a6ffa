"""Class names: label maps and text files, found, read, put into the files, and refused in one line where they do not fit."""

import json
import random
import shutil
import time

from commandline import UserError

import onnx
import pytest
from conftest import DEMO, DEMO_MODEL, model_folder, need_shared, variants

import build_engine
import create_onnx
import infer
import onnx_utils
from runtimes import open_detector
from tfod.labels import COCO_LABELS, find_labels, labels_of, read_labels

SHAPES = ["circle", "square", "triangle", "star", "ring"]
HANDS = ["fist", "palm", "peace", "ok", "like", "stop", "rock"]


def item(number, name, **more):
    fields = "".join(f"  {key}: {value!r}\n" for key, value in more.items())
    return f'item {{\n  id: {number}\n  name: "{name}"\n{fields}}}\n'


def read(tmp_path, text, classes, name="label_map.pbtxt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_labels(path, classes)


def test_the_label_maps_of_the_cases():
    assert read_labels(need_shared("cases", "labels", "label_map.pbtxt"), 7) == HANDS
    assert read_labels(need_shared("cases", "labels", "bom.txt"), 7) == HANDS


@pytest.mark.parametrize("name", ["label_map.pbtxt", "labels.txt", "names"])
@pytest.mark.parametrize(
    ("text", "names"),
    [
        (item(2, "b") + item(1, "a"), ["a", "b"]),  # any order
        (item(1, "a") + item(3, "c"), ["a", None, "c"]),  # a gap
        (item(1, "/m/01g317", display_name="person"), ["person"]),  # the zoo's own
        ("# mine\n\nitem: { id: 1, name: 'Bus' }\nitem <id: 2; name: 'Car'>", ["Bus", "Car"]),
        ("item { id: 0 name: 'background' }\n" + item(1, "a"), ["a"]),
        (item(0, "background", display_name="Background") + item(1, "a"), ["a"]),  # as TFOD's label_map_util
        ("\ufeff" + item(1, "\u0441\u043e\u0431\u0430\u043a\u0430"), ["\u0441\u043e\u0431\u0430\u043a\u0430"]),
        (item(1, "a").replace("\n", "\r\n"), ["a"]),
        (item(1, "caf\u00e9").encode("cp1252"), ["caf\u00e9"]),
        (item(1, "a").encode("utf-16"), ["a"]),
        (
            item(1, "a", instance_count=7, frequency="'f'").replace("\"'f'\"", "FREQUENT"),
            ["a"],
        ),  # fields that are not read
    ],
)
def test_label_maps(tmp_path, name, text, names):
    """Whatever the file is called: a pbtxt read line by line draws `item { id: 3 }` on a beagle."""
    assert read(tmp_path, text, len(names), name) == names


def test_text_files(tmp_path):
    assert read(tmp_path, "cat\ndog\n\n", 2, "a.txt") == ["cat", "dog"]
    assert read(tmp_path, "\ufeffcat\r\n dog \r\n", 2, "a.txt") == ["cat", "dog"]
    assert read(tmp_path, "cat\n\ndog", 3, "a.txt") == ["cat", None, "dog"]
    assert read_labels(DEMO_MODEL / "labels.txt", 5) == SHAPES


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (item(1, "a") + item(1, "b"), "m.pbtxt", "two items have the id 1 ('a', 'b'); give each class its own"),
        (item(1, "a") + item(4, "d"), "m.pbtxt", "'d' has the id 4, the model's ids are 1 to 3"),
        (item(0, "a") + item(3, "d"), "m.pbtxt", "'a' has the id 0"),
        (item(1, "a") + item(2, "b"), "m.pbtxt", "its ids end at 2, the model has 3 classes"),
        ("item { id: 1 name: cat }", "m.pbtxt", "line 1"),
        ("item { id: 1\n name: 'cat' \n", "m.pbtxt", "line"),
        ("cat\ndog", "m.pbtxt", "line 2"),
        ("", "m.pbtxt", "its ids end at 0"),
        ("cat\ndog", "m.txt", "2 lines for 3 classes"),
        ("background\na\nb\n", "m.txt", "its first line, 'background', takes the place of a class: 2 names for 3"),
        ("???\na\nb\n", "m.txt", "its first line, '???', takes the place of a class"),
        ("# mine\na\nb\n", "m.txt", "2 lines for 3 classes (1 more are comments, # ...)"),
        ("1: a\n2: b\n3: c\n", "m.txt", "its lines are numbered; give one bare name a line, or a label_map.pbtxt"),
        ("0: a\n1: b\n2: c\n", "m.txt", "its lines are numbered"),
        ("1 a\n2 b\n3 c\n", "m.txt", "its lines are numbered"),
        ("1. a\n2. b\n3. c\n", "m.txt", "its lines are numbered"),
        ("a\t1\nb\t2\nc\t3\n", "m.txt", "its lines are numbered"),
        ("1,a\n2,b\n3,c\n", "m.txt", "its lines are numbered"),
        ("id,name\n1,a\n2,b\n3,c\n", "m.txt", "its lines are numbered"),
        ('["a",\n"b",\n"c"]\n', "m.txt", "it seems to be JSON"),
        ('{"1": "a",\n"2": "b",\n"3": "c"}\n', "m.txt", "it seems to be JSON"),
        ("- a\n- b\n- c\n", "m.txt", "it seems to be YAML"),
        ("names:\n  - a\n  - b\n  - c\n", "m.txt", "it seems to be YAML"),
        ("names:\n  0: a\n  1: b\n  2: c\n", "m.txt", "its lines are numbered"),
        ("".join(f"item {{ id: {i} label: 'a' }}\n" for i in (1, 2, 3)), "m.pbtxt", "no item has a name"),
        ("item { id: 1 } item { id: 3 }", "m.pbtxt", "no item has a name"),
        (item(0, "a", display_name="b"), "m.pbtxt", "'b' has the id 0"),
        (b"\x00\x01\x02", "m.txt", "it is not text"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, text, name, said):
    with pytest.raises(UserError) as raised:
        read(tmp_path, text, 3, name)
    assert said in str(raised.value)
    assert str(raised.value).startswith(f"--labels {tmp_path / name}: ")
    with pytest.raises(UserError, match="No such file"):
        read_labels(tmp_path / "absent", 3)


@pytest.mark.parametrize(
    "lines",
    [
        ["class 1", "class 2", "class 3"],
        ["7up", "8 ball", "9 euro"],
        ["1 euro", "2 euro"],
        ["1 finger", "2 fingers", "3 fingers"],
        ["0", "1", "2"],
        ["1 euro"],
        ["red, round", "red, square"],
        ["#1", "#2"],
        ["[unused]", "dog"],
        ["background object", "cat"],
    ],
)
def test_names_that_only_look_like_something_else(tmp_path, capsys, lines):
    assert read(tmp_path, "\n".join(lines), len(lines), "m.txt") == lines
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "names", "said"),
    [
        ("a\n\nc\n\n", ["a", None, "c"], "1 of 3 classes are without a name: blank lines"),
        ("a\n???\nc\n", ["a", None, "c"], "1 of 3 classes are without a name: blank lines, or ???"),
        ("a\nb\na\n", ["a", "b", "a"], "'a' is the name of 2 classes"),
        ("background\na\nb\nc\n", ["a", "b", "c"], "its first line, 'background', is left out"),
        ("???\na\nb\nc\n", ["a", "b", "c"], "its first line, '???', is left out"),
        ("# mine\na\nb\nc\n", ["a", "b", "c"], "lines that begin with # are left out as comments: 1"),
        (item(1, "a") + item(2, "b") + item(3, "a"), ["a", "b", "a"], "'a' is the name of 2 classes"),
        (item(1, "a") + item(2, "") + item(3, "c"), ["a", None, "c"], "1 of its 3 items are without a name"),
        (item(1, "a") * 2 + item(3, "c"), ["a", None, "c"], "items that stand there twice, the same both times: id 1"),
    ],
)
def test_what_is_taken_with_a_warning(tmp_path, capsys, text, names, said):
    """One line, which names the file."""
    assert read(tmp_path, text, 3, "m") == names
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'm'}: ")
    assert said in line


def test_cocos_own_names_need_no_warning(capsys):
    assert len(read_labels(COCO_LABELS, 90)) == 90
    assert capsys.readouterr().err == ""


def test_label_maps_beside_the_model_in_other_forms(tmp_path, capsys):
    """Names in capitals, UTF-16, and pages of comments: they are read as those of --labels are."""
    text = item(1, "a") + item(2, "b")
    for name, data in (
        ("label_map.PBTXT", text.encode()),
        ("my_label_map.pbtxt", text.encode("utf-16")),
        ("label_map.txt", text.encode()),
        ("label_map.pbtxt", b"# a line of a licence\n" * 1000 + text.encode()),
    ):
        (tmp_path / name).write_bytes(data)
        assert find_labels([tmp_path], 2) == (tmp_path / name, ["a", "b"])
        (tmp_path / name).unlink()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("data", [b"", b"// mine\n" + item(1, "a").encode(), b'node { name: "x" }', b"\0\1\2"])
def test_what_is_called_a_label_map_and_is_none_is_told_of(tmp_path, capsys, data):
    (tmp_path / "Label_Map.pbtxt").write_bytes(data)
    (tmp_path / "graph.pbtxt").write_bytes(data)
    assert find_labels([tmp_path], 1) == (None, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'Label_Map.pbtxt'} is not taken: a label map begins with `item {{ id: 1" in line


def test_what_lies_beside_the_model_is_found(tmp_path, capsys):
    assert find_labels([tmp_path], 2) == (None, None)
    (tmp_path / "graph.pbtxt").write_text('node { name: "x" op: "Placeholder" }')
    (tmp_path / "mine.pbtxt").write_text(item(1, "a") + item(2, "b"))
    assert find_labels([tmp_path / "absent", tmp_path], 2) == (tmp_path / "mine.pbtxt", ["a", "b"])
    (tmp_path / "labels.txt").write_text("a\nb\n")
    assert find_labels([tmp_path], 2)[1] == ["a", "b"]
    assert capsys.readouterr().err == ""
    (tmp_path / "labels.txt").write_text("a\nc\n")
    assert find_labels([tmp_path], 2) == (None, None)
    assert "differ" in capsys.readouterr().err
    assert find_labels([tmp_path], 3) == (None, None)
    assert len(capsys.readouterr().err.splitlines()) == 2  # one of each file that does not fit


def test_names_go_into_the_file_and_come_out_of_it(convert, tmp_path):
    """Found beside the SavedModel, or named; a number where there is no name, and it is the table's."""
    metadata = open_detector(convert("demo")[0]).metadata
    assert metadata["labels"] == SHAPES
    assert labels_of(None, metadata, tmp_path / "m.onnx") == SHAPES
    assert json.loads(build_engine.engine_name(metadata))[onnx_utils.METADATA_KEY]["labels"] == SHAPES

    (tmp_path / "map.pbtxt").write_text(item(5, "Ring") + item(1, "Kreis"))
    options = ["--saved_model", str(DEMO_MODEL), "--onnx", str(tmp_path / "m.onnx"), "--no_check"]
    create_onnx.main([*options, "--labels", str(tmp_path / "map.pbtxt")])
    with open_detector(tmp_path / "m.onnx") as model:
        assert model.metadata["labels"] == ["Kreis", None, None, None, "Ring"]
    (tmp_path / "four.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(UserError, match="4 lines for 5 classes"):
        create_onnx.main([*options, "--labels", str(tmp_path / "four.txt")])


def test_names_of_a_file_without_any(tmp_path, capsys):
    assert labels_of(None, {"num_classes": 3}, tmp_path / "m.onnx") == [None] * 3
    coco = labels_of(None, {"num_classes": 90, "labels": None}, tmp_path / "m.onnx")
    assert (len(coco), coco[0], coco[17], coco[89]) == (90, "person", "dog", "toothbrush")
    (tmp_path / "label_map.pbtxt").write_text("".join(item(i + 1, name) for i, name in enumerate("abc")))
    assert capsys.readouterr().out == ""
    assert labels_of(None, {"num_classes": 3}, tmp_path / "m.onnx") == ["a", "b", "c"]
    assert capsys.readouterr().out == "Class names: 3, of label_map.pbtxt beside the model; --labels names others\n"


def test_names_too_long_for_an_engine_are_left_out(convert, capsys):
    metadata = open_detector(convert("demo")[0]).metadata
    name = build_engine.engine_name({**metadata, "labels": ["x" * 2000] * 5})
    assert json.loads(name)[onnx_utils.METADATA_KEY] == {**metadata, "labels": None}
    assert "--labels" in capsys.readouterr().err


def test_a_hands_model_needs_no_flag(tmp_path, capsys):
    """The label map beside the export: its names on the pictures, by nothing but the commands of the README."""
    label_map = need_shared("cases", "labels", "label_map.pbtxt")
    folder = tmp_path / "hands"
    shutil.copytree(model_folder("hands"), folder)
    shutil.copy(label_map, folder)
    options = ["--saved_model", str(folder), "--onnx", str(tmp_path / "m.onnx"), "--no_check"]
    assert create_onnx.main(options) == 0
    assert f"Class names: 7, of {folder / 'label_map.pbtxt'}" in capsys.readouterr().out
    assert onnx_utils.read_metadata(onnx.load(tmp_path / "m.onnx"), "m")["labels"] == HANDS
    result = ["--engine", str(tmp_path / "m.onnx"), "--input", str(DEMO / "images"), "--output", str(tmp_path / "out")]
    assert infer.main(result) == 0


@pytest.mark.fuzz
def test_any_text_is_names_or_one_line(tmp_path):
    """Damaged label maps and lists of names: a name or None for each class, or a UserError, within a second."""
    rng = random.Random(23)
    bits = [
        b"{",
        b"}",
        b'"',
        b"'",
        b"item",
        b"id:",
        b"name:",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"\xfe\xff",
        b"\\",
        b"#",
        b":",
    ]
    bits += [
        b"9" * 5000,
        b"-1",
        b"1e9",
        b"\xe2\x80\x9c",
        b"{" * 3000,
        b"display_name: 'x'",
        b"nan",
        b"\x85",
        b"<",
        b",",
    ]
    texts = [(item(1, "a") + item(2, "b") + item(3, "c")).encode(), b"a\nb\nc\n", "\ufeffä\nö\nü".encode("utf-16")]
    outcomes = {"names": 0, "line": 0}
    for _ in range(variants(400)):
        text = rng.choice(texts)
        for _ in range(rng.choice([1, 1, 2, 4])):
            start = rng.randrange(len(text) or 1)
            text = text[:start] + rng.choice(bits) + text[start + rng.choice([0, 0, 1, 5, 20]) :]
        begun = time.process_time()
        try:
            names = read(tmp_path, text, 3, rng.choice(["m.pbtxt", "m.txt"]))
            assert len(names) == 3 and all(name is None or isinstance(name, str) for name in names)
            outcomes["names"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            outcomes["line"] += 1
        assert time.process_time() - begun < 1
    assert min(outcomes.values()) > 30
