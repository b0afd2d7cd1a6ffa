"""Image files -> batches for the network, decoded and resized ahead.

Images are RGB arrays [height, width, 3].
"""

import collections
import dataclasses
import functools
import itertools
import time

from commandline import warn

import numpy as np

from images.decoding import ImageError, load_image
from images.resizing import preprocess
from images.shared_memory import SHARED, Picture, Room, picture_at, rows_of

# Bytes of a decoded image that is kept to be drawn on, at most: 12 megapixels. Larger ones are decoded again.
MAX_KEPT_BYTES = 36_000_000


@dataclasses.dataclass(frozen=True)
class Batch:
    """n images, in input order."""

    numbers: list  # of the files, from 0
    paths: list  # of str or Path, as they were given
    images: list  # as decoded, arrays or Pictures; None where they are not kept
    placements: list  # of images.resizing.Placement
    tensors: list  # of [network height, network width, 3], 0..255; theirs until the next batch is asked for

    @property
    def true_shapes(self):
        """[n, 2] float32: Placement.true_shape of each."""
        return np.float32([placement.true_shape for placement in self.placements])


class ImageBatcher:
    """Iterates over files in batches, in order, decoded and resized ahead by workers.

    A file that cannot be read is warned about and left out; `skipped` counts them. Few images are in memory: two tasks for
    each worker, and a batch.
    """

    def __init__(
        self, paths, resizer, batch_size, workers, dtype=np.float32, keep_images=False, load=load_image, skip=None
    ):
        """workers: a runtimes.workers.Workers. dtype: of the tensors, float32 or uint8. keep_images: whether batches have
        `images`, but for large ones. load: load_image with its options.
        skip: called with the number of a file that cannot be read, its path and why; default: warn_of_skipped."""
        self.paths, self.batch_size, self.skipped = paths, batch_size, 0
        self.decode_seconds = self.resize_seconds = 0.0  # spent in all workers together
        self._skip = skip or warn_of_skipped
        self._workers, self._shape = workers, (resizer["height"], resizer["width"], 3)
        self._dtype = np.dtype(dtype)
        self._prepare = functools.partial(
            prepare, resizer=resizer, dtype=self._dtype, keep=keep_images and not workers.processes, load=load
        )
        self._keep = keep_images and workers.processes
        self._rooms = collections.deque()  # of the tasks under way: a Room, or None
        self._free = collections.deque(range(len(workers.memory)))  # numbers of shared memories, with processes

    def __iter__(self):
        """Yields Batch after Batch, each but the last of batch_size images or, of broken files, fewer."""
        batch, used, numbers = [], [], itertools.count()
        tasks = self._workers.in_order(self._submit, chunks(self.paths, self._workers.together))
        try:
            for slot, paths, results in tasks:
                room = self._rooms.popleft()
                tensors = self._tensors(slot, results)
                if slot is not None and any(isinstance(result, str) for result in results):
                    tensors = tensors.copy()  # the few of it may have to wait long for others
                    self._free.append(slot)
                else:
                    used.append(slot)
                for path, result, tensor in zip(paths, results, tensors, strict=True):
                    number = next(numbers)
                    if isinstance(result, str):
                        self.skipped += 1
                        self._skip(number, path, result)
                        continue
                    image, placement, _, decoding, resizing = result
                    image = Picture(room, *image) if isinstance(image, tuple) else image
                    self.decode_seconds += decoding
                    self.resize_seconds += resizing
                    batch.append((number, path, image, placement, tensor))
                    if len(batch) == self.batch_size:
                        yield Batch(*map(list, zip(*batch, strict=True)))
                        batch = []
                        self._free += used[:-1]
                        del used[:-1]
            if batch:
                yield Batch(*map(list, zip(*batch, strict=True)))
        finally:
            tasks.close()

    def _tensors(self, slot, results):
        """The tensors of a task's results, None for files that could not be read."""
        if slot is None:
            return [None if isinstance(result, str) else result[2] for result in results]
        return rows_of(self._workers.memory[slot], self._shape, self._dtype)[: len(results)]

    def _submit(self, paths):
        """Gives paths to a worker; the future's result is (number of the shared memory or None, paths, results)."""
        slot = self._free.popleft() if self._workers.processes else None
        room = Room(self._workers.rooms) if self._keep and self._workers.rooms else None
        self._rooms.append(room)
        place = (room.begin, room.begin + self._workers.room_bytes) if room else None
        return self._workers.submit(_prepared, slot, place, paths, self._prepare)


def warn_of_skipped(number, path, why):
    """What is done about a file that cannot be read where nothing else is."""
    warn(f"{path}: skipped, {why}")


def _prepared(slot, place, paths, prepare):
    """A worker's task."""
    return slot, paths, prepare(paths, slot, place)


def prepare(paths, slot, place, resizer, dtype, keep, load):
    """Decodes and resizes images; returns for each (image or None, Placement, tensor, seconds of decoding, of resizing), or
    why it cannot be read.

    slot: the number of the shared memory that tensors are written to, in a process that has it; then they are None here.
    place: the bytes (begin, end) for decoded images there, of which it returns (begin, shape); None: it has none to keep.
    keep: return the decoded images themselves, if they are not large.
    """
    shape, results = (resizer["height"], resizer["width"], 3), []
    rows = None if slot is None else rows_of(SHARED[slot], shape, dtype)
    for row, path in enumerate(paths):
        try:
            begun = time.perf_counter()
            image = load(path)
            decoded = time.perf_counter()
            tensor, placement = preprocess(image, resizer, np.empty(shape, dtype) if rows is None else rows[row])
        except ImageError as error:
            results.append(str(error))
            continue
        kept = image if keep and image.size <= MAX_KEPT_BYTES else None
        if place and image.size <= min(MAX_KEPT_BYTES, place[1] - place[0]):
            picture_at(place[0], image.shape)[:] = image
            kept, place = (place[0], image.shape), (place[0] + image.size, place[1])
        tensor = tensor if rows is None else None
        results.append((kept, placement, tensor, decoded - begun, time.perf_counter() - decoded))
    return results


def chunks(items, size):
    """Yields lists of `size` items, the last one perhaps shorter."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk
