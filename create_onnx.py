"""Converts a TensorFlow Object Detection API SavedModel to model.onnx, for TensorRT and ONNX Runtime.

    python create_onnx.py --saved_model ssd_mobilenet_v2_fpnlite_320x320_coco17_tpu-8 --onnx model.onnx
    python create_onnx.py --saved_model exported/saved_model --onnx model.onnx --batch_size dynamic --input_type uint8

The stock export is enough: no re-export, no TFOD. What the network computes after its heads (box decoder, score
converter, non-maximum suppression) is written anew from pipeline.config, then checked against TensorFlow.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import onnx_utils
import tf_graph
from cli import UserError, check_writable, run, warn, whole_file
from tfod_config import ENUMS, describe_resizer, read_pipeline_config

# Of the anchors, only the best by their best class go into NMS: the 1,000 best (box, class) pairs are certainly among
# theirs, and the 100 detections of an image come from far fewer (README, "How many candidates").
CANDIDATES = 1000
# Detections taken from the plugin beyond max_total_detections, in place of those that finish_nms drops: boxes without
# area after clipping (at most 2 an image were seen), and those over max_detections_per_class where it limits.
SPARE = 28
SPARE_WITH_CLASS_LIMIT = 900
# The check's bound on normalised coordinates and scores. Float32 rounding alone reaches 6e-4 in a deep network
# (TensorFlow's two sets of CPU kernels differ by half of that); a wrong conversion is off by orders of magnitude more.
TOLERANCE = 1e-3


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--saved_model", required=True, help="folder of the SavedModel, or the unpacked export above it")
    add("-o", "--onnx", required=True, help="the ONNX file to write")
    add("-p", "--pipeline_config", help="the model's pipeline.config; default: the one beside saved_model/")
    add(
        "-b",
        "--batch_size",
        type=batch_size,
        default=1,
        metavar="N",
        help="images per batch, or 'dynamic': any number, chosen when the engine runs; default: 1",
    )
    add(
        "--input_type",
        choices=["float32", "uint8"],
        default="float32",
        help="type of the input, RGB 0..255 either way; uint8 moves a quarter of the bytes and rounds resized pixels",
    )
    add(
        "-f",
        "--input_format",
        choices=["NHWC", "NCHW"],
        default="NHWC",
        help="layout of the input tensor; NHWC is what image decoders give; default: NHWC",
    )
    add(
        "--first_nms_threshold",
        type=score,
        metavar="SCORE",
        help="score threshold of the first NMS (an SSD model's only one); default: the config's",
    )
    add(
        "--second_nms_threshold",
        type=score,
        metavar="SCORE",
        help="score threshold of the second NMS; SSD models have none; default: the config's",
    )
    add(
        "--debug",
        action="append",
        default=[],
        metavar="TENSOR",
        help="make this tensor of the ONNX graph (or the first output of this node) an output too; may be repeated",
    )
    add("--tf2onnx", metavar="FILE", help="also write the network without post-processing, as tf2onnx converted it")
    add("--check_image", metavar="FILE", help="the image for the check; default: a built-in one")
    add("--no_check", action="store_true", help="do not compare the file with TensorFlow after writing it")
    return parser.parse_args(argv)


def batch_size(text):
    if text == "dynamic":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'dynamic'")


def score(text):
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a score between 0 and 1")
    return value


def convert(saved_model, config, args):
    """Converts an open tf_graph.SavedModel with its `model` config message; returns the ONNX model.

    args: the options batch_size (None: dynamic), input_type, input_format, first_nms_threshold, debug, tf2onnx.
    Raises UserError where the SavedModel and the config do not belong together.
    """
    ssd = config.ssd
    resizer = describe_resizer(ssd.image_resizer)
    height, width = resizer["height"], resizer["width"]
    graph = saved_model.flatten()
    if tf_graph.is_two_stage(graph):
        raise UserError(
            f"the pipeline.config is not that of {saved_model.folder}: it describes an SSD model, the SavedModel has two"
            " stages; use the model's own --pipeline_config"
        )
    images = tf_graph.preprocessed_images(graph)
    logits, converter, logit_scale = tf_graph.score_logits(graph)
    encodings, anchors = tf_graph.box_encodings_and_anchors(graph, images)
    *normalisation, pad_value = tf_graph.probe_preprocessing(graph, images, resizer)
    if pad_value is not None:
        resizer["pad_value"] = pad_value

    feed = {images: [1, height, width, 3]}
    anchors = graph.run([anchors], graph.extract([anchors], feed), {})[0].reshape(-1, 4)  # [N, 4] yxyx
    network = convert_network(graph, images, [logits, encodings], feed)
    if args.tf2onnx:
        with whole_file(args.tf2onnx) as path:
            onnx_utils.save(gs.export_onnx(network), path)

    metadata = describe(saved_model, ssd, resizer, args)
    boxes, columns = network.outputs[0].shape[1:]
    check_config(ssd, columns, converter, boxes, len(anchors), normalisation[0], saved_model.folder)
    make_batch_free(network)
    add_input(network, normalisation, args, height, width)
    add_ssd_detections(network, ssd, anchors, columns, logit_scale, metadata["score_threshold"])
    name_outputs(network, args.batch_size or "batch", metadata["max_detections"])
    network.cleanup().toposort()
    if args.debug:
        add_debug_outputs(network, args.debug)
    model = gs.export_onnx(network)
    model.producer_name = "create_onnx.py"
    onnx_utils.write_metadata(model, metadata)
    return model


def describe(saved_model, ssd, resizer, args):
    """Returns the metadata dict: all that infer, eval and build need to know of the model."""
    nms = ssd.post_processing.batch_non_max_suppression
    threshold = nms.score_threshold if args.first_nms_threshold is None else args.first_nms_threshold
    return {
        "architecture": ssd.feature_extractor.type,
        "meta_architecture": "ssd",
        "source": saved_model.folder.resolve().parent.name
        if saved_model.folder.name == "saved_model"
        else saved_model.folder.name,
        "num_classes": ssd.num_classes,
        # detection_classes + class_offset = the id in the label map (TFOD counts from 1, EfficientNMS from 0).
        "class_offset": 1,
        "batch_size": args.batch_size,
        "input_format": args.input_format,
        "input_type": args.input_type,
        "resizer": resizer,
        "score_threshold": threshold,
        "config_score_threshold": nms.score_threshold,
        "iou_threshold": nms.iou_threshold,
        "max_detections": nms.max_total_detections,
    }


def check_config(ssd, columns, converter, boxes, anchors, scale, folder):
    """Raises UserError if what the graph computes is not what the config says."""

    def mismatch(what):
        raise UserError(f"the pipeline.config is not that of {folder}: {what}; use the model's own --pipeline_config")

    # Colours by backbone (TFOD's feature extractors): ResNet V1 subtracts a mean and scales nothing, MobileNet scales.
    family = "resnet" if np.allclose(scale, 1) else "mobilenet"
    named = {name for name in ("resnet", "mobilenet") if name in ssd.feature_extractor.type.split("_fpn")[0]}
    if named and family not in named:
        mismatch(f"it says {ssd.feature_extractor.type}, the model prepares colours as a {family} does")
    background = int(ssd.add_background_class)
    if columns != ssd.num_classes + background:
        mismatch(f"it says {ssd.num_classes} classes, the model predicts {columns - background}")
    wanted = ENUMS["ScoreConverter"][ssd.post_processing.score_converter]
    if converter != wanted:
        mismatch(f"it says score_converter {wanted}, the model computes {converter}")
    if boxes != anchors:
        mismatch(f"the model predicts {boxes} boxes for {anchors} anchors at the config's input size")


def convert_network(graph, images, outputs, feed):
    """Cuts the FlatGraph between `images` and `outputs` and converts that part alone; returns a graphsurgeon graph.

    feed: {images: shape}: with a fixed shape all shape arithmetic folds away. Input NCHW, outputs as in TensorFlow.
    Large weights take no part in the conversion, whose every pass would copy them (SSD ResNet50: 44 s and 10 GB with,
    BENCHMARKS.md without): they are inputs to tf2onnx, and put back behind it.
    """
    import tf2onnx

    part = graph.extract(outputs, feed)
    weights = tf_graph.detach_weights(part)
    inputs = [tf_graph.tensor_name(name) for name in (images, *weights)]
    with tf_graph.quiet():
        model, _ = tf2onnx.convert.from_graph_def(
            part,
            input_names=inputs,
            output_names=[tf_graph.tensor_name(name) for name in outputs],
            opset=onnx_utils.OPSET,
            inputs_as_nchw=inputs[:1],
        )
    network = gs.import_onnx(model)
    for tensor in [x for x in network.inputs if x.name not in inputs[:1]]:
        onnx_utils.replace_tensor(network, tensor, gs.Constant(f"{tensor.name}/weights", weights[tensor.name[:-2]]))
    network.inputs = [x for x in network.inputs if x.name == inputs[0]]
    network.fold_constants(size_threshold=sys.maxsize).cleanup()
    onnx_utils.fold_batch_norms(network)
    return network.cleanup().toposort()


def make_batch_free(graph):
    """Lets a graph that was converted for one image take any batch.

    Every Reshape to a shape that begins with 1 has the batch there, as has its input: 0 copies that dimension.
    """
    for node in graph.nodes:
        if node.op == "Reshape" and isinstance(node.inputs[1], gs.Constant):
            shape = node.inputs[1].values
            if shape[0] == 1:
                node.inputs[1] = gs.Constant(
                    f"{node.name}/any_batch", np.concatenate([[0], shape[1:]]).astype(np.int64)
                )
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable):
            tensor.shape = None  # they hold the 1; TensorRT and ONNX Runtime infer shapes themselves


def add_input(graph, normalisation, args, height, width):
    """Puts the file's input before the network: raw RGB 0..255, colours normalised inside the graph."""
    build = onnx_utils.Builder(graph, "preprocessing")
    (old,) = graph.inputs
    batch = args.batch_size or "batch"
    nchw = args.input_format == "NCHW"
    shape = [batch, 3, height, width] if nchw else [batch, height, width, 3]
    graph.inputs = [gs.Variable("input_tensor", np.dtype(args.input_type), shape)]
    x = graph.inputs[0]
    if args.input_type == "uint8":
        x = build.cast(x, np.float32)
    if not nchw:
        x = build.add("Transpose", x, perm=[0, 3, 1, 2])
    scale, offset = (values.reshape(1, 3, 1, 1) for values in normalisation)
    if np.any(scale != 1):
        x = build.add("Mul", x, scale)
    if np.any(offset != 0):
        x = build.add("Add", x, offset)
    onnx_utils.replace_tensor(graph, old, x)


