"""Converts a TensorFlow Object Detection API SavedModel to model.onnx, for TensorRT and ONNX Runtime.

    python create_onnx.py --saved_model ssd_mobilenet_v2_fpnlite_320x320_coco17_tpu-8 --onnx model.onnx
    python create_onnx.py --saved_model exported/saved_model --onnx model.onnx --batch_size dynamic --input_type uint8

The stock export is enough: no re-export, no TFOD. What the network computes after its heads (box decoder, score
converter, non-maximum suppression) is written anew from pipeline.config, then checked against TensorFlow.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import onnx_utils
from commandline import UserError, check_writable, run, warn, whole_file
from tfod import detection_graph
from tfod import graph as tf_graph
from tfod.config import ENUMS, describe_resizer, read_pipeline_config
from tfod.detection_graph import Heads, SecondStage, Suppression

# The check's bound on normalised coordinates and scores. Float32 rounding alone reaches 1.2e-3 in a two-stage network
# (TensorFlow's two sets of CPU kernels differ by as much); a wrong conversion is off by orders of magnitude more.
TOLERANCE = 2e-3


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
        help="score threshold of the first NMS: an SSD's detections, a two-stage model's proposals; default: the config's",
    )
    add(
        "--second_nms_threshold",
        type=score,
        metavar="SCORE",
        help="score threshold of a two-stage model's detections; SSD models have none; default: the config's",
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

    args: the options batch_size (None: dynamic), input_type, input_format, first_nms_threshold, second_nms_threshold,
    debug, tf2onnx. Raises UserError where the SavedModel and the config do not belong together.
    """
    two_stage = config.HasField("faster_rcnn")
    part = config.faster_rcnn if two_stage else config.ssd
    resizer = describe_resizer(part.image_resizer)
    graph = saved_model.flatten()
    if tf_graph.is_two_stage(graph) != two_stage:
        stages = ("one stage", "two stages")[not two_stage]
        mismatch(saved_model.folder, f"it says {'faster_rcnn' if two_stage else 'ssd'}, the model has {stages}")
    images = tf_graph.preprocessed_images(graph)
    scale, offset, pad_value = tf_graph.probe_preprocessing(graph, images, resizer)
    check_colours(part, scale, saved_model.folder)
    if pad_value is not None:
        resizer["pad_value"] = pad_value

    add_detections = add_two_stage if two_stage else add_single_stage
    cut = cut_two_stage(graph, images, part, resizer) if two_stage else cut_single_stage(graph, images, resizer)
    network = convert_network(graph, cut)
    if args.tf2onnx:
        with whole_file(args.tf2onnx) as path:
            onnx_utils.save(gs.export_onnx(network), path)
    metadata = describe(saved_model, part, resizer, cut, args)
    shapes = [tensor.shape for tensor in network.outputs]
    make_batch_free(network, {shape[0] for shape in cut.feed.values()})
    window = add_inputs(network, scale, offset, resizer, args)
    add_detections(network, shapes, cut, part, metadata, window, saved_model.folder)
    name_outputs(network, args.batch_size or "batch", metadata)
    network.cleanup().toposort()
    if args.debug:
        add_debug_outputs(network, args.debug)
    model = gs.export_onnx(network)
    model.producer_name = "create_onnx.py"
    onnx_utils.write_metadata(model, metadata)
    return model


def mismatch(folder, what):
    raise UserError(f"the pipeline.config is not that of {folder}: {what}; use the model's own --pipeline_config")


