"""Times every kernel of an engine's network, those inside TensorRT's ForeignNodes too, which its own profiler shows as one layer.

    python benchmarks/kernels.py --engine engine.trt --input val2017 --batch 1 8 32

By CUPTI (pip install nvidia-cuda-cupti-cu12), in the order in which they run, as a CUDA graph and without: number, microseconds,
microseconds since the end of the one before (less than 0: they ran side by side), blocks, threads, name. 10 runs, medians; one
execution context. Names of kernels that TensorRT made itself tell their ops: SliMax is a Slice and a maximum.
"""

import collections
import ctypes
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commandline import UserError, run
from commandline.inputs import find_images
from commandline.options import count, make_parser

from images.decoding import load_image
from images.resizing import preprocess
from runtimes.trt_detector import TrtDetector

RUNS = 10
BUFFER = 8 << 20  # bytes that CUPTI writes records to at a time
# CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, _MEMCPY, _MEMSET.
KERNEL, COPY, FILL = 10, 1, 2


class Record(ctypes.Structure):
    """The beginning of CUDA 12's CUpti_ActivityKernel9. Copies and fills have `start` and `end` there too."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("kind", "sizes", "requested", "executed")),
        *((name, ctypes.c_uint64) for name in ("start", "end", "completed")),
        *((name, ctypes.c_uint32) for name in ("device", "context", "stream")),
        *((name, ctypes.c_int32 * 3) for name in ("grid", "block")),
        *((name, ctypes.c_uint32) for name in ("static", "dynamic", "local", "local_total", "correlation")),
        ("grid_id", ctypes.c_int64),
        ("name", ctypes.c_char_p),
    )


class Trace:
    """Collects CUPTI's records: (start ns, end ns, blocks, threads, name)."""

    def __init__(self):
        self._library, self.records, self._buffers = ctypes.CDLL(find_cupti()), [], {}
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        give = ctypes.CFUNCTYPE(None, *(ctypes.POINTER(kind) for kind in (pointer, size, size)))
        take = ctypes.CFUNCTYPE(None, pointer, ctypes.c_uint32, pointer, size, size)
        self._calls = give(self._give), take(self._take)  # kept: CUPTI calls them
        self._check(self._library.cuptiActivityRegisterCallbacks(*self._calls))

    def _check(self, status):
        if status:
            raise UserError(f"CUPTI gives status {status}; it needs the driver's version or an older one")

    def _give(self, buffer, size, most):
        memory = ctypes.create_string_buffer(BUFFER + 8)
        address = (ctypes.addressof(memory) + 7) & ~7  # of a multiple of 8
        self._buffers[address] = memory
        buffer[0], size[0], most[0] = address, BUFFER, 0

    def _take(self, _context, _stream, buffer, _size, valid):
        found = ctypes.POINTER(Record)()
        step = self._library.cuptiActivityGetNextRecord
        while not step(ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(found)):
            x = found.contents
            kernel = (tuple(x.grid), tuple(x.block), x.name.decode()) if x.kind == KERNEL else ((), (), "copy or fill")
            self.records.append((x.start, x.end, *kernel))
        del self._buffers[buffer]

    def of(self, function):
        """The records of what `function` runs on the GPU, in order."""
        self.records = []
        for kind in (KERNEL, COPY, FILL):
            self._check(self._library.cuptiActivityEnable(kind))
        function()
        for kind in (KERNEL, COPY, FILL):
            self._check(self._library.cuptiActivityDisable(kind))
        self._check(self._library.cuptiActivityFlushAll(1))
        return sorted(self.records)


def find_cupti():
    """The library of nvidia-cuda-cupti-cu12."""
    try:
        import nvidia.cuda_cupti as package
    except ImportError as error:
        raise UserError("CUPTI is not installed: pip install nvidia-cuda-cupti-cu12") from error
    return str(next((Path(package.__path__[0]) / "lib").glob("libcupti.so.*")))


def alike(records):
    """The runs [RUNS] of all records, each in the order of the first: side by side, kernels may begin one before the other or after.

    Raises UserError where they are not of the same kernels.
    """
    each, places = len(records) // RUNS, []
    for i in range(RUNS):
        seen, place = collections.Counter(), {}
        for record in records[i * each : (i + 1) * each]:
            place[record[-1], seen[record[-1]]] = record
            seen[record[-1]] += 1
        places.append(place)
    if not each or len(records) % RUNS or any(place.keys() != places[0].keys() for place in places):
        raise UserError(f"the runs were not alike ({len(records)} kernels in {RUNS} runs); try again")
    return [[place[key] for key in places[0]] for place in places]


def show(title, records):
    """records: of RUNS runs of the same."""
    runs = alike(records)
    records, each = runs[0], len(runs[0])
    times = np.array([[record[:2] for record in run] for run in runs], np.int64) / 1000
    took = np.median(times[..., 1] - times[..., 0], axis=0)
    since = np.median(times[:, 1:, 0] - times[:, :-1, 1], axis=0)
    span = np.median(times[..., 1].max(axis=1) - times[..., 0].min(axis=1))
    print(f"\n{title}: {each} kernels, {took.sum():.1f} us of {span:.1f} us")
    for i, (_, _, grid, block, name) in enumerate(records):
        print(f"{i:4} {took[i]:8.2f} {since[i - 1] if i else 0:7.2f}  {grid} {block} {name[:150]}")


def parse_args(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--engine", required=True, help="the engine.trt")
    parser.add_argument("--input", required=True, help="a folder of images")
    parser.add_argument("--batch", type=count, nargs="+", default=[1], metavar="N", help="images at a time; default: 1")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    files = find_images(args.input).files
    trace = Trace()  # before CUDA begins
    opened = TrtDetector._open_contexts
    TrtDetector._open_contexts = lambda detector: opened(detector)[:1]
    with TrtDetector(args.engine) as detector, detector.gpu:
        for size in args.batch:
            images = [load_image(files[i % len(files)]) for i in range(size)]
            images = np.stack([preprocess(image, detector.metadata["resizer"])[0] for image in images])
            for cuda_graph in (True, False):
                network, stream = detector._network(0, detector._fill(images), cuda_graph), detector._slots[0].stream

                def repeat(network=network, stream=stream):
                    for _ in range(RUNS):
                        network()
                        stream.synchronize()

                repeat()
                if cuda_graph and not detector._cuda_graphs[0, size]:
                    continue  # it could not be captured
                show(f"batch {size}, {'as a CUDA graph' if cuda_graph else 'one by one'}", trace.of(repeat))
    print("\nNext: python benchmarks/bench_gpu.py --help")


if __name__ == "__main__":
    run(main)
