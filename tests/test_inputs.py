"""Which images are meant by files, folders, patterns and lists of paths, and what their results are called."""

import json
import os
import subprocess
import sys

from commandline import UserError
from commandline.inputs import find_images

import pytest
from conftest import DEMO, ROOT, need_shared

PICTURE = DEMO / "images" / "shapes_01.jpg"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """make(name, ...): empty files below the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0")
        return tmp_path

    return make


def said(capsys):
    return capsys.readouterr().err.strip()


def test_a_folder_with_subfolders(here, capsys):
    here("in/b.JPG", "in/a.png", "in/z/1.webp", "in/z/y/2.tif", "in/c/3.jfif", "in/d.gif", "in/e.JpEg", "in/f.bmp")
    found = find_images("in")
    assert found.files == [
        *("in/a.png", "in/b.JPG", "in/d.gif", "in/e.JpEg", "in/f.bmp"),
        *("in/c/3.jfif", "in/z/1.webp", "in/z/y/2.tif"),
    ]
    assert found.names == ["a", "b", "d", "e", "f", "c/3", "z/1", "z/y/2"]
    assert said(capsys) == ""


def test_what_is_left_out_is_counted_in_one_line(here, capsys):
    folder = here(
        *("in/a.jpg", "in/b.txt", "in/c.XML", "in/sub/d.xml", "in/.hidden.jpg", "in/.git/e.jpg", "in/noextension"),
        *("in/f.heic", "in/g.mp4"),
    )
    os.mkfifo(folder / "in" / "pipe.jpg")
    (folder / "in" / "lost").symlink_to("nowhere")
    assert find_images("in").files == ["in/a.jpg"]
    line = said(capsys)
    assert len(line.splitlines()) == 1
    for part in ("--input: 1 images found", "2 .xml", "2 hidden", "2 neither file nor folder", "of other kinds"):
        assert part in line
    with pytest.raises(UserError, match=r"--pictures in/sub: no images there .*only 1 \.xml"):
        find_images("in/sub", "--pictures")


def test_links_to_folders_are_read_once_and_make_no_circle(here):
    folder = here("in/real/a.jpg", "in/real/deep/b.jpg", "elsewhere/c.jpg")
    for link, target in (
        ("in/aaa", "real"),
        ("in/real/deep/up", "../.."),
        ("in/more", "../elsewhere"),
        ("in/self", "self"),
    ):
        (folder / link).symlink_to(target)
    found = find_images("in")
    assert found.files == ["in/real/a.jpg", "in/real/deep/b.jpg", "in/more/c.jpg"]
    assert found.names == ["real/a", "real/deep/b", "more/c"]
    assert find_images("in/**/*.jpg").files == found.files


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("in/*.jpg", ["in/a.jpg"]),
        ("in/**/*.jpg", ["in/a.jpg", "in/x/b.jpg", "in/x/y/c.jpg"]),
        ("in/**/?.png", ["in/x/y/d.png"]),
        ("**/y/*", ["in/x/y/c.jpg", "in/x/y/d.png"]),
        ("in/*", ["in/a.jpg", "in/x/b.jpg", "in/x/y/c.jpg", "in/x/y/d.png"]),
        ("in/**", ["in/a.jpg", "in/x/b.jpg", "in/x/y/c.jpg", "in/x/y/d.png"]),
        ("in/[xz]/[!c].jpg", ["in/x/b.jpg"]),
        ("in/.[h]/*.jpg", ["in/.h/e.jpg"]),
        ("odd[1].jpg", ["odd[1].jpg"]),
    ],
)
def test_patterns(here, pattern, wanted):
    folder = here("in/a.jpg", "in/x/b.jpg", "in/x/y/c.jpg", "in/x/y/d.png", "in/n.txt", "in/.h/e.jpg", "odd[1].jpg")
    assert find_images(pattern).files == wanted
    assert find_images(str(folder / pattern)).files == [str(folder / name) for name in wanted]


def test_a_text_file_of_paths(here, capsys):
    folder = here("lists/one/a.jpg", "lists/two/b.jpg", "lists/two/c.png", "far/d.jpg", "far/e f.jpg")
    (folder / "lists" / "list.txt").write_bytes(
        b"\xef\xbb\xbf# pictures\r\n\r\none/a.jpg\r\n  two  \r\n../far/e f.jpg\r\none/gone.jpg\n"
        + bytes(folder / "far/d.jpg")
    )
    found = find_images("lists/list.txt")
    assert [os.path.relpath(file) for file in found.files] == [
        *("lists/one/a.jpg", "lists/two/b.jpg", "lists/two/c.png", "far/e f.jpg", "far/d.jpg")
    ]
    assert found.names == ["lists/one/a", "lists/two/b", "lists/two/c", "far/e f", "far/d"]
    assert found.missing == 1
    assert said(capsys) == "warning: --input lists/list.txt: 1 of the 5 files it names are not there: one/gone.jpg"
    for content, what in (
        ("a.jpg\nb.jpg\n", "none of the 2 files it names is there"),
        ("# a.jpg\n\n", "names no file"),
    ):
        (folder / "lists" / "bad.lst").write_text(content)
        with pytest.raises(UserError, match=f"--calib_input lists/bad.lst: .*{what}"):
            find_images(["lists/one", "lists/bad.lst"], "--calib_input")


def test_names_of_results_are_distinct_and_keep_the_folders(here):
    here("cam1/0001.jpg", "cam1/n/0002.jpg", "cam2/0001.jpg", "x/cam/1.jpg", "y/cam/1.jpg")
    assert find_images(["cam1", "cam2"]).names == ["cam1/0001", "cam1/n/0002", "cam2/0001"]
    assert find_images(["cam2", "cam1"]).names == ["cam2/0001", "cam1/0001", "cam1/n/0002"]
    assert find_images(["x/cam", "y/cam/1.jpg"]).names == ["x/cam/1", "y/cam/1"]
    assert find_images(["cam1/0001.jpg", "cam1/n/0002.jpg"]).names == ["0001", "n/0002"]
    assert find_images("cam1/0001.jpg").names == ["0001"]
    here("same/a.jpg", "same/A.png", "same/a.jpg.png", "same/b.jpg", "same/b.c.jpg")
    assert find_images("same").names == ["A.png", "a.jpg", "a.jpg.png", "b.c", "b"]


def test_a_file_that_is_meant_twice_is_found_once(here):
    here("in/a.jpg", "in/b.jpg", "in/c/d.jpg")
    found = find_images(["in/b.jpg", "in", "./in/*.jpg", "in/c"])
    assert found.files == ["in/b.jpg", "in/a.jpg", "in/c/d.jpg"]
    assert found.names == ["b", "a", "c/d"]


def test_results_in_the_input_folder_are_no_input(here, capsys):
    here("in/a.jpg", "in/results/a.jpg", "in/results/sub/b.jpg")
    assert find_images("in", output="in/results").files == ["in/a.jpg"]
    assert "1 the output folder" in said(capsys)
    for pattern in ("in/**/*.jpg", "in/*", "in/**"):
        assert find_images(pattern, output="in/results").files == ["in/a.jpg"]


def test_a_list_in_utf_16(here):
    """As PowerShell's > writes it."""
    here("in/a.jpg", "in/ö.jpg")
    for name, encoding in (("le", "utf-16"), ("be", "utf-16-be")):
        text = ("\ufeff" * (name == "be") + "a.jpg\r\nö.jpg\r\n").encode(encoding)
        with open(f"in/{name}.txt", "wb") as file:
            file.write(text)
        assert find_images(f"in/{name}.txt").files == ["in/a.jpg", "in/ö.jpg"]


