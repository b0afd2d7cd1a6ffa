"""Faults in the middle, on real processes: what is stopped or killed leaves whole files and no process behind."""

import functools
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from commandline import remove_parts

import pytest
from conftest import DEMO, ROOT, variants
from PIL import Image
from test_pipeline import PICTURES, many

MODEL = DEMO / "ssd_mobilenet_v1_shapes"
# Runs a script as `python SCRIPT ...` with so many processors, and says when it begins.
RUN = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
os.sched_getaffinity = lambda _: range(CORES)
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
print("begun", flush=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script, *options, cores=2, limit=None, before=""):
    """Starts a script in a process group of its own, as a shell does; returns it once Python runs.

    before: Python code that runs ahead of it.
    """
    code = before + RUN.replace("CORES", str(cores))
    command = [sys.executable, "-c", code, ROOT / script, *map(str, options)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, preexec_fn=limit, **pipes)
    assert process.stdout.readline() == "begun\n"
    return process


def ended(process, seconds=60):
    """What a process printed as errors, once it has ended; none of its own are left, and no traceback is in it."""
    output, errors = process.communicate(timeout=seconds)
    assert "Traceback" not in errors, errors
    deadline = time.monotonic() + 10
    while is_running(process.pid):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)
    return output, errors


def is_running(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def check_files(folder):
    """Nothing half-written: no temporary file, and pictures that can be read."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if ".part" in path.name]
    for path in files:
        if path.suffix == ".jpg":
            Image.open(path).load()
            assert path.with_suffix(".tsv").exists()
    return files


@pytest.fixture(scope="module")
def model(convert):
    return convert("demo", "--batch_size", "dynamic")[0]


def wait_for(process, folder, pattern, count):
    deadline = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("whom", ["the script", "all of its processes"])
def test_sigterm_stops_as_ctrl_c_does(model, tmp_path, whom):
    """docker stop reaches the script alone, systemd all of its processes."""
    out = tmp_path / "out"
    process = start("infer.py", "--engine", model, "--input", many(tmp_path / "in", 3000), "--output", out, cores=4)
    wait_for(process, out, "*.tsv", 20)
    (os.kill if whom == "the script" else os.killpg)(process.pid, signal.SIGTERM)
    _, errors = ended(process)
    files = check_files(out)
    if whom == "the script":
        done = int(re.search(r"stopped: the results of (\d+) of 3000 images are in", errors)[1])
        assert len([path for path in files if path.suffix == ".jpg"]) == done >= 19
        assert process.returncode == 130
    else:  # what ended first, decides
        assert process.returncode == 130 or "the system ended a process" in errors


STOPPED_AS_IT_HANDS_OUT = """
import os, signal
from concurrent.futures import ProcessPoolExecutor as Pool
handed = []
def submit(pool, function, *args, given=Pool.submit):
    future = given(pool, function, *args)
    handed.append(function.__name__)
    if handed.count("_call_each") == 5 and handed[-1] == "_call_each":
        os.kill(os.getpid(), signal.SIGTERM)
    return future
Pool.submit = submit
"""


def test_what_is_being_handed_out_is_counted(model, tmp_path):
    """A stop between a task's beginning and what counts it: its pictures lie there and are among those that it says."""
    images, out = many(tmp_path / "in", 3000), tmp_path / "out"
    options = ["--engine", model, "--input", images, "--output", out]
    process = start("infer.py", *options, cores=4, before=STOPPED_AS_IT_HANDS_OUT)
    _, errors = ended(process)
    done = int(re.search(r"stopped: the results of (\d+) of 3000 images are in", errors)[1])
    assert len([path for path in check_files(out) if path.suffix == ".jpg"]) == done > 0
    assert process.returncode == 130


# Code that sends a signal from within: when the script imports NumPy, and at two moments of Python's own end, before and
# after it takes its handlers away.
IN_IMPORTS = """
import os, sys
class Finder:
    find_spec = lambda name, *_: os.kill(os.getpid(), {0}) if name == "numpy" else None
sys.meta_path.insert(0, Finder)
"""
AT_THE_END = """
import atexit, os
atexit.register(lambda: os.kill(os.getpid(), {0}))
class Last:
    __del__ = lambda _, kill=os.kill, number=os.getpid(): kill(number, {0})
last = Last()
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_its_imports_and_at_its_end(kind):
    """130 from the start on, and the status of what was done once it is done."""
    for before, options, status in (
        (IN_IMPORTS, ["--version"], 130),
        (AT_THE_END, ["--version"], 0),
        (AT_THE_END, ["--engine", "no.onnx", "--input", PICTURES[0]], 2),
    ):
        process = start("infer.py", *options, before=before.format(int(kind)))
        _, errors = ended(process)
        assert process.returncode == status
        assert len(errors.splitlines()) == (status == 2), errors


# What onnxruntime's import makes of KeyboardInterrupt.
NATIVE = """
import os
try:
    os.kill(os.getpid(), {0})
    print("imported")
except KeyboardInterrupt as error:
    raise ImportError("initialization failed") from error
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_import_is_finished_first(tmp_path, kind):
    (tmp_path / "native.py").write_text(NATIVE.format(int(kind)))
    code = f"""
import signal, sys, time, commandline
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.append({str(tmp_path)!r})
commandline.run(lambda: (__import__("native"), time.sleep(60)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "imported\n", "")


# What TensorRT's builder does with KeyboardInterrupt in its logger; qsort stands in its place.
SWALLOWED = """
import contextlib, ctypes, os, signal, time, commandline
signal.signal(signal.SIGINT, signal.default_int_handler)
def look(*_):
    os.write(1, b"looking\\n")  # past Python's buffer
    time.sleep(0.2)
    return 0
def main():
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    print("begun")
    with {0}:
        ctypes.CDLL(None).qsort((ctypes.c_int * 20)(), ctypes.c_size_t(20), ctypes.c_size_t(4), kind(look))
    print("sorted")
commandline.run(main)
"""


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_stopped_while_native_code_swallows_exceptions(kind):
    for within, status in (("commandline.leaving_at_once()", 130), ("contextlib.nullcontext()", 0)):
        process = subprocess.Popen(
            [sys.executable, "-c", SWALLOWED.format(within)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        )
        before = list(iter(process.stdout.readline, "looking\n"))
        assert before == ["begun\n"] or status == 0  # what was printed before the stop is there
        process.send_signal(kind)
        output, _ = process.communicate(timeout=50)
        assert (process.returncode, "sorted" in output) == (status, status == 0)


def test_a_killed_script_leaves_no_process(model, tmp_path):
    """Its workers end with it."""
    out = tmp_path / "out"
    process = start("infer.py", "--engine", model, "--input", many(tmp_path / "in", 3000), "--output", out, cores=4)
    wait_for(process, out, "*.tsv", 20)
    os.kill(process.pid, signal.SIGKILL)
    ended(process)
    assert process.returncode == -signal.SIGKILL


def test_a_killed_worker_is_one_line(model, tmp_path):
    out = tmp_path / "out"
    process = start("infer.py", "--engine", model, "--input", many(tmp_path / "in", 3000), "--output", out, cores=4)
    wait_for(process, out, "*.tsv", 20)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = [int(number) for number in file.read().split()]
    with_most_work = max(workers, key=lambda number: os.path.exists(f"/proc/{number}") and cpu_ticks(number))
    os.kill(with_most_work, signal.SIGKILL)
    _, errors = ended(process)
    assert process.returncode == 2
    (line,) = errors.strip().splitlines()
    assert line.startswith("infer.py: the system ended a process of this one")
    check_files(out)


def cpu_ticks(number):
    with open(f"/proc/{number}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[11])


def test_what_killed_processes_left_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "a").mkdir()
    left = [f".x.{process.pid}.part.jpg", f"a/.x.y.{process.pid}.part", f".x.{'9' * 30}.part"]
    others = [f".x.{os.getpid()}.part.jpg", f"x.{process.pid}.part.jpg", ".x.part.jpg", f".x.{process.pid}.jpg"]
    for name in left[:2] + others:
        (tmp_path / name).write_text("")
    remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(others)


def test_few_file_handles(model, tmp_path):
    """ulimit -n 32 is too few or enough, but never a traceback or half a file."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (32, 32))
    options = "--engine", model, "--input", PICTURES[0].parent, "--output", tmp_path / "out"
    for cores in (2, 4):
        process = start("infer.py", *options, cores=cores, limit=limit)
        ended(process)
        assert process.returncode in (0, 2)
        if process.returncode == 0:
            assert len(check_files(tmp_path / "out")) == 2 * len(PICTURES)


def test_inputs_that_vanish(model, tmp_path):
    """They are skipped and counted."""
    source, out = many(tmp_path / "in", 500), tmp_path / "out"
    process = start("infer.py", "--engine", model, "--input", source, "--output", out)
    wait_for(process, out, "*.tsv", 20)
    for path in sorted(source.iterdir())[300:]:
        path.unlink()
    output, errors = ended(process, 240)
    assert process.returncode == 1
    skipped = int(re.search(r"(\d+) of 500 images were skipped", output)[1])
    assert skipped == 200 == errors.count("no such file")
    check_files(out)


@pytest.mark.parametrize("cores", [2, 4])
def test_an_output_folder_that_goes(model, tmp_path, cores):
    """One line that names what could not be written; or the folder is made anew. What is there is whole either way, though
    of the picture that was being written the table may be gone."""
    out = tmp_path / "out"
    process = start("infer.py", "--engine", model, "--input", many(tmp_path / "in", 1000), "--output", out, cores=cores)
    wait_for(process, out, "*.tsv", 20)
    shutil.rmtree(out, ignore_errors=True)
    _, errors = ended(process)
    assert process.returncode in (0, 2)
    lines = errors.strip().splitlines()
    assert len(lines) == bool(process.returncode), errors
    assert all(line.startswith("infer.py: ") and str(out) in line for line in lines)
    assert not list(tmp_path.rglob(".*.part*"))
    for path in out.glob("*.jpg"):
        Image.open(path).load()


COMMANDS = {
    "infer": lambda model, out: ("infer.py", "--engine", model, "--input", PICTURES[0].parent, "--output", out),
    "eval": lambda model, out: (
        *("eval_coco.py", "--engine", model, "--input", PICTURES[0].parent, "--output", out),
        *("--annotations", DEMO / "instances_shapes.json"),
    ),
    "create": lambda model, out: ("create_onnx.py", "--saved_model", MODEL, "--onnx", out / "model.onnx"),
    "compare": lambda model, out: (
        *("compare_tf.py", "--engine", model, "--saved_model", MODEL, "--input", PICTURES[0].parent, "--output", out),
    ),
    "build": lambda model, out: (
        *("build_engine.py", "--onnx", model, "--precision", "int8", "--calib_input", PICTURES[0].parent),
        *("--calib_cache", out / "cache", "--typed_onnx", out / "int8.onnx"),
    ),
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", COMMANDS)
def test_no_file_can_be_written(model, tmp_path, name):
    """Each write fails after 1,000 bytes, as on a full disk: one line that names the file, and nothing is left."""
    script, *options = COMMANDS[name](model, tmp_path / "out")
    (tmp_path / "out").mkdir()
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1000, 1000))
    process = start(script, *options, limit=limit)
    _, errors = ended(process, 120)
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert line.startswith((f"{script}: cannot write {tmp_path / 'out'}", f"{script}: cannot write temporary files in"))
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or (path.stat().st_size < 1000 and ".part" not in path.name)