def add_ssd_detections(graph, ssd, anchors, columns, logit_scale, score_threshold):
    """Adds TFOD's SSD post-processing (ssd_meta_arch.postprocess) behind the outputs: logits and box encodings.

    anchors: [N, 4] yxyx, normalised. columns: classes, with the background where there is one.
    """
    build = onnx_utils.Builder(graph, "postprocessing")
    # The plain predictors hold boxes as [B, N, 1, 4]. -> [B, N, columns], [B, N, 4]
    logits, encodings = (build.reshape(x, [0, -1, size]) for x, size in zip(graph.outputs, (columns, 4), strict=True))
    if logit_scale != 1:
        logits = build.add("Mul", logits, np.float32(logit_scale))
    converter = ENUMS["ScoreConverter"][ssd.post_processing.score_converter]
    if converter == "SOFTMAX":
        logits = build.add("Softmax", logits, axis=-1)
    if ssd.add_background_class:
        logits = build.slice(logits, 2, 1, columns)
    candidates = min(CANDIDATES, len(anchors))
    _, rows = build.top_k(build.add("ReduceMax", logits, axes=[2], keepdims=0), candidates)  # [B, K]
    scores = build.gather_rows(logits, rows)  # [B, K, C]
    if converter == "SIGMOID":  # rising, so the best logits are the best scores
        scores = build.add("Sigmoid", scores)
    boxes = decode_boxes(build, build.gather_rows(encodings, rows), rows, anchors, ssd.box_coder.faster_rcnn_box_coder)
    boxes.shape = [None, candidates, 4]

    nms = ssd.post_processing.batch_non_max_suppression
    _, boxes, scores, classes = onnx_utils.efficient_nms(
        build,
        boxes,
        scores,
        score_threshold=score_threshold,
        iou_threshold=nms.iou_threshold,
        max_output_boxes=spare_detections(nms),
    )
    graph.outputs = finish_nms(build, boxes, scores, classes, nms)


