"""infer.py on videos: frames through the same detector, an annotated video, one table; what it says of others."""

import fractions
import itertools
import json
import re
import sys

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO

import infer
from images.decoding import load_image
from runtimes.detector import detect_image
from runtimes.stream import detect_stream
from runtimes.video import VideoReader, VideoWriter, is_video

pytest.importorskip("av", reason="videos need PyAV")
PICTURE = load_image(DEMO / "images" / "shapes_02.jpg")
FRAMES = 30


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A clip whose frames move a picture to the side, its name with a space."""
    path = tmp_path_factory.mktemp("video") / "my clip.mp4"
    with VideoWriter(path, fractions.Fraction(30)) as writer:
        for i in range(FRAMES):
            writer.add(np.roll(PICTURE, 8 * i, axis=1))
    return path


def rows(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_stream_gives_each_frames_own_detections(size, clip, detector):
    model = detector("demo", "--batch_size", "dynamic")
    with VideoReader(clip) as video:
        frames = list(video)
    assert (len(frames), frames[0].shape[1]) == (FRAMES, PICTURE.shape[1])
    found = list(detect_stream(model, iter(frames), size))
    for frame, (image, detections) in zip(frames, found, strict=True):
        assert image is frame
        np.testing.assert_allclose(detections.scores, detect_image(model, frame).scores, atol=1e-5)


def test_frames_are_not_read_far_ahead(detector):
    """A camera's pictures are to be fresh, and memory bounded."""
    read = itertools.count()
    frames = (np.roll(PICTURE, 8 * i, axis=1) for i in iter(lambda: next(read), None))
    stream = detect_stream(detector("demo", "--batch_size", "dynamic"), frames)
    for _ in range(5):
        next(stream)
    stream.close()
    assert next(read) < 20


def test_an_error_in_a_frame_is_raised(detector):
    frames = iter([PICTURE, np.zeros((0, 5, 3), np.uint8), PICTURE])
    with pytest.raises(Exception, match=r"zero|empty|divide|shape|bounds"):
        list(detect_stream(detector("demo", "--batch_size", "dynamic"), frames))


def test_infer_writes_a_video_and_one_table(clip, convert, tmp_path, capsys):
    model = convert("demo", "--batch_size", "dynamic")[0]
    options = ["--engine", str(model), "--input", str(clip), "--output", str(tmp_path / "out"), "--batch_size", "4"]
    assert infer.main([*options, "--json", str(tmp_path / "d.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"{FRAMES} frames in [\d.]+ s on ONNX Runtime: [\d.]+ frames/s", printed)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"my clip.mp4", "my clip.tsv"}
    table = rows(tmp_path / "out" / "my clip.tsv")
    assert {len(row) for row in table} == {7}
    numbers = [int(row[0]) for row in table]
    assert numbers == sorted(numbers)
    assert set(numbers) <= set(range(FRAMES))
    assert f"{len(table)} detections of 0.3 and more in {len(set(numbers))} frames" in printed
    assert len(table) > FRAMES
    height, width = PICTURE.shape[:2]
    for row in table:
        xmin, ymin, xmax, ymax = map(float, row[1:5])
        assert 0 <= xmin <= xmax <= width
        assert 0 <= ymin <= ymax <= height
    with VideoReader(clip) as before, VideoReader(tmp_path / "out" / "my clip.mp4") as after:
        pairs = list(zip(before, after, strict=True))
        assert before.rate == after.rate == 30
    drawn = [np.abs(a.astype(int) - b).max(axis=2) > 80 for a, b in pairs]
    assert sum(map(np.any, drawn)) >= len(set(numbers))  # boxes are drawn
    results = json.loads((tmp_path / "d.json").read_text())
    assert [entry["image_id"] for entry in results] == numbers
    assert {entry["file_name"] for entry in results} == {str(clip)}


def test_a_video_is_stopped_after_some_frames(clip, convert, tmp_path, capsys):
    options = ["--engine", str(convert("demo")[0]), "--input", str(clip), "--output", str(tmp_path), "--frames", "7"]
    assert infer.main(options) == 0
    assert "7 frames in" in capsys.readouterr().out
    with VideoReader(tmp_path / "my clip.mp4") as video:
        assert len(list(video)) == 7


def test_ctrl_c_keeps_the_frames_before_it(clip, convert, tmp_path, monkeypatch, capsys):
    calls = itertools.count()

    def interrupted(self, results):
        if next(calls) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(infer.ResultsFile, "add", interrupted)
    options = ["--engine", str(convert("demo")[0]), "--input", str(clip), "--output", str(tmp_path)]
    assert infer.main(options) == 130
    written = int(re.search(r"stopped after (\d+) frames", capsys.readouterr().err)[1])
    assert 12 <= written < FRAMES
    with VideoReader(tmp_path / "my clip.mp4") as video:
        assert len(list(video)) == written
    assert max(int(row[0]) for row in rows(tmp_path / "my clip.tsv")) < written


def test_what_is_no_video_is_one_line(clip, convert, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[:2000])
    for source, said in (
        (tmp_path / "absent.mp4", "cannot be opened as a video"),
        (tmp_path / "text.mp4", "cannot be opened as a video"),
        (tmp_path / "half.mp4", "cannot be opened as a video"),
        ("camera:9", "camera:9: it cannot be opened as a video"),
    ):
        options = ["--engine", str(convert("demo")[0]), "--input", str(source), "--output", str(tmp_path / "out")]
        with pytest.raises(UserError, match=said):
            infer.main(options)
        assert list((tmp_path / "out").iterdir()) == []


def test_what_is_taken_for_a_video():
    for name in ("clip.mp4", "a/b/CLIP.MOV", "camera:0", "rtsp://host/stream", "x.webm"):
        assert is_video(name), name
    for name in ("photo.jpg", "camera", "folder", "list.txt", "mp4"):
        assert not is_video(name), name


def test_without_pyav_it_is_one_line(clip, convert, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    options = ["--engine", str(convert("demo")[0]), "--input", str(clip), "--output", str(tmp_path)]
    with pytest.raises(UserError, match=r"videos need PyAV.*requirements-video\.txt"):
        infer.main(options)
