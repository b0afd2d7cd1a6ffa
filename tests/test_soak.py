"""benchmarks/soak.py: what it says of memory that grows, of results that change, and of a real run."""

import re
import subprocess
import sys

from commandline import UserError

import pytest
from conftest import DEMO, ROOT

from benchmarks import soak

SAMPLES = 400


@pytest.mark.parametrize(
    ("memory", "fine"),
    [
        (lambda i: 500 + i % 7, True),
        (lambda i: 300 + min(i, 90), True),  # grows in the first quarter, as what is only loaded then
        (lambda i: 500 - i / 10, True),
        (lambda i: 500 + i / 4, False),
        (lambda i: 500 + i % 7 + i / 10, False),
    ],
)
def test_what_grows_is_told_of(memory, fine, capsys):
    assert soak.flat([{"memory MB": memory(i), "open files": 9} for i in range(SAMPLES)]) == fine
    memory_line, files_line = capsys.readouterr().out.splitlines()
    assert memory_line.endswith("flat" if fine else "GREW")
    assert files_line.endswith("flat")


def test_too_few_looks_are_no_verdict():
    with pytest.raises(UserError, match="looked 8 times only"):
        soak.flat([{"open files": 9}] * 8)


def test_the_last_whole_pass_is_compared(tmp_path, capsys):
    for number, contents in enumerate(["ab", "ab", "xb", "a"]):  # the last one was not finished
        (tmp_path / f"{number:06}").mkdir()
        for name, content in zip(["1.tsv", "2.tsv"], contents, strict=False):
            (tmp_path / f"{number:06}" / name).write_text(content)
    assert not soak.compare_passes(tmp_path, [1, 2])
    assert "passes 000000 and 000002 (2 images, 2 files): 1 the same, 1 others, 0 missing" in capsys.readouterr().out
    (tmp_path / "000002" / "1.tsv").write_text("a")
    assert soak.compare_passes(tmp_path, [1, 2])


def test_a_real_run(convert, tmp_path):
    """Stopped after some seconds."""
    model = convert("demo", "--batch_size", "dynamic")[0]
    argv = ["--engine", model, "--input", DEMO / "images", "--output", tmp_path / "soak", "--images", "20000"]
    argv += ["--every", "0.1", "--seconds", "8", "--", "--batch_size", "2"]
    script = ROOT / "benchmarks" / "soak.py"
    ran = subprocess.run([sys.executable, script, *map(str, argv)], capture_output=True, text=True, timeout=100)
    assert ran.returncode in (0, 1), ran.stderr  # so short a run may not be flat yet
    assert "(8 images, 16 files): 16 the same, 0 others, 0 missing" in ran.stdout
    assert {"memory MB", "open files"} <= set(re.findall(r"^([\w ]+): .* by quarters", ran.stdout, re.M))
