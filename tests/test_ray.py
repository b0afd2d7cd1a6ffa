"""infer_ray.py: on this machine, on a cluster of two nodes, on an object store."""

import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO, ROOT, made_for_one_size, need_shared
from PIL import Image
from servers import s3_server
from test_install import run_without

import infer

# Read when Ray is imported: it listens on loopback alone then, and takes that for the address of this machine.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# On two cores that other things run on too, a process may take minutes to start, and not answer for as long.
PATIENCE = {"worker_register_timeout_seconds": 300, "agent_register_timeout_ms": 300_000}
PATIENCE |= {"health_check_failure_threshold": 60}
os.environ |= {f"RAY_{name}": str(value) for name, value in PATIENCE.items()}
pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
import pyarrow as pa  # noqa: E402
from pyarrow import fs  # noqa: E402

import infer_ray  # noqa: E402
import onnx_utils  # noqa: E402
from deploy.ray_detector import RayDetector  # noqa: E402
from images.decoding import EXIF_ORIENTATION  # noqa: E402
from runtimes.detector import Detections  # noqa: E402

ENDS_WITHIN = 480
PICTURES = sorted((DEMO / "images").glob("*.jpg"))


@pytest.fixture(scope="module", autouse=True)
def sessions():
    """The folder of all that Ray writes of its own here; sockets lie in it, so that its path must be short."""
    with tempfile.TemporaryDirectory(prefix="ray.", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        yield folder


@pytest.fixture(scope="module")
def cluster(sessions):
    """The address of a cluster of two nodes, one processor each, on loopback."""
    from ray.cluster_utils import Cluster

    if " " in sys.executable:
        pytest.skip("Ray's Cluster gives Python's path to a shell as it is: it may have no space")
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        started.add_node(**node)
        yield started.address
    finally:
        started.shutdown()


def start(address, model, images, output, *options, cwd=None, python=sys.executable):
    """infer_ray.py as a process, in the folder `cwd`."""
    command = [
        python,
        ROOT / "infer_ray.py",
        "--engine",
        model,
        "--input",
        images,
        "--output",
        output,
        *options,
    ]
    command += ["--address", address] if address else []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), **pipes, text=True, cwd=cwd)


def finish(process, status=0):
    """(standard output, standard error) of a process that ends with that status."""
    try:
        printed, errors = process.communicate(timeout=ENDS_WITHIN)
    finally:
        process.kill()
    assert process.returncode == status, printed + errors
    return printed, errors


def rows_of(output):
    """{path: row} of the results, as pandas reads them; no path may be there twice."""
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(output / "detections")
    rows["error"] = rows["error"].astype(object).where(rows["error"].notna(), None)
    rows = rows.to_dict("records")
    assert max(collections.Counter(row["path"] for row in rows).values()) == 1
    return {row["path"]: row for row in rows}


def table_of(row):
    """infer.py's table of a row."""
    boxes = np.stack(row["boxes"])[:, [1, 0, 3, 2]] if len(row["boxes"]) else np.empty((0, 4))
    return "".join(infer.result_rows(Detections(boxes, row["scores"], row["classes"]), (1, 1)))


@pytest.fixture
def links(tmp_path):
    """links(count): a folder with so many links to the demo's pictures."""

    def make(count):
        folder = tmp_path / "links"
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:05}.jpg").symlink_to(PICTURES[number % len(PICTURES)])
        return folder

    return make


@pytest.fixture
def actors(sessions):
    """actors(): the process ids of the actors that these tests started."""

    def find():
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                named = (process / "cmdline").read_bytes().startswith(b"ray::MapWorker(MapBatches(RayDetector))")
                if named and sessions.encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    return find


