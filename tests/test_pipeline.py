"""The pipeline of infer.py and eval_coco.py: order, errors that name the file, Ctrl-C, memory that stays flat."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO, ROOT

import image_batcher
import infer
from checks import parity
from images import decoding, shared_memory
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector, several_gpus
from runtimes.detector import detect_image
from runtimes.onnx_detector import MOST_SIDE_BY_SIDE
from runtimes.pipeline import Times, choose_batch_size, detect_files, naming_results_of
from runtimes.processes import processor_count
from runtimes.workers import Workers, in_order

PICTURES = sorted((DEMO / "images").glob("*.jpg"))


@pytest.fixture(scope="module")
def model(convert):
    return convert("demo", "--batch_size", "dynamic")[0]


@pytest.fixture(scope="module")
def demo_detector(model):
    with open_detector(model) as detector:
        yield detector


@pytest.fixture
def threads():
    with Workers(10, 12, cores=2) as workers:
        assert not workers.processes
        yield workers


@pytest.fixture
def processes(demo_detector):
    """Workers that are processes, on however few cores."""
    spec = demo_detector.input
    with Workers(10_000, 3 * spec.height * spec.width * 4, 20, cores=4) as workers:
        assert workers.processes
        assert (workers.count, workers.together) == (3, 8)
        yield workers


def is_its_own(detected, seconds):
    """A task for the workers: whether the image is still that of the path after so many seconds."""
    time.sleep(seconds)
    image = detected.image
    return image is None or np.array_equal(image, load_image(detected.path))


def lies_in_memory(detected, seconds):
    """A task: whether, after so many seconds, the image is still that of the path, in the memory for pictures; None: not kept."""
    time.sleep(seconds)
    if detected.image is None:
        return None
    shared = np.shares_memory(detected.image, np.frombuffer(shared_memory.PICTURES[0].buffer, np.uint8))
    return shared and np.array_equal(detected.image, load_image(detected.path))


def test_pictures_that_processes_decoded_reach_those_who_draw(demo_detector, processes):
    """None is decoded twice and none is overwritten while somebody holds it; where no room is left, images are not kept."""
    rooms = sorted(processes.rooms)

    def detected(count, keep=True):
        files = list(itertools.islice(itertools.cycle(PICTURES[:5]), count))  # eight to a task: others each time
        return detect_files(demo_detector, files, 3, processes, keep_images=keep)

    def seen(items):
        slow = itertools.cycle([0.02] + [0] * 9)
        return list(processes.map(lies_in_memory, ((item, next(slow)) for item in items)))

    assert seen(detected(96)) == [True] * 96
    assert sorted(processes.rooms) == rooms
    held = list(detected(8 * len(rooms) + 16))  # eight to a room
    assert processes.rooms == []
    assert seen(held) == [True] * 8 * len(rooms) + [None] * 16
    del held
    assert sorted(processes.rooms) == rooms
    assert all(item.image is None for item in detected(9, keep=False))
    processes.room_bytes = 2 * load_image(PICTURES[0]).nbytes
    kept = seen(detected(24))
    assert set(kept) == {True, None}
    assert 3 <= kept.count(True) < 12


def test_an_item_is_held_until_its_result_is_there():
    """What it holds, memory say, is not another's before."""
    futures, items = [concurrent.futures.Future() for _ in range(3)], []

    def submit(item):
        items.append(weakref.ref(item))
        return futures[item[0]]

    results = in_order(submit, (np.full(1, n) for n in range(3)), 2)
    for number, future in enumerate(futures):
        future.set_result(number)
    assert next(results) == 0
    assert [item() is None for item in items] == [True, False, False]
    assert list(results) == [1, 2]


@pytest.mark.parametrize("limit", [1000, 36_000_000])
def test_large_images_are_not_kept(demo_detector, threads, limit, monkeypatch):
    """Who draws on them reads them again."""
    monkeypatch.setattr(image_batcher, "MAX_KEPT_BYTES", limit)
    found = list(detect_files(demo_detector, PICTURES, 3, threads, keep_images=True))
    assert [item.image is None for item in found] == [limit == 1000] * len(PICTURES)
    assert all(item.image is None for item in detect_files(demo_detector, PICTURES, 3, threads))


