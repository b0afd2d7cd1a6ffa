"""Images through a detector and on, all stages at once.

Workers decode and resize, the network runs beside them, and workers may draw and write its detections. Results come in
input order, memory is bounded.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import time
from pathlib import Path

from commandline import UserError

from image_batcher import ImageBatcher
from images.decoding import load_image
from runtimes.workers import Workers

# Images whose results are being worked on, per worker: twice as many as are handed over together.
IMAGES_AHEAD = 8
TASKS_TOGETHER = 4


@dataclasses.dataclass
class Times:
    """Seconds spent in each stage, added up over its workers, and the number of images."""

    decode: float = 0.0
    resize: float = 0.0
    copy: float = 0.0
    network: float = 0.0
    postprocess: float = 0.0
    work: float = 0.0
    images: int = 0
    skipped: int = 0


def choose_batch_size(detector, asked, usual):
    """Images at a time: what a fixed model takes, else `asked`, else as many of `usual` as it can take.

    Raises UserError, naming --batch_size, where the model cannot.
    """
    fixed, most = detector.input.batch, detector.max_batch
    if asked is None:
        return fixed or min(usual, most or usual)
    if asked < 1 or (most and asked > most):
        raise UserError(f"--batch_size {asked}: the model takes 1 to {most or 'any number of'} images at a time")
    return asked


def open_workers(detector, images):
    """The Workers for `images` images: to decode, and for whatever is done with the detections."""
    spec = detector.input
    return Workers(images, 3 * spec.height * spec.width * spec.dtype.itemsize)


def batcher_for(detector, files, batch_size, workers, keep_images=False, load=load_image):
    """An ImageBatcher that puts the images where the detector takes them from."""
    resizer = detector.metadata["resizer"]
    return ImageBatcher(files, resizer, batch_size, workers, detector.input, detector.page_lock, keep_images, load)


def detect_files(detector, files, batch_size, work, workers, times=None, keep_images=False, load=load_image):
    """Runs the detector on image files and `work(path, image, placement, detections)` on each; yields (path, its result).

    work: called here; returns a result, or a Later. image: for image_batcher.decoded, until there is a result, if
    `keep_images`. times: a Times to add to. load: as of ImageBatcher. A file that cannot be read is warned about and left out. Any other error, in
    whatever stage, is raised here; an OSError or ValueError of `work` or its task becomes a UserError that names the file.
    Closing the generator (Ctrl-C does) ends all stages.
    """
    times = times if times is not None else Times()
    batcher = batcher_for(detector, files, batch_size, workers, keep_images, load)
    running, working = collections.deque(), collections.deque()
    batches, before = iter(batcher), dict(detector.spent)
    tasks = _Tasks(workers.task_images)

    def hand_on(batch, ticket):
        try:
            found = detector.finish(ticket)
        except UserError:
            raise
        except Exception as error:  # whatever the runtime raises
            names = ", ".join(str(path) for path in batch.paths)
            raise UserError(f"the network failed on {names}: {error}") from error
        if not keep_images:
            batcher.reuse(batch)
        for path, *item in zip(batch.paths, batch.images, batch.placements, found, strict=True):
            with _naming(path):
                result, seconds = timed(work, path, *item)
            if isinstance(result, Later):
                tasks.add(result)
            working.append((path, result, seconds, None))
        if keep_images:  # until the last of them is done with
            working[-1] = *working[-1][:3], batch

    def finished(most):
        while len(working) > most:
            path, result, seconds, done = working.popleft()
            if isinstance(result, Later):
                with _naming(path):
                    result, seconds = tasks.result(result)
            if done:
                batcher.reuse(done)
            times.work += seconds
            times.images += 1
            yield path, result

    most = max(batch_size, IMAGES_AHEAD * workers.count)
    try:
        for batch in batches:
            running.append((batch, detector.start(batch.tensor, batch.true_shapes)))
            if len(running) >= detector.batches_ahead:
                hand_on(*running.popleft())
            yield from finished(most)
        while running:
            hand_on(*running.popleft())
            yield from finished(most)
        yield from finished(0)
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "the system ended a process of this one; if for want of memory, --batch_size 1 takes less"
        ) from error
    finally:
        batches.close()
        tasks.close()
        with contextlib.suppress(Exception):
            while running:
                detector.finish(running.popleft()[1])
        batcher.close()
        for stage, seconds in detector.spent.items():
            setattr(times, stage, getattr(times, stage) + seconds - before[stage])
        times.decode += batcher.decode_seconds
        times.resize += batcher.resize_seconds
        times.skipped += batcher.skipped


class Later:
    """What a `work` of detect_files returns to have task(*arguments) done by a worker: its result becomes the work's.

    pool: a Workers or an executor. then: called, with nothing, when the task has ended well; maybe in another thread.
    """

    def __init__(self, pool, task, *arguments, then=None):
        self.pool, self.task, self.then = pool, (task, *arguments), then
        self.future = self.place = None


class _Tasks:
    """Hands a few tasks at a time to their pool: to hand them over one by one takes a good part of this process's time."""

    def __init__(self, size):
        self._size, self._waiting, self._futures = min(TASKS_TOGETHER, size), [], set()

    def add(self, later):
        self._waiting.append(later)
        if len(self._waiting) >= self._size:
            self._submit()

    def _submit(self):
        together, self._waiting = self._waiting, []
        future = together[0].pool.submit(_do_all, [later.task for later in together])
        self._futures.add(future)
        for place, later in enumerate(together):
            later.future, later.place, later.task = future, place, None
        future.add_done_callback(lambda future: _tell(future, [later.then for later in together]))

    def result(self, later):
        """(the task's result, seconds it took); raises what it raised."""
        if later.future is None:
            self._submit()
        outcome, seconds = later.future.result()[later.place]
        self._futures.discard(later.future)
        if isinstance(outcome, _Raised):
            raise outcome.error
        return outcome, seconds

    def close(self):
        """What runs must end before its memory goes; its error was raised, or is moot."""
        concurrent.futures.wait([future for future in self._futures if not future.cancel()])


@dataclasses.dataclass(frozen=True)
class _Raised:
    error: Exception


def _do_all(tasks):
    """In a worker: [(result, or what was raised, in _Raised, and seconds)] of some tasks."""
    return [timed(_attempt, *task) for task in tasks]


def _attempt(task, *arguments):
    try:
        return task(*arguments)
    except Exception as error:
        return _Raised(error)


def _tell(future, listeners):
    """Calls the listeners of a future's tasks that ended well."""
    if not future.cancelled() and not future.exception():
        for (outcome, _), listener in zip(future.result(), listeners, strict=True):
            if listener and not isinstance(outcome, _Raised):
                listener()


def timed(task, *arguments):
    """Returns what the task returns, and the seconds it took."""
    begun = time.perf_counter()
    result = task(*arguments)
    return result, time.perf_counter() - begun


@contextlib.contextmanager
def _naming(path):
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(path)}: its results could not be written ({error}); choose another --output") from error
