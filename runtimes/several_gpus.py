"""Several GPUs of one machine: an open engine on each, files dealt out to them, results in input order."""

import contextlib
import dataclasses
import heapq
import os
import queue
import threading

from images.decoding import load_image
from runtimes.pipeline import Times, detect_files, open_workers

# Files that a GPU is dealt at a time, and results of one that wait for those of another, at most.
DEALT, WAITING = 64, 512
END = object()


def detect_on_all(detectors, files, batch_size, times, load=load_image, decoders=None):
    """As pipeline.detect_files, on several open detectors at once; no images are kept.

    decoders: a GpuDecoder for each of them, or None. An error in any of them is raised here and ends them all.
    """
    streams = []
    with contextlib.ExitStack() as stack:
        for turn, detector in enumerate(detectors):
            mine = [n for n in range(len(files)) if n // DEALT % len(detectors) == turn]
            decoder = decoders[turn] if decoders else None
            cores = max(1, (os.cpu_count() or 1) // len(detectors))
            workers = stack.enter_context(open_workers(detector, len(mine), batch_size, cores, decoder))
            stream = _Stream(detector, [files[n] for n in mine], mine, batch_size, workers, load, decoder)
            streams.append(stack.enter_context(stream))
        try:
            yield from heapq.merge(*streams, key=lambda item: item.number)
        finally:
            for stream in streams:
                stream.close()
                times.add(stream.times)


class _Stream:
    """Runs a detector on its files in a thread of its own; iterates over what it found. A context manager."""

    def __init__(self, detector, files, numbers, batch_size, workers, load, decoder):
        """numbers: of the files among all, for Detected.number."""
        self.times, self._numbers = Times(), numbers
        self._found, self._stopped = queue.Queue(WAITING), threading.Event()
        self._items = detect_files(detector, files, batch_size, workers, self.times, False, load, decoder)
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            for item in self._items:
                self._put(dataclasses.replace(item, number=self._numbers[item.number]))
                if self._stopped.is_set():
                    break
            self._put(END)
        except BaseException as error:  # raised where the results are taken
            self._put(error)
        finally:
            self._items.close()

    def _put(self, item):
        while not self._stopped.is_set():
            with contextlib.suppress(queue.Full):
                return self._found.put(item, timeout=0.1)

    def __iter__(self):
        while (item := self._found.get()) is not END:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self):
        self._stopped.set()
        self._thread.join()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.close()
