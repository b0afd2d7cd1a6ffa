"""An engine.trt on TensorRT, through pycuda: see detector.Detector.

Tensor-name API only, which TensorRT 8.5, 8.6, 10 and 11 share (TensorRT developer guide, "Performing Inference").
"""

import collections
import functools
import itertools
import json
import math
import threading
import time
from pathlib import Path

from commandline import UserError

import numpy as np

import onnx_utils
from runtimes.cuda_graph import CudaGraph
from runtimes.detector import STAGES, image_input, input_spec, shape_input, split_detections
from runtimes.device_images import IMAGE, DeviceImage, resize_images

REBUILD = "build it here with build_engine.py"
# Batches that may be under way, each with an execution context of its own where there is memory: much of a network, suppression
# above all, keeps only a part of the GPU busy.
SLOTS = 3
# Contexts beside the first take at most this part of the memory that is free.
CONTEXTS_PART = 0.25
# Addresses that TensorRT is given are multiples of this, as cudaMalloc's are.
ALIGNMENT = 256
INSTALL = "pip install -r requirements-gpu.txt"


def import_tensorrt(option):
    """Imports tensorrt and pycuda's driver module and starts the driver; raises UserError, naming `option`, without."""
    try:
        import tensorrt
    except (ImportError, OSError) as error:
        raise UserError(f"{option}: TensorRT cannot be imported ({error}); {INSTALL}") from error
    if not hasattr(tensorrt.IExecutionContext, "execute_async_v3"):
        raise UserError(f"{option}: TensorRT {tensorrt.__version__} is too old; 8.5 or later is needed")
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
    """A GPU's primary context, current in the calling thread while entered."""

    def __init__(self, cuda, gpu=0):
        """gpu: its number, from 0. Raises UserError where there is no such GPU."""
        if gpu >= cuda.Device.count():
            raise UserError(f"--gpus {gpu}: there are {cuda.Device.count()} GPUs here, numbered from 0")
        self.number, self.count, self.closed = gpu, cuda.Device.count(), False
        self.decoders = {}  # gpu_images.GpuDecoders in it, by exif_rotate; None: there is none to be had
        self._primary = cuda.Device(gpu).retain_primary_context()

    def __enter__(self):
        self._primary.push()
        return self

    def __exit__(self, *_):
        self._primary.pop()

    def close(self):
        """Closes the decoders and lets the context go; what else lies in it must have been freed, or is freed by it."""
        with self:
            for decoder in filter(None, self.decoders.values()):
                decoder.close()
        self._primary.detach()
        self.closed = True


def _on_gpu(method):
    """Lets any thread call a method of TrtDetector, one at a time: a CUDA context is current in one thread only."""

    @functools.wraps(method)
    def called(self, *arguments, **options):
        with self._lock, self.gpu:
            return method(self, *arguments, **options)

    return called


class Slot:
    """What a batch under way needs: GPU memory, page-locked memory to copy from and to, events; what computes it."""

    def __init__(self, cuda, inputs, output_bytes):
        """inputs: {name: (shape, type)}; output_bytes: of all outputs together. Raises pycuda's MemoryError."""
        # An execution context, perhaps of other slots too, and the stream that it runs in: see TrtDetector._load.
        self.context = self.stream = None
        self.host_inputs = {name: cuda.pagelocked_empty(*kind) for name, kind in inputs.items()}
        self.device_inputs = {name: cuda.mem_alloc(array.nbytes) for name, array in self.host_inputs.items()}
        self.device_outputs = cuda.mem_alloc(output_bytes)
        self.host_outputs = cuda.pagelocked_empty(output_bytes, np.uint8)
        self.images = None  # DeviceImages that are being read
        most = max(shape[0] for shape, _ in inputs.values())
        self.table = cuda.pagelocked_empty(most * IMAGE.itemsize, np.uint8).view(IMAGE)
        self.device_table = cuda.mem_alloc(self.table.nbytes)
        self.begun, self.copied, self.computing, self.computed, self.done = (cuda.Event() for _ in range(5))

    def seconds(self):
        """(copying, computing) once `done` has come."""
        copying = self.begun.time_till(self.copied) + self.computed.time_till(self.done)
        return copying / 1000, self.computing.time_till(self.computed) / 1000

    def free(self):
        for memory in (*self.device_inputs.values(), self.device_outputs, self.device_table):
            memory.free()