def check_colours(part, scale, folder):
    """Raises UserError if the colours are not prepared for the config's backbone (TFOD's feature extractors).

    ResNet V1 subtracts a mean and scales nothing, MobileNet and Inception ResNet V2 scale.
    """
    kind = part.feature_extractor.type
    scaling = "mobilenet" in kind or "inception" in kind
    if ("resnet" in kind or scaling) and scaling == np.allclose(scale, 1):
        mismatch(folder, f"it says {kind}, the model {'does not scale' if scaling else 'scales'} colours")


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is taken of a TensorFlow graph: the network from `feed` to `outputs`, and what was read off the rest."""

    feed: dict  # {tensor: shape} of the inputs, images first; with fixed shapes all shape arithmetic folds away
    outputs: list  # tensors, in the order that the add_ function below takes them
    heads: Heads
    anchors: np.ndarray  # [N, 4] yxyx, normalised to the input
    first_scales: tuple = ()  # of the first stage's box coder
    mask_shape: tuple = ()  # height, width
    zero_outside: bool = False  # see detection_graph.crop_features


def cut_single_stage(graph, images, resizer):
    """SSD: from the images to class predictions [B, N, columns] and box encodings [B, N, (1,) 4]."""
    logits, converter, logit_scale = tf_graph.score_logits(graph, graph.outputs["raw_detection_scores"])
    encodings, anchors, scales = tf_graph.box_decoder(graph, graph.outputs["raw_detection_boxes"])
    feed = {images: [1, resizer["height"], resizer["width"], 3]}
    anchors = graph.run([anchors], graph.extract([anchors], feed), {})[0].reshape(-1, 4)
    return Cut(feed, [logits, encodings], Heads(converter, logit_scale, True, scales), anchors)


def add_single_stage(network, shapes, cut, ssd, metadata, window, folder):
    """Puts SSD's post-processing behind the network, whose outputs had these `shapes` for one image."""
    boxes, columns = shapes[0][1:]
    background = bool(ssd.add_background_class)
    if columns != ssd.num_classes + background:
        mismatch(folder, f"it says {ssd.num_classes} classes, the model predicts {columns - background}")
    if boxes != len(cut.anchors):
        mismatch(folder, f"the model predicts {boxes} boxes for {len(cut.anchors)} anchors at the config's input size")
    check_converter(ssd.post_processing, cut.heads, folder)
    coder = ssd.box_coder.faster_rcnn_box_coder
    scales = (coder.y_scale, coder.x_scale, coder.height_scale, coder.width_scale)
    heads = dataclasses.replace(cut.heads, background=background, box_scales=scales)
    settings = suppression(ssd.post_processing, metadata["score_threshold"])
    detection_graph.add_ssd_detections(network, heads, cut.anchors, columns, settings, window)


def check_converter(post_processing, heads, folder):
    wanted = ENUMS["ScoreConverter"][post_processing.score_converter]
    if heads.converter != wanted:
        mismatch(folder, f"it says score_converter {wanted}, the model computes {heads.converter}")


def suppression(post_processing, score_threshold):
    nms = post_processing.batch_non_max_suppression
    return Suppression(score_threshold, nms.iou_threshold, nms.max_detections_per_class, nms.max_total_detections)


def cut_two_stage(graph, images, rcnn, resizer):
    """Faster and Mask R-CNN: from images, crops at proposals and crops at detections to all heads and the features."""
    boxes = graph.outputs["raw_detection_boxes"]
    first = tf_graph.suppressions(graph, boxes)
    logits, converter, logit_scale = tf_graph.score_logits(graph, graph.outputs["raw_detection_scores"])
    encodings, proposals, scales = tf_graph.box_decoder(graph, boxes)
    first_encodings, anchors, first_scales = tf_graph.box_decoder(graph, proposals)
    crops = tf_graph.pooled_crops(graph, encodings, first)
    features = tf_graph.cropped_features(graph, crops, images, first)
    feed = {images: [1, resizer["height"], resizer["width"], 3]}
    (shape,) = graph.shapes([features], feed)
    size = rcnn.initial_crop_size
    feed[crops] = [rcnn.first_stage_max_proposals, size, size, shape[3]]
    outputs = [features, tf_graph.proposal_scores(graph), first_encodings, logits, encodings]
    mask_shape = ()
    if "detection_masks" in graph.outputs:
        second = tf_graph.suppressions(graph, graph.outputs["detection_boxes"]) - first
        masks = tf_graph.mask_logits(graph)
        nms = rcnn.second_stage_post_processing.batch_non_max_suppression
        feed[tf_graph.pooled_crops(graph, masks, second)] = [nms.max_total_detections, size, size, shape[3]]
        outputs.append(masks)
        mask_shape = tuple(graph.shapes([masks], feed)[0][1:3])
    pixels = np.float32([resizer["height"], resizer["width"]] * 2)
    anchors = graph.run([anchors], graph.extract([anchors], feed), {})[0].reshape(-1, 4) / pixels
    heads = Heads(converter, logit_scale, True, scales)
    zero_outside = tf_graph.crops_with_op(graph, crops, features)
    return Cut(feed, outputs, heads, anchors, first_scales, mask_shape, zero_outside)


