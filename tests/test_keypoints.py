"""CenterNet's keypoints on tiny exports of the project's own, from TensorFlow's graph to pictures, tables and COCO's numbers."""

import contextlib
import functools
import io
import json
import re

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from conftest import DEMO
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import compare_tf
import create_onnx
import eval_coco
import infer
import onnx_utils
from checks import parity
from checks.conversion import check_conversion
from demo import tiny_centernet as tiny
from demo.tiny_keypoints import Joints
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import open_detector, precision
from runtimes.detector import Detections, detect, detect_image
from tfod.config import read_pipeline_config
from tfod.convert import Options, read_model, write_model
from tfod.labels import COCO_KEYPOINTS, COCO_SKELETON
from tfod.saved_model import SavedModel
from visualize import draw_detections

PICTURES = sorted((DEMO / "images").glob("*.jpg"))
ONE = {"classes": 1, "size": 9.0}
EXPORTS = {
    # As TFOD's code of 2021 exports a model of one class, and of several: there without boxes, if with ids of their own.
    "one_class": tiny.Export(**ONE, joints=Joints()),
    "person": tiny.Export(
        backbone="mobilenet_v2_fpn",
        seed=2,
        joints=Joints(class_id=2, boxes=False, order=(2, 0, 1, 4, 3), threshold=0.3),
    ),
    # The zoo's: other ops, no limit of boxes, points clipped; the two heads of an hourglass.
    "zoo_2020": tiny.Export(
        backbone="hourglass_20",
        seed=3,
        size=9.0,
        joints=Joints(
            class_id=1, year=2020, ranking="score_distance_ratio", ranking_value=1e-6, unmatched=0.15, box_scale=1.5
        ),
    ),
    "by_size": tiny.Export(
        **ONE,
        keep_aspect=False,
        backbone="resnet_v2_50",
        seed=4,
        joints=Joints(ranking="score_scaled_distance_ratio", ranking_value=0.2, shared_offset=True, window=1, count=3),
    ),
}
NAMES = ("top", "left", "right", "bottom", "middle")


@pytest.fixture(scope="module")
def named(converted):
    """A model with names for its keypoints and lines between them."""
    return converted("one_class", keypoints=NAMES, skeleton=((0, 4), (4, 3)), batch_size=None)


def images():
    """Pictures of all shapes; a panorama, most of whose input is padding."""
    yield from (load_image(path) for path in PICTURES[:3])
    yield np.repeat(load_image(PICTURES[1])[:40], 2, axis=1)


@pytest.mark.parametrize("name", EXPORTS)
def test_keypoints_are_tensorflows(name, models, converted):
    joints, saved_model = EXPORTS[name].joints, models(name)[0]
    moved = stayed = without = 0
    with open_detector(converted(name)) as model:
        assert len(model.metadata["keypoints"]) == joints.count
        for image in images():
            theirs = parity.tensorflow_detections(saved_model, image, model.metadata)
            ours = detect_image(model, image)
            report = parity.match_by_rank(theirs, ours)
            assert (report.unmatched, report.keypoints_elsewhere) == (0, 0), image.shape
            assert max(report.box_difference, report.score_difference, report.keypoint_difference) < 1e-5
            assert ours.keypoints.shape == (len(ours.scores), joints.count, 2)
            scores = theirs.keypoint_scores
            assert report.keypoints == (scores > 0).sum()
            stays = np.abs(scores - joints.unmatched) < 1e-6
            stayed, moved, without = (
                stayed + stays.sum(),
                moved + (scores > joints.unmatched + 1e-6).sum(),
                without + ((scores == 0).all(axis=1).sum()),
            )
            if joints.clips:
                assert 0 <= ours.keypoints.min() <= ours.keypoints.max() <= 1
    assert moved > 100
    assert joints.box_scale is None or name == "person" or stayed > 10, "joints that stay where they were regressed"
    assert bool(without) == (joints.class_id is not None)


