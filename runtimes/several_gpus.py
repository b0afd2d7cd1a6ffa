"""Several GPUs of one machine: a process for each, files dealt out to them, results in input order.

Threads would share Python's lock.
"""

import contextlib
import dataclasses
import functools
import heapq
import itertools
import multiprocessing
import os
import queue
import threading

from commandline import UserError

import numpy as np

from images.resizing import Placement
from runtimes import open_detector
from runtimes.detector import Detections
from runtimes.gpu_images import choose_decoder
from runtimes.pipeline import Detected, Times, detect_files, open_workers
from runtimes.processes import end_with_parent, interrupts_ignored, processor_count

# Files that a GPU is dealt at a time; results that it tells of at a time; results of one that wait for those of another.
DEALT, TOLD, WAITING = 64, 64, 1024


@dataclasses.dataclass(frozen=True)
class Job:
    """What each process is to do; all of it travels there."""

    model: str  # path of the engine
    resizer: dict  # of its metadata, as chosen
    batch_size: int
    images: int  # of each, about
    cores: int  # for each
    load: functools.partial  # of load_image
    decoder: str  # of choose_decoder
    exif_rotate: bool


class SeveralGpus:
    """Processes that have the engine open, one on each GPU. A context manager; `detected` is called once."""

    def __init__(self, job, gpus):
        """gpus: their numbers. Raises UserError, on entering, where the engine cannot run on one of them."""
        self.gpus, self._job, self._parts = gpus, job, []

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        try:
            with interrupts_ignored():
                for gpu in self.gpus:
                    ours, theirs = context.Pipe()
                    process = context.Process(target=_serve, args=(theirs, self._job, gpu))
                    process.start()
                    theirs.close()
                    self._parts.append((process, ours))
            for gpu, (_, connection) in zip(self.gpus, self._parts, strict=True):
                _receive(connection, gpu)  # it is ready
        except BaseException:
            self.close()
            raise
        return self

    def detected(self, files, times):
        """Yields a pipeline.Detected for each file, in order, without its image; adds to `times`.

        An error in any of the processes is raised here.
        """
        stopped, streams = threading.Event(), []
        for turn, (gpu, (_, connection)) in enumerate(zip(self.gpus, self._parts, strict=True)):
            numbers = [n for n in range(len(files)) if n // DEALT % len(self._parts) == turn]
            connection.send([(number, files[number]) for number in numbers])
            streams.append(_Stream(functools.partial(_receive, connection, gpu), stopped))
        try:
            for number, placement, found in heapq.merge(*streams, key=lambda item: item[0]):
                yield Detected(number, files[number], None, placement, found)
        finally:
            stopped.set()
            for stream, (_, connection) in zip(streams, self._parts, strict=True):
                with contextlib.suppress(OSError):  # it has ended
                    connection.send("stop")
                stream.join()
                times.add(stream.times)

    def close(self):
        for process, connection in self._parts:
            connection.close()
            process.join()
        self._parts = []

    def __exit__(self, *_):
        self.close()


def _receive(connection, gpu):
    """The next message of a process. Raises the UserError that it sent, or one that says that it has ended."""
    try:
        message = connection.recv()
    except (EOFError, OSError) as error:
        raise UserError(
            f"--gpus {gpu}: the system ended its process; if for want of memory, --batch_size 1 takes less"
        ) from error
    if isinstance(message, UserError):
        raise message
    return message


class _Stream(threading.Thread):
    """Takes a process's results ahead of who iterates over them: WAITING at most."""

    def __init__(self, receive, stopped):
        super().__init__()
        self.times = Times()
        self._receive, self._stopped = receive, stopped
        self._messages = queue.Queue(-(-WAITING // TOLD))
        self.start()

    def run(self):
        message = None
        while not isinstance(message, Times | UserError):
            try:
                message = self._receive()
            except UserError as error:  # raised where the results are taken
                message = error
            if isinstance(message, Times):
                self.times = message
            while not self._stopped.is_set():
                with contextlib.suppress(queue.Full):
                    self._messages.put(message, timeout=0.1)
                    break

    def __iter__(self):
        while not isinstance(message := self._messages.get(), Times):
            if isinstance(message, UserError):
                raise message
            yield from _unpack(*message)


def _pack(numbers, items):
    """Detected items as few objects, which travel faster: (numbers, of their placements, of how many detections, arrays)."""
    parts = {}
    for field in dataclasses.fields(Detections):
        values = [getattr(item.found, field.name) for item in items]
        if values[0] is not None:
            parts[field.name] = np.concatenate(values)
    placements = [(item.placement.height, item.placement.width, item.placement.true_shape) for item in items]
    return numbers, placements, [len(item.found.scores) for item in items], parts


def _unpack(numbers, placements, counts, parts):
    """Yields (number, Placement, Detections) of what `_pack` made."""
    end = 0
    for number, placement, count in zip(numbers, placements, counts, strict=True):
        begin, end = end, end + count
        found = Detections(**{name: values[begin:end] for name, values in parts.items()})
        yield number, Placement(*placement), found


def _serve(connection, job, gpu):
    """A GPU's process: says that it is ready, takes [(number, path)], gives what `_pack` makes of some results, and at the
    end its Times, or else the UserError that ended it. Another message ends it early."""
    end_with_parent()
    try:
        with open_detector(job.model, gpu) as detector:
            _detect(connection, job, detector)
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):  # it is not needed any more
        pass
    except Exception as error:
        connection.send(UserError(f"--gpus {gpu}: {type(error).__name__}: {error}"))


def _detect(connection, job, detector):
    detector.metadata["resizer"] = job.resizer
    decoder = choose_decoder(job.decoder, detector, [], job.exif_rotate)
    with open_workers(detector, job.images, job.batch_size, 1 if decoder else job.cores) as workers:
        connection.send(None)
        mine, times = connection.recv(), Times()
        files = [path for _, path in mine]
        items = detect_files(detector, files, job.batch_size, workers, times, load=job.load, decoder=decoder)
        with contextlib.closing(items):
            while told := list(itertools.islice(items, TOLD)):
                connection.send(_pack([mine[item.number][0] for item in told], told))
                if connection.poll():
                    break
    connection.send(times)


def job_for(model, detector, files, gpus, batch_size, load, decoder, exif_rotate=False):
    """The Job that shares `files` out to GPUs as an open detector of one of them would do it all.

    decoder: what choose_decoder was asked for, or "cpu" where it gave None.
    """
    return Job(
        os.path.abspath(model),
        detector.metadata["resizer"],
        batch_size,
        len(files) // len(gpus),
        max(1, processor_count() // len(gpus)),
        load,
        decoder,
        exif_rotate,
    )