def add_two_stage(network, shapes, cut, rcnn, metadata, window, folder):
    """Joins the stages: proposals, crops, second stage, detections, and masks where the model has them.

    shapes: those of the network's outputs for one image.
    """
    classes, columns, box_columns = rcnn.num_classes, shapes[3][-1], shapes[4][-1]
    if columns != classes + 1:
        mismatch(folder, f"it says {classes} classes, the model predicts {columns - 1}")
    check_converter(rcnn.second_stage_post_processing, cut.heads, folder)
    build = onnx_utils.Builder(network, "postprocessing")
    features, objectness, first_encodings, logits, encodings, *masks = network.outputs
    features = build.add("Transpose", features, perm=[0, 3, 1, 2])
    _, crops, *mask_crops = network.inputs
    size, feature_shape = rcnn.initial_crop_size, shapes[0][1:]

    count = rcnn.first_stage_max_proposals
    proposals, valid = detection_graph.add_proposals(
        build,
        build.reshape(objectness, [0, -1, 2]),
        build.reshape(first_encodings, [0, -1, 4]),
        cut.anchors,
        cut.first_scales,
        Suppression(metadata["proposal_score_threshold"], rcnn.first_stage_nms_iou_threshold, count, count),
        window,
    )
    cropped = detection_graph.crop_features(build, features, proposals, count, size, feature_shape, cut.zero_outside)
    onnx_utils.replace_tensor(network, crops, cropped)
    settings = suppression(rcnn.second_stage_post_processing, metadata["score_threshold"])
    stage = SecondStage(count, box_columns == 4, settings)
    number, boxes, scores, labels = detection_graph.add_second_stage(
        build, logits, encodings, proposals, valid, cut.heads, stage, classes, window
    )
    network.outputs = [number, detection_graph.to_window(build, boxes, window), scores, labels]
    if masks:
        cropped = detection_graph.crop_features(
            build, features, boxes, settings.total, size, feature_shape, cut.zero_outside
        )
        onnx_utils.replace_tensor(network, mask_crops[0], cropped)
        masks = build.add("Transpose", masks[0], perm=[0, 3, 1, 2])  # [B * M, C, h, w]
        shape = (shapes[5][-1], *cut.mask_shape)
        network.outputs.append(detection_graph.add_masks(build, masks, labels, settings.total, shape))
    network.inputs = [x for x in network.inputs if x.name in ("input_tensor", "true_shape")]


def describe(saved_model, part, resizer, cut, args):
    """Returns the metadata dict: all that infer, eval and build need to know of the model."""
    two_stage = bool(cut.first_scales)
    post = part.second_stage_post_processing if two_stage else part.post_processing
    nms = post.batch_non_max_suppression
    override = args.second_nms_threshold if two_stage else args.first_nms_threshold
    folder = saved_model.folder
    metadata = {
        "architecture": part.feature_extractor.type,
        "meta_architecture": "faster_rcnn" if two_stage else "ssd",
        "source": folder.resolve().parent.name if folder.name == "saved_model" else folder.name,
        "num_classes": part.num_classes,
        # detection_classes + class_offset = the id in the label map (TFOD counts from 1, EfficientNMS from 0).
        "class_offset": 1,
        "batch_size": args.batch_size,
        "input_format": args.input_format,
        "input_type": args.input_type,
        "resizer": resizer,
        "score_threshold": nms.score_threshold if override is None else override,
        "config_score_threshold": nms.score_threshold,
        "iou_threshold": nms.iou_threshold,
        "max_detections": nms.max_total_detections,
        "mask_size": list(cut.mask_shape) or None,
    }
    if two_stage:
        metadata["zero_outside"] = cut.zero_outside
        first = args.first_nms_threshold
        metadata["proposal_score_threshold"] = part.first_stage_nms_score_threshold if first is None else first
    return metadata


