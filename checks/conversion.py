"""The converter's check: the file that it wrote against TensorFlow, on pictures."""

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime

from checks import parity
from images.decoding import load_image
from images.resizing import preprocess
from onnx_utils import PLUGIN_MAX_PAIRS, TENSORRT_MAX_TOP_K, read_metadata
from runtimes import standard_graph, trt_graph
from runtimes.detector import detect_image, network_inputs
from runtimes.ort_detector import OrtDetector
from tfod.convert import META_ARCHITECTURES, other_class_limit

# The bound on normalised coordinates and scores. Float32 rounding alone reaches 1.2e-3 in a two-stage network
# (TensorFlow's two sets of CPU kernels differ by as much); a wrong conversion is off by orders of magnitude more.
TOLERANCE = 2e-3
# TensorFlow's threshold is a float32, the config's is not.
THRESHOLD_ROUNDING = 1e-6
# Fewer detections than this prove little: then all that they are chosen from is compared.
ENOUGH = 10
# Pairs of box and class that suppression sees for a detection: where the plugin has fewer, it may leave out some.
PAIRS_EACH = 10
PHOTOS = Path(__file__).resolve().parent / "photos"
BUILT_IN = "3 built-in pictures"


def built_in_pictures():
    """A made-up picture and two photographs, RGB [H, W, 3] uint8."""
    return [made_up_picture(480, 640), *(load_image(path) for path in sorted(PHOTOS.glob("*.jpg")))]


def made_up_picture(height, width):
    """A made-up RGB picture [height, width, 3] uint8 with edges, textures and colours at all scales."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    image = np.stack([200 * x, 200 * y, 200 * (1 - x)], axis=-1)
    for _ in range(40):
        cy, cx, ry, rx = *rng.random(2), *(0.02 + 0.25 * rng.random(2) ** 2)
        inside = (
            np.hypot((y - cy) / ry, (x - cx) / rx) < 1
            if rng.random() < 0.5
            else (abs(y - cy) < ry) & (abs(x - cx) < rx)
        )
        image[inside] = rng.integers(0, 256, 3) + 20 * np.sin(rng.uniform(20, 200) * (x + y))[inside, None]
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of a check."""

    word: str  # PASSED, FAILED or NOT CHECKED
    text: str  # a sentence on what was compared, or on what to do
    other_config: bool = False  # it failed as the pipeline.config is another export's

    def __str__(self):
        return f"{self.word}: {self.text}"


def check_conversion(saved_model, path, reference, raw, pictures=None, where=BUILT_IN):
    """Compares a converted model with its open SavedModel; returns a Verdict.

    reference: the ONNX model with the config's own thresholds; path: its file, for messages. raw: a function that returns
    the ONNX model whose outputs are raw (convert.write_model), called where too few detections were found. pictures: RGB
    arrays, default the built-in ones; where: what to call them.
    """
    pictures = pictures or built_in_pictures()
    with OrtDetector(path, reference) as detector:
        metadata, spec = detector.metadata, detector.input
        found = parity.join([parity.compare(saved_model, detector, x, TOLERANCE) for x in pictures])
    if found.lowest_score < metadata["config_score_threshold"] - THRESHOLD_ROUNDING:
        return another_threshold(metadata, found.lowest_score, where)
    allowed = parity.allowed_unmatched(metadata) * len(pictures)
    reports, compared = [found], f"{found.compared} detections"
    if found.compared + found.unmatched < ENOUGH:
        if not saved_model.has_raw_outputs:
            return Verdict(
                "NOT CHECKED",
                f"{found.compared} detections in {where} are too few to compare, and the SavedModel has no"
                " raw_detection_boxes; name pictures of what it detects with --check_image",
            )
        reports.append(compare_raw(saved_model, raw(), pictures, metadata, spec))
        allowed += reports[1].compared // 25 if allowed else 0
        compared += f", and the {reports[1].compared:,} boxes and scores they are chosen from,"
    report = parity.join(reports)
    largest = max(getattr(report, name) for name in parity.LARGEST)
    passed = largest <= TOLERANCE and report.unmatched <= allowed
    passed &= report.keypoints_elsewhere <= parity.allowed_elsewhere(report)
    more = f", mask difference {report.mask_difference:.1e}" if metadata["mask_size"] else ""
    ends = f", {report.unmatched} unmatched"
    if metadata.get("keypoints"):
        more += f", keypoint difference {report.keypoint_difference:.1e}"
        ends += f", {report.keypoints_elsewhere} of {report.keypoints:,} keypoints elsewhere"
    return Verdict(
        "PASSED" if passed else "FAILED",
        f"{compared} of TensorFlow and ONNX Runtime in {where}: largest box difference {report.box_difference:.1e},"
        f" score difference {report.score_difference:.1e}{more} (tolerance {TOLERANCE:.0e}){ends}",
    )


