"""Images through a detector and on, all stages at once.

Decoding and resizing go on in threads, the network beside them, what is done with each image's detections in a pool.
Results come in input order, memory is bounded.
"""

import collections
import contextlib
import dataclasses
import time
from pathlib import Path

from cli import UserError
from image_batcher import ImageBatcher

# Batches that the network has been given and not yet given back: one runs while the next is being put together.
BATCHES_AHEAD = 2
# Images whose results are being worked on, per worker.
IMAGES_AHEAD = 4


@dataclasses.dataclass
class Times:
    """Seconds spent in each stage, added up over its threads, and the number of images."""

    decode: float = 0.0
    resize: float = 0.0
    network: float = 0.0
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


def detect_files(detector, files, batch_size, work, pool, workers, times=None):
    """Runs the detector on image files and `work(path, image, placement, detections)` on each; yields (path, its result).

    pool: an executor for `work`, of `workers`; None: in the caller's thread. times: a Times to add to. A file that cannot
    be read is warned about and left out. Any other error, in whatever stage, is raised here; what `work` raises as an OSError
    or ValueError becomes a UserError that names the file. Closing the generator (Ctrl-C does) ends all stages.
    """
    times = times if times is not None else Times()
    batcher = ImageBatcher(files, detector.metadata["resizer"], batch_size)
    running, working = collections.deque(), collections.deque()
    batches, busy = iter(batcher), detector.busy_seconds

    def hand_on(batch, ticket):
        try:
            found = detector.finish(ticket)
        except UserError:
            raise
        except Exception as error:  # whatever the runtime raises
            names = ", ".join(str(path) for path in batch.paths)
            raise UserError(f"the network failed on {names}: {error}") from error
        for item in zip(batch.paths, batch.images, batch.placements, found, strict=True):
            working.append((item[0], pool.submit(_timed, work, *item) if pool else _Later(_timed, work, *item)))

    def finished(most):
        while len(working) > most:
            path, future = working.popleft()
            with _naming(path):
                result, seconds = future.result()
            times.work += seconds
            times.images += 1
            yield path, result

    try:
        for batch in batches:
            running.append((batch, detector.start(batch.tensor, batch.true_shapes)))
            if len(running) >= BATCHES_AHEAD:
                hand_on(*running.popleft())
            yield from finished(max(batch_size, IMAGES_AHEAD * workers) if pool else 0)
        while running:
            hand_on(*running.popleft())
            yield from finished(IMAGES_AHEAD * workers if pool else 0)
        yield from finished(0)
    finally:
        for _, future in working:
            future.cancel()
        batches.close()
        # What runs must end before its memory goes; its error was raised, or is moot.
        with contextlib.suppress(Exception):
            while running:
                detector.finish(running.popleft()[1])
        times.network += detector.busy_seconds - busy
        times.decode += batcher.decode_seconds
        times.resize += batcher.resize_seconds
        times.skipped += batcher.skipped


def _timed(work, *item):
    begun = time.perf_counter()
    result = work(*item)
    return result, time.perf_counter() - begun


@contextlib.contextmanager
def _naming(path):
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{Path(path)}: its results could not be written ({error}); choose another --output") from error


class _Later:
    """What a pool would give, worked out when it is asked for."""

    def __init__(self, call, *arguments):
        self._call, self._arguments = call, arguments

    def result(self):
        return self._call(*self._arguments)

    def cancel(self):
        pass
