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

from cli import UserError
from image_batcher import ImageBatcher
from workers import Workers

# Batches that the network has been given and not yet given back: one comes in, one is computed, one goes out.
BATCHES_AHEAD = 3
# Images whose results are being worked on, per worker.
IMAGES_AHEAD = 4


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
    fixed, most = detector.input.batch, getattr(detector, "most", None)
    if asked is None:
        return fixed or min(usual, most or usual)
    limit = fixed or most
    if asked < 1 or (limit and asked > limit):
        raise UserError(f"--batch_size {asked}: the model takes 1 to {limit or 'any number of'} images at a time")
    return asked


def open_workers(detector, images):
    """The Workers for `images` images: to decode, and for whatever is done with the detections."""
    spec = detector.input
    return Workers(images, 3 * spec.height * spec.width * spec.dtype.itemsize)


def batcher_for(detector, files, batch_size, workers, keep_images=False):
    """An ImageBatcher that puts the images where the detector takes them from."""
    resizer = detector.metadata["resizer"]
    return ImageBatcher(files, resizer, batch_size, workers, detector.input, detector.page_lock, keep_images)


def detect_files(detector, files, batch_size, work, workers, times=None, keep_images=False):
    """Runs the detector on image files and `work(path, image, placement, detections)` on each; yields (path, its result).

    work: called here; returns a result, or the future of one (`submit`). image: for image_batcher.decoded, until there is a
    result, if `keep_images`. times: a Times to add to. A file that cannot be read is warned about and left out. Any other
    error, in whatever stage, is raised here; an OSError or ValueError of `work` or its future becomes a UserError that names
    the file. Closing the generator (Ctrl-C does) ends all stages.
    """
    times = times if times is not None else Times()
    batcher = batcher_for(detector, files, batch_size, workers, keep_images)
    running, working = collections.deque(), collections.deque()
    batches, before = iter(batcher), dict(detector.spent)

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
                working.append((path, timed(work, path, *item), None))
        if keep_images:  # until the last of them is done with
            working[-1] = *working[-1][:2], batch

    def finished(most):
        while len(working) > most:
            path, (result, seconds), done = working.popleft()
            if isinstance(result, concurrent.futures.Future):
                with _naming(path):
                    result, seconds = result.result()
            if done:
                batcher.reuse(done)
            times.work += seconds
            times.images += 1
            yield path, result

    most = max(batch_size, IMAGES_AHEAD * workers.count)
    try:
        for batch in batches:
            running.append((batch, detector.start(batch.tensor, batch.true_shapes)))
            if len(running) >= BATCHES_AHEAD:
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
        # What runs must end before its memory goes; its error was raised, or is moot.
        futures = [result for _, (result, _), _ in working if isinstance(result, concurrent.futures.Future)]
        concurrent.futures.wait([future for future in futures if not future.cancel()])
        with contextlib.suppress(Exception):
            while running:
                detector.finish(running.popleft()[1])
        batcher.close()
        for stage, seconds in detector.spent.items():
            setattr(times, stage, getattr(times, stage) + seconds - before[stage])
        times.decode += batcher.decode_seconds
        times.resize += batcher.resize_seconds
        times.skipped += batcher.skipped


def submit(workers, task, *arguments):
    """For a `work` of detect_files: the future of task(*arguments), in a worker."""
    return workers.submit(timed, task, *arguments)


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