@pytest.mark.parametrize("name", ["one_class", "person"])
def test_every_batch_size_layout_and_type_gives_the_same(name, converted):
    """Where TensorFlow's own graph of several classes takes but one image."""
    wanted = None
    pictures = [load_image(path) for path in PICTURES[:4]]
    for options in (
        {},
        {"ops": "standard", "batch_size": 4},
        {"batch_size": None, "input_format": "NCHW"},
        {"batch_size": 3, "input_type": "uint8"},
    ):
        with open_detector(converted(name, **options)) as model:
            tensors, places = zip(*(preprocess(x, model.metadata["resizer"]) for x in pictures), strict=True)
            batch, shapes = np.rint(np.stack(tensors)), np.float32([place.true_shape for place in places])
            size = model.input.batch or 4
            found = [d for i in range(0, 4, size) for d in model.infer(batch[i : i + size], shapes[i : i + size])]
        wanted = wanted or found
        for a, b in zip(wanted, found, strict=True):
            report = parity.match_by_rank(a, b)
            assert (report.unmatched, report.compared) == (0, len(a.scores))
            assert report.keypoints > 0
            assert report.keypoints_elsewhere == 0
            assert max(report.box_difference, report.keypoint_difference) < 1e-5


# What TensorRT 8.6's parser knows (onnx-tensorrt, docs/operators.md), of what post-processing is made of.
TENSORRT_OPS = {
    *("Abs", "Add", "And", "ArgMax", "ArgMin", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "Div", "Equal"),
    *(
        "Gather",
        "GatherND",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "Max",
        "MaxPool",
        "Min",
        "Mul",
        "Neg",
        "Or",
        "ReduceMax",
    ),
    *("ReduceMin", "ReduceSum", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Sqrt", "Sub", "Tanh", "TopK"),
    *("Transpose", "Unsqueeze", "Where"),
}


@pytest.mark.parametrize("name", ["person", "zoo_2020", "by_size"])
def test_the_file_is_tensorrts(name, converted):
    """No plugin, ops that it has, GatherND with one batch dimension, no TopK of more than it takes."""
    plain, count = onnx.load(converted(name)), EXPORTS[name].joints.count
    assert {node.op_type for node in plain.graph.node} <= TENSORRT_OPS
    assert not [node for node in plain.graph.node if node.domain]
    for node in gs.import_onnx(plain).nodes:
        assert node.attrs.get("batch_dims", 0) <= 1
        assert node.op != "TopK" or node.inputs[1].values[0] <= onnx_utils.TENSORRT_MAX_TOP_K
    outputs = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in plain.graph.output}
    assert outputs["detection_keypoints"] == [1, 100, count, 2]
    assert outputs["detection_keypoint_scores"] == [1, 100, count]


def test_peaks_and_distances_stay_in_float32(converted):
    model = precision.to_half(onnx.load(converted("one_class")))
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {x.name: x.type.tensor_type.elem_type for x in [*inferred.value_info, *inferred.input]}
    for node in model.graph.node:
        if node.op_type in ("MaxPool", "Less", "TopK", "Sqrt", "ArgMin", "Sigmoid"):
            assert types[node.input[0]] == onnx.TensorProto.FLOAT, node.name
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    wide = [node for node in convolutions if types[node.output[0]] == onnx.TensorProto.FLOAT]
    assert len(wide) == 2, "those of the two heatmaps"


def farthest_candidate(graph):
    (nearest,) = (node for node in graph.nodes if node.op == "ArgMin")
    nearest.op = "ArgMax"


def no_limit_of_distance(graph):
    greater = [node for node in graph.nodes if node.op == "Greater" and node.inputs[0].inputs[0].op == "ReduceMin"]
    greater[0].inputs[1] = gs.Constant("far", np.array(1e9, np.float32))


