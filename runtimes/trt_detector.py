"""An engine.trt on TensorRT, through pycuda: the same interface as the ONNX Runtime detector.

Tensor-name API only, which TensorRT 8.6, 10 and 11 share (TensorRT developer guide, "Performing Inference").
"""

import collections
import ctypes
import json
import math
import time
from pathlib import Path

import numpy as np

import onnx_utils
from commandline import UserError, warn
from runtimes.detector import STAGES, arrange, arrange_true_shapes, input_spec, split_detections

REBUILD = "build it here with build_engine.py"
# Batches that may be under way: one is copied in while one is computed and one's results are copied out.
SLOTS = 3
# Addresses that TensorRT is given are multiples of this, as cudaMalloc's are.
ALIGNMENT = 256
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


class Slot:
    """What a batch under way needs: GPU memory, page-locked memory for its results, events."""

    def __init__(self, cuda, input_bytes, output_bytes):
        """input_bytes: {name of input: bytes}; output_bytes: of all outputs together. Raises pycuda's MemoryError."""
        self.device_inputs = {name: cuda.mem_alloc(size) for name, size in input_bytes.items()}
        self.device_outputs = cuda.mem_alloc(output_bytes)
        self.host_outputs = cuda.pagelocked_empty(output_bytes, np.uint8)
        self.begun, self.copied, self.computing, self.computed, self.done = (cuda.Event() for _ in range(5))
        self.reading = None  # host memory that is being copied

    def seconds(self):
        """(copying, computing) once `done` has come."""
        copying = self.begun.time_till(self.copied) + self.computed.time_till(self.done)
        return copying / 1000, self.computing.time_till(self.computed) / 1000

    def free(self):
        for memory in (*self.device_inputs.values(), self.device_outputs):
            memory.free()


