"""What decodes, draws and writes images: processes where there are cores and images enough, else threads.

Threads share Python's lock, and numpy takes and leaves it dozens of times an image: on 16 cores, 16 threads decoded and
resized 970 images/s, 15 processes 2,466 (BENCHMARKS.md).
"""

import collections
import concurrent.futures
import ctypes
import functools
import itertools
import multiprocessing
import os
import time

from commandline import UserError

import image_batcher
from runtimes.processes import pack, process_pool, unpack

# From this many cores on, and for this many images, it pays to start processes: each takes a second.
PROCESSES_FROM_CORES = 4
PROCESSES_FROM_IMAGES = 200
MAX_THREADS = 8
# Images that a process is given at a time, to decode and to draw on: handing them over one by one takes this process's
# time. And bytes of network input at a time, at most.
TOGETHER, DRAWN_TOGETHER, TOGETHER_BYTES = 8, 4, 10e6


class Workers:
    """An executor (`submit`) of processes or threads, and what keeps the order of their results. A context manager."""

    def __init__(self, images, image_bytes=0, batch_size=1, cores=None):
        """images: how many there will be; image_bytes: of one in the network's input; cores: default, all."""
        cores = cores or os.cpu_count() or 1
        self.processes = cores >= PROCESSES_FROM_CORES and images >= PROCESSES_FROM_IMAGES
        self.count = cores - 1 if self.processes else min(cores, MAX_THREADS)  # this process needs a core
        self.together = max(1, min(TOGETHER, int(TOGETHER_BYTES / max(1, image_bytes)))) if self.processes else 1
        self.finished, self.seconds = 0, 0.0  # items of `map` that ended well, and seconds spent on them
        # Memory for the tasks ahead, those of a batch, and one more on either side of it.
        slots = 2 * self.count + -(-batch_size // self.together) + 2 if self.processes and image_bytes else 0
        context = multiprocessing.get_context("spawn")  # forked ones would share the GPU's state
        self.memory = [context.RawArray(ctypes.c_uint8, self.together * image_bytes) for _ in range(slots)]
        if self.processes:
            self._pool = process_pool(self.count, image_batcher.attach, (self.memory,))
        else:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.count)
        self.submit = self._pool.submit

    def warm_up(self):
        """Waits until the workers have started."""
        concurrent.futures.wait([self.submit(time.sleep, 0.1) for _ in range(2 * self.count)])

    def in_order(self, submit, items):
        """Yields the results of submit(item), futures, in order; two for each worker are begun before they are asked for."""
        return in_order(submit, items, 2 * self.count - 1)

    def map(self, function, items, through_memory=False):
        """Yields function(*item) for each of the items, in order. Any error is raised here.

        through_memory: arrays in the items go to processes through `memory`, which nothing else may use meanwhile.
        """
        free = collections.deque(range(len(self.memory)) if through_memory else ())
        together = DRAWN_TOGETHER if self.processes else 1
        items = iter(items)
        chunks = iter(lambda: list(itertools.islice(items, together)), [])
        try:
            for results, _ in self.in_order(functools.partial(self._begin, function, free), chunks):
                yield from results
        finally:  # what makes the items may be at work too
            if hasattr(items, "close"):
                items.close()

    def _begin(self, function, free, items):
        slot = free.popleft() if free else None
        if slot is not None:
            items = pack(items, self.memory[slot])
        future = self.submit(_call_each, function, items, slot)
        future.add_done_callback(self._count)
        if slot is not None:
            future.add_done_callback(lambda _: free.append(slot))
        return future

    def _count(self, future):
        if not future.cancelled() and not future.exception():
            results, seconds = future.result()
            self.finished += len(results)
            self.seconds += seconds

    def close(self):
        """Ends what has not begun, waits for the rest; `finished` and `seconds` are right from here on."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def in_order(submit, items, ahead):
    """Yields the results of submit(item), futures, in order; `ahead` more are begun before each is asked for."""
    begun = collections.deque()
    try:
        for item in items:
            begun.append(submit(item))
            if len(begun) > ahead:
                yield _first(begun)
        while begun:
            yield _first(begun)
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "the system ended a process of this one; if for want of memory, --batch_size 1 takes less"
        ) from error
    finally:  # What runs may read memory that goes. None is cancelled: should the pool's processes end meanwhile, it trips.
        concurrent.futures.wait(begun)


def _first(begun):
    """The result of the first future, which stays where it is should Ctrl-C end the wait for it."""
    result = begun[0].result()
    begun.popleft()
    return result


def _call_each(function, items, slot):
    """A worker's task: (results, seconds). slot: the number of the shared memory that `pack` put `items` into, or None."""
    begun = time.perf_counter()
    if slot is not None:
        items = unpack(items, image_batcher.SHARED[slot])
    return [function(*item) for item in items], time.perf_counter() - begun
