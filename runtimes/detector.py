"""One interface to a converted model, whatever runs it: `input` says what it takes, `infer(batch)` gives detections."""

import concurrent.futures
import contextlib
import dataclasses
import os
import time
from pathlib import Path

import numpy as np

import onnx_utils
from commandline import UserError
from image_batcher import preprocess
from runtimes import ort_graph

# What a detector counts its seconds of, in `spent`: copies to and from the GPU, network, taking the results apart.
STAGES = ("copy", "network", "postprocess")
# Batches that ONNX Runtime computes at the same time, at most.
MOST_SIDE_BY_SIDE = 4


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What the network takes: `batch` images (None: any number) of height x width RGB pixels, 0..255."""

    name: str
    batch: int | None
    height: int
    width: int
    layout: str  # NHWC or NCHW
    dtype: np.dtype
    true_shape: str | None  # the input for the images' sizes within padded inputs, where there is one


@dataclasses.dataclass(frozen=True)
class Detections:
    """The detections of one image, best first."""

    boxes: np.ndarray  # [D, 4] yxyx, normalised to the image
    scores: np.ndarray  # [D] float32
    classes: np.ndarray  # [D] int32, 0-based
    masks: np.ndarray | None = None  # [D, h, w] float32, the probability of the object, over its box

    def where(self, kept):
        """The detections for which `kept` [D] (bool, or a slice) holds."""
        masks = None if self.masks is None else self.masks[kept]
        return Detections(self.boxes[kept], self.scores[kept], self.classes[kept], masks)

    def above(self, score):
        """The detections that score at least that."""
        return self.where(self.scores >= score)


def open_detector(path):
    """Opens model.onnx (on ONNX Runtime) or an engine (on TensorRT). Raises UserError, naming the file, where that cannot be."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--engine {path}: no such file; make one with create_onnx.py")
    if path.suffix == ".onnx":
        return OnnxDetector(path)
    from runtimes.trt_detector import TrtDetector

    return TrtDetector(path)


class OnnxDetector:
    """A model.onnx on ONNX Runtime. A context manager."""

    runtime = "ONNX Runtime"
    page_lock = None  # nothing is gained

    def __init__(self, path, model=None):
        """model: the contents of the file, or what is to run in its place; None: read it."""
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise UserError(f"--engine {path}: ONNX Runtime is not installed; pip install onnxruntime") from error

        model = model or onnx_utils.load(path)
        self.metadata = onnx_utils.read_metadata(model, path)
        self.input = input_spec(self.metadata)
        self.spent = dict.fromkeys(STAGES, 0.0)
        self._outputs = ["num_detections", "detection_boxes", "detection_scores", "detection_classes"]
        self._outputs += ["detection_masks"] if self.metadata.get("mask_size") else []
        cores = os.cpu_count() or 1
        # The intermediate results of a two-stage model take gigabytes.
        side_by_side = min(MOST_SIDE_BY_SIDE, cores) if self.metadata["meta_architecture"] == "ssd" else 1
        self.batches_ahead = side_by_side + 1
        self._pool = concurrent.futures.ThreadPoolExecutor(side_by_side)
        # 0: as many as ONNX Runtime thinks best.
        self._threads = {"infer": 0, "start": cores // side_by_side if side_by_side > 1 else 0}
        self._sessions = {}
        self._path = path
        with self._naming_file():
            self._data = ort_graph.prepare(model).SerializeToString()
        # In FP16 the scales that this optimizer gives to biases underflow: FPNLite's AP falls to 0.01.
        self._disabled = ["WeightBiasQuantization"] if ort_graph.is_half_quantized(model) else []
        self._session("infer")

    @contextlib.contextmanager
    def _naming_file(self):
        try:
            yield
        except Exception as error:  # ONNX Runtime's exception classes are not public
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{self._path} does not run on ONNX Runtime ({reason}); make it again with create_onnx.py"
            ) from error

    def _session(self, use):
        """The session for `infer`, on all cores, or for `start`, on few: there, batches run side by side.

        A batch on two cores waits for the slower one whenever something else is done on it, decoding say.
        """
        import onnxruntime

        threads = self._threads[use]
        if threads not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads
            settings = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": self._disabled}
            with self._naming_file():
                self._sessions[threads] = onnxruntime.InferenceSession(self._data, options, **settings)
            if self._sessions.keys() == set(self._threads.values()):
                self._data = None
        return self._sessions[threads]

    def infer(self, batch, true_shapes=None):
        """batch: [n, height, width, 3] RGB 0..255, n at most input.batch. Returns n Detections.

        true_shapes: [n, 2] height and width of the images within padded inputs (image_batcher.Placement.true_shape);
        None: they fill them.
        """
        return self._counted(*self._run(self._session("infer"), batch, true_shapes))

    def _run(self, session, batch, true_shapes):
        """(Detections of each image, {stage: seconds})."""
        given, feed = len(batch), {self.input.name: arrange(batch, self.input)}
        if self.input.true_shape:
            feed[self.input.true_shape] = arrange_true_shapes(true_shapes, given, self.input)
        begun = time.perf_counter()
        outputs = dict(zip(self._outputs, session.run(self._outputs, feed), strict=True))
        ended = time.perf_counter()
        found = split_detections(outputs, given)
        return found, {"network": ended - begun, "postprocess": time.perf_counter() - ended}

    def _counted(self, found, spent):
        for stage, seconds in spent.items():
            self.spent[stage] += seconds
        return found

    def start(self, batch, true_shapes=None):
        """Like infer, but returns at once; `finish` takes what this returns and gives the Detections."""
        return self._pool.submit(self._run, self._session("start"), batch, true_shapes)

    def finish(self, ticket):
        return self._counted(*ticket.result())

    def close(self):
        self._pool.shutdown(cancel_futures=True)
        self._sessions = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def detect_image(detector, image):
    """Detections of one RGB image [H, W, 3] of any size, preprocessing included."""
    tensor, placement = preprocess(image, detector.metadata["resizer"])
    return detector.infer(tensor[None], [placement.true_shape])[0]


