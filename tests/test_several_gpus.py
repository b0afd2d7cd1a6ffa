"""Files dealt out to several detectors, here on ONNX Runtime: order, errors, skipped files, an early end."""

import contextlib
import threading

from commandline import UserError
from commandline.options import gpu_list

import pytest
from conftest import DEMO

from checks import parity
from images.decoding import load_image
from runtimes import open_detector, several_gpus
from runtimes.detector import detect_image
from runtimes.pipeline import Times
from runtimes.several_gpus import detect_on_all

PICTURES = sorted((DEMO / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def detectors(convert):
    model = convert("demo", "--batch_size", "dynamic")[0]
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open_detector(model)) for _ in range(3)]


@pytest.mark.parametrize(("count", "size", "dealt"), [(2, 4, 8), (3, 1, 5), (2, 3, 64), (1, 2, 8)])
def test_results_come_in_input_order(detectors, count, size, dealt, tmp_path, monkeypatch):
    monkeypatch.setattr(several_gpus, "DEALT", dealt)
    files = [*PICTURES] * 6
    for number in (3, 17, 18):
        files[number] = tmp_path / f"{number}.jpg"
        files[number].write_bytes(b"broken")
    wanted = {path: detect_image(detectors[0], load_image(path)) for path in PICTURES}
    times = Times()
    found = list(detect_on_all(detectors[:count], files, size, times))
    assert [item.number for item in found] == [n for n in range(len(files)) if n not in (3, 17, 18)]
    for item in found:
        assert item.path == files[item.number]
        assert parity.match_by_rank(wanted[item.path], item.found).unmatched == 0
    assert (times.images, times.skipped) == (len(files) - 3, 3)


def test_an_error_of_one_ends_all(detectors, monkeypatch):
    before, start = threading.active_count(), detectors[1].start
    calls = []

    def fail(batch, shapes):
        calls.append(len(batch))
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return start(batch, shapes)

    monkeypatch.setattr(several_gpus, "DEALT", 8)
    monkeypatch.setattr(detectors[1], "start", fail)
    with pytest.raises(UserError, match=r"the network failed on .*: out of memory"):
        list(detect_on_all(detectors[:2], PICTURES * 20, 2, Times()))
    assert threading.active_count() <= before + 4  # ONNX Runtime's own threads stay


def test_who_stops_early_leaves_nothing_running(detectors):
    before = threading.active_count()
    found = detect_on_all(detectors[:2], PICTURES * 200, 2, Times())
    for _ in range(5):
        next(found)
    found.close()
    assert threading.active_count() <= before + 4


def test_gpus_as_an_option():
    assert gpu_list("0") == [0]
    assert gpu_list("2,0") == [2, 0]
    assert gpu_list("all") == "all"
    for wrong in ("", "0,", "-1", "0,0", "first"):
        with pytest.raises(Exception, match=r"not a whole number|twice"):
            gpu_list(wrong)
