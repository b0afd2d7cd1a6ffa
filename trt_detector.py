"""An engine.trt on TensorRT, through pycuda: the same interface as the ONNX Runtime detector.

Tensor-name API only, which TensorRT 8.6, 10 and 11 share (TensorRT developer guide, "Performing Inference").
"""

import ctypes
import json
import time
from pathlib import Path

import numpy as np

import onnx_utils
from cli import UserError
from detector import arrange, arrange_true_shapes, input_spec, split_detections

REBUILD = "build it here with build_engine.py"
# Batches that may be under way: one is computed while the results of the one before are taken and the next is copied.
SLOTS = 2
INSTALL = "pip install -r requirements-gpu.txt"


def import_tensorrt(option):
    """Imports tensorrt and pycuda's driver module and starts the driver; raises UserError, naming `option`, without."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise UserError(f"{option}: TensorRT cannot be imported ({error}); {INSTALL}") from error
    try:
        import pycuda.driver as cuda

        cuda.init()
        if not cuda.Device.count():
            raise RuntimeError("no device")
    except (ImportError, OSError) as error:
        raise UserError(f"{option}: pycuda cannot be imported ({error}); {INSTALL}") from error
    except Exception as error:  # pycuda.driver.Error, whose class is not importable where the driver is not
        raise UserError(f"{option}: no NVIDIA GPU here ({error}); run model.onnx on ONNX Runtime instead") from error
    return tensorrt, cuda


def make_logger(trt, verbose=False):
    """A TensorRT logger that keeps errors in its list `errors` and prints the rest only if `verbose`."""

    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors = []

        def log(self, severity, message):
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if verbose:
                print(message)

        def last(self):
            return self.errors[-1].splitlines()[0][:200] if self.errors else "no reason given"

    return Logger()


class GpuContext:
    """The first GPU's primary context, current while entered."""

    def __init__(self, cuda):
        self._primary = cuda.Device(0).retain_primary_context()

    def __enter__(self):
        self._primary.push()
        return self

    def __exit__(self, *_):
        self._primary.pop()
        self._primary.detach()