@pytest.mark.parametrize("size", [1, 3, 8, 20])
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_results_come_in_order_and_are_the_images_own(demo_detector, request, size, kind):
    workers = request.getfixturevalue(kind)
    files = [*PICTURES, *PICTURES[::-1], PICTURES[0]]
    wanted = {path: detect_image(demo_detector, load_image(path)) for path in PICTURES}
    seconds = itertools.cycle((0.02, 0, 0.01))  # some are done sooner than those before
    times, seen = Times(), []

    def items():
        for detected in detect_files(demo_detector, files, size, workers, times, keep_images=True):
            seen.append(detected)
            yield detected, next(seconds)

    assert list(workers.map(is_its_own, items())) == [True] * len(files)
    assert [item.path for item in seen] == files
    for item in seen:
        assert (item.placement.height, item.placement.width) == load_image(item.path).shape[:2]
        report = parity.match_by_rank(wanted[item.path], item.found)
        assert (report.unmatched, report.compared) == (0, len(item.found.scores))
    assert times.images == len(files)
    workers.close()
    assert min(times.decode, times.resize, times.network, times.postprocess, workers.seconds) > 0
    assert workers.finished == len(files)


def test_batches_side_by_side_are_those_one_after_another(model):
    """ONNX Runtime computes batches of an SSD at the same time; each ticket gives its own batch's detections."""
    with open_detector(model) as detector:
        resizer = detector.metadata["resizer"]
        images = [preprocess(load_image(path), resizer)[0] for path in PICTURES]
        batches = [np.stack(images[i : i + size]) for i, size in ((0, 1), (1, 3), (4, 2), (6, 2))] * 3
        wanted = [detector.infer(batch) for batch in batches]
        before = dict(detector.spent)
        tickets = [detector.start(batch) for batch in batches]
        for one, ticket in zip(wanted, tickets, strict=True):
            for a, b in zip(one, detector.finish(ticket), strict=True):
                report = parity.match_by_rank(a, b)
                assert (report.unmatched, report.compared) == (0, len(a.scores))
                assert max(report.box_difference, report.score_difference) < 1e-5
        assert all(detector.spent[stage] > before[stage] for stage in ("network", "postprocess"))
        assert detector.batches_ahead == 1 + min(processor_count(), MOST_SIDE_BY_SIDE)
        meeting, run = threading.Barrier(min(processor_count(), 2)), detector._run
        with pytest.MonkeyPatch.context() as patch:  # each of two waits until the other is computed too
            patch.setattr(detector, "_run", lambda *x: (meeting.wait(20), run(*x))[1])
            for ticket in [detector.start(batch) for batch in batches]:
                detector.finish(ticket)


def test_workers_are_as_many_as_processors_that_may_be_used():
    """taskset, a container's cpuset and Slurm leave fewer than the machine has."""
    script = "from runtimes.workers import Workers; print(Workers(1).count)"
    mine = sorted(os.sched_getaffinity(0))[:8]  # threads are no more
    for allowed in (mine[:1], mine):
        restrict = functools.partial(os.sched_setaffinity, 0, allowed)
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, preexec_fn=restrict, capture_output=True, text=True, cwd=ROOT, timeout=50)
        assert (done.stdout, done.stderr) == (f"{len(allowed)}\n", "")