def another_threshold(metadata, lowest, where):
    """The Verdict where TensorFlow gives a detection that scores `lowest`, less than the config's threshold: the comparison,
    which begins at that, would see none of these."""
    threshold = metadata["config_score_threshold"]
    option = META_ARCHITECTURES[metadata["meta_architecture"]].THRESHOLD_OPTION
    differs = f"score_threshold is {threshold:g}, TensorFlow gives scores from {lowest:.3g} on in {where}"
    return another_config(differs, f", and a threshold of yours with --{option} {threshold:g}")


def check_class_limit(model):
    """The Verdict on a config that lets another number of one class through than the graph; None where it does not. The
    comparison may not tell: pictures need not have so many."""
    limits = other_class_limit(model)
    return another_config("max_detections_per_class is {}, the graph's {}".format(*limits)) if limits else None


def another_config(differs, more=""):
    """The Verdict on a pipeline.config that is another export's, and in what it differs."""
    text = f"the pipeline.config is not that of the export: its {differs}; give the export's own{more}"
    return Verdict("FAILED", text, other_config=True)


def compare_raw(saved_model, model, pictures, metadata, spec):
    """A parity.Report on raw_detection_boxes and raw_detection_scores. model: the ONNX model that gives them."""
    data = standard_graph.prepare(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    reports = []
    for picture in pictures:
        pixels = parity.network_pixels(picture, metadata["resizer"])
        wanted = saved_model.detect(pixels)
        tensor, placement = preprocess(pixels, metadata["resizer"])
        boxes, scores = session.run(None, network_inputs(tensor[None], [placement.true_shape], spec))
        theirs = wanted["raw_detection_boxes"], wanted["raw_detection_scores"]
        reports.append(parity.match_raw(theirs, (boxes[0], scores[0]), TOLERANCE))
    return parity.join(reports)


def check_override(path, written, reference, option, threshold, pictures=None, where=BUILT_IN):
    """Whether `written`, whose threshold an option overrides, gives exactly what `reference` scores from there on.

    Returns a Verdict. threshold: the higher of the option's and the config's.
    """
    pictures = pictures or built_in_pictures()
    reports, before = [], 0
    with OrtDetector(path, reference) as theirs, OrtDetector(path, written) as ours:
        for picture in pictures:
            pixels = parity.network_pixels(picture, theirs.metadata["resizer"])
            wanted = detect_image(theirs, pixels)
            before += len(wanted.scores)
            found = detect_image(ours, pixels).above(threshold)
            reports.append(parity.match_by_rank(wanted.above(threshold), found, TOLERANCE))
    report = parity.join(reports)
    same = report.unmatched == 0 and max(report.box_difference, report.score_difference) < 1e-6
    return Verdict(
        "PASSED" if same else "FAILED",
        f"{option} leaves {report.compared} of these {before} detections in {where}: "
        + (f"those that score {threshold:g} and more" if same else f"not those that score {threshold:g} and more"),
    )


def plugin_may_fall_short(model):
    """Whether a converted model is asked for more detections than EfficientNMS_TRT finds for certain."""
    plugin = any(node.op_type == "EfficientNMS_TRT" for node in model.graph.node)
    return plugin and PAIRS_EACH * read_metadata(model, "the model")["max_detections"] > PLUGIN_MAX_PAIRS


def plugin_shortfall(path, model, batch, pictures=None, where=BUILT_IN, pairs=PLUGIN_MAX_PAIRS):
    """What an engine of the converted model for batches of `batch` leaves out, of what ONNX Runtime finds, as a sentence.

    None if that is nothing. The graph is TensorRT's own, the plugin stands in standard ops with its limit of `pairs`.
    """
    engine = standard_graph.prepare(trt_graph.prepare(model, batch), pairs)
    engine.metadata_props.extend(model.metadata_props)
    everything, missing = 0, []
    with OrtDetector(path, model) as all_pairs, OrtDetector(path, engine) as best_pairs:
        for picture in pictures or built_in_pictures():
            ours, theirs = detect_image(all_pairs, picture), detect_image(best_pairs, picture)
            everything += len(ours.scores)
            missing.extend(ours.scores[~parity.has_equal(ours, theirs)])
    if not missing:
        return None
    return (
        f"TensorRT's NMS looks at the best {pairs:,} pairs of box and class, and gives {TENSORRT_MAX_TOP_K:,} boxes at most: an"
        f" engine for batches of {batch} leaves out {len(missing):,} of the {everything:,} detections in {where}, from a score"
        f" of {max(missing):.2g} down; ONNX Runtime finds them all"
    )
