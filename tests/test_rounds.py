"""runtimes/nms_by_rounds.py does what EfficientNMS_TRT does, where its sizes suffice; its benchmark."""

import dataclasses

from commandline import UserError

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from conftest import DEMO
from test_engine import command
from test_nms import plugin, random_case

import build_engine
import onnx_utils
from benchmarks import bench_rounds
from images.decoding import load_image
from images.resizing import preprocess
from runtimes import nms_by_rounds, open_detector, precision, trt_graph
from runtimes.detector import detect_image, input_spec, network_inputs

SIZES = nms_by_rounds.Sizes()
SMALL = nms_by_rounds.Sizes(row=64, pairs=160, first=96, left=80, rounds=24)
SETTINGS = {"score_threshold": 0.05, "iou_threshold": 0.5, "max_output_boxes": 40}


def model_of(boxes, scores, **settings):
    """A plugin alone, for boxes [B, N, (C,) 4] and scores [B, N, C]."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    a = gs.Variable("boxes", np.float32, ["B", *boxes.shape[1:]])
    b = gs.Variable("scores", np.float32, ["B", *scores.shape[1:]])
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.inputs, graph.outputs = [a, b], onnx_utils.efficient_nms(ops, a, b, **{**SETTINGS, **settings})
    return gs.export_onnx(graph)


def run(boxes, scores, sizes):
    """(number, boxes, scores, classes)."""
    model = nms_by_rounds.replace(model_of(boxes, scores), sizes)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"boxes": boxes, "scores": scores})


def same_as_plugin(found, boxes, scores, kept=40):
    number, chosen, values, labels = found
    for i in range(len(boxes)):
        wanted = plugin(boxes[i], scores[i], *list(SETTINGS.values())[:2], kept)
        used = number[i, 0]
        assert used == len(wanted) > 0
        np.testing.assert_array_equal(chosen[i, :used], [box for box, _, _ in wanted])
        np.testing.assert_array_equal(values[i, :used], [score for _, score, _ in wanted])
        np.testing.assert_array_equal(labels[i, :used], [label for _, _, label in wanted])
        assert not chosen[i, used:].any()
        assert not values[i, used:].any()
        assert not labels[i, used:].any()


@pytest.mark.parametrize("sizes", [SIZES, SMALL], ids=["default", "small"])
@pytest.mark.parametrize(
    ("batch", "count", "classes", "per_class"), [(3, 120, 7, False), (3, 120, 7, True), (2, 800, 1, False)]
)
def test_same_as_the_plugin(sizes, batch, count, classes, per_class):
    boxes, scores = random_case(np.random.default_rng(count), batch, count, classes, per_class)
    boxes[:, ::2] *= 2  # some overlap little
    same_as_plugin(run(boxes, scores, sizes), boxes, scores)


def test_fewer_than_wanted_are_kept_where_few_reach_the_threshold():
    boxes, scores = random_case(np.random.default_rng(1), 1, 160, 1, False)
    boxes[..., 2:] = boxes[..., :2] + 0.9  # almost all overlap
    boxes[:, 99:] += 10 * np.arange(1, 62, dtype=np.float32)[:, None]  # but for these
    scores[:, 99] = 0.05  # reaches it
    scores[:, 100:] = np.nextafter(np.float32(0.05), np.float32(0))
    found = run(boxes, scores, SMALL)
    assert 0 < found[0][0, 0] < 40
    assert found[2].min(where=found[2] > 0, initial=1) == np.float32(0.05)
    same_as_plugin(found, boxes, scores)


def test_a_box_that_overlaps_just_so_much_is_suppressed():
    place = 2 * np.arange(160, dtype=np.float32)[:, None]
    boxes = np.hstack([place, place, place + 1, place + 1])[None]
    boxes[0, 1] = [0, 0, 1, 0.5]  # half of the first
    boxes[0, 3] = [4, 4, 5, np.nextafter(np.float32(4.5), np.float32(0))]  # less than half of the third
    scores = np.linspace(0.9, 0.1, 160, dtype=np.float32)[None, :, None]
    found = run(boxes, scores, SMALL)
    np.testing.assert_array_equal(found[1][0], boxes[0, [0, *range(2, 41)]])
    same_as_plugin(found, boxes, scores)


def chain(length, step=0.25):
    """Boxes each of which overlaps the next by 0.6, and none else by more than 0.33, best first: every other one is kept.

    [1, length, 4], [1, length, 1]. step: of their sides.
    """
    low = step * np.arange(length, dtype=np.float32)
    boxes = np.stack([low * 0, low, low * 0 + 1, low + 1], axis=1)
    return boxes[None], np.linspace(0.9, 0.1, length, dtype=np.float32)[None, :, None]


def test_a_chain_of_suppressions_takes_as_many_rounds():
    """Rounds of one step leave a box wrong for each that is missing, the last ones of the chain."""
    boxes, scores = chain(160)
    sizes = dataclasses.replace(SMALL, first=80, left=80, sure=79)
    same_as_plugin(run(boxes, scores, sizes), boxes, scores)
    few = run(boxes, scores, dataclasses.replace(sizes, sure=1, rounds=12))
    with pytest.raises(AssertionError):
        same_as_plugin(few, boxes, scores)
    np.testing.assert_array_equal(few[1][0, :6], boxes[0, :12:2])


def test_what_is_beyond_the_pairs_or_left_over_is_lost():
    apart = np.arange(60, dtype=np.float32)
    boxes = np.stack([apart, apart * 0, apart + 1, apart * 0 + 1], axis=1)
    crowd = np.concatenate([np.repeat(boxes[:20], 20, axis=0), boxes[20:]])[None]  # the best 400 are 20 boxes
    scores = np.linspace(0.9, 0.1, 440, dtype=np.float32)[None, :, None]
    found = run(crowd, scores, SMALL)
    same_as_plugin(found, crowd, scores, kept=8)  # of the best 160 pairs
    found = run(crowd, scores, dataclasses.replace(SMALL, pairs=440))
    same_as_plugin(
        found, crowd, scores, kept=9
    )  # the first 96 pairs suppress 91 for sure; of the others 80 are 9 boxes
    same_as_plugin(run(crowd, scores, dataclasses.replace(SMALL, pairs=440, first=440)), crowd, scores)


def test_which_plugins_it_suits():
    def suits(count, classes, sizes=SIZES, **settings):
        boxes, scores = random_case(np.random.default_rng(0), 1, count, classes, False)
        model = model_of(boxes, scores, **settings)
        (node,) = gs.import_onnx(model).nodes
        replaced = not any(
            node.op_type == "EfficientNMS_TRT" for node in nms_by_rounds.replace(model, sizes).graph.node
        )
        assert replaced == nms_by_rounds.suits(node, sizes)
        return replaced

    assert suits(1500, 90, max_output_boxes=128)
    assert suits(1500, 90, max_output_boxes=384)
    assert not suits(1500, 90, max_output_boxes=385)  # more than MOST_LEFT would be left of them
    assert suits(1499, 90)  # a prime number of boxes: one part
    assert suits(512, 1)
    assert not suits(511, 1)  # as many pairs as are left of them


def chosen_boxes(count, chosen, values):
    """(boxes, scores, found by rounds, TopKs) of `chosen` of `count` boxes that a TopK chooses by their best class, as tfod.ssd does."""
    rng = np.random.default_rng(count)
    boxes, scores = random_case(rng, 2, count, 3, False)
    scores *= values / scores.max(axis=2, keepdims=True)
    graph = gs.Graph(opset=onnx_utils.OPSET)
    a, b = (gs.Variable(name, np.float32, ["B", *x.shape[1:]]) for name, x in (("boxes", boxes), ("scores", scores)))
    ops = onnx_utils.OpBuilder(graph, "test")
    best = ops.add("ReduceMax", b, axes=[2], keepdims=0)
    best.shape = ["B", count]
    _, rows = ops.top_k(best, chosen)
    few = [ops.gather_rows(x, rows) for x in (a, b)]
    for x, tail in zip(few, ([4], [3]), strict=True):
        x.shape = ["B", chosen, *tail]
    graph.inputs, graph.outputs = [a, b], onnx_utils.efficient_nms(ops, *few, **SETTINGS)
    model = nms_by_rounds.replace(gs.export_onnx(graph), dataclasses.replace(SMALL, row=2048))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    widths = [node.inputs[0].shape for node in precision.typed_graph(model).nodes if node.op == "TopK"]
    best = np.argsort(-scores.max(axis=2), axis=1, kind="stable")[:, :chosen, None]
    few = (np.take_along_axis(x, best, axis=1) for x in (boxes, scores))
    return *few, session.run(None, {"boxes": boxes, "scores": scores}), widths


@pytest.mark.parametrize(
    ("count", "chosen", "width"),
    [
        (4400, 400, (4, 1100)),
        (4999, 400, 4999),
        (4400, 80, 4400),
        (2000, 400, 2000),
        (4400, 2200, 4400),
    ],
    ids=["parts", "no even parts", "few of each part", "few", "half of them"],
)
def test_boxes_that_were_chosen_are_chosen_in_parts(count, chosen, width):
    """Where that looks at less, and the parts have enough of them each."""
    values = np.random.default_rng(chosen).permuted(np.linspace(0.95, 0.05, 2 * count).reshape(2, count, 1), axis=1)
    boxes, scores, found, widths = chosen_boxes(count, chosen, values.astype(np.float32))
    assert (tuple(widths[0][1:]) if isinstance(width, tuple) else widths[0][1]) == width
    same_as_plugin(found, boxes, scores)


def test_a_pool_lies_in_memory_both_ways():
    """TensorRT 8.6 has in memory what one Concat puts together; of anything else a matrix's elements read many places each."""
    columns = [
        gs.Variable(name, np.float32, [2, 5, size]) for name, size in (("boxes", 4), ("scores", 1), ("classes", 1))
    ]
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=columns)
    graph.outputs = list(nms_by_rounds._pool(onnx_utils.OpBuilder(graph, "test"), columns, columns[1], 5))
    assert [x.inputs[0].op for x in graph.outputs] == ["Concat", "Concat"]
    rng = np.random.default_rng(0)
    given = {x.name: rng.normal(size=x.shape).astype(np.float32) for x in columns}
    session = onnxruntime.InferenceSession(gs.export_onnx(graph).SerializeToString())
    pool, turned = session.run(None, given)
    rank = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None], (2, 5, 1))
    np.testing.assert_array_equal(pool, np.concatenate([*given.values(), rank], axis=2))
    np.testing.assert_array_equal(turned, pool.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("together", "in_order", "lost"),
    [(160, True, 0), (161, True, 1), (400, False, 0)],
    ids=["so many", "one more", "by lot"],
)
def test_a_part_gives_twice_its_share(together, in_order, lost):
    """Of 400 in 5 parts 160 each. Where every fifth row is one of the best, as of one shape of anchor, parts drawn by lot have all."""
    values = np.linspace(0.3, 0.1, 4400, dtype=np.float32)[None, :, None]
    values[:, : 5 * together : 5] += 0.5
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("values", np.float32, [1, 4400, 1])])
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = list(nms_by_rounds._largest(ops, graph.inputs[0], 400, 1000, in_order))
    session = onnxruntime.InferenceSession(
        gs.export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    best, rows, columns = session.run(None, {"values": values})
    wanted = np.argsort(-values[0, :, 0], kind="stable")
    wanted = wanted[wanted != 5 * 160] if lost else wanted  # the 161st of its part
    np.testing.assert_array_equal(rows[0], wanted[:400])
    np.testing.assert_array_equal(best[0], values[0, rows[0], 0])
    assert not columns.any()


@pytest.mark.parametrize(
    ("count", "parts", "each", "in_order"),
    [(12_804, 11, 186, False), (12_804, 11, 272, True), (51_150, 25, 120, False)],
    ids=["FPNLite", "best first", "SSD ResNet50"],
)
def test_of_parts_drawn_by_lot_a_second_choice_is_of_fewer(count, parts, each, in_order):
    """Of 1,500: 186 are 4.3 standard deviations more than a share of 136, 81, that would do for the 25 parts, 2.7 more than 60."""
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("values", np.float32, [1, count, 1])])
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = list(nms_by_rounds._largest(ops, graph.inputs[0], 1500, SIZES.row, in_order))
    model = gs.export_onnx(graph)
    shapes = [x.inputs[0].shape for x in precision.typed_graph(model).nodes if x.op == "TopK"]
    assert shapes == [[1, parts, count // parts], [1, parts * each]]
    values = np.random.default_rng(0).permutation(count).astype(np.float32)[None, :, None]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    best, rows, _ = session.run(None, {"values": values})
    np.testing.assert_array_equal(best[0], np.arange(count - 1, count - 1501, -1))
    np.testing.assert_array_equal(values[0, rows[0], 0], best[0])


@pytest.mark.parametrize("much", ["of a few boxes", "of one class"])
def test_every_box_and_every_class_is_in_all_parts(much):
    """Where nearly all pairs of a few boxes are the best, as in dull pictures, or nearly all boxes of one class."""
    values = np.random.default_rng(0).uniform(0.1, 0.4, (1, 1500, 90)).astype(np.float32)
    best = values[:, 300:322] if much == "of a few boxes" else values[:, :, 7]
    best += 0.5
    graph = gs.Graph(opset=onnx_utils.OPSET, inputs=[gs.Variable("values", np.float32, list(values.shape))])
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.outputs = list(nms_by_rounds._largest(ops, graph.inputs[0], SIZES.pairs, SIZES.row, in_order=True))
    nodes = precision.typed_graph(gs.export_onnx(graph)).nodes
    assert [x.inputs[0].shape for x in nodes if x.op == "TopK"] == [[1, 75, 1820], [1, 4050]]
    assert "Pad" not in {x.op for x in nodes}  # which TensorRT 8.6 makes a copy of all
    session = onnxruntime.InferenceSession(
        gs.export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    found, boxes, classes = session.run(None, {"values": values})
    np.testing.assert_array_equal(found[0], -np.sort(-values[0].ravel())[: SIZES.pairs])
    np.testing.assert_array_equal(values[0, boxes[0], classes[0]], found[0])


@pytest.mark.parametrize(
    ("count", "columns", "number", "parts"),
    [
        (1500, 90, 2048, 75),
        (300, 90, 2048, 15),
        (1500, 7, 2048, 6),
        (4096, 1, 2048, 1),  # each of them had to give all it has
        (1499, 90, 2048, 1),
        (1500, 600, 2048, 75),  # as short as can be
        (2998, 90, 2048, 1),  # in two they were long
        (12804, 1, 1500, 11),
        (51150, 1, 1500, 25),
    ],
)
def test_as_few_parts_as_have_short_rows(count, columns, number, parts):
    assert nms_by_rounds.parts_of(count, columns, number, SIZES.row) == parts


@pytest.mark.parametrize("shape", ["unknown", "computed"])
def test_a_choice_that_is_not_known_beforehand_is_left(shape):
    """Of a number of boxes that the file does not say, or of so many as are computed."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    boxes = gs.Variable("boxes", np.float32, ["B", 900, 4])
    scores = gs.Variable("scores", np.float32, ["B", "N" if shape == "unknown" else 9000])
    number = gs.Variable("number", np.int64, [1])
    ops = onnx_utils.OpBuilder(graph, "test")
    best = ops.add("TopK", scores, number if shape == "computed" else np.int64([900]), outputs=2, axis=-1, sorted=1)[0]
    best = ops.add("Unsqueeze", best, np.int64([2]))
    best.shape = ["B", 900, 1]
    graph.inputs = [boxes, scores, *([number] if shape == "computed" else [])]
    graph.outputs = onnx_utils.efficient_nms(ops, boxes, best, **SETTINGS)
    model = nms_by_rounds.replace(gs.export_onnx(graph), SMALL)
    assert [node.op_type for node in model.graph.node].count("TopK") == 5  # that one, and four of the rounds


def test_a_form_that_would_measure_another_is_refused(convert):
    """bench_rounds.py names its figures by the forms that it is given."""
    with pytest.raises(UserError, match="give first=600 or more"):
        bench_rounds.Form("rounds:left=600")
    bench_rounds.Form("rounds:left=600,first=600")
    model = onnx_utils.load(convert("demo", "--batch_size", "dynamic")[0])
    assert bench_rounds.Form("rounds").prepare(model, 1)
    with pytest.raises(UserError, match="the plugin stays everywhere"):
        bench_rounds.Form("rounds:left=900,first=900").prepare(model, 1)


def test_a_limit_of_each_class_is_the_plugins():
    """Each class is an image of its own then."""
    graph = gs.Graph(opset=onnx_utils.OPSET)
    a, b = gs.Variable("boxes", np.float32, ["B", 7, 900, 4]), gs.Variable("scores", np.float32, ["B", 7, 900])
    limits = {"score_threshold": 0.05, "iou_threshold": 0.5, "limit": 2}
    ops = onnx_utils.OpBuilder(graph, "test")
    graph.inputs, graph.outputs = [a, b], list(onnx_utils.nms_of_each_class(ops, a, b, (7, 900), **limits))
    kept = nms_by_rounds.replace(gs.export_onnx(graph), SIZES)
    assert [node.op_type for node in kept.graph.node].count("EfficientNMS_TRT") == 1


@pytest.mark.parametrize("wanted", ["plugin", "rounds", "auto"])
def test_suppression_is_as_asked_and_finds_the_same(wanted, convert, detector, tmp_path):
    path, typed = convert("demo", "--batch_size", "dynamic")[0], tmp_path / "typed.onnx"
    options = ("--typed_onnx", typed, "--precision", "fp32", "--suppression", wanted)
    status, text = command("--onnx", path, *options)
    assert (status, "NMS in standard ops instead of TensorRT's plugin in 1 of 1 places" in text) == (
        0,
        wanted == "rounds",
    )
    plugins = [node for node in onnx_utils.load(typed).graph.node if node.op_type == "EfficientNMS_TRT"]
    assert bool(plugins) == (wanted != "rounds")
    with open_detector(typed) as opened:
        for picture in sorted((DEMO / "images").glob("*.jpg"))[:4]:
            theirs, ours = (
                detect_image(x, load_image(picture)) for x in (detector("demo", "--batch_size", "dynamic"), opened)
            )
            assert len(ours.scores) > 0
            np.testing.assert_array_equal(ours.boxes, theirs.boxes)
            np.testing.assert_array_equal(ours.scores, theirs.scores)
            np.testing.assert_array_equal(ours.classes, theirs.classes)


def test_an_engine_for_few_images_suppresses_by_rounds(convert, capsys):
    model = onnx_utils.load(convert("demo", "--batch_size", "dynamic")[0])
    for wanted, batch, by_rounds in (
        ("auto", (1, 8, 32), 1),
        ("auto", (1, 9, 9), 0),
        ("auto", (1, 8, 33), 0),
        ("plugin", (1, 1, 1), 0),
        ("rounds", (64, 64, 64), 1),
    ):
        made = build_engine.suppress(wanted, model, build_engine.for_few_images(batch))
        assert any(node.op_type == "EfficientNMS_TRT" for node in made.graph.node) != by_rounds
        assert ("in 1 of 1 places" in capsys.readouterr().out) == by_rounds


def test_who_asks_for_rounds_where_they_do_not_suit_is_told(convert, capsys):
    model = onnx_utils.load(convert("demo", "--batch_size", "dynamic")[0])
    (plugin,) = [node for node in model.graph.node if node.op_type == "EfficientNMS_TRT"]
    next(x for x in plugin.attribute if x.name == "max_output_boxes").i = 1000
    for wanted, said in (("rounds", "NMS stays TensorRT's plugin"), ("auto", "")):
        build_engine.suppress(wanted, model, few_images=True)
        output = capsys.readouterr()
        assert said in output.err and bool(output.err) == bool(said)
        assert not output.out


@pytest.mark.parametrize("number", [0, 1])
def test_a_part_of_a_two_stage_model_is_that_of_the_whole(number, exported):
    """What bench_rounds.py measures by itself: a model of its own, which gives what the suppression gives in the whole."""
    _, path = exported("mask", "--batch_size", "dynamic")
    model = onnx_utils.load(path)
    metadata = onnx_utils.read_metadata(model, path)
    pictures = [preprocess(load_image(x), metadata["resizer"]) for x in sorted((DEMO / "images").glob("*.jpg"))[:2]]
    shapes = [placement.true_shape for _, placement in pictures]
    feeds = network_inputs(np.stack([x for x, _ in pictures]), shapes, input_spec(metadata))
    part, values = bench_rounds.part_of(model, number, feeds)
    assert [tensor.name for tensor in part.graph.input] == list(values)
    assert [node.op_type for node in part.graph.node].count("EfficientNMS_TRT") == 1
    found = bench_rounds.open_session(part).run(None, values)
    graph = precision.typed_graph(model)
    graph.outputs = bench_rounds.results_of([node for node in graph.nodes if node.op == "EfficientNMS_TRT"][number])
    whole = bench_rounds.open_session(gs.export_onnx(graph.cleanup().toposort()))
    wanted = whole.run(None, {tensor.name: feeds[tensor.name] for tensor in whole.get_inputs()})
    assert bench_rounds.how_alike(wanted, found) == ["bit for bit"] * 2
    assert min(map(len, wanted)) == 2
    assert max(x.max() for x in wanted) > 0
    trt_graph.prepare(part, 500)  # of very many images the classes go to several plugins


def test_how_alike_results_are():
    rng = np.random.default_rng(0)
    theirs = [np.full((1, 1), 9, np.int32), rng.random((1, 9, 4)), np.full((1, 9), 0.5), np.arange(9)[None] % 3]

    def alike(change):
        ours = [x.copy() for x in theirs]
        change(ours)
        return bench_rounds.how_alike(theirs, ours)

    def swap(ours):
        for x in ours[1:]:
            x[0, :2] = x[0, 1::-1].copy()

    def move(ours):
        ours[1][0, 3] += 1e-5

    def lose(ours):
        ours[1][0, 3] += 1e-3

    assert alike(lambda ours: None) == ["bit for bit"]
    assert alike(swap) == ["but for their order"]
    assert alike(move) == ["to 1e-4, in any order"]
    assert alike(lose) == ["not the same"]