def test_a_quota_leaves_fewer_processors(model, tmp_path, monkeypatch):
    """As files say it in a container: of cgroup v2, of v1, none, and one that is no quota."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    for name, files, count in (
        ("two", {"cpu.max": "200000 100000\n"}, 2),
        ("part", {"cpu.max": "50000 100000\n"}, 1),
        ("more", {"cpu.max": "1600000 100000\n"}, 8),
        ("all", {"cpu.max": "max 100000\n"}, 8),
        ("v1", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ("v1 all", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("none", {}, 8),
    ):
        (tmp_path / name / "cpu").mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        monkeypatch.setattr("runtimes.processes.CGROUP", tmp_path / name)
        assert processor_count() == count, name
    monkeypatch.setattr("runtimes.processes.CGROUP", tmp_path / "two")
    with open_detector(model) as detector:
        assert (detector._threads(1), detector._threads(2)) == (2, 1)


def test_networks_and_gpus_share_the_processors_that_may_be_used(model, monkeypatch):
    for allowed in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: range(allowed))
        with open_detector(model) as detector:
            assert detector.batches_ahead == 1 + allowed
            assert several_gpus.job_for(model, detector, PICTURES, [0], 1, load_image, "cpu").cores == allowed


def test_few_images_are_in_memory_at_a_time(demo_detector, threads):
    """However slow the work is, the stages before wait for it."""
    alive, most, lock = [0], [0], threading.Lock()
    read = []

    def work(path):
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        time.sleep(0.005)
        with lock:
            alive[0] -= 1

    def load(path):
        read.append(path)
        return load_image(path)

    detected = detect_files(demo_detector, PICTURES * 20, 2, threads, load=load)
    done = threads.map(work, ((item.path,) for item in detected))
    for _ in range(10):
        next(done)
    assert len(read) < 60
    done.close()
    assert most[0] <= 2


def where(number, array, shape):
    """A task: the number, the sum of an array, whether it lies in shared memory, its shape as given."""
    shared = any(np.shares_memory(array, np.frombuffer(memory, np.uint8)) for memory in shared_memory.SHARED)
    return number, int(array.sum()), shared, shape


@pytest.mark.parametrize("through", [True, False])
def test_arrays_reach_processes_through_memory(through):
    """As far as they fit: DRAWN_TOGETHER small ones do, of larger ones some, of the largest none; each keeps its own."""
    arrays = [np.full((size, 7, 3), n % 250, np.uint8) for n, size in enumerate([100, 1000, 100, 5000] * 40)]
    with Workers(1000, 4000, cores=4) as workers:  # of 8 * 4,000 bytes
        done = workers.map(where, ((n, x, x.shape) for n, x in enumerate(arrays)), through_memory=through)
        for n, (number, total, shared, shape) in enumerate(done):
            assert (number, total, shape) == (n, int(arrays[n].sum()), arrays[n].shape)
            assert shared == (through and arrays[n].nbytes < 30_000)
    assert n == len(arrays) - 1


def fail(path, reason):
    with naming_results_of(path):
        raise OSError(reason)


def fail_on_fourth(path):
    return fail(path, "disk full") if path == PICTURES[3] else None


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_an_error_stops_everything_and_names_the_file(demo_detector, request, kind):
    workers = request.getfixturevalue(kind)
    before = threading.active_count()

    def paths(files, size):
        return ((item.path,) for item in detect_files(demo_detector, files, size, workers))

    with pytest.raises(UserError, match=r"shapes_04\.jpg: .*disk full"):
        list(workers.map(fail_on_fourth, paths(PICTURES * 10, 2)))
    start = demo_detector.start
    with pytest.MonkeyPatch.context() as patch:  # images of a shape that the network does not take
        patch.setattr(demo_detector, "start", lambda batch, shapes: start([x[:-1] for x in batch], shapes))
        with pytest.raises(UserError, match=r"the network failed on .*shapes_01\.jpg"):
            list(paths(PICTURES[:1], 1))
    time.sleep(0.2)
    assert threading.active_count() <= before + workers.count
    assert len(list(workers.map(fail_on_fourth, paths(PICTURES[:3], 2)))) == 3


def die(path):
    if path == PICTURES[2]:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_ends_is_an_error(demo_detector, processes):
    detected = detect_files(demo_detector, PICTURES * 10, 2, processes)
    with pytest.raises(UserError, match="the system ended a process"):
        list(processes.map(die, ((item.path,) for item in detected)))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_broken_images_are_skipped(demo_detector, request, kind, tmp_path, capsys):
    shutil.copy(PICTURES[0], tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(PICTURES[1].read_bytes()[:3000])
    shutil.copy(PICTURES[2], tmp_path / "c.jpg")
    times = Times()
    files = sorted(tmp_path.iterdir())
    workers = request.getfixturevalue(kind)
    done = [item.path.name for item in detect_files(demo_detector, files, 2, workers, times)]
    assert (done, times.skipped) == (["a.jpg", "c.jpg"], 1)
    assert "b.jpg: skipped" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_many_broken_images_leave_memory_for_the_others(demo_detector, request, kind, tmp_path):
    """A few whole ones among many that are not, as a half-copied folder has them."""
    for i in range(400):
        target = tmp_path / f"{i:03}.jpg"
        target.symlink_to(PICTURES[i % 8]) if i % 40 == 0 else target.write_bytes(b"broken")
    workers, times = request.getfixturevalue(kind), Times()
    done = list(detect_files(demo_detector, sorted(tmp_path.iterdir()), 8, workers, times))
    assert (len(done), times.skipped) == (10, 390)
    for item in done:
        wanted = detect_image(demo_detector, load_image(item.path))
        assert parity.match_by_rank(wanted, item.found).unmatched == 0


def test_simplejpeg_and_pillow_decode_alike(tmp_path, monkeypatch):
    from PIL import Image

    files = list(PICTURES)
    for mode, options in (("L", {}), ("RGB", {"progressive": True}), ("RGB", {"subsampling": 0}), ("CMYK", {})):
        files.append(tmp_path / f"{len(files)}.jpg")
        Image.open(PICTURES[0]).convert(mode).save(files[-1], **options)
    assert decoding.simplejpeg is not None
    fast = [load_image(path) for path in files]
    decoded_fast = [decoding._decode_jpeg(path.read_bytes(), None) is not None for path in files]
    assert decoded_fast == [True] * (len(files) - 1) + [False]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    for path, image in zip(files, fast, strict=True):
        np.testing.assert_array_equal(load_image(path), image, err_msg=str(path))


def test_batch_size_is_what_the_model_takes(demo_detector, convert):
    assert choose_batch_size(demo_detector, None, 8, "m.onnx") == 8
    assert choose_batch_size(demo_detector, 3, 8, "m.onnx") == 3
    with open_detector(convert("demo", "--batch_size", "4")[0]) as fixed:
        assert choose_batch_size(fixed, None, 8, "m.onnx") == 4
        with pytest.raises(UserError, match=r"--batch_size 5: m\.onnx takes at most 4 images .* --batch_size dynamic$"):
            choose_batch_size(fixed, 5, 8, "m.onnx")
    said = r"--batch_size 4: m\.onnx takes one image at a time; convert it with create_onnx\.py --batch_size dynamic$"
    with open_detector(convert("demo")[0]) as single, pytest.raises(UserError, match=said):
        choose_batch_size(single, 4, 8, "m.onnx")
    with pytest.raises(UserError, match=r"--batch_size 100000: 30\.7 GB of input; of 160 x 160 pixels 6510 images"):
        choose_batch_size(demo_detector, 100_000, 8, "m.onnx")
    with pytest.raises(UserError, match="--batch_size 0"):
        choose_batch_size(demo_detector, 0, 8, "m.onnx")
    engines = (  # of a dynamic model, for 1 to 4 images, and of one for 4
        (None, r"at most 4 images at a time; build it with build_engine\.py --batch 1 5 5$"),
        (4, r"convert it with create_onnx\.py --batch_size dynamic, and build the engine of that$"),
    )
    for batch, said in engines:
        spec = dataclasses.replace(demo_detector.input, batch=batch)
        engine = types.SimpleNamespace(input=spec, max_batch=4, usual_batch=4)
        with pytest.raises(UserError, match=said):
            choose_batch_size(engine, 5, 8, "e.trt")


def many(folder, count):
    """A folder of `count` links to the demo's pictures."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:05}.jpg").symlink_to(PICTURES[i % len(PICTURES)])
    return folder


