"""A model.onnx on a runtime for ONNX files: what all of them have in common. See detector.Detector.

OrtDetector and OpenVinoDetector say how the file is loaded there.
"""

import collections
import concurrent.futures
import contextlib
import time

from commandline import UserError

import onnx_utils
from runtimes import standard_graph
from runtimes.detector import STAGES, input_spec, network_inputs, output_names, split_detections
from runtimes.processes import processor_count, quota

# Batches that are computed at the same time, at most.
MOST_SIDE_BY_SIDE = 4
# For so long at most the network's own rate is measured.
RATE_SECONDS = 20


class OnnxDetector:
    """A detector.Detector on the runtime that `_load` loads the model into."""

    runtime: str
    gpu = None
    usual_batch = None

    def __init__(self, path, model=None, cores=None):
        """model: the contents of the file, or what is to run in its place; None: read it. cores: that it may use; None:
        all that this process may. Raises UserError."""
        model = model or onnx_utils.load(path)
        self.metadata = onnx_utils.read_metadata(model, path)
        self.input = input_spec(self.metadata)
        self.max_batch = self.input.batch
        self.spent = dict.fromkeys(STAGES, 0.0)
        self._outputs = output_names(self.metadata)
        self._cores = cores or (processor_count() if quota() else None)  # the runtimes see no quotas
        # The intermediate results of a two-stage model take gigabytes.
        most = min(MOST_SIDE_BY_SIDE, cores or processor_count())
        self._callers = {"infer": 1, "start": 1 if self.metadata["meta_architecture"] == "faster_rcnn" else most}
        self.batches_ahead = self._callers["start"] + 1
        self._pool = concurrent.futures.ThreadPoolExecutor(self._callers["start"])
        self._networks = {}
        self._path = path
        self._half_quantized = standard_graph.is_half_quantized(model)
        with self._naming_file():
            standard = model if self.metadata["ops"] == "standard" else standard_graph.prepare(model)
            self._data = standard.SerializeToString()
        self._network("infer")

    def _load(self, data, callers):
        """Loads a serialised ONNX model; returns a function {input name: array} -> arrays of `self._outputs`.

        callers: threads that will call it at the same time; 1: one, which gets all cores, or a few that take turns.
        """
        raise NotImplementedError

    def _threads(self, callers):
        """Threads for each of `callers`; 0: as many as the runtime thinks best."""
        return (self._cores or processor_count()) // callers if callers > 1 else self._cores or 0

    @contextlib.contextmanager
    def _naming_file(self):
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # the runtimes' exception classes are not public
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"{self._path} does not run on {self.runtime} ({reason}); make it again with create_onnx.py"
            ) from error

    def _network(self, use):
        """The loaded model for `infer`, on all cores, or for `start`, on few: there, batches run side by side.

        A batch on two cores waits for the slower one whenever something else is done on it, decoding say.
        """
        callers = self._callers[use]
        if callers not in self._networks:
            with self._naming_file():
                self._networks[callers] = self._load(self._data, callers)
            if self._networks.keys() == set(self._callers.values()):
                self._data = None
        return self._networks[callers]

    def infer(self, batch, true_shapes=None):
        inputs = network_inputs(batch, true_shapes, self.input)
        return self._counted(*self._run(self._network("infer"), inputs, len(batch)))

    def _run(self, network, inputs, images):
        """(Detections of each of the first `images` images, {stage: seconds})."""
        begun = time.perf_counter()
        outputs = dict(zip(self._outputs, network(inputs), strict=True))
        ended = time.perf_counter()
        found = split_detections(outputs, images)
        return found, {"network": ended - begun, "postprocess": time.perf_counter() - ended}

    def _counted(self, found, spent):
        for stage, seconds in spent.items():
            self.spent[stage] += seconds
        return found

    def start(self, batch, true_shapes=None):
        inputs = network_inputs(batch, true_shapes, self.input)
        return self._pool.submit(self._run, self._network("start"), inputs, len(batch))

    def finish(self, ticket):
        return self._counted(*ticket.result())

    def images_per_second(self, batch, true_shapes=None, images=500):
        side_by_side = self._callers["start"]
        for ticket in [self.start(batch, true_shapes) for _ in range(side_by_side)]:  # to warm up
            self.finish(ticket)
        begun, done = time.perf_counter(), 0
        tickets = collections.deque(self.start(batch, true_shapes) for _ in range(side_by_side))
        while tickets:
            self.finish(tickets.popleft())
            done += len(batch)
            if done + len(tickets) * len(batch) < images and time.perf_counter() - begun < RATE_SECONDS:
                tickets.append(self.start(batch, true_shapes))
        return done / (time.perf_counter() - begun)

    def close(self):
        self._pool.shutdown(cancel_futures=True)
        self._networks = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
