"""Image files -> batches for the network, decoded and resized ahead.

Images are RGB arrays [height, width, 3]. Boxes are [N, 4] yxyx.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import os
import time

from commandline import warn

import numpy as np

from images.decoding import ImageError, load_image
from images.resizing import preprocess

# Bytes of a decoded image that workers hand on, at most: 12 megapixels. Larger ones are decoded again to be drawn on.
MAX_KEPT_BYTES = 36_000_000
# The share of the machine's memory that all of them together may take.
KEPT_SHARE = 1 / 4


@dataclasses.dataclass(frozen=True)
class Batch:
    """n images, in input order."""

    paths: list  # of str or Path, as they were given
    images: list  # as decoded, for `decoded`; None where they are not kept
    placements: list  # of Placement
    tensor: np.ndarray  # [n, network height, network width, 3], 0..255
    block: object  # whose memory the tensor is: see ImageBatcher.reuse

    @property
    def true_shapes(self):
        """[n, 2] float32: Placement.true_shape of each."""
        return np.float32([placement.true_shape for placement in self.placements])


class ImageBatcher:
    """Iterates over files in batches, in order, decoding ahead, each image straight to its place in a batch.

    Close it where its workers are processes or it has a page_lock. A file that cannot be read is warned about and left out; `skipped` counts
    them. Few images are in memory: two tasks for each worker, rounded up to batches, besides the batches in hand.
    """

    def __init__(
        self, paths, resizer, batch_size, workers, spec=None, page_lock=None, keep_images=True, load=load_image
    ):
        """workers: a workers.Workers, which decode. spec: the detector.InputSpec of the tensors; None: float32,
        NHWC. page_lock: is given each array that tensors lie in, returns what is called to let it go. keep_images: whether
        batches have their `images`. load: load_image with its options, functools.partial."""
        self.paths, self.resizer, self.batch_size = list(paths), resizer, batch_size
        self.skipped = 0
        self.decode_seconds = self.resize_seconds = 0.0  # spent in all workers together
        self._workers, self._spec, self._page_lock, self._keep_images = workers, spec, page_lock, keep_images
        self._load = load
        self._free, self._blocks = [], []  # of _Block: to be used again; to be freed

    def reuse(self, batch):
        """Says that nothing reads the batch's tensor and images any more: their memory goes to a later batch."""
        batch.block.in_use -= 1
        self._recycle(batch.block)

    def _recycle(self, block):
        if block.in_use == 0 and not block.jobs:
            self._free.append(block)

    def __iter__(self):
        workers = self._workers
        waiting, todo = collections.deque(), iter(self.paths)
        # Blocks hold whole batches and whole tasks, or nearly.
        size = self.batch_size * -(-workers.task_images // self.batch_size)
        most = 1 + -(-2 * workers.count * workers.task_images // size)
        # As many images again as wait here may wait to be drawn on.
        row_bytes = kept_bytes(2 * most * size) if workers.processes and self._keep_images else 0
        try:
            while True:
                while len(waiting) < most and (paths := list(itertools.islice(todo, size))):
                    waiting.append(self._begin(workers, paths, size, row_bytes))
                if not waiting:
                    return
                yield from self._batches(waiting[0])
                waiting.popleft()
        finally:
            concurrent.futures.wait([job for block in waiting for job, _ in block.jobs if not job.cancel()])

    def close(self):
        """Gives back shared and page-locked memory, once no worker and no GPU reads it."""
        for block in self._blocks:
            block.free()
        self._blocks, self._free = [], []

    def _begin(self, workers, paths, size, row_bytes):
        """Gives the paths to the workers; returns the block that the images will be in. row_bytes: of _Block."""
        if not self._free:
            self._free.append(_Block(workers, size, self.resizer, self._spec, self._page_lock, row_bytes))
            if workers.processes or self._page_lock:
                self._blocks.append(self._free[-1])
        block = self._free.pop()
        for first in range(0, len(paths), workers.task_images):
            some = paths[first : first + workers.task_images]
            place = block.memory, first, block.layout, block.pixels
            job = workers.submit(_prepare, some, self.resizer, *place, self._keep_images, self._load)
            block.jobs.append((job, some))
        return block

    def _batches(self, block):
        """Yields the block's batches as they are ready, without the files that could not be read."""
        jobs, read, row, yielded, size = collections.deque(block.jobs), [], 0, 0, self.batch_size
        block.in_use += 1  # not to be recycled meanwhile
        while jobs:
            job, paths = jobs.popleft()
            for path, result in zip(paths, job.result(), strict=True):
                row += 1
                if isinstance(result, str):
                    self.skipped += 1
                    warn(f"{path}: skipped, {result}")
                    continue
                image, placement, decoding, resizing = result
                if isinstance(image, tuple):
                    image = SharedImage(block.pixels, row - 1, image)
                self.decode_seconds += decoding
                self.resize_seconds += resizing
                if len(read) != row - 1:
                    block.images[len(read)] = block.images[row - 1]
                read.append((path, image, placement))
            while len(read) - yielded >= size or (not jobs and len(read) > yielded):
                rows = slice(yielded, min(yielded + size, len(read)))
                block.in_use += 1
                yield Batch(*map(list, zip(*read[rows], strict=True)), block.images[rows], block)
                yielded = rows.stop
        block.jobs, block.in_use = [], block.in_use - 1
        self._recycle(block)


def kept_bytes(images):
    """Bytes of a decoded image that processes hand on, of so many images at a time."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(MAX_KEPT_BYTES, int(KEPT_SHARE * memory / images)))


class _Block:
    """Memory for some batches, and the tasks that fill it."""

    def __init__(self, workers, size, resizer, spec, page_lock, row_bytes):
        """row_bytes: memory for each decoded image, where processes are to hand it on; 0: none."""
        self.layout = spec.layout if spec else "NHWC"
        shape = (resizer["height"], resizer["width"])
        shape = (size, 3, *shape) if self.layout == "NCHW" else (size, *shape, 3)
        self.memory = workers.memory(shape, spec.dtype if spec else np.float32)
        self.images = as_images(self.memory.array, self.layout)
        # Pages that no image needs are never made.
        self.pixels = workers.memory((size, row_bytes), np.uint8) if row_bytes else None
        self.jobs, self.in_use = [], 0
        self._unlock = page_lock(self.memory.array) if page_lock else None

    def free(self):
        if self._unlock:
            self._unlock()
        self.memory.free()
        if self.pixels:
            self.pixels.free()


@dataclasses.dataclass(frozen=True)
class SharedImage:
    """A decoded image in memory that processes share."""

    pixels: object  # workers.Memory [n, bytes]
    row: int
    shape: tuple

    @property
    def array(self):
        return self.pixels.array[self.row, : math.prod(self.shape)].reshape(self.shape)


def decoded(image, path, load=load_image):
    """The image [height, width, 3] of a Batch's path; one that was too large to be kept is read again, as it was before."""
    if image is None:
        return load(path)
    return image.array if isinstance(image, SharedImage) else image


def as_images(array, layout):
    """An array of images in the network's layout, seen as [n, height, width, 3]."""
    return array.transpose(0, 2, 3, 1) if layout == "NCHW" else array


def _prepare(paths, resizer, memory, first, layout, pixels, keep, load):
    """A worker's task: decodes and resizes images into memory.array from row `first` on.

    keep: the decoded images too, if they are not large, in the rows of pixels.array where there is one. Returns for each
    (image or its shape in pixels or None, Placement, seconds of decoding, of resizing), or why it cannot be read.
    """
    images, results = as_images(memory.array, layout), []
    for row, path in enumerate(paths, first):
        try:
            begun = time.perf_counter()
            image = load(path)
            between = time.perf_counter()
            _, placement = preprocess(image, resizer, images[row])
        except ImageError as error:
            results.append(str(error))
            continue
        kept = image if keep and not pixels and image.size <= MAX_KEPT_BYTES else None
        if pixels and image.size <= pixels.array.shape[1]:
            pixels.array[row, : image.size] = image.ravel()
            kept = image.shape
        results.append((kept, placement, between - begun, time.perf_counter() - between))
    return results