def spare_detections(nms):
    """How many detections to take from the plugin so that, of them, finish_nms finds max_total_detections to keep."""
    spare = SPARE if nms.max_detections_per_class >= nms.max_total_detections else SPARE_WITH_CLASS_LIMIT
    return nms.max_total_detections + spare


def finish_nms(build, boxes, scores, classes, nms):
    """What TFOD does after suppression (post_processing.multiclass_non_max_suppression) and the plugin does not.

    boxes [B, L, 4], scores and classes [B, L], best first, L > M, unused slots zero. At most
    max_detections_per_class of a class; clip to the image; drop the boxes that clipping left without area; the best M.
    Returns (num_detections [B, 1], boxes [B, M, 4], scores [B, M], classes [B, M]) with zeros in unused slots.
    """
    kept, given = nms.max_total_detections, scores.shape[1]
    boxes = build.add("Clip", boxes, np.float32(0), np.float32(1))
    size = build.add("Sub", build.slice(boxes, 2, 2, 4), build.slice(boxes, 2, 0, 2))
    valid = build.add("Greater", build.add("ReduceProd", size, axes=[2], keepdims=0), np.float32(0), dtype=bool)
    if nms.max_detections_per_class < kept:
        valid = build.add(
            "And", valid, _within_class_limit(build, scores, classes, nms.max_detections_per_class), dtype=bool
        )
    # The valid ones to the front, in their order: a key that falls with the place, 0 for the invalid.
    place = build.add("Where", valid, np.arange(given, 0, -1, dtype=np.float32)[None], np.float32(0), dtype=np.float32)
    key, rows = build.top_k(place, kept)
    used = build.add("Greater", key, np.float32(0), dtype=bool)
    boxes, scores, classes = (build.gather_rows(x, rows) for x in (boxes, scores, classes))
    boxes = build.add("Where", build.add("Unsqueeze", used, np.int64([2])), boxes, np.float32(0), dtype=np.float32)
    scores = build.add("Where", used, scores, np.float32(0), dtype=np.float32)
    classes = build.add("Where", used, classes, np.int32(0), dtype=np.int32)
    number = build.add("ReduceSum", build.cast(used, np.int32), np.int64([1]), keepdims=1)
    return number, boxes, scores, classes


