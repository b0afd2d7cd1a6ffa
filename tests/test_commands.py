"""What all commands do alike: --help, --version, mistakes in one line, commands to paste."""

import ast
import subprocess
import sys
from pathlib import Path

import commandline
from commandline.version import VERSION

import pytest
from conftest import DEMO, ROOT

SCRIPTS = ("create_onnx", "build_engine", "infer", "eval_coco", "compare_tf", "export_triton", "infer_ray")
NEEDED = {
    "create_onnx": ["--saved_model", "x", "--onnx", "y"],
    "build_engine": ["--onnx", "x", "--engine", "y"],
    "infer": ["--engine", "x", "--input", "y"],
    "eval_coco": ["--engine", "x", "--input", "y", "--annotations", "z"],
    "compare_tf": ["--engine", "x", "--saved_model", "m", "--input", "y", "--output", "z"],
    "export_triton": ["--engine", "x", "--repository", "y"],
    "infer_ray": ["--engine", "x", "--input", "y", "--output", "z"],
}
SCORES = ("2", "-1", "nan", "inf", "many", "")
COUNTS = ("0", "-5", "1.5", "many")
VALUES = {
    "create_onnx": {"--first_nms_threshold": SCORES, "-t2": SCORES, "--batch_size": COUNTS, "--input_type": ("int8",)},
    "build_engine": {"--workspace": ("0", "-1", "nan", "inf"), "--calib_num_images": COUNTS, "--precision": ("fp8",)},
    "infer": {"--nms_threshold": SCORES, "--iou_threshold": SCORES, "--batch_size": COUNTS, "--preprocessor": ("any",)},
    "eval_coco": {"-t": SCORES, "--pictures": ("-5", "x"), "--batch_size": COUNTS, "--detection_type": ("masks",)},
    "export_triton": {
        "--nms_threshold": SCORES,
        "--max_batch": COUNTS,
        "--instances": COUNTS,
        "--name": ("a/b", "..", ""),
    },
    "infer_ray": {"--nms_threshold": SCORES, "--gpus": COUNTS, "--cpus": COUNTS, "--task_images": COUNTS},
    "compare_tf": {"--tolerance": SCORES, "--num_images": COUNTS, "--pictures": ("-5",), "--nms_threshold": SCORES},
}


def run(script, *arguments):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_values_are_refused_in_one_line(script, monkeypatch, capsys):
    module = __import__(script)
    for option, values in VALUES[script].items():
        for value in values:
            with pytest.raises(SystemExit) as raised:
                module.parse_args([*NEEDED[script], f"{option}={value}"])
            said = capsys.readouterr().err
            assert raised.value.code == 2, (option, value)
            assert len(said.splitlines()) == 1, said
            assert option in said, said


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_reads_of_args_is_an_option(script):
    """Also on paths that need a GPU: build_engine.py once read args.gpus and had no --gpus."""
    module = __import__(script)
    nodes = list(ast.walk(ast.parse(Path(module.__file__).read_text())))
    of_args = [
        node
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    ]
    made = {node.attr for node in of_args if isinstance(node.ctx, ast.Store)}
    read = {node.attr for node in of_args if isinstance(node.ctx, ast.Load)}
    assert len(read) >= 5
    assert read <= made | set(vars(module.parse_args(NEEDED[script])))


@pytest.mark.parametrize(
    "script", [*SCRIPTS, "benchmarks/bench_cpu", "benchmarks/bench_gpu", "benchmarks/bench_triton"]
)
def test_version_and_help(script):
    assert run(f"{script}.py", "--version")[:2] == (0, f"{Path(script).name}.py {VERSION}\n")
    status, text, _ = run(f"{script}.py", "--help")
    assert status == 0
    assert text.count(f"python {script}.py") >= 2
    assert str(ROOT) not in text


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("create_onnx", ["-m", "x", "-o", "y", "-t1", "0.3", "-t2", "0.4", "-d", "a", "-d", "b"]),
        ("infer", ["-e", "x", "-i", "y", "-o", "z", "-d", "segmentation", "-t", "0.3", "-p", "fixed_shape_resizer"]),
        ("eval_coco", ["-e", "x", "-i", "y", "-a", "z", "-d", "segmentation", "-t", "0.3"]),
        ("compare_tf", ["-e", "x", "-m", "m", "-i", "y", "-o", "z", "-d", "bbox", "-p", "keep_aspect_ratio_resizer"]),
    ],
)
def test_old_command_lines(script, options):
    parsed = vars(__import__(script).parse_args(options))
    assert parsed.get("detection_type", "segmentation") in ("bbox", "segmentation")
    if script == "create_onnx":
        assert (parsed["first_nms_threshold"], parsed["second_nms_threshold"], parsed["debug"]) == (
            0.3,
            0.4,
            ["a", "b"],
        )


def test_a_resizer_that_is_not_the_models(convert, tmp_path):
    model = convert("demo")[0]
    options = "--engine", model, "--input", DEMO / "images", "--output", tmp_path / "out"
    status, _, said = run("infer.py", *options, "-p", "keep_aspect_ratio_resizer")
    assert status == 2
    assert "the model's is fixed_shape_resizer" in said
    assert not (tmp_path / "out").exists()


def test_commands_can_be_pasted(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "create_onnx.py")])
    monkeypatch.chdir(ROOT)
    pasted = commandline.command("infer.py", "--engine", "my model's.onnx", "--version")
    assert pasted.endswith("""infer.py --engine 'my model'"'"'s.onnx' --version""")
    assert subprocess.run(pasted, shell=True, capture_output=True, text=True).stdout == f"infer.py {VERSION}\n"
    monkeypatch.chdir(tmp_path)
    pasted = commandline.command("infer.py", "--version")
    assert subprocess.run(pasted, shell=True, capture_output=True, text=True).stdout == f"infer.py {VERSION}\n"