def wait_for_files(folder, count, process):
    """Waits until so many files of results are there."""
    end = time.monotonic() + ENDS_WITHIN
    while len(list(folder.glob("detections/*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_stopped_run_is_resumed_and_a_killed_actor_loses_nothing(cluster, convert, links, actors, tmp_path):
    """SIGTERM ends a run on this machine, whatever Ray would do with it; on two nodes, to which code and model travel,
    --resume does what is missing, three images at a time, while an actor is killed."""
    model, folder, out = convert("demo", "--batch_size", "dynamic")[0], links(1000), tmp_path / "out"
    (folder / "broken.jpg").write_bytes(b"no image")
    options = ["--batch_size", "3", "--task_images", "20"]
    process = start(None, model, folder, out, *options)
    wait_for_files(out, 3, process)
    process.terminate()
    _, errors = finish(process, 130)
    assert "of 1001 images and perhaps some more have their rows" in errors
    assert "Traceback" not in errors and "SIGTERM" not in errors, errors
    assert actors() == [] and not list(out.rglob("*.part*"))
    before, kept = rows_of(out), {path: path.stat().st_mtime_ns for path in out.glob("detections/*.parquet")}
    assert 60 <= len(before) < 900

    command = ["--engine", str(model), "--input", str(folder), "--output", str(out)]
    with pytest.raises(UserError, match="go on with --resume"):
        infer_ray.main(command)
    with pytest.raises(UserError, match="made by another model, with other class names or options"):
        infer_ray.main([*command, "--resume", "--nms_threshold", "0.9"])
    process = start(cluster, model, folder, out, *options, "--resume")
    wait_for_files(out, len(kept) + 4, process)
    os.kill(actors()[0], signal.SIGKILL)
    assert len(list(out.glob("detections/*.parquet"))) < 50
    printed, _ = finish(process, 1)
    assert f"1 of {1001 - len(before)} images were skipped" in printed
    assert f"{len(before)} images had their rows before" in printed
    assert "on Ray, 2 actors, 1 processors each" in printed
    rows = rows_of(out)
    assert rows.keys() == {str(path) for path in folder.iterdir()}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert infer.main(["--engine", str(model), "--input", str(DEMO / "images"), "--output", str(tmp_path)]) == 0
    wanted = [(tmp_path / f"{path.stem}.tsv").read_text() for path in PICTURES]
    assert any(wanted)
    for number in range(1000):
        assert table_of(rows[str(folder / f"{number:05}.jpg")]) == wanted[number % len(PICTURES)]
    assert infer_ray.main([*command, "--resume"]) == 0  # nothing is left to do


def test_from_s3_to_s3_with_masks_and_pictures(exported, actors, tmp_path, monkeypatch):
    """On this machine, which Ray is started on and ended with: what infer.py --json writes, in rows; infer.py's pictures.

    moto's server on loopback speaks S3's protocol; pyarrow's client knows no other.
    """
    model, images = exported("mask", "--batch_size", "dynamic")[1], tmp_path / "in"
    images.mkdir()
    for path in PICTURES[:3]:
        shutil.copy(path, images)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.open(path).save(images / path.name, exif=exif)
    (images / "broken.png").write_bytes(b"no image")
    (images / "empty.jpg").touch()
    (tmp_path / "an environment").symlink_to(sys.prefix)  # Ray gives paths to a shell
    (tmp_path / "here" / "commandline").mkdir(parents=True)  # a package of a like name where the command is given
    (tmp_path / "here" / "commandline" / "__init__.py").touch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    common = ["--nms_threshold", "0.2", "--detection_type", "segmentation", "--format", "png"]
    with s3_server(tmp_path) as server:
        store = {"scheme": "http", "endpoint_override": server, "region": "us-east-1"}
        client, address = fs.S3FileSystem(**store, allow_bucket_creation=True), f"?{urllib.parse.urlencode(store)}"
        client.create_dir("photos")
        keys = {path.name: f"photos/in/{'ab'[number % 2]}/{path.name}" for number, path in enumerate(images.iterdir())}
        for name, key in keys.items():
            with client.open_output_stream(key) as file:
                file.write((images / name).read_bytes())
        with client.open_output_stream("photos/in/a/notes.txt") as file:
            file.write(b"no image")
        places = [f"s3://photos/in{address}", f"s3://photos/out{address}"]
        where = {"cwd": tmp_path / "here", "python": tmp_path / "an environment" / "bin" / "python"}
        process = start(None, model, *places, *common, "--pictures", "--cpus", "1", **where)
        printed, errors = finish(process, 1)
        assert "2 of 5 images were skipped" in printed
        assert "1 of the first 5 images are stored turned (EXIF)" in errors
        assert "s3://photos/out/detections" in printed
        assert actors() == []
        fs.copy_files("photos/out", str(tmp_path / "out"), source_filesystem=client)
        pattern = f"s3://photos/in/b/*{address}"
        assert set(infer_ray.find([pattern], "out").files) == {f"s3://{key}" for key in keys.values() if "/b/" in key}
        again = ["--engine", str(model), "--input", places[0], "--output", places[1], *common, "--resume"]
        assert infer_ray.main(again) == 0
        with pytest.raises(UserError, match=r"s3://photos/none: .*does not exist"):
            infer_ray.find([f"s3://photos/none{address}"], "out")

    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {f"s3://{key}" for key in keys.values()}
    assert {Path(path).name: row["error"] for path, row in rows.items() if row["error"] is not None} == {
        "broken.png": "it is not an image that Pillow reads (JPEG, PNG, BMP, GIF, WEBP, TIFF)",
        "empty.jpg": "the file is empty",
    }
    command = ["--engine", str(model), "--input", str(images), "--output", str(tmp_path / "infer"), *common]
    assert infer.main([*command, "--json", str(tmp_path / "results.json")]) == 1
    wanted = collections.defaultdict(list)
    for entry in json.loads((tmp_path / "results.json").read_text()):
        wanted[Path(entry["file_name"]).name].append(entry["segmentation"])
    assert len(wanted) == 3
    for name, masks in wanted.items():
        row, stem = rows[f"s3://{keys[name]}"], Path(name).stem
        assert [dict(mask) | {"size": list(mask["size"])} for mask in row["masks"]] == masks
        assert table_of(row) == (tmp_path / "infer" / f"{stem}.tsv").read_text()
        drawn = tmp_path / "out" / "pictures" / keys[name].removeprefix("photos/in/")
        assert drawn.with_suffix(".png").read_bytes() == (tmp_path / "infer" / f"{stem}.png").read_bytes()


def test_images_of_another_aspect_ratio(exported, tmp_path, capsys):
    """Of a model that was made for one: rows with an error, or what infer.py --fit finds. The actor, without Ray around it."""
    model = made_for_one_size(exported("mask", "--batch_size", "dynamic")[1], tmp_path / "model.onnx")
    common = ["--engine", str(model), "--input", str(PICTURES[0]), "--nms_threshold", "0.1", "--output"]
    for fit in ([], ["--fit"]):
        out = tmp_path / f"out{len(fit)}"
        job = infer_ray.make_job(infer_ray.parse_args([*common, str(out), *fit]))
        counts = RayDetector(dataclasses.replace(job, cores=1))(pa.table({"path": [str(PICTURES[0])], "name": ["a"]}))
        (row,) = rows_of(out).values()
        assert counts["skipped"].to_pylist() == [int(not fit)]
        if not fit:
            assert "have another aspect ratio than 64 x 128" in row["error"]
    assert "results differ from TensorFlow's" in capsys.readouterr().err
    assert infer.main([*common, str(tmp_path), "--fit"]) == 0
    assert table_of(row) == (tmp_path / f"{PICTURES[0].stem}.tsv").read_text() != ""


def test_names_beside_the_model_travel_with_it(convert, tmp_path):
    """As --labels does; names that others come from make results of another run. The actor, without Ray around it."""
    changed = onnx_utils.load(convert("demo", "--first_nms_threshold", "0.5")[0])
    onnx_utils.write_metadata(changed, {**onnx_utils.read_metadata(changed, "it"), "labels": None})
    onnx_utils.save(changed, tmp_path / "model.onnx")
    options = ["--engine", str(tmp_path / "model.onnx"), "--input", str(PICTURES[0]), "--output"]
    (tmp_path / "other.txt").write_text("".join(f"other {number}\n" for number in range(5)))
    settings = set()
    for beside, more, name in (
        (None, [], "{}"),
        ("mine", [], "mine {}"),
        ("mine", ["--labels", "other.txt"], "other {}"),
    ):
        if beside:
            (tmp_path / "labels.txt").write_text("".join(f"{beside} {number}\n" for number in range(5)))
        more = [more[0], str(tmp_path / more[1])] if more else []
        out = tmp_path / f"out{len(settings)}"
        job = dataclasses.replace(infer_ray.make_job(infer_ray.parse_args([*options, str(out), *more])), cores=1)
        counts = RayDetector(job)(pa.table({"path": [str(PICTURES[0])], "name": ["a"]}))
        assert counts["least"].to_pylist() == [0.5]
        (row,) = rows_of(out).values()
        assert list(row["names"]) == [name.format(label) for label in row["classes"]] != []
        settings.add(job.settings())
    assert len(settings) == 3


def test_keypoints_and_pictures_of_them(keypoint_model, tmp_path):
    """Those of infer.py's table, to the digits that it prints, and its picture; none in the rows of other models."""
    common = ["--engine", str(keypoint_model), "--input", str(PICTURES[0]), "--output"]
    job = infer_ray.make_job(infer_ray.parse_args([*common, str(tmp_path / "out"), "--pictures"]))
    RayDetector(dataclasses.replace(job, cores=1))(pa.table({"path": [str(PICTURES[0])], "name": ["a"]}))
    (row,) = rows_of(tmp_path / "out").values()
    assert infer.main([*common, str(tmp_path)]) == 0
    table = np.loadtxt(tmp_path / f"{PICTURES[0].stem}.tsv", ndmin=2)
    points = np.float64([np.stack(points) for points in row["keypoints"]])
    assert points.shape == (len(table), 5, 3) != (0, 5, 3)
    np.testing.assert_allclose(points[..., :2], table[:, 6:].reshape(points.shape)[..., :2], atol=0.0051)
    picture = tmp_path / "out" / "pictures" / "a.jpg"
    assert picture.read_bytes() == (tmp_path / f"{PICTURES[0].stem}.jpg").read_bytes()


def test_who_gets_which_processors():
    machines = [{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1.0}]
    assert infer_ray.plan_actors(machines, True, None, None) == (3, 4, 0)
    assert infer_ray.plan_actors(machines, True, None, 3) == (3, 3, 0)
    gpus = [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 10.0, "GPU": 2.0}, {"CPU": 4.0}]
    assert infer_ray.plan_actors(gpus, False, None, None) == (10, 5, 1)
    assert infer_ray.plan_actors(gpus, False, 4, None) == (4, 5, 1)
    for arguments, said in (
        ((gpus, False, 11, None), "--gpus 11"),
        ((machines, False, None, None), "--gpus all"),
        ((machines, True, None, 9), "--cpus 9"),
    ):
        with pytest.raises(UserError, match=said):
            infer_ray.plan_actors(*arguments)


def test_mistakes(cluster, convert, tmp_path):
    model, images, out = str(convert("demo", "--batch_size", "dynamic")[0]), str(DEMO / "images"), str(tmp_path / "out")
    for options, said in (
        (["--engine", "absent.onnx", "--input", images], "absent.onnx: no such file"),
        (["--engine", model, "--input", images, "--gpus", "1"], "--gpus 1"),
        (["--engine", model, "--input", images, "s3://a/b"], "not both"),
        (["--engine", model, "--input", "s3://a/b", "gs://a/b"], "different object stores"),
        (["--engine", model, "--input", "none://a/b"], "none://a/b"),
        (["--engine", model, "--input", images, "--labels", "absent.txt"], "--labels absent.txt"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            infer_ray.main([*options, "--output", out])
    with pytest.raises(UserError, match=r"results would lie in .*, where images are read"):
        infer_ray.main(["--engine", model, "--input", images, "--output", images, "--pictures"])
    process = start(cluster, model, images, out, "--batch_size", "10000")  # seen where the model is opened
    _, errors = finish(process, 2)
    assert errors.splitlines()[-1].startswith("infer_ray.py: --batch_size 10000: ")


@pytest.mark.parametrize("package", ["ray", "pyarrow"])
def test_without_the_extra_packages(package, tmp_path):
    options = ["--engine", "x", "--input", "y", "--output", tmp_path / "out"]
    status, _, errors = run_without([package], tmp_path / "block", "infer_ray.py", *options)
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert f"the package {package} is missing" in errors


def memory(pid):
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.zoo
def test_two_nodes_find_what_infer_finds(cluster, convert, tmp_path):
    """The 188 images of COCO, three at a time."""
    model, images = convert("demo", "--batch_size", "dynamic")[0], need_shared("coco", "val2017")
    options = ["--batch_size", "3", "--task_images", "32", "--nms_threshold", "0.05"]
    finish(start(cluster, model, images, tmp_path / "out", *options))
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {str(path) for path in images.glob("*.jpg")}
    command = ["--engine", str(model), "--input", str(images), "--output", str(tmp_path / "tables")]
    assert infer.main([*command, "--nms_threshold", "0.05"]) == 0
    tables = {path.stem: path.read_text() for path in (tmp_path / "tables").glob("*.tsv")}
    assert {Path(path).stem: table_of(row) for path, row in rows.items()} == tables
    assert any(tables.values())


@pytest.mark.zoo
def test_memory_is_flat_over_20_000_links(convert, links, actors, tmp_path):
    """From the 4,000th image on neither the actor nor what started it grows by more than 60 MB."""
    model, out = convert("demo", "--batch_size", "dynamic")[0], tmp_path / "out"
    process = start(None, model, links(20_000), out, "--batch_size", "8", "--cpus", "2")
    wait_for_files(out, 16, process)
    (actor,) = actors()
    before, most = (memory(actor), memory(process.pid)), (0, 0)
    while process.poll() is None and actors() == [actor]:
        with contextlib.suppress(OSError):
            most = tuple(map(max, most, (memory(actor), memory(process.pid))))
        time.sleep(0.5)
    finish(process)
    assert len(rows_of(out)) == 20_000
    print([(later - first) / 1e6 for first, later in zip(before, most, strict=True)])
    assert all(later - first < 60e6 for first, later in zip(before, most, strict=True))
