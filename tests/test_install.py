"""Convert here, run there: what the requirement files promise, on this machine with imports blocked, and other platforms."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT

import infer
from runtimes import cuda_driver, workers

# Put on PYTHONPATH, it keeps packages from being imported, as if they were not installed.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""
ONLY_FOR_CONVERSION = ["tensorflow", "tf2onnx", "keras"]


def run_without(packages, folder, *arguments):
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCK.format(names=set(packages)))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_models_run_without_tensorflow(convert, tmp_path):
    """requirements-runtime.txt: the three scripts of a machine that runs models."""
    model = convert("demo", "--batch_size", "dynamic")[0]
    common = ["--engine", model, "--input", DEMO / "images"]
    block = tmp_path / "block"
    status, _, errors = run_without(ONLY_FOR_CONVERSION, block, "infer.py", *common, "--output", tmp_path / "out")
    assert (status, errors) == (0, "")
    assert len(list((tmp_path / "out").glob("*.tsv"))) == 8
    annotations = ["--annotations", DEMO / "instances_shapes.json", "--output", tmp_path / "evaluation"]
    status, printed, errors = run_without(ONLY_FOR_CONVERSION, block, "eval_coco.py", *common, *annotations)
    assert (status, errors) == (0, "")
    assert "AP, IoU 0.50:0.95" in printed
    engine = ["--onnx", model, "--engine", tmp_path / "engine.trt"]
    status, printed, errors = run_without(ONLY_FOR_CONVERSION, block, "build_engine.py", *engine)
    assert (status, len(errors.splitlines())) == (2, 1)  # for want of TensorRT or a GPU, not of TensorFlow
    assert "ensor" in errors
    assert "TensorFlow" not in errors
    options = ["--saved_model", DEMO / "ssd_mobilenet_v1_shapes", "--onnx", tmp_path / "m.onnx"]
    status, printed, errors = run_without(ONLY_FOR_CONVERSION, block, "create_onnx.py", *options)
    assert (status, len(errors.splitlines())) == (2, 1)
    assert "the package tensorflow is missing" in errors


@pytest.mark.parametrize(
    ("package", "script"),
    [
        ("numpy", "infer.py"),
        ("onnx", "create_onnx.py"),
        ("PIL", "compare_tf.py"),
        ("tqdm", "infer.py"),
        ("onnx_graphsurgeon", "build_engine.py"),
        ("pycocotools", "eval_coco.py"),
        ("onnxruntime", "infer.py"),
        ("tritonclient", "benchmarks/bench_triton.py"),
    ],
)
def test_a_missing_package_is_one_line(package, script, convert, tmp_path):
    options = {
        "infer.py": ["--engine", convert("demo")[0], "--input", DEMO / "images", "--output", tmp_path / "out"],
        "eval_coco.py": ["--engine", "x", "--input", "y", "--annotations", "z"],
        "compare_tf.py": ["--engine", "x", "--saved_model", "m", "--input", "y", "--output", "z"],
        "create_onnx.py": ["--saved_model", DEMO / "ssd_mobilenet_v1_shapes", "--onnx", tmp_path / "m.onnx"],
        "build_engine.py": ["--onnx", convert("demo")[0], "--engine", tmp_path / "engine.trt"],
        "benchmarks/bench_triton.py": ["--input", DEMO / "images"],
    }
    status, _, errors = run_without([package], tmp_path / "block", script, *options[script])
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert errors.startswith(f"{Path(script).name}: ")
    assert package in errors or (package, "ONNX Runtime" in errors) == ("onnxruntime", True)
    assert "install" in errors or "activate" in errors


def test_without_matplotlib_the_report_has_no_plots(convert, tmp_path):
    options = ["--engine", convert("demo", "--batch_size", "dynamic")[0], "--input", DEMO / "images"]
    options += ["--annotations", DEMO / "instances_shapes.json", "--output", tmp_path / "evaluation"]
    status, _, errors = run_without(["matplotlib"], tmp_path / "block", "eval_coco.py", *options)
    assert (status, len(errors.splitlines())) == (0, 1)
    assert "matplotlib is not installed" in errors
    page = (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert page.count("No plot") == 2
    assert "COCO numbers" in page


def test_windows(monkeypatch, convert, tmp_path):
    """What is only on Linux is not asked for: no memfd, no sysconf, and the driver is nvcuda.dll."""
    for name in ("memfd_create", "sysconf"):
        monkeypatch.delattr(os, name)
    with workers.Workers(10_000, 12, cores=4) as pool:
        assert pool.processes
        assert list(pool.map(abs, ((-i,) for i in range(50)))) == list(range(50))
    model = convert("demo", "--batch_size", "dynamic")[0]
    assert infer.main(["--engine", str(model), "--input", str(DEMO / "images"), "--output", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda name: f"loaded {name}", raising=False)
    assert cuda_driver.cuda_driver.__wrapped__() == "loaded nvcuda.dll"