def _within_class_limit(build, scores, classes, limit):
    """[B, M] bool: fewer than `limit` detections of the same class stand before this one."""
    given = scores.shape[1]
    rows, columns = (build.add("Unsqueeze", classes, np.int64([axis])) for axis in (2, 1))
    same = build.cast(build.add("Equal", rows, columns, dtype=bool), np.float32)  # [B, M, M]
    before = build.add("Mul", same, np.tri(given, k=-1, dtype=np.float32)[None])
    return build.add("Less", build.add("ReduceSum", before, np.int64([2]), keepdims=0), np.float32(limit), dtype=bool)


def decode_boxes(build, encodings, rows, anchors, coder):
    """encodings [B, K, 4] (ty, tx, th, tw) and rows [B, K] of the anchors [N, 4] -> boxes [B, K, 4] yxyx.

    TFOD's FasterRcnnBoxCoder: y = ty / y_scale * ha + ya, h = exp(th / height_scale) * ha (Ren et al., 2015).
    """
    size = anchors[:, 2:] - anchors[:, :2]  # [N, 2] h, w
    centre = anchors[:, :2] + size / 2  # [N, 2] y, x
    table = np.concatenate([centre, size], axis=1).astype(np.float32)
    chosen = build.add("Gather", table, rows, axis=0)  # [B, K, 4]
    centre, size = build.slice(chosen, 2, 0, 2), build.slice(chosen, 2, 2, 4)
    scale = np.float32([coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale])
    encodings = build.add("Div", encodings, scale)
    shift, stretch = build.slice(encodings, 2, 0, 2), build.slice(encodings, 2, 2, 4)
    centre = build.add("Add", build.add("Mul", shift, size), centre)
    half = build.add("Mul", build.add("Mul", build.add("Exp", stretch), size), np.float32(0.5))
    return build.add("Concat", build.add("Sub", centre, half), build.add("Add", centre, half), axis=2)


