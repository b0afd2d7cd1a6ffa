"""What README.md and docs tell people to paste: every command has options that exist, every piece of Python runs."""

import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import DEMO, ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "docker" / "Dockerfile",
]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS[PAGES[0]]
SCRIPTS = "create_onnx|build_engine|infer|eval_coco|compare_tf|export_triton|infer_ray"
COMMANDS = [
    (path.name, line)
    for path, text in TEXTS.items()
    for line in re.findall(rf"(?:^|python |`)((?:{SCRIPTS})\.py --[^`\n#]+)", text.replace("\\\n", " "), re.MULTILINE)
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_have_options_that_exist(page, line):
    """Whole commands are parsed; of those in a sentence (`infer.py --benchmark`) each option must be known."""
    script, *words = shlex.split(line.replace("...", ""))
    module = __import__(script.removesuffix(".py"))
    known = module.__doc__ + "".join(re.findall(r'"(-[\w-]+)"', (ROOT / script).read_text() + options_of_all()))
    for word in words:
        if word.startswith("--"):
            assert word in known, f"{page}: {line}"
    if {"--engine", "--onnx"} & set(words) and "--input" in words:
        module.parse_args(words)


def options_of_all():
    return (ROOT / "commandline" / "options.py").read_text()


def test_there_are_commands_of_each_script():
    assert {line.split(".")[0] for _, line in COMMANDS} == set(SCRIPTS.split("|"))
    assert len(PYTHON) == 2


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_runs_as_it_stands(number, convert, tmp_path, monkeypatch, capsys):
    """With the demo's model under either name, a picture as photo.jpg, and a clip in the camera's place."""
    model = convert("demo", "--batch_size", "dynamic")[0]
    for name in ("model.onnx", "engine.trt"):
        shutil.copy(model, tmp_path / name)
    shutil.copy(DEMO / "images" / "shapes_02.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = PYTHON[number]
    if "camera:0" in code:
        pytest.importorskip("av")
        from images.decoding import load_image
        from runtimes.video import VideoWriter

        with VideoWriter("clip.mp4", 25) as writer:
            for i in range(5):
                writer.add(np.roll(load_image("photo.jpg"), 9 * i, axis=1))
        code = code.replace("camera:0", "clip.mp4")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 3
    if "camera" not in PYTHON[number]:
        assert printed[0].split()[0] in ("circle", "square", "triangle", "star", "ring")


def test_links_lead_somewhere():
    for path, text in TEXTS.items():
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