@pytest.mark.parametrize("cores", [2, 4])
def test_ctrl_c_keeps_what_is_finished(model, tmp_path, cores):
    """In threads, and in processes, which infer.py starts from four cores on."""
    source = many(tmp_path / "in", 3000)
    affinity = f"os.sched_getaffinity = lambda _: range({cores})"
    script = f"import os, commandline; {affinity}; import infer; commandline.run(infer.main)"
    command = [sys.executable, "-c", script, "--engine", model, "--input", source, "--output", tmp_path / "out"]
    # A test run in the background of a shell ignores Ctrl-C, and so would what it starts.
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    # A group of its own, as a shell starts it: Ctrl-C reaches its processes too.
    process = subprocess.Popen(command, preexec_fn=restore, start_new_session=True, **pipes)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.tsv"))) < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    done = int(re.search(r"stopped: the results of (\d+) of 3000 images", errors)[1])
    assert "Traceback" not in errors
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in names if name.startswith(".")]
    assert 20 <= done < 3000
    assert len([name for name in names if name.endswith(".jpg")]) == done
    assert {name[:-4] for name in names if name.endswith(".jpg")} <= {
        name[:-4] for name in names if name[-4:] == ".tsv"
    }


def test_memory_and_handles_stay_flat(demo_detector, threads):
    """1,600 images; BENCHMARKS.md has 10,000."""

    def state():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd"))

    marks = []
    for count, _ in enumerate(detect_files(demo_detector, PICTURES * 200, 4, threads)):
        if count in (400, 1599):
            marks.append(state())
    (early, early_handles), (late, late_handles) = marks
    assert late < early + 40  # MB; 1,200 images would be 1,100
    assert late_handles <= early_handles + 2


def test_the_benchmark_writes_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--engine", str(model), "--input", str(DEMO / "images"), "--benchmark", "--benchmark_images", "60"]
    assert infer.main([*options, "--batch_size", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("60 images of")
    assert "4 at a time" in printed
    rates = [
        float(re.search(rf"^{name}\s+([\d.]+) images/s$", printed, re.MULTILINE)[1])
        for name in ("end to end", "network alone", "decode and resize")
    ]
    assert min(rates) > 5
    share = int(re.search(r"^End to end is (\d+) % of the slowest part", printed, re.MULTILINE)[1])
    assert share == pytest.approx(100 * rates[0] / min(rates[1:]), abs=1.5)
    (tmp_path / "broken.jpg").write_bytes(b"")
    assert infer.main([*options, "--input", "broken.jpg"]) == 1
    (tmp_path / "broken.jpg").unlink()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="--output"):
        infer.main(options[:4])