def name_outputs(graph, batch, kept):
    """Gives the four outputs their names and shapes: B images, `kept` detections each."""
    shapes = {
        "num_detections": [batch, 1],
        "detection_boxes": [batch, kept, 4],
        "detection_scores": [batch, kept],
        "detection_classes": [batch, kept],
    }
    for tensor, (name, shape) in zip(graph.outputs, shapes.items(), strict=True):
        tensor.name, tensor.shape = name, shape


def add_debug_outputs(graph, names):
    """Makes the tensors of these names (or the first outputs of the nodes of these names) outputs too."""
    inferred = gs.import_onnx(onnx.shape_inference.infer_shapes(gs.export_onnx(graph))).tensors()
    tensors, nodes = graph.tensors(), {node.name: node for node in graph.nodes}
    for name in names:
        tensor = nodes[name].outputs[0] if name in nodes else tensors.get(name)
        if not isinstance(tensor, gs.Variable) or inferred[tensor.name].shape is None:
            raise UserError(
                f"--debug {name}: no such tensor of known shape in the ONNX graph; --tf2onnx FILE shows the names"
            )
        tensor.dtype, tensor.shape = inferred[tensor.name].dtype, inferred[tensor.name].shape
        graph.outputs.append(tensor)


def main(argv=None):
    args = parse_args(argv)
    started = time.perf_counter()
    folder = tf_graph.find_saved_model(args.saved_model)
    config_path = args.pipeline_config or tf_graph.find_pipeline_config(folder)
    config = read_pipeline_config(config_path)
    for path in filter(None, (args.onnx, args.tf2onnx)):
        check_writable(path)
    if args.check_image and not os.path.isfile(args.check_image):
        raise UserError(f"--check_image {args.check_image}: no such file")
    if args.second_nms_threshold is not None:
        warn("--second_nms_threshold has no effect: an SSD model has one NMS, set with --first_nms_threshold")
    with tf_graph.SavedModel(folder) as saved_model:
        model = convert(saved_model, config, args)
        onnx.checker.check_model(model)
        with whole_file(args.onnx) as path:
            onnx_utils.save(model, path)
        print(f"Converted in {time.perf_counter() - started:.1f} s: {len(model.graph.node)} nodes")
        passed = args.no_check or check(saved_model, args)
    size = Path(args.onnx).stat().st_size / 1e6
    print(
        f"Wrote {args.onnx} ({size:.1f} MB). Next: python infer.py --engine {args.onnx} --input IMAGES --output results"
    )
    return 0 if passed else 1


def check(saved_model, args):
    """Compares args.onnx on ONNX Runtime with TensorFlow on one image, prints the verdict, returns whether it passed."""
    import parity
    from detector import open_detector

    with open_detector(args.onnx) as detector:
        report = parity.compare(saved_model, detector, args.check_image, TOLERANCE)
    passed = report.box_difference <= TOLERANCE and report.score_difference <= TOLERANCE and not report.unmatched
    print(
        f"{'PASSED' if passed else 'FAILED'}: {report.compared} detections of TensorFlow and ONNX Runtime on"
        f" {args.check_image or 'the built-in image'}: largest box difference {report.box_difference:.1e},"
        f" score difference {report.score_difference:.1e} (tolerance {TOLERANCE:.0e}), {report.unmatched} unmatched"
    )
    return passed


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    run(main)
