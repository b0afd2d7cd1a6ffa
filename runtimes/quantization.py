"""INT8: ranges measured on calibration images, QuantizeLinear/DequantizeLinear pairs in the graph, and the layers to leave.

All by ONNX Runtime, so that it needs no GPU and serves every TensorRT version alike.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
from pathlib import Path

from commandline import UserError, progress, warn, whole_file

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnx_utils import ordered_nodes
from runtimes import standard_graph
from runtimes.detector import Detections
from runtimes.precision import WEIGHTED, float32_nodes
from tfod.boxes import box_iou

# The layers with weights whose inputs are quantized.
QUANTIZED = {"Conv", "Gemm", "MatMul"}
# Ops behind which part of what they read does not count.
CLIPPING = {"Clip", "Relu"}
# A range holds so many of the values, in percent, and bins of the histograms that it is found in.
PERCENTILE = 99.999
HISTOGRAM_BINS = 2048
# Values of a tensor that are counted in a batch, at most: SSD ResNet50 640 has 200 million of all tensors an image, at 14 ns each.
SAMPLED = 1_000_000
# How far detections may be from FP32's (see `disagreement`): OWN_SHARE of how far FP32's own are where images are mirrored, but
# no less than HARMLESS and no more than TOLERATED. A limit for all models would not do: the demo's SSD, whose boxes are exact,
# has lost 0.017 of AP at 0.05, FPNLite coco17 0.005 at 0.16. Of its own, both lose 0.012 to 0.018 at 0.5 to 0.6 (BENCHMARKS.md).
OWN_SHARE = 1 / 3
HARMLESS, TOLERATED = 0.02, 0.2
# Images on which the layers are judged: two dozen objects suffice to rank them.
JUDGED_IMAGES = 12
# A reference detection counts from this score on.
CERTAIN = 0.1


def calibrate(model, batches):
    """Measures the ranges of `measured_tensors`: those that hold PERCENTILE of the values (Wu et al., "Integer quantization
    for deep learning inference", 2020), from histograms of onnxruntime.quantization.

    batches: iterable of dicts {input name: array} for the model. Returns {tensor name: (low, high)}.
    """
    import onnxruntime
    from onnxruntime.quantization.calibrate import HistogramCollector

    names = sorted(measured_tensors(model))
    network = standard_graph.prepare(model)
    del network.graph.output[:]
    network.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    collector = HistogramCollector("percentile", False, HISTOGRAM_BINS, None, PERCENTILE, None)
    for feed in batches:
        for name, values in zip(names, session.run(names, feed), strict=True):
            step = -(-values.size // SAMPLED)
            while math.gcd(step, values.shape[-1]) > 1:  # it would meet the same columns in every row
                step += 1
            try:
                collector.collect_value({name: values.ravel()[::step]})
            except (ValueError, MemoryError) as error:  # as numpy.histogram says it
                raise UserError(
                    f"INT8: values of {name} in the network cannot be counted ({error}); use fp16"
                ) from error
    with contextlib.redirect_stdout(io.StringIO()):
        ranges = collector.compute_collection_result()
    # Where fewer values than that are not 0, or all are alike, all of them count.
    widest = {name: (low, high) for name, (_, _, low, high, _) in collector.get_histogram_dict().items()}
    ranges = {name: found[:2] if found[0] < found[1] else widest[name] for name, found in ranges.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def measured_tensors(model):
    """The names of what the quantized layers take in, weights apart, which `quantize` quantizes, and of what they give,
    which `implicit_ranges` needs besides."""
    return {
        tensor.name
        for node in _quantized(model)
        for tensor in (*node.inputs[:2], *node.outputs)
        if isinstance(tensor, gs.Variable)
    }


def measured_inputs(model):
    """{name of a quantized layer: name of what it takes in, weights apart}."""
    return {node.name: node.inputs[0].name for node in _quantized(model)}


def implicit_ranges(model, ranges):
    """The ranges that TensorRT 8.6 is given in place of QuantizeLinear: {tensor name: (low, high)}.

    Where a tensor on either side of a layer has none, it warns that the layer is none for INT8 ("Missing scale and
    zero-point"). What a Clip or Relu alone reads gets the range of what that lets through.
    """
    known = dict(ranges)
    for node in gs.import_onnx(model).nodes:
        source = node.inputs[0] if node.op in CLIPPING else None
        if source and len(source.outputs) == 1 and node.outputs[0].name in known:
            known[source.name] = known[node.outputs[0].name]
    return {name: pair for name, pair in known.items() if any(pair)}


def _quantized(model):
    """The nodes that `quantize` quantizes, in the model's order."""
    graph = gs.import_onnx(model)
    wide = float32_nodes(graph)
    return [node for node in graph.nodes if node.op in QUANTIZED and id(node) not in wide]


def quantize(model, ranges, exclude=()):
    """Returns the model with QuantizeLinear/DequantizeLinear pairs around its layers with weights, INT8, symmetric,
    weights per channel. ranges: of `calibrate`. exclude: names of nodes that stay as they are.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    values = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    quantizer = QDQQuantizer(
        copy,
        True,  # per channel
        False,  # reduce_range
        QuantType.QInt8,
        QuantType.QInt8,
        TensorsData(CalibrationMethod.MinMax, values),
        [node.name for node in _quantized(model) if node.name not in exclude],
        [],
        sorted(QUANTIZED),
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "AddQDQPairToWeight": True,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": sorted(QUANTIZED),
        },
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result = quantizer.model.model
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    return result


def layers(model):
    """The layers that `quantize` quantizes: {name of their weights: names of the nodes that share them}."""
    groups = {}
    for node in _quantized(model):
        groups.setdefault(node.inputs[1].name, []).append(node.name)
    return groups


def disagreement(reference, found):
    """How far detections are from the reference, 0 (the same) to 1 (nothing alike).

    reference and found: lists of Detections, one per image. Each reference detection from CERTAIN on counts by its score:
    1 if none of its class overlaps it by half, else the relative difference in score plus what is missing of the overlap.
    """
    apart = total = 0.0
    for theirs, ours in zip(reference, found, strict=True):
        iou = box_iou(theirs.boxes, ours.boxes) * (theirs.classes[:, None] == ours.classes[None])
        for score, overlaps in zip(theirs.scores, iou, strict=True):
            if score >= CERTAIN:
                best = int(overlaps.argmax()) if len(overlaps) else None
                near = best is not None and overlaps[best] >= 0.5
                missing = abs(score - ours.scores[best]) / score + 1 - overlaps[best] if near else 1.0
                apart += float(score) * min(1.0, float(missing))
                total += float(score)
    return apart / total if total else 0.0


def mirror(images, true_shapes):
    """Images [height, width, 3] with left and right exchanged. true_shapes [B, 2]: see Detector.infer; padding stays."""
    copies = [np.array(image) for image in images]
    for image, (_, width) in zip(copies, true_shapes, strict=True):
        image[:, : int(width)] = image[:, : int(width)][:, ::-1].copy()
    return copies


def tolerance(reference, mirrored):
    """The disagreement with the reference that is let pass (see OWN_SHARE): what costs AP depends on how exact the model is.

    reference: Detections of each image; mirrored: of what `mirror` makes of it, by the same model.
    """
    back = [
        Detections(found.boxes[:, [0, 3, 2, 1]] * (1, -1, 1, -1) + (0, 1, 0, 1), found.scores, found.classes)
        for found in mirrored
    ]
    return float(np.clip(OWN_SHARE * disagreement(reference, back), HARMLESS, TOLERATED))


@dataclasses.dataclass(frozen=True)
class Choice:
    """Layers to leave unquantized, and why."""

    left: list  # names of nodes
    plain: float  # the disagreement with all layers quantized
    reached: float  # and without those
    tolerated: float  # what was to be reached


def choose_layers(model, ranges, detect):
    """The Choice of layers to leave unquantized so that detections stay near to FP32's (see `tolerance`).

    detect(model, mirrored): Detections of each of some calibration images, or of what `mirror` makes of them. Layers are
    ranked by the disagreement that each causes alone; the worst are left out, as few as will do.
    """
    reference = detect(model, False)
    if not any((found.scores >= CERTAIN).any() for found in reference):
        warn(
            f"nothing of {CERTAIN} and more is found in the calibration images: which layers bear INT8 is not known; give such with objects"
        )
    tolerated = tolerance(reference, detect(model, True))
    groups = layers(model)
    everything = {name for names in groups.values() for name in names}

    def judge(excluded):
        return disagreement(reference, detect(quantize(model, ranges, excluded), False))

    plain = judge(set())
    if plain <= tolerated:
        return Choice([], plain, plain, tolerated)
    bar = progress(groups.values(), unit="layer", desc="sensitivity")
    harm = [judge(everything - set(names)) for names in bar]
    order = sorted(zip(harm, groups.values(), strict=True), key=lambda pair: -pair[0])

    def worst(count):
        return {name for _, names in order[:count] for name in names}

    low, high, reached = 0, len(order), 0.0
    while high - low > 1:  # `low` left out are too few, `high` suffice
        middle = (low + high) // 2
        value = judge(worst(middle))
        low, high, reached = (low, middle, value) if value <= tolerated else (middle, high, reached)
    return Choice(sorted(worst(high)), plain, reached, tolerated)


def fingerprint(model):
    """What ties a calibration to a network: a hash of its nodes and weights, whatever batch, layout or type the file takes.

    The network goes from the first layers with weights to where float32_nodes begin: it has neither the input's
    preparation nor what follows the heads.
    """
    graph = gs.import_onnx(model)
    wide, network, digest = float32_nodes(graph), set(), hashlib.sha256()
    for node in ordered_nodes(graph):
        behind = any(id(source) in network for tensor in node.inputs for source in tensor.inputs)
        if id(node) in wide or not (behind or node.op in WEIGHTED):
            continue
        network.add(id(node))
        digest.update(json.dumps([node.op, node.name, sorted(node.attrs.items())], default=str).encode())
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                digest.update(tensor.values.tobytes())
    return digest.hexdigest()


def read_cache(path, model):
    """The calibration in the file `path`: (ranges, names of the nodes to leave), or None and why it does not serve.

    Raises UserError for a file that is no calibration of this tool: it is not to be overwritten.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        network, left = content["network"], content["left"]
        ranges = {name: (float(low), float(high)) for name, (low, high) in content["ranges"].items()}
        if not all(low <= high and math.isfinite(high - low) for low, high in ranges.values()):
            raise ValueError("a range of nothing")
        if not all(isinstance(name, str) for name in left):
            raise TypeError("no names")
    except FileNotFoundError:
        return None, "there is none yet"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"--calib_cache {path}: it is not a calibration of build_engine.py, and stays as it is; name another file"
        ) from error
    if network != fingerprint(model):
        return None, "it belongs to another network"
    if content.get("percentile") != PERCENTILE or not measured_tensors(model) <= ranges.keys():
        return None, "it was made by another version of build_engine.py"
    return (ranges, left), None


def write_cache(path, model, ranges, left):
    """Writes a calibration for read_cache."""
    content = {"network": fingerprint(model), "percentile": PERCENTILE, "ranges": ranges, "left": left}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
