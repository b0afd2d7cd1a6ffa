"""Files dealt out to several processes, here with ONNX Runtime: order, errors, skipped files, an early end."""

import functools
import multiprocessing
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
from runtimes.several_gpus import SeveralGpus, job_for

PICTURES = sorted((DEMO / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def detector(convert):
    with open_detector(convert("demo", "--batch_size", "dynamic")[0]) as opened:
        yield opened


@pytest.fixture
def started():
    """A function that gives the processes begun in the test: a session's own pool, of conftest, may run beside them."""
    before = set(multiprocessing.active_children())
    return lambda: [process for process in multiprocessing.active_children() if process not in before]


def several(detector, convert, files, count, size):
    """The demo's model in `count` processes."""
    model, gpus = convert("demo", "--batch_size", "dynamic")[0], list(range(count))
    return SeveralGpus(job_for(model, detector, files, gpus, size, functools.partial(load_image), "cpu"), gpus)


@pytest.mark.parametrize(("count", "size", "dealt"), [(2, 4, 8), (3, 1, 5), (2, 3, 64)])
def test_results_come_in_input_order(detector, convert, count, size, dealt, started, tmp_path, monkeypatch):
    monkeypatch.setattr(several_gpus, "DEALT", dealt)
    files = [*PICTURES] * 6
    for number in (3, 17, 18):
        files[number] = tmp_path / f"{number}.jpg"
        files[number].write_bytes(b"broken")
    wanted = {path: detect_image(detector, load_image(path)) for path in PICTURES}
    times = Times()
    with several(detector, convert, files, count, size) as processes:
        found = list(processes.detected(files, times))
    assert [item.number for item in found] == [n for n in range(len(files)) if n not in (3, 17, 18)]
    for item in found:
        assert item.path == files[item.number]
        assert (item.placement.height, item.placement.width) == load_image(item.path).shape[:2]
        assert parity.match_by_rank(wanted[item.path], item.found).unmatched == 0
    assert (times.images, times.skipped) == (len(files) - 3, 3)
    assert not started()


def test_one_that_is_killed_ends_all(detector, convert, started):
    with several(detector, convert, PICTURES * 500, 2, 2) as processes:
        found = processes.detected(PICTURES * 500, Times())
        for _ in range(5):
            next(found)
        started()[0].kill()
        with pytest.raises(UserError, match=r"--gpus [01]: the system ended its process"):
            list(found)
    assert not started()


def test_one_that_cannot_open_the_engine_says_so(detector, started, tmp_path):
    job = job_for(tmp_path / "no.onnx", detector, PICTURES, [0, 1], 2, functools.partial(load_image), "cpu")
    with pytest.raises(UserError, match=r"no\.onnx: no such file"), SeveralGpus(job, [0, 1]):
        pass
    assert not started()


def test_who_stops_early_leaves_nothing_running(detector, convert, started):
    before, times = threading.active_count(), Times()
    with several(detector, convert, PICTURES * 200, 2, 2) as processes:
        found = processes.detected(PICTURES * 200, times)
        for _ in range(5):
            next(found)
        found.close()
    assert 5 <= times.images < 8 * 200
    assert threading.active_count() <= before
    assert not started()


def test_gpus_as_an_option():
    assert gpu_list("0") == [0]
    assert gpu_list("2,0") == [2, 0]
    assert gpu_list("all") == "all"
    for wrong in ("", "0,", "-1", "0,0", "first"):
        with pytest.raises(Exception, match=r"not a whole number|twice"):
            gpu_list(wrong)
