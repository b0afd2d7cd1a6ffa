"""What decodes, draws and writes images: processes where there are cores and images enough, else threads.

Threads share Python's lock, and numpy takes and leaves it dozens of times an image: on 16 cores, 16 threads decoded and
resized 970 images/s, 15 processes 2,466 (BENCHMARKS.md).
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import mmap
import multiprocessing
import os
import signal
import threading
import time

import numpy as np

# From this many cores on, and for this many images, it pays to start processes: each takes a second.
PROCESSES_FROM_CORES = 4
PROCESSES_FROM_IMAGES = 200
MOST_THREADS = 8
# Bytes of network input that a process is given at a time: what handing them over costs is little against them.
TASK_BYTES = 10e6
MOST_TASK_IMAGES = 8


class Workers:
    """An executor (`submit`) of processes or threads, and memory that its tasks can write to. A context manager."""

    def __init__(self, images, image_bytes=0, cores=None):
        """images: how many there will be; image_bytes: of one in the network's input; cores: default, all."""
        cores = cores or os.cpu_count() or 1
        # What a task takes, two for each worker, and the batches of the detector besides.
        self.task_images = max(1, min(MOST_TASK_IMAGES, int(TASK_BYTES / max(1, image_bytes))))
        self.processes = cores >= PROCESSES_FROM_CORES and images >= PROCESSES_FROM_IMAGES
        self.processes &= hasattr(os, "memfd_create")  # Linux
        if self.processes:
            self.count = cores - 1  # this process needs one
            self._pool = process_pool(self.count)
        else:
            self.count, self.task_images = min(cores, MOST_THREADS), 1
            self._pool = concurrent.futures.ThreadPoolExecutor(self.count)
        self.submit = self._pool.submit

    def warm_up(self):
        """Waits until the workers have started."""
        concurrent.futures.wait([self.submit(time.sleep, 0.1) for _ in range(2 * self.count)])

    def memory(self, shape, dtype):
        """New memory for tasks to write to."""
        return Memory(shape, dtype, self.processes)

    def close(self):
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def process_pool(count):
    """A pool of fresh processes (forked ones would share the GPU's state), started. Ctrl-C does not reach them: what waits
    for them ends them."""
    pool = concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))
    mine = threading.current_thread() is threading.main_thread()
    # What is ignored here is ignored by what is started here, from its first instruction on.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if mine else None
    try:
        for _ in range(count):  # none is idle yet: each starts one
            pool.submit(os.getpid)
    finally:
        if mine:
            signal.signal(signal.SIGINT, before)
    return pool


class Memory:
    """Whole pages of memory as `array`; one that is shared reaches other processes by pickle."""

    _numbers = itertools.count()

    def __init__(self, shape, dtype, shared):
        self._number = next(self._numbers)
        self._shape, self._dtype = tuple(shape), np.dtype(dtype)
        size = math.prod(self._shape) * self._dtype.itemsize
        # A file without a name, so that none is left behind, however this process ends.
        self._file = os.memfd_create("images") if shared else -1
        if shared:
            os.ftruncate(self._file, size)
        self.array = np.frombuffer(mmap.mmap(self._file, size), self._dtype).reshape(self._shape)

    def free(self):
        """Shares the memory no more; it goes with the last array on it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __reduce__(self):
        return _attached, (self._number, os.getpid(), self._file, self._shape, self._dtype)


@dataclasses.dataclass(frozen=True)
class _Attached:
    array: np.ndarray


@functools.lru_cache(maxsize=128)
def _attached(number, process, file, shape, dtype):
    """The memory of another process that it has as that file; number: of the memory, as files' numbers come again."""
    return _Attached(np.memmap(f"/proc/{process}/fd/{file}", dtype, "r+", shape=shape))
