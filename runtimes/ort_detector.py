"""A model.onnx on ONNX Runtime: see detector.Detector."""

import concurrent.futures
import contextlib
import os
import time

from commandline import UserError

import onnx_utils
from runtimes import ort_graph
from runtimes.detector import STAGES, input_spec, network_inputs, split_detections

# Batches that are computed at the same time, at most.
MOST_SIDE_BY_SIDE = 4
# For so long at most the network's own rate is measured.
RATE_SECONDS = 20


class OrtDetector:
    """A detector.Detector on ONNX Runtime."""

    runtime = "ONNX Runtime"
    gpu = None
    usual_batch = None

    def __init__(self, path, model=None, cores=None):
        """model: the contents of the file, or what is to run in its place; None: read it. cores: that it may use; default:
        all. Raises UserError."""
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"--engine {path}: ONNX Runtime is not installed; pip install onnxruntime") from error

        self.version = onnxruntime.__version__
        model = model or onnx_utils.load(path)
        self.metadata = onnx_utils.read_metadata(model, path)
        self.input = input_spec(self.metadata)
        self.max_batch = self.input.batch
        self.spent = dict.fromkeys(STAGES, 0.0)
        self._outputs = ["num_detections", "detection_boxes", "detection_scores", "detection_classes"]
        self._outputs += ["detection_masks"] if self.metadata.get("mask_size") else []
        all_cores = cores is None
        cores = cores or os.cpu_count() or 1
        # The intermediate results of a two-stage model take gigabytes.
        side_by_side = min(MOST_SIDE_BY_SIDE, cores) if self.metadata["meta_architecture"] == "ssd" else 1
        self.batches_ahead = side_by_side + 1
        self._pool = concurrent.futures.ThreadPoolExecutor(side_by_side)
        # 0: as many as ONNX Runtime thinks best.
        whole = 0 if all_cores else cores
        self._threads = {"infer": whole, "start": cores // side_by_side if side_by_side > 1 else whole}
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
            arguments = {"providers": ["CPUExecutionProvider"], "disabled_optimizers": self._disabled}
            with self._naming_file():
                self._sessions[threads] = onnxruntime.InferenceSession(self._data, options, **arguments)
            if self._sessions.keys() == set(self._threads.values()):
                self._data = None
        return self._sessions[threads]

    def infer(self, batch, true_shapes=None):
        inputs = network_inputs(batch, true_shapes, self.input)
        return self._counted(*self._run(self._session("infer"), inputs, len(batch)))

    def _run(self, session, inputs, images):
        """(Detections of each of the first `images` images, {stage: seconds})."""
        begun = time.perf_counter()
        outputs = dict(zip(self._outputs, session.run(self._outputs, inputs), strict=True))
        ended = time.perf_counter()
        found = split_detections(outputs, images)
        return found, {"network": ended - begun, "postprocess": time.perf_counter() - ended}

    def _counted(self, found, spent):
        for stage, seconds in spent.items():
            self.spent[stage] += seconds
        return found

    def start(self, batch, true_shapes=None):
        inputs = network_inputs(batch, true_shapes, self.input)
        return self._pool.submit(self._run, self._session("start"), inputs, len(batch))

    def finish(self, ticket):
        return self._counted(*ticket.result())

    def images_per_second(self, batch, true_shapes=None, images=500):
        self.infer(batch, true_shapes)
        begun, done = time.perf_counter(), 0
        while done == 0 or (done < images and time.perf_counter() - begun < RATE_SECONDS):
            self.infer(batch, true_shapes)
            done += len(batch)
        return done / (time.perf_counter() - begun)

    def close(self):
        self._pool.shutdown(cancel_futures=True)
        self._sessions = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
