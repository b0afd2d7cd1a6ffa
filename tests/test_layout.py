"""Imports run one way: from the commands down to what they share, without circles."""

import ast

import pytest
from conftest import ROOT

# From the top; a module imports of its own layer and of those below it. Folders are one layer each.
LAYERS = (
    ("benchmarks",),
    ("create_onnx", "build_engine", "infer", "eval_coco", "compare_tf", "export_triton", "infer_ray"),
    ("deploy",),
    ("checks",),
    ("runtimes",),
    ("tfod",),
    ("onnx_utils", "image_batcher", "visualize", "results"),
    ("images", "fonts"),
    ("commandline",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
COMMANDS = LAYERS[1]
FILES = [path for name in LEVEL for path in (*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py"))]


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports(path):
    """The names of the project's modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    # `from runtimes import standard_graph` is about runtimes.standard_graph, `from runtimes import open_detector` about runtimes.
    return {
        name for name in found if name in MODULES and not any(x.startswith(f"{name}.") and x in MODULES for x in found)
    }


def test_every_module_is_in_a_layer():
    modules = {path for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"))}
    others = {ROOT / "tests", ROOT / "demo", ROOT / "build"}
    assert {path for path in modules if path.parent not in others} == set(FILES)
    assert len(FILES) > 20


def test_every_module_is_in_the_description_of_the_layout():
    described = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [path for path in FILES if path.name != "__init__.py" and f"`{path.name}`" not in described] == []


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    mine = LEVEL[name.split(".")[0]]
    for other in imports(MODULES[name]):
        theirs = LEVEL[other.split(".")[0]]
        assert theirs >= mine, f"{name} imports {other}, which is above it"
        if mine == theirs and name in COMMANDS:
            raise AssertionError(f"the command {name} imports the command {other}")
        assert mine == 0 or other not in COMMANDS, f"{name} imports the command {other}"


def test_there_are_no_circles():
    """Imports inside functions count too."""
    left = {name: imports(path) - {name} for name, path in MODULES.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"modules that import each other: {sorted(left)}"