def input_spec(metadata):
    resizer = metadata["resizer"]
    return InputSpec(
        "input_tensor",
        metadata["batch_size"],
        resizer["height"],
        resizer["width"],
        metadata["input_format"],
        np.dtype(metadata["input_type"]),
        "true_shape" if resizer["kind"] == "keep_aspect_ratio" else None,
    )


def arrange(batch, spec):
    """Gives [n, H, W, 3] the network's type and layout, filled up with zeros to a fixed batch size.

    What is so already (ImageBatcher with this spec) is not copied, but to be filled up.
    """
    batch = np.asarray(batch)
    if batch.ndim != 4 or batch.shape[1:] != (spec.height, spec.width, 3):
        raise ValueError(f"the network takes [n, {spec.height}, {spec.width}, 3] images, not {list(batch.shape)}")
    if spec.batch is not None and len(batch) > spec.batch:
        raise ValueError(f"the network takes at most {spec.batch} images at a time, not {len(batch)}")
    if spec.dtype == np.uint8 and batch.dtype != np.uint8:
        batch = np.rint(batch)
    batch = batch.astype(spec.dtype, copy=False)
    if spec.batch is not None and len(batch) < spec.batch:
        batch = np.concatenate([batch, np.zeros((spec.batch - len(batch), *batch.shape[1:]), spec.dtype)])
    if spec.layout == "NCHW":
        batch = batch.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(batch)


def arrange_true_shapes(true_shapes, given, spec):
    """The true_shape input [batch, 2] float32: the whole input where nothing is said, and where the batch is filled up."""
    shapes = np.tile(np.float32([spec.height, spec.width]), (spec.batch or given, 1))
    if true_shapes is not None:
        shapes[:given] = true_shapes
    return shapes


def split_detections(outputs, given):
    """The network's outputs {name: [B, ...]} -> a Detections for each of the first `given` images."""
    counts = outputs["num_detections"][:given, 0]
    keys = ("detection_boxes", "detection_scores", "detection_classes", "detection_masks")
    return [Detections(*(outputs[key][i, :count] for key in keys if key in outputs)) for i, count in enumerate(counts)]