class TrtDetector:
    """An engine made by build_engine.py. A context manager: everything on the GPU is freed on exit."""

    runtime = "TensorRT"

    def __init__(self, path):
        """Raises UserError, naming the file and what to do, where the engine cannot run here."""
        self._path = Path(path)
        data = self._path.read_bytes()
        self._trt, self._cuda = import_tensorrt(f"--engine {path}")
        self._gpu = GpuContext(self._cuda)
        self._gpu.__enter__()
        self._graphs, self._slots, self._context, self._engine = {}, [], None, None
        self._turn, self._ended, self.busy_seconds = 0, 0.0, 0.0
        try:
            self._load(data)
        except BaseException:
            self.close()
            raise

    def _load(self, data):
        trt, cuda = self._trt, self._cuda
        self._logger = make_logger(trt)
        trt.init_libnvinfer_plugins(self._logger, "")
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise UserError(f"--engine {self._path}: {explain(' '.join(self._logger.errors), trt.__version__)}")
        try:
            self.metadata = json.loads(self._engine.name)[onnx_utils.METADATA_KEY]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--engine {self._path}: this tool did not make it; {REBUILD}") from error
        self.input = input_spec(self.metadata)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(f"--engine {self._path}: too little GPU memory ({self._logger.last()}); free some")
        self._stream = cuda.Stream()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode, given = self._engine.get_tensor_mode, trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if mode(name) == given]
        self._outputs = [name for name in names if mode(name) != given]
        self.most = self._engine.get_tensor_profile_shape(self._inputs[0], 0)[2][0]
        try:
            for _ in range(SLOTS):
                self._slots.append({})
                for name in names:
                    self._slots[-1][name] = self._allocate(name)
        except cuda.MemoryError as error:
            raise UserError(f"--engine {self._path}: too little GPU memory; build it for a smaller --batch") from error

    def _allocate(self, name):
        """Memory for `most` images: page-locked here, and on the GPU."""
        dtype = self._trt.nptype(self._engine.get_tensor_dtype(name))
        shape = tuple(self._engine.get_tensor_shape(name))
        host = self._cuda.pagelocked_empty((self.most, *shape[1:]), dtype)
        return host, self._cuda.mem_alloc(host.nbytes)

    def shapes(self):
        """{tensor name: shape} of the engine, -1 where the batch is open."""
        return {name: tuple(self._engine.get_tensor_shape(name)) for name in (*self._inputs, *self._outputs)}

    def infer(self, batch, true_shapes=None):
        """batch: [n, height, width, 3] RGB 0..255, n at most `most`. Returns n Detections.

        true_shapes: [n, 2] height and width of the images within padded inputs (image_batcher.Placement.true_shape);
        None: they fill them.
        """
        return self.finish(self.start(batch, true_shapes))

    def start(self, batch, true_shapes=None):
        """Like infer, but returns when the work is queued; `finish` takes what this returns and gives the Detections.

        In order, and at most SLOTS at a time: each has its own buffers.
        """
        begun, given = time.perf_counter(), len(batch)
        if given > self.most:
            raise ValueError(f"the engine takes at most {self.most} images at a time, not {given}")
        feed = {self.input.name: arrange(batch, self.input)}
        if self.input.true_shape:
            feed[self.input.true_shape] = arrange_true_shapes(true_shapes, given, self.input)
        size = len(feed[self.input.name])
        slot, self._turn = self._turn, (self._turn + 1) % SLOTS
        buffers = self._slots[slot]
        for name, array in feed.items():
            host, device = buffers[name]
            host[:size] = array
            self._cuda.memcpy_htod_async(device, host[:size], self._stream)
        self._execute(slot, size)
        for name in self._outputs:
            host, device = buffers[name]
            self._cuda.memcpy_dtoh_async(host[:size], device, self._stream)
        done = self._cuda.Event()
        done.record(self._stream)
        return slot, size, given, done, begun

    def finish(self, ticket):
        slot, size, given, done, begun = ticket
        done.synchronize()
        results = {name: self._slots[slot][name][0][:size].copy() for name in self._outputs}
        ended = time.perf_counter()
        self.busy_seconds += ended - max(begun, self._ended)
        self._ended = ended
        return split_detections(results, given)

    def _execute(self, slot, size):
        """Runs the network on `size` images in a slot's buffers: a CUDA graph, captured at the first call for them."""
        if (slot, size) not in self._graphs:
            self._bind(slot, size)
            self._enqueue()  # the first run of a shape allocates, which cannot be captured
            self._stream.synchronize()
            self._graphs[slot, size] = CudaGraph.capture(self._stream, self._enqueue)
        if graph := self._graphs[slot, size]:
            graph.launch()
        else:
            self._bind(slot, size)
            self._enqueue()

    def _bind(self, slot, size):
        """Points the context at a slot's buffers, with `size` images in them."""
        for name, (host, device) in self._slots[slot].items():
            self._context.set_tensor_address(name, int(device))
            if name in self._inputs:
                self._context.set_input_shape(name, (size, *host.shape[1:]))

    def _enqueue(self):
        if not self._context.execute_async_v3(self._stream.handle):
            raise UserError(f"--engine {self._path}: the network failed ({self._logger.last()}); {REBUILD}")

    def benchmark(self, size, runs=200, graph=True):
        """GPU time of the network on `size` images by CUDA events, copies not included.

        Returns (median ms, 99th percentile ms, whether a CUDA graph was replayed).
        """
        self._execute(0, size)
        captured = graph and self._graphs[0, size] is not None
        self._bind(0, size)
        run = self._graphs[0, size].launch if captured else self._enqueue
        for _ in range(20):
            run()
        times = []
        for _ in range(runs):
            begin, end = self._cuda.Event(), self._cuda.Event()
            begin.record(self._stream)
            run()
            end.record(self._stream)
            end.synchronize()
            times.append(end.time_since(begin))
        return float(np.median(times)), float(np.percentile(times, 99)), captured

    def profile(self, size, runs=20):
        """Mean GPU time of each layer in ms on `size` images, {layer name: ms}, slowest first."""
        trt, times = self._trt, {}

        class Profiler(trt.IProfiler):
            def __init__(self):
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name, ms):
                times[name] = times.get(name, 0.0) + ms

        self._bind(0, size)
        self._enqueue()
        self._stream.synchronize()
        self._context.profiler = Profiler()
        for _ in range(runs):
            self._enqueue()
            self._stream.synchronize()
        return {name: ms / runs for name, ms in sorted(times.items(), key=lambda pair: -pair[1])}

    def close(self):
        for graph in filter(None, self._graphs.values()):
            graph.free()
        for buffers in self._slots:
            for _, device in buffers.values():
                device.free()
        # The order matters: a context outlives neither its engine nor the CUDA context.
        self._graphs, self._slots, self._context, self._stream = {}, [], None, None
        self._engine = self._runtime = None
        if self._gpu:
            self._gpu.__exit__()
            self._gpu = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def explain(errors, version):
    """One line on why an engine does not load, from TensorRT's messages."""
    text = errors.lower()
    if "version" in text:
        return f"another TensorRT version built it (this is {version}); {REBUILD}"
    if "device" in text or "compute" in text or "platform" in text:
        return f"it was built for another GPU; {REBUILD}"
    if "memory" in text:
        return "too little GPU memory; free some, or build it for a smaller --batch"
    return f"it is no whole TensorRT engine (truncated?); {REBUILD}"


class CudaGraph:
    """Work captured from a stream, replayed at once. pycuda has no call for it, the driver has (CUDA driver API, Graphs)."""

    _driver = None
    THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on allocating

    def __init__(self, stream, graph, executable):
        self._stream, self._graph, self._executable = stream, graph, executable

    @classmethod
    def capture(cls, stream, enqueue):
        """Captures what `enqueue()` puts on the pycuda stream; None where that cannot be captured."""
        if cls._driver is None:
            cls._driver = ctypes.CDLL("libcuda.so.1")
        driver, handle = cls._driver, ctypes.c_void_p(stream.handle)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if driver.cuStreamBeginCapture_v2(handle, cls.THREAD_LOCAL):
            return None
        try:
            enqueue()
            failed = False
        except UserError:
            failed = True
        failed |= bool(driver.cuStreamEndCapture(handle, ctypes.byref(graph)))
        if failed or not graph:
            return None
        if driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)):
            driver.cuGraphDestroy(graph)
            return None
        return cls(handle, graph, executable)

    def launch(self):
        error = self._driver.cuGraphLaunch(self._executable, self._stream)
        if error:
            raise RuntimeError(f"CUDA graph launch failed with error {error}")

    def free(self):
        self._driver.cuGraphExecDestroy(self._executable)
        self._driver.cuGraphDestroy(self._graph)