def middle_of_the_place(graph):
    """Candidates without their offsets."""
    (nearest,) = (node for node in graph.nodes if node.op == "ArgMin")
    node = nearest
    while node.op != "Add" or not any(x.inputs and x.inputs[0].op == "Gather" for x in node.inputs):
        node = next(
            x.inputs[0] for x in reversed(node.inputs) if x.inputs and x.inputs[0].op not in ("GreaterOrEqual",)
        )
    gather = next(x for x in node.inputs if x.inputs[0].op == "Gather")
    node.inputs = [gather, gs.Constant("nothing", np.array(0, np.float32))]


@pytest.mark.parametrize("damage", [None, farthest_candidate, no_limit_of_distance, middle_of_the_place])
def test_the_check_sees_wrong_keypoints(models, damage):
    saved_model, model = models("one_class")
    written = write_model(model, Options())
    if damage:
        graph = gs.import_onnx(written)
        damage(graph)
        properties, written = written.metadata_props, gs.export_onnx(graph)
        written.metadata_props.extend(properties)
    verdict = check_conversion(saved_model, "m.onnx", written, None)
    assert verdict.word == ("FAILED" if damage else "PASSED"), str(verdict)
    assert re.search(r"keypoint difference [\d.e-]+ .*, \d+ of [5-9]\d\d keypoints elsewhere", str(verdict))


LABEL_MAP = 'item { id: 1 name: "shape" display_name: "a shape" %s }'


def test_names_and_lines_of_the_label_map_and_the_config(centernets, tmp_path, capsys):
    """By the whole command; what they are in the file, and in Python."""
    points = " ".join(f'keypoints {{ id: {i} label: "{name}" }}' for i, name in reversed(list(enumerate(NAMES))))
    (tmp_path / "map.pbtxt").write_text(LABEL_MAP % points)
    text = (centernets("one_class") / "pipeline.config").read_text()
    edges = "eval_config { keypoint_edge { start: 0 end: 4 } keypoint_edge { start: 4\n end: 3 } }"
    (tmp_path / "pipeline.config").write_text(text + edges)
    path = tmp_path / "m.onnx"
    options = [
        "--saved_model",
        centernets("one_class"),
        "--pipeline_config",
        tmp_path / "pipeline.config",
        "--onnx",
        path,
    ]
    assert create_onnx.main([*map(str, options), "--labels", str(tmp_path / "map.pbtxt")]) == 0
    assert "PASSED" in capsys.readouterr().out
    with open_detector(path) as model:
        assert model.metadata["keypoints"] == list(NAMES)
        assert model.metadata["skeleton"] == [[0, 4], [4, 3]]
        image = load_image(PICTURES[0])
        found, plain = detect(model, image, 0), detect_image(model, image)
        assert found[0].keypoints.shape == (5, 3)
        wanted = plain.keypoints[0] * image.shape[:2]
        np.testing.assert_allclose(found[0].keypoints, np.column_stack([wanted, plain.keypoint_scores[0]]), rtol=1e-4)


def test_names_that_do_not_fit(models, tmp_path, capsys):
    model = models("one_class")[1]
    (tmp_path / "map.pbtxt").write_text(LABEL_MAP % 'keypoints { id: 0 label: "top" }')
    options = create_onnx.with_keypoints(Options(skeleton=((0, 7),)), model, tmp_path / "map.pbtxt")
    assert (options.keypoints, options.skeleton) == (None, ())
    said = capsys.readouterr().err
    assert "map.pbtxt: 1 keypoints, the model has 5" in said
    assert "joins a keypoint that there is not: the model has 5" in said


def test_cocos_keypoints_are_known_by_the_config(tmp_path):
    text = tiny.pipeline_config(EXPORTS["one_class"])
    stds = "".join(f'keypoint_label_to_std {{ key: "{name}" value: 0.5 }}' for name in sorted(COCO_KEYPOINTS))
    (tmp_path / "pipeline.config").write_text(text.replace('task_name: "shape"', stds))
    tasks = read_pipeline_config(tmp_path / "pipeline.config").center_net.keypoint_estimation_task
    assert create_onnx.keypoint_names(None, tasks, 17) == (COCO_KEYPOINTS, COCO_SKELETON)