# Moments at which each command is stopped, a signal each: in `make fuzz` 20 and 20.
MOMENTS = [(name, kind, n) for n, name, kind in itertools.product(range(variants(1)), COMMANDS, ("SIGINT", "SIGTERM"))]


@pytest.mark.zoo
@pytest.mark.fuzz
@pytest.mark.parametrize(("name", "kind", "number"), MOMENTS)
def test_stopped_at_any_moment(model, tmp_path, name, kind, number):
    """130 and whole files, whenever it comes; 0 where it came too late."""
    script, *options = COMMANDS[name](model, tmp_path / "out")
    (tmp_path / "out").mkdir()
    process = start(script, *options)
    time.sleep(random.Random(f"{name} {kind} {number}").uniform(0.2, 12))  # before, Python itself answers
    with_pictures = name == "infer"
    if process.poll() is None:
        os.killpg(process.pid, signal.Signals[kind])
    ended(process, 120)
    assert process.returncode in (130, 0)
    files = check_files(tmp_path / "out") if with_pictures else list((tmp_path / "out").rglob("*"))
    assert not [path for path in files if ".part" in path.name]
    if process.returncode == 0:
        assert files


@pytest.mark.zoo
def test_a_folder_of_200_000_names(model, tmp_path):
    """The first result comes within 5 seconds of when that of a small folder comes, and memory stays flat."""
    folders = {"few": 8, "many": 200_000}
    waited = {}
    for name, count in folders.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number:06}.jpg").symlink_to(PICTURES[1])
        begun = time.monotonic()
        process = start("infer.py", "--engine", model, "--input", tmp_path / name, "--output", tmp_path / f"{name}_out")
        wait_for(process, tmp_path / f"{name}_out", "*.jpg", 1)
        waited[name] = time.monotonic() - begun
        if name == "many":
            memory = []
            for results in (300, 1500):
                wait_for(process, tmp_path / "many_out", "*.jpg", results)
                memory.append(
                    int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1000
                )
            assert memory[1] < memory[0] + 20
            os.killpg(process.pid, signal.SIGINT)
        ended(process)
    assert waited["many"] < waited["few"] + 5
    check_files(tmp_path / "many_out")
