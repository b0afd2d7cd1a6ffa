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
import shutil
import time
from multiprocessing.heap import Arena

from commandline import UserError, unstopped

import image_batcher
from images import shared_memory
from runtimes.processes import pack, process_pool, processor_count, unpack

# From this many cores on, and for this many images, it pays to start processes: each takes a second.
PROCESSES_FROM_CORES = 4
PROCESSES_FROM_IMAGES = 200
MAX_THREADS = 8
# Images that a process is given at a time, to decode and to draw on: handing them over one by one takes this process's
# time. And bytes of network input at a time, at most.
TOGETHER, DRAWN_TOGETHER, TOGETHER_BYTES = 8, 4, 10e6
# Bytes for decoded images that are kept to be drawn on, at most, and this part of what is free of /dev/shm: Docker gives 64 MB.
# Pages come as they are written to, and a process ends where there are no more. Images without a place are decoded again.
PICTURE_BYTES, PICTURE_PART = 2_000_000_000, 0.25


class Workers:
    """An executor (`submit`) of processes or threads, and what keeps the order of their results. A context manager."""

    def __init__(self, images, image_bytes=0, batch_size=1, cores=None):
        """images: how many there will be; image_bytes: of one in the network's input; cores: default, all that may be used."""
        cores = cores or processor_count()
        self.processes = cores >= PROCESSES_FROM_CORES and images >= PROCESSES_FROM_IMAGES
        self.count = cores - 1 if self.processes else min(cores, MAX_THREADS)  # this process needs a core
        self.together = max(1, min(TOGETHER, int(TOGETHER_BYTES / max(1, image_bytes)))) if self.processes else 1
        self.finished, self.seconds = 0, 0.0  # items of `map` that ended well, and seconds spent on them
        # Memory for the tasks ahead, those of a batch, and one more on either side of it.
        slots = 2 * self.count + -(-batch_size // self.together) + 2 if self.processes and image_bytes else 0
        context = multiprocessing.get_context("spawn")  # forked ones would share the GPU's state
        self.memory = [context.RawArray(ctypes.c_uint8, self.together * image_bytes) for _ in range(slots)]
        # Of shared_memory.Room, for the tasks ahead, for those that are drawn on, and for the batches between: bytes of each,
        # and where those that are free begin.
        drawn, between = 2 * self.count * DRAWN_TOGETHER, 3 * batch_size
        count = slots and slots + -(-drawn // self.together) + -(-between // self.together)
        self.room_bytes = min(self.together * image_batcher.MAX_KEPT_BYTES, _picture_bytes() // max(count, 1))
        self.rooms = [number * self.room_bytes for number in range(count)]
        if self.processes:
            # An Arena is what RawArrays lie in; they would write zeros to all of it.
            pictures = Arena(max(1, len(self.rooms) * self.room_bytes))
            self._pool = process_pool(self.count, shared_memory.attach, (self.memory, pictures))
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

    @unstopped  # else a task could run, and write its results, that `finished` does not count
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


def _picture_bytes():
    try:
        return int(min(PICTURE_BYTES, PICTURE_PART * shutil.disk_usage("/dev/shm").free))
    except OSError:  # not Linux
        return 0


def in_order(submit, items, ahead):
    """Yields the results of submit(item), futures, in order; `ahead` more are begun before each is asked for.

    An item is held until its result is there: it may be what keeps memory that the task reads from being another's.
    """
    begun = collections.deque()
    try:
        for item in items:
            begun.append((submit(item), item))
            if len(begun) > ahead:
                yield _first(begun)
        while begun:
            yield _first(begun)
    except concurrent.futures.BrokenExecutor as error:
        why = "the system ended a process of this one; if memory is short, free some, or decode and draw with --batch_size 1"
        raise UserError(why) from error
    finally:  # What runs may read memory that goes. None is cancelled: should the pool's processes end meanwhile, it trips.
        concurrent.futures.wait([future for future, _ in begun])


def _first(begun):
    """The result of the first future, which stays where it is should Ctrl-C end the wait for it."""
    result = begun[0][0].result()
    begun.popleft()
    return result


def _call_each(function, items, slot):
    """A worker's task: (results, seconds). slot: the number of the shared memory that `pack` put `items` into, or None."""
    begun = time.perf_counter()
    if slot is not None:
        items = unpack(items, shared_memory.SHARED[slot])
    return [function(*item) for item in items], time.perf_counter() - begun