@pytest.mark.parametrize(
    ("joints", "said"),
    [
        (Joints(class_id=1, tasks=2), "the model has 2 keypoint tasks"),
        (Joints(ranking="gaussian_weighted"), "candidate_ranking_mode is none of min_distance"),
    ],
)
def test_what_is_not_known_is_left_out(joints, said, tmp_path, capsys):
    classes = 1 if joints.class_id is None else 4
    tiny.save_export(tmp_path, tiny.Export(classes=classes, side=64, joints=joints))
    with SavedModel(tmp_path / "saved_model") as saved_model:
        model = read_model(saved_model, read_pipeline_config(tmp_path / "pipeline.config"))
        written = write_model(model, Options())
        assert said in capsys.readouterr().err
        assert not [x.name for x in written.graph.output if "keypoint" in x.name]
        assert check_conversion(saved_model, "m.onnx", written, None).word == "PASSED"


def test_infer_writes_and_draws_them(named, tmp_path, capsys):
    options = ["--engine", named, "--input", *PICTURES[:2], "--nms_threshold", 0.05, "--format", "png"]
    run = functools.partial(run_infer, options)
    assert run(tmp_path / "with", "--json", tmp_path / "found.json") == 0
    assert run(tmp_path / "boxes", "--detection_type", "bbox") == 0
    rows, plain = (
        [row.split("\t") for row in (tmp_path / folder / f"{PICTURES[0].stem}.tsv").read_text().splitlines()]
        for folder in ("with", "boxes")
    )
    image = load_image(PICTURES[0])
    with open_detector(named) as model:
        found = detect_image(model, image).above(0.05)
    assert len(rows) == len(found.scores) > 3
    assert [row[:6] for row in rows] == plain
    values = np.float64([row[6:] for row in rows]).reshape(-1, 5, 3)
    np.testing.assert_allclose(values[..., :2], found.keypoints[..., ::-1] * image.shape[1::-1], atol=0.01)
    np.testing.assert_allclose(values[..., 2], found.keypoint_scores, atol=1e-6)
    entries = json.loads((tmp_path / "found.json").read_text())
    mine = [entry for entry in entries if entry["file_name"] == str(PICTURES[0])]
    points = np.float64([entry["keypoints"] for entry in mine]).reshape(-1, 5, 3)
    np.testing.assert_allclose(points[..., :2], values[..., :2], atol=0.01)
    assert (points[..., 2] == 1).all()
    pictures = [load_image(tmp_path / folder / f"{PICTURES[0].stem}.png") for folder in ("with", "boxes")]
    assert (pictures[0] != pictures[1]).any(axis=2).sum() > 20


def run_infer(options, output, *more):
    return infer.main([*map(str, options), "--output", str(output), *map(str, more)])


def test_classes_without_keypoints_have_empty_columns(converted, tmp_path):
    options = ["--engine", converted("person"), "--input", PICTURES[0], "--nms_threshold", 0.05]
    assert run_infer(options, tmp_path) == 0
    rows = [row.split("\t") for row in (tmp_path / f"{PICTURES[0].stem}.tsv").read_text().splitlines()]
    others = [row for row in rows if row[5] != "2"]
    assert {len(row) for row in rows} == {6 + 15}
    assert 0 < len(others) < len(rows)
    assert {"".join(row[6:]) for row in others} == {""}
    assert all("" not in row for row in rows if row[5] == "2")


