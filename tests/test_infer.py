"""infer.py as a command: pictures, tables, labels and what it says of mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from commandline import UserError

import numpy as np
import onnx
import pytest
from conftest import DEMO, DEMO_MODEL, ROOT
from PIL import Image
from pycocotools import mask as rle
from test_convert import command

import infer
import onnx_utils
from images.aspect import warn_of_turned
from images.decoding import load_image
from results import Summary
from runtimes import standard_graph
from visualize import _place, class_colour, draw_detections

LABELS = DEMO_MODEL / "labels.txt"


def read_table(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_a_reader_that_leaves_is_no_error_of_ours(convert, tmp_path):
    """`infer.py ... | head -0`: what was written stays, no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    options = ["--engine", convert("demo")[0], "--input", DEMO / "images", "--output", tmp_path / "out"]
    process = subprocess.run(
        [sys.executable, ROOT / "infer.py", *options], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writing)
    assert (process.returncode, process.stderr) == (1, "")
    assert len(list((tmp_path / "out").glob("*.tsv"))) == 8


def test_pictures_and_tables(convert, detector, tmp_path):
    model, _ = convert("demo")
    process = command(
        *("--engine", model, "--input", DEMO / "images", "--output", tmp_path / "out", "--labels", LABELS),
        *("--preprocessor", "fixed_shape_resizer", "--nms_threshold", "0.4", "--format", "png"),
        script="infer.py",
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert "images/s; per image: decode" in lines[-2]
    assert str(tmp_path / "out") in lines[-1]
    inputs = sorted((DEMO / "images").iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        f"{path.stem}.{kind}" for path in inputs for kind in ("png", "tsv")
    )
    rows = 0
    for path in inputs:
        image = load_image(path)
        drawn = np.asarray(Image.open(tmp_path / "out" / f"{path.stem}.png"))
        assert drawn.shape == image.shape
        table = read_table(tmp_path / "out" / f"{path.stem}.tsv")
        assert (drawn != image).any() == bool(table)
        for xmin, ymin, xmax, ymax, score, label in table:
            assert 0 <= float(xmin) < float(xmax) <= image.shape[1]
            assert 0 <= float(ymin) < float(ymax) <= image.shape[0]
            assert 0.4 <= float(score) <= 1
            assert 0 <= int(label) < 5
        rows += len(table)
    assert rows >= 15


def test_two_inputs_with_one_stem_and_bad_files(convert, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(DEMO / "images" / "shapes_01.jpg", source / "a.jpg")
    Image.open(DEMO / "images" / "shapes_02.jpg").save(source / "a.PNG")
    shutil.copy(DEMO / "images" / "shapes_03.jpg", source / "b.jpeg")
    (source / "c.jpg").write_bytes(b"")
    (source / "d.png").write_bytes((source / "a.PNG").read_bytes()[:5000])
    process = command(
        "--engine", convert("demo")[0], "--input", source, "--output", tmp_path / "out", script="infer.py"
    )
    assert process.returncode == 1
    assert "c.jpg: skipped" in process.stderr
    assert "d.png: skipped" in process.stderr
    assert "2 of 5 images were skipped" in process.stdout
    pictures = sorted(p.name for p in (tmp_path / "out").glob("*.jpg"))
    assert pictures == ["a.PNG.jpg", "a.jpg.jpg", "b.jpg"]


def broken(path):
    path.write_bytes(b"\x08\x07garbage" * 50)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20000])


def foreign(path):
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


def unrunnable(path):
    model = onnx.load(path)
    next(n for n in model.graph.node if n.op_type == "Conv").op_type = "NoSuchOp"
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (broken, "not a readable ONNX file"),
        (truncated, "not a readable ONNX file"),
        (foreign, "not made by this tool"),
        (unrunnable, "does not run on ONNX Runtime"),
    ],
)
def test_bad_onnx_files(convert, tmp_path, spoil, said):
    path = tmp_path / "model.onnx"
    shutil.copy(convert("demo")[0], path)
    spoil(path)
    with pytest.raises(UserError, match=said) as raised:
        infer.main(["--engine", str(path), "--input", str(DEMO / "images"), "--output", str(tmp_path / "out")])
    assert "create_onnx.py" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_mistakes(convert, tmp_path):
    model, images = str(convert("demo")[0]), str(DEMO / "images")
    (tmp_path / "engine.trt").write_bytes(b"ftrt\x00 engine")
    (tmp_path / "short.txt").write_text("one\ntwo\n")
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "out")
    for options, said in (
        (["--engine", "absent.onnx", "--input", images, "--output", out], "--engine absent.onnx"),
        (["--engine", str(tmp_path / "engine.trt"), "--input", images, "--output", out], "TensorRT"),
        (["--engine", model, "--input", str(tmp_path / "none"), "--output", out], "--input"),
        (["--engine", model, "--input", images, "--output", images], "choose another folder"),
        (["--engine", model, "--input", images, "--output", str(tmp_path / "file" / "x")], "cannot create"),
        (["--engine", model, "--input", images, "--output", out, "--labels", "absent.txt"], "--labels absent.txt"),
        (
            ["--engine", model, "--input", images, "--output", out, "--labels", str(tmp_path / "short.txt")],
            "2 lines for 5",
        ),
        (["--engine", model, "--input", images, "--output", out, "--detection_type", "segmentation"], "no masks"),
    ):
        with pytest.raises(UserError) as raised:
            infer.main(options)
        assert said in str(raised.value)


