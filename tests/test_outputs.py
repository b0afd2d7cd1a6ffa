"""Where scripts may write, and what they say of files that the system refuses: nothing that is read is lost."""

import json
import os
import shutil
import subprocess
import sys

from commandline import LONGEST_NAME, UserError, printable, whole_file
from commandline.inputs import find_images
from commandline.outputs import check_outputs, check_results, refuse_to_overwrite

import onnx
import pytest
from conftest import DEMO, DEMO_MODEL, ROOT

import build_engine
import compare_tf
import create_onnx
import eval_coco
import export_triton
import infer
import onnx_utils
from tfod.saved_model import model_files

TRUTH = DEMO / "instances_shapes.json"
ODD = os.fsdecode(b"odd\xff")
# A process of root's that has no more rights than the files give it.
RIGHTS = "-dac_override,-dac_read_search"
WITHOUT_RIGHTS = ["setpriv", f"--bounding-set={RIGHTS}", f"--inh-caps={RIGHTS}"] if os.geteuid() == 0 else []


@pytest.fixture
def here(convert, tmp_path, monkeypatch):
    """A working folder with a model, what it was made of, its images, annotations and class names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_MODEL, "saved")
    shutil.copytree(DEMO / "images", "photos")
    shutil.copy(convert("demo", "--batch_size", "dynamic")[0], "model.onnx")
    (tmp_path / "results").mkdir()
    for name in ("detections.json", "metrics.json", "comparison.json", "report.html"):
        shutil.copy(TRUTH, f"results/{name}")
    shutil.copy(DEMO_MODEL / "labels.txt", "results/per_class.csv")
    for name in ("names", "network", "listed"):
        (tmp_path / name).mkdir()
    shutil.copy(DEMO_MODEL / "labels.txt", "names/report.html")
    shutil.copy("model.onnx", "network/report.html")
    (tmp_path / "listed" / "report.html").write_text("../photos/shapes_01.jpg\n")
    (tmp_path / "saved" / "saved_model" / "assets").mkdir(exist_ok=True)
    (tmp_path / "saved" / "saved_model" / "assets" / "report.html").touch()
    shutil.copy(DEMO_MODEL / "labels.txt", "names.txt")
    (tmp_path / "link.txt").symlink_to("names.txt")
    os.link("photos/shapes_01.jpg", "hard.jpg")
    os.mkfifo("pipe")
    (tmp_path / "list.txt").write_text("photos/shapes_01.jpg\n")
    return tmp_path


def content(folder):
    """Each file below a folder and what is in it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CREATE = "--saved_model", "saved"
