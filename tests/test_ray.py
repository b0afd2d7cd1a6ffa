"""infer_ray.py: on this machine, on a cluster of two nodes, on an object store."""

import collections
import os
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
from pycocotools import mask as rle
from test_install import run_without

import infer

ray = pytest.importorskip("ray")
pa_dataset = pytest.importorskip("pyarrow.dataset")
import infer_ray  # noqa: E402

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
LOOPBACK = "127.0.0.1"


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes, one processor each, on loopback."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "node_ip_address": LOOPBACK}
    started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        started.add_node(**node)
        yield started.address
    finally:
        started.shutdown()


def start(address, model, images, output, *options):
    """infer_ray.py as a process."""
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
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, status=0):
    """(standard output, standard error) of a process that ends with that status."""
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == status, printed + errors
    return printed, errors


def rows_of(output):
    """{path: row} of the results, as pandas reads them; no path may be there twice."""
    pandas = pytest.importorskip("pandas")
    rows = pandas.read_parquet(output / "detections").to_dict("records")
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
    assert {Path(path).stem: table_of(row) for path, row in rows.items() if not row["error"]} == tables
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


def workers_of(address):
    """The process ids of the actors on this machine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with __import__("contextlib").suppress(OSError):
            if entry.read_bytes().startswith(b"ray::MapWorker(MapBatches(RayDetector))"):
                found.append(int(entry.parent.name))
    return found
