"""Processes that this one starts: how many there is room for, how they begin, how they end, how arrays reach them."""

import concurrent.futures
import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import threading
from pathlib import Path

import numpy as np

CGROUP = Path("/sys/fs/cgroup")  # a container's own, in it


def processor_count():
    """How many processors this process may use: taskset, a cpuset, Slurm or a container's quota may leave it fewer than there are."""
    there = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )  # Linux; elsewhere
    return min(there, quota() or there)


def quota():
    """Processors that a container's time is enough for (`docker --cpus`, a limit of Kubernetes), rounded up; None without a quota.

    (Linux documentation, "Control Group v2", cpu.max; "CFS Bandwidth Control" for version 1.)
    """
    for names in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):
        with contextlib.suppress(OSError, ValueError):  # no such file; `max` and -1 are no quota
            time, period = map(int, " ".join((CGROUP / name).read_text() for name in names).split())
            return math.ceil(time / period) if time > 0 else None
    return None


def end_with_parent():
    """Called in a new process: it ends with the one that started it, however that one ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _begin_process(initializer, arguments):
    """What a process of a pool does first."""
    end_with_parent()
    if initializer:
        initializer(*arguments)


@contextlib.contextmanager
def interrupts_ignored():
    """What is started here ignores Ctrl-C from its first instruction on: who started it ends it."""
    mine = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if mine else None
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGINT, before)


def process_pool(count, initializer=None, arguments=()):
    """A pool of fresh processes, started. Ctrl-C does not reach them: what waits for them ends them."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(count, context, _begin_process, (initializer, arguments))
    with interrupts_ignored():
        for _ in range(count):  # none is idle yet: each starts one
            pool.submit(os.getpid)
    return pool


def pack(items, memory):
    """(pickle, places) of items whose arrays are copied into a shared memory, as far as they fit: (begin, bytes) of each.

    (Python documentation, pickle, "Out-of-band Buffers".)
    """
    memory, places, end = np.frombuffer(memory, np.uint8), [], 0

    def stays_in_the_pickle(buffer):
        nonlocal end
        data, begin = np.frombuffer(buffer.raw(), np.uint8), -(-end // 64) * 64  # aligned
        if begin + data.nbytes > memory.size:
            return True
        end = begin + data.nbytes
        memory[begin:end] = data
        places.append((begin, data.nbytes))
        return False

    return pickle.dumps(items, protocol=5, buffer_callback=stays_in_the_pickle), places


def unpack(packed, memory):
    """The items of `pack`, whose arrays lie in the memory."""
    data, places = packed
    memory = np.frombuffer(memory, np.uint8)
    return pickle.loads(data, buffers=[memory[begin : begin + size] for begin, size in places])
