"""What the scripts ask of TensorRT and make of its answers, without a GPU: names, contexts, messages."""

import ast
import subprocess
import sys
import types

from commandline import UserError

import pytest
import trt_bindings
from conftest import MODELS, ROOT

import build_engine
from benchmarks import kernels
from runtimes import trt_detector

BINDINGS = MODELS.parent / "bindings"
# What the scripts' variables are, of TensorRT's classes.
OBJECTS = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "layer": "ILayer",
    "tensor": "ITensor",
    "_engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "_runtime": "Runtime",
    "context": "IExecutionContext",
}
# Called for TensorRT 8.6 alone, where networks are not strongly typed.
WEAKLY_TYPED = {"allow_precisions"}
COMMAND_LINE = {"parse_args"}  # its parser is argparse's


def names_in(source, skipped=()):
    """The dotted TensorRT names that a script uses: attributes of `trt`, and of the variables in OBJECTS."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) not in skipped]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node).removeprefix("self.").split(".")
            if chain[0] in ("trt", "_trt") and len(chain) > 1:
                found.add(".".join(chain[1:3]))
            elif len(chain) > 1 and chain[-2] in OBJECTS:
                found.add(f"{OBJECTS[chain[-2]]}.{chain[-1]}")
    return found


@pytest.mark.parametrize("version", trt_bindings.PACKAGES)
def test_every_tensorrt_name_exists_in_the_real_bindings(version):
    known = trt_bindings.names(version, BINDINGS)
    skipped = COMMAND_LINE | (set() if version == "8.6.1" else WEAKLY_TYPED)
    used = set()
    for script in ("build_engine.py", "runtimes/trt_detector.py"):
        used |= names_in((ROOT / script).read_text(), skipped)
    if version == "8.6.1":  # what bench_gpu.py --flags compares with is 8.6's alone
        used |= names_in((ROOT / "benchmarks" / "bench_gpu.py").read_text(), COMMAND_LINE)
    assert {"Builder", "IExecutionContext.execute_async_v3", "IBuilderConfig.set_tactic_sources"} <= used
    assert len(used) > 40
    assert not used - known
    assert "Builder.no_such_method" not in known


@pytest.mark.parametrize(
    ("version", "flag"), [("8.6.1", "EXPLICIT_BATCH"), ("10.16", "STRONGLY_TYPED"), ("11.4", "STRONGLY_TYPED")]
)
def test_networks_are_strongly_typed_where_tensorrt_can(version, flag):
    """The script's own functions, on the real bindings; the logger too, which only needs the Python side. Contexts share a profile
    in 8.6 if told so, in 11 by themselves."""
    code = (
        "import types, tensorrt_bindings as trt, build_engine; from runtimes import trt_detector\n"
        f"assert build_engine.network_flags(trt) == 1 << int(trt.NetworkDefinitionCreationFlag.{flag})\n"
        "logger = trt_detector.make_logger(trt)\n"
        "logger.log(trt.ILogger.ERROR, 'first\\nsecond'); logger.log(trt.ILogger.INFO, 'chatter')\n"
        "assert logger.last() == 'first' and len(logger.errors) == 1\n"
        "told = []\n"
        "build_engine.share_profiles(trt, types.SimpleNamespace(set_preview_feature=lambda *told_: told.append(told_)))\n"
        f"known = {version != '11.4'}\n"
        "assert told == ([(trt.PreviewFeature.PROFILE_SHARING_0806, True)] if known else []), told\n"
    )
    folder = trt_bindings.prepare(version, BINDINGS)
    environment = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{folder}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_how_much_of_an_engine_is_int8():
    """On six layers of what TensorRT 8.6 told on the H200 of the demo's engine in INT8: one of them was two layers."""
    types = trt_detector.count_weight_types((ROOT / "tests" / "data" / "engine_layers.json").read_text())
    assert types == {"Float": 1, "Half": 1, "Int8": 3}
    assert build_engine.int8_used(types) == "3 of 5 layers with weights run in INT8"
    assert "0 of 123 layers" in build_engine.int8_used({"Half": 123})
    assert "--precision fp16" in build_engine.int8_used({"Half": 123})
    for silent in ('{"Layers": ["conv1", "conv2"], "Bindings": []}', "", "{}"):
        assert "does not tell" in build_engine.int8_used(trt_detector.count_weight_types(silent))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "1: [stdArchiveReader.cpp::StdArchiveReader::32] Error Code 1: Serialization (Serialization assertion "
            "stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: 226, "
            "Serialized Engine Version: 239)",
            "another TensorRT version",
        ),
        (
            "6: The engine plan file is generated on an incompatible device, expecting compute 9.0 got compute 8.6, "
            "please rebuild.",
            "another GPU",
        ),
        ("1: Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match", "truncated"),
        ("2: [checkRuntime] OutOfMemory (no further information)", "too little GPU memory"),
    ],
)
def test_why_an_engine_does_not_load(message, said):
    text = trt_detector.explain(message, "8.6.0")
    assert said in text
    assert "build" in text


@pytest.mark.parametrize(
    ("each", "sharing", "most", "opened"),
    [
        (10, True, 9, trt_detector.SLOTS),
        (200, True, 9, 1),  # two more would take 40 % of the memory
        (10, False, 9, 1),  # the engine's profile is the first one's
        (10, True, 2, 2),  # TensorRT makes no more
    ],
)
def test_execution_contexts_are_as_many_as_memory_and_engine_allow(each, sharing, most, opened):
    """TensorRT stood in for by what it answers."""
    free, made = 1000, []
    left = [free]

    def create_execution_context():
        if len(made) == most:
            return None
        left[0] -= each
        made.append(types.SimpleNamespace(active_optimization_profile=0 if sharing or not made else -1))
        return made[-1]

    detector = object.__new__(trt_detector.TrtDetector)
    detector._cuda = types.SimpleNamespace(mem_get_info=lambda: (left[0], free), Stream=object)
    detector._engine = types.SimpleNamespace(create_execution_context=create_execution_context)
    contexts = detector._open_contexts()
    assert [context for context, _ in contexts] == made[:opened]
    assert len({id(stream) for _, stream in contexts}) == opened

    detector._path, detector._logger = "model.trt", types.SimpleNamespace(last=lambda: "out of memory")
    detector._engine.create_execution_context = lambda: None
    with pytest.raises(UserError, match="too little GPU memory"):
        detector._open_contexts()


def test_kernels_that_run_side_by_side_are_told_apart(capsys):
    """benchmarks/kernels.py: in every other run one begins before its neighbour."""
    records = []
    for run in range(kernels.RUNS):
        begin = 100_000 * run
        records += [(begin + 2000 + run % 2 * 2, begin + 52_000, (8, 1, 1), (32, 1, 1), "long")]
        records += [(begin + at, begin + at + 1000, (1, 1, 1), (32, 1, 1), "short") for at in (0, 2001)]
    kernels.show("batch 1", sorted(records))
    title, *lines = capsys.readouterr().out.strip().splitlines()
    assert title == "batch 1: 3 kernels, 52.0 us of 52.0 us"
    assert [(line.split()[1], line.split()[-1]) for line in lines] == [
        ("1.00", "short"),
        ("50.00", "long"),
        ("1.00", "short"),
    ]
    for some in (records[:-1], [], [*records[:-1], (*records[-1][:-1], "other")]):
        with pytest.raises(UserError, match="not alike"):
            kernels.show("batch 1", sorted(some))