def test_it_says_what_it_found(convert, tmp_path, capsys):
    """Detections, images with and without any, and a picture to look at that has some."""
    options = ["--engine", str(convert("demo", "--batch_size", "dynamic")[0]), "--input", str(DEMO / "images")]
    assert infer.main([*options, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    tables = {path: read_table(path) for path in (tmp_path / "out").glob("*.tsv")}
    total, empty = sum(map(len, tables.values())), sum(not rows for rows in tables.values())
    assert f"{total} detections of 0.3 and more in {8 - empty} images" in printed
    assert ("without any" in printed) == (empty > 0)
    example = Path(printed.rsplit("Next: look at ", 1)[1].strip())
    assert example.is_file()
    assert len(tables[example.with_suffix(".tsv")]) == max(map(len, tables.values())) > 1

    assert infer.main([*options, "--output", str(tmp_path / "none"), "--nms_threshold", "0.9999"]) == 0
    printed = capsys.readouterr().out
    assert "0 detections of 0.9999 and more in 0 images; 8 images without any" in printed
    assert "--nms_threshold 0.1 shows weaker ones" in printed


def test_a_batch_too_large_leaves_no_folder(convert, tmp_path):
    options = ["--engine", str(convert("demo")[0]), "--input", str(DEMO / "images"), "--batch_size", "4"]
    for more in ([], ["--benchmark"]):
        with pytest.raises(UserError, match=r"--batch_size 4: .*model\.onnx takes one image at a time"):
            infer.main([*options, "--output", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_it_names_the_models_own_threshold_where_that_is_higher(convert, tmp_path, capsys):
    options = ["--input", str(DEMO / "images"), "--output", str(tmp_path / "out")]
    assert infer.main(["--engine", str(convert("demo", "--first_nms_threshold", "0.5")[0]), *options]) == 0
    assert " detections of 0.5 and more in " in capsys.readouterr().out
    assert infer.main(["--engine", str(convert("demo", "--first_nms_threshold", "0.9999")[0]), *options]) == 0
    printed = capsys.readouterr().out
    assert (
        "0 detections of 0.9999 and more in 0 images; 8 images without any (the model was made to leave out weaker"
        in printed
    )
    assert "--nms_threshold" not in printed
    assert Summary(images=1, empty=1).text(0.0) == "0 detections of 0 and more in 0 images; 1 image without any"


def test_json_is_cocos_results_format(convert, tmp_path, capsys):
    model = str(convert("demo", "--batch_size", "dynamic")[0])
    options = ["--engine", model, "--input", str(DEMO / "images"), "--json", str(tmp_path / "d.json")]
    assert infer.main([*options, "--nms_threshold", "0.2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]
    results = json.loads((tmp_path / "d.json").read_text())
    assert infer.main([*options, "--nms_threshold", "0.2", "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "d.json").read_text()) == results
    rows = {path.stem: read_table(path) for path in (tmp_path / "out").glob("*.tsv")}
    assert len(results) == sum(map(len, rows.values())) > 10
    for entry, row in zip(results, (row for name in sorted(rows) for row in rows[name]), strict=True):
        x, y, width, height = entry["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx([float(value) for value in row[:4]], abs=0.01)
        assert entry["category_id"] == int(row[5]) + 1
        assert entry["score"] == pytest.approx(float(row[4]), abs=1e-5)
        assert entry["image_id"] == entry["file_name"]
    assert infer.main([*options, "--nms_threshold", "0.9999"]) == 0
    assert json.loads((tmp_path / "d.json").read_text()) == []
    with pytest.raises(UserError, match="--output: name a folder for the results, or a file with --json"):
        infer.main(options[:4])


def test_json_tells_images_of_one_number_apart(convert, tmp_path):
    """cam1/7.jpg and cam2/0007.jpg: paths instead of the number; that of one image alone stays."""
    names = ("cam1/7.jpg", "cam2/0007.jpg", "cam2/8.jpg", "cam2/x.jpg", "cam2/９.jpg")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(DEMO / "images" / "shapes_01.jpg", tmp_path / name)
    folders = [str(tmp_path / name) for name in ("cam1", "cam2")]
    options = ["--engine", str(convert("demo")[0]), "--input", *folders, "--json", str(tmp_path / "d.json")]
    assert infer.main(options) == 0
    found = {entry["file_name"]: entry["image_id"] for entry in json.loads((tmp_path / "d.json").read_text())}
    paths = [str(tmp_path / name) for name in names]
    assert found == dict(zip(paths, (paths[0], paths[1], 8, paths[3], paths[4]), strict=True))
    with pytest.raises(UserError, match="--json: --benchmark keeps no results"):
        infer.main([*options, "--benchmark"])


def test_json_holds_masks(exported, tmp_path):
    path = str(exported("mask")[1])
    options = ["--engine", path, "--input", str(DEMO / "images" / "shapes_01.jpg"), "--json", str(tmp_path / "d.json")]
    assert infer.main([*options, "--nms_threshold", "0.1", "--detection_type", "segmentation"]) == 0
    results = json.loads((tmp_path / "d.json").read_text())
    assert results
    height, width = load_image(DEMO / "images" / "shapes_01.jpg").shape[:2]
    for entry in results:
        assert entry["segmentation"]["size"] == [height, width]
        assert rle.decode(entry["segmentation"]).shape == (height, width)


def test_labels_keep_clear_of_each_other():
    taken = []
    for _ in range(6):
        x, y = _place((400, 300), (100, 100, 200, 250), 60, 14, taken)
        plate = (x, y, x + 60, y + 14)
        for other in taken:
            apart = plate[2] <= other[0] or other[2] <= plate[0] or plate[3] <= other[1] or other[3] <= plate[1]
            assert apart, (plate, other)
        taken.append(plate)
    assert _place((400, 300), (0, 0, 300, 400), 60, 14, [])[1] >= 0  # a box over the whole image: inside it


def test_drawing_scales_with_the_image_and_colours_are_stable():
    box, score, label = np.float32([[0.2, 0.2, 0.8, 0.8]]), np.float32([0.9]), np.array([3])
    changed = []
    for side in (200, 1600):
        grey = np.full((side, side, 3), 128, np.uint8)
        drawn = np.asarray(draw_detections(grey, box * side, score, label, ["a"] * 4))
        column = drawn[side // 2, : side // 2]
        changed.append((column != 128).any(axis=1).sum())
        assert (drawn == class_colour(3)).all(axis=2).any()
    assert changed[1] > 3 * changed[0]
    assert len({class_colour(i) for i in range(90)}) == 90


def test_the_stand_in_is_not_left_in_the_file(convert):
    model = onnx_utils.load(convert("demo")[0])
    before = model.SerializeToString()
    standard_graph.prepare(model)
    assert model.SerializeToString() == before


def run_infer(model, output, *options):
    return command("--engine", model, "--output", output, *options, script="infer.py")


def test_results_mirror_the_folders(convert, tmp_path):
    """Of one folder as they lie in it, of several as seen from the folder that has them all; kinds of images side by side."""
    pictures = sorted((DEMO / "images").iterdir())
    for name, picture in (("cam1/0001.jpg", 0), ("cam1/night/0001.jpg", 1), ("cam2/0001.jpg", 2)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[picture], tmp_path / name)
    for name in ("cam2/b.webp", "cam2/c.tif", "cam2/d.gif", "cam2/e.jfif"):
        Image.open(pictures[3]).save(tmp_path / name, format={".jfif": "JPEG"}.get(name[-5:]))
    (tmp_path / "cam2" / "notes.txt").write_text("nothing")
    (tmp_path / "list.txt").write_text("# two\ncam1/night/0001.jpg\ncam2/0001.jpg\n")
    model = convert("demo")[0]
    wanted = {
        ("cam1",): ["0001", "night/0001"],
        ("cam1", "cam2"): ["cam1/0001", "cam1/night/0001", *(f"cam2/{name}" for name in ("0001", "b", "c", "d", "e"))],
        ("cam*/**/0001.jpg",): ["cam1/0001", "cam1/night/0001", "cam2/0001"],
        ("list.txt",): ["cam1/night/0001", "cam2/0001"],
    }
    tables = {}
    for inputs, names in wanted.items():
        output = tmp_path / "results" / str(len(tables))
        process = run_infer(model, output, "--input", *(tmp_path / given for given in inputs))
        assert process.returncode == 0, process.stderr
        assert ("left out: 1 .txt" in process.stderr) == ("cam2" in inputs)
        for kind in ("tsv", "jpg"):
            found = sorted(str(path.relative_to(output))[:-4] for path in output.rglob(f"*.{kind}"))
            assert found == sorted(names)
        tables[inputs] = output
    one, both = tables[("cam1",)], tables[("cam1", "cam2")]
    assert (one / "night/0001.tsv").read_text() == (both / "cam1/night/0001.tsv").read_text()
    assert (both / "cam2/b.tsv").read_text().count("\n") >= 1


def test_results_overwrite_no_input(convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = str(convert("demo")[0])
    for name in ("a/1.jpg", "b/2.jpg", "b/c/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DEMO / "images" / "shapes_01.jpg", name)
    for inputs, output in ((["a"], "a"), (["a", "b"], "."), (["a/1.jpg"], "a"), (["b"], "b"), (["b/**/*.jpg"], "b")):
        with pytest.raises(UserError, match="choose another folder, so that none is overwritten"):
            infer.main(["--engine", model, "--input", *inputs, "--output", output])
    for _ in range(2):  # what the first run wrote is no input of the second
        assert infer.main(["--engine", model, "--input", "b", "--output", "b/results"]) == 0
        assert len(list((tmp_path / "b/results").rglob("*.jpg"))) == 2


def test_files_that_a_list_names_in_vain_count_as_not_read(convert, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{DEMO / 'images' / 'shapes_01.jpg'}\nabsent.jpg\n")
    options = ["--engine", str(convert("demo")[0]), "--input", str(tmp_path / "list.txt")]
    assert infer.main([*options, "--output", str(tmp_path / "out")]) == 1
    assert "1 of the 2 files it names are not there: absent.jpg" in capsys.readouterr().err
    assert infer.main([*options, "--benchmark", "--benchmark_images", "2"]) == 1


def test_turned_photos_are_counted_without_decoding(tmp_path, monkeypatch, capsys):
    """Of the first hundred, in whatever way they are turned; a PNG's pixels stay where they are."""
    decoded = []
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: decoded.append(image))
    picture, names = Image.new("RGB", (4, 2)), []
    for number in range(102):
        names.append(str(tmp_path / f"{number}.png"))
        exif = Image.Exif()
        exif[0x0112] = {97: 9, 98: 3, 99: 6, 101: 6}.get(number, 1)
        picture.save(names[-1], **({"exif": exif} if number > 90 else {}))
    warn_of_turned(names, exif_rotate=False)
    assert "2 of the first 100 images are stored turned (EXIF)" in capsys.readouterr().err
    warn_of_turned(names, exif_rotate=True)
    warn_of_turned(names[:98], exif_rotate=False)
    assert (capsys.readouterr().err, decoded) == ("", [])


def test_turned_photos_are_found_in_as_they_are_seen(convert, tmp_path):
    """Stored turned, with the EXIF tag that says so: the same detections, on a picture that stands upright."""
    upright = Image.open(DEMO / "images" / "shapes_02.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder in ("upright", "turned"):
        (tmp_path / folder).mkdir()
    upright.save(tmp_path / "upright" / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned" / "a.png", exif=exif)
    model = convert("demo")[0]
    for folder, options in (("upright", ()), ("turned", ("--exif_rotate",)), ("turned", ())):
        target = tmp_path / (f"{folder}_out" if options or folder == "upright" else "as_stored")
        process = run_infer(model, target, "--input", tmp_path / folder, *options)
        assert process.returncode == 0, process.stderr
        warned = "1 of the first 1 images are stored turned (EXIF)" in process.stderr
        assert warned == (target.name == "as_stored")
    table = (tmp_path / "upright_out" / "a.tsv").read_text()
    assert table
    assert (tmp_path / "turned_out" / "a.tsv").read_text() == table
    assert Image.open(tmp_path / "turned_out" / "a.jpg").size == upright.size
    process = run_infer(model, tmp_path / "plain", "--input", tmp_path / "turned", "--max_pixels", "100")
    assert process.returncode == 2
    assert "more than --max_pixels 100" in process.stderr


def test_odd_files_are_answered_in_one_line(convert, tmp_path, monkeypatch):
    """A name that is no text, a picture wider than a JPEG can be, a pipe."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    model, odd = convert("demo")[0], os.fsdecode(b"odd\xff.jpg")
    shutil.copy(DEMO / "images" / "shapes_01.jpg", tmp_path / odd)
    process = run_infer(model, tmp_path / "out", "--input", tmp_path / odd)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / odd).exists()
    Image.new("RGB", (66_000, 20)).save(tmp_path / "wide.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, what in (("wide.png", "use --format png"), ("pipe.jpg", "it is no file")):
        process = run_infer(model, tmp_path / "out", "--input", tmp_path / name)
        assert process.returncode == 2
        assert what in process.stderr
        assert len(process.stderr.splitlines()) == 1