def convert_network(graph, cut):
    """Converts the part of the FlatGraph that `cut` names; returns a graphsurgeon graph, inputs NCHW.

    Large weights take no part in the conversion, whose every pass would copy them (SSD ResNet50: 44 s and 10 GB with,
    6 s without): they are inputs to tf2onnx, and put back behind it.
    """
    import tf2onnx

    part = graph.extract(cut.outputs, cut.feed)
    weights = tf_graph.detach_weights(part)
    inputs = [tf_graph.tensor_name(name) for name in cut.feed]
    with tf_graph.quiet():
        model, _ = tf2onnx.convert.from_graph_def(
            part,
            input_names=inputs + [tf_graph.tensor_name(name) for name in weights],
            output_names=[tf_graph.tensor_name(name) for name in cut.outputs],
            opset=onnx_utils.OPSET,
            inputs_as_nchw=inputs,
        )
    network = gs.import_onnx(model)
    for tensor in [x for x in network.inputs if x.name not in inputs]:
        onnx_utils.replace_tensor(network, tensor, gs.Constant(f"{tensor.name}/weights", weights[tensor.name[:-2]]))
    by_name = {tensor.name: tensor for tensor in network.inputs}
    network.inputs = [by_name[name] for name in inputs]
    network.fold_constants(size_threshold=sys.maxsize).cleanup()
    onnx_utils.fold_batch_norms(network)
    return network.cleanup().toposort()


def make_batch_free(graph, counts):
    """Lets a graph that was converted for one image take any batch.

    Every Reshape to a shape that begins with one of the inputs' first dimensions (`counts`: 1 image, 300 crops) has the
    batch there, as has its input: 0 copies that dimension.
    """
    for node in graph.nodes:
        if node.op == "Reshape" and isinstance(node.inputs[1], gs.Constant):
            shape = node.inputs[1].values
            if shape[0] in counts:
                free = np.concatenate([[0], shape[1:]]).astype(np.int64)
                node.inputs[1] = gs.Constant(f"{node.name}/any_batch", free)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable):
            tensor.shape = None  # they hold the 1; TensorRT and ONNX Runtime infer shapes themselves


def add_inputs(graph, scale, offset, resizer, args):
    """Puts the file's inputs before the network: raw RGB 0..255, colours normalised inside the graph.

    With a keep-aspect resizer there is a second one, true_shape [B, 2]: height and width in pixels of the image within the
    padded input. Returns it as a window (detection_graph), or None.
    """
    build = onnx_utils.Builder(graph, "preprocessing")
    old = graph.inputs[0]
    batch, height, width = args.batch_size or "batch", resizer["height"], resizer["width"]
    nchw = args.input_format == "NCHW"
    shape = [batch, 3, height, width] if nchw else [batch, height, width, 3]
    x = graph.inputs[0] = gs.Variable("input_tensor", np.dtype(args.input_type), shape)
    if args.input_type == "uint8":
        x = build.cast(x, np.float32)
    if not nchw:
        x = build.add("Transpose", x, perm=[0, 3, 1, 2])
    if np.any(scale != 1):
        x = build.add("Mul", x, scale.reshape(1, 3, 1, 1))
    if np.any(offset != 0):
        x = build.add("Add", x, offset.reshape(1, 3, 1, 1))
    onnx_utils.replace_tensor(graph, old, x)
    if resizer["kind"] != "keep_aspect_ratio":
        return None
    true_shape = gs.Variable("true_shape", np.float32, [batch, 2])
    graph.inputs.append(true_shape)
    return build.add("Div", true_shape, np.float32([height, width]))


def name_outputs(graph, batch, metadata):
    """Gives the outputs their names and shapes."""
    kept = metadata["max_detections"]
    shapes = {
        "num_detections": [batch, 1],
        "detection_boxes": [batch, kept, 4],
        "detection_scores": [batch, kept],
        "detection_classes": [batch, kept],
    }
    if metadata["mask_size"]:
        shapes["detection_masks"] = [batch, kept, *metadata["mask_size"]]
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
    if args.second_nms_threshold is not None and config.HasField("ssd"):
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
    from checks import parity
    from runtimes.detector import open_detector

    with open_detector(args.onnx) as detector:
        report = parity.compare(saved_model, detector, args.check_image, TOLERANCE)
    largest = max(report.box_difference, report.score_difference, report.mask_difference)
    passed = largest <= TOLERANCE and report.unmatched <= parity.allowed_unmatched(detector.metadata)
    masks = f", mask difference {report.mask_difference:.1e}" if detector.metadata["mask_size"] else ""
    print(
        f"{'PASSED' if passed else 'FAILED'}: {report.compared} detections of TensorFlow and ONNX Runtime on"
        f" {args.check_image or 'the built-in image'}: largest box difference {report.box_difference:.1e},"
        f" score difference {report.score_difference:.1e}{masks} (tolerance {TOLERANCE:.0e}), {report.unmatched} unmatched"
    )
    return passed


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    run(main)