class TrtDetector:
    """An engine made by build_engine.py. A context manager: everything on the GPU is freed on exit.

    Copies to the GPU, the network and copies back go on in a stream each, for up to SLOTS batches at a time.
    """

    runtime = "TensorRT"
    batches_ahead = SLOTS  # that may be started before the first of them is finished

    def __init__(self, path):
        """Raises UserError, naming the file and what to do, where the engine cannot run here."""
        self._path = Path(path)
        data = self._path.read_bytes()
        self._trt, self._cuda = import_tensorrt(f"--engine {path}")
        self._gpu = GpuContext(self._cuda)
        self._gpu.__enter__()
        self._graphs, self._slots, self._context, self._engine = {}, [], None, None
        self._turn = 0
        self.spent = dict.fromkeys(STAGES, 0.0)
        try:
            self._load(data)
        except BaseException:
            self.close()
            raise

    def _load(self, data):
        trt, cuda = self._trt, self._cuda
        if not data:
            raise UserError(f"--engine {self._path}: the file is empty; {REBUILD}")
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
        self._copying_in, self._stream, self._copying_out = (cuda.Stream() for _ in range(3))
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode, given = self._engine.get_tensor_mode, trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if mode(name) == given]
        self._outputs = [name for name in names if mode(name) != given]
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self.most = self._engine.get_tensor_profile_shape(self._inputs[0], 0)[2][0]
        try:
            for _ in range(SLOTS):
                sizes = {name: self._bytes(name, self.most) for name in self._inputs}
                self._slots.append(Slot(cuda, sizes, self._places(self.most)[1]))
        except cuda.MemoryError as error:
            raise UserError(f"--engine {self._path}: too little GPU memory; build it for a smaller --batch") from error

    def _shape(self, name, size):
        """The shape of a tensor for `size` images."""
        return (size, *tuple(self._engine.get_tensor_shape(name))[1:])

    def _bytes(self, name, size):
        return math.prod(self._shape(name, size)) * self._types[name].itemsize

    def _places(self, size):
        """Where a slot's outputs for `size` images lie in its memory: ({name: offset}, bytes in all)."""
        places, end = {}, 0
        for name in self._outputs:
            places[name] = end
            end += -(-self._bytes(name, size) // ALIGNMENT) * ALIGNMENT
        return places, end

    def shapes(self):
        """{tensor name: shape} of the engine, -1 where the batch is open."""
        return {name: tuple(self._engine.get_tensor_shape(name)) for name in (*self._inputs, *self._outputs)}

    def page_lock(self, array):
        """Locks an array (whole pages) in memory, so that `start` copies from it beside the network; returns what undoes it."""
        # By the driver: pycuda 2026.1's register_host_memory ended in a segmentation fault, with numpy 2.4.
        driver, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(array.ctypes.data)
        error = driver.cuMemHostRegister_v2(address, ctypes.c_size_t(array.nbytes), 0)
        if error:  # the right to lock memory may be limited
            warn(
                f"memory cannot be page-locked (CUDA error {error}): copies to the GPU take longer; ulimit -l sets how much may be"
            )
            return None
        return lambda: driver.cuMemHostUnregister(address)

    def infer(self, batch, true_shapes=None):
        """batch: [n, height, width, 3] RGB 0..255, n at most `most`. Returns n Detections.

        true_shapes: [n, 2] height and width of the images within padded inputs (image_batcher.Placement.true_shape);
        None: they fill them.
        """
        return self.finish(self.start(batch, true_shapes))

    def start(self, batch, true_shapes=None):
        """Like infer, but returns when the work is queued; `finish` takes what this returns and gives the Detections.

        In order, and at most SLOTS at a time. A page-locked batch is read until `finish`.
        """
        given = len(batch)
        if given > self.most:
            raise ValueError(f"the engine takes at most {self.most} images at a time, not {given}")
        feed = {self.input.name: arrange(batch, self.input)}
        if self.input.true_shape:
            feed[self.input.true_shape] = arrange_true_shapes(true_shapes, given, self.input)
        size = len(feed[self.input.name])
        number, self._turn = self._turn, (self._turn + 1) % SLOTS
        slot, cuda = self._slots[number], self._cuda
        # From memory that is not page-locked the driver copies before it returns: right, but not beside the network.
        slot.reading = feed
        slot.begun.record(self._copying_in)
        for name, array in feed.items():
            cuda.memcpy_htod_async(slot.device_inputs[name], array, self._copying_in)
        slot.copied.record(self._copying_in)
        self._stream.wait_for_event(slot.copied)
        graph = self._graph(number, size)
        slot.computing.record(self._stream)
        if graph:
            graph.launch()
        else:
            self._bind(number, size)
            self._enqueue()
        slot.computed.record(self._stream)
        self._copying_out.wait_for_event(slot.computed)
        places, end = self._places(size)
        cuda.memcpy_dtoh_async(slot.host_outputs[:end], slot.device_outputs, self._copying_out)
        slot.done.record(self._copying_out)
        return slot, size, given, places

    def finish(self, ticket):
        slot, size, given, places = ticket
        slot.done.synchronize()
        slot.reading = None
        begun = time.perf_counter()
        memory = slot.host_outputs.copy()
        results = {}
        for name, place in places.items():
            part = memory[place : place + self._bytes(name, size)]
            results[name] = part.view(self._types[name]).reshape(self._shape(name, size))
        found = split_detections(results, given)
        for stage, seconds in zip(STAGES, (*slot.seconds(), time.perf_counter() - begun), strict=True):
            self.spent[stage] += seconds
        return found

    def _graph(self, number, size):
        """The network on `size` images in a slot's memory as a CUDA graph, captured at the first call; None: it cannot be."""
        if (number, size) not in self._graphs:
            self._bind(number, size)
            self._enqueue()  # the first run of a shape allocates, which cannot be captured
            self._stream.synchronize()
            self._graphs[number, size] = CudaGraph.capture(self._stream, self._enqueue)
        return self._graphs[number, size]

    def _bind(self, number, size):
        """Points the context at a slot's memory, with `size` images in it."""
        slot = self._slots[number]
        for name in self._inputs:
            self._context.set_tensor_address(name, int(slot.device_inputs[name]))
            self._context.set_input_shape(name, self._shape(name, size))
        for name, place in self._places(size)[0].items():
            self._context.set_tensor_address(name, int(slot.device_outputs) + place)

    def _enqueue(self):
        if not self._context.execute_async_v3(self._stream.handle):
            raise UserError(f"--engine {self._path}: the network failed ({self._logger.last()}); {REBUILD}")

    def _fill(self, batch):
        """Puts images (see infer) into the first slot for `benchmark` and `profile`; returns the CUDA graph on them or None."""
        self._turn = 0
        self.infer(batch)
        size = len(arrange(batch, self.input))
        self._bind(0, size)
        return self._graphs[0, size]

    def benchmark(self, batch, runs=200, graph=True):
        """GPU time of the network on a batch (see infer) by CUDA events, copies not included.

        What suppression costs depends on the images. Returns (median ms, 99th percentile ms, whether a CUDA graph was
        replayed).
        """
        captured = self._fill(batch)
        captured = captured if graph else None
        run = captured.launch if captured else self._enqueue
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
        return float(np.median(times)), float(np.percentile(times, 99)), captured is not None

    def weight_types(self):
        """{type of weights, such as "Half" or "Int8": number of layers}; empty where TensorRT tells nothing of them."""
        inspector = self._engine.create_engine_inspector()
        return count_weight_types(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def profile(self, batch, runs=20):
        """Mean GPU time of each layer in ms on a batch (see infer), {layer name: ms}, slowest first."""
        trt, times = self._trt, {}

        class Profiler(trt.IProfiler):
            def __init__(self):
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name, ms):
                times[name] = times.get(name, 0.0) + ms

        self._fill(batch)
        self._context.profiler = Profiler()
        for _ in range(runs):
            self._enqueue()
            self._stream.synchronize()
        return {name: ms / runs for name, ms in sorted(times.items(), key=lambda pair: -pair[1])}

    def close(self):
        for graph in filter(None, self._graphs.values()):
            graph.free()
        for slot in self._slots:
            slot.free()
        # The order matters: a context outlives neither its engine nor the CUDA context.
        self._graphs, self._slots, self._context = {}, [], None
        self._copying_in = self._stream = self._copying_out = None
        self._engine = self._runtime = None
        if self._gpu:
            self._gpu.__exit__()
            self._gpu = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def count_weight_types(information):
    """The engine inspector's JSON -> {type of weights: number of layers}; a fused layer counts for each that it was.

    (TensorRT developer guide, "Engine Inspector".)
    """
    try:
        # Names in "Metadata" are separated by control characters, which JSON forbids.
        layers = json.loads(information, strict=False)["Layers"]
    except (ValueError, KeyError):
        return {}
    # Where the engine was built without details, a layer is only its name.
    weights = [value for entry in layers if isinstance(entry, dict) for key, value in entry.items() if "Weights" in key]
    return dict(collections.Counter(value["Type"] for value in weights if isinstance(value, dict) and "Type" in value))


def explain(errors, version):
    """One line on why an engine does not load, from TensorRT's messages."""
    text = errors.lower()
    if "version" in text:
        return f"another TensorRT version built it (this is {version}); {REBUILD}"
    if "device" in text or "compute" in text or "platform" in text:
        return f"it was built for another GPU; {REBUILD}"
    if any(words in text for words in ("outofmemory", "out of memory", "could not be allocated")):
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