def test_a_name_may_begin_as_a_json_text_does(here):
    here("in/[2023] a.jpg", "in/{b}.jpg")
    with open("in/list.txt", "w") as file:
        file.write("[2023] a.jpg\n{b}.jpg\n")
    assert find_images("in/list.txt").files == ["in/[2023] a.jpg", "in/{b}.jpg"]


def test_mistakes_name_the_option_and_the_path(here):
    folder = here("in/readme")
    (folder / "in" / "notes.md").write_text("# Notes\nabout nothing\n")
    content = [{"images": ["a.jpg"]}]
    for name, indent in (("one_line", None), ("indented", 1)):
        (folder / "in" / f"{name}.json").write_text(json.dumps(content, indent=indent))
    os.mkfifo(folder / "pipe")
    (folder / "empty").mkdir()
    for given, what in (
        ("absent", "no such file or folder"),
        ("empty", "no images there"),
        ("in", "no images there"),
        ("no/*.jpg", "no image matches"),
        ("in/*", "no image matches"),
        ("pipe", "no file and no folder"),
        ("in/notes.md", "none of the 1 files it names is there"),
        ("in/one_line.json", "it is a JSON file, no list of images; write a path on each line, or name a folder$"),
        ("in/indented.json", "it is a JSON file, no list of images"),
    ):
        with pytest.raises(UserError, match=what) as raised:
            find_images(given, "--some_option")
        assert str(raised.value).startswith(f"--some_option {given}: ")


MANY = """
import sys, time
from commandline.inputs import find_images
begun = time.process_time()
found = find_images(sys.argv[1])
# Of this program alone: getrusage counts what it was forked from.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(found.files), time.process_time() - begun, int(peak) / 1024)
"""


def test_a_folder_of_many_names_is_read_at_once(tmp_path):
    """200,000 take 2 s and 130 MB; a quarter of them here."""
    for i in range(50_000):
        (tmp_path / f"a_name_of_usual_length_{i}.jpg").symlink_to(PICTURE)
    process = subprocess.run(
        [sys.executable, "-c", MANY, tmp_path], capture_output=True, text=True, cwd=ROOT, check=True
    )
    count, seconds, megabytes = map(float, process.stdout.split())
    assert count == 50_000
    assert seconds < 1.25
    assert megabytes < 120


def test_the_mixed_folder_of_the_cases():
    found = find_images(need_shared("cases", "mixed"))
    assert [os.path.basename(file) for file in found.files] == ["a.jpg", "b.webp", "c.tif", "d.gif"]
