"""infer_ray.py: on this machine, on a cluster of two nodes, on an object store."""

import collections
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from commandline import UserError

import numpy as np
import pytest
from conftest import DEMO, ROOT, need_shared
from test_install import run_without

import infer

# Ray listens on loopback alone then, and takes that for the address of this machine; read when it is imported.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
import infer_ray  # noqa: E402

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes, one processor each, on loopback."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        started.add_node(**node)
        yield started.address
    finally:
        started.shutdown()


def start(address, model, images, output, *options, cwd=None):
    """infer_ray.py as a process, in the folder `cwd`."""
    command = [
        sys.executable,
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
    printed, errors = process.communicate(timeout=240)
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
    return "".join(infer.result_rows(boxes, row["scores"], row["classes"]))


def check_against_infer(rows, model, images, folder, *options):
    """Each image's row is infer.py's table, to the digit."""
    infer.main(["--engine", str(model), "--input", str(images), "--output", str(folder), *options])
    tables = {path.stem: path.read_text() for path in folder.glob("*.tsv")}
    assert {Path(path).stem: table_of(row) for path, row in rows.items() if row["error"] is None} == tables
    assert any(tables.values())


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


def actors():
    """The process ids of the actors on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if entry.read_bytes().startswith(b"ray::MapWorker(MapBatches(RayDetector))"):
                found.append(int(entry.parent.name))
    return found


def wait_for_files(folder, count, process):
    """Waits until so many files of results are there."""
    end = time.monotonic() + 120
    while len(list(folder.glob("detections/*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_two_nodes_find_what_infer_finds(cluster, convert, tmp_path):
    """The 188 images of COCO, three at a time; the code and the model travel to the nodes."""
    model, images = convert("demo", "--batch_size", "dynamic")[0], need_shared("coco", "val2017")
    options = ["--batch_size", "3", "--task_images", "32", "--nms_threshold", "0.05"]
    printed, _ = finish(start(cluster, model, images, tmp_path / "out", *options))
    assert "on Ray, 2 actors, 1 processors each" in printed
    rows = rows_of(tmp_path / "out")
    assert rows.keys() == {str(path) for path in images.glob("*.jpg")}
    check_against_infer(rows, model, images, tmp_path / "tables", "--nms_threshold", "0.05")


def test_a_killed_actor_loses_nothing_and_resume_does_what_is_missing(cluster, convert, links, tmp_path):
    model, folder, out = convert("demo", "--batch_size", "dynamic")[0], links(1500), tmp_path / "out"
    (folder / "broken.jpg").write_bytes(b"no image")
    process = start(cluster, model, folder, out, "--task_images", "25")
    wait_for_files(out, 4, process)
    killed = actors()
    assert len(killed) == 2
    os.kill(killed[0], signal.SIGKILL)
    printed, _ = finish(process, 1)
    assert "1 of 1501 images were skipped" in printed
    rows = rows_of(out)
    assert rows.keys() == {str(path) for path in folder.iterdir()}
    wanted = {table_of(rows[str(folder / f"{number:05}.jpg")]) for number in range(0, 1500, len(PICTURES))}
    assert len(wanted) == 1
    files = sorted(out.glob("detections/*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in files[2:]}
    missing = {path: parquet.read_table(path, columns=["path"]).to_pylist() for path in files[:2]}
    for path in files[:2]:
        path.unlink()
    with pytest.raises(UserError, match="go on with --resume"):
        infer_ray.main(["--engine", str(model), "--input", str(folder), "--output", str(out)])
    with pytest.raises(UserError, match="made by another model or other options"):
        again = ["--resume", "--nms_threshold", "0.9"]
        infer_ray.main(["--engine", str(model), "--input", str(folder), "--output", str(out), *again])
    lost = {row["path"] for path in files[:2] for row in missing[path]}
    process = start(cluster, model, folder, out, "--task_images", "25", "--resume")
    printed, _ = finish(process, int(str(folder / "broken.jpg") in lost))
    assert f"{1501 - len(lost)} images had their rows before" in printed
    assert rows_of(out).keys() == rows.keys()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert infer_ray.main(["--engine", str(model), "--input", str(folder), "--output", str(out), "--resume"]) == 0


def test_masks_pictures_and_images_that_cannot_be_read(exported, tmp_path):
    """On this machine, which Ray is started on and ended with; what infer.py --json writes, in rows."""
    model, images = exported("mask", "--batch_size", "dynamic")[1], tmp_path / "in"
    images.mkdir()
    for path in PICTURES[:3]:
        shutil.copy(path, images)
    (images / "broken.png").write_bytes(b"no image")
    (images / "empty.jpg").touch()
    options = [
        "--detection_type",
        "segmentation",
        "--pictures",
        "--format",
        "png",
        "--nms_threshold",
        "0.2",
        "--cpus",
        "1",
    ]
    (tmp_path / "here" / "commandline").mkdir(parents=True)  # a package of a like name where the command is given
    (tmp_path / "here" / "commandline" / "__init__.py").touch()
    printed, _ = finish(start(None, model, images, tmp_path / "out", *options, cwd=tmp_path / "here"), 1)
    assert "2 of 5 images were skipped" in printed
    rows = rows_of(tmp_path / "out")
    assert {Path(path).name: row["error"] for path, row in rows.items() if row["error"] is not None} == {
        "broken.png": "it is not an image that Pillow reads (JPEG, PNG, BMP, GIF, WEBP, TIFF)",
        "empty.jpg": "the file is empty",
    }
    common = [
        "--engine",
        str(model),
        "--input",
        str(images),
        "--output",
        str(tmp_path / "infer"),
        "--nms_threshold",
        "0.2",
    ]
    results = tmp_path / "results.json"
    assert infer.main([*common, "--json", str(results), "--format", "png", "--detection_type", "segmentation"]) == 1
    wanted = collections.defaultdict(list)
    for entry in json.loads(results.read_text()):
        wanted[Path(entry["file_name"]).stem].append(entry)
    assert len(wanted) == 3
    for stem, entries in wanted.items():
        row = rows[str(images / f"{stem}.jpg")]
        assert [dict(mask) | {"size": list(mask["size"])} for mask in row["masks"]] == [
            e["segmentation"] for e in entries
        ]
        assert table_of(row) == (tmp_path / "infer" / f"{stem}.tsv").read_text()
        drawn = tmp_path / "out" / "pictures" / f"{stem}.png"
        assert drawn.read_bytes() == (tmp_path / "infer" / f"{stem}.png").read_bytes()
    assert actors() == []


def test_an_object_store(convert, tmp_path, monkeypatch):
    """Images from S3, results to S3: moto's server on loopback speaks its protocol, pyarrow's client knows no other."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "testing")
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="photos")
        for number, path in enumerate(PICTURES):
            client.upload_file(str(path), "photos", f"in/{'ab'[number % 2]}/{path.name}")
        client.put_object(Bucket="photos", Key="in/a/broken.jpg", Body=b"no image")
        client.put_object(Bucket="photos", Key="in/a/notes.txt", Body=b"no image")
        address = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        model = convert("demo", "--batch_size", "dynamic")[0]
        options = [f"s3://photos/in{address}", f"s3://photos/out{address}", "--pictures"]
        printed, _ = finish(start(None, model, *options, "--cpus", "1"), 1)
        assert "s3://photos/out/detections" in printed
        keys = [item["Key"] for item in client.list_objects_v2(Bucket="photos", Prefix="out/")["Contents"]]
        assert {key for key in keys if "/pictures/" in key} == {
            f"out/pictures/{'ab'[number % 2]}/{path.stem}.jpg" for number, path in enumerate(PICTURES)
        }
        (tmp_path / "detections").mkdir()
        for key in keys:
            if key.endswith(".parquet"):
                client.download_file("photos", key, str(tmp_path / "detections" / Path(key).name))
        rows = rows_of(tmp_path)
        assert rows["s3://photos/in/a/broken.jpg"]["error"].startswith("it is not an image")
        assert len(rows) == len(PICTURES) + 1
        check_against_infer(rows, model, DEMO / "images", tmp_path / "tables")
        pattern = f"s3://photos/in/b/*{address}"
        assert sorted(infer_ray.find([pattern], "out").files) == [f"s3://photos/in/b/{p.name}" for p in PICTURES[1::2]]
        assert infer_ray.main(["--engine", str(model), "--input", options[0], "--output", options[1], "--resume"]) == 0
        with pytest.raises(UserError, match=r"s3://photos/none: .*does not exist"):
            infer_ray.find([f"s3://photos/none{address}"], "out")
    finally:
        server.stop()


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


def test_mistakes(convert, tmp_path):
    model, images, out = str(convert("demo")[0]), str(DEMO / "images"), str(tmp_path / "out")
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
    process = start(None, model, images, out, "--batch_size", "9", "--cpus", "1")  # seen where the model is opened
    _, errors = finish(process, 2)
    assert errors.splitlines()[-1].startswith("infer_ray.py: --batch_size 9: the model takes 1 to 1 images")


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
def test_memory_is_flat_over_20_000_links(convert, links, tmp_path):
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