class TrtDetector:
    """A detector.Detector on TensorRT, of an engine made by build_engine.py.

    Copies to the GPU and back go on in a stream each, for up to SLOTS batches at a time, which are computed side by side. Any
    thread may call `infer`; `start` and `finish` belong to one.
    """

    runtime = "TensorRT"
    batches_ahead = SLOTS

    def __init__(self, path, gpu=0):
        """gpu: the number of the GPU. Raises UserError, naming the file and what to do, where the engine cannot run here."""
        self._path = Path(path)
        data = self._path.read_bytes()
        self._trt, self._cuda = import_tensorrt(f"--engine {path}")
        self.version = self._trt.__version__
        self._lock, self.gpu = threading.RLock(), GpuContext(self._cuda, gpu)
        self._cuda_graphs, self._slots, self._engine = {}, [], None
        self._turn = 0
        self.spent = dict.fromkeys(STAGES, 0.0)
        try:
            self._load(data)
        except BaseException:
            self.close()
            raise

    @_on_gpu
    def _load(self, data):
        trt, cuda = self._trt, self._cuda
        self._logger = make_logger(trt)
        trt.init_libnvinfer_plugins(self._logger, "")
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(data)
        if self._engine is None:
            raise UserError(f"--engine {self._path}: {explain(' '.join(self._logger.errors), trt.__version__)}")
        try:
            found = json.loads(self._engine.name)[onnx_utils.METADATA_KEY]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"--engine {self._path}: this tool did not make it; {REBUILD}") from error
        self.metadata = onnx_utils.check_metadata(found, f"--engine {self._path}")
        self.input = input_spec(self.metadata)
        self._copying_in, self._copying_out = cuda.Stream(), cuda.Stream()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode, of_input = self._engine.get_tensor_mode, trt.TensorIOMode.INPUT
        self._inputs = [name for name in names if mode(name) == of_input]
        self._outputs = [name for name in names if mode(name) != of_input]
        self._types = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        free = {name: [None if size < 0 else size for size in self._engine.get_tensor_shape(name)] for name in names}
        inputs = {name: (self._types[name], free[name]) for name in self._inputs}
        onnx_utils.check_inputs(self.metadata, inputs, f"--engine {self._path}")
        profile = self._engine.get_tensor_profile_shape(self._inputs[0], 0)
        self.usual_batch = profile[1][0]
        self.max_batch = profile[2][0]
        try:
            for _ in range(SLOTS):
                inputs = {name: (self._shape(name, self.max_batch), self._types[name]) for name in self._inputs}
                self._slots.append(Slot(cuda, inputs, self._places(self.max_batch)[1]))
        except cuda.MemoryError as error:
            raise UserError(f"--engine {self._path}: too little GPU memory; build it for a smaller --batch") from error
        contexts = self._open_contexts()  # last: an error of what follows would hold them longer than the engine lives
        for number, slot in enumerate(self._slots):
            slot.context, slot.stream = contexts[number % len(contexts)]

    def _open_contexts(self):
        """[(execution context, its stream)]: one for each slot where the GPU's memory suffices, else fewer, one at least.

        Engines that TensorRT 8 built let contexts share an optimization profile only if told to (build_engine.build). (TensorRT
        developer guide, "Multiple Execution Contexts".)
        """
        cuda, contexts = self._cuda, []
        free = cuda.mem_get_info()[0]
        for _ in range(SLOTS):
            context = self._engine.create_execution_context()
            if context is None or context.active_optimization_profile < 0:
                break
            contexts.append((context, cuda.Stream()))
            left = cuda.mem_get_info()[0]
            if (free - left) / len(contexts) * (SLOTS - 1) > CONTEXTS_PART * free:
                break
        if not contexts:
            raise UserError(f"--engine {self._path}: too little GPU memory ({self._logger.last()}); free some")
        return contexts

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

    @_on_gpu
    def infer(self, batch, true_shapes=None):
        return self.finish(self.start(batch, true_shapes))

    @_on_gpu
    def start(self, batch, true_shapes=None):
        if len(batch) > self.max_batch:
            raise ValueError(f"the engine takes at most {self.max_batch} images at a time, not {len(batch)}")
        size = self.input.batch or len(batch)
        number, self._turn = self._turn, (self._turn + 1) % SLOTS
        slot, cuda = self._slots[number], self._cuda
        slot.begun.record(self._copying_in)
        self._put(slot, batch, true_shapes, size)
        slot.copied.record(self._copying_in)
        slot.stream.wait_for_event(slot.copied)
        run = self._network(number, size)
        slot.computing.record(slot.stream)
        run()
        slot.computed.record(slot.stream)
        self._copying_out.wait_for_event(slot.computed)
        places, end = self._places(size)
        cuda.memcpy_dtoh_async(slot.host_outputs[:end], slot.device_outputs, self._copying_out)
        slot.done.record(self._copying_out)
        return slot, size, len(batch), places

    def _put(self, slot, batch, true_shapes, size):
        """Queues what brings a batch of images or DeviceImages, filled up to `size`, into a slot's inputs."""
        name, spec, copy = self.input.name, self.input, self._cuda.memcpy_htod_async
        if isinstance(batch[0], DeviceImage):
            slot.images = batch  # they are read until `finish`
            tables = slot.table[: len(batch)], slot.device_table
            resizer = self.metadata["resizer"]
            resize_images(batch, true_shapes, resizer, spec, *tables, slot.device_inputs[name], self._copying_in)
        else:
            # From page-locked memory copies go on beside the network; those made from it before have ended: see `finish`.
            copy(slot.device_inputs[name], image_input(batch, spec, slot.host_inputs[name][:size]), self._copying_in)
        if spec.true_shape:
            shapes = slot.host_inputs[spec.true_shape][:size]
            shapes[:] = shape_input(true_shapes, len(batch), spec)
            copy(slot.device_inputs[spec.true_shape], shapes, self._copying_in)

    @_on_gpu
    def finish(self, ticket):
        slot, size, images, places = ticket
        slot.done.synchronize()
        slot.images = None
        begun = time.perf_counter()
        memory = slot.host_outputs.copy()
        results = {}
        for name, place in places.items():
            values = memory[place : place + self._bytes(name, size)]
            results[name] = values.view(self._types[name]).reshape(self._shape(name, size))
        found = split_detections(results, images)
        for stage, seconds in zip(STAGES, (*slot.seconds(), time.perf_counter() - begun), strict=True):
            self.spent[stage] += seconds
        return found

    def _network(self, number, size, cuda_graph=True):
        """What queues the network on `size` images in a slot's memory: as a CUDA graph, captured at the first call, if it can be."""
        slot = self._slots[number]

        def enqueue():
            if not slot.context.execute_async_v3(slot.stream.handle):
                raise UserError(f"--engine {self._path}: the network failed ({self._logger.last()}); {REBUILD}")

        def bind_and_enqueue():
            self._bind(slot, size)
            enqueue()

        if not cuda_graph:
            self._bind(slot, size)
            return enqueue
        if (number, size) not in self._cuda_graphs:
            bind_and_enqueue()  # the first run of a shape allocates, which cannot be captured
            slot.stream.synchronize()
            self._cuda_graphs[number, size] = CudaGraph.capture(slot.stream, enqueue)
        captured = self._cuda_graphs[number, size]
        return captured.launch if captured else bind_and_enqueue

    def _bind(self, slot, size):
        """Points a slot's context at its memory, with `size` images in it."""
        for name in self._inputs:
            slot.context.set_tensor_address(name, int(slot.device_inputs[name]))
            slot.context.set_input_shape(name, self._shape(name, size))
        for name, place in self._places(size)[0].items():
            slot.context.set_tensor_address(name, int(slot.device_outputs) + place)

    def _fill(self, batch, true_shapes=None):
        """Puts images (see infer) into every slot; returns the size of such a batch."""
        self._turn = 0
        for _ in self._slots:
            self.infer(batch, true_shapes)
        return self.input.batch or len(batch)

    @_on_gpu
    def images_per_second(self, batch, true_shapes=None, images=500):
        size = self._fill(batch, true_shapes)
        runs = [self._network(number, size) for number in range(SLOTS)]
        for count in (SLOTS, max(images // len(batch), 10 * SLOTS)):  # to warm up, to measure
            begun = time.perf_counter()
            for run in itertools.islice(itertools.cycle(runs), count):
                run()
            for slot in self._slots:
                slot.stream.synchronize()
            seconds = time.perf_counter() - begun
        return count * len(batch) / seconds

    @_on_gpu
    def benchmark(self, batch, runs=200, cuda_graph=True):
        """GPU time of the network on one batch (see infer) at a time by CUDA events, copies not included.

        What suppression costs depends on the images. Returns (median ms, 99th percentile ms, whether a CUDA graph was
        replayed).
        """
        size, stream, times = self._fill(batch), self._slots[0].stream, []
        run = self._network(0, size, cuda_graph)
        for _ in range(20):
            run()
        for _ in range(runs):
            begin, end = self._cuda.Event(), self._cuda.Event()
            begin.record(stream)
            run()
            end.record(stream)
            end.synchronize()
            times.append(end.time_since(begin))
        return float(np.median(times)), float(np.percentile(times, 99)), cuda_graph and bool(self._cuda_graphs[0, size])

    def weight_types(self):
        """{type of weights, such as "Half" or "Int8": number of layers}; empty where TensorRT tells nothing of them."""
        inspector = self._engine.create_engine_inspector()
        return count_weight_types(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    @_on_gpu
    def profile(self, batch, runs=20):
        """Mean GPU time of each layer in ms on a batch (see infer), {layer name: ms}, slowest first."""
        trt, times = self._trt, {}

        class Profiler(trt.IProfiler):
            def __init__(self):
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name, ms):
                times[name] = times.get(name, 0.0) + ms

        run, slot = self._network(0, self._fill(batch), cuda_graph=False), self._slots[0]
        slot.context.profiler = Profiler()
        for _ in range(runs):
            run()
            slot.stream.synchronize()
        return {name: ms / runs for name, ms in sorted(times.items(), key=lambda pair: -pair[1])}

    def close(self):
        if self.gpu:
            self._free()
            self.gpu.close()
            self.gpu = None

    @_on_gpu
    def _free(self):
        for cuda_graph in filter(None, self._cuda_graphs.values()):
            cuda_graph.free()
        for slot in self._slots:
            slot.free()
        # The order matters: a context outlives neither its engine nor the CUDA context.
        for slot in self._slots:
            slot.context = slot.stream = None
        self._cuda_graphs, self._slots = {}, []
        self._copying_in = self._copying_out = None
        self._engine = self._runtime = None

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