BUILD = "--onnx", "model.onnx"
INFER = "--engine", "model.onnx", "--input", "photos"
EVALUATE = *INFER, "-a", TRUTH
INT8 = "--precision", "int8", "--calib_input", "photos"


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [
        (create_onnx, (*CREATE, "-o", "saved/saved_model/saved_model.pb"), "--onnx .*: that is --saved_model's file"),
        (create_onnx, (*CREATE, "-o", "saved/pipeline.config"), "that is --pipeline_config's file"),
        (create_onnx, (*CREATE, "-o", "saved/labels.txt"), "that is --labels' file"),
        (create_onnx, (*CREATE, "--labels", "names.txt", "-o", "link.txt"), "--onnx link.txt: that is --labels' file"),
        (create_onnx, (*CREATE, "-o", "a.onnx", "--tf2onnx", "./a.onnx"), "--tf2onnx ./a.onnx: that is --onnx's file"),
        (create_onnx, (*CREATE, "-o", "hard.jpg", "--check_image", "photos"), "that is --check_image's file"),
        (create_onnx, (*CREATE, "-o", "list.txt", "--check_image", "list.txt"), "that is --check_image's file"),
        (create_onnx, (*CREATE, "-o", "saved/saved_model/variables/variables.index"), "that is --saved_model's file"),
        (build_engine, (*BUILD, "--typed_onnx", "model.onnx"), "--typed_onnx model.onnx: that is --onnx's file"),
        (build_engine, (*BUILD, "--typed_onnx", "o", "--calib_cache", "o"), "--typed_onnx o: that is --calib_cache's"),
        (build_engine, (*BUILD, *INT8, "--typed_onnx", "hard.jpg"), "that is --calib_input's file"),
        (
            build_engine,
            (*BUILD, "--calib_input", "list.txt", "--typed_onnx", "list.txt"),
            "that is --calib_input's file",
        ),
        (
            build_engine,
            (*BUILD, "--typed_onnx", "o", "--timing_cache", "o"),
            "--timing_cache o: that is --typed_onnx's|--typed_onnx o",
        ),
        (infer, (*INFER, "--json", "photos/shapes_02.jpg"), "--json .*: that is --input's file"),
        (infer, (*INFER, "--json", "model.onnx"), "that is --engine's file"),
        (infer, (*INFER, "--json", "names.txt", "--labels", "names.txt"), "that is --labels' file"),
        (infer, ("--engine", "model.onnx", "--input", "list.txt", "--json", "list.txt"), "that is --input's file"),
        (infer, (*INFER, "--json", "pipe"), "pipe is a device or a pipe"),
        (infer, (*INFER, "--output", "out", "--json", "out/shapes_02.tsv"), "over out/shapes_02.tsv, .* --json's file"),
        (infer, (*INFER, "--output", "out", "--json", "out/shapes_02.jpg"), "over out/shapes_02.jpg, .* --json's file"),
        (
            infer,
            (*INFER, "--output", "out", "--labels", "out/shapes_02.tsv"),
            "over out/shapes_02.tsv, .* --labels' file",
        ),
        (infer, (*INFER, "c.mp4", "--output", "out", "--json", "out/c.tsv"), "out/c.tsv: that is --output's file"),
        (
            infer,
            (*INFER, "c.mp4", "d/c.mp4", "--output", "out"),
            "--output out/c.mp4: two results .* an --output of its own",
        ),
        (infer, (*INFER, "c.mp4", "--output", "."), "--output ./c.mp4: that is --input's file"),
        (
            eval_coco,
            (*INFER, "-a", "results/detections.json", "-o", "results"),
            "detections.json: .* --annotations' file",
        ),
        (eval_coco, (*INFER, "-a", "results/metrics.json", "-o", "results"), "metrics.json: .* --annotations' file"),
        (eval_coco, (*INFER, "-a", "results/report.html", "-o", "results"), "report.html: .* --annotations' file"),
        (eval_coco, (*EVALUATE, "-l", "results/per_class.csv", "-o", "results"), "per_class.csv: .* --labels' file"),
        (eval_coco, (*EVALUATE, "-i", "listed/report.html", "-o", "listed"), "report.html: that is --input's file"),
        (
            eval_coco,
            ("-e", "network/report.html", *EVALUATE[2:], "-o", "network"),
            "report.html: that is --engine's file",
        ),
        (
            compare_tf,
            (*INFER, *CREATE, "-a", "results/report.html", "-o", "results"),
            "report.html: .* --annotations' file",
        ),
        (
            compare_tf,
            (*INFER, *CREATE, "-a", "results/comparison.json", "-o", "results"),
            "comparison.json: .* --annotations'",
        ),
        (
            compare_tf,
            (*INFER, *CREATE, "-l", "names/report.html", "-o", "names"),
            "report.html: that is --labels' file",
        ),
        (compare_tf, (*INFER, *CREATE, "-o", "saved/saved_model/assets"), "report.html: that is --saved_model's file"),
        (compare_tf, (*INFER, *CREATE, "-o", "photos"), "results would lie in .*photos, where images are read"),
    ],
)
def test_what_is_read_is_not_written_over(here, script, options, said):
    for name in ("c.mp4", "d/c.mp4"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(b"a video")
    before = content(here)
    with pytest.raises(UserError, match=said):
        script.main(list(map(str, options)))
    assert content(here) == before


def test_names_of_two_files_are_told_apart(here):
    check_outputs({"--a": ["x.json", None], "--b": ["y.json"]}, {"--c": ["names.txt", None, "absent"]})
    check_outputs({"--a": ["model.onnx"]}, {"--c": ["names.txt"]})  # one of an earlier run
    check_results("out", ["a/b"], (".tsv",), {"--json": ["out/a/b.json", "out/b.tsv", "a/b.tsv", None]})
    (here / "out").mkdir()
    (here / "link").symlink_to("out")
    for output, path in (("out", "out/a/b.tsv"), ("link", "out/a/b.tsv"), ("out", "link/a/b.tsv")):
        with pytest.raises(UserError, match=f"over {path}, which is --json's file"):
            check_results(output, ["a/b"], (".tsv",), {"--json": [path]})
    with pytest.raises(UserError, match=r"--b out/new\.json: that is --a's file"):
        check_outputs({"--a": ["link/new.json"], "--b": ["out/new.json"]}, {})


def test_what_lies_beside_a_model_is_not_its(here):
    """The converted file of the last run, say, which is written over."""
    made = here / "saved" / "saved_model" / "model.onnx"
    assert create_onnx.main([*CREATE, "--onnx", str(made), "--no_check"]) == 0
    files = {path.relative_to(here / "saved" / "saved_model").as_posix() for path in model_files(made.parent)}
    assert files == {
        "saved_model.pb",
        "assets/report.html",
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
    }
    assert create_onnx.main([*CREATE, "--onnx", str(made), "--no_check"]) == 0


def test_pictures_do_not_become_inputs(here):
    """Nor where an input holds them in a subfolder alone, and where a pattern names it."""
    (here / "deep" / "in").mkdir(parents=True)
    shutil.copy("hard.jpg", "deep/in/a.jpg")
    for inputs, output in ((["deep"], "deep"), (["photos/*.jpg"], "photos"), (["photos"], "."), (["hard.jpg"], ".")):
        images = find_images(inputs, output=output)
        if output == ".":
            refuse_to_overwrite(images, inputs, output, "pictures")
            continue
        with pytest.raises(
            UserError, match=f"--output {output}: results would lie in .*{output}, where images are read"
        ):
            refuse_to_overwrite(images, inputs, output, "pictures")


def test_a_file_is_binary_whatever_its_name(here, capsys):
    for name in ("text.pbtxt", "text.json", "text.onnxtxt", "text.textproto"):
        onnx_utils.save(onnx.load("model.onnx"), name)
        assert onnx_utils.load(name) == onnx.load("model.onnx")
    assert infer.main([*("-e", "text.json", "-i", "hard.jpg"), "-o", "out"]) == 0


def run_without_rights(script, *options):
    """(status, the lines on stderr) of a script that the rights of files bind."""
    command = [*WITHOUT_RIGHTS, sys.executable, ROOT / script, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("warning: --input")]


@pytest.mark.parametrize(
    ("script", "options", "closed"),
    [
        ("infer.py", (*INFER, "--output", "out"), "model.onnx"),
        ("build_engine.py", (*BUILD, "--typed_onnx", "o.onnx"), "model.onnx"),
        ("build_engine.py", (*BUILD, "--typed_onnx", "shut/o.onnx"), "shut"),
        ("build_engine.py", (*BUILD, "--typed_onnx", "names.txt"), "names.txt"),
        ("create_onnx.py", (*CREATE, "--onnx", "o.onnx"), "saved/labels.txt"),
        ("create_onnx.py", (*CREATE, "--onnx", "o.onnx"), "saved/more.pbtxt"),
        ("create_onnx.py", (*CREATE, "--onnx", "o.onnx"), "saved/saved_model/saved_model.pb"),
        ("create_onnx.py", (*CREATE, "--onnx", "o.onnx"), "saved/saved_model/variables"),
    ],
)
def test_what_may_not_be_read_is_one_line(here, script, options, closed):
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root reads all, and there is no setpriv")
    if closed == "saved/more.pbtxt":
        (here / closed).write_text('item { id: 1 name: "a" }')
    (here / "shut").mkdir()
    mode = (here / closed).stat().st_mode
    (here / closed).chmod(0)
    try:
        status, lines = run_without_rights(script, *options)
    finally:
        (here / closed).chmod(mode)
    assert status == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{script}: ")
    assert closed in lines[0]
    assert "ermission" in lines[0]
    assert "again" not in lines[0]
    assert not list(here.rglob("o.onnx"))


FAILS = """
import commandline
def main():
    {0}
commandline.run(main)
"""


@pytest.mark.parametrize(
    ("code", "status", "last"),
    [
        ("open('a' * 300)", 2, "-c: " + "a" * 300 + ": File name too long; name another, or mend this one"),
        (
            "open(__import__('pathlib').Path('a' * 300))",
            2,
            "-c: " + "a" * 300 + ": File name too long; name another, or mend this one",
        ),
        ("open(b'/')", 2, "-c: /: Is a directory; name another, or mend this one"),
        ("raise OSError('ours')", 1, "OSError: ours"),
        ("open(99)", 1, "OSError: [Errno 9] Bad file descriptor"),
    ],
)
def test_what_the_system_says_of_a_file_is_a_line(code, status, last):
    """Of what has no name a traceback stays: that is a mistake of ours."""
    done = subprocess.run([sys.executable, "-c", FAILS.format(code)], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (status, last)
    assert ("Traceback" in done.stderr) == (status == 1)


def test_names_that_are_no_text(here):
    """In reports, results and repositories; TensorFlow alone cannot open such a folder."""
    shutil.copytree("photos", ODD)
    os.rename(f"{ODD}/shapes_02.jpg", f"{ODD}/{ODD}.jpg")
    shutil.move("model.onnx", f"{ODD}/model.onnx")
    shutil.copytree("saved", f"{ODD}/saved")
    truth = json.loads(TRUTH.read_text())
    for image in truth["images"]:
        image["file_name"] = image["file_name"].replace("shapes_02", ODD)
    (here / "truth.json").write_text(json.dumps(truth))
    options = ["--engine", f"{ODD}/model.onnx", "--input", ODD]
    assert eval_coco.main([*options, "--annotations", "truth.json", "--output", f"{ODD}/evaluation"]) == 0
    assert compare_tf.main([*options, "--saved_model", "saved", "--output", "comparison", "--num_images", "4"]) == 0
    assert printable(f"{ODD}.jpg: largest score difference") in (here / "comparison" / "report.html").read_text()
    assert f"{ODD}.jpg" in json.loads((here / "comparison" / "comparison.json").read_text())["pictures"]
    assert (here / "comparison" / "pictures" / f"{ODD}.jpg").is_file()
    assert json.loads((here / ODD / "evaluation" / "metrics.json").read_text())["engine"] == f"{ODD}/model.onnx"
    export_triton.main(["--engine", f"{ODD}/model.onnx", "--repository", "models"])
    assert printable(ODD) in (here / "models" / "README.md").read_text()
    with pytest.raises(UserError, match="name is not UTF-8; rename it"):
        create_onnx.main(["--saved_model", f"{ODD}/saved", "--onnx", "o.onnx"])


def test_long_names(here):
    """A name that leaves no room for a result's extension is shortened, one that leaves none for a temporary file is not."""
    fits, short = "n" * 250 + ".jpg", "m" * 253
    os.makedirs("long/deep")
    for name in (fits, short, short[:-1] + "k", "é" * 126 + "k", f"deep/{short}"):
        shutil.copy("hard.jpg", f"long/{name}")
    options = [
        "--engine",
        "model.onnx",
        "--saved_model",
        "saved",
        "--input",
        "long",
    ]
    for name in os.listdir("long"):  # without an extension a file must be named
        options += [] if "." in name or name == "deep" else [f"long/{name}"]
    options += [f"long/deep/{short}"]
    assert compare_tf.main([*options, "--output", "comparison"]) == 0
    (deep,) = os.listdir("comparison/pictures/deep")
    names = [name for name in os.listdir("comparison/pictures") if name != "deep"]
    assert len(names) == 4
    assert deep in names
    assert fits in names
    assert all(len(name) <= LONGEST_NAME for name in names)
    assert not [name for name in names if ".part" in name]
    for name in ("é" * 127, "x" * LONGEST_NAME, ODD * 60, "x" * 55 + "." + "é" * 99):
        with whole_file(here / "long" / name) as temporary:
            temporary.write_text("whole")
        assert (here / "long" / name).read_text() == "whole"