def test_points_and_lines_lie_where_they_should():
    """On black: a dot at each point that is shown, a line between two that are, nothing for the hidden."""
    points = np.float32([[[20, 30], [80, 30], [20, 90], [60, 90]]])
    points[0, 3] = np.nan
    image = np.zeros((100, 120, 3), np.uint8)
    box, score = np.float32([[2, 2, 98, 118]]), np.float32([0.9])
    common = image, box, score, [0], [None]
    plain = np.asarray(draw_detections(*common, with_scores=False))
    drawn = np.asarray(draw_detections(*common, with_scores=False, points=points, skeleton=[[0, 1], [2, 3]]))
    changed = (plain != drawn).any(axis=2)
    for y, x in points[0, :3].astype(int):
        assert changed[y, x]
    assert changed[50, 30], "the line from the first to the second"
    assert not changed[40, 80:100].any(), "one of whose ends is hidden"
    assert not changed[55:65, 85:95].any()


def moved_annotations(named, path, count=5):
    """Writes annotations of keypoints that lie beside those detected, and some that were not; returns (COCO's dataset)."""
    rng = np.random.default_rng(4)
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "class 0"}]}
    with open_detector(named) as model:
        for number, file in enumerate(PICTURES[:4], 1):
            image = load_image(file)
            height, width = image.shape[:2]
            content["images"].append({"id": number, "file_name": file.name, "height": height, "width": width})
            found = detect_image(model, image).where(slice(0, 12, 2))
            for box, points in zip(found.boxes, found.keypoints, strict=True):
                y, x, bottom, right = (
                    box * [height, width] * 1 if False else box * np.tile([height, width], 2)
                ).tolist()
                size = max(bottom - y, 4.0), max(right - x, 4.0)
                near = points * [height, width] + rng.normal(size=(count, 2)) * 0.06 * np.sqrt(size[0] * size[1])
                seen = rng.integers(0, 3, count)
                keypoints = np.column_stack([near[:, ::-1], seen]) * (seen > 0)[:, None]
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": number,
                        "category_id": 1,
                        "bbox": [x, y, size[1], size[0]],
                        "area": size[0] * size[1],
                        "iscrowd": 0,
                        "keypoints": keypoints.ravel().tolist(),
                        "num_keypoints": int((seen > 0).sum()),
                    }
                )
    del content["annotations"][3]["keypoints"]  # neither to be found nor a false alarm
    path.write_text(json.dumps(content))
    content["annotations"][3] |= {"keypoints": [0] * 3 * count, "num_keypoints": 0}
    return content


def directly(content, results, sigmas):
    """The ten numbers of pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"info": {}, **content}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.float64(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("given", [None, [0.02, 0.05, 0.1, 0.05, 0.08]])
def test_the_numbers_are_pycocotools(given, named, tmp_path, capsys):
    content = moved_annotations(named, tmp_path / "truth.json")
    options = ["--engine", named, "--input", *PICTURES[:4], "--annotations", tmp_path / "truth.json"]
    options += ["--output", tmp_path / "out", "--detection_type", "keypoints", "--pictures", 2]
    options += ["--oks_sigmas", *given] if given else []
    assert eval_coco.main(list(map(str, options))) == 0
    printed = capsys.readouterr()
    assert "1 of 24 objects do not count: 1 without keypoints" in printed.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    alone = [{key: entry[key] for key in ("image_id", "category_id", "keypoints", "score")} for entry in results]
    wanted = directly(content, alone, given or [0.05] * 5)
    keys = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR", "AR50", "AR75", "AR_medium", "AR_large")
    np.testing.assert_allclose([metrics[key] for key in keys], wanted, atol=1e-9)
    assert 0.02 < metrics["AP"] < 0.98
    assert metrics["AP75"] < metrics["AP50"]
    assert re.search(r"AP, OKS 0.50 +0\.\d+", printed.out)
    assert "keypoints" in (tmp_path / "out" / "report.html").read_text()


def test_annotations_without_keypoints_and_other_mistakes(named, converted, tmp_path):
    options = ["--engine", named, "--input", *PICTURES[:4], "--annotations", DEMO / "instances_shapes.json"]
    run = [*map(str, options), "--detection_type", "keypoints"]
    with pytest.raises(UserError, match=r"no object has labelled keypoints \(\d+ without keypoints\)"):
        eval_coco.main(run)
    content = moved_annotations(named, tmp_path / "truth.json")
    for note in content["annotations"]:
        note["keypoints"] = [1, 2, 2] * 17
    (tmp_path / "other.json").write_text(json.dumps(content))
    run[run.index(str(DEMO / "instances_shapes.json"))] = str(tmp_path / "other.json")
    with pytest.raises(UserError, match="24 with 17 keypoints, the model has 5"):
        eval_coco.main(run)
    with pytest.raises(UserError, match="--oks_sigmas: 2 numbers for 5 keypoints"):
        eval_coco.main([*run, "--oks_sigmas", "0.1", "0.2"])


def test_models_without_keypoints_are_refused(named, tmp_path):
    """Which is said in the same words wherever they are asked for."""
    model, engine = onnx.load(named), str(tmp_path / "m.onnx")
    metadata = onnx_utils.read_metadata(model, named) | {"keypoints": None, "skeleton": None}
    onnx_utils.write_metadata(model, metadata)
    onnx_utils.save(model, engine)
    for script, more in (
        (infer, ["--output", str(tmp_path)]),
        (eval_coco, ["--annotations", str(DEMO / "instances_shapes.json")]),
    ):
        with pytest.raises(UserError, match=r"--detection_type keypoints: .* gives no keypoints; use bbox"):
            script.main(["--engine", engine, "--input", str(DEMO / "images"), "--detection_type", "keypoints", *more])


def test_compare_counts_keypoints(named, centernets, tmp_path):
    content = moved_annotations(named, tmp_path / "truth.json")
    sides = ["--engine", named, "--saved_model", centernets("one_class"), "--input", *PICTURES[:3]]
    options = [*sides, "--output", tmp_path / "out", "--nms_threshold", 0.1, "--annotations", tmp_path / "truth.json"]
    assert compare_tf.main([*map(str, options), "--detection_type", "keypoints"]) == 0
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert numbers["keypoints"] == 5 * numbers["matched"] > 50
    assert numbers["share_keypoints_elsewhere"] == 0
    assert numbers["largest_keypoint_distance"] < 1e-4
    assert numbers["average_precision"]["engine"]["AP"] == pytest.approx(
        numbers["average_precision"]["TensorFlow"]["AP"]
    )
    assert content["images"]


def test_compare_fails_where_keypoints_are_elsewhere():
    """By more of them than the tolerance."""
    boxes, scores, classes = np.float32([[0.1, 0.1, 0.5, 0.5]] * 2), np.float32([0.9, 0.8]), np.int32([0, 0])
    points = np.full((2, 4, 2), 0.3, np.float32)
    theirs = Detections(boxes, scores, classes, keypoints=points, keypoint_scores=np.ones((2, 4), np.float32))
    for far, verdict in ((0.001, "PASSED"), (0.2, "FAILED")):
        moved = points.copy()
        moved[0, 1, 0] += far
        ours = Detections(boxes, scores, classes, keypoints=moved, keypoint_scores=theirs.keypoint_scores)
        numbers = compare_tf.summarise([compare_tf.compare_detections("x.jpg", theirs, ours, (9, 9), 0.3)], 0.3, 0.02)
        assert numbers["verdict"] == verdict
        assert numbers["share_keypoints_elsewhere"] == (0.125 if verdict == "FAILED" else 0)


@pytest.mark.parametrize(
    "change", [{"skeleton": [[0, 5]]}, {"keypoints": [1, 2]}, {"keypoints": None, "skeleton": [[0, 1]]}]
)
def test_damaged_metadata(change, named, tmp_path):
    model = onnx.load(named)
    metadata = onnx_utils.read_metadata(model, named)
    onnx_utils.write_metadata(model, metadata | change)
    with pytest.raises(UserError, match="its metadata"):
        onnx_utils.read_metadata(model, tmp_path / "m.onnx")
